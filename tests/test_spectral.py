"""Derivatives of denoisers, and norms of steps and corrections: dense Jacobians, closed forms, the released code's network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import iec
from iec.analysis.linear import products
from iec.analysis.recording import record
from iec.analysis.spectral import Row, averaged, contraction_norms, growth_norms, spectral_norms
from iec.core.spectrum import largest_singular_values
from iec.pipeline.unconditional import UnconditionalPipeline
from test_deepcache_oracle import released
from tiny import CASES, noise

SIZE = 4  # side of the linear denoiser's images
EYE = torch.eye(SIZE**2, dtype=torch.float64)


class Linear(nn.Module):
    """ε(x, t) = W x, a denoiser whose norms are known; `detached`: with the output cut off, as in the released code."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, seed: int = 0, gain: float = 1.0, keep: float = 0.0, detached: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=SIZE, in_channels=1)
        made = noise(SIZE**2, SIZE**2, seed=seed) * gain / SIZE
        self.weight = nn.Parameter(made + keep * torch.eye(SIZE**2))
        self.keep, self.detached = keep, detached

    def forward(self, sample: Tensor, timestep: Any) -> Any:
        output = (sample.flatten(1) @ self.weight.T).reshape(sample.shape)
        if self.detached:  # what remains attached is a part that is not the network
            kept = self.keep * sample
            output = kept + (output - kept).detach()
        return Output(output)


class Output(tuple):
    """(sample,), with that name."""

    def __new__(cls, sample: Tensor) -> Output:
        return tuple.__new__(cls, (sample,))

    @property
    def sample(self) -> Tensor:
        return self[0]


