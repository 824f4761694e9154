"""Tiny models of the true architectures, as configurations alone: ``weights.py`` fills them with random numbers.

By name; each is what vLLM reads from a config.json of that kind of model.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
LLAMA = COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 64}
_WINDOW = 48
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_GEMMA = COMMON | {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 64,
    "sliding_window": _WINDOW,
    "layer_types": _ALTERNATING,
}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1}


def _llama(head_dim: int, kv_heads: int) -> dict[str, Any]:
    return LLAMA | {"head_dim": head_dim, "num_key_value_heads": kv_heads}


SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "head 80, MHA": _llama(80, 4),
    "head 96, MQA": _llama(96, 1),
    "head 112": _llama(112, 2),
    "head 128": _llama(128, 2),
    "head 192": _llama(192, 2),
    "head 256": _llama(256, 2),
    "gemma 2": _GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "gemma 3": _GEMMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
    "gemma 4": _GEMMA
    | {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 0,
    },
    "gemma 3n": _GEMMA
    | {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8,
        "altup_num_inputs": 4,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "tie_word_embeddings": True,
    },
    "gpt-oss": COMMON
    | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": 64,
        "num_hidden_layers": 4,
        "layer_types": _ALTERNATING,
        "sliding_window": _WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "mixtral": COMMON
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 64,
    },
    "qwen 3 moe": COMMON | _MOE | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 64},
    "nemotron h": COMMON
    | {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M*-M*-",
        "num_hidden_layers": 6,
        "attention_head_dim": 64,
        "head_dim": 64,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "chunk_size": 64,
        "mamba_hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "mlp_bias": False,
    },
    "qwen 3 next": COMMON
    | _MOE
    | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 32,
    },
    "llama 4": COMMON
    | {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "head_dim": 64,
        "num_hidden_layers": 4,
        "attention_chunk_size": 64,
        "interleave_moe_layer_step": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
        "no_rope_layers": [1, 1, 1, 0],
        "use_qk_norm": True,
        "hidden_act": "silu",
        "attn_temperature_tuning": False,
    },
}
