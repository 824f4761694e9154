"""Fidelity of KV-cache dtypes on real models, in transformers: no vLLM, no engine, any machine."""

from .codecs import NAMES, Case
from .generation import agreements
from .model import EvaluatedModel
from .needle import retrieval
from .run import evaluate

__all__ = ["NAMES", "Case", "EvaluatedModel", "agreements", "evaluate", "retrieval"]
