"""A tiny model that sees: the processor of a folder of Idefics 3, whose images are attended causally, and pictures for it.

Most others import torchvision, which the CPU installation does without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .helper_shapes import seeing

SIZE, PATCH, SCALE = 56, 14, 2  # pixels of an image and of a patch; patches of a token in each direction
TOKENS = (SIZE // PATCH // SCALE) ** 2
WORDS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")


def write(root: Path, tokenizer_of: Path, **more: Any) -> tuple[str, int]:
    """A folder without weights, and the token that stands for an image. more: of the configuration."""
    from transformers import AutoTokenizer, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.add_tokens(list(WORDS), special_tokens=True)
    edge = {"longest_edge": SIZE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    folder = root / "seeing"
    Idefics3Processor(image_processor=images, tokenizer=tokenizer, image_seq_len=TOKENS).save_pretrained(folder)
    token: int = tokenizer.convert_tokens_to_ids("<image>")
    (folder / "config.json").write_text(json.dumps(seeing(len(tokenizer), token, SIZE, PATCH, SCALE) | more))
    return str(folder), token


def picture(seed: int) -> Any:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
