"""Tiny models with random weights, of the shapes that attention has in the field."""

from pathlib import Path

import torch
from filelock import FileLock

# Head size 128, group 4; weights large enough that attention is not flat.
_COMMON = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
}


def make(folder, kind):
    """The folder of a tiny model: "llama", "drafter" (its first layers, for draft-model speculation), "window" or "soft cap"."""
    import transformers as t

    path = Path(folder) / f"tiny-{kind.replace(' ', '-')}"
    with FileLock(f"{path}.lock"):
        if (path / "config.json").exists():
            return str(path)
        torch.manual_seed(0)
        if kind in ("llama", "drafter"):
            model = t.LlamaForCausalLM(t.LlamaConfig(num_hidden_layers=4, **_COMMON))
            if kind == "drafter":
                model.model.layers = model.model.layers[:2]
                model.config.num_hidden_layers = 2
        elif kind == "window":
            model = t.MistralForCausalLM(t.MistralConfig(num_hidden_layers=3, sliding_window=100, **_COMMON))
        else:  # a window in every other layer, logits capped in all
            extra = {"sliding_window": 100, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}
            extra["tie_word_embeddings"] = True  # the only kind there is
            model = t.Gemma2ForCausalLM(t.Gemma2Config(num_hidden_layers=4, query_pre_attn_scalar=128, **_COMMON | extra))
        model.to(torch.bfloat16).save_pretrained(path)
    return str(path)
