"""`iec.correct`: the pure iteration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import iec
from iec.core.correction import Trace, residual

A, B = 0.9, -0.4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def written_out(phi: Any, denoise: Any, x: Tensor, relax: tuple[float, ...]) -> Tensor:
    """The method in float64, sample by sample."""
    rows = []
    for row in x.double():
        row = row.unsqueeze(0)
        y = phi(denoise(row))
        for factor in relax:
            y = y + factor * (phi(denoise(y)) - y)
        rows.append(y)
    return torch.cat(rows)


def smooth(seed: int = 1, size: int = 6) -> Callable[[Tensor], Tensor]:
    """A denoiser of samples with `size` numbers each, the same for every sample of a batch."""
    mix = randn(size, size, seed=seed) / size**0.5

    def denoise(x: Tensor) -> Tensor:
        return torch.tanh(x.reshape(len(x), -1) @ mix.to(x.dtype)).reshape(x.shape)

    return denoise


class Counted:
    """A denoiser that counts its evaluations and keeps its inputs."""

    def __init__(self, denoise: Callable[[Tensor], Tensor]) -> None:
        self.denoise, self.inputs = denoise, []

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.append(x.clone())
        return self.denoise(x)


@pytest.mark.parametrize("relax", [(0.5,), (1.0, 0.5), (0.1, 0.2, 0.3, 0.4), (1.7,)], ids=str)
def test_is_the_method(relax: tuple[float, ...]) -> None:
    x, denoise = randn(5, 6), Counted(smooth())

    def phi(e: Tensor) -> Tensor:
        return A * x + B * e

    found = iec.correct(phi, denoise, x, relax)
    rows = [written_out(lambda e, row=row: A * row + B * e, smooth(), row, relax) for row in x.split(1)]
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-14, atol=1e-14)
    assert len(denoise.inputs) == 1 + len(relax)
    assert torch.equal(denoise.inputs[0], x)
    assert torch.equal(denoise.inputs[1], phi(smooth()(x)))


def test_default_is_the_papers() -> None:
    x, denoise = randn(3, 6), smooth()
    assert torch.equal(
        iec.correct(lambda e: A * x + B * e, denoise, x), iec.correct(lambda e: A * x + B * e, denoise, x, (0.5,))
    )


def test_zero_is_the_ordinary_step() -> None:
    x, denoise = randn(3, 6), smooth()
    plain = A * x + B * denoise(x)
    for relax in ((0.0,), (0.0, 0.0)):
        assert torch.equal(iec.correct(lambda e: A * x + B * e, denoise, x, relax), plain)


def test_one_is_the_undamped_iteration() -> None:
    x, denoise = randn(3, 6), smooth()
    y = A * x + B * denoise(x)
    torch.testing.assert_close(iec.correct(lambda e: A * x + B * e, denoise, x, (1.0,)), A * x + B * denoise(y))


@pytest.mark.parametrize("relax", [0.3, 0.5, 1.0])
def test_contracts_at_the_predicted_rate(relax: float) -> None:
    """ε(x) = J x with J = Q diag(j) Qᵀ: each eigenvector's error shrinks by (1−λ) + λ B j in every correction."""
    q, _ = torch.linalg.qr(randn(6, 6, seed=4))
    j = torch.tensor([-2.0, -1.0, -0.1, 0.3, 1.0, 2.2], dtype=torch.float64)
    jacobian = q * j @ q.T
    x = randn(4, 6)

    def denoise(y: Tensor) -> Tensor:
        return y @ jacobian

    def phi(e: Tensor) -> Tensor:
        return A * x + B * e

    fixed = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - B * jacobian, (A * x).T).T  # y = A x + B J y
    torch.testing.assert_close(phi(denoise(fixed)), fixed)
    rates = (1 - relax) + relax * B * j
    for count in (1, 2, 7):
        y0 = phi(denoise(x))
        yk = iec.correct(phi, denoise, x, (relax,) * count)
        torch.testing.assert_close((yk - fixed) @ q, (y0 - fixed) @ q * rates**count, rtol=1e-10, atol=1e-12)
    assert rates.abs().max() < 1
    torch.testing.assert_close(iec.correct(phi, denoise, x, (relax,) * 400), fixed, rtol=1e-9, atol=1e-9)


