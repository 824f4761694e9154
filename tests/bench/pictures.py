"""README pictures, from the rows that `newest` finds. Colours are Okabe and Ito's, told apart by the colour-blind; what they
tell, markers, hatches or words tell too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib

from vllm_turboquant.config import is_ours
from vllm_turboquant.kernels.format import PRESETS, UNIT_TOKENS, page_format

from .figures import HEAD, PICTURES, RIVALS
from .newest import CARDS, CONTEXTS, MODELS, context_rows, engine_rows, fidelity_rows

matplotlib.use("svg")
# The same picture from the same rows; text as text, not as outlines.
matplotlib.rcParams |= {"svg.hashsalt": "turboquant", "svg.fonttype": "none", "hatch.linewidth": 0.6}

from matplotlib import pyplot  # noqa: E402 - after the backend is chosen

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#999999"


def draw_context() -> Any:
    """Milliseconds a decode step against context, 32 requests, 32 query heads on 8 KV heads of 128."""
    rows = context_rows()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    lines = (("ours_ms", "turboquant"), *RIVALS)
    for (key, label), colour, marker in zip(lines, (BLUE, GREY, ORANGE, RED), "osD^", strict=True):
        axes.plot([row["L"] for row in rows], [row[key] for row in rows], marker=marker, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="decode attention of one layer (ms)")
    axes.set_xticks([row["L"] for row in rows], [f"{row['L'] // 1024}K" for row in rows])
    axes.minorticks_off()
    axes.set_title(f"32 requests, 32 query heads on 8 KV heads of 128; {rows[0]['card']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_fidelity() -> Any:
    """KL divergence against bytes at the longest context, a panel a model."""
    figure, panels = pyplot.subplots(1, len(MODELS), figsize=(11, 4.5))
    kinds: dict[str, Callable[[tuple[str, bool, int]], bool]] = {
        "turboquant, calibrated": lambda case: case[1],
        "turboquant, data-free": lambda case: is_ours(case[0]) and not case[1],
        "vLLM's dtypes": lambda case: not is_ours(case[0]) and not case[2],
        "with 4 layers in bf16": lambda case: case[2] > 0,
    }
    served = {case: rows for case, rows in fidelity_rows().items() if "qjl" not in case[0]}
    for axes, model in zip(panels, MODELS, strict=True):
        for (label, belongs), marker, colour in zip(kinds.items(), "o^sD", (BLUE, GREEN, RED, ORANGE), strict=True):
            rows = [rows[model, CONTEXTS[-1]] for case, rows in served.items() if belongs(case)]
            axes.plot([row["bytes_d128"] for row in rows], [row["kl"] for row in rows], marker, color=colour, label=label)
            for row in rows:
                name = row["name"].removeprefix("turboquant").removesuffix("_per_token_head").lstrip("-_") or "k4v4"
                # Above the point or below it, so that neighbours of two kinds do not write over each other.
                offset = (8, -2) if name == "int4" else (4, -9) if row["calibrated"] or name == "k3v4_nc" else (4, 3)
                axes.annotate(name, (row["bytes_d128"], row["kl"]), fontsize=7, xytext=offset, textcoords="offset points")
        axes.set(yscale="log", xlabel="bytes a token and KV head (128 dims)", ylabel="KL divergence (nats)", xlim=(55, 285))
        axes.set_title(f"{model}, context {CONTEXTS[-1]}", fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=len(kinds), fontsize=9)
    figure.subplots_adjust(bottom=0.2)
    return figure


def draw_capacity() -> Any:
    """Tokens in the cache that vLLM sized itself, by card and dtype."""
    bars = [
        (
            f"{row['card'].removeprefix('NVIDIA ').split()[0]}, {dtype}",
            row["capacity_tokens"],
            rows["auto"]["capacity_tokens"],
            dtype,
        )
        for rows in map(engine_rows, CARDS)
        for dtype, row in sorted(rows.items(), key=lambda item: item[1]["capacity_tokens"])
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(bars) + 1.2))
    colours = [BLUE if is_ours(dtype) else ORANGE if dtype == "fp8" else GREY for *_, dtype in bars]
    axes.barh([label for label, *_ in bars], [tokens / 1e6 for _, tokens, *_ in bars], color=colours)
    for place, (_, tokens, auto, _) in enumerate(bars):
        axes.annotate(f" {tokens:,} ({tokens / auto:.2f}x)", (tokens / 1e6, place), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(right=1.3 * max(tokens for _, tokens, *_ in bars) / 1e6)
    axes.set(xlabel="million tokens", title="Tokens in one card's KV cache, Llama-3.1-8B shape, sized by vLLM")
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _sides(name: str) -> list[int]:
    """Bytes of a token and head: of keys, of values, of scales."""
    if name not in PRESETS:
        side = HEAD * (2 if name == "auto" else 1)
        return [side, side, 0]
    fmt = page_format(name, HEAD)
    key, value = (side.bits + side.sketch for side in (fmt.preset.key, fmt.preset.value))
    keys, values = HEAD * key // 8, HEAD * value // 8
    return [keys, values, fmt.slot_bytes - keys - values]


def draw_slots() -> Any:
    """Bytes of a token and KV head by dtype; and where they lie in a unit of 16 tokens of the default preset."""
    names = ["auto", "fp8", *(name for name in PRESETS if "qjl" not in name)]
    parts = (("keys", BLUE, ""), ("values", GREEN, "//"), ("scales", RED, "xx"))
    figure, (bars, strip) = pyplot.subplots(2, 1, figsize=(8, 4.4), height_ratios=(len(names), 1.2))
    left = [0] * len(names)
    for index, (label, colour, hatch) in enumerate(parts):
        widths = [_sides(name)[index] for name in names]
        bars.barh(names, widths, left=left, color=colour, hatch=hatch, edgecolor="white", label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        bars.annotate(f" {total}", (total, place), va="center", fontsize=9)
    bars.invert_yaxis()
    bars.set_title(f"Bytes of a token and KV head of {HEAD} dims", fontsize=10)
    bars.legend(loc="lower right", fontsize=9)
    fmt, start = page_format("turboquant", HEAD), 0
    for (label, colour, hatch), size in zip(parts, _sides("turboquant"), strict=True):
        strip.barh(0, UNIT_TOKENS * size, left=start, color=colour, hatch=hatch, edgecolor="white")
        middle = start + UNIT_TOKENS * size / 2
        if label != "scales":
            strip.text(middle, 0, f"codes of {label}", ha="center", va="center", color="white", weight="bold", fontsize=9)
        start += UNIT_TOKENS * size
    assert start == fmt.unit_bytes
    strip.set_xticks([0, UNIT_TOKENS * _sides("turboquant")[0], fmt.scalar_base, fmt.unit_bytes])
    strip.get_xticklabels()[2].set_horizontalalignment("right")
    strip.get_xticklabels()[3].set_horizontalalignment("left")
    strip.set_yticks([])
    strip.set_xlim(0, 1.02 * fmt.unit_bytes)
    strip.set_title(f"turboquant: one unit of {UNIT_TOKENS} tokens in a page, in bytes; scales last", fontsize=10)
    for axes in (bars, strip):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def draw() -> None:
    """Writes every picture."""
    drawn = {"decode_context": draw_context, "fidelity": draw_fidelity, "capacity": draw_capacity, "slots": draw_slots}
    for name, place in PICTURES.items():
        figure = drawn[name]()
        figure.savefig(place, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)
