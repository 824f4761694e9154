"""README tables and pictures, made from the rows in results/.

    python -m tests.bench.figures        writes README.md's figures section, results/decode_context.svg and fidelity.svg

The table of decode times is that of the newest kernels, the picture that of the newest ones that were timed over all contexts; of
engine rows the newest call counts. Ratios are of times in one row or one call.
"""

from __future__ import annotations

import json
from typing import Any

from vllm_turboquant.config import is_ours
from vllm_turboquant.kernels.format import PRESETS

from .rows import RESULTS, ROOT

Row = dict[str, Any]
BEGIN, END = "<!-- figures: make figures -->\n", "<!-- end of figures -->\n"
PICTURE, PARETO = RESULTS / "decode_context.svg", RESULTS / "fidelity.svg"
MODELS = ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct")
CONTEXTS = (512, 4096)
SHAPE = ("preset", "B", "L", "lengths", "Hq", "Hk", "D", "page")
RIVALS = (("fa3_bf16_ms", "FlashAttention 3 bf16"), ("fa3_fp8_ms", "FlashAttention 3 fp8"), ("builtin_ms", "vLLM's 4bit_nc"))


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def decode_rows(of_shape: Row | None = None, fewest: int = 1) -> list[Row]:
    """The newest row of each shape that was timed beside its rivals, all of one tree: the newest that has ``fewest`` shapes.

    of_shape: of shapes with these values.
    """
    wanted = (of_shape or {}).items()
    trees: dict[str, dict[tuple[Any, ...], Row]] = {}
    for row in read("decode_h100"):
        if row["fa3_bf16_ms"] and all(row[key] == value for key, value in wanted):
            trees.setdefault(row["kernels_tree"], {})[tuple(row[key] for key in SHAPE)] = row
    return list([rows for rows in trees.values() if len(rows) >= fewest][-1].values())


def context_rows() -> list[Row]:
    """What the picture shows, by context."""
    shape = {"preset": "turboquant", "B": 32, "lengths": "equal", "Hq": 32, "Hk": 8, "D": 128, "page": 16}
    return sorted(decode_rows(shape, fewest=6), key=lambda row: row["L"])


def engine_rows() -> dict[str, Row]:
    """By dtype, of the newest call."""
    rows = read("engine_h100")
    return {row["dtype"]: row for row in rows if row["call"] == rows[-1]["call"]}


