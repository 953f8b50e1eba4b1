"""Fingerprints: a sha256 that tells whether weights, or a configuration, are the ones that were calibrated on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def weights(module: nn.Module) -> str:
    """sha256 of the parameters and persistent buffers of `module`, on whatever device and in whatever memory format.

    Goes through them one by one, so no more than one of them is ever copied. Another dtype is another fingerprint: the
    rounded weights are not the ones that were calibrated on.

    Raises:
        TypeError: an entry of the state dict is no tensor, or one that is not made of plain values (a quantized or
            sparse one, or a packed one of another library).
        ValueError: the weights are on the meta device (offloaded), so that there are none to read.
    """
    try:
        return tensors(module.state_dict())
    except (TypeError, ValueError) as error:
        raise type(error)(f"{type(module).__name__}: {error}") from error


def tensors(named: Mapping[str, torch.Tensor]) -> str:
    """sha256 of name, dtype, shape and bytes of every tensor, in the order of the names. Raises as `weights` does."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(named):
        value = named[name]
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not plain or value.is_quantized:
            raise TypeError(
                f"{name} is a {type(value).__name__} without plain values; a fingerprint needs ordinary tensors: "
                "calibrate the model in floating point"
            )
        if value.is_meta:
            raise ValueError(
                f"{name} is on the meta device, so its values cannot be read; load or onload the model first"
            )
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        # Bytes rather than numbers, as numpy knows no bfloat16; flat first, as a scalar cannot be viewed as bytes.
        held = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(held.numpy()))
    return digest.hexdigest()


def config(values: Mapping[str, Any]) -> str:
    """sha256 of a configuration of plain data, whatever the order of its keys.

    Keys that begin with "_" (class name, library version, path) are left out at every level; tuples count as lists,
    arrays as lists, and whole floats as integers: 1.0 and 1 are the same setting.

    Raises TypeError for a value that is no plain data, naming the key.
    """
    return plain({str(key): _canonical(value, str(key)) for key, value in values.items() if str(key)[:1] != "_"})


def plain(value: Any) -> str:
    """sha256 of JSON-able data as it is: 1 and 1.0 differ, the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _canonical(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        kept = ((str(key), inner) for key, inner in value.items())
        return {key: _canonical(inner, f"{path}.{key}") for key, inner in kept if key[:1] != "_"}
    if isinstance(value, (list, tuple)):
        return [_canonical(inner, path) for inner in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(value)
    if hasattr(value, "tolist"):  # numpy's and torch's arrays and numbers
        return _canonical(value.tolist(), path)
    raise TypeError(
        f"{path}: a {type(value).__name__} is no plain data; found {value!r}, expected text, numbers, lists"
    )
