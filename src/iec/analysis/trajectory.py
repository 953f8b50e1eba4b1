"""Errors of an efficient model along the trajectory, without and with IEC (Fig. 2), and the residuals of the corrections.

Full precision and efficient model begin with the same noise. Two errors are told apart, both at the state after each step:

    accumulated   x̃ of the efficient run − x of the full run: what a user gets; all errors so far, grown or shrunk
    local         what the step alone gets wrong, begun at the x of the full run

IEC changes the full-precision model as well, so `full` with IEC is a curve of its own (how far IEC moves a model that has no
error), and the corrected efficient model is compared with both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iec.analysis.course import (
    Correction,
    Part,
    Progress,
    beside,
    check_pair,
    check_plain,
    check_timesteps,
    everywhere,
    follow,
    parts,
)
from iec.analysis.spread import geometric, mean, norms, quartiles, rms

Row = dict[str, Any]
FLOOR = 1e-12  # of a norm that is divided by


class Curve(NamedTuple):
    """What is compared: `model` "efficient" or "full", with or without IEC, `against` "full" or "full + IEC", and the kind
    of `error`, "accumulated" or "local"."""

    model: str
    corrected: bool
    against: str
    error: str


def errors(
    full: Any,
    efficient: Any,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int = 16,
    *,
    correction: Correction | None = None,
    local: bool = True,
    progress: Progress | None = None,
    **kwargs: Any,
) -> list[Row]:
    """Errors of `efficient` against `full` after every step, averaged over the samples of `seeds`.

    Args:
        full: a pipeline in full precision.
        efficient: the same model, quantized or cached, without IEC; it must have a denoiser of its own.
        correction: arguments of `iec.enable`, such as {"steps": "all", "relax": (0.5,)}; None leaves IEC out. The refresh steps
            of a cache are meant for both models.
        local: also the local errors, which take as many evaluations again.
        progress: called as progress("error", batches done, batches).
        kwargs: for both pipelines; prompts and class labels may be lists with one entry per seed.

    Returns plain rows, one per curve and step: model, corrected, against, error, step, timestep; `rms`, root mean square over
    the elements of a sample, in the units of the pipeline's samples (pixels in −1 … 1, or latents), and `relative`, ‖x̃ − x‖/‖x‖,
    both as the mean over samples with its standard error `…_sem`; `median` of the RMS with the quartiles `median_low`,
    `median_high`, which a few samples that run away leave as they are; `ratio`, the geometric mean over samples of the RMS
    with IEC over the one without, with its interval `ratio_low` … `ratio_high` (None where there is nothing to compare); `num`.
    Standard errors and intervals of means are None for a single sample.

    Raises ValueError for pipelines that cannot be compared (see `course.check_pair`), or of other timesteps.
    """
    check_pair(full, efficient)
    correction = everywhere(correction, [efficient], num_inference_steps)
    every = parts(full, seeds, num_inference_steps, batch_size, kwargs)
    found: dict[Curve, list[tuple[Tensor, Tensor]]] = {}
    timesteps: tuple[float, ...] = ()
    for done, part in enumerate(every):
        timesteps, curves = _compared(full, efficient, part, correction, local)
        for curve, (states, reference) in curves.items():
            pairs = [
                (rms(x - y), norms(x - y) / norms(y).clamp(min=FLOOR)) for x, y in zip(states, reference, strict=True)
            ]
            found.setdefault(curve, []).append((torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])))
        if progress is not None:
            progress("error", done + 1, len(every))
    joined = {curve: tuple(torch.cat(part, 1) for part in zip(*of, strict=True)) for curve, of in found.items()}
    return [row for curve, of in joined.items() for row in _rows(curve, of, joined, timesteps)]


def _compared(
    full: Any, efficient: Any, part: Part, correction: Correction | None, local: bool
) -> tuple[tuple[float, ...], dict[Curve, tuple[Tensor, Tensor]]]:
    """The timesteps, and for every curve the states (T, B, …) and what they are compared with."""
    exact = follow(full, part)

    def states(pipe: Any, corrected: bool, kept: bool) -> Tensor:
        found = follow(pipe, part, correction if corrected else None, *([beside(exact)] if kept else []))
        check_timesteps(exact.timesteps, found.timesteps)
        return found.states.double()

    reference = exact.states.double()
    curves: dict[Curve, tuple[Tensor, Tensor]] = {}
    for error in ("accumulated", "local") if local else ("accumulated",):
        kept = error == "local"
        curves[Curve("efficient", False, "full", error)] = states(efficient, False, kept), reference
        if correction is not None:
            corrected, ideal = states(efficient, True, kept), states(full, True, kept)
            curves[Curve("efficient", True, "full", error)] = corrected, reference
            curves[Curve("full", True, "full", error)] = ideal, reference
            curves[Curve("efficient", True, "full + IEC", error)] = corrected, ideal
    return exact.timesteps, curves


def _rows(
    curve: Curve, of: tuple[Tensor, ...], every: Mapping[Curve, tuple[Tensor, ...]], timesteps: Sequence[float]
) -> list[Row]:
    absolute, relative = of
    plain = every.get(curve._replace(corrected=False, against="full"))
    rows: list[Row] = []
    for step, timestep in enumerate(timesteps):
        first, second, middle = mean(absolute[step]), mean(relative[step]), quartiles(absolute[step])
        comparable = curve.corrected and plain is not None and bool((plain[0][step] > 0).all())
        ratio = geometric(absolute[step] / plain[0][step]) if comparable and plain is not None else (None, None, None)
        rows.append(
            {
                **curve._asdict(),
                "step": step,
                "timestep": timestep,
                "rms": first.value,
                "rms_sem": first.sem,
                "median": middle.value,
                "median_low": middle.low,
                "median_high": middle.high,
                "relative": second.value,
                "relative_sem": second.sem,
                **dict(zip(("ratio", "ratio_low", "ratio_high"), ratio, strict=True)),
                "num": absolute.shape[1],
            }
        )
    return rows


def residuals(
    pipes: Mapping[str, Any],
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int = 16,
    *,
    correction: Correction,
    progress: Progress | None = None,
    **kwargs: Any,
) -> list[Row]:
    """Relative residuals ‖y′ − y‖/(‖y‖ + 1e-6) of every correction, of each of the pipelines (by name, in full precision or not).

    With several factors in `correction["relax"]` they tell whether the iteration contracts: `contraction` is the geometric mean
    over samples of ‖y′ − y‖ over the one before (None for the first), below 1 where it does. It is the growth of that very
    difference by the map x ↦ (1−λ)x + λ Φ(x_t, ε(x)), and so, to first order, at most the norm of its derivative (Fig. 1b). A
    sample that `tol` has frozen stays where it is, which counts as 1.

    Returns rows: model, step, timestep, correction (1 … K), residual with residual_sem, its median with the quartiles
    (residual_median, …_low, …_high), contraction with contraction_low, contraction_high, and num.

    A correction at which the sample was frozen by `tol` has the residual that its evaluation found. Raises ValueError for a
    pipeline that is corrected already.
    """
    rows: list[Row] = []
    same = everywhere(correction, pipes.values(), num_inference_steps)
    for done, (name, pipe) in enumerate(pipes.items()):
        check_plain(pipe)
        every = parts(pipe, seeds, num_inference_steps, batch_size, kwargs)
        courses = []
        for index, part in enumerate(every):
            courses.append(follow(pipe, part, same))
            if progress is not None:
                progress("residuals", done * len(every) + index + 1, len(pipes) * len(every))
        for step in sorted({step for course in courses for step in course.residuals}):
            # A batch whose samples were all frozen has fewer corrections than another.
            held = [course for course in courses if step in course.residuals]
            for number in range(max(len(course.residuals[step]) for course in held)):
                there = [course for course in held if number < len(course.residuals[step])]
                values = torch.cat([course.residuals[step][number] for course in there])
                now, before = (torch.cat([course.changes[step][k] for course in there]) for k in (number, number - 1))
                factor = geometric(now / before) if number and bool((before > 0).all()) else None
                residual, middle = mean(values), quartiles(values)
                rows.append(
                    {
                        "model": name,
                        "step": step,
                        "timestep": courses[0].timesteps[step],
                        "correction": number + 1,
                        "residual": residual.value,
                        "residual_sem": residual.sem,
                        "residual_median": middle.value,
                        "residual_median_low": middle.low,
                        "residual_median_high": middle.high,
                        "contraction": None if factor is None else factor.value,
                        "contraction_low": None if factor is None else factor.low,
                        "contraction_high": None if factor is None else factor.high,
                        "num": len(values),
                    }
                )
    return rows
