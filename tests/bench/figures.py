"""README tables, made from the rows in results/; `pictures` draws from the same rows.

    python -m tests.bench.figures        writes README.md's figures section and the pictures

Which rows count is said in `newest`. Ratios are of times in one row or one call.
"""

from __future__ import annotations

from vllm_turboquant.config import is_ours, stored
from vllm_turboquant.kernels.format import PRESETS, page_format

from .newest import CARDS, CONTEXTS, MODELS, Row, decode_rows, engine_rows, fidelity_rows, read
from .rows import RESULTS, ROOT

MARKS = {  # of what is written into README.md
    "figures": ("<!-- figures: make figures -->\n", "<!-- end of figures -->\n"),
    "presets": ("<!-- presets: make figures -->\n", "<!-- end of presets -->\n"),
}
PICTURES = {name: RESULTS / f"{name}.svg" for name in ("decode_context", "fidelity", "capacity", "slots")}
HEAD = 128  # dims of the heads where bytes are told
LONG = 8192
RIVALS = (("fa3_bf16_ms", "FlashAttention 3 bf16"), ("fa3_fp8_ms", "FlashAttention 3 fp8"), ("builtin_ms", "vLLM's 4bit_nc"))


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


def decode_elsewhere() -> list[str]:
    """The table's shapes on the other card, in a sentence."""
    rows = decode_rows(card="h200")
    bf16, fp8 = ([row[key] / row["ours_ms"] for row in rows] for key, _ in RIVALS[:2])
    long = next(i for i, row in enumerate(rows) if (row["B"], row["L"], row["lengths"]) == (64, 32768, "equal"))
    return [
        f"The same shapes on {rows[0]['card']}, data-free: {min(bf16):.2f} to {max(bf16):.2f} times as fast as bf16, "
        f"{min(fp8):.2f} to {max(fp8):.2f} as fp8;",
        f"64 x 32768 {bf16[long]:.2f} and {fp8[long]:.2f}, at {rows[long]['floor_ms'] / rows[long]['ours_ms']:.0%} of memory's "
        "limit: its memory is faster, its arithmetic is not.",
        "",
    ]


