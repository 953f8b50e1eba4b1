"""Spectral norms along a pipeline's trajectories: of an ordinary step (IEC, ICLR 2026, Fig. 1a) and of a correction (Fig. 1b).

With Φ(x, ε) = a x + b ε the ordinary step multiplies an error of its input by a I + b J, J = ∂ε/∂x at (x_t, t); a correction is
the iteration of G(y) = (1−λ) y + λ Φ(x_t, ε(y, t)), whose derivative is (1−λ) I + λ b J, J at y. The network is part of J: the
released code's `compute_spectral_radius` detaches it, so that its value is 1/√ᾱ − 1 for every network (METHOD 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from iec.analysis.linear import Method, Products, products
from iec.analysis.recording import Step, record
from iec.core.correction import check_relax
from iec.core.spectrum import Norms, Shift, largest_singular_values

Row = dict[str, Any]  # plain values
At = Literal["estimate", "sample"]
RELAX = tuple(round(0.1 * k, 1) for k in range(1, 10))
STILL = 1e-7  # a step with a smaller b does not move: the first ones of a quadratic schedule with equal timesteps
ITERATIONS = 40  # most norms are done after ten; those of steps that hardly move after some thirty


def growth_norms(
    pipe: Any, seeds: Sequence[int], num_inference_steps: int, batch_size: int = 8, **options: Any
) -> list[Row]:
    """‖a I + b J‖ of every step and sample: by how much the step can enlarge an error of its input, to first order (Fig. 1a).

    One row for each: quantity "growth", and what `spectral_norms` tells. `options` go there.
    """
    return spectral_norms(pipe, seeds, num_inference_steps, batch_size, quantities=("growth",), **options)


def contraction_norms(
    pipe: Any,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int = 8,
    relax: Sequence[float] = RELAX,
    at: At = "estimate",
    **options: Any,
) -> list[Row]:
    """‖(1−λ) I + λ b J‖ of every step, sample and λ in `relax`: below 1, a correction contracts there (Fig. 1b).

    One row for each: quantity "contraction", `lam`, `at`, and what `spectral_norms` tells. `options` go there.
    """
    return spectral_norms(
        pipe, seeds, num_inference_steps, batch_size, quantities=("contraction",), relax=relax, at=at, **options
    )


def spectral_norms(
    pipe: Any,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int = 8,
    *,
    quantities: Sequence[Literal["growth", "contraction"]] = ("growth", "contraction"),
    relax: Sequence[float] = RELAX,
    at: At = "estimate",
    steps: Iterable[int] | None = None,
    iterations: int = ITERATIONS,
    tol: float = 1e-5,
    method: Method = "auto",
    known: Iterable[Row] = (),
    keep: Callable[[list[Row]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> list[Row]:
    """The norms of both kinds, which have the trajectories in common, and with at="sample" the derivatives too.

    The model is the pipeline's as it is. Of one in full precision the derivative is exact; of a quantized one there are
    differences only, which its rounding makes noisy, and lower bounds of the norms (see `iec.analysis.linear`). Corrections
    that are on change the trajectory, not what is measured.

    Args:
        pipe: a diffusers pipeline whose scheduler's step is affine and has no history (DDIM, Euler, DDPM without clipping).
        seeds, num_inference_steps, kwargs: as in `record`.
        batch_size: images at a time; the graph of two backward passes of as many is held.
        quantities: which norms.
        relax: λ of the contraction.
        at: where the contraction has its J: "estimate" is x⁰_{t−1} = Φ(x_t, ε(x_t, t)), where the iteration begins; "sample" is
            x_t, as the paper's formula is written.
        steps: which steps; None: all.
        iterations: products with J for a norm, at most.
        tol: relative error, as estimated, at which a norm is done.
        method: "auto", "exact" or "finite" products.
        known: rows that are there already, from `keep` or a result; a step of a batch all of whose rows are known is not
            computed again, and a batch without unknown steps does not run.
        keep: called with the new rows of every step of a batch.
        progress: called as progress(done, total), counting steps of batches.

    Returns a row for each step, sample and norm, the known ones first: quantity, step, timestep, seed, lam and at (None for
    growth), norm, error (by how much the norm may be too small, see `iec.core.spectrum.Norms`), a, b, method ("exact",
    "finite", or "none" where b = 0), noise (of the products, relative), lower_bound (bool), products (with J, for all norms
    of the step at this point), note.

    Raises ValueError for unknown quantities or points, bad relax, steps out of range, and a scheduler whose step is no
    a x + b ε; RuntimeError where the model cannot be evaluated by itself (see `Denoise`) or method="exact" cannot be had.
    """
    relax = check_relax(relax)
    _check(quantities, at, steps, num_inference_steps)
    rows = list(known)
    there = {_key(row) for row in rows}
    norms = [("growth", None, None)] if "growth" in quantities else []
    norms += [("contraction", lam, at) for lam in relax] if "contraction" in quantities else []
    chosen = None if steps is None else set(steps)

    def missing(index: int, batch: Sequence[int]) -> bool:
        return any((kind, index, seed, lam, where) not in there for kind, lam, where in norms for seed in batch)

    def wanted(batch: tuple[int, ...]) -> bool:
        # The list of a scheduler may be longer than the number asked for (Heun), but those have a history.
        return any(missing(index, batch) for index in (chosen or range(num_inference_steps)))

    total = math.ceil(len(seeds) / batch_size) * (num_inference_steps if chosen is None else len(chosen))
    done = 0
    for batch in _batches(seeds, batch_size):
        done += 0 if wanted(batch) else total // math.ceil(len(seeds) / batch_size)
    for step in record(pipe, seeds, num_inference_steps, batch_size, wanted=wanted, **kwargs):
        if chosen is not None and step.index not in chosen:
            continue
        if missing(step.index, step.seeds):
            made = _of_step(step, norms, iterations, tol, method)
            made = [row for row in made if _key(row) not in there]
            rows += made
            if keep is not None:
                keep(made)
        done += 1
        if progress is not None:
            progress(done, total)
    return rows


def averaged(rows: Iterable[Row]) -> list[Row]:
    """Means over the samples: a row for each quantity, lam, at and step, in that order.

    norm (mean), least, most, sem (standard error of the mean; None for one sample), above (share of samples with norm > 1),
    num, error (the largest), lower_bound (whether some norm is one), and what they have in common: quantity, lam,
    at, step, timestep.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["quantity"], row["lam"] or 0.0, row["at"] or "", row["step"]), []).append(row)
    means = []
    for key in sorted(groups, key=lambda key: (key[0] != "growth", *key[1:])):
        group = groups[key]
        values = torch.tensor([row["norm"] for row in group], dtype=torch.float64)
        means.append(
            {
                **{name: group[0][name] for name in ("quantity", "lam", "at", "step", "timestep")},
                "norm": float(values.mean()),
                "least": float(values.min()),
                "most": float(values.max()),
                "sem": float(values.std() / len(values) ** 0.5) if len(values) > 1 else None,
                "above": float((values > 1).double().mean()),
                "num": len(values),
                "error": max(row["error"] for row in group),
                "lower_bound": any(row["lower_bound"] for row in group),
            }
        )
    return means


