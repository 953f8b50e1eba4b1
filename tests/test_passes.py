"""The passes around the integer kernels: quantize, norm + SiLU + quantize, by numba and by torch."""

from __future__ import annotations

import importlib.util
import math
import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from iec.core import affine
from iec.quant.kernels import passes

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
ENGINES = [pytest.param("numba", marks=needs_numba), "torch"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(passes, "_numba", lambda: None)
    assert passes.engine() == request.param
    return request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor, dim: int, spans: list[passes.Span]) -> list[Tensor]:
    result = []
    for begin, end, scale, zero, top in spans:
        bits = int(math.log2(top + 1))
        part = x.narrow(dim, begin, end - begin)
        result.append(affine.quantize(part.float(), torch.tensor(scale), torch.tensor(float(zero)), bits))
    return result


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "cut", "turned"])
@pytest.mark.parametrize("spans", [1, 2, 3])
def test_codes_are_those_of_affine(engine: str, layout: str, spans: int) -> None:
    x = randn(3, 13, 5, 7) * 2
    x.view(-1)[:800] = (torch.arange(800) - 400) * 0.03125 / 2  # halves of the scale: ties
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "cut":
        x = x[:, :, 1:, ::2]
    elif layout == "turned":
        x = x.transpose(2, 3)
    quantizers = [(0.03125, 128, 255), (0.0123, -40, 63), (0.5, 16384, 255)][:spans]
    cuts = [0, 5, 9, 13] if spans == 3 else [0, 13] if spans == 1 else [0, 6, 13]
    given = [(cuts[i], cuts[i + 1], *quantizers[i]) for i in range(spans)]
    for found, exact in zip(passes.quantize(x, 1, given), expected(x, 1, given), strict=True):
        assert found.dtype == torch.uint8
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found.float(), exact)


