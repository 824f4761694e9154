"""Tiny models with seeded random weights, for what SmolLM2 (9 query heads, 3 KV heads, full attention) cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,  # a random model with tied embeddings only repeats its input
    # Five times the usual spread: with the usual one attention hardly moves a random model's output, and a test of the
    # KV cache would see nothing.
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **COMMON, vocab_size=vocabulary, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64
    )


def _gemma3(vocabulary: int) -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        **COMMON,
        vocab_size=vocabulary,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=48,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )


def _gemma4(vocabulary: int) -> Any:
    """Two head sizes in one model: 64 in the sliding-window layers, 128 in the full ones."""
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **COMMON,
        vocab_size=vocabulary,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        global_head_dim=128,
        sliding_window=48,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
    )


KINDS = {"llama": _llama, "gemma3": _gemma3, "gemma4": _gemma4}


def write(kind: str, tokenizer_of: Path, out: Path) -> Path:
    """A model of ``kind`` in Hugging Face format, with the tokenizer of another model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = KINDS[kind](len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