def _check(quantities: Sequence[str], at: str, steps: Iterable[int] | None, num_inference_steps: int) -> None:
    unknown = [name for name in quantities if name not in ("growth", "contraction")]
    if unknown or not quantities:
        raise ValueError(f"quantities are {list(quantities)}; expected growth, contraction or both")
    if at not in ("estimate", "sample"):
        raise ValueError(f"at is {at!r}; expected 'estimate' or 'sample'")
    if steps is not None:
        outside = [step for step in steps if not 0 <= step < num_inference_steps]
        if outside:
            raise ValueError(f"steps {outside} are not among 0..{num_inference_steps - 1}")


def _batches(seeds: Sequence[int], batch_size: int) -> list[tuple[int, ...]]:
    return [tuple(seeds[start : start + batch_size]) for start in range(0, len(seeds), batch_size)]


def _key(row: Row) -> tuple[Any, ...]:
    return row["quantity"], row["step"], row["seed"], row["lam"], row["at"]


_Norm = tuple[str, float | None, str | None]  # quantity, λ, where the contraction has its J


def _of_step(step: Step, norms: Sequence[_Norm], iterations: int, tol: float, method: Method) -> list[Row]:
    """The rows of one step of a batch; norms at the same point have their products in common."""
    if step.a is None or step.b is None:
        raise ValueError(f"step {step.index} is no a x + b ε: {step.reason}")
    points = {
        "sample": [norm for norm in norms if norm[2] != "estimate"],
        "estimate": [norm for norm in norms if norm[2] == "estimate"],
    }
    rows: list[Row] = []
    for place, here in points.items():
        if not here:
            continue
        shifts = [Shift(step.a, step.b) if lam is None else Shift(1.0 - lam, lam * step.b) for _, lam, _ in here]
        made, found = _norms_at(step, place, shifts, iterations, tol, method)
        for norm, values, errors in zip(here, found.values.tolist(), found.errors.tolist(), strict=True):
            for seed, value, error in zip(step.seeds, values, errors, strict=True):
                rows.append(
                    {
                        "quantity": norm[0],
                        "step": step.index,
                        "timestep": step.timestep,
                        "seed": seed,
                        "lam": norm[1],
                        "at": norm[2],
                        "norm": value,
                        "error": error,
                        "a": step.a,
                        "b": step.b,
                        "method": "none" if made is None else made.method,
                        "noise": None if made is None else made.noise,
                        "lower_bound": made is not None and made.transpose is None,
                        "products": found.products,
                        "note": None if made is None else made.note,
                    }
                )
    return rows


def _norms_at(
    step: Step, place: str, shifts: Sequence[Shift], iterations: int, tol: float, method: Method
) -> tuple[Products | None, Norms]:
    """The norms of a step's matrices with J at its sample or its first estimate."""
    if abs(step.b or 0.0) <= STILL:  # nothing of J
        values = torch.tensor([[abs(shift.identity)] * len(step.seeds) for shift in shifts], dtype=torch.float64)
        return None, Norms(values, torch.zeros_like(values), 0, 0)
    estimate = place == "estimate"
    point = step.estimates[0] if estimate else step.x
    denoise = step.denoise_estimate if estimate else step.denoise
    denoise.check()
    made = products(denoise, point, method, seed=step.index)
    start = _start(point, step.seeds, step.index)
    return made, largest_singular_values(made.apply, made.transpose, start, shifts, iterations, tol)


def _start(like: Tensor, seeds: Sequence[int], index: int) -> Tensor:
    """A random vector for each sample, from its seed and the step: the same in every batch."""
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        drawn.append(torch.randn(like.shape[1:], generator=generator, dtype=torch.float64))
    return torch.stack(drawn).to(like)
