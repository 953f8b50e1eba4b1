"""Rows of images with text beside them."""

from __future__ import annotations

import numpy as np
import torch

from iec.bench.pictures import GAP, LABEL, Strip, sheet


def rows(name: str, facts: str) -> list[Strip]:
    black = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    return [Strip(name, "corrected", facts, black), Strip("short", "plain", "few", black)]


def test_text_stays_beside_the_images_however_long_it_is() -> None:
    few, many = sheet(rows("IEC", "20 passes")), sheet(rows("CacheQuant N=10, W8A8 + IEC, " * 4, "RMSE 0.09, " * 20))
    assert many.width == few.width and many.height > few.height
    for page in (few, many):
        seen = np.asarray(page.convert("L"))
        assert (seen[:, LABEL - 8 : LABEL] == 255).all() and (seen[:, :LABEL] < 128).any()
        columns = seen[GAP : GAP + 56, LABEL:]
        assert (columns[:, :56] == 0).all() and (columns[:, 56 : 56 + GAP] == 255).all()
