"""iec.calibrate: sample seeds in full precision, look at every evaluation, write down quantizers and the plan of a cache."""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from iec.artifact import fingerprint
from iec.artifact.calibration import CacheTables, Calibration, Quantization
from iec.caches.cachequant import CacheQuant
from iec.calibration.activations import Activations, Reuse
from iec.calibration.consumers import Consumers
from iec.calibration.features import Features, cut_of
from iec.calibration.journal import Journal
from iec.calibration.outputs import Outputs
from iec.calibration.passage import Passage
from iec.calibration.reconstructed import Finished, reconstructed
from iec.pipeline.adapters import denoisers
from iec.pipeline.batches import Batch, batches
from iec.pipeline.foreign import refuse_beside
from iec.pipeline.installation import Installation, installation, installed, switching
from iec.pipeline.origin import origin
from iec.quant.config import QuantConfig
from iec.quant.reconstruct import Reconstruction

P = TypeVar("P", bound=Passage)
Progress = Callable[[str, int, int], None]


def calibrate(
    pipe: Any,
    quant: QuantConfig | None = None,
    cache: CacheQuant | None = None,
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
    one entry per sample). The samples are gone through several times, in full precision, each denoiser evaluation being looked
    at: for the cached features (one evaluation), the activations (two; three at reuse steps), the compensation of rounding where
    the cached feature is taken (one and a reuse pass), the output of the quantized model (two). Memory does not grow with
    samples, and with steps by a few numbers per layer and channel only.

    Args:
        quant: what to quantize and how; the default is W8A8, or nothing where `cache` is given.
        cache: the feature cache to plan, and to compensate; the quantizers then are those of a model with this cache.
        reconstruct: learn the rounding of low-bit weights, by these options; None rounds to nearest. Keeps some inputs of the
            denoisers while sampling, and afterwards a second copy of each denoiser, one at a time. Under a cache the layers
            learn in the passes of a run, whole and reused; where the cached feature is taken this replaces the compensation
            of rounding (METHOD 4.4).
        checkpoint_path: where to keep what was learnt after each batch and each reconstructed unit; a call that finds such a
            file of the same calibration goes on from it, with the result of an uninterrupted one. It is left there: delete it
            when the calibration is saved.
        progress: called as progress(what, done, num_samples) after each batch, `what` being "features", "samples",
            "compensation" or "outputs", and as progress("reconstruction", done, units) after each unit.

    Returns the calibration; nothing is left on the pipeline. Raises TypeError or ValueError for a pipeline or arguments that
    cannot be used, RuntimeError when the schedule changes between batches.
    """
    config = QuantConfig() if quant is None and cache is None else quant
    for name, value, kind in (
        ("quant", quant, QuantConfig),
        ("cache", cache, CacheQuant),
        ("reconstruct", reconstruct, Reconstruction),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}, expected an iec.{kind.__name__} or None")
    if reconstruct is not None and config is None:
        raise ValueError("reconstruct is given, but nothing is quantized; give quant=iec.QuantConfig(...) too")
    if installed(pipe) is not None:
        raise ValueError("IEC is on this pipeline; calibrate the plain one: call iec.undo(pipe) first")
    # Made anew for each passage, because a call uses up its generators.
    calls = functools.partial(
        batches, pipe, range(seed, seed + num_samples), num_inference_steps, batch_size, "latent", **kwargs
    )
    calls()  # refuses what cannot be sampled before anything is done
    refuse_beside(denoisers(pipe).values())
    settings = {"batch_size": batch_size, **{key: _plain(value) for key, value in kwargs.items()}}
    about = functools.partial(origin, num_samples=num_samples, seed=seed, settings=settings)
    options = [None if given is None else given.as_dict() for given in (config, cache, reconstruct)]
    key = fingerprint.plain([repr(about(pipe)), num_inference_steps, *options])
    sampling = _Sampling(pipe, calls, Journal(checkpoint_path, key), progress, seed, num_samples)
    own = next((kwargs[key] for key in ("timesteps", "sigmas") if kwargs.get(key) is not None), None)
    num_steps = _steps(pipe, num_inference_steps) if own is None else len(own)
    with switching:
        held = installation(pipe)
    tables, quantization = None, None
    if cache is not None:
        tables = sampling.passed(Features(held, cache, num_steps)).result()
    if config is not None:
        quantization = _quantized(held, sampling, config, tables, reconstruct, num_steps)
    return Calibration(about(pipe, sampling.timesteps), quantization, tables)


def _quantized(
    held: Installation,
    sampling: _Sampling,
    config: QuantConfig,
    tables: CacheTables | None,
    reconstruct: Reconstruction | None,
    num_steps: int,
) -> Quantization:
    """The quantized layers, under the cache that `tables` describe."""
    models = {name: gate.module for name, gate in held.gates.items()}
    reuse = None if tables is None else Reuse(cut_of(models, CacheQuant.from_dict(tables.config))[1], tables)
    activations = Activations(held, config, num_steps, reuse)
    if reconstruct is not None:
        activations.capture(sampling.num_samples, reconstruct)
    quant = sampling.passed(activations).result(config)
    last = activations.outputs()
    if reconstruct is not None:
        tuples = {name: capture.result() for name, capture in activations.captures.items()}
        finished = Finished(quant.layers)
        sampling.journal.restore(finished)
        corrected = last if config.bias_correction != "none" else {}
        after = functools.partial(sampling.told, finished)
        under = None if tables is None else CacheQuant.from_dict(tables.config)
        quant = reconstructed(models, quant, tuples, reconstruct, corrected, finished, after, under)
    elif tables is not None and reuse is not None and CacheQuant.from_dict(tables.config).compensates_quant:
        quant = sampling.passed(Consumers(held, quant, tables.component, reuse)).result(quant)
    if config.output_correction != "none" and last:
        affine = config.output_correction == "affine"
        quant = sampling.passed(Outputs(held, quant, last, num_steps, tables, affine)).result(quant)
    return quant


class _Sampling:
    """The calls of the pipeline that sample all seeds, for one passage after the other."""

    def __init__(
        self,
        pipe: Any,
        calls: Callable[[], Iterator[Batch]],
        journal: Journal,
        progress: Progress | None,
        seed: int,
        num_samples: int,
    ) -> None:
        self.pipe, self.calls, self.journal, self.progress = pipe, calls, journal, progress
        self.seed, self.num_samples = seed, num_samples
        self.timesteps: tuple[float, ...] = ()

    def passed(self, passage: P) -> P:
        """The passage, after all samples; those that the journal has are not sampled again."""
        held = passage.held
        done = self.journal.restore(passage)
        self._compare(passage)
        with switching:
            held.add(passage)
            passage.install()
        try:
            for call in itertools.islice(self.calls(), done, None):
                first, count = call.seeds[0] - self.seed, len(call.seeds)
                passage.begin(first, count)
                self.pipe(**call.arguments)
                self._compare(passage)
                done += 1
                self.journal.keep(passage, done)
                if self.progress is not None:
                    self.progress(passage.what, first + count, self.num_samples)
        finally:
            with switching:
                held.drop(passage)
        return passage

    def told(self, finished: Finished, done: int, units: int) -> None:
        """`done` of the reconstructed units are done."""
        self.journal.keep(finished, done)
        if self.progress is not None:
            self.progress(finished.what, done, units)

    def _compare(self, passage: Passage) -> None:
        if self.timesteps and passage.timesteps and self.timesteps != passage.timesteps:
            raise RuntimeError("the timesteps changed from one batch to the next; give the scheduler a fixed schedule")
        self.timesteps = passage.timesteps or self.timesteps


def _steps(pipe: Any, num_inference_steps: int) -> int:
    """The length of the scheduler's list, which is not always the number asked for (Heun, PNDM)."""
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
