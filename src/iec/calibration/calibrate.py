"""iec.calibrate: sample seeds with the full-precision pipeline, observe every layer at every step, write down the quantizers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iec.artifact import checkpoint, fingerprint
from iec.artifact.calibration import Calibration, Quantization
from iec.calibration.reconstructed import Finished, reconstructed
from iec.calibration.tuples import Capture
from iec.patch import replace_forward
from iec.pipeline.batches import batches
from iec.pipeline.installation import Installation, installation, installed, switching
from iec.pipeline.origin import origin
from iec.quant.config import QuantConfig
from iec.quant.observe import Observers
from iec.quant.reconstruct import Reconstruction
from iec.quant.sites import find

Progress = Callable[[str, int, int], None]


class Observation:
    """The observers on a pipeline, from `install()` to `remove()`: every evaluation is observed first, then made as it is.

    The observed one is thrown away, so the trajectory is that of full precision. `captures` keep some of the arguments;
    `samples` are the first one and the number of those sampled now.
    """

    def __init__(self, held: Installation, config: QuantConfig, num_steps: int) -> None:
        self.held = held
        self.models = {name: gate.module for name, gate in held.gates.items()}
        self.observers = {
            name: Observers(find(model, config, prefix=name), config, num_steps) for name, model in self.models.items()
        }
        self.captures: dict[str, Capture] = {}
        self.samples = (0, 0)
        self.timesteps: tuple[float, ...] = ()
        self._removers: list[Callable[[], None]] = []

    def capture(self, num_samples: int, options: Reconstruction) -> None:
        """Keep tuples for reconstruction from now on."""
        for name, model in self.models.items():
            steps = len(next(iter(self.observers[name].searches().values())).scale)
            self.captures[name] = Capture(model, num_samples, steps, options.num_tuples, options.seed)

    def install(self) -> None:
        """Stand in for the forwards of the layers and of the denoisers."""
        for name, observers in self.observers.items():
            observers.install()
            around = functools.partial(self._twice, name=name)
            self._removers.append(replace_forward(self.models[name], around))

    def remove(self) -> None:
        """Step aside; `Installation.drop` calls it."""
        for undo in reversed(self._removers):
            undo()
        self._removers = []
        for observers in self.observers.values():
            observers.remove()

    def _twice(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        run, tick, observers = self.held.state.run, self.held.state.clock.now, self.observers[name]
        if run is not None and tick is not None:
            self.timesteps = tuple(run.values)
            if name in self.captures:
                self.captures[name].take(tick.step, *self.samples, args, kwargs)
            observers.step = tick.step
            try:
                forward(*args, **kwargs)
            finally:
                observers.step = None
        return forward(*args, **kwargs)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that was learnt so far: tensors, and the plain rest, for a checkpoint."""
        tensors = {f"{name}/{key}": value for name, o in self.observers.items() for key, value in o.state().items()}
        templates = {}
        for name, capture in self.captures.items():
            held, templates[name] = capture.state()
            tensors |= {f"tuples/{name}/{key}": value for key, value in held.items()}
        return tensors | {"timesteps": torch.tensor(self.timesteps, dtype=torch.float64)}, {"templates": templates}

    def load_state(self, state: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Continue from `state()`."""
        for name, observers in self.observers.items():
            observers.load_state(_under(f"{name}/", state))
        for name, capture in self.captures.items():
            capture.load_state(_under(f"tuples/{name}/", state), plain["templates"][name])
        self.timesteps = tuple(state["timesteps"].tolist())

    def outputs(self, config: QuantConfig) -> dict[str, str]:
        """The last layer of each denoiser, if its bias is to be corrected."""
        if config.bias_correction == "none":
            return {}
        return {
            name: site.name.removeprefix(f"{name}.")
            for name, observers in self.observers.items()
            for site in observers.sites.layers
            if site.last
        }

    def result(self, config: QuantConfig) -> Quantization:
        """The quantized layers and products of all denoisers."""
        layers, products, skipped = {}, {}, {}
        for observers in self.observers.values():
            of_one = observers.result()
            layers |= of_one[0]
            products |= of_one[1]
            skipped |= {**observers.sites.skipped, **of_one[2]}
        return Quantization(config.as_dict(), layers, products, skipped)


def calibrate(
    pipe: Any,
    quant: QuantConfig | None = None,
    *,
    reconstruct: Reconstruction | None = None,
    num_inference_steps: int,
    num_samples: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    checkpoint_path: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Calibration:
    """Calibrate `pipe`, in full precision and without anything of IEC on it, for runs of `num_inference_steps`.

    Samples the seeds `seed` … `seed + num_samples − 1`; `kwargs` go to the pipeline (prompts and class labels may be lists with
    one entry per sample). Each denoiser evaluation is made twice, once observed: with rounded activations, whose scales
    learn from it, and float weights. Memory does not grow with samples or steps.

    Args:
        quant: what to quantize and how; the default is W8A8.
        reconstruct: learn the rounding of low-bit weights, by these options; None rounds to nearest. Keeps some inputs of the
            denoisers while sampling, and afterwards a second copy of each denoiser, one at a time.
        checkpoint_path: where to keep what was learnt after each batch and each reconstructed unit; a call that finds such a
            file of the same calibration goes on from it, with the result of an uninterrupted one. It is left there: delete it
            when the calibration is saved.
        progress: called as progress("samples", done, num_samples) after each batch and as
            progress("reconstruction", done, units) after each unit.

    Returns the calibration; nothing is left on the pipeline. Raises TypeError or ValueError for a pipeline or arguments that
    cannot be used, RuntimeError when the schedule changes between batches.
    """
    config = quant if quant is not None else QuantConfig()
    if not isinstance(config, QuantConfig):
        raise TypeError(f"quant is {quant!r}, expected an iec.QuantConfig")
    if installed(pipe) is not None:
        raise ValueError("IEC is on this pipeline; calibrate the plain one: call iec.undo(pipe) first")
    calls = list(batches(pipe, range(seed, seed + num_samples), num_inference_steps, batch_size, "latent", **kwargs))
    if reconstruct is not None and not isinstance(reconstruct, Reconstruction):
        raise TypeError(f"reconstruct is {reconstruct!r}, expected an iec.Reconstruction or None")
    settings = {"batch_size": batch_size, **{key: _plain(value) for key, value in kwargs.items()}}
    about = functools.partial(origin, num_samples=num_samples, seed=seed, settings=settings)
    options = reconstruct.as_dict() if reconstruct is not None else None
    key = fingerprint.plain([repr(about(pipe)), num_inference_steps, config.as_dict(), options])
    saved, plain = _resumed(checkpoint_path, key)
    done = plain.get("done", 0)
    with switching:
        held = installation(pipe)
        observation = Observation(held, config, _steps(pipe, num_inference_steps))
        if reconstruct is not None:
            observation.capture(num_samples, reconstruct)
        held.add(observation)
        observation.install()

    def keep(finished: Finished) -> None:
        if checkpoint_path is not None:
            tensors, state = observation.state()
            of_units, units = finished.state()
            tensors |= {f"units/{name}": value for name, value in of_units.items()}
            meta = {"fingerprint": key, "done": done, "units": units, **state}
            checkpoint.save(checkpoint_path, tensors, meta)

    try:
        if saved is not None:
            observation.load_state(saved, plain)
        timesteps = observation.timesteps
        for call in calls[done:]:
            observation.samples = (call.seeds[0] - seed, len(call.seeds))
            pipe(**call.arguments)
            if timesteps and timesteps != observation.timesteps:
                raise RuntimeError(
                    "the timesteps changed from one batch to the next; give the scheduler a fixed schedule"
                )
            timesteps = observation.timesteps
            done += 1
            keep(Finished())
            if progress is not None:
                progress("samples", min(done * batch_size, num_samples), num_samples)
    finally:
        with switching:
            held.drop(observation)
    quantization = observation.result(config)
    if reconstruct is not None:
        finished = Finished()
        if saved is not None:
            finished.load_state(_under("units/", saved), plain["units"], quantization.layers)

        def after(units_done: int, units: int) -> None:
            keep(finished)
            if progress is not None:
                progress("reconstruction", units_done, units)

        tuples = {name: capture.result() for name, capture in observation.captures.items()}
        quantization = reconstructed(
            observation.models, quantization, tuples, reconstruct, observation.outputs(config), finished, after
        )
    calibration = Calibration(about(pipe, timesteps), quantization)
    return calibration


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _resumed(path: str | os.PathLike[str] | None, key: str) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    return (None, {}) if path is None or not Path(path).is_file() else checkpoint.load(path, fingerprint=key)


def _steps(pipe: Any, num_inference_steps: int) -> int:
    """The length of the scheduler's list, which is not always the number asked for (Heun, PNDM)."""
    import copy

    scheduler = copy.deepcopy(pipe.scheduler)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (TypeError, ValueError):  # schedules that depend on the picture's size are as long as asked for
        return num_inference_steps
    return len(scheduler.timesteps)


def _plain(value: Any) -> Any:
    """A call's argument as far as it is plain data; tensors by their digest."""
    if isinstance(value, Tensor):
        return f"tensor {fingerprint.tensors({'': value})}"
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(type(value))