@pytest.mark.parametrize("shape", [(13,), (1, 13), (4, 13), (2, 3, 13), (0, 13)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_codes_of_rows(engine: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (randn(*shape) * 3).to(dtype)
    for given in ([(0, 13, 0.021, 100, 255)], [(0, 6, 0.021, 100, 255), (6, 13, 0.1, 3, 63)]):
        for found, exact in zip(passes.quantize(x, -1, given), expected(x, -1, given), strict=True):
            assert found.is_contiguous()
            assert torch.equal(found.float(), exact.float())


@pytest.mark.parametrize("size", [1, 2])
def test_images_of_one_pixel_or_channel(engine: str, size: int) -> None:
    for shape in ((2, size, 1, 1), (1, size, 3, 1), (size, 1, 4, 4), (size, 5, 1, 4)):
        x = randn(*shape)
        given = [(0, shape[1], 0.021, 100, 255)]
        assert torch.equal(passes.quantize(x, 1, given)[0].float(), expected(x, 1, given)[0])
        found = passes.norm_silu_quantize(x, 1, None, None, 1e-5, given)[0]
        assert found.shape == x.shape
        check(found, exact_norm(x, 1, None, None, 1e-5, None, True), given[0])


def test_odd_numbers(engine: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0, -0.0, 1e-45])
    assert passes.quantize(x, -1, [(0, 8, 1e-3, 7, 255)])[0].tolist() == [0, 255, 0, 255, 0, 7, 7, 7]


def exact_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, shift: Tensor | None, silu: bool
) -> Tensor:
    x = x.double()
    if shift is not None:
        x = x + shift.double()[:, :, None, None]
    weight, bias = (None if t is None else t.double() for t in (weight, bias))
    y = F.group_norm(x, groups, weight, bias, eps)
    return y * torch.sigmoid(y) if silu else y


def check(found: Tensor, exact: Tensor, span: passes.Span, margin: float = 1e-3) -> None:
    """Codes are right, or one off where the exact value lies within `margin` of a rounding boundary."""
    _, _, scale, zero, top = span
    t = exact / float(torch.tensor(scale)) + zero
    away = (found.double() - t.round().clamp(0, top)).abs()
    assert away.max() <= 1
    near = (t - t.floor() - 0.5).abs()
    assert bool((near[away > 0] < margin).all()), near[away > 0].max()


@pytest.mark.parametrize(
    ("shape", "groups", "split"),
    [
        ((2, 32, 9, 7), 8, 0),
        ((3, 48, 14, 14), 4, 16),
        ((1, 12, 33, 5), 12, 5),
        ((5, 6, 2, 3), 1, 0),
        ((1, 320, 8, 8), 32, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_norm_silu_quantize(
    engine: str, shape: tuple[int, ...], groups: int, split: int, silu: bool, shifted: bool
) -> None:
    channels = shape[1]
    x = (randn(*shape) * (1 + torch.arange(channels)[:, None, None] % 3) + randn(1, channels, 1, 1)).contiguous(
        memory_format=torch.channels_last
    )
    weight, bias, shift = randn(channels, seed=1) + 1, randn(channels, seed=2), randn(shape[0], channels, seed=3) * 2
    spans: list[passes.Span] = [(0, channels, 0.013, 22, 255)]
    if split:
        spans = [(0, split, 0.013, 22, 255), (split, channels, 0.07, -3, 63)]
    given = shift if shifted else None
    exact = exact_norm(x, groups, weight, bias, 1e-5, given, silu)
    found = passes.norm_silu_quantize(x, groups, weight, bias, 1e-5, spans, given, silu)
    assert len(found) == len(spans)
    for codes, span in zip(found, spans, strict=True):
        assert codes.dtype == torch.uint8
        assert codes.is_contiguous(memory_format=torch.channels_last)
        check(codes, exact[:, span[0] : span[1]], span)
    plain = passes.norm_silu_quantize(x.contiguous(), groups, weight, bias, 1e-5, spans, given, silu)
    for codes, span in zip(plain, spans, strict=True):  # any memory format
        check(codes, exact[:, span[0] : span[1]], span)


@needs_numba
@pytest.mark.parametrize("what", ["far", "outlier", "constant", "large"])
def test_statistics_are_accurate(what: str) -> None:
    """E[x²] − E[x]² in float32 fails the first two: the mean is 10⁴ deviations off, or the pivot is an outlier."""
    x = randn(2, 8, 40, 30)
    if what == "far":
        x = x + torch.tensor([1e4, -1e4])[:, None, None, None]
    elif what == "outlier":
        x[:, :, 0, 0] = 30
    elif what == "constant":
        x = torch.full_like(x, 3.7)
    else:
        x = randn(1, 8, 300, 300) + 5
    span = (0, 8, 0.02, 128, 255)
    found = passes.norm_silu_quantize(x, 2, None, None, 1e-5, [span], None, False)[0]
    check(found, exact_norm(x, 2, None, None, 1e-5, None, False), span)


@needs_numba
def test_several_threads_at_once() -> None:
    x = randn(4, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    span = [(0, 32, 0.02, 128, 255)]
    quantized, normed = passes.quantize(x, 1, span)[0], passes.norm_silu_quantize(x, 4, None, None, 1e-5, span)[0]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(30):
            if not torch.equal(passes.quantize(x, 1, span)[0], quantized):
                wrong.append("quantize")
            if not torch.equal(passes.norm_silu_quantize(x, 4, None, None, 1e-5, span)[0], normed):
                wrong.append("norm")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_numba
def test_does_not_depend_on_threads_or_batch() -> None:
    x = randn(4, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    span = [(0, 32, 0.02, 128, 255)]
    together = passes.norm_silu_quantize(x, 4, None, None, 1e-5, span)[0]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(passes.norm_silu_quantize(x, 4, None, None, 1e-5, span)[0], together)
    finally:
        torch.set_num_threads(threads)
    alone = [passes.norm_silu_quantize(row, 4, None, None, 1e-5, span)[0] for row in x.split(1)]
    assert torch.equal(torch.cat(alone), together)


@needs_numba
def test_leaves_the_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(passes, "_compiled", [])
    before = torch.get_num_threads(), numba.get_num_threads(), numba.config.THREADING_LAYER
    assert passes.engine() == "numba"
    assert (torch.get_num_threads(), numba.get_num_threads(), numba.config.THREADING_LAYER) == before


@needs_numba
def test_works_without_a_folder_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from iec.quant.kernels import compiled

    real = compiled.compile_all

    def compile_all(cache: bool) -> object:
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available")
        asked.append(cache)
        return real(True)  # quicker than compiling again

    asked: list[bool] = []
    monkeypatch.setattr(passes, "_compiled", [])
    monkeypatch.setattr(compiled, "compile_all", compile_all)
    assert passes.engine() == "numba"
    assert asked == [False]


@needs_numba
def test_torch_takes_over_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """GNU OpenMP ends a forked process that enters it."""
    assert passes.engine() == "numba"
    monkeypatch.setattr(passes.os, "getpid", lambda: -1)
    assert passes.engine() == "torch"


def test_torch_takes_over_where_numba_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    monkeypatch.setattr(passes, "_compiled", [])
    assert passes.engine() == "torch"
