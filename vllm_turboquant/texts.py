"""Text that every Python installation has: the language reference's topics and the standard library's source.

Nothing is shipped and nothing is fetched. Which sentences they are depends on the Python version, so a row names it.
"""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import Any

import torch

# What a model is calibrated on: tokens, in sequences of so many.
CALIBRATION_TOKENS, CALIBRATION_CONTEXT = 2048, 512
HALVES = ("held-out", "calibration")


def prose(half: str) -> str:
    """English: the topics of ``pydoc_data``, every other one, in an order fixed for good."""
    from pydoc_data.topics import topics

    return _half([topics[name] for name in sorted(topics)], half)


def code(half: str) -> str:
    """Python: the standard library's top-level modules of 10 to 100 kB, every other one, in an order fixed for good."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return _half([path.read_text(encoding="utf-8") for path in files if 10_000 <= path.stat().st_size <= 100_000], half)


def _half(texts: list[str], half: str) -> str:
    """Topics quote whole sections of each other: of a paragraph only the first occurrence stays, and only in one half."""
    seen: set[str] = set()
    for name in HALVES:
        chosen = texts[HALVES.index(name) :: 2]
        random.Random(0).shuffle(chosen)
        paragraphs = [p for p in dict.fromkeys("\n\n".join(chosen).split("\n\n")) if p not in seen]
        if name == half:
            return "\n\n".join(paragraphs)
        seen.update(paragraphs)
    raise ValueError(f"{half!r} is not one of {HALVES}")


def blocks(tokenizer: Any, half: str, tokens: int, context: int) -> list[torch.Tensor]:
    """At least ``tokens`` tokens in sequences int64 ``[context]``, prose and code in turn; of any context the same text.

    Each starts with the tokens that the tokenizer puts before a text. Raises ValueError where the half has too little text.
    """
    prefix = tokenizer.encode("")
    body = context - len(prefix)
    count = -(-tokens // context)
    streams = []
    for text, share in ((prose(half), -(-count // 2)), (code(half), count // 2)):
        # A token is at least one character, and no text has ten times fewer tokens than characters.
        ids = tokenizer.encode(text[: 10 * share * body], add_special_tokens=False)
        if len(ids) < share * body:
            raise ValueError(f"{tokens} tokens asked for, but one text has only {len(ids)}")
        streams.append([prefix + ids[i * body : (i + 1) * body] for i in range(share)])
    turns = [streams[i % 2][i // 2] for i in range(count)]
    return [torch.tensor(ids, dtype=torch.int64) for ids in turns]
