"""Statistics of images: merging is exact, files come back as they were, and what does not fit is refused by name."""

from __future__ import annotations

import errno
import itertools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from iec.evaluate.metrics import frechet_distance
from iec.evaluate.statistics import Statistics, merged

NETWORK = "fashion-mnist@0123456789abcdef"


def make(count: int = 12, start: int = 100, **changes: Any) -> Statistics:
    generator = torch.Generator().manual_seed(start)
    values: dict[str, Any] = {
        "network": NETWORK,
        "seeds": torch.arange(start, start + count),
        "pool": torch.randn(count, 5, generator=generator) + 7,
        "logits": torch.randn(count, 3, generator=generator),
        "spatial": torch.randn(count, 4, generator=generator),
        "scores": {"mse_fine": torch.rand(count, generator=generator, dtype=torch.float64)},
    }
    return Statistics(**{**values, **changes})


def cut(whole: Statistics, *rows: list[int]) -> list[Statistics]:
    return [whole._rows(torch.tensor(part)) for part in rows]


def same(a: Statistics, b: Statistics) -> bool:
    features = a._features().keys() == b._features().keys() and a.scores.keys() == b.scores.keys()
    return features and all(
        torch.equal(x, y)
        for x, y in [
            (a.seeds, b.seeds),
            *((a._features()[name], b._features()[name]) for name in a._features()),
            *((a.scores[name], b.scores[name]) for name in a.scores),
        ]
    )


def test_merged_in_any_order_is_computed_at_once_bit_for_bit() -> None:
    whole = make()
    parts = cut(whole, [0, 1, 2], [3, 4, 5, 6, 7], [8], [9, 10, 11])
    for order in itertools.permutations(parts):
        found = merged(order)
        assert same(found, whole)
        assert torch.equal(found.moments().mean, whole.moments().mean)
        assert torch.equal(found.moments().scatter, whole.moments().scatter)
    first, second, third, fourth = parts
    nested = fourth.merge(second).merge(third.merge(first))
    assert same(nested, whole) and same(first.merge(fourth, third, second), whole)
    other = make(start=200).moments()
    assert frechet_distance(nested.moments(), other) == frechet_distance(whole.moments(), other)
    assert torch.equal(nested.spatial_moments().scatter, whole.spatial_moments().scatter)


def test_interleaved_parts_merge_too() -> None:
    whole = make()
    assert same(merged(cut(whole, [0, 2, 4, 11], [1, 3, 5, 6, 7, 8, 9, 10])), whole)


