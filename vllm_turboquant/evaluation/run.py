"""Rows of fidelity figures: how far each cache moves a model's next-token distributions."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..kernels.basis import KeyBasis
from ..kernels.format import PRESETS
from ..texts import blocks
from .codecs import Case
from .metrics import Divergence
from .model import EvaluatedModel

_RIVALS = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
_SINKS, _WINDOW = 4, 64
_LOGITS = 2**26  # of one chunk of positions: 256 MB of float32


def all_cases() -> list[Case]:
    """Every dtype; vLLM's own TurboQuant also with the four layers that it keeps in bf16, ours with what a request may add."""
    rivals = [Case(name, skipped=skipped) for name in _RIVALS for skipped in (0, 4)]
    ours = [Case(name, calibrated) for name in PRESETS for calibrated in (False, True)]
    sinks = [Case(name, True, sinks=_SINKS) for name in ("turboquant", "turboquant-k4v3", "turboquant-k3v3")]
    window = [
        Case(name, calibrated, sinks=exact, window=_WINDOW)
        for name in ("turboquant-k3v3", "turboquant-k2v2")
        for calibrated, exact in ((False, 0), (True, 0), (True, _SINKS))
    ]
    return [Case("auto"), Case("fp8"), Case("int4_per_token_head"), *rivals, *ours, *sinks, *window]


def evaluate(
    path: str,
    cases: Sequence[Case],
    contexts: Sequence[int],
    calibration: Sequence[KeyBasis] | None = None,
    tokens: int = 8192,
    device: str | None = None,
) -> list[dict[str, object]]:
    """Rows of the model in a folder, on at least ``tokens`` held-out tokens at each context length.

    calibration: a layer's key basis each, for the calibrated cases. Keys of a row: model, name, calibrated, skipped_layers,
    sinks, window, bytes_d128, context, python (whose texts they are), reads, and those of `Divergence.figures`.
    """
    return list(rows(EvaluatedModel(path, device), Path(path).name, cases, contexts, calibration, tokens))


def rows(
    model: EvaluatedModel,
    name: str,
    cases: Sequence[Case],
    contexts: Sequence[int],
    calibration: Sequence[KeyBasis] | None,
    tokens: int,
) -> Iterator[dict[str, object]]:
    """`evaluate` of a loaded model, context by context."""
    for context in contexts:
        texts = blocks(model.tokenizer, "held-out", tokens, context)
        for case, result in zip(cases, divergences(model, cases, texts, calibration), strict=True):
            yield {
                "model": name,
                "name": case.name,
                "calibrated": case.calibrated,
                "skipped_layers": min(case.skipped, model.layers),
                "sinks": case.sinks,
                "window": case.window,
                "bytes_d128": round(case.bytes_d128(model.layers), 1),
                "context": context,
                **result.figures(),
                "reads": "compressed",
                "python": platform.python_version(),
            }


def divergences(
    model: EvaluatedModel,
    cases: Sequence[Case],
    texts: Sequence[torch.Tensor],
    calibration: Sequence[KeyBasis] | None = None,
) -> list[Divergence]:
    """Each case's divergence from dtype ``auto`` on token sequences int64 ``[T]``, T at least 2.

    Every case reads **all** keys and values back from the cache, also those of the sequence's own prompt, which vLLM's prefill
    would read raw.
    """
    results = [Divergence() for _ in cases]
    chunk = max(_LOGITS // model.model.get_output_embeddings().weight.shape[0], 1)
    bar = tqdm(total=len(texts) * (1 + len(cases)), unit="pass", disable=None)
    for ids in texts:
        passes = []
        for case in (Case("auto"), *cases):
            passes.append(model.hidden(ids, case, calibration))
            bar.update()
        reference, *hidden = passes
        for start in range(0, len(ids) - 1, chunk):
            part = slice(start, min(start + chunk, len(ids) - 1))
            truth = model.logits(reference[part])
            for result, x in zip(results, hidden, strict=True):
                result.add(truth, model.logits(x[part]), ids[start + 1 : part.stop + 1], start)
    bar.close()
    return results
