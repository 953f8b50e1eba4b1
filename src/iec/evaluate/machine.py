"""The machine and the versions a measurement was made with."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

_PACKAGES = ("iec-diffusion", "torch", "diffusers", "transformers", "accelerate", "numpy", "onnxruntime", "torchao")


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages whose numbers depend on it; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Plain values: processor, cores, torch's threads, vector and int8 instructions, memory, accelerators."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "int8": _int8_instructions(),
        "memory_gib": _memory_gib(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def choose_device(device: str = "auto") -> str:
    """The device to work on: "auto" is CUDA where there is one, else the CPU. Raises ValueError for one torch lacks."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}; try --device cpu") from error
    return device


def _proc(file: str) -> list[tuple[str, str]]:
    """`key: value` lines of a file of Linux's /proc; empty elsewhere."""
    try:
        with open(file, encoding="utf-8") as opened:
            pairs = [line.split(":", 1) for line in opened if ":" in line]
    except OSError:
        return []
    return [(key.strip(), value.strip()) for key, value in pairs]


def _processor() -> str:
    named = [value for key, value in _proc("/proc/cpuinfo") if key == "model name"]
    return named[0] if named else platform.processor() or platform.machine()


def _int8_instructions() -> list[str]:
    """Instructions with which int8 kernels are worth their name: VNNI and AMX (x86), dot product and i8mm (Arm)."""
    listed = next((value.split() for key, value in _proc("/proc/cpuinfo") if key in ("flags", "Features")), [])
    return [flag for flag in ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm") if flag in listed]


def _memory_gib() -> float | None:
    total = next((value for key, value in _proc("/proc/meminfo") if key == "MemTotal"), None)
    return round(int(total.split()[0]) / 2**20, 1) if total else None
