"""Checkpoints of long runs: named tensors and a few plain values in one safetensors file. Never a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iec.artifact.files import replacing

if TYPE_CHECKING:
    import torch

VERSION = 1


def save(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and the JSON-able `meta` atomically to `path`."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(held, str(temporary), metadata={"iec": json.dumps({"version": VERSION, **meta})})


def load(path: str | os.PathLike[str], *, fingerprint: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save` wrote.

    Raises ValueError when the file is no such checkpoint, has another version, or belongs to another run
    (`meta["fingerprint"]` differs from `fingerprint`).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            meta = json.loads((opened.metadata() or {}).get("iec", "null"))
            if meta is None:
                raise ValueError(f"{path}: no IEC checkpoint (its 'iec' metadata is missing); delete it to start anew")
            if meta.get("version") != VERSION:
                raise ValueError(
                    f"{path}: checkpoint version {meta.get('version')!r}, this release reads {VERSION}; "
                    "delete it to start anew"
                )
            if meta.get("fingerprint") != fingerprint:
                raise ValueError(
                    f"{path}: the checkpoint belongs to another run (fingerprint {meta.get('fingerprint')!r}, "
                    f"this run has {fingerprint!r}); choose another output folder or delete it"
                )
            return {name: opened.get_tensor(name) for name in opened.keys()}, meta  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{Path(path)}: truncated or damaged checkpoint ({error}); delete it to start anew") from error
