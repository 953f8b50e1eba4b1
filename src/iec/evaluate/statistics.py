"""What a set of images leaves behind for the metrics, so that the images need not be seen twice.

Features are kept, not only their moments: KID, precision, recall and every bootstrap need them. Rows lie in the order of
their seeds, whatever order the parts came in, so statistics merged from shards equal those made at once bit for bit,
and so does every metric of them. (The features themselves must not depend on how images are batched: extract them shard by
shard in both cases.)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from iec.artifact.files import replacing
from iec.evaluate.metrics import Moments

FORMAT = "iec-statistics"
VERSION = 1
_SCORE = "score."


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Of N images: `seeds` (N,) int64, ascending, no two equal (of images from files: their positions).

    `network`: name and identity of the feature network, "fashion-mnist@<16 hex>". `pool`: features (N, F), float32;
    `logits`: class logits (N, K), float32, or None; `spatial`: features (N, S) of sFID, float32, or None. `scores`:
    further values per image (N,), float64, such as the mean square error "mse_fine" to the image of the same seed in the
    target "fine"; NaN where there is no such image.

    Raises ValueError for shapes that do not fit together, seeds that are not ascending, or features that are not finite,
    naming the first seeds.
    """

    network: str
    seeds: torch.Tensor
    pool: torch.Tensor
    logits: torch.Tensor | None = None
    spatial: torch.Tensor | None = None
    scores: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seeds.ndim != 1 or self.seeds.dtype != torch.int64:
            raise ValueError(f"seeds are {tuple(self.seeds.shape)} {self.seeds.dtype}, expected (N,) torch.int64")
        ordered = self.seeds[1:] > self.seeds[:-1]
        if not bool(ordered.all()):
            at = int((~ordered).nonzero()[0])
            raise ValueError(f"seeds must ascend without repeats, found {self.seeds[at : at + 2].tolist()}")
        for name, rows in self._features().items():
            if rows.ndim != 2 or len(rows) != len(self.seeds) or rows.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {tuple(rows.shape)} {rows.dtype}, expected ({len(self.seeds)}, features) torch.float32"
                )
            finite = rows.isfinite().all(dim=1)
            if not bool(finite.all()):
                bad = self.seeds[~finite]
                more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
                raise ValueError(
                    f"{name} of seeds {bad[:5].tolist()}{more} hold NaN or infinity; look at these images, "
                    "or at the feature network"
                )
        for name, values in self.scores.items():
            if values.shape != self.seeds.shape or values.dtype != torch.float64:
                raise ValueError(
                    f"score {name!r} is {tuple(values.shape)} {values.dtype}, "
                    f"expected {tuple(self.seeds.shape)} torch.float64"
                )

    def _features(self) -> dict[str, torch.Tensor]:
        found = {"pool": self.pool, "logits": self.logits, "spatial": self.spatial}
        return {name: rows for name, rows in found.items() if rows is not None}

    def __len__(self) -> int:
        return len(self.seeds)

    def moments(self) -> Moments:
        """Moments of the features."""
        return Moments.of(self.pool)

    def spatial_moments(self) -> Moments:
        """Moments of the spatial features, for sFID. Raises ValueError when the network gave none."""
        if self.spatial is None:
            raise ValueError(f"the network {self.network} gives no spatial features, so there is no sFID")
        return Moments.of(self.spatial)

    def score(self, name: str) -> torch.Tensor:
        """The values `scores[name]` of those images that have one (M,), in the order of their seeds.

        Raises ValueError when there is no such score, or no image has one.
        """
        if name not in self.scores:
            raise ValueError(f"no score {name!r}; there are: {', '.join(sorted(self.scores)) or 'none'}")
        values = self.scores[name]
        known = values[~values.isnan()]
        if len(known) == 0:
            raise ValueError(f"no image has a score {name!r}: the target shares no seed with these images")
        return known

    def with_scores(self, **scores: torch.Tensor) -> Statistics:
        """The same with further scores (N,), float64; ones of the same name are replaced."""
        return dataclasses.replace(self, scores={**self.scores, **scores})

    def first(self, count: int) -> Statistics:
        """Those of the `count` lowest seeds. Raises ValueError when there are fewer."""
        if not 0 <= count <= len(self):
            raise ValueError(f"the first {count} of {len(self)} images cannot be taken")
        return self._rows(slice(0, count))

    def _rows(self, which: slice | torch.Tensor) -> Statistics:
        kept = {name: rows[which] for name, rows in self._features().items()}
        scores = {name: values[which] for name, values in self.scores.items()}
        return Statistics(self.network, self.seeds[which], **kept, scores=scores)

    def merge(self, *others: Statistics) -> Statistics:
        """Those of all images together, see `merged`."""
        return merged([self, *others])

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write to a safetensors `file`, atomically."""
        from safetensors.torch import save

        tensors = {"seeds": self.seeds, **self._features()}
        tensors |= {_SCORE + name: values for name, values in self.scores.items()}
        meta = {"format": FORMAT, "version": VERSION, "network": self.network}
        with replacing(file) as temporary:
            # A slice shares its storage with the rows that were left out; safetensors refuses such tensors.
            held = {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
            # Written by us: of a full disk safetensors would say something that is no OSError.
            temporary.write_bytes(save(held, metadata={"iec": json.dumps(meta)}))

    @classmethod
    def load(cls, file: str | os.PathLike[str], network: str | None = None) -> Statistics:
        """Read what `save` wrote.

        Raises ValueError when the file is missing, damaged, no such file, of another version, or made with another
        network than `network` (not checked if None).
        """
        return _load(Path(file), network)


def _load(file: Path, network: str | None) -> Statistics:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            meta = json.loads((opened.metadata() or {}).get("iec", "{}"))
            if meta.get("format") != FORMAT:
                raise ValueError(f"{file}: no statistics of IEC, found the format {meta.get('format')!r}")
            if meta.get("version") != VERSION:
                raise ValueError(f"{file}: statistics of version {meta.get('version')!r}, this release reads {VERSION}")
            if network is not None and meta.get("network") != network:
                raise ValueError(f"{file}: made with the network {meta.get('network')!r}, expected {network!r}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file of statistics") from error
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{file}: statistics cannot be read, damaged or cut short: {error}") from error
    scores = {name.removeprefix(_SCORE): tensors.pop(name) for name in list(tensors) if name.startswith(_SCORE)}
    unknown = set(tensors) - {"seeds", "pool", "logits", "spatial"}
    if unknown or not {"seeds", "pool"} <= set(tensors):
        raise ValueError(
            f"{file}: statistics hold {', '.join(sorted(tensors))}; expected seeds and pool, logits, spatial"
        )
    try:
        return Statistics(meta["network"], **tensors, scores=scores)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def merged(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of all images of `parts`, in the order of their seeds; the order of the parts does not matter.

    Raises ValueError for no parts, parts of different networks or with different features or scores, or a seed that
    occurs twice.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("no statistics to merge")
    first = parts[0]
    for part in parts[1:]:
        if part.network != first.network:
            raise ValueError(f"statistics of the networks {first.network} and {part.network} cannot be merged")
        ours, theirs = (_widths(statistics) for statistics in (first, part))
        if ours != theirs:
            raise ValueError(f"statistics that hold {ours} and {theirs} cannot be merged")
    seeds, order = torch.cat([part.seeds for part in parts]).sort()
    twice = seeds[1:][seeds[1:] == seeds[:-1]]
    if len(twice):
        raise ValueError(f"seed {int(twice[0])} occurs in two parts; merge each shard once")
    features = {name: torch.cat([part._features()[name] for part in parts])[order] for name in first._features()}
    scores = {name: torch.cat([part.scores[name] for part in parts])[order] for name in first.scores}
    return Statistics(first.network, seeds, **features, scores=scores)


def _widths(statistics: Statistics) -> dict[str, int]:
    """What there is to merge: features with their dimensions, scores with 1."""
    return {name: rows.shape[1] for name, rows in statistics._features().items()} | dict.fromkeys(
        sorted(_SCORE + name for name in statistics.scores), 1
    )
