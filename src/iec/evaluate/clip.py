"""CLIP score: how well images fit their prompts (Hessel et al. 2021, without its factor 2.5): 100 · max(cos, 0), mean.

Models by name: `open_clip:ARCHITECTURE/WEIGHTS` for the library open_clip, `transformers:NAME_OR_FOLDER` for transformers.
Without a prefix, names such as "ViT-g-14/laion2b_s34b_b88k" (the paper's) are open_clip's, all else transformers'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

PAPER = "ViT-g-14/laion2b_s34b_b88k"
_OPEN_CLIP = re.compile(r"(ViT|RN|EVA|convnext|coca|MobileCLIP)[^/]*/\w+$")


class Look(NamedTuple):
    """How a model sees images: `side` in pixels, and what is taken off each channel (0..1) and what it is divided by.

    The numbers are those of CLIP's training images, which nearly all its descendants kept.
    """

    side: int
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)
    deviation: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)


Encoder = Callable[[torch.Tensor], torch.Tensor]


class ClipScore:
    """Scores of images and texts by a CLIP model; `name` says which. Calling it gives the scores.

    Raises ImportError when the library is not installed, ValueError when it has no such model, RuntimeError when the
    weights cannot be had.
    """

    def __init__(self, name: str = PAPER, device: str = "cpu") -> None:
        library, _, rest = name.partition(":")
        if library not in ("open_clip", "transformers"):
            library, rest = ("open_clip" if _OPEN_CLIP.match(name) else "transformers"), name
        self.name = f"{library}:{rest}"
        opened = _open_clip(rest, device) if library == "open_clip" else _transformers(rest, device)
        self._look, self._images, self._texts = opened
        self._device = device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, texts: Sequence[str], batch_size: int = 50) -> torch.Tensor:
        """Scores (N,), float64, 0..100, of images uint8 (N, C, H, W), grey or RGB, and N texts, each cut to what the model reads.

        Raises ValueError for another number of texts or other images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (N, 1 or 3, H, W)")
        if len(images) != len(texts) or len(images) == 0:
            raise ValueError(f"{len(images)} images and {len(texts)} texts; the score needs one text per image")
        scores = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            seen = self._images(prepared(images[part], self._look).to(self._device)).double()
            read = self._texts(list(texts[part])).double()
            cosines = torch.nn.functional.cosine_similarity(seen, read)
            scores.append(100 * cosines.clamp(min=0).cpu())
        return torch.cat(scores)


def prepared(images: torch.Tensor, look: Look) -> torch.Tensor:
    """Images uint8 (N, C, H, W) as CLIP takes them: float32 (N, 3, side, side).

    The shorter side is scaled to `look.side` (bicubic, smoothed, rounded to 8 bits as Pillow does), the middle is kept,
    and channels are normalised.
    """
    from PIL import Image

    from iec.evaluate.images import to_pil

    rows, side = [], look.side
    for picture in to_pil(images):
        width, height = picture.size
        scale = side / min(width, height)
        size = max(side, int(width * scale)), max(side, int(height * scale))
        scaled = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        rows.append(_tensor(scaled.crop((left, top, left + side, top + side))))
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in look[1:])
    return (torch.stack(rows) - mean) / deviation


def _tensor(picture: Any) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 255


Opened = tuple[Look, Encoder, Callable[[list[str]], torch.Tensor]]


def _transformers(name: str, device: str) -> Opened:
    try:
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError(f"the CLIP model {name!r} needs transformers: pip install 'iec-diffusion[clip]'") from error
    try:
        model: Any = CLIPModel.from_pretrained(name).eval().to(device)
        tokenizer = CLIPTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"the CLIP model {name!r} could not be loaded by transformers: {reason}") from error
    longest = model.config.text_config.max_position_embeddings

    def images(pixels: torch.Tensor) -> torch.Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def texts(given: list[str]) -> torch.Tensor:
        tokens = tokenizer(given, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        return model.text_projection(model.text_model(**tokens).pooler_output)

    return Look(model.config.vision_config.image_size), images, texts


def _open_clip(name: str, device: str) -> Opened:
    try:
        import open_clip
    except Exception as error:  # torchvision, which it imports, raises RuntimeErrors beside another torch
        raise ImportError(
            f"the CLIP model {name!r} needs open_clip ({error}): pip install 'iec-diffusion[clip]'; or choose one of "
            "transformers, as --clip-model openai/clip-vit-large-patch14"
        ) from error
    architecture, _, weights = name.partition("/")
    if (architecture, weights) not in open_clip.list_pretrained():
        raise ValueError(f"open_clip has no weights {weights!r} for {architecture!r}; see open_clip.list_pretrained()")
    try:
        model = open_clip.create_model(architecture, pretrained=weights).eval().to(device)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"the CLIP model {name!r} could not be loaded by open_clip: {error}") from error
    tokenizer = open_clip.get_tokenizer(architecture)
    side = model.visual.image_size
    side = side if isinstance(side, int) else side[0]
    seen = [getattr(model.visual, name, None) for name in ("image_mean", "image_std")]
    look = Look(side) if None in seen else Look(side, *seen)
    return look, model.encode_image, lambda given: model.encode_text(tokenizer(given).to(device))