# --- shapes and dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 7), (2, 3, 4), (2, 3, 4, 4), (2, 2, 3, 4, 5)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    denoise = torch.tanh
    expected = A * x + B * torch.tanh(x)
    expected = expected + 0.5 * (A * x + B * torch.tanh(expected) - expected)
    found, trace = iec.correct(lambda e: A * x + B * e, denoise, x, tol=0.0, return_trace=True)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    assert trace.residuals.shape == (1, shape[0])


def test_the_state_may_differ_in_shape_from_the_sample() -> None:
    """phi may return something else than x_t's shape, as long as the denoiser takes it."""
    x = randn(3, 4)
    found = iec.correct(lambda e: (A * x).repeat(1, 2)[:, :4] + B * e, torch.tanh, x)
    assert found.shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = randn(4, 6, dtype=dtype)
    found, trace = iec.correct(lambda e: A * x + B * e, smooth(), x, (1.0, 0.5), return_trace=True)
    assert found.dtype == dtype
    assert trace.residuals.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = torch.cat(
        [written_out(lambda e, row=row: A * row + B * e, smooth(), row, (1.0, 0.5)) for row in x.double().split(1)]
    )
    digits = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=digits, atol=digits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blends_half_precision_in_single(dtype: torch.dtype) -> None:
    """The blend is the float32 one rounded once; blending in half precision rounds three times and differs."""
    y0, y1 = randn(1, 4096, seed=1, dtype=dtype), randn(1, 4096, seed=2, dtype=dtype)
    steps = iter((y0, y1))
    found = iec.correct(lambda _: next(steps), lambda x: x, y0, (0.3,))
    single = (y0.float() + 0.3 * (y1.float() - y0.float())).to(dtype)
    assert torch.equal(found, single)
    assert not torch.equal(single, y0 + 0.3 * (y1 - y0))


def test_half_precision_residuals_do_not_overflow() -> None:
    """‖y‖² of 10⁵ numbers of size 10⁴ is beyond float16 by far."""
    y0 = torch.full((2, 100_000), 1e4, dtype=torch.float16)
    steps = iter((y0, y0 * 1.01))
    _, trace = iec.correct(lambda _: next(steps), lambda x: x, y0, return_trace=True)
    assert trace.residuals.isfinite().all()
    torch.testing.assert_close(trace.residuals, torch.full((1, 2), 0.01), rtol=0.1, atol=0)


def test_double_is_clean() -> None:
    """Nothing on the way goes through single precision."""
    x = randn(3, 6)
    y = iec.correct(lambda e: A * x + B * e, smooth(), x, (0.5,) * 60)
    assert ((A * x + B * smooth()(y)) - y).abs().max() < 1e-15 * 100


def test_leaves_its_arguments_alone() -> None:
    x = randn(3, 6)
    kept = x.clone()
    given: list[Tensor] = []

    def phi(e: Tensor) -> Tensor:
        given.append(A * x + B * e)
        return given[-1]

    iec.correct(phi, smooth(), x)
    assert torch.equal(x, kept)
    assert torch.equal(given[0], A * x + B * smooth()(x))  # y⁰ was not written over


def test_gradients_flow() -> None:
    x = randn(2, 6).requires_grad_()
    denoise = smooth()
    assert torch.autograd.gradcheck(lambda v: iec.correct(lambda e: A * v + B * e, denoise, v, (1.0, 0.5)), (x,))


# --- tolerance --------------------------------------------------------------------------------------------------------


def frozen_reference(x: Tensor, relax: tuple[float, ...], tol: float) -> tuple[Tensor, list[int]]:
    """Every sample alone: (the result, the corrections each has taken)."""
    rows, taken = [], []
    for row in x.split(1):
        y = A * row + B * smooth()(row)
        taken.append(0)
        for factor in relax:
            new = A * row + B * smooth()(y)
            change = float((new - y).norm() / (y.norm() + 1e-6))
            y = y + factor * (new - y)
            taken[-1] += 1
            if change < tol:
                break
        rows.append(y)
    return torch.cat(rows), taken


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-5, 0.0])
def test_freezes_each_sample_by_itself(tol: float) -> None:
    x = randn(8, 6) * torch.tensor([0.01, 0.1, 0.5, 1, 2, 5, 20, 100], dtype=torch.float64)[:, None]
    relax, denoise = (0.7,) * 12, Counted(smooth())
    expected, taken = frozen_reference(x, relax, tol)
    found, trace = iec.correct(lambda e: A * x + B * e, denoise, x, relax, tol, return_trace=True)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert isinstance(trace, Trace)
    assert trace.evaluations == len(denoise.inputs) == 1 + max(taken)  # what remains is skipped when all are frozen
    assert trace.residuals.shape == (max(taken), 8)
    if 1e-5 <= tol <= 1e-2:
        assert len(set(taken)) > 1  # the case is worth its name


