"""CLIP score: the cosine that transformers' own CLIP gives, for a small random model; open_clip by a stand-in."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from iec.evaluate.clip import PAPER, ClipScore, Look, prepared
from tiny import tokenizer

TEXTS = ["a cat", "cat", "a a a", "cat a cat a cat a cat a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": 8,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    place = tmp_path_factory.mktemp("clip")
    transformers_logging.disable_progress_bar()
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    generator = torch.Generator().manual_seed(0)  # the model's own start takes other numbers in every release
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):  # the usual start is so small that all cosines are alike
            weight.normal_(0, 0.5, generator=generator)
    model.save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def features(found: object) -> torch.Tensor:
    """Embeddings; newer releases of transformers wrap them."""
    return found if isinstance(found, torch.Tensor) else found.pooler_output  # type: ignore[attr-defined]


def test_score_is_the_cosine_of_transformers(folder: Path) -> None:
    images = pictures(4, 3, 32, 32)
    score = ClipScore(str(folder))
    assert score.name == f"transformers:{folder}"
    found = score(images, TEXTS, batch_size=3)
    model, words = CLIPModel.from_pretrained(folder).eval(), tokenizer()
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in Look(32)[1:])
    expected = []
    with torch.no_grad():
        for image, text in zip(images, TEXTS, strict=True):
            seen = features(model.get_image_features(((image / 255 - mean) / deviation)[None]))
            tokens = words(text, truncation=True, max_length=8, return_tensors="pt")
            read = features(model.get_text_features(**tokens))
            expected.append(100 * torch.nn.functional.cosine_similarity(seen, read))
    cosines = torch.cat(expected).double()
    assert cosines.max() - cosines.min() > 5  # in points: texts and images matter
    torch.testing.assert_close(found, cosines.clamp(min=0), rtol=1e-4, atol=1e-4)


def test_images_are_prepared_as_transformers_does(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import CLIPImageProcessor

    logging.getLogger("transformers").setLevel(logging.ERROR)
    processor = CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    for shape in ((2, 3, 20, 33), (1, 3, 9, 7), (1, 1, 12, 12)):
        images = pictures(*shape)
        rgb = [image.expand(3, -1, -1).permute(1, 2, 0).numpy() for image in images]
        expected = processor(rgb, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        torch.testing.assert_close(prepared(images, Look(12)), torch.as_tensor(expected), rtol=0, atol=1e-5)


def test_what_cannot_be_scored_is_refused(folder: Path, tmp_path: Path) -> None:
    score = ClipScore(f"transformers:{folder}")
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        score(pictures(2, 3, 8, 8), ["a"])
    with pytest.raises(ValueError, match="expected uint8"):
        score(pictures(1, 3, 8, 8).float(), ["a"])
    with pytest.raises(ValueError, match="expected uint8"):
        score(pictures(1, 2, 8, 8), ["a"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="could not be loaded by transformers"):
        ClipScore(str(tmp_path))


def test_open_clip_is_asked_for_the_papers_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"needs open_clip .*or choose one of transformers"):
        ClipScore()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = types.SimpleNamespace(image_size=(4, 4), image_mean=(0.0,) * 3, image_std=(1.0,) * 3)

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            assert pixels.shape[1:] == (3, 4, 4)
            return pixels.mean(dim=(2, 3))[:, :2]

        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.float()

    library = types.ModuleType("open_clip")
    made = []
    vars(library).update(
        list_pretrained=lambda: [tuple(PAPER.split("/"))],
        create_model=lambda name, pretrained: made.append((name, pretrained)) or Model(),
        get_tokenizer=lambda _: lambda texts: torch.tensor([[1, 0] if text == "red" else [0, -1] for text in texts]),
    )
    monkeypatch.setitem(sys.modules, "open_clip", library)
    score = ClipScore()
    assert score.name == f"open_clip:{PAPER}" and made == [("ViT-g-14", "laion2b_s34b_b88k")]
    image = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    image[:, 0], image[:, 1] = 30, 40  # the embedding (3, 4) / 5
    torch.testing.assert_close(
        score(image, ["red", "not green"]), torch.tensor([60.0, 0.0]).double(), rtol=1e-5, atol=0
    )
    with pytest.raises(ValueError, match=r"no weights 'openai' for 'ViT-g-14'"):
        ClipScore("ViT-g-14/openai")
