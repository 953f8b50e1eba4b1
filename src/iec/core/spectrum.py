"""Largest singular values of the matrices c I + s J, from products with J alone (METHOD 2; IEC, ICLR 2026, Fig. 1).

With products of the transpose this is Golub-Kahan bidiagonalisation with full re-orthogonalisation, written as a Rayleigh-Ritz
method: on an orthonormal basis P of n-vectors with W = J P, the best right singular vector of c P + s W is found, and its
residual extends the basis. For one matrix the residual is the next Golub-Kahan vector, so both give the same values after as
many products; for several matrices of one J, every one profits from the products made for the others.

Without the transpose the basis is Arnoldi's, of the Krylov space of J: the values are lower bounds, which are exact when the
basis is full and good when J is nearly symmetric, as the derivative of a denoiser is (the ideal one is a Hessian).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
EXHAUSTED = 1e-12  # a new direction smaller than this fraction of its length before orthogonalisation is rounding
ROUNDINGS = 16  # of the dtype of the products: a residual below this fraction of the value is rounding
LEAST = 3  # products before a value may count as settled


class Shift(NamedTuple):
    """The matrix `identity`·I + `factor`·J."""

    identity: float
    factor: float


class Norms(NamedTuple):
    """Spectral norms of S matrices for B samples.

    Attributes:
        values: float64 (S, B): the largest singular values that were found; never above the true ones but by rounding.
        errors: float64 (S, B): by how much they may still be too small: an estimate from the residual and the distance to the
            second value, not a bound. Without the transpose: what the last third of the products has added.
        products, transposed: products with J and with Jᵀ that were made, each for all samples.
    """

    values: Tensor
    errors: Tensor
    products: int
    transposed: int


def largest_singular_value(
    apply: Product, apply_transpose: Product | None, start: Tensor, steps: int = 20, tol: float = 1e-6
) -> Norms:
    """The largest singular value of J for each sample; `values` and `errors` are (B,). Arguments as below."""
    found = largest_singular_values(apply, apply_transpose, start, (Shift(0.0, 1.0),), steps, tol)
    return Norms(found.values[0], found.errors[0], found.products, found.transposed)


def largest_singular_values(
    apply: Product,
    apply_transpose: Product | None,
    start: Tensor,
    shifts: Sequence[tuple[float, float]],
    steps: int = 20,
    tol: float = 1e-6,
) -> Norms:
    """The largest singular values of c I + s J for the pairs (c, s) of `shifts`, for each sample of a batch.

    Args:
        apply: v ↦ J v, (B, …) → (B, …), each sample with a J of its own that does not look at its neighbours.
        apply_transpose: u ↦ Jᵀ u; None: lower bounds from `apply` alone.
        start: (B, …), where to begin: random, any length but zero. Products are asked for in its dtype; everything else is
            float64.
        shifts: (c, s) of every matrix.
        steps: products with J for each matrix, at most; without the transpose for all of them together.
        tol: relative error (as estimated) below which a matrix is done.

    Raises ValueError for `steps` below 1, no shifts, a start that is zero or not finite, and for products that are not finite or
    of another shape.
    """
    if steps < 1 or not shifts:
        raise ValueError(f"steps is {steps} for {len(shifts)} matrices; expected at least 1 each")
    space = _Space(apply, start)
    if apply_transpose is None:
        return _forward(space, shifts, steps, tol)
    transposed, rounds = 0, [0] * len(shifts)
    latest: list[tuple[int, _Best, Tensor]] = [(0, space.best(*shift), start) for shift in shifts]

    def look(k: int) -> Tensor:
        """Find matrix k's best on the present basis and keep it with its error; returns its residual."""
        nonlocal transposed
        best, (identity, factor) = space.best(*shifts[k]), shifts[k]
        transposed += 1
        image = _checked(apply_transpose(space.shaped(best.left)), start)
        residual = identity * best.left + factor * image - best.value[:, None] * best.right
        latest[k] = (len(space.basis), best, _error(best, residual))
        return residual

    while waiting := [k for k in range(len(shifts)) if rounds[k] < steps]:
        for k in waiting:
            residual = look(k)
            _, best, error = latest[k]
            rounds[k] += 1
            settled = rounds[k] >= LEAST and bool((error <= tol * best.value).all())
            if settled or rounds[k] == steps or not space.extend(residual, best.value):
                rounds[k] = steps
    for k, (size, _, _) in enumerate(latest):
        if size < len(space.basis):  # the basis has grown for the others since
            look(k)
    rounding = torch.finfo(start.dtype).eps
    values, errors = zip(*((best.value, error + rounding * best.value) for _, best, error in latest), strict=True)
    return Norms(torch.stack(values), torch.stack(errors), space.products, transposed)


