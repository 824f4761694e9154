"""``vllm-turboquant``: what is done ahead of serving and beside it. Parses and prints; the work is in the modules it calls."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .config import TurboQuantError
from .tables import byte_count, doctor_text, evaluation_line, gibibytes, plan_text

ERROR = "vllm-turboquant: error:"
_ENGINE = ("model", "max_model_len", "dtype", "tensor_parallel_size", "revision", "trust_remote_code")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-turboquant", description="Tools around vLLM's --kv-cache-dtype turboquant.")
    parser.add_argument("--version", action="version", version=f"vllm-turboquant {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_doctor(commands)
    _add_calibrate(commands)
    _add_evaluate(commands)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="examples:\n" + "".join(f"  vllm-turboquant {name} {line}".rstrip() + "\n" for line in examples.splitlines()),
        formatter_class=_Formatter,
    )
    command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    command.set_defaults(run=run)
    return command


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps descriptions and leaves the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _add_plan(commands: Any) -> None:
    plan = _command(
        commands,
        "plan",
        _plan,
        "tokens and requests that each KV cache dtype holds",
        "Says from the configuration of MODEL, without its weights, how many tokens and full-length requests fit with dtype "
        "auto, fp8 and every preset. vLLM's own classes and planner count; given --kv-cache-memory they count what vLLM logs at "
        "start.",
        "meta-llama/Llama-3.1-8B-Instruct --gpu-memory 80\n"
        "Qwen/Qwen3-32B --gpu-memory 80 --tp 2 --max-model-len 32768\n"
        "./model --kv-cache-memory 40GiB --json",
    )
    plan.add_argument("model", metavar="MODEL", help="a folder with a config.json, or a name that vLLM takes")
    plan.add_argument(
        "--gpu-memory", type=gibibytes, metavar="SIZE", help="of one GPU: GiB, or with a unit; default: this machine's"
    )
    plan.add_argument("--gpu-memory-utilization", type=float, help="as for vllm serve; default: vLLM's")
    plan.add_argument("--kv-cache-memory", type=byte_count, metavar="SIZE", help="of one GPU: bytes, or with a unit")
    _add_engine(plan)
    plan.add_argument("--max-num-batched-tokens", type=int, help="as for vllm serve")
    plan.add_argument("--block-size", type=int, help="as for vllm serve")


def _add_doctor(commands: Any) -> None:
    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "whether this machine, or a running server, serves turboquant, and the cure",
        "Checks one fact a line. The exit code is 1 where serving with --kv-cache-dtype turboquant would fail, else 0.",
        "\n--json\n--url http://localhost:8000",
    )
    doctor.add_argument("--url", help="ask the server there instead of checking this machine")


def _add_calibrate(commands: Any) -> None:
    calibrate = _command(
        commands,
        "calibrate",
        _calibrate,
        "fit stored keys to a model, ahead of its first start",
        "Loads MODEL as vLLM would serve it, fits the transform of stored keys to it and prints the file. Options "
        "must be those of the server: its length, its dtype and its tensor parallel size are part of the fit.",
        "Qwen/Qwen3-8B\n./model --max-model-len 32768 --tp 2 --output ./calibration.safetensors",
    )
    calibrate.add_argument("model", metavar="MODEL", help="a folder or a name that vLLM takes")
    calibrate.add_argument("--output", type=Path, help="also write the file here, for servers that are told its path")
    _add_engine(calibrate)
    calibrate.add_argument("--gpu-memory-utilization", type=float, help="as for vllm serve")


def _add_evaluate(commands: Any) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "what every KV cache dtype costs a model: divergence from its own predictions",
        "Runs the model in folder MODEL with transformers, every key and value read back from compressed blocks "
        "(vLLM's own dtypes emulated), on text of the Python installation that no calibration has seen. Prints the KL divergence "
        "of the next token from dtype auto with its standard error, how often the likeliest token stays, and the change of "
        "perplexity.",
        "./model\n./model --contexts 512 4096 --only turboquant fp8 --json",
    )
    evaluate.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format")
    evaluate.add_argument("--contexts", type=int, nargs="+", default=[512], metavar="TOKENS", help="default: 512")
    evaluate.add_argument("--tokens", type=int, default=8192, help="text to be evaluated at each context; default: 8192")
    evaluate.add_argument("--served", type=int, default=8192, help="context that calibration covers; default: 8192")
    evaluate.add_argument("--only", nargs="+", metavar="DTYPE", help="default: all")


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-model-len", type=int, help="the longest context to be served; default: the model's")
    command.add_argument("--dtype", help="as for vllm serve")
    command.add_argument("--tp", "--tensor-parallel-size", dest="tensor_parallel_size", type=int, help="as for vllm serve")
    command.add_argument("--revision", help="as for vllm serve")
    command.add_argument("--trust-remote-code", action="store_true", default=None, help="as for vllm serve")


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those options that the user gave; vLLM's defaults stand for the others."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _logs_to_stderr(level: str | None = None) -> None:
    """Before vLLM is imported: standard output is the result's. ``level``: what is logged where the user does not say."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if level is not None:
        level = os.environ.setdefault("VLLM_LOGGING_LEVEL", level)
        logging.getLogger("vllm").setLevel(level.upper())  # vLLM reads the variable only when it makes a configuration


