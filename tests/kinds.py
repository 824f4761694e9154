"""The registry behind README's table of kinds: what works, what is refused and which test shows it."""

from __future__ import annotations

from dataclasses import dataclass

WORKS, REFUSED, PLANNED, UNTESTED = "works", "refused", "starts", "not tested"


@dataclass(frozen=True)
class Kind:
    """One row. ``cpu``, ``card``: pytest node ids below tests/, without parameters where all of them count."""

    name: str
    outcome: str
    cpu: tuple[str, ...] = ()
    card: tuple[str, ...] = ()


ORACLE = "gpu/test_engine.py::test_every_attention_call_against_the_oracle"
REFUSALS = "plugin/test_refusals.py::test_refused_by_the_configuration"
ON_GPU = "plugin/test_refusals.py::test_models_on_a_gpu"
ANSWERS = "server/test_kinds.py::test_answers"
CAPACITY = "server/test_kinds.py::test_capacity"
SPECULATION = "server/test_features.py::test_speculation"
SCHEDULES = "server/test_schedules.py::test_every_answer_is_that_of_the_request_alone"
ORDINARY = ("head 80, MHA", "head 96, MQA", "head 112", "head 192", "head 256")


def _of(test: str, *cases: str) -> tuple[str, ...]:
    return tuple(f"{test}[{case}]" for case in cases)


