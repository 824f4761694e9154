"""Benchmark rows: what was measured, on which card, with which versions and which kernels. Append-only."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
# Bytes a second that a copy on the card moves, those read and those written counted.
MEMORY = {"h100": 3.05e12, "h200": 4.3e12}


def card_name(card: str) -> str:
    """A card's short name, as files of rows have it."""
    return "h200" if "H200" in card else "h100" if "H100" in card else card.lower().replace(" ", "-")


def floor_ms(moved: float) -> float | None:
    """Milliseconds that the card's memory needs to move so many bytes; None for a card whose memory is not known here."""
    import torch

    speed = MEMORY.get(card_name(torch.cuda.get_device_name()))
    return None if speed is None else round(moved / speed * 1e3, 4)


def kernels_tree() -> str:
    """``git rev-parse HEAD:kernels``; a copy of the tree without git gives it in ``KERNELS_TREE``."""
    if "KERNELS_TREE" in os.environ:
        return os.environ["KERNELS_TREE"]
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD:kernels"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def append_row(name: str, row: dict[str, object]) -> str:
    """Adds card and versions to ``row`` and appends it to ``results/<name>_<card>.jsonl``; returns the line."""
    import torch
    import triton
    import vllm

    card = torch.cuda.get_device_name()
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "triton": triton.__version__}
    return write_row(f"{name}_{card_name(card)}", {**row, "card": card, **versions})


def write_row(name: str, row: dict[str, object]) -> str:
    """Adds the kernels' tree to ``row`` and appends it to ``results/<name>.jsonl``; returns the line."""
    line = json.dumps({**row, "kernels_tree": kernels_tree()})
    directory = Path(os.environ.get("BENCH_RESULTS", RESULTS))
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    return line
