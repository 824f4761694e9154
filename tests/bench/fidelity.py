"""Fidelity rows of real models: `vllm_turboquant.evaluation` of a folder in Hugging Face format, on a card or a CPU.

    python -m tests.bench.fidelity MODEL [--contexts 512 4096] [--tokens 8192] [--served 8192] [--only NAME ...]
    python -m tests.bench.fidelity MODEL --needle 4096 8192 [--only NAME ...]     presets as installed, a text a length
    python -m tests.bench.fidelity MODEL --generate 512 [--only NAME ...]

Appends to ``fidelity_<model>.jsonl``, ``needle_<model>.jsonl`` or ``generation_<model>.jsonl`` in results/. Calibrated cases use
bases that are fitted here, on the calibration half of the texts, for a context of ``--served`` tokens; the others subtract the
key bias that weights tell, as engines without calibration do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from vllm_turboquant.evaluation import Case, agreements, retrieval
from vllm_turboquant.evaluation.calibrate import served_model
from vllm_turboquant.evaluation.run import all_cases, rows
from vllm_turboquant.kernels.format import PRESETS
from vllm_turboquant.texts import blocks

from .rows import write_row

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPTS, PROMPT = 8, 128  # held-out texts to go on from, and tokens of each


def as_installed(case: Case) -> bool:
    return case.calibrated and not case.sinks and case.window == PRESETS[case.name].recent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens at each context")
    parser.add_argument("--served", type=int, default=8192, help="context that the calibration is spread over")
    parser.add_argument("--needle", type=int, nargs="+", metavar="LENGTH", help="needle retrieval instead of divergence")
    parser.add_argument("--generate", type=int, metavar="TOKENS", help="agreement of long greedy texts instead of divergence")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="dtypes; default all")
    arguments = parser.parse_args()
    chosen = [case for case in all_cases() if not arguments.only or case.name in arguments.only]
    if arguments.needle:
        chosen = [case for case in chosen if case.name not in PRESETS or as_installed(case)]
    (model, bases), name = served_model(arguments.model, chosen, arguments.served), Path(arguments.model).name
    card = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    common = {"served": arguments.served, "card": card, "torch": torch.__version__, "transformers": transformers.__version__}
    if arguments.needle:
        for case, found in zip(chosen, retrieval(model, chosen, arguments.needle, DEPTHS, bases), strict=True):
            figures = {"lengths": arguments.needle, "depths": DEPTHS, "found": found, "reads": "compressed", "prefill": "raw"}
            print(write_row(f"needle_{name}", {"model": name, **vars(case), **figures, **common}), flush=True)
        return
    if arguments.generate:
        prompts = [ids[:PROMPT] for ids in blocks(model.tokenizer, "held-out", PROMPTS * 512, 512)]
        for case, found in zip(chosen, agreements(model, chosen, prompts, arguments.generate, bases), strict=True):
            row = {"model": name, **vars(case), "prompts": PROMPTS, "prompt": PROMPT, **vars(found), "reads": "compressed"}
            print(write_row(f"generation_{name}", {**row, **common}), flush=True)
        return
    for row in rows(model, name, chosen, arguments.contexts, bases, arguments.tokens):
        print(write_row(f"fidelity_{name}", {**row, **common}), flush=True)


if __name__ == "__main__":
    main()