MODELS = (
    Kind(
        "Head sizes 64, 128",
        WORKS,
        ("server/test_lossless.py::test_completion", *_of(ANSWERS, "head 128")),
        ("gpu/test_decode.py::test_grid", "gpu/test_prefill.py::test_mixed_batch", f"{ORACLE}[turboquant]"),
    ),
    Kind(
        "Head sizes 80, 96, 112, 192, 256 at their own width; MHA, GQA, MQA",
        WORKS,
        (*_of(ANSWERS, *ORDINARY), *_of(CAPACITY, *ORDINARY)),
        ("gpu/test_decode.py::test_other_head_sizes", "gpu/test_store.py::test_codes_are_the_references"),
    ),
    Kind("Head sizes that are no multiple of 16, or above 576", REFUSED, _of(REFUSALS, "head size 24", "head size 592")),
    Kind("Head sizes above 256, float32, on a GPU", REFUSED, _of(ON_GPU, "head size", "float32")),
    Kind(
        "Sliding windows in all or some layers (Mistral, Gemma 3)",
        WORKS,
        (
            *_of(ANSWERS, "gemma 3"),
            "server/test_engines.py::test_sliding_windows_and_mixed_head_sizes[gemma3]",
            "kernels/test_reference.py::test_bytes_that_a_request_does_not_own_never_matter",
        ),
        (f"{ORACLE}[turboquant, window]", "gpu/test_decode_edges.py::test_pages_before_a_window_are_not_looked_up"),
    ),
    Kind(
        "Attention within chunks (Llama 4): keys are not calibrated",
        WORKS,
        (*_of(ANSWERS, "llama 4"), *_of("server/test_kinds.py::test_line_after_start", "llama 4")),
    ),
    Kind(
        "Attention sinks (gpt-oss)",
        WORKS,
        _of(ANSWERS, "gpt-oss"),
        ("gpu/test_decode.py::test_window_soft_cap_and_sinks", "gpu/test_prefill.py::test_mixed_batch"),
    ),
    Kind(
        "Key biases that cannot be subtracted, without calibration: layers whose logits they would blur are not compressed",
        WORKS,
        (
            "server/test_key_noise.py::test_the_loud_layer_alone_is_left_out",
            "plugin/test_key_noise.py::test_noise_is_what_codes_add",
        ),
    ),
    Kind("Soft-capped logits (Gemma 2)", WORKS, _of(ANSWERS, "gemma 2"), (f"{ORACLE}[turboquant, soft cap]",)),
    Kind("ALiBi (BLOOM, some Falcons)", REFUSED, _of(REFUSALS, "ALiBi always", "ALiBi configured", "ALiBi by its encoding")),
    Kind(
        "Mixed head sizes (Gemma 4)",
        WORKS,
        (*_of(ANSWERS, "gemma 4"), *_of(CAPACITY, "gemma 4"), "plugin/test_planning.py::test_mixed_head_sizes_pad_nothing"),
    ),
    Kind(
        "Layers that share another layer's cache (Gemma 3n, Gemma 4), on a CPU",
        WORKS,
        (*_of(ANSWERS, "gemma 3n", "gemma 4"), *_of(CAPACITY, "gemma 3n"), "server/test_kinds.py::test_shared_layers_write_once"),
    ),
    Kind("The same on a GPU", REFUSED, _of(ON_GPU, "shared cache")),
    Kind(
        "Hybrids: Qwen3-Next, Nemotron-H; states are vLLM's own, keys are not calibrated",
        WORKS,
        (
            *_of(ANSWERS, "qwen 3 next", "nemotron h"),
            "server/test_features.py::test_prefixes_beside_states",
            "plugin/test_planning.py::test_hybrid_pages_unify_with_little_padding",
            "plugin/test_planning.py::test_padding_of_hybrids",
        ),
    ),
    Kind(
        "Hybrids: Jamba, states padded by 3.1% (vLLM has no such kernel on a CPU)",
        PLANNED,
        ("plugin/test_planning.py::test_padding_of_hybrids",),
    ),
    Kind("MLA (DeepSeek)", REFUSED, (*_of(REFUSALS, "MLA"), "plugin/test_refusals_cli.py::test_last_line_is_the_sentence[MLA]")),
    Kind("Mixture of experts (Mixtral, Qwen3-MoE)", WORKS, _of(ANSWERS, "mixtral", "qwen 3 moe")),
    Kind("Bidirectional multimodal prefix (Gemma 3 with images)", REFUSED, _of(REFUSALS, "image prefix")),
    Kind("Encoder-decoder models (Whisper)", REFUSED, _of(REFUSALS, "encoder-decoder")),
    Kind("Encoder-only models (BERT)", REFUSED, _of(REFUSALS, "encoder-only")),
    Kind(
        "Encoder layers inside a decoder model",
        REFUSED,
        ("plugin/test_selection.py::test_layers_without_format_are_refused",),
    ),
    Kind("Diffusion models (DiffusionGemma)", REFUSED, _of(REFUSALS, "diffusion")),
    Kind("Models without attention (Mamba)", REFUSED, _of(REFUSALS, "attention-free")),
    Kind(
        "AWQ and GPTQ checkpoints",
        WORKS,
        _of("server/test_features.py::test_quantised_weights", "awq", "gptq"),
    ),
    Kind(
        "fp8 checkpoints (of compressed-tensors; vLLM's kernels for others want a CPU with AMX)",
        WORKS,
        (
            *_of("server/test_features.py::test_quantised_weights", "fp8"),
            "plugin/test_planner.py::test_quantised_weights_without_kernels_here",
        ),
    ),
    Kind(
        "Multimodal models whose images are attended causally (Idefics 3): keys are not calibrated",
        WORKS,
        ("server/test_features.py::test_images",),
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
FEATURES = (
    Kind(
        "Skipped layers, by index and by type, beside windows too",
        WORKS,
        (
            "server/test_features.py::test_skipped_layers",
            "server/test_engines.py::test_skipped_layers_are_not_compressed",
            "plugin/test_summary.py::test_pages_beside_skipped_layers",
        ),
    ),
    Kind(
        "Skipped layers that do not exist; all layers skipped",
        REFUSED,
        _of(
            REFUSALS,
            "skipped layer that is none",
            "skipped kind that is none",
            "all layers skipped",
            "all windows skipped",
            "all attention of a hybrid skipped",
        ),
    ),
    Kind(
        "Speculation by n-grams, drafts of 1, 3, 7",
        WORKS,
        (*_of(SPECULATION, "ngram, 1", "ngram, 3", "ngram, 7"), "server/test_parallel.py::test_ngram_speculation", SCHEDULES),
        _of("gpu/test_engine.py::test_speculation_changes_no_more_than_autos", "ngram"),
    ),
    Kind(
        "Speculation by a draft model, drafts of 1, 3, 7",
        WORKS,
        _of(SPECULATION, "draft model, 1", "draft model, 3", "draft model, 7"),
        (
            *_of("gpu/test_engine.py::test_speculation_changes_no_more_than_autos", "draft model"),
            f"{ORACLE}[lossless, draft model]",
        ),
    ),
    Kind("EAGLE, EAGLE 3 and MTP (GLM-4 MoE)", WORKS, _of(SPECULATION, "eagle, 3", "eagle3, 3", "mtp, 3")),
    Kind(
        "Drafters without causal mask (DFlash)",
        REFUSED,
        _of(REFUSALS, *(f"drafter without causal mask{how}" for how in ("", " by its name", " by its flag"))),
    ),
    Kind(
        "Prefix caching, chunked prefill",
        WORKS,
        (
            "server/test_features.py::test_prefixes",
            "server/test_lossless.py::test_prompt_of_several_prefill_chunks_and_its_prefix_cache_hit",
            "server/test_k4v4.py::test_prefix_cache_hit",
        ),
        ("gpu/test_engine.py::test_lossless_codec_follows_auto",),
    ),
    Kind("Embeddings of decoder models", WORKS, ("server/test_features.py::test_embeddings",)),
    Kind(
        "Preemption",
        WORKS,
        ("server/test_lossless.py::test_preemption", "server/test_features.py::test_preemption", SCHEDULES),
        ("gpu/test_server.py::test_preempted_answers_are_as_close_to_solo_ones_as_autos",),
    ),
    Kind("Priority scheduling", WORKS, (SCHEDULES,)),
    Kind("Structured output", WORKS, ("server/test_features.py::test_grammar",)),
    Kind("LoRA adapters: keys are not calibrated", WORKS, ("server/test_features.py::test_adapter",)),
    Kind(
        "Log-probabilities of answers and prompts",
        WORKS,
        ("server/test_lossless.py::test_logprobs_of_a_given_text", "server/test_lossless.py::test_completion"),
        ("gpu/test_quality.py::test_lossless_codec_adds_nothing",),
    ),
    Kind(
        "Tensor parallelism",
        WORKS,
        ("server/test_parallel.py::test_tensor_parallel", "server/test_parallel.py::test_ranks_calibrate_their_own_heads"),
    ),
    Kind(
        "Pipeline parallelism: keys are not calibrated (vLLM on a CPU does not take --enforce-eager with it)",
        WORKS,
        _of("server/test_parallel.py::test_pipeline_stages", "lossless", "default"),
    ),
    Kind("Data parallelism", WORKS, ("server/test_parallel.py::test_replicas",)),
    Kind("Decode context parallelism", REFUSED, _of(REFUSALS, "DCP", "DCP and TP")),
    Kind("Sleep mode on a GPU (vLLM has none on a CPU)", REFUSED, ("plugin/test_refusals.py::test_sleep_mode_on_a_gpu",)),
    Kind(
        "Weights read again, prefix cache reset",
        WORKS,
        ("server/test_features.py::test_weights_read_again", "server/test_features.py::test_prefixes"),
    ),
    Kind("Shared storage of pages (ExampleConnector)", WORKS, ("server/test_features.py::test_shared_storage",)),
    Kind(
        "Shared storage of another preset, format, model dtype or calibration",
        REFUSED,
        ("plugin/test_refusals.py::test_shared_storage_of_other_pages",),
    ),
    Kind("A connector with a calibration that other servers do not have", REFUSED, _of(REFUSALS, "calibration shared")),
    Kind(
        "Native KV offloading (vLLM has none on a CPU)",
        PLANNED,
        ("plugin/test_offloading.py::test_blocks_come_back_elsewhere",),
    ),
    Kind(
        "Tiers behind native offloading (files, objects), where a calibration is not told from another",
        REFUSED,
        _of(REFUSALS, "tier", "tier inside", "tier without connector"),
    ),
    Kind(
        "NIXL (the server test runs where nixl is installed); its handshake refuses another preset, format or calibration",
        WORKS,
        ("server/test_nixl.py::test_prefilled_elsewhere", "plugin/test_offloading.py::test_nixl_tells_calibrations_apart"),
    ),
    Kind(
        "LMCache, as a connector or for offloading",
        REFUSED,
        _of(REFUSALS, "LMCache", "LMCache inside", "LMCache offloading"),
    ),
    Kind(
        "Other connectors: Mooncake, FlexKV, HF3FS, MoRIIO and those of third parties",
        REFUSED,
        _of(REFUSALS, "another connector", "another connector inside"),
    ),
    Kind("An attention backend of the user's choice", REFUSED, _of(REFUSALS, "backend", "backend per kind")),
    Kind("vLLM's own TurboQuant dtypes on a CPU", REFUSED, _of(REFUSALS, "built-in 4bit_nc", "built-in k8v4")),
)
KINDS = MODELS + FEATURES
