"""Random directions that belong to a sample: they depend on what its run began with, not on the batch or on rounding."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def marks(samples: Tensor) -> list[bytes]:
    """A digest of each of the samples (B, …)."""
    held = samples.detach().to("cpu", torch.float32).contiguous()
    return [hashlib.blake2b(one.numpy().tobytes(), digest_size=16).digest() for one in held]


def directions(like: Tensor, seeds: list[bytes], step: int, visit: int) -> Tensor:
    """Normal noise of the shape, dtype and device of `like` (B, …), each sample of norm 1; other at each step and visit."""
    found = torch.empty(like.shape, dtype=torch.float32)
    for row, seed in zip(found, seeds, strict=True):
        digest = hashlib.blake2b(seed + step.to_bytes(8, "big") + visit.to_bytes(8, "big"), digest_size=8).digest()
        drawn = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        row.normal_(generator=drawn)
        row /= row.norm()
    return found.to(like.device, like.dtype)
