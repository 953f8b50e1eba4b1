"""Inception-2015, the network of the published FID, sFID, IS, KID and precision/recall numbers.

The graph of Szegedy et al. 2015 (arXiv:1512.00567) as TensorFlow's `classify_image_graph_def.pb` of 2015-12-05 has it,
which differs from torchvision's Inception v3: averages leave out the padding, the last block takes a maximum where the
others average, there are 1008 classes, and images are resized as TensorFlow 1 did, to 299 x 299, and scaled to
(x - 128) / 128. Weights have the names of the published file `pt_inception-2015-12-05-6726825d.pth`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

SIDE = 299
SPATIAL_CHANNELS = 7  # of 192: sFID takes the first ones only, or its covariance would have 55 488 rows
PUBLISHED = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. The padding keeps the size, or is none where `padded` says so."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Link(NamedTuple):
    """A convolution of a branch, or two side by side (`forked`, suffixes a and b: one lies, one stands)."""

    name: str
    outputs: int
    kernel: tuple[int, int]
    forked: bool = False


def _branch(name: str, *links: tuple[int, int, int]) -> tuple[_Link, ...]:
    """Links (outputs, height, width) of a branch, numbered from 1 as in the published file."""
    return tuple(_Link(f"{name}_{i}", outputs, (h, w)) for i, (outputs, h, w) in enumerate(links, 1))


def _single(name: str, outputs: int, side: int = 1) -> tuple[_Link, ...]:
    return (_Link(name, outputs, (side, side)),)


class _Block(nn.Module):
    """Branches side by side, joined along the channels.

    The last one is a pool: an average (which leaves out the padding) or a maximum, each followed by a 1 x 1
    convolution, or, in a block that `reduces` the resolution, a maximum alone.
    """

    def __init__(
        self,
        inputs: int,
        branches: tuple[tuple[_Link, ...], ...],
        pool: int,
        *,
        average: bool = True,
        reduces: bool = False,
    ) -> None:
        super().__init__()
        self._branches, self._average, self._reduces = branches, average, reduces
        self.outputs = 0
        for branch in branches:
            width = inputs
            for link in branch:
                last = reduces and link is branch[-1]
                if link.forked:
                    self.add_module(f"{link.name}a", _Conv(width, link.outputs, (1, 3)))
                    self.add_module(f"{link.name}b", _Conv(width, link.outputs, (3, 1)))
                    width = 2 * link.outputs
                else:
                    made = _Conv(width, link.outputs, link.kernel, 2 if last else 1, padded=not last)
                    self.add_module(link.name, made)
                    width = link.outputs
            self.outputs += width
        if reduces:
            self.outputs += inputs
        else:
            self.branch_pool = _Conv(inputs, pool, (1, 1))
            self.outputs += pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = []
        for branch in self._branches:
            y = x
            for link in branch:
                if link.forked:
                    y = torch.cat([self.get_submodule(f"{link.name}{side}")(y) for side in "ab"], 1)
                else:
                    y = self.get_submodule(link.name)(y)
            joined.append(y)
        if self._reduces:
            joined.append(F.max_pool2d(x, 3, 2))
        elif self._average:
            joined.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        else:
            joined.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        return torch.cat(joined, 1)


def _block_35(inputs: int, pool: int) -> _Block:
    fives = _branch("branch5x5", (48, 1, 1), (64, 5, 5))
    threes = _branch("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
    return _Block(inputs, (_single("branch1x1", 64), fives, threes), pool)


def _block_17(inner: int) -> _Block:
    once = _branch("branch7x7", (inner, 1, 1), (inner, 1, 7), (192, 7, 1))
    twice = _branch("branch7x7dbl", (inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
    return _Block(768, (_single("branch1x1", 192), once, twice), 192)


def _block_8(inputs: int, average: bool) -> _Block:
    threes = (*_branch("branch3x3", (384, 1, 1)), _Link("branch3x3_2", 384, (3, 3), forked=True))
    twice = (
        *_branch("branch3x3dbl", (448, 1, 1), (384, 3, 3)),
        _Link("branch3x3dbl_3", 384, (3, 3), forked=True),
    )
    return _Block(inputs, (_single("branch1x1", 320), threes, twice), 192, average=average)


class Inception(nn.Module):
    """Images uint8 (B, 3, H, W) of any size -> pool (B, 2048), spatial (B, 2023), logits (B, 1008), float32.

    `pool` is the mean of the last block over its 8 x 8 places. `spatial` is what sFID takes: the first 7 channels of the
    1 x 1 branch of Mixed_6d (TensorFlow's mixed_6/conv), at 17 x 17 places, flattened with the channel last. `logits` leave out
    the bias, as in every published IS.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, (3, 3), 2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = _Conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _Conv(80, 192, (3, 3), padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_35(192, 32), _block_35(256, 64), _block_35(288, 64)
        halving = _single("branch3x3", 384, 3), _branch("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
        self.Mixed_6a = _Block(288, halving, 0, reduces=True)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _block_17(inner) for inner in (128, 160, 160, 192)
        )
        threes = _branch("branch3x3", (192, 1, 1), (320, 3, 3))
        sevens = _branch("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))
        self.Mixed_7a = _Block(768, (threes, sevens), 0, reduces=True)
        # The maximum in the last block looks like a slip of 2015, but every published number has it.
        self.Mixed_7b, self.Mixed_7c = _block_8(1280, average=True), _block_8(2048, average=False)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = (resize(images.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        return pool, spatial.permute(0, 2, 3, 1).flatten(1), pool @ self.fc.weight.T


def resize(images: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear resize of floats (B, C, H, W) to `side` x `side` as TensorFlow 1 did it.

    Pixel i of the result is read at i · H / side, without the half-pixel shift of today's libraries and without
    smoothing when it shrinks; FID moves visibly with another choice (Parmar et al. 2022, arXiv:2104.11222).
    """
    for dim in (3, 2):  # across before down, the order in which TensorFlow rounds
        size = images.shape[dim]
        at = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        low = at.long()
        high = (low + 1).clamp(max=size - 1)
        weight = (at - low)[:, None] if dim == 2 else at - low
        first, second = images.index_select(dim, low), images.index_select(dim, high)
        images = first + (second - first) * weight
    return images


def load_inception(file: str | os.PathLike[str]) -> Inception:
    """The network with the weights of `file` (.pth of tensors, or .safetensors), in evaluation mode.

    Raises ValueError for a file that is missing, cannot be read, or holds other weights, naming some of them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the weights of Inception-2015, as {PUBLISHED[1]}")
    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read as weights: {error}") from error
    except Exception as error:  # pickle's own errors have no common base beside Exception
        raise ValueError(
            f"{path}: not a file of tensors alone ({type(error).__name__}); expected {PUBLISHED[1]}"
        ) from error
    if not isinstance(held, Mapping) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise ValueError(f"{path}: holds no plain table of tensors; expected the weights of Inception-2015")
    with torch.device("meta"):  # random weights would only be thrown away
        network = Inception()
    counters = "num_batches_tracked"  # the published file has none, later exports do; inference needs none
    wanted = {name: value for name, value in network.state_dict().items() if not name.endswith(counters)}
    given = {name: value for name, value in held.items() if not name.endswith(counters)}
    wrong = sorted(wanted.keys() ^ given.keys()) or [n for n in wanted if wanted[n].shape != given[n].shape]
    if wrong:
        raise ValueError(
            f"{path}: not the weights of Inception-2015 ({PUBLISHED[1]}): {len(wrong)} entries are missing, unknown or of "
            f"another shape, as {', '.join(wrong[:3])}"
        )
    counts = {name: torch.zeros((), dtype=torch.int64) for name in network.state_dict() if name.endswith(counters)}
    network.load_state_dict({name: value.float() for name, value in given.items()} | counts, assign=True)
    return network.eval().requires_grad_(False)


def published_weights() -> Path:
    """The published weights on this machine, fetched once by the extra `fid` (torch-fidelity), kept in torch's hub folder.

    Raises ImportError when they are not there and torch-fidelity is not installed, RuntimeError when fetching fails.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in PUBLISHED:
        if (folder / name).is_file():
            return folder / name
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as address
    except Exception as error:  # torchvision, which it imports, raises RuntimeErrors beside another torch
        raise ImportError(
            f"the weights of Inception-2015 are not in {folder}, and torch-fidelity, which knows where they are, does not "
            f"import ({error}); pip install 'iec-diffusion[fid]', or give the file: inception:/path/to/{PUBLISHED[1]}"
        ) from error
    target = folder / PUBLISHED[0]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(address, str(target), hash_prefix="6726825d", progress=False)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"the weights of Inception-2015 could not be fetched: {error}; fetch {PUBLISHED[0]} elsewhere and give it as "
            "inception:/path/to/it"
        ) from error
    return target