def engine_table() -> list[str]:
    lines = [
        "| card | `--kv-cache-dtype` | tokens in the cache | prefill 48 x 8192, 1 x 32768 (s) | per output token (ms) "
        "| requests in a full cache, output tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        rows = engine_rows(card)
        for dtype, row in sorted(rows.items(), key=lambda item: item[1]["capacity_tokens"]):
            many, one, auto = row["B48_L8192"], row["B1_L32768"], rows["auto"]
            prefill = f"{many['prefill_s']}, {one['prefill_s']}"
            # Rows without the key are older than calibration.
            how = {"auto": ", calibrated", "off": ", data-free"}[row.get("calibration", "off")] if is_ours(dtype) else ""
            more = f"{row['capacity_tokens']:,} ({row['capacity_tokens'] / auto['capacity_tokens']:.2f}x)"
            # Older rows timed the 48 with the prefills that they shared steps with.
            steps = many["tpot_ms"] if "with_prefill_s" in many else "-"
            filled = f"{row['full']['requests']}, {row['full']['tokens_per_s']:,}" if "full" in row and steps != "-" else "-"
            lines.append(f"| {row['card']} | `{dtype}`{how} | {more} | {prefill} | {steps}, {one['tpot_ms']} | {filled} |")
    return lines


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


def long_context() -> list[str]:
    """How the default preset's divergence grows within one text of 8,192 tokens, and which needles each preset finds."""
    grown = []
    for model in MODELS:
        rows = [row for row in read(f"fidelity_{model}") if row["context"] == LONG and row["name"] == "turboquant"]
        places = dict([row for row in rows if row["calibrated"] and not row["sinks"]][-1]["kl_places"])
        # A place reaches to the next.
        first = (512 * places[0] + 512 * places[512] + 1024 * places[1024]) / 2048
        grown.append(f"{places[4096] / first:.2f} times ({model})")
    found: dict[str, list[bool]] = {}
    for row in read(f"needle_{MODELS[-1]}"):
        found.setdefault(row["name"], []).extend(row["found"])
    return [
        "Within one text of 8,192 tokens the divergence of calibrated `turboquant` at positions 4,096 to 8,191 is",
        f"{' and '.join(grown)} that of the first 2,048.",
        "",
        "Needles, five facts in each of several texts of 4,096 and of 8,192 tokens, that greedy decoding from compressed blocks",
        f"gives back ({MODELS[-1]}, calibrated as installed):",
        "",
        ", ".join(f"`{name}` {sum(hits)} of {len(hits)}" for name, hits in found.items()) + ".",
        "",
    ]


def presets_table() -> list[str]:
    """What people choose from, with what it costs a model at the longest context, calibrated as installed."""
    models = " | ".join(f"KL {model.split('-')[0]}" for model in MODELS)
    lines = [f"| `--kv-cache-dtype` | bytes | of bf16 | stored | {models} |", "|---|---|---|---|---|---|"]
    fidelity = fidelity_rows()
    for name in ("auto", "fp8", *(name for name in PRESETS if "qjl" not in name)):
        if name in PRESETS:
            preset, size = PRESETS[name], page_format(name, HEAD).slot_bytes
            kept = stored(name) + (f"; newest {preset.recent} tokens exactly" if preset.recent else "")
        else:
            size, kept = (4 * HEAD, "bf16") if name == "auto" else (2 * HEAD, "vLLM's own, without scales")
        rows = fidelity.get((name, is_ours(name), 0), {})
        kl = " | ".join(f"{rows[model, CONTEXTS[-1]]['kl']:.4f}" if rows else "0" for model in MODELS)
        lines.append(f"| `{name}` | {size} | {4 * HEAD / size:.2f}x | {kept} | {kl} |")
    return lines


def picture(name: str, title: str) -> str:
    return f"![{title}]({PICTURES[name].relative_to(ROOT)})"


def section() -> str:
    """What stands between the markers in README.md."""
    decode = decode_rows()
    timed = [*decode, *(row for card in CARDS for row in engine_rows(card).values())]
    versions = {f"vLLM {row['vllm']}, torch {row['torch']}" for row in timed}
    lines = [
        f"Measured with {' and '.join(sorted(versions))}; rows in `tests/bench/results/`.",
        "",
        picture("slots", "What a token takes, and where its bytes lie"),
        "",
        picture("capacity", "Tokens that one card's cache holds"),
        "",
        f"Decode attention alone on {decode[0]['card']}, one query token a request, rotations and merging included",
        "(`tests/bench/decode.py`):",
        "",
        *decode_table(decode),
        "",
        *decode_elsewhere(),
        picture("decode_context", "Time of one decode step against context"),
        "",
        "A Llama-3.1-8B shape in vLLM's engine, one call a card (`tests/bench/engine.py`). An output token is a step that",
        "decodes all 48 requests, or the 1, and does nothing else; a full cache holds requests of 8192 tokens:",
        "",
        *engine_table(),
        "",
        "Fidelity (`tests/bench/fidelity.py`): KL divergence of the next token from the model with exact keys and values, in",
        "nats, and how often both find the same token likeliest, over 8,192 held-out tokens in contexts of 512 and 4096. All",
        "keys and values are read back from compressed blocks, but for the newest 64 tokens of `turboquant-k3v3` and `-k2v2`,",
        "which servers keep exactly; vLLM's own dtypes are emulated. Bytes are those of a token and KV head of 128 dims:",
        "",
        *fidelity_table(),
        "",
        picture("fidelity", "Divergence against bytes"),
        "",
        *long_context(),
    ]
    return "\n".join(lines)


def with_section(readme: str) -> str:
    for name, text in (("presets", "\n".join(presets_table()) + "\n"), ("figures", section())):
        begin, end = MARKS[name]
        head, rest = readme.split(begin)
        readme = head + begin + text + end + rest.split(end)[1]
    return readme


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_section(readme.read_text()))
    from .pictures import draw  # needs matplotlib, which the tables do without

    draw()


if __name__ == "__main__":
    main()