def pipeline(unet: nn.Module, **options: Any) -> Any:
    pipe = UnconditionalPipeline(unet, diffusers.DDIMScheduler(clip_sample=False, **options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dense(apply: Callable[[Tensor], Tensor], x: Tensor, sample: int) -> Tensor:
    """The matrix whose products with the unit vectors are `apply`'s, for one sample: float64 (n, n)."""
    columns = []
    for unit in torch.eye(x[0].numel()).to(x):
        v = torch.zeros_like(x)
        v[sample] = unit.reshape(x.shape[1:])
        columns.append(apply(v)[sample].double().flatten())
    return torch.stack(columns, 1)


def jacobian(denoise: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∂ε/∂x row by row, by autograd: float64 (B, n, n)."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        eps = denoise(x).flatten(1).sum(0)
    rows = [torch.autograd.grad(one, x, retain_graph=True)[0].flatten(1) for one in eps]
    return torch.stack(rows, 1).double()


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def released_value(scheduler: Any, timestep: float) -> float:
    """What the released code computes: ‖∂(x̂₀ − x)/∂x‖ with ε detached."""
    return float(1 / scheduler.alphas_cumprod[int(timestep)].double().sqrt() - 1)


# --- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_a_network(dtype: torch.dtype) -> None:
    """J v and Jᵀ u are those of the dense Jacobian, sample by sample; differences agree with them."""
    unet = CASES["ddim"].build(fresh=True).unet.to(dtype)
    x, v = noise(2, 3, 8, 8, seed=1).to(dtype), noise(2, 3, 8, 8, seed=2).to(dtype)

    def denoise(x: Tensor) -> Tensor:
        return unet(x, 300).sample

    matrix = jacobian(denoise, x)
    flat = v.double().flatten(1)[..., None]
    made = products(denoise, x)
    assert made.method == "exact" and made.note is None and made.transpose is not None
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        made.apply(v).double().flatten(1), (matrix @ flat)[..., 0], rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        made.transpose(v).double().flatten(1), (matrix.mT @ flat)[..., 0], rtol=tolerance, atol=tolerance
    )
    finite = products(denoise, x, "finite")
    assert finite.method == "finite" and finite.transpose is None and finite.noise < 1e-2
    off = (finite.apply(v) - made.apply(v)).norm() / made.apply(v).norm()
    assert float(off) < 5e-3
    assert not any(parameter.grad is not None for parameter in unet.parameters())


def test_products_leave_the_model_as_it_was() -> None:
    """Dropout is off meanwhile, parameters are out of the graph; both are put back, also after a failure."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3)).train()
    net[0].eval()

    class Denoise:
        modules = (net,)
        fails = False

        def __call__(self, x: Tensor) -> Tensor:
            assert not net[1].training and not net[0].weight.requires_grad
            if self.fails and x.requires_grad:
                raise RuntimeError("no such kernel")
            return net(x)

    denoise = Denoise()
    for denoise.fails in (False, True):
        made = products(denoise, noise(2, 3, seed=1))
        assert [part.training for part in (net, *net)] == [True, False, True, True]
        assert all(parameter.requires_grad for parameter in net.parameters())
        assert made.method == ("finite" if denoise.fails else "exact")
        matrix = (net[2].weight @ net[0].weight).detach().double()
        torch.testing.assert_close(dense(made.apply, noise(2, 3), 1), matrix, rtol=1e-3, atol=1e-3)
    assert made.note == "no such kernel"


@pytest.mark.parametrize("keep", [0.0, 0.7])
def test_detached_networks_do_not_pass(keep: float) -> None:
    """With `keep` a part of the derivative is there, and wrong; the differences see the network all the same."""
    unet = Linear(seed=3, keep=keep, detached=True)
    x = noise(2, 1, SIZE, SIZE, seed=4)

    def denoise(x: Tensor) -> Tensor:
        return unet(x, 5).sample

    with pytest.raises(RuntimeError, match=r"carries no derivative|differs by .* from central differences"):
        products(denoise, x, "exact")
    made = products(denoise, x)
    assert made.method == "finite" and made.note
    for sample in (0, 1):
        torch.testing.assert_close(dense(made.apply, x, sample), unet.weight.double(), rtol=1e-3, atol=1e-3)


def test_rounding_finds_a_step() -> None:
    """A model whose input is rounded to steps of 0.05: differences over less than that are noise, so larger ones are taken."""
    unet = Linear(seed=3)

    def rounded(x: Tensor) -> Tensor:
        return unet((x / 0.05).round() * 0.05, 5).sample

    x = noise(2, 1, SIZE, SIZE, seed=4)
    with pytest.raises(RuntimeError, match="use method='finite'"):
        products(rounded, x, "exact")
    made = products(rounded, x)
    assert made.method == "finite" and made.step >= 4.0**-3
    v = noise(2, 1, SIZE, SIZE, seed=6)
    expected = unet(v, 5).sample.detach()
    assert float((made.apply(v) - expected).norm() / expected.norm()) < 0.2


def test_constant_and_coarse_models() -> None:
    x = noise(2, 1, SIZE, SIZE, seed=4)
    still = products(lambda x: torch.ones_like(x), x)
    torch.testing.assert_close(still.apply(x), torch.zeros_like(x))
    unet = Linear(seed=3)
    coarse = products(lambda x: unet(x.float(), 5).sample.to(x.dtype), x.bfloat16())
    assert coarse.method == "finite" and "bfloat16" in str(coarse.note)
    with pytest.raises(ValueError, match="expected one of auto, exact, finite"):
        products(lambda x: x, x, "central")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zero everywhere"):
        products(lambda x: x, torch.zeros(1, 4))


# --- the released code's network ---------------------------------------------------------------------------------------


def test_against_the_oracle(request: pytest.FixtureRequest) -> None:
    """Exact norms of the authors' network (o07): of A + B J, and of (1−λ) I + λ B J at the same point."""
    folder = request.path.parent / "data"
    data, weights = np.load(folder / "spectral_oracle.npz"), np.load(folder / "ddpm_cache.npz")
    model, x = released(weights), torch.from_numpy(weights["x"][:1])
    for row in (0, 3):
        b = data["b"][row]
        shifts = [(data["a"][row], b), *((1 - lam, lam * b) for lam in data["relax"])]

        def denoise(x: Tensor, t: int = int(data["t"][row])) -> Tensor:
            return model(x, t).sample

        made = products(denoise, x, "exact")
        start = noise(*x.shape, seed=9)
        found = largest_singular_values(made.apply, made.transpose, start, shifts, 20, 1e-5).values[:, 0]
        wanted = torch.tensor([data["growth"][row], *data["contraction"][row]])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
        assert abs(float(found[0]) - data["released"][row]) > 1.0  # 24.755 and 0.018
        assert data["released"][row] == pytest.approx(data["detached"][row], rel=1e-3)
        if row == 0:
            rows = [made.transpose(unit.reshape(x.shape)).flatten() for unit in torch.eye(192)[:5]]
            expected = torch.from_numpy(data["jacobian_at_800"][:5]).float()
            torch.testing.assert_close(torch.stack(rows), expected, rtol=2e-3, atol=2e-3)


# --- along trajectories ------------------------------------------------------------------------------------------------


def of(rows: Sequence[Row], step: int, seed: int, lam: float | None = None, at: str | None = None) -> Row:
    kind = "growth" if lam is None else "contraction"
    (row,) = [
        r for r in rows if (r["quantity"], r["step"], r["seed"], r["lam"], r["at"]) == (kind, step, seed, lam, at)
    ]
    return row


def test_linear_denoiser_is_exact() -> None:
    pipe = pipeline(Linear(seed=3))
    weight = pipe.unet.weight.detach().double()
    rows = spectral_norms(pipe, (1, 2, 3), 4, 2, relax=(0.3, 0.5), tol=1e-8)
    assert len(rows) == 4 * 3 * 3
    for step in record(pipe, (1, 2, 3), 4, 3):
        for seed in step.seeds:
            growth = of(rows, step.index, seed)
            assert growth["norm"] == pytest.approx(norm(step.a * EYE + step.b * weight), rel=1e-5)
            assert (growth["method"], growth["lower_bound"], growth["note"]) == ("exact", False, None)
            for lam in (0.3, 0.5):
                found = of(rows, step.index, seed, lam, "estimate")
                assert found["norm"] == pytest.approx(norm((1 - lam) * EYE + lam * step.b * weight), rel=1e-5)


def test_the_network_counts() -> None:
    """The mistake of the released code: with ε detached the result is 1/√ᾱ − 1 whatever the network. Not here."""
    pipes = [pipeline(Linear(seed=3, gain=gain)) for gain in (1.0, 3.0)]
    found = [[row["norm"] for row in growth_norms(pipe, (1,), 4)] for pipe in pipes]
    for step, (one, three) in zip(record(pipes[0], (1,), 4), zip(*found, strict=True), strict=True):
        value = released_value(pipes[0].scheduler, step.timestep)
        assert three - one > 0.5 * abs(step.b)
        assert min(abs(one - value), abs(three - value)) > 1e-3
        assert min(abs(one - step.a), abs(three - step.a)) > 1e-3  # ε detached in Φ itself


def test_detached_pipelines_are_seen_through() -> None:
    """Of a network that cuts its derivative off, the norm is found by differences; asked for exactly, it is refused."""
    attached, detached = (pipeline(Linear(seed=3, keep=0.7, detached=cut)) for cut in (False, True))
    expected = growth_norms(attached, (1,), 3, iterations=16)
    found = growth_norms(detached, (1,), 3, iterations=16)
    for row, right in zip(found, expected, strict=True):
        assert (row["method"], row["lower_bound"]) == ("finite", True) and "central differences" in row["note"]
        assert row["norm"] == pytest.approx(right["norm"], rel=2e-3)
    with pytest.raises(RuntimeError, match="no exact derivative"):
        growth_norms(detached, (1,), 3, method="exact")


def test_network_against_dense() -> None:
    """Of a UNet, at x_t and at the first estimate, with IEC on or off; 1e-4 of the dense Jacobian's."""
    pipe = CASES["ddim"].build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    iec.enable(pipe, steps="all")
    asked: dict[str, Any] = {"steps": (1,), "relax": (0.5,)}
    rows = spectral_norms(pipe, (1, 2), 4, 2, **asked)
    rows += contraction_norms(pipe, (1, 2), 4, 2, at="sample", **asked)
    step = list(record(pipe, (1, 2), 4, 2))[1]
    here, there = jacobian(step.denoise, step.x), jacobian(step.denoise, step.estimates[0])
    eye = torch.eye(here.shape[-1], dtype=torch.float64)
    for k, seed in enumerate((1, 2)):
        assert of(rows, 1, seed)["norm"] == pytest.approx(norm(step.a * eye + step.b * here[k]), rel=1e-4)
        for at, matrix in (("sample", here[k]), ("estimate", there[k])):
            expected = norm(0.5 * eye + 0.5 * step.b * matrix)
            assert of(rows, 1, seed, 0.5, at)["norm"] == pytest.approx(expected, rel=1e-4)


def test_contraction_tells_what_the_iteration_does() -> None:
    """It is the norm of what a displacement of the estimate becomes, also where the scheduler scales the inputs (Euler)."""
    pipe = UnconditionalPipeline(Linear(seed=3), diffusers.EulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    rows = contraction_norms(pipe, (1,), 4, relax=(0.5,), tol=1e-8)
    for step, row in zip(record(pipe, (1,), 4), rows, strict=True):
        assert step.a is not None and step.b is not None

        def corrected(y: Tensor, step: Any = step) -> Tensor:
            with torch.no_grad():
                return 0.5 * y + 0.5 * (step.a * step.x + step.b * step.denoise_estimate(y))

        def displaced(v: Tensor, y: Tensor = step.estimates[0], size: float = 100.0) -> Tensor:
            return (corrected(y + size * v) - corrected(y)) / size

        assert row["norm"] == pytest.approx(norm(dense(displaced, step.x, 0)), rel=1e-4)


def test_standing_still() -> None:
    """A step with A = 1, B = 0 (METHOD 1.5) has norm 1 and asks the model for nothing."""
    pipe = pipeline(Linear(seed=3))
    pipe.scheduler.alphas_cumprod[:] = 0.5
    pipe.scheduler.final_alpha_cumprod = torch.tensor(0.5)
    calls: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    rows = spectral_norms(pipe, (1,), 3, relax=(0.4,))
    handle.remove()
    assert len(calls) == 3 and {row["method"] for row in rows} == {"none"}
    for row in rows:
        assert row["norm"] == pytest.approx(1.0 if row["quantity"] == "growth" else 0.6, abs=1e-6)


def test_resumes_per_step() -> None:
    """Killed after some steps and taken up again, the rows are the same, and nothing is computed twice."""
    pipe = pipeline(Linear(seed=3))
    asked: dict[str, Any] = {"relax": (0.5,), "batch_size": 2}
    whole = spectral_norms(pipe, (1, 2, 3), 4, **asked)
    kept: list[Row] = []

    class Killed(Exception):
        pass

    def keep(rows: list[Row]) -> None:
        kept.extend(rows)
        if len(kept) >= 8:
            raise Killed

    with pytest.raises(Killed):
        spectral_norms(pipe, (1, 2, 3), 4, keep=keep, **asked)
    assert kept == whole[:8]
    fresh: list[Row] = []
    told: list[tuple[int, int]] = []
    resumed = spectral_norms(
        pipe, (1, 2, 3), 4, known=kept, keep=fresh.extend, progress=lambda *at: told.append(at), **asked
    )
    assert resumed == whole and fresh == whole[8:] and told[-1] == (8, 8)
    calls: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    assert spectral_norms(pipe, (1, 2, 3), 4, known=whole, **asked) == whole
    assert not calls
    # two samples of the first batch are known but for one step: only this batch runs, and only that step is added
    part = [row for row in whole if not (row["step"] == 2 and row["seed"] == 2)]
    again = spectral_norms(pipe, (1, 2, 3), 4, known=part, **asked)
    handle.remove()
    assert sorted(map(str, again)) == sorted(map(str, whole)) and calls


def test_samples_do_not_depend_on_the_batch() -> None:
    pipe = pipeline(Linear(seed=3))
    one, four = (growth_norms(pipe, (1, 2, 3, 4), 3, size, tol=1e-8) for size in (1, 4))
    for row in one:
        assert of(four, row["step"], row["seed"])["norm"] == pytest.approx(row["norm"], rel=1e-5)


def test_quantized_models_have_differences() -> None:
    """int8 has no derivative: differences, said so, with their noise; near the norms of full precision."""
    case = CASES["ddim"]
    pipe = case.build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    asked: dict[str, Any] = {"steps": (1,), "iterations": 12}
    full = growth_norms(pipe, (1, 2), 4, **asked)
    forward = growth_norms(pipe, (1, 2), 4, method="finite", **asked)
    config = iec.QuantConfig(act_method="max", weight_method="max")
    made = iec.calibrate(pipe, config, num_inference_steps=4, num_samples=2, batch_size=2)
    iec.quantize(pipe, made, kernel="reference")
    found = growth_norms(pipe, (1, 2), 4, **asked)
    for row, same, exact in zip(found, forward, full, strict=True):
        assert (row["method"], row["lower_bound"]) == ("finite", True) and row["note"]
        assert row["noise"] > same["noise"]
        assert same["norm"] <= exact["norm"] * 1.001
        assert row["norm"] == pytest.approx(exact["norm"], rel=0.3)


def test_averaged() -> None:
    pipe = pipeline(Linear(seed=3))
    rows = spectral_norms(pipe, (1, 2, 3), 2, relax=(0.3, 0.1))
    for row, value in zip(rows[:3], (0.5, 1.5, 4.0), strict=True):
        row["norm"] = value
    means = averaged(rows)
    assert [(m["quantity"], m["lam"], m["step"]) for m in means] == [
        ("growth", None, 0),
        ("growth", None, 1),
        ("contraction", 0.1, 0),
        ("contraction", 0.1, 1),
        ("contraction", 0.3, 0),
        ("contraction", 0.3, 1),
    ]
    first = means[0]
    assert (first["norm"], first["least"], first["most"], first["num"]) == (2.0, 0.5, 4.0, 3)
    assert first["above"] == pytest.approx(2 / 3)
    assert first["sem"] == pytest.approx(np.std([0.5, 1.5, 4.0], ddof=1) / 3**0.5)
    assert averaged(rows[:1])[0]["sem"] is None
    assert not first["lower_bound"]
    assert averaged([rows[0], {**rows[1], "lower_bound": True}])[0]["lower_bound"] is True


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantities": ("radius",)}, "radius"),
        ({"quantities": ()}, "expected growth, contraction"),
        ({"at": "x"}, "expected 'estimate' or 'sample'"),
        ({"steps": (1, 4)}, r"steps \[4\] are not among 0..3"),
        ({"relax": (-0.1,)}, "relax holds -0.1"),
        ({"method": "fast"}, "expected one of auto"),
    ],
)
def test_refuses(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        spectral_norms(pipeline(Linear()), (1,), 4, **changes)


def test_refuses_schedulers_whose_step_is_not_affine() -> None:
    for scheduler in (diffusers.DDIMScheduler(), diffusers.DPMSolverMultistepScheduler()):
        pipe = UnconditionalPipeline(Linear(), scheduler)
        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match=r"step 0 is no a x \+ b ε: .*(clip_sample=False|history)"):
            growth_norms(pipe, (1,), 4)
