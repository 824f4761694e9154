"""Text of the command line: sizes as users write them, and plain aligned tables. Knows neither vLLM nor torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .refusals import MAX_GPU_HEAD_SIZE

if TYPE_CHECKING:
    from .budget import Budget
    from .facts import Fact
    from .planner import Plan, Row

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_ESTIMATE = """\
Exact: how that memory is divided; vLLM's own planner did it. Estimated: working memory. vLLM measures it at start and logs
"Available KV cache memory"; with --kv-cache-memory and that number the tokens are those of vLLM's next line."""
_EXACT = 'Exact: vLLM\'s own planner divided the memory, as it does for its line "KV cache size: N tokens".'
_QUANTIZED = "Weights are the files' share, as this machine lacks kernels for them: as loaded they may differ."


def byte_count(text: str) -> int:
    """``42949672960``, ``40GiB``, ``40GB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; allowed is a positive number, alone or with {units}")
    return int(float(match[1]) * _UNITS[match[2]])


def gibibytes(text: str) -> int:
    """``80`` is 80 GiB; with a unit as `byte_count`."""
    return byte_count(f"{text}GiB" if re.fullmatch(r"[\d.]+", text) else text)


def table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Columns as wide as they must be. ``sides``: of each column, ``<`` or ``>``."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def plan_text(plan: Plan) -> str:
    """The model, where its memory goes, and a row each dtype."""
    gpus = f"{plan.tensor_parallel_size} GPU{'s' * (plan.tensor_parallel_size > 1)}"
    where = "this machine's CPU" if plan.platform == "cpu" else gpus
    head = f"{plan.model}: {plan.architecture}, {plan.layers} layers, on {where}, "
    head += f"requests of up to {plan.max_model_len:,} tokens, steps of up to {plan.max_num_batched_tokens:,}"
    note = _EXACT if plan.budget.total is None else _ESTIMATE
    if plan.budget.weights_from == "checkpoint" and plan.budget.total is not None:
        note += f"\n{_QUANTIZED}"
    if plan.platform != "cpu" and plan.head_size > MAX_GPU_HEAD_SIZE:
        note += f"\nHeads of {plan.head_size} dims are served on Hopper GPUs alone."
    return "\n\n".join([head, _budget(plan.budget), _rows(plan.rows, plan.max_model_len), note])


def _budget(budget: Budget) -> str:
    if budget.total is None or budget.utilization is None or budget.weights is None or budget.working is None:
        return f"KV cache of one rank: {_gib(budget.kv_cache)} GiB, as given"
    source = "parameters of vLLM's model" if budget.weights_from == "parameters" else "the files' share, an estimate"
    rows = [
        ["GiB of one GPU", "", ""],
        ["vLLM's share", _gib(budget.total * budget.utilization), f"{_gib(budget.total)} x {budget.utilization:g}"],
        ["weights", _gib(budget.weights), source],
        ["working memory", _gib(budget.working), "estimate: activations, CUDA graphs, libraries"],
        ["KV cache", _gib(budget.kv_cache), "what is left, an estimate"],
    ]
    return table(rows, "<><")


def _rows(rows: Sequence[Row], full: int) -> str:
    auto = rows[0].bytes_per_token
    lines = [["dtype", "bytes a token", "of auto", "tokens", f"requests of {full:,}"]]
    notes = []
    for row in rows:
        ratio = "-" if auto is None or row.bytes_per_token is None else f"{auto / row.bytes_per_token:.2f}x"
        size = "-" if row.bytes_per_token is None else f"{row.bytes_per_token:,.0f}"
        fits = ["-", "-"] if row.tokens is None or row.requests is None else [f"{row.tokens:,}", f"{row.requests:.2f}"]
        lines.append([row.dtype, size, ratio, *fits])
        if row.problem is not None:
            notes.append(f"{row.dtype}: {row.problem}")
        elif row.tokens is None:
            notes.append(f"{row.dtype}: no request of {full:,} tokens fits; --max-model-len {row.longest} does")
    return "\n".join([table(lines, "<>>>>"), *notes])


def doctor_text(facts: Sequence[Fact], running: bool) -> str:
    """A line each fact; below those that are not ok, the cure. ``running``: facts of a server."""
    width = max(len(fact.name) for fact in facts)
    lines = []
    for fact in facts:
        lines.append(f"{fact.state:8} {fact.name:{width}}  {fact.detail}")
        if fact.cure is not None:
            lines.append(f"{'':8} {'':{width}}  cure: {fact.cure}")
    failed = sum(fact.state == "failed" for fact in facts)
    can, cannot = ("is", "is not") if running else ("can be", "cannot be")
    return "\n".join([*lines, f"turboquant {cannot} served: {failed} failed" if failed else f"turboquant {can} served"])


def evaluation_line(row: Mapping[str, object] | None) -> str:
    """One row of `evaluation.run.rows`; None is the heading."""
    columns = "{:8} {:40} {:>6}  {:>8} {:>8}  {:>6} {:>8}"
    if row is None:
        return columns.format("context", "dtype", "bytes", "KL", "error", "top-1", "ppl")
    used = ("skipped_layers", "layers in bf16"), ("sinks", "sinks"), ("window", "window")
    extra = [f"{row[key]} {what}" for key, what in used if row[key]]
    name = " ".join([str(row["name"]), *(["calibrated"] if row["calibrated"] else []), *extra])
    error = "-" if row["kl_se"] is None else f"{row['kl_se']:.5f}"
    figures = f"{row['kl']:.5f}", error, f"{row['top1']:.3f}", f"{row['ppl_delta']:+.2%}"
    return columns.format(row["context"], name, row["bytes_d128"], *figures)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
