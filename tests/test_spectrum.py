"""Largest singular values from products, against dense matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iec.core.spectrum import Norms, largest_singular_value, largest_singular_values

SHIFTS = ((1.3, -0.9), (0.9, -0.1), (0.5, -0.5), (0.1, -0.9), (0.0, 1.0))


def matrices(kind: str, count: int = 3, size: int = 40) -> Tensor:
    """float64 (B, n, n): "general", "symmetric", or "late": so small that 1.01 I − 0.06 J has its singular values close to 1."""
    made = torch.randn(count, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / size**0.5
    if kind == "general":
        return made
    made = made @ made.mT
    return made if kind == "symmetric" else 0.02 * made


class Counted:
    """Products with a batch of matrices, counted."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.count = matrix, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        flat = v.double().flatten(1)[..., None]
        return (self.matrix @ flat).reshape(v.shape).to(v.dtype)


def start(matrix: Tensor, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    shape = shape or matrix.shape[1:2]
    return torch.randn(len(matrix), *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def exact(matrix: Tensor, shifts: tuple[tuple[float, float], ...] = SHIFTS) -> Tensor:
    one = torch.eye(matrix.shape[-1], dtype=torch.float64)
    return torch.stack([torch.linalg.matrix_norm(c * one + s * matrix, 2) for c, s in shifts])


def of(matrix: Tensor, begin: Tensor, steps: int = 20, tol: float = 1e-6) -> Norms:
    return largest_singular_values(Counted(matrix), Counted(matrix.mT), begin, SHIFTS, steps, tol)


@pytest.mark.parametrize("kind", ["general", "symmetric", "late"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_dense(kind: str, dtype: torch.dtype) -> None:
    matrix = matrices(kind)
    found, wanted = of(matrix, start(matrix, dtype=dtype), steps=40), exact(matrix)
    assert found.values.dtype == torch.float64 and found.values.shape == (len(SHIFTS), len(matrix))
    torch.testing.assert_close(found.values, wanted, rtol=1e-4, atol=0)
    assert bool((found.values <= wanted * (1 + 1e-6)).all())  # never more than there is


def test_errors_are_estimated() -> None:
    """Too few products leave an error, and the estimate says how large it is, within a factor of ten."""
    for kind in ("general", "symmetric"):
        matrix = matrices(kind)
        found = largest_singular_values(Counted(matrix), Counted(matrix.mT), start(matrix), ((0.9, -0.1),), 8, tol=0.0)
        left = exact(matrix, ((0.9, -0.1),)) - found.values
        assert float(left.max()) > 1e-4
        assert bool((left <= 10 * found.errors).all()) and bool((found.errors <= 10 * left).all())


def test_late_steps_need_more_than_power_iteration() -> None:
    """METHOD 2: M ≈ I, where 20 power iterations are far off; Golub-Kahan has five digits."""
    size = 200
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(1, size, size, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(random).Q
    stretch = torch.linspace(-1, 1, size, dtype=torch.float64) ** 3
    matrix = turn @ torch.diag(1.0 + 0.0138 * stretch) @ turn.mT
    begin = start(matrix)
    v = begin
    for _ in range(20):
        v = Counted(matrix.mT @ matrix)(v / v.norm())
    power = float((Counted(matrix)(v / v.norm())).norm())
    found = largest_singular_value(Counted(matrix), Counted(matrix.mT), begin)
    assert abs(float(found.values) - 1.0138) < 1e-5
    assert abs(power - 1.0138) > 1e-3


def test_is_golub_kahan() -> None:
    """As many products give the value of the textbook recurrence with full re-orthogonalisation."""
    matrix = matrices("general", 1)
    a, begin = matrix[0], start(matrix)
    for steps in (1, 4, 9):
        found = largest_singular_value(Counted(matrix), Counted(matrix.mT), begin, steps, tol=0.0)
        assert found.products == found.transposed == steps
        right, left = [begin[0] / begin[0].norm()], []
        for _ in range(steps):
            u = a @ right[-1]
            for _ in range(2):
                u = u - sum(((u @ w) * w for w in left), torch.zeros_like(u))
            left.append(u / u.norm())
            v = a.T @ left[-1]
            for _ in range(2):
                v = v - sum(((v @ w) * w for w in right), torch.zeros_like(v))
            right.append(v / v.norm())
        basis = torch.stack(right[:-1], 1)
        assert float(found.values) == pytest.approx(float(torch.linalg.matrix_norm(a @ basis, 2)), rel=1e-9)


def test_samples_are_on_their_own() -> None:
    """A sample has the value that it has alone; a neighbour with a much larger norm changes nothing."""
    matrix = matrices("general")
    matrix[1] *= 1e6
    begin = start(matrix)
    together = of(matrix, begin, tol=0.0).values
    for k in range(3):
        alone = of(matrix[k : k + 1], begin[k : k + 1], tol=0.0).values
        torch.testing.assert_close(together[:, k : k + 1], alone, rtol=1e-9, atol=0)


def test_any_shape_and_length_of_the_start() -> None:
    matrix = matrices("general")
    begin = start(matrix, (2, 4, 5))
    torch.testing.assert_close(of(matrix, begin).values, of(matrix, 1e-12 * begin).values, rtol=1e-9, atol=0)


def test_matrices_of_one_family_share_products() -> None:
    matrix = matrices("symmetric")
    apply, transpose = Counted(matrix), Counted(matrix.mT)
    shifts = tuple((1 - lam, -lam) for lam in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    found = largest_singular_values(apply, transpose, start(matrix), shifts, tol=1e-5)
    assert (apply.count, transpose.count) == (found.products, found.transposed)
    torch.testing.assert_close(found.values, exact(matrix, shifts), rtol=1e-4, atol=0)
    alone = 0
    for shift in shifts:
        one = Counted(matrix)
        largest_singular_values(one, Counted(matrix.mT), start(matrix), (shift,), tol=1e-5)
        alone += one.count
    assert found.products < 0.7 * alone


def test_exhausted_spaces_end() -> None:
    """A multiple of I is done at once; a small matrix when its space is full; a sample that is done does not stop others."""
    two = largest_singular_value(lambda v: 2 * v, lambda v: 2 * v, torch.randn(3, 50, dtype=torch.float64))
    assert two.products <= 2
    torch.testing.assert_close(two.values, torch.full((3,), 2.0, dtype=torch.float64))
    matrix = matrices("general", size=4)
    small = of(matrix, start(matrix), tol=0.0)
    assert small.products <= 4
    torch.testing.assert_close(small.values, exact(matrix), rtol=1e-12, atol=0)
    mixed = matrices("general")
    mixed[0] = torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(of(mixed, start(mixed)).values, exact(mixed), rtol=1e-5, atol=0)


def test_zero_matrix() -> None:
    nothing = torch.zeros(2, 6, 6, dtype=torch.float64)
    found = largest_singular_values(Counted(nothing), Counted(nothing), start(nothing), ((0.0, 1.0), (0.5, 1.0)))
    torch.testing.assert_close(found.values, torch.tensor([[0.0, 0.0], [0.5, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["general", "symmetric", "late"])
def test_forward_products_bound_from_below(kind: str) -> None:
    """Without the transpose: never too large, exact on the full space, and close when J is symmetric."""
    matrix = matrices(kind)
    begin, wanted = start(matrix), exact(matrix)
    some = largest_singular_values(Counted(matrix), None, begin, SHIFTS, 12, tol=0.0)
    assert (some.products, some.transposed) == (12, 0)
    assert bool((some.values <= wanted * (1 + 1e-12)).all())
    if kind != "general":
        torch.testing.assert_close(some.values, wanted, rtol=2e-2, atol=0)
    full = largest_singular_values(Counted(matrix), None, begin, SHIFTS, 100, tol=0.0)
    assert full.products == 40
    torch.testing.assert_close(full.values, wanted, rtol=1e-9, atol=0)


def test_forward_products_end_when_settled() -> None:
    matrix = matrices("late")
    found = largest_singular_values(Counted(matrix), None, start(matrix), SHIFTS[:1], 40, tol=1e-4)
    assert found.products < 30
    torch.testing.assert_close(found.values, exact(matrix, SHIFTS[:1]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("apply", "begin", "steps", "told"),
    [
        (lambda v: v, torch.zeros(2, 3), 5, "zero or not finite"),
        (lambda v: v, torch.full((2, 3), torch.nan), 5, "zero or not finite"),
        (lambda v: v[:, :2], torch.ones(2, 3), 5, "shape"),
        (lambda v: v / 0, torch.ones(2, 3), 5, r"samples \[0, 1\]"),
        (lambda v: v, torch.ones(2, 3), 0, "at least 1"),
    ],
)
def test_refuses(apply: Callable[[Tensor], Tensor], begin: Tensor, steps: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        largest_singular_value(apply, apply, begin, steps)
