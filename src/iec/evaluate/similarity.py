"""How far images are from others of the same seeds: RMSE, PSNR, SSIM, LPIPS, pair by pair.

Images are tensors (N, C, H, W): uint8 (0..255) or floats in 0..1; the two sides of a comparison may differ in that. All
arithmetic but LPIPS' is float64.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, NamedTuple

import torch
from torch.nn import functional

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
K1, K2 = 0.01, 0.03
_PIXELS = 2**22  # of a batch in float64, so that any number of images needs little memory


def _unit(images: torch.Tensor) -> torch.Tensor:
    """Images as float64 in 0..1."""
    if images.ndim != 4:
        raise ValueError(f"images have the shape {tuple(images.shape)}, expected (N, C, H, W)")
    if images.dtype == torch.uint8:
        return images.double() / 255
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}, expected uint8 or floats in 0..1")
    unit = images.double()
    if not bool(((unit >= 0) & (unit <= 1)).all()):  # false for NaN too
        raise ValueError("float images have values outside 0..1 (or NaN); bring them to 0..1, or give uint8")
    return unit


def _pairs(a: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of both sides. Raises ValueError unless the shapes are equal and there is an image."""
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"images of {tuple(a.shape)} and {tuple(b.shape)}: expected two equal, non-empty shapes")
    batch = max(1, _PIXELS * len(a) // a.numel())
    return list(zip(a.split(batch), b.split(batch), strict=True))


def mean_squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean square difference of each image pair (N,), float64, in 0..1 (1 is black against white)."""
    return torch.cat([(_unit(x) - _unit(y)).square().mean(dim=(1, 2, 3)) for x, y in _pairs(a, b)])


def rmse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each image pair (N,), float64, in 0..1."""
    return mean_squares(a, b).sqrt()


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image pair (N,) in dB: -10 log10(mean square), peak 1; infinite for equal images."""
    return -10 * mean_squares(a, b).log10()


class Fidelity(NamedTuple):
    """`rmse`: mean of the images' RMSE. `psnr`: dB from the mean square error over all images, -10 log10(mean MSE).

    The mean square is taken before the logarithm, so one image that is equal on both sides does not make it infinite.
    """

    rmse: float
    psnr: float


def fidelity(a: torch.Tensor, b: torch.Tensor) -> Fidelity:
    """Same-seed difference between two sets of images, in two numbers."""
    squares = mean_squares(a, b)
    return Fidelity(squares.sqrt().mean().item(), -10 * squares.mean().log10().item())


def ssim_window(height: int, width: int) -> int:
    """Side of SSIM's window for images of this size: 11 pixels, or the largest odd number that fits into a smaller image.

    Where it is not 11, say so beside the number: a smaller window sees less structure, and SSIM comes out otherwise.
    """
    side = min(WINDOW, height, width)
    return side if side % 2 else side - 1


def _gaussian(side: int) -> torch.Tensor:
    """Weights (side,) of the window along one axis, float64; they sum to 1."""
    offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    return weights / weights.sum()


def _smooth(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted means (B, C, H - side + 1, W - side + 1) over all windows that lie within the images (B, C, H, W)."""
    rows = images.flatten(0, 1).unsqueeze(1)
    rows = functional.conv2d(rows, weights.view(1, 1, -1, 1))
    return functional.conv2d(rows, weights.view(1, 1, 1, -1)).view(*images.shape[:2], *rows.shape[2:3], -1)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image pair (N,), float64, at most 1 (equal images), by Wang et al. 2004.

    Gaussian window of 11 pixels (smaller images: `ssim_window`), deviation 1.5, K1 = 0.01, K2 = 0.03, values in 0..1.
    The mean over the windows that lie within the image, and over the channels, each compared by itself.
    """
    if a.ndim == 4 and a.numel():
        weights = _gaussian(ssim_window(*a.shape[2:])).to(a.device)
    return torch.cat([_ssim(_unit(x), _unit(y), weights) for x, y in _pairs(a, b)])


def _ssim(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    mean_x, mean_y = _smooth(x, weights), _smooth(y, weights)
    # Rounding may leave a variance of -1e-17, far below the constants that it is added to.
    variance_x = _smooth(x * x, weights) - mean_x.square()
    variance_y = _smooth(y * y, weights) - mean_y.square()
    covariance = _smooth(x * y, weights) - mean_x * mean_y
    light, contrast = K1**2, K2**2
    above = (2 * mean_x * mean_y + light) * (2 * covariance + contrast)
    below = (mean_x.square() + mean_y.square() + light) * (variance_x + variance_y + contrast)
    return (above / below).mean(dim=(1, 2, 3))


def lpips(a: torch.Tensor, b: torch.Tensor, net: str = "alex", *, batch_size: int = 50) -> torch.Tensor:
    """LPIPS (Zhang et al. 2018) of each image pair (N,), float64: 0 for equal images.

    By the package `lpips`, with its network `net`: "alex", "vgg" or "squeeze". One grey channel is repeated to three.
    Values of different networks cannot be compared: name it.

    Raises:
        ImportError: the package, or torchvision which it needs, is not installed.
        ValueError: images that are not grey or RGB, or smaller than the network takes ("alex": 31 pixels).
        RuntimeError: the weights of the network could not be had.
    """
    pairs = [
        (x, y)
        for left, right in _pairs(a, b)
        for x, y in zip(left.split(batch_size), right.split(batch_size), strict=True)
    ]
    if a.shape[1] not in (1, 3):
        raise ValueError(f"LPIPS compares grey or RGB images, found {a.shape[1]} channels")
    model = _lpips_model(net).to(a.device)
    found = []
    with torch.no_grad():
        for x, y in pairs:
            sides = [(_unit(side) * 2 - 1).float().expand(-1, 3, -1, -1) for side in (x, y)]
            try:
                found.append(model(*sides).double().flatten())
            except RuntimeError as error:
                raise ValueError(
                    f"LPIPS' network {net!r} cannot take images of {a.shape[2]} x {a.shape[3]} pixels "
                    f"({str(error).splitlines()[0]}); 'alex' needs 31 at least"
                ) from error
    return torch.cat(found)


def _lpips_model(net: str) -> Any:
    try:
        import lpips as package
    except ImportError as error:
        raise ImportError(
            f"LPIPS needs the package lpips, with torchvision ({error}); install iec-diffusion[lpips], or leave the metric out"
        ) from error
    if net not in ("alex", "vgg", "squeeze"):
        raise ValueError(f"LPIPS has no network {net!r}; known are alex, vgg and squeeze")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports which files it reads
            return package.LPIPS(net=net, verbose=False).eval()
    except OSError as error:  # URLError is one
        raise RuntimeError(
            f"the weights of LPIPS' network {net!r} could not be loaded ({error}); download them once on a machine "
            "with access, or put torchvision's file into the checkpoints of TORCH_HOME"
        ) from error
