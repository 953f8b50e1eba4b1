"""What else the evaluations of a correction buy: arms of equal cost beside a corrected one, and sweeps of its options.

Equal cost means: the most steps whose passes cost no more than the corrected arm's, in whole passes; one that reuses a cached
feature counts by its share of multiplications (`iec.evaluate.cost`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from iec.evaluate.arms import Arm
from iec.evaluate.cost import passes

SCALES = (0.99, 0.995, 1.005)  # of the output; below 1 it takes noise prediction back, as against exposure bias
ROUNDING = 1e-9
# As far as IEC's own displacement, and so near that the noise level of the sample is not left.
PROBES = ("start:0.1", "start:1", "next")
EULER, HEUN = "EulerDiscreteScheduler", "HeunDiscreteScheduler"
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
WITHOUT_CACHE = "ends:1/10"  # the plan of full precision where the arm's own is about the steps of its cache
DDIM = ("DDIMScheduler", "DDIMParallelScheduler")


def controls(
    arm: Arm,
    scheduler: Any,
    *,
    share: float | None = None,
    refresh: Iterable[int] | None = None,
    scales: Sequence[float] = SCALES,
) -> tuple[Arm, ...]:
    """The arms of equal cost for a corrected `arm`, first on its efficient model, then on full precision.

    Of each there are: more steps of the same solver, Heun, DPM-Solver++(2M), UniPC; the corrections of `arm` evaluated at x_t
    again (displaced in a random direction, as far as IEC's and a tenth of it) and at the next timestep; and, for nothing, the
    output times each of `scales`. Full precision beside a cached arm has the steps that the cost allows, and corrects ends:1/10
    where the plan is about refresh steps. What the solvers of a model that predicts no noise, velocity or image are not made
    for is left out.

    Args:
        arm: a corrected arm.
        scheduler: the pipeline's own.
        share: what a pass that reuses costs, from `reuse_share`; needed for a cached arm.
        refresh: as `iec.evaluate.cost.passes` takes it.
        scales: factors of ε-scaling; only for models that predict noise.

    All are of kind "control", no two the same. Raises ValueError for an arm without corrections, a missing `share`, and as
    `passes` does.
    """
    if arm.steps is None:
        raise ValueError(f"{arm.name!r} corrects nothing, so no cost is to be equalled; give a corrected arm")
    if arm.cache is not None and share is None:
        raise ValueError(f"{arm.name!r} is cached: give share=reuse_share(pipe, {arm.cache!r})")
    budget = passes(arm, scheduler, refresh).equivalents(_or_whole(share)) * (1 + ROUNDING)
    bare = replace(arm, steps=None)
    full = replace(bare, quant=None, layers=("*",), reconstruct=False, cache=None)
    found: list[Arm] = []
    for base in (bare,) if bare == full else (bare, full):
        made = [*_solvers(base, scheduler, budget, share), *_probes(arm, base, scheduler, budget)]
        fitting = base if _cost(base, scheduler, share) <= budget else _more_steps(base, scheduler, budget, share)
        if fitting is not None and _predicts(scheduler) == "epsilon":
            made += [replace(fitting, scale=factor) for factor in scales if factor != 1]
        before = "" if base is bare else "full precision, "
        found += [replace(each, kind="control", name=before + each.label) for each in made]
    return _distinct(found, (arm, bare))


def sweeps(
    arm: Arm,
    *,
    T: Iterable[int] = (),
    eta: Iterable[float] = (),
    K: Iterable[int] = (),
    lam: Iterable[float] = (),
    steps: Iterable[str] = (),
) -> tuple[Arm, ...]:
    """A corrected `arm` with one option changed at a time, and for T and eta the same without the correction.

    Args:
        arm: a corrected arm.
        T: numbers of steps.
        eta: shares of fresh noise.
        K: numbers of corrections of a step, each with the first λ of `arm`.
        lam: λ, of every correction of a step.
        steps: plans.

    Arms equal to `arm` are left out. Raises ValueError for an arm without corrections, and as `Arm` does.
    """
    if arm.steps is None:
        raise ValueError(f"{arm.name!r} corrects nothing, so there is nothing to sweep; give a corrected arm")
    found: list[Arm] = []
    for made in (*(replace(arm, num_inference_steps=t) for t in T), *(replace(arm, eta=value) for value in eta)):
        found += [replace(made, kind="plain", steps=None), made]
    found += [replace(arm, relax=arm.relax[:1] * k) for k in K]
    found += [replace(arm, relax=(value,) * len(arm.relax)) for value in lam]
    found += [replace(arm, steps=plan) for plan in steps]
    return _distinct([replace(made, name=made.label) for made in found], (arm,))


def _solvers(base: Arm, scheduler: Any, budget: float, share: float | None) -> list[Arm]:
    """The uncorrected arms of equal cost, by the same solver and by others."""
    kind = _predicts(scheduler)
    own = base.scheduler or type(scheduler).__name__
    names: tuple[str, ...] = ()
    if kind in ("epsilon", "v_prediction", "sample") and not own.startswith("EDM"):
        names = (HEUN, *MULTISTEP)
    elif own == "FlowMatchEulerDiscreteScheduler":
        names = ("FlowMatchHeunDiscreteScheduler",)
    elif own == "EDMEulerScheduler":
        names = ("EDMDPMSolverMultistepScheduler",)
    made = [_most(_by(base, name), scheduler, budget, share) for name in names if name != own]
    return [found for found in (_more_steps(base, scheduler, budget, share), *made) if found is not None]


def _more_steps(base: Arm, scheduler: Any, budget: float, share: float | None) -> Arm | None:
    """The same solver with the most steps, if these are others than the arm's.

    diffusers' DDIM steps back by 1000 // T, which is wrong unless T divides 1000 (60 steps come out 9 dB worse than 50). Its
    Euler takes the same step, that of the probability-flow ODE, for any T; with fresh noise (eta) only divisors are left.
    """
    own = base.scheduler or type(scheduler).__name__
    if own in DDIM and not base.eta:
        found = _most(_by(base, EULER), scheduler, budget, share)
        same = found is not None and found.num_inference_steps == base.num_inference_steps
        return replace(base) if same else found
    divisor = int(dict(scheduler.config).get("num_train_timesteps", 1000)) if own in DDIM else None
    return _most(base, scheduler, budget, share, divisor)


def _by(base: Arm, name: str) -> Arm:
    """`base` by another solver, which takes no fresh noise, with those of its options that this one has."""
    import diffusers

    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    kept = {key: value for key, value in base.scheduler_options.items() if key in known}
    return replace(base, scheduler=name, scheduler_options=kept, eta=0.0)


def _most(base: Arm, scheduler: Any, budget: float, share: float | None, divisor: int | None = None) -> Arm | None:
    """`base` with the most steps, at least 2, that cost no more than the budget; only divisors of `divisor`."""
    top = int(dict(scheduler.config).get("num_train_timesteps", 1000))

    def cost(steps: int) -> float:
        return _cost(replace(base, num_inference_steps=steps), scheduler, share)

    if divisor is not None:
        fitting = [n for n in range(2, top + 1) if divisor % n == 0 and cost(n) <= budget]
        return replace(base, num_inference_steps=fitting[-1]) if fitting else None
    low, high = 1, top + 1  # the most that fits is in low … high − 1; costs grow with the steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return replace(base, num_inference_steps=low) if low > 1 else None


def _cost(base: Arm, scheduler: Any, share: float | None) -> float:
    """What an uncorrected arm costs, in whole passes; without end where its cache has no plan for so few steps."""
    try:
        return passes(base, scheduler).equivalents(_or_whole(share))
    except ValueError:
        return float("inf")


def _or_whole(share: float | None) -> float:
    return 1.0 if share is None else share


def _probes(arm: Arm, base: Arm, scheduler: Any, budget: float) -> list[Arm]:
    """The corrections of `arm` on `base`, evaluated elsewhere, at a cost that is no higher."""
    made = replace(base, steps=arm.steps, relax=arm.relax, tol=arm.tol)
    if arm.cache is not None and base.cache is None:
        plan = WITHOUT_CACHE if "refresh" in (arm.steps or "") else arm.steps
        found = _fewer(replace(made, steps=plan), scheduler, budget)
        if found is None:
            return []
        made = found
    return [each for each in (replace(made, probe=probe) for probe in PROBES) if _corrects(each, scheduler)]


def _corrects(made: Arm, scheduler: Any) -> bool:
    """Whether its probe leaves something to correct: the last step has no next timestep."""
    if made.probe != "next":
        return True
    try:
        return passes(made, scheduler) != passes(replace(made, steps=None), scheduler)
    except ValueError:  # refresh steps that only a calibration knows; step 0 is among them
        return True


def _fewer(made: Arm, scheduler: Any, budget: float) -> Arm | None:
    """A corrected arm of full precision with the most steps that the budget allows; None where its plan fits none."""
    for steps in range(made.num_inference_steps, 1, -1):
        shorter = replace(made, num_inference_steps=steps)
        own = made.scheduler or type(scheduler).__name__
        if own in DDIM and steps != made.num_inference_steps:
            shorter = _by(shorter, EULER)
        try:
            if passes(shorter, scheduler).whole <= budget:
                return shorter
        except ValueError:  # a plan by the number of the step
            return None
    return None


def _predicts(scheduler: Any) -> str:
    """What the model predicts, as its scheduler's config says; "other" for flow matching and EDM's preconditioned output."""
    edm = type(scheduler).__name__.startswith("EDM")
    return "other" if edm else dict(scheduler.config).get("prediction_type", "other")


def _distinct(arms: list[Arm], but: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms without repeats, and without those of `but`."""
    seen = [arm.plain() for arm in but]
    found: list[Arm] = []
    for arm in arms:
        if arm.plain() not in seen:
            seen.append(arm.plain())
            found.append(arm)
    return tuple(found)
