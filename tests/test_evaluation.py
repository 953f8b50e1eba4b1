"""Evaluations: each metric is its own function's, shards add up exactly, differences are paired; `iec evaluate`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from typer.testing import CliRunner

from iec.cli.app import app
from iec.cli.evaluate import _lines
from iec.evaluate import sampled as sampling
from iec.evaluate.conditions import Conditions
from iec.evaluate.coverage import precision_recall
from iec.evaluate.evaluation import difference, evaluate, evaluate_statistics, gather
from iec.evaluate.features import extract, load_features
from iec.evaluate.gathering import statistics_of, statistics_of_source
from iec.evaluate.images import save_each
from iec.evaluate.measures import paired_scores, possible
from iec.evaluate.metrics import Moments, frechet_distance, inception_score, kernel_distance_exact
from iec.evaluate.networks import Extracted, FeatureExtractor, identity, open_network
from iec.evaluate.reference import load_reference
from iec.evaluate.references import ReferenceSet, open_reference
from iec.evaluate.sampled import equipped, sampled
from iec.evaluate.sampling import sample
from iec.evaluate.similarity import mean_squares, ssim
from iec.evaluate.sources import as_source, open_source
from iec.evaluate.statistics import Statistics, merged
from iec.pipeline.installation import installed

COUNT = 24


class Flat:
    """A network whose features are a few fixed sums of pixels, with or without spatial ones."""

    def __init__(self, name: str = "flat", size: int = 6) -> None:
        self.name, self.identity, self.folder = name, "0" * 16, None
        self._weights = torch.randn(16, size, generator=torch.Generator().manual_seed(3))

    def features(self, images: torch.Tensor, batch_size: int = 50) -> Extracted:
        if images.shape[1:] != (1, 4, 4):
            raise ValueError("expected 4 x 4 pixels")
        rows = images.flatten(1).float() / 255
        return Extracted(rows @ self._weights, rows[:, :5] * 9, rows[:, 3:8])


def pictures(count: int = COUNT, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture(scope="module")
def network() -> FeatureExtractor:
    return Flat()


@pytest.fixture(scope="module")
def reference(network: FeatureExtractor) -> ReferenceSet:
    return ReferenceSet.of(statistics_of(pictures(40, seed=9), network), "others")


EVERY = ("fid", "sfid", "kid", "is", "precision", "recall", "rmse_fine", "psnr_fine", "ssim_fine")


def test_each_metric_is_that_of_its_own_function(network: FeatureExtractor, reference: ReferenceSet) -> None:
    images, fine = pictures(), pictures(seed=1)
    found = evaluate(images, reference, network, EVERY, targets={"fine": fine}, draws=30).metrics
    ours, theirs = network.features(images), network.features(pictures(40, seed=9))
    assert ours.logits is not None and ours.spatial is not None and theirs.spatial is not None
    among = precision_recall(ours.pool, theirs.pool)
    square = mean_squares(images, fine).mean().item()
    expected = {
        "fid": frechet_distance(Moments.of(ours.pool), Moments.of(theirs.pool)),
        "sfid": frechet_distance(Moments.of(ours.spatial), Moments.of(theirs.spatial)),
        "kid": kernel_distance_exact(ours.pool, theirs.pool),
        "is": inception_score(ours.logits).mean,
        "precision": among.precision,
        "recall": among.recall,
        "rmse_fine": math.sqrt(square),
        "psnr_fine": -10 * math.log10(square),
        "ssim_fine": ssim(images, fine).mean().item(),
    }
    assert list(found) == list(EVERY)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-9), name
        assert found[name].low <= value <= found[name].high and found[name].low < found[name].high, name
    bare = evaluate(images, reference, network, EVERY, targets={"fine": fine}, draws=0)
    for name, value in expected.items():
        assert bare.metrics[name].value == pytest.approx(value, rel=1e-9), name
        assert math.isnan(bare.metrics[name].low) and math.isnan(bare.metrics[name].high)
    assert bare.plain()["metrics"]["fid"] == {"value": bare.metrics["fid"].value, "low": None, "high": None}


def test_shards_in_any_order_give_what_all_at_once_gives(network: FeatureExtractor, reference: ReferenceSet) -> None:
    images, fine = pictures(), pictures(10, seed=1)
    parts = []
    for start in (16, 0, 8):
        rows = slice(start, start + 8)
        parts.append(
            statistics_of(images[rows], network, range(start, start + 8), targets={"fine": fine[rows]}, batch_size=8)
        )
    once = gather(images, reference, network, EVERY, targets={"fine": fine}, batch_size=8)
    first = evaluate_statistics(merged(parts), reference, EVERY, draws=10)
    second = evaluate_statistics(once, reference, EVERY, draws=10)
    assert first.metrics == second.metrics
    assert first.plain() == second.plain() and first.count == COUNT
    # Ten of the images have a partner; the others are none of the pairs.
    assert first.metrics["rmse_fine"].value == pytest.approx(mean_squares(images[:10], fine).mean().sqrt().item())
    assert torch.equal(once.scores["mse_fine"][:10], mean_squares(images[:10], fine))
    assert bool(once.scores["mse_fine"][10:].isnan().all())


def test_differences_are_paired(network: FeatureExtractor, reference: ReferenceSet) -> None:
    images, fine = pictures(200), pictures(200, seed=1)
    nearly = images.clone()
    nearly[:, :, 0, 0] = nearly[:, :, 0, 0] // 2
    names = ("fid", "rmse_fine")
    a, b = (evaluate(x, reference, network, names, targets={"fine": fine}) for x in (images, nearly))
    gaps = difference(a, b)
    for name in names:
        assert gaps[name].value == pytest.approx(a.metrics[name].value - b.metrics[name].value)
        wide = a.metrics[name].high - a.metrics[name].low
        assert gaps[name].high - gaps[name].low < wide / 2, name  # of nearly equal images
    assert difference(a, a)["fid"] == (0, 0, 0)
    with pytest.raises(ValueError, match="same resamples"):
        difference(a, evaluate(images[:50], reference, network, ("fid",)))
    with pytest.raises(ValueError, match="same resamples"):
        difference(a, evaluate(images, reference, network, ("fid",), seed=1))
    with pytest.raises(ValueError, match="cannot be compared"):
        difference(a, evaluate(images, None, Flat("other"), ("is",)))


def test_what_is_missing_is_told_before_an_image_is_read(reference: ReferenceSet, network: FeatureExtractor) -> None:
    def never() -> Any:
        raise AssertionError("an image was read")

    unread = type(as_source(pictures()))("unread", never)
    images = {"fine": unread}
    cases: list[tuple[tuple[str, ...], Any, str]] = [
        (("fidd",), reference, "unknown metric 'fidd'; known: fid, sfid, kid"),
        (("rmse",), reference, "unknown metric 'rmse'"),
        (("vgg_fine",), reference, "unknown metric 'vgg_fine'"),
        (("fid",), None, "fid compares with a set of images, and no reference"),
        (("rmse_full",), reference, "the target 'full', which is not given"),
        (("clip",), reference, "clip compares images with their prompts"),
    ]
    for metrics, against, message in cases:
        with pytest.raises(ValueError, match=message):
            gather(unread, against, network, metrics, targets=images)
    with pytest.raises(ValueError, match=r"made with flat@0+, these images with other@0+; use one network"):
        gather(unread, reference, Flat("other"), ("fid",))
    bare = ReferenceSet("moments", reference.network, None, reference.moments)
    for metric, message in (("kid", "holds only moments"), ("recall", "holds only moments"), ("sfid", "spatial")):
        with pytest.raises(ValueError, match=f"{metric}: the reference 'moments' .*{message}"):
            gather(unread, bare, network, (metric,))
    assert possible(bare) == ("fid", "is")
    assert possible(reference, ["fine"], prompts=True) == (*EVERY[:3], "precision", "recall", "is", *EVERY[6:], "clip")
    assert possible(None) == ("is",)
    assert paired_scores(("psnr_fine", "rmse_fine", "ssim_full", "fid")) == {"fine": ("mse",), "full": ("ssim",)}


def test_statistics_that_lack_what_a_metric_needs(reference: ReferenceSet, network: FeatureExtractor) -> None:
    pool = network.features(pictures(5)).pool
    bare = Statistics(identity(network), torch.arange(5), pool)
    with pytest.raises(ValueError, match=r"is: the network flat@0+ gives no class logits"):
        evaluate_statistics(bare, reference, ("is",))
    with pytest.raises(ValueError, match="gives no spatial features"):
        evaluate_statistics(bare, reference, ("fid", "sfid"))
    with pytest.raises(ValueError, match="no score 'mse_fine'"):
        evaluate_statistics(bare, reference, ("rmse_fine",))
    with pytest.raises(ValueError, match=r"fid of 1 image: it takes at least 2; give more images"):
        evaluate_statistics(bare.first(1), reference, ("fid",))


def few(count: int, seed: int = 0) -> Statistics:
    return statistics_of(pictures(count, seed), Flat())


@pytest.mark.parametrize(
    ("metric", "least"), [("fid", 2), ("sfid", 2), ("kid", 2), ("is", 1), ("precision", 1), ("recall", 4)]
)
@pytest.mark.parametrize("draws", [0, 5])
def test_each_metric_takes_so_many_images(metric: str, least: int, draws: int, reference: ReferenceSet) -> None:
    found = evaluate_statistics(few(least), reference, (metric,), draws=draws)
    assert math.isfinite(found.metrics[metric].value)
    if least > 1:
        with pytest.raises(
            ValueError, match=rf"^{metric} of {least - 1} images?: it takes at least {least}; give more"
        ):
            evaluate_statistics(few(least - 1), reference, (metric,), draws=draws)


@pytest.mark.parametrize(("metric", "least"), [("fid", 2), ("sfid", 2), ("kid", 2), ("precision", 4), ("recall", 1)])
def test_each_metric_takes_so_many_images_of_the_reference(metric: str, least: int) -> None:
    evaluate_statistics(few(10), ReferenceSet.of(few(least, 9), "real"), (metric,), draws=2)
    if least > 1:
        small = ReferenceSet.of(few(least - 1, 9), "real")
        with pytest.raises(
            ValueError, match=rf"^{metric}: the reference 'real' holds {least - 1} image.*, expected at least"
        ):
            evaluate_statistics(few(10), small, (metric,), draws=2)


def test_what_takes_more_images_is_left_out_on_request(reference: ReferenceSet) -> None:
    metrics = ("recall", "fid", "is")
    found = evaluate_statistics(few(2), reference, metrics, draws=5, leave_out=True)
    assert list(found.metrics) == ["fid", "is"] and list(found.left_out) == ["recall"]
    assert found.metrics == evaluate_statistics(few(2), reference, ("fid", "is"), draws=5).metrics
    assert found.plain()["left_out"] == {"recall": "recall of 2 images: it takes at least 4; give more images"}
    whole = evaluate_statistics(few(20), reference, metrics, draws=5, leave_out=True)
    assert whole.plain() == evaluate_statistics(few(20), reference, metrics, draws=5).plain() and not whole.left_out
    with pytest.raises(ValueError, match="unknown metric 'fidd'"):  # that is no matter of number
        evaluate_statistics(few(2), reference, ("fidd",), leave_out=True)


def test_pairs_are_counted(network: FeatureExtractor) -> None:
    statistics = gather(
        pictures(12), None, network, ("rmse_p", "ssim_q"), targets={"p": pictures(4, 1), "q": pictures(12, 1)}
    )
    assert evaluate_statistics(statistics, None, ("rmse_p", "ssim_q"), draws=2).plain()["pairs"] == {"p": 4, "q": 12}
    assert evaluate_statistics(statistics, None, ("is",), draws=2).pairs == {}


def test_targets_must_be_of_the_same_seeds(tmp_path: Path, network: FeatureExtractor) -> None:
    images = pictures(6)
    save_each(images, tmp_path / "ours", range(6))
    save_each(images, tmp_path / "theirs", range(6))
    ours, theirs = open_source(tmp_path / "ours"), open_source(tmp_path / "theirs")
    found = statistics_of_source(ours, network, targets={"fine": theirs}, batch_size=4)
    assert found.scores["mse_fine"].tolist() == [0] * 6
    (tmp_path / "theirs" / "000002.png").rename(tmp_path / "theirs" / "000009.png")
    moved = open_source(tmp_path / "theirs")
    with pytest.raises(
        ValueError, match=r"000003\.png is paired with .*000002\.png; both folders must hold the same seeds"
    ):
        statistics_of_source(ours, network, targets={"fine": moved}, batch_size=4)
    for more in (pictures(7), pictures(9)):  # in the last batch, and in one beyond it
        with pytest.raises(ValueError, match="target 'fine' holds more images"):
            statistics_of_source(
                ours, network, targets={"fine": as_source(more)}, batch_size=3 if len(more) == 9 else 4
            )
    first = statistics_of_source(ours, network, targets={"fine": as_source(pictures(9))}, limit=5, batch_size=3)
    assert len(first.score("mse_fine")) == 5
    wrong = torch.zeros(6, 1, 5, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"image 0 and what follows: target 'fine' holds images of \(6, 1, 5, 4\)"):
        statistics_of_source(as_source(images), network, targets={"fine": as_source(wrong)})
    with pytest.raises(ValueError, match="unknown score of image pairs 'mae'"):
        statistics_of(images, network, targets={"fine": images}, paired=("mae",))


def test_prompts_are_scored_image_by_image(network: FeatureExtractor) -> None:
    seen: list[str] = []

    def score(images: torch.Tensor, texts: Any) -> torch.Tensor:
        seen.extend(texts)
        return torch.tensor([float(len(text)) for text in texts])

    prompts = ["a", "bb", "ccc", "dddd", "eeeee", "unused"]
    found = evaluate(pictures(5), None, network, ("clip",), prompts=prompts, text_score=score, batch_size=2, draws=5)
    assert seen == prompts[:5] and found.metrics["clip"].value == 3
    with pytest.raises(ValueError, match="more images than the 3 prompts"):
        evaluate(pictures(5), None, network, ("clip",), prompts=prompts[:3], text_score=score)


def test_the_bundled_reference_is_what_domain_metrics_use() -> None:
    network = open_network("fashion-mnist")
    images = torch.randint(0, 256, (8, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    reference = open_reference("fashion-mnist", network)
    assert (reference.name, reference.count) == ("fashion-mnist:train", 60000)
    features, _ = extract(load_features("fashion-mnist"), images)
    for split in ("train", "test"):
        held = open_reference(f"fashion-mnist:{split}", network)
        found = evaluate(images, held, network, ("fid",), draws=0, batch_size=250)
        expected = frechet_distance(Moments.of(features), load_reference("fashion-mnist", split).moments)  # type: ignore[arg-type]
        assert found.metrics["fid"].value == pytest.approx(expected, rel=1e-6)
    assert open_reference(str(network.folder), network).name == "fashion-mnist:train"
    with pytest.raises(ValueError, match="expected fashion-mnist, fashion-mnist:train or fashion-mnist:test"):
        open_reference("fashion-mnist:valid", network)
    with pytest.raises(ValueError, match="are of the network 'fashion-mnist', and do not fit flat"):
        open_reference("fashion-mnist", Flat())


def test_references_of_images_and_of_kept_statistics(tmp_path: Path, network: FeatureExtractor) -> None:
    images = pictures(6)
    np.savez(tmp_path / "real.npz", images.numpy())
    done: list[int] = []
    made = open_reference(str(tmp_path / "real.npz"), network, batch_size=4, progress=done.append)
    assert (made.name, made.count, done) == ("real.npz", 6, [4, 6])
    assert open_reference(str(tmp_path / "real.npz"), network, limit=5).count == 5
    statistics_of(images, network).save(tmp_path / "real.safetensors")
    kept = open_reference(str(tmp_path / "real.safetensors"), network)
    assert made.features is not None and kept.features is not None and torch.equal(made.features, kept.features)
    assert torch.equal(made.moments.scatter, kept.moments.scatter)
    assert made.spatial is not None and kept.spatial is not None
    with pytest.raises(ValueError, match=r"real\.safetensors: made with the network 'flat@0+', expected 'other@0+'"):
        open_reference(str(tmp_path / "real.safetensors"), Flat("other"))
    np.savez(tmp_path / "big.npz", np.zeros((2, 5, 5, 1), np.uint8))
    with pytest.raises(ValueError, match=r"big\.npz, image 0 and what follows: expected 4 x 4 pixels"):
        open_reference(str(tmp_path / "big.npz"), network)


def test_statistics_of_reference_images_are_kept_while_the_files_are_the_same(tmp_path: Path) -> None:
    network, folder, keep, done = Flat(), tmp_path / "real", tmp_path / "kept", []
    save_each(pictures(6), folder, range(6))

    def opened(**options: Any) -> ReferenceSet:
        done.clear()
        return open_reference(str(folder), network, keep=keep, progress=done.append, **options)

    first = opened()
    assert done == [6]
    again = opened()
    assert done == [] and torch.equal(again.moments.scatter, first.moments.scatter) and again.name == first.name
    assert opened(limit=5).count == 5 and done == [5]
    save_each(255 - pictures(1), folder, [3])
    changed = opened()
    assert done == [6] and not torch.equal(changed.moments.mean, first.moments.mean)
    open_reference(str(folder), Flat("other"), keep=keep, progress=done.append)
    assert done == [6, 6]
    for name in ("text.txt", "absent"):
        (tmp_path / "text.txt").write_text("neither images nor statistics")
        with pytest.raises(ValueError, match=r"expected .*\.parquet.*\.safetensors of `iec evaluate --save`"):
            open_reference(str(tmp_path / name), network)


def test_published_statistics(tmp_path: Path) -> None:
    file, inception = tmp_path / "stats.npz", Flat("inception-2015")
    mean, covariance = np.arange(2048.0), np.eye(2048, dtype=np.float32) * 3
    small = np.eye(2023, dtype=np.float32)
    np.savez(file, mu=mean, sigma=covariance, mu_s=np.zeros(2023), sigma_s=small)
    held = open_reference(str(file), inception)
    assert held.count is None and held.features is None and held.spatial is not None
    assert torch.equal(held.moments.covariance(), torch.eye(2048, dtype=torch.float64) * 3)
    assert torch.equal(held.moments.mean, torch.arange(2048.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="published statistics are of Inception-2015, not of flat"):
        open_reference(str(file), Flat())
    for wrong, message in (
        ({"mu": mean[:5], "sigma": covariance[:5, :5]}, r"mu is \(5,\), sigma \(5, 5\); expected \(2048,\)"),
        ({"mu": mean}, r"sigma nothing; expected"),
        ({"mu": mean * np.nan, "sigma": covariance}, "mu or sigma holds NaN"),
    ):
        np.savez(file, **wrong)
        with pytest.raises(ValueError, match=message):
            open_reference(str(file), inception)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read: it is no \.npz archive, or was cut short"):
        open_reference(str(file), inception)
    with pytest.raises(ValueError, match="no such file"):
        open_reference(str(tmp_path / "absent.npz"), inception)


def tiny() -> DDIMPipeline:
    torch.manual_seed(0)
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4)
    pipe = DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_model_is_sampled_with_its_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "FINE_STEPS", 6)
    pipe = tiny()
    plain = sample(pipe, range(3), 4, 2)
    equipment = {"steps": "all", "cache": "deepcache:2"}
    told: list[str] = []

    def progress(name: str) -> Any:
        told.append(name)
        return lambda *_: None

    images, others = sampled(pipe, range(3), 4, 2, targets=("full", "fine"), progress=progress, equipment=equipment)
    assert told == ["sampling", "full", "fine"] and set(others) == {"full", "fine"}
    assert torch.equal(others["full"], plain)  # all was taken off again
    assert not torch.equal(images, plain) and not torch.equal(others["fine"], plain)
    with equipped(pipe, **equipment) as ready:
        assert torch.equal(sample(ready, range(3), 4, 2), images)
        held = installed(ready)
        assert held is not None
    assert installed(pipe) is None
    with pytest.raises(ValueError, match="target 'data' cannot be sampled; expected full or fine"):
        sampled(pipe, range(3), 4, targets=("data",))
    with pytest.raises(ValueError, match="takes its plan from a calibration"), equipped(pipe, cache="cachequant"):
        pass


def run(*arguments: object) -> str:
    outcome = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    images = torch.randint(0, 256, (8, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    worse = images // 2
    save_each(images, tmp_path / "a", range(8))
    save_each(worse, tmp_path / "b", range(8))
    kept = tmp_path / "kept.safetensors"
    shown = run(
        tmp_path / "a", "--target", f"fine={tmp_path / 'b'}", "--baseline", tmp_path / "b", "--draws", 4, "--save", kept
    )
    for name in ("fid", "kid", "precision", "recall", "is", "rmse to fine", "psnr to fine", "ssim to fine", "baseline"):
        assert name in shown
    assert max(map(len, shown.splitlines())) <= 80

    names = ("--metrics", "fid, is,rmse_fine,psnr_fine", "--json", "--draws", 4)
    told = json.loads(run(tmp_path / "a", *names, "--target", f"fine={tmp_path / 'a'}", "--baseline", tmp_path / "b"))
    network, reference = open_network("fashion-mnist"), open_reference("fashion-mnist", open_network("fashion-mnist"))
    first, second = (evaluate(x, reference, network, ("fid", "is"), draws=4) for x in (images, worse))
    assert told["count"] == 8 and told["references"] == {"data": "fashion-mnist:train"}
    assert told["network"] == identity(network) and list(told["metrics"]) == ["fid", "is", "rmse_fine", "psnr_fine"]
    assert told["metrics"]["fid"] == pytest.approx(first.metrics["fid"]._asdict())
    assert told["difference"]["fid"] == pytest.approx(difference(first, second)["fid"]._asdict())
    assert told["metrics"]["rmse_fine"]["value"] == 0 and told["metrics"]["psnr_fine"]["value"] is None

    save_each(worse, tmp_path / "c", range(1, 9))
    outcome = CliRunner().invoke(app, ["evaluate", *map(str, (tmp_path / "a", "--baseline", tmp_path / "c"))])
    assert outcome.exit_code == 2
    shorter = ("--model", "fashion-mnist", "--num", 3, "--num-inference-steps", 1, "--metrics", "is", "--draws", 0)
    for baseline, said in (("a", r"baseline: .*000000\.png is paired with 000001"), ("c", "baseline holds")):
        given = (*shorter, "--seed", 1, "--baseline", tmp_path / baseline)
        save_each(worse[:2], tmp_path / "c2", range(1, 3))
        if baseline == "c":
            given = (*shorter, "--seed", 1, "--baseline", tmp_path / "c2")
        told = CliRunner().invoke(app, ["evaluate", *map(str, given)])
        assert told.exit_code == 2 and re.search(said, " ".join(told.output.split()))
    assert re.search(r"baseline: .*000001\.png is paired with .*000000\.png; both", outcome.output)

    again = json.loads(run(tmp_path / "a", "--against", kept, "--metrics", "fid,kid", "--json", "--draws", 0))
    assert again["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert again["references"] == {"data": "kept.safetensors"}


def test_the_command_samples_a_model() -> None:
    told = json.loads(
        run(
            *("--model", "fashion-mnist", "--num", 2, "--num-inference-steps", 1, "--target", "full"),
            *("--metrics", "rmse_full,ssim_full", "--draws", 2, "--json"),
        )
    )
    assert told["images"] == "fashion-mnist" and told["count"] == 2
    assert told["metrics"]["rmse_full"]["value"] == 0 and told["metrics"]["ssim_full"]["value"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either images, or --model MODEL"),
        (("x", "--model", "fashion-mnist"), "give either images, or --model MODEL"),
        ((".", "--draws", "1"), "--draws 1: one resample tells no interval"),
        (("absent",), "absent: no such file or folder"),
        ((".", "--target", "fine"), "expected NAME=IMAGES"),
        ((".", "--network", "vgg"), "unknown feature network 'vgg'"),
        (("--model", "fashion-mnist", "--target", "data"), "target 'data' cannot be sampled"),
    ],
)
def test_the_command_refuses(arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_each(pictures(2), tmp_path, range(2))
    outcome = CliRunner().invoke(app, ["evaluate", *arguments])
    assert outcome.exit_code == 2 and message in " ".join(outcome.output.split()), outcome.output


def test_prompts_belong_to_the_images_that_were_sampled_with_them(tmp_path: Path) -> None:
    """A line may be empty: that image had no prompt, and the next line is still the next image's."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n two dogs\n", encoding="utf-8")
    assert _lines(file) == Conditions({"prompt": {"file": str(file)}}).of(range(3))["prompt"]