def _print_json(result: object) -> None:
    print(json.dumps(result, indent=2))


def _plan(given: argparse.Namespace) -> int:
    _logs_to_stderr("ERROR")
    from . import compat, register

    register()
    if not compat.active():
        return 1
    from .planner import Wanted, plan, words

    engine = _given(given, *_ENGINE, "gpu_memory_utilization", "max_num_batched_tokens", "block_size")
    wanted = Wanted(engine, given.gpu_memory, given.kv_cache_memory)
    try:
        result = plan(wanted)
    except (ValueError, OSError) as error:  # vLLM's of the model or the memory
        print(f"{ERROR} {words(error)}", file=sys.stderr)
        return 1
    if given.json:
        _print_json(asdict(result))
    else:
        print(plan_text(result))
    return 0


def _doctor(given: argparse.Namespace) -> int:
    _logs_to_stderr("ERROR")
    if given.url is not None:
        from .doctor_server import server_facts

        facts = server_facts(given.url)
    else:
        from .doctor import local_facts

        facts = local_facts()
    failed = any(fact.state == "failed" for fact in facts)
    if given.json:
        _print_json({"serves": not failed, "facts": [asdict(fact) for fact in facts]})
    else:
        print(doctor_text(facts, running=given.url is not None))
    return int(failed)


def _calibrate(given: argparse.Namespace) -> int:
    _logs_to_stderr()
    from .calibrate import calibrate

    file = calibrate(_given(given, *_ENGINE, "gpu_memory_utilization"), given.output)
    if file is None:
        print(f"{ERROR} {given.model} was not calibrated; the lines above say why", file=sys.stderr)
        return 1
    if given.json:
        _print_json({"model": given.model, "file": str(file)})
    else:
        print(f"Calibration file: {file}")
    return 0


def _evaluate(given: argparse.Namespace) -> int:
    from .evaluation.calibrate import served_model
    from .evaluation.codecs import NAMES
    from .evaluation.run import all_cases, rows

    unknown = sorted(set(given.only or ()) - set(NAMES))
    if unknown:
        print(f"{ERROR} --only {' '.join(unknown)}: allowed are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    cases = [case for case in all_cases() if not given.only or case.name in given.only]
    try:
        model, bases = served_model(given.model, cases, given.served)
        made = rows(model, Path(given.model).name, cases, given.contexts, bases, given.tokens)
        if given.json:
            _print_json(list(made))
            return 0
        print(evaluation_line(None))
        for row in made:
            print(evaluation_line(row), flush=True)
    except (ValueError, OSError) as error:  # transformers' of the folder; ours of attention that is not read, of too little text
        print(f"{ERROR} {given.model}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    model = getattr(given, "model", "")
    # Else libraries take what is plainly a path for a name on a hub, and say what names look like.
    if model.startswith(("/", "./", "../", "~")) and not Path(model).exists():
        print(f"{ERROR} MODEL {model}: there is no such folder", file=sys.stderr)
        return 2
    try:
        return int(given.run(given))
    except TurboQuantError as error:
        sentence = str(error)
    except ImportError as error:  # vLLM, torch or transformers
        sentence = f"{error}; vllm-turboquant doctor says what is missing and the cure"
    print(f"{ERROR} {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