def test_does_not_depend_on_the_batch() -> None:
    x, relax, tol = randn(6, 6), (0.9, 0.9, 0.9), 0.01
    together = iec.correct(lambda e: A * x + B * e, smooth(), x, relax, tol)
    alone = [iec.correct(lambda e, row=row: A * row + B * e, smooth(), row, relax, tol) for row in x.split(1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=1e-14)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = iec.correct(lambda e: A * x[order] + B * e, smooth(), x[order], relax, tol)
    torch.testing.assert_close(shuffled, together[order], rtol=1e-14, atol=1e-14)


def test_the_update_below_the_tolerance_is_taken() -> None:
    x = randn(3, 6)
    once = iec.correct(lambda e: A * x + B * e, smooth(), x, (0.5,))
    denoise = Counted(smooth())
    assert torch.equal(iec.correct(lambda e: A * x + B * e, denoise, x, (0.5, 0.9), tol=1e9), once)
    assert len(denoise.inputs) == 2


def test_residual_is_relative_and_survives_zero() -> None:
    y = randn(4, 6)
    torch.testing.assert_close(residual(1.1 * y, y), torch.full((4,), 0.1, dtype=torch.float64), rtol=1e-5, atol=0)
    assert torch.equal(residual(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2))
    assert residual(torch.ones(1, 4), torch.zeros(1, 4)).item() == pytest.approx(2 / 1e-6)


# --- what is no number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_stands_back_sample_by_sample(value: float) -> None:
    x = randn(3, 6)
    calls = 0

    def denoise(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        e = smooth()(y)
        if calls == 3:  # the second correction
            e[1, 2] = value
        return e

    with pytest.warns(RuntimeWarning, match="not finite") as caught:
        found = iec.correct(lambda e: A * x + B * e, denoise, x, (0.5, 0.5, 0.5))
    assert len(caught) == 1
    good = iec.correct(lambda e: A * x + B * e, smooth(), x, (0.5, 0.5, 0.5))
    once = iec.correct(lambda e: A * x + B * e, smooth(), x, (0.5,))
    torch.testing.assert_close(found[[0, 2]], good[[0, 2]], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found[1], once[1], rtol=1e-14, atol=1e-14)  # its last finite value, and frozen


def test_all_bad_keeps_the_ordinary_step() -> None:
    x, outputs = randn(3, 6), iter((smooth()(randn(3, 6)), torch.full((3, 6), math.nan, dtype=torch.float64)))
    denoise = Counted(lambda _: next(outputs))
    first = smooth()(randn(3, 6))
    with pytest.warns(RuntimeWarning, match="not finite"):
        found = iec.correct(lambda e: A * x + B * e, denoise, x, (0.5, 0.5))
    assert torch.equal(found, A * x + B * first)
    assert len(denoise.inputs) == 2  # nothing is left to correct


def test_a_finite_run_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iec.correct(lambda e: e, torch.tanh, randn(2, 3), (0.5, 0.5), 1e-3)


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"relax": ()}, ValueError, "K = 0"),
        ({"relax": (-0.5,)}, ValueError, "at least 0"),
        ({"relax": (0.5, -1e-9)}, ValueError, "at least 0"),
        ({"relax": (math.nan,)}, ValueError, "finite"),
        ({"relax": (math.inf,)}, ValueError, "finite"),
        ({"relax": "half"}, TypeError, "relax"),
        ({"relax": None}, TypeError, "relax"),
        ({"relax": (None,)}, TypeError, "relax"),
        ({"tol": -1e-9}, ValueError, "tol"),
        ({"tol": math.nan}, ValueError, "tol"),
        ({"tol": math.inf}, ValueError, "tol"),
        ({"tol": "small"}, TypeError, "real number"),
    ],
    ids=str,
)
def test_bad_arguments_cost_nothing(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    """They are refused before the model runs."""
    denoise = Counted(torch.tanh)
    with pytest.raises(kind, match=said):
        iec.correct(lambda e: e, denoise, randn(2, 3), **options)
    assert not denoise.inputs