def test_saved_statistics_come_back_as_they_were(tmp_path: Path) -> None:
    for number, statistics in enumerate([make(), make(logits=None, spatial=None, scores={}), make().first(4)]):
        file = tmp_path / f"{number}.safetensors"
        statistics.save(file)
        loaded = Statistics.load(file, NETWORK)
        assert loaded.network == NETWORK and same(loaded, statistics)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i}.safetensors" for i in range(3)]  # nothing half written


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "statistics.safetensors"
    with pytest.raises(ValueError, match="no such file of statistics"):
        Statistics.load(file)
    make().save(file)
    with pytest.raises(
        ValueError, match=r"made with the network 'fashion-mnist@0123456789abcdef', expected 'inception@"
    ):
        Statistics.load(file, "inception@fedcba9876543210")
    whole = file.read_bytes()
    for damaged in (whole[:-8], whole[: len(whole) // 3], b"", b"\x00" * 400):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read, damaged or cut short"):
            Statistics.load(file)
    save_file({"seeds": torch.arange(2)}, str(file))
    with pytest.raises(ValueError, match="no statistics of IEC, found the format None"):
        Statistics.load(file)
    save_file({"seeds": torch.arange(2)}, str(file), metadata={"iec": '{"format": "iec-statistics", "version": 99}'})
    with pytest.raises(ValueError, match="statistics of version 99, this release reads 1"):
        Statistics.load(file)
    meta = {"iec": f'{{"format": "iec-statistics", "version": 1, "network": "{NETWORK}"}}'}
    save_file({"seeds": torch.arange(2)}, str(file), metadata=meta)
    with pytest.raises(ValueError, match="statistics hold seeds; expected seeds and pool"):
        Statistics.load(file)
    save_file({"seeds": torch.arange(2), "pool": torch.zeros(3, 4)}, str(file), metadata=meta)
    with pytest.raises(ValueError, match=r"statistics.safetensors: pool is \(3, 4\)"):
        Statistics.load(file)


def spoiled(rows: list[int], value: float = math.nan) -> torch.Tensor:
    pool = torch.zeros(12, 5)
    pool[rows, 2] = value
    return pool


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": spoiled([3, 5])}, r"pool of seeds \[103, 105\] hold NaN or infinity"),
        ({"pool": spoiled([0], math.inf)}, r"pool of seeds \[100\] hold NaN or infinity"),
        ({"pool": spoiled(list(range(8)))}, r"seeds \[100, 101, 102, 103, 104\] and 3 more"),
        ({"pool": torch.zeros(11, 5)}, r"pool is \(11, 5\) torch.float32, expected \(12, features\)"),
        ({"logits": torch.zeros(12, 5).double()}, r"logits is \(12, 5\) torch.float64"),
        ({"spatial": torch.zeros(12)}, r"spatial is \(12,\)"),
        ({"seeds": torch.arange(12).float()}, r"expected \(N,\) torch.int64"),
        ({"seeds": torch.arange(12).flip(0)}, r"must ascend without repeats, found \[11, 10\]"),
        ({"seeds": torch.tensor([*range(11), 10])}, r"found \[10, 10\]"),
        ({"scores": {"clip": torch.zeros(12)}}, r"score 'clip' is \(12,\) torch.float32"),
        ({"scores": {"clip": torch.zeros(3).double()}}, r"score 'clip' is \(3,\) torch.float64, expected \(12,\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="no statistics to merge"):
        merged([])
    with pytest.raises(ValueError, match="networks fashion-mnist@0123456789abcdef and other@0 cannot be merged"):
        make().merge(make(start=200, network="other@0"))
    with pytest.raises(ValueError, match="seed 111 occurs in two parts"):
        make().merge(make(start=111))
    for changes in ({"logits": None}, {"spatial": torch.zeros(12, 9)}, {"scores": {}}):
        with pytest.raises(ValueError, match=r"statistics that hold .* cannot be merged"):
            make().merge(make(start=200, **changes))


def test_scores_may_lack_images_without_a_target() -> None:
    values = torch.tensor([0.5, math.nan, 0.25] * 4, dtype=torch.float64)
    statistics = make().with_scores(mse_full=values)
    assert statistics.score("mse_full").tolist() == [0.5, 0.25] * 4
    assert len(statistics.score("mse_fine")) == len(statistics) == 12
    assert "mse_full" not in make().scores
    with pytest.raises(ValueError, match="no score 'ssim_fine'; there are: mse_fine, mse_full"):
        statistics.score("ssim_fine")
    with pytest.raises(ValueError, match="no image has a score 'mse_full'"):
        statistics.with_scores(mse_full=torch.full_like(values, math.nan)).score("mse_full")


def test_the_first_images_are_those_of_the_lowest_seeds() -> None:
    whole = make()
    first = merged(reversed(cut(whole, list(range(6)), list(range(6, 12))))).first(7)
    assert first.seeds.tolist() == list(range(100, 107)) and torch.equal(first.pool, whole.pool[:7])
    assert len(first.scores["mse_fine"]) == 7
    with pytest.raises(ValueError, match="the first 13 of 12 images"):
        whole.first(13)
    with pytest.raises(ValueError, match="gives no spatial features, so there is no sFID"):
        make(spatial=None).spatial_moments()


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """What safetensors raises by itself is no OSError, so that nobody would know of the disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = tmp_path / "a.safetensors"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            Statistics("x@1", torch.arange(1000), torch.zeros(1000, 64)).save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
