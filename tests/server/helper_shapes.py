"""Tiny models that serve to show something else than their own kind, as `shapes.py` has kinds."""

from __future__ import annotations

from typing import Any

from .shapes import COMMON, LLAMA, SHAPES

# So few tokens that a draft of random weights is right now and then.
_FEW = {"vocab_size": 16}
_TARGET = LLAMA | _FEW | {"num_hidden_layers": 8}
_DRAFT = _TARGET | {"num_hidden_layers": 1}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_PACKED = LLAMA | {"hidden_size": 256, "intermediate_size": 256}

HELPERS: dict[str, dict[str, Any]] = {
    "gpt-oss, loud key biases": SHAPES["gpt-oss"] | {"amplified": {"layers.1.attn.qkv_proj.bias": 6.0}},
    "target": _TARGET,
    "drafter": _DRAFT,
    "eagle": _DRAFT | {"architectures": ["EagleLlamaForCausalLM"]},
    "eagle 3": _DRAFT | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 16},
    "glm 4 moe": COMMON
    | _FEW
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "num_nextn_predict_layers": 1,
        "head_dim": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.5,
        "hidden_act": "silu",
    },
    # Its drafts are made over the target's own cache.
    "gemma 4 assistant": {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": 64,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "text_config": SHAPES["gemma 4"]
        | {
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 0,
        },
    },
    "awq": _PACKED
    | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}},
    "gptq": _PACKED
    | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}},
    "fp8": LLAMA
    | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": _FP8 | {"strategy": "channel", "dynamic": False},
                    "input_activations": _FP8 | {"strategy": "token", "dynamic": True},
                }
            },
            "ignore": ["lm_head"],
        }
    },
    "own cache": LLAMA
    | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "kv_cache_scheme": _FP8 | {"strategy": "tensor", "dynamic": False},
            "config_groups": {},
            "ignore": ["lm_head"],
        }
    },
    "words": LLAMA | {"vocab_size": 49152},  # SmolLM2's
    # vLLM has no kernel of its states on a CPU.
    "jamba": COMMON
    | {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 16,
        "amplified": {"o_proj": 8.0},  # beside states, attention says little
    },
}


def seeing(words: int, image: int, size: int, patch: int, scale: int) -> dict[str, Any]:
    """Idefics 3 over a vocabulary of ``words``, with ``image`` the token of its images."""
    vision = {
        "model_type": "idefics3_vision",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": patch,
    }
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "text_config": LLAMA | {"vocab_size": words},
        "vision_config": vision,
        "image_token_id": image,
        "scale_factor": scale,
        "dtype": "float32",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