def _forward(space: _Space, shifts: Sequence[tuple[float, float]], steps: int, tol: float) -> Norms:
    """The values on the Krylov space of J."""
    history = [torch.stack([space.best(*shift).value for shift in shifts])]
    for made in range(2, steps + 1):
        if not space.extend(space.images[-1]):
            history = [history[-1]]  # the whole space, or one that J does not leave
            break
        history.append(torch.stack([space.best(*shift).value for shift in shifts]))
        before = history[made - 1 - max(2, made // 3)] if made > 2 * LEAST else None
        if before is not None and bool((history[-1] - before <= tol * history[-1]).all()):
            break
    before = history[-1 - min(len(history) - 1, max(1, len(history) // 3))]
    return Norms(history[-1], (history[-1] - before).clamp(min=0.0), space.products, 0)


class _Best(NamedTuple):
    """The largest singular triplet on a subspace: `value` and the one after it, `second`, (B,); `right`, `left` (B, n)."""

    value: Tensor
    second: Tensor
    right: Tensor
    left: Tensor


class _Space:
    """An orthonormal basis of vectors and their images under J, for each sample: lists of float64 (B, n).

    A sample whose basis is complete gets zero vectors while others still grow.
    """

    def __init__(self, apply: Product, start: Tensor) -> None:
        self.apply, self.start = apply, start
        self.basis: list[Tensor] = []
        self.images: list[Tensor] = []
        self.products = 0
        size = start[0].numel() if len(start) else 0
        # Gram matrices of basis and images, filled as the basis grows: P Pᵀ, P Wᵀ + W Pᵀ, W Wᵀ.
        self._grams = start.new_zeros(3, len(start), 0, 0, dtype=torch.float64)
        self.size = size
        flat = start.detach().double().flatten(1)
        lengths = torch.linalg.vector_norm(flat, dim=1)
        if not bool(((lengths > 0) & lengths.isfinite()).all()):
            raise ValueError("the start vector of a sample is zero or not finite; expected random numbers, (B, …)")
        self.extend(flat)

    def shaped(self, flat: Tensor) -> Tensor:
        """(B, n) float64 in the shape and dtype of the start."""
        return flat.reshape(self.start.shape).to(self.start.dtype)

    def extend(self, vector: Tensor, scale: Tensor | float = 0.0) -> bool:
        """Add the direction of `vector` (B, n), orthogonalised, and its image; False when there is nothing new in it.

        What is but rounding of something of size `scale`, (B,), is nothing.
        """
        length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        new = vector / length.clamp(min=torch.finfo(torch.float64).tiny)
        if self.basis:
            held = torch.stack(self.basis, 1)
            for _ in range(2):  # once leaves rounding of the size of what was taken away
                new = new - (held.transpose(1, 2) @ (held @ new[..., None]))[..., 0]
        rest = torch.linalg.vector_norm(new, dim=1, keepdim=True)
        least = ROUNDINGS * torch.finfo(self.start.dtype).eps * torch.as_tensor(scale, dtype=torch.float64)
        alive = (rest > EXHAUSTED) & (length > least.to(length.device).reshape(-1, 1))
        if len(self.basis) >= self.size or not bool(alive.any()):
            return False
        new = torch.where(alive, new / rest.clamp(min=EXHAUSTED), torch.zeros_like(new))
        # The product is that of the vector as it was handed over, rounded to the dtype of the start.
        given = self.shaped(new)
        new = given.double().flatten(1)
        self.basis.append(new)
        self.images.append(_checked(self.apply(given), self.start))
        self.products += 1
        self._grow()
        return True

    def best(self, identity: float, factor: float) -> _Best:
        """The largest singular triplet of identity·I + factor·J, its right vector taken from the basis."""
        pp, pw, ww = self._grams
        values, vectors = _symmetric(identity**2 * pp + identity * factor * pw + factor**2 * ww, pp)
        weights = vectors[:, :, -1:]
        right = (torch.stack(self.basis, 2) @ weights)[..., 0]
        image = (torch.stack(self.images, 2) @ weights)[..., 0]
        image = identity * right + factor * image
        value = torch.linalg.vector_norm(image, dim=1)
        left = image / value.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        second = values[:, -2].clamp(min=0.0).sqrt() if values.shape[1] > 1 else torch.zeros_like(value)
        return _Best(value, second, right, left)

    def _grow(self) -> None:
        count = len(self.basis)
        basis, images = torch.stack(self.basis, 1), torch.stack(self.images, 1)
        new, image = basis[:, -1:], images[:, -1:]
        rows = torch.stack(
            [
                (basis @ new.transpose(1, 2))[..., 0],
                (basis @ image.transpose(1, 2) + images @ new.transpose(1, 2))[..., 0],
                (images @ image.transpose(1, 2))[..., 0],
            ]
        )
        grams = rows.new_zeros(3, len(new), count, count)
        grams[:, :, :-1, :-1] = self._grams
        grams[:, :, -1, :] = grams[:, :, :, -1] = rows
        self._grams = grams


def _symmetric(matrix: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, m), ascending, and vectors of `matrix` z = λ `metric` z, (B, m, m) each.

    The metric is the identity but for rounding to float32, and for rows of zeros, of vectors that are not there.
    """
    there = metric.diagonal(dim1=1, dim2=2) > 0.5
    filled = metric + torch.diag_embed((~there).double())
    inverse = torch.linalg.inv(torch.linalg.cholesky(filled))
    values, vectors = torch.linalg.eigh(inverse @ matrix @ inverse.transpose(1, 2))
    return values, inverse.transpose(1, 2) @ vectors


def _error(best: _Best, residual: Tensor) -> Tensor:
    """How much too small the value may be, (B,): quadratic in the residual where the gap to the second value is known."""
    size = torch.linalg.vector_norm(residual, dim=1)
    gap = (best.value**2 - best.second**2).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.minimum(size, best.value * size**2 / (2 * gap))


def _checked(product: Tensor, start: Tensor) -> Tensor:
    """A product as float64 (B, n)."""
    if product.shape != start.shape:
        raise ValueError(
            f"a product has shape {tuple(product.shape)}; expected that of the start, {tuple(start.shape)}"
        )
    flat = product.detach().double().flatten(1)
    if not bool(flat.isfinite().all()):
        bad = (~flat.isfinite().all(1)).nonzero().flatten().tolist()
        raise ValueError(f"the product for samples {bad} of the batch holds NaN or infinity")
    return flat
