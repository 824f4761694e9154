"""``vllm-turboquant``: what is done ahead of serving."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import AUTO, SETTINGS_KEY
from .kernels.format import DEFAULT_PRESET


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-turboquant", description="Tools around vLLM's --kv-cache-dtype turboquant.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    calibrate = commands.add_parser(
        "calibrate",
        help="fit stored keys to a model, ahead of its first start",
        description="Loads MODEL as vLLM would serve it, fits the transform of stored keys to it and prints the file. Options "
        "must be those of the server: its length, its dtype and its tensor parallel size are part of the fit.",
    )
    calibrate.add_argument("model", metavar="MODEL", help="a folder or a name that vLLM takes")
    calibrate.add_argument("--output", type=Path, help="also write the file here, for servers that are told its path")
    calibrate.add_argument("--max-model-len", type=int, help="the longest context to be served; default: the model's")
    calibrate.add_argument("--dtype", help="as for vllm serve")
    calibrate.add_argument("--tensor-parallel-size", type=int, help="as for vllm serve")
    calibrate.add_argument("--revision", help="as for vllm serve")
    calibrate.add_argument("--trust-remote-code", action="store_true", default=None, help="as for vllm serve")
    calibrate.add_argument("--gpu-memory-utilization", type=float, help="as for vllm serve")
    calibrate.set_defaults(run=_calibrate)
    evaluate = commands.add_parser(
        "evaluate",
        help="what every KV cache dtype costs a model: divergence from its own predictions",
        description="Runs the model in folder MODEL with transformers, every key and value read back from compressed blocks "
        "(vLLM's own dtypes emulated), on text of the Python installation that no calibration has seen. Prints the KL divergence "
        "of the next token from dtype auto with its standard error, how often the likeliest token stays, and the change of "
        "perplexity.",
    )
    evaluate.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format")
    evaluate.add_argument("--contexts", type=int, nargs="+", default=[512], metavar="TOKENS", help="default: 512")
    evaluate.add_argument("--tokens", type=int, default=8192, help="text to be evaluated at each context; default: 8192")
    evaluate.add_argument("--served", type=int, default=8192, help="context that calibration covers; default: 8192")
    evaluate.add_argument("--only", nargs="+", metavar="DTYPE", help="default: all")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _calibrate(given: argparse.Namespace) -> int:
    from vllm import LLM

    options: dict[str, Any] = {key: value for key, value in vars(given).items() if value is not None}
    output: Path | None = options.pop("output", None)
    del options["run"]
    settings = {SETTINGS_KEY: {"calibration": AUTO}}
    llm = LLM(kv_cache_dtype=DEFAULT_PRESET, additional_config=settings, enforce_eager=True, **options)
    path = llm.collective_rpc("turboquant_calibration")[0]
    llm.llm_engine.engine_core.shutdown()
    if path is None or not Path(path).is_file():
        print(f"vllm-turboquant: error: {given.model} was not calibrated; the lines above say why", file=sys.stderr)
        return 1
    if output is not None:
        _copy(Path(path), output)
    print(f"Calibration file: {output.absolute() if output else path}")
    return 0


def _evaluate(given: argparse.Namespace) -> int:
    from .evaluation.calibrate import served_model
    from .evaluation.codecs import NAMES
    from .evaluation.run import all_cases, rows

    unknown = sorted(set(given.only or ()) - set(NAMES))
    if unknown:
        print(f"vllm-turboquant: error: --only {' '.join(unknown)}: allowed are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    cases = [case for case in all_cases() if not given.only or case.name in given.only]
    model, bases = served_model(given.model, cases, given.served)
    columns = "{:8} {:40} {:>6}  {:>8} {:>8}  {:>6} {:>8}"
    print(columns.format("context", "dtype", "bytes", "KL", "error", "top-1", "ppl"))
    for row in rows(model, Path(given.model).name, cases, given.contexts, bases, given.tokens):
        used = ("skipped_layers", "layers in bf16"), ("sinks", "sinks"), ("window", "window")
        extra = [f"{row[key]} {what}" for key, what in used if row[key]]
        name = " ".join([str(row["name"]), *(["calibrated"] if row["calibrated"] else []), *extra])
        error = "-" if row["kl_se"] is None else f"{row['kl_se']:.5f}"
        figures = f"{row['kl']:.5f}", error, f"{row['top1']:.3f}", f"{row['ppl_delta']:+.2%}"
        print(columns.format(row["context"], name, row["bytes_d128"], *figures), flush=True)
    return 0


def _copy(source: Path, target: Path) -> None:
    """Atomically: a server that starts meanwhile sees all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        scratch = Path(folder) / target.name
        shutil.copyfile(source, scratch)
        os.replace(scratch, target)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    return int(given.run(given))


if __name__ == "__main__":
    sys.exit(main())
