"""README tables and the picture, made from the rows in results/.

    python -m tests.bench.figures        writes README.md's figures section and results/decode_context.svg

Of rows for one shape the newest counts, of engine rows the newest call. Ratios are of times in one row or one call.
"""

from __future__ import annotations

import json
from typing import Any

from .rows import RESULTS, ROOT

Row = dict[str, Any]
BEGIN, END = "<!-- figures: make figures -->\n", "<!-- end of figures -->\n"
PICTURE = RESULTS / "decode_context.svg"
SHAPE = ("preset", "B", "L", "lengths", "Hq", "Hk", "D", "page")
RIVALS = (("fa3_bf16_ms", "FlashAttention 3 bf16"), ("fa3_fp8_ms", "FlashAttention 3 fp8"), ("builtin_ms", "vLLM's 4bit_nc"))


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def decode_rows() -> list[Row]:
    """The newest row of each shape that was timed beside its rivals."""
    newest = {tuple(row[key] for key in SHAPE): row for row in read("decode_h100") if row["fa3_bf16_ms"]}
    return list(newest.values())


def engine_rows() -> dict[str, Row]:
    """By dtype, of the newest call."""
    rows = read("engine_h100")
    return {row["dtype"]: row for row in rows if row["call"] == rows[-1]["call"]}


def decode_table(rows: list[Row]) -> list[str]:
    lines = [
        "| preset | requests x context | heads / KV heads, size | ms | faster than bf16 / fp8 / 4bit_nc | of memory's limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["ours_ms"]
        faster = " / ".join(f"{row[key] / ours:.2f}" for key, _ in RIVALS)
        context = f"{row['B']} x {row['L']}" if row["lengths"] == "equal" else f"{row['B']} x 1 to {row['L']}"
        heads = f"{row['Hq']} / {row['Hk']}, {row['D']}"
        lines.append(f"| `{row['preset']}` | {context} | {heads} | {ours:.4f} | {faster} | {row['floor_ms'] / ours:.0%} |")
    return lines


def engine_table(rows: dict[str, Row]) -> list[str]:
    lines = [
        "| `--kv-cache-dtype` | tokens in the cache | prefill 48 x 8192, 1 x 32768 (s) | per output token (ms) |",
        "|---|---|---|---|",
    ]
    for dtype, row in rows.items():
        many, one = row["B48_L8192"], row["B1_L32768"]
        prefill = f"{many['prefill_s']}, {one['prefill_s']}"
        lines.append(f"| `{dtype}` | {row['capacity_tokens']:,} | {prefill} | {many['tpot_ms']}, {one['tpot_ms']} |")
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
    ]
    return "\n".join(lines)


def with_section(readme: str) -> str:
    head, rest = readme.split(BEGIN)
    return head + BEGIN + section() + END + rest.split(END)[1]


def draw() -> None:
    """Milliseconds a decode step against context, 32 requests, 32 query heads on 8 KV heads of 128."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "turboquant"  # the same picture from the same rows
    from matplotlib import pyplot

    shape = {"preset": "turboquant", "B": 32, "lengths": "equal", "Hq": 32, "Hk": 8, "D": 128, "page": 16}
    rows = [row for row in decode_rows() if all(row[key] == value for key, value in shape.items())]
    rows.sort(key=lambda row: row["L"])
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


if __name__ == "__main__":
    main()
