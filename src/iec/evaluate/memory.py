"""The most memory that a piece of work had at one time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Bytes, once the block of `peak_memory` has ended: of the process, or, on a GPU, of the tensors there."""

    bytes: int = 0


@contextlib.contextmanager
def peak_memory(device: str = "cpu") -> Iterator[Peak]:
    """Find the most memory in use within the block.

    On the CPU it is resident memory, of libraries and weights, too. Where the system does not let its mark be reset (all but
    Linux), it is the most since the process began.
    """
    peak = Peak()
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
    yield peak
    peak.bytes = _resident()


def _resident() -> int:
    """The mark of resident memory, in bytes."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
