"""Kinds of models."""

from __future__ import annotations

from .kind import ANSWERS, CAPACITY, CARD_ANSWERS, ON_GPU, ORACLE, ORDINARY, REFUSALS, REFUSED, WORKS, Kind, of

MODELS = (
    Kind(
        "Head sizes 64, 128",
        WORKS,
        ("server/test_lossless.py::test_completion", *of(ANSWERS, "head 128")),
        ("gpu/test_decode.py::test_grid", "gpu/test_prefill.py::test_mixed_batch", f"{ORACLE}[turboquant]"),
    ),
    Kind(
        "Head sizes 80, 96, 112, 192, 256 at their own width; MHA, GQA, MQA",
        WORKS,
        (*of(ANSWERS, *ORDINARY), *of(CAPACITY, *ORDINARY)),
        (
            "gpu/test_decode.py::test_other_head_sizes",
            "gpu/test_store.py::test_codes_are_the_references",
            *of(CARD_ANSWERS, *ORDINARY),
        ),
    ),
    Kind("Head sizes that are no multiple of 16, or above 576", REFUSED, of(REFUSALS, "head size 24", "head size 592")),
    Kind(
        "Head sizes above 256 on a GPU, Hopper excepted (FlashAttention 4); above 512 or float32 on any",
        REFUSED,
        of(ON_GPU, "large heads elsewhere", "large heads in some layers", "head size", "float32"),
    ),
    Kind(
        "Sliding windows in all or some layers (Mistral, Gemma 3)",
        WORKS,
        (
            *of(ANSWERS, "gemma 3"),
            "server/test_engines.py::test_sliding_windows_and_mixed_head_sizes[gemma3]",
            "kernels/test_reference.py::test_bytes_that_a_request_does_not_own_never_matter",
        ),
        (
            f"{ORACLE}[turboquant, window]",
            "gpu/test_decode_edges.py::test_pages_before_a_window_are_not_looked_up",
            *of(CARD_ANSWERS, "gemma 3"),
        ),
    ),
    Kind(
        "Attention within chunks (Llama 4): keys are not calibrated",
        WORKS,
        (*of(ANSWERS, "llama 4"), *of("server/test_kinds.py::test_line_after_start", "llama 4")),
        of(CARD_ANSWERS, "llama 4"),
    ),
    Kind(
        "Attention sinks (gpt-oss)",
        WORKS,
        of(ANSWERS, "gpt-oss"),
        (
            "gpu/test_decode.py::test_window_soft_cap_and_sinks",
            "gpu/test_prefill.py::test_mixed_batch",
            *of(CARD_ANSWERS, "gpt-oss"),
        ),
    ),
    Kind(
        "Key biases that cannot be subtracted, without calibration: layers whose logits they would blur are not compressed",
        WORKS,
        (
            "server/test_key_noise.py::test_the_loud_layer_alone_is_left_out",
            "plugin/test_key_noise.py::test_noise_is_what_codes_add",
        ),
        ("gpu/test_models.py::test_loud_key_biases",),
    ),
    Kind(
        "Soft-capped logits (Gemma 2)",
        WORKS,
        of(ANSWERS, "gemma 2"),
        (f"{ORACLE}[turboquant, soft cap]", *of(CARD_ANSWERS, "gemma 2")),
    ),
    Kind("ALiBi (BLOOM, some Falcons)", REFUSED, of(REFUSALS, "ALiBi always", "ALiBi configured", "ALiBi by its encoding")),
    Kind(
        "Mixed head sizes (Gemma 4)",
        WORKS,
        (*of(ANSWERS, "gemma 4"), *of(CAPACITY, "gemma 4"), "plugin/test_planning.py::test_mixed_head_sizes_pad_nothing"),
        of(CARD_ANSWERS, "gemma 4"),
    ),
    Kind(
        "Layers that share another layer's cache (Gemma 3n, Gemma 4), with `--kv-sharing-fast-prefill` too",
        WORKS,
        (
            *of(ANSWERS, "gemma 3n", "gemma 4"),
            *of(CAPACITY, "gemma 3n"),
            "server/test_kinds.py::test_shared_layers_write_once",
            "server/test_features.py::test_prompts_that_pass_shared_layers_by",
        ),
        (*of(CARD_ANSWERS, "gemma 3n"), "gpu/test_models.py::test_shared_layers_without_prompts"),
    ),
    Kind(
        "Hybrids: Qwen3-Next, Nemotron-H; states are vLLM's own, keys are not calibrated",
        WORKS,
        (
            *of(ANSWERS, "qwen 3 next", "nemotron h"),
            "server/test_features.py::test_prefixes_beside_states",
            "plugin/test_planning.py::test_hybrid_pages_unify_with_little_padding",
            "plugin/test_planning.py::test_padding_of_hybrids",
        ),
        (
            *of(CARD_ANSWERS, "qwen 3 next", "nemotron h"),
            "gpu/test_models.py::test_hybrids_start_with_any_preset_and_skipped_layers",
            "gpu/test_features.py::test_prefixes_beside_states",
        ),
    ),
    Kind(
        "Hybrids: Jamba, states padded by 3.1% (vLLM has no such kernel on a CPU)",
        WORKS,
        ("plugin/test_planning.py::test_padding_of_hybrids",),
        of(CARD_ANSWERS, "jamba"),
    ),
    Kind("MLA (DeepSeek)", REFUSED, (*of(REFUSALS, "MLA"), "plugin/test_refusals_cli.py::test_last_line_is_the_sentence[MLA]")),
    Kind(
        "Mixture of experts (Mixtral, Qwen3-MoE)",
        WORKS,
        of(ANSWERS, "mixtral", "qwen 3 moe"),
        of(CARD_ANSWERS, "mixtral", "qwen 3 moe"),
    ),
    Kind("Bidirectional multimodal prefix (Gemma 3 with images)", REFUSED, of(REFUSALS, "image prefix")),
    Kind("The same models with `--language-model-only`", WORKS, ("server/test_features.py::test_text_alone",)),
    Kind("Encoder-decoder models (Whisper)", REFUSED, of(REFUSALS, "encoder-decoder")),
    Kind("Encoder-only models (BERT)", REFUSED, of(REFUSALS, "encoder-only")),
    Kind(
        "Encoder layers inside a decoder model",
        REFUSED,
        ("plugin/test_selection.py::test_layers_without_format_are_refused",),
    ),
    Kind("Diffusion models (DiffusionGemma)", REFUSED, of(REFUSALS, "diffusion")),
    Kind("Models without attention (Mamba)", REFUSED, of(REFUSALS, "attention-free")),
    Kind(
        "AWQ and GPTQ checkpoints",
        WORKS,
        of("server/test_features.py::test_quantised_weights", "awq", "gptq"),
        of("gpu/test_models.py::test_quantised_weights", "awq", "gptq"),
    ),
    Kind(
        "fp8 checkpoints (of compressed-tensors; vLLM's kernels for others want a CPU with AMX)",
        WORKS,
        (
            *of("server/test_features.py::test_quantised_weights", "fp8"),
            "plugin/test_planner.py::test_quantised_weights_without_kernels_here",
        ),
        of("gpu/test_models.py::test_quantised_weights", "fp8"),
    ),
    Kind(
        "Multimodal models whose images are attended causally (Idefics 3): keys are not calibrated",
        WORKS,
        ("server/test_features.py::test_images",),
        ("gpu/test_models.py::test_images",),
    ),
    Kind(
        "Checkpoints with a KV cache of their own: the flag wins, a line says so",
        WORKS,
        (
            "server/test_features.py::test_checkpoint_with_a_cache_of_its_own",
            "plugin/test_summary.py::test_checkpoint_of_its_own_cache_is_overruled_with_a_line",
        ),
    ),
)