def decode_table(rows: list[Row]) -> list[str]:
    lines = [
        "| preset | requests x context | heads / KV heads, size | data-free ms | faster than bf16 / fp8 / 4bit_nc "
        "| of memory's limit | calibrated ms | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, calibrated = row["ours_ms"], row["calibrated_ms"]
        faster, still = (" / ".join(f"{row[key] / own:.2f}" for key, _ in RIVALS) for own in (ours, calibrated))
        context = f"{row['B']} x {row['L']}" if row["lengths"] == "equal" else f"{row['B']} x 1 to {row['L']}"
        heads = f"{row['Hq']} / {row['Hk']}, {row['D']}"
        lines.append(
            f"| `{row['preset']}` | {context} | {heads} | {ours:.4f} | {faster} | {row['floor_ms'] / ours:.0%} "
            f"| {calibrated:.4f} | {still} |"
        )
    return lines


def engine_table(rows: dict[str, Row]) -> list[str]:
    lines = [
        "| `--kv-cache-dtype` | tokens in the cache | prefill 48 x 8192, 1 x 32768 (s) | per output token (ms) |",
        "|---|---|---|---|",
    ]
    for dtype, row in rows.items():
        many, one = row["B48_L8192"], row["B1_L32768"]
        prefill = f"{many['prefill_s']}, {one['prefill_s']}"
        # Rows without the key are older than calibration.
        how = {"auto": ", calibrated", "off": ", data-free"}[row.get("calibration", "off")] if is_ours(dtype) else ""
        lines.append(f"| `{dtype}`{how} | {row['capacity_tokens']:,} | {prefill} | {many['tpot_ms']}, {one['tpot_ms']} |")
    return lines


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


def fidelity_name(name: str, calibrated: bool, skipped: int) -> str:
    how = ", calibrated" if calibrated else ", data-free" if is_ours(name) else ""
    return f"`{name}`{how}" + (f", {skipped} layers in bf16" if skipped else "")


def fidelity_table() -> list[str]:
    places = [(model, context) for model in MODELS for context in CONTEXTS]
    lines = [
        "| `--kv-cache-dtype` | bytes | " + " | ".join(f"{model}, {context}" for model, context in places) + " |",
        "|---|---|" + "---|" * len(places),
    ]
    for case, rows in sorted(fidelity_rows().items(), key=lambda item: item[1][places[-1]]["kl"]):
        figures = " | ".join(f"{rows[place]['kl']:.4f} ({rows[place]['top1']:.0%})" for place in places)
        lines.append(f"| {fidelity_name(*case)} | {rows[places[-1]]['bytes_d128']:.0f} | {figures} |")
    return lines


def section() -> str:
    """What stands between the markers in README.md."""
    decode, engine = decode_rows(), engine_rows()
    versions = {f"{row['card']}, vLLM {row['vllm']}, torch {row['torch']}" for row in (*decode, *engine.values())}
    lines = [
        f"Measured on {' and '.join(sorted(versions))}; rows in `tests/bench/results/`.",
        "",
        "Decode attention alone, one query token a request, rotations and merging included (`tests/bench/decode.py`):",
        "",
        *decode_table(decode),
        "",
        f"![Time of one decode step against context]({PICTURE.relative_to(ROOT)})",
        "",
        "A Llama-3.1-8B shape in vLLM's engine, one call (`tests/bench/engine.py`). Output tokens are timed with the prefills",
        "that they share steps with:",
        "",
        *engine_table(engine),
        "",
        "Fidelity (`tests/bench/fidelity.py`): KL divergence of the next token from the model with exact keys and values, in",
        "nats, and how often both find the same token likeliest, over 8,192 held-out tokens in contexts of 512 and 4096. All",
        "keys and values are read back from compressed blocks, but for the newest 64 tokens of `turboquant-k3v3` and `-k2v2`,",
        "which servers keep exactly; vLLM's own dtypes are emulated. Bytes are those of a token and KV head of 128 dims:",
        "",
        *fidelity_table(),
        "",
        f"![Divergence against bytes]({PARETO.relative_to(ROOT)})",
        "",
    ]
    return "\n".join(lines)


def with_section(readme: str) -> str:
    head, rest = readme.split(BEGIN)
    return head + BEGIN + section() + END + rest.split(END)[1]


def plots() -> Any:
    import matplotlib

    matplotlib.use("svg")
    # The same picture from the same rows; text as text, not as outlines.
    matplotlib.rcParams |= {"svg.hashsalt": "turboquant", "svg.fonttype": "none"}
    from matplotlib import pyplot

    return pyplot


def draw_fidelity() -> None:
    """KL divergence against bytes at the longest context, a panel a model."""
    figure, panels = plots().subplots(1, len(MODELS), figsize=(11, 4.5))
    kinds = {
        "turboquant, calibrated": lambda case: case[1],
        "turboquant, data-free": lambda case: is_ours(case[0]) and not case[1],
        "vLLM's dtypes": lambda case: not is_ours(case[0]) and not case[2],
        "with 4 layers in bf16": lambda case: case[2] > 0,
    }
    served = {case: rows for case, rows in fidelity_rows().items() if "qjl" not in case[0]}
    for axes, model in zip(panels, MODELS, strict=True):
        for marker, (label, belongs) in zip("o^sD", kinds.items(), strict=True):
            rows = [rows[model, CONTEXTS[-1]] for case, rows in served.items() if belongs(case)]
            axes.plot([row["bytes_d128"] for row in rows], [row["kl"] for row in rows], marker, label=label)
            for row in rows:
                name = row["name"].removeprefix("turboquant").lstrip("-_") or "k4v4"
                axes.annotate(name, (row["bytes_d128"], row["kl"]), fontsize=6, xytext=(4, 3), textcoords="offset points")
        axes.set(yscale="log", xlabel="bytes a token and KV head (128 dims)", ylabel="KL divergence (nats)")
        axes.set_title(f"{model}, context {CONTEXTS[-1]}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(PARETO, metadata={"Date": None}, bbox_inches="tight")


def draw() -> None:
    """Milliseconds a decode step against context, 32 requests, 32 query heads on 8 KV heads of 128."""
    pyplot = plots()
    rows = context_rows()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in (("ours_ms", "turboquant"), *RIVALS):
        axes.plot([row["L"] for row in rows], [row[key] for row in rows], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="decode attention of one layer (ms)")
    axes.set_xticks([row["L"] for row in rows], [f"{row['L'] // 1024}K" for row in rows])
    axes.minorticks_off()
    axes.set_title(f"32 requests, 32 query heads on 8 KV heads of 128; {rows[0]['card']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PICTURE, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_section(readme.read_text()))
    draw()
    draw_fidelity()


if __name__ == "__main__":
    main()
