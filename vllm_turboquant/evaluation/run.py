"""Rows of fidelity figures: how far each cache moves a model's next-token distributions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from ..kernels.basis import KeyBasis
from .codecs import Case
from .metrics import Divergence
from .model import EvaluatedModel
from .texts import blocks

_LOGITS = 2**26  # of one chunk of positions: 256 MB of float32


def evaluate(
    model: EvaluatedModel,
    cases: Sequence[Case],
    texts: Sequence[torch.Tensor],
    bases: Sequence[KeyBasis] | None = None,
) -> list[dict[str, object]]:
    """Figures of each case on token sequences int64 ``[T]``, T at least 2; `Divergence.figures` and the case's own.

    bases: one a layer, for the calibrated cases. Every case reads **all** keys and values back from the cache, also those of
    the sequence's own prompt, which vLLM's prefill would read raw: "reads" is "compressed".
    """
    results = [Divergence() for _ in cases]
    for ids in texts:
        reference = model.hidden(ids, Case("auto"))
        hidden = [model.hidden(ids, case, bases) for case in cases]
        chunk = max(_LOGITS // model.model.get_output_embeddings().weight.shape[0], 1)
        for start in range(0, len(ids) - 1, chunk):
            rows = slice(start, min(start + chunk, len(ids) - 1))
            truth = model.logits(reference[rows])
            for result, x in zip(results, hidden, strict=True):
                result.add(truth, model.logits(x[rows]), ids[start + 1 : rows.stop + 1], start)
    return [
        {
            "name": case.name,
            "calibrated": case.calibrated,
            "skipped_layers": min(case.skipped, model.layers),
            "sinks": case.sinks,
            "window": case.window,
            "bytes_d128": round(case.bytes_d128(model.layers), 1),
            **result.figures(),
            "reads": "compressed",
        }
        for case, result in zip(cases, results, strict=True)
    ]


def evaluate_path(
    path: str,
    cases: Sequence[Case],
    contexts: Sequence[int],
    tokens: int = 8192,
    bases: Sequence[KeyBasis] | None = None,
    device: str | None = None,
) -> list[dict[str, object]]:
    """`evaluate` of the model in a folder on ``tokens`` held-out tokens at each context length."""
    model = EvaluatedModel(path, device)
    rows = []
    for context in contexts:
        for row in evaluate(model, cases, blocks(model.tokenizer, "held-out", tokens, context), bases):
            rows.append({"model": Path(path).name, **row, "context": context, "python": platform.python_version()})
    return rows
