"""Which rows in results/ count: what README's tables and pictures are made from.

Decode times are those of the newest kernels, in the picture of the newest ones that were timed over all contexts; of engine rows
the newest call of each card counts.
"""

from __future__ import annotations

import json
from typing import Any

from vllm_turboquant.config import is_ours
from vllm_turboquant.kernels.format import PRESETS

from .rows import RESULTS

Row = dict[str, Any]
CARDS = ("h100", "h200")
MODELS = ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct")
CONTEXTS = (512, 4096)
SHAPE = ("preset", "B", "L", "lengths", "Hq", "Hk", "D", "page")


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def decode_rows(of_shape: Row | None = None, fewest: int = 1, card: str = "h100") -> list[Row]:
    """The newest row of each shape that was timed beside its rivals, all of one tree: the newest that has ``fewest`` shapes.

    of_shape: of shapes with these values.
    """
    wanted = (of_shape or {}).items()
    trees: dict[str, dict[tuple[Any, ...], Row]] = {}
    for row in read(f"decode_{card}"):
        if row["fa3_bf16_ms"] and all(row[key] == value for key, value in wanted):
            trees.setdefault(row["kernels_tree"], {})[tuple(row[key] for key in SHAPE)] = row
    return list([rows for rows in trees.values() if len(rows) >= fewest][-1].values())


def context_rows() -> list[Row]:
    """What the picture shows, by context."""
    shape = {"preset": "turboquant", "B": 32, "lengths": "equal", "Hq": 32, "Hk": 8, "D": 128, "page": 16}
    return sorted(decode_rows(shape, fewest=6), key=lambda row: row["L"])


def engine_rows(card: str) -> dict[str, Row]:
    """By dtype, of the newest call on this card that timed a preset beside ``auto``."""
    calls: dict[str, dict[str, Row]] = {}
    for row in read(f"engine_{card}"):
        calls.setdefault(row["call"], {})[row["dtype"]] = row
    return [rows for rows in calls.values() if "auto" in rows and any(map(is_ours, rows))][-1]


def window_of(name: str) -> int:
    """How many of the newest tokens a server reads exactly under this dtype."""
    return PRESETS[name].recent if is_ours(name) else 0


def fidelity_rows() -> dict[tuple[str, bool, int], dict[tuple[str, int], Row]]:
    """By (dtype, calibrated, skipped layers), then (model, context): the newest rows of what can be served."""
    found: dict[tuple[str, bool, int], dict[tuple[str, int], Row]] = {}
    for model in MODELS:
        for row in read(f"fidelity_{model}"):
            as_served = not row["sinks"] and row["window"] == window_of(row["name"])
            if as_served and row["context"] in CONTEXTS and row["name"] != "auto":
                case = row["name"], row["calibrated"], row["skipped_layers"]
                found.setdefault(case, {})[model, row["context"]] = row
    return found
