"""What vLLM does around a model."""

from __future__ import annotations

from .kind import CARD_SPECULATION, ORACLE, REFUSALS, REFUSED, SCHEDULES, SPECULATION, WORKS, Kind, of

FEATURES = (
    Kind(
        "Skipped layers, by index and by type, beside windows too",
        WORKS,
        (
            "server/test_features.py::test_skipped_layers",
            "server/test_engines.py::test_skipped_layers_are_not_compressed",
            "plugin/test_summary.py::test_pages_beside_skipped_layers",
        ),
        ("gpu/test_models.py::test_skipped_layers",),
    ),
    Kind(
        "Skipped layers that do not exist, or share a cache with others that are not skipped; all layers skipped",
        REFUSED,
        of(
            REFUSALS,
            "skipped layer that is none",
            "skipped kind that is none",
            "all layers skipped",
            "all windows skipped",
            "all attention of a hybrid skipped",
            "skipped layer whose cache another reads",
            "skipped layer that reads another's cache",
        ),
    ),
    Kind(
        "Speculation by n-grams, drafts of 1, 3, 7",
        WORKS,
        (*of(SPECULATION, "ngram, 1", "ngram, 3", "ngram, 7"), "server/test_parallel.py::test_ngram_speculation", SCHEDULES),
        (
            *of("gpu/test_engine.py::test_speculation_changes_no_more_than_autos", "ngram"),
            *of(CARD_SPECULATION, "ngram-1", "ngram-3", "ngram-7"),
        ),
    ),
    Kind(
        "Speculation by a draft model, drafts of 1, 3, 7",
        WORKS,
        of(SPECULATION, "draft model, 1", "draft model, 3", "draft model, 7"),
        (
            *of("gpu/test_engine.py::test_speculation_changes_no_more_than_autos", "draft model"),
            f"{ORACLE}[lossless, draft model]",
        ),
    ),
    Kind(
        "EAGLE, EAGLE 3 and MTP (GLM-4 MoE; Gemma 4, whose drafter reads the model's own cache)",
        WORKS,
        (
            *of(SPECULATION, "eagle, 3", "eagle3, 3", "mtp, 3", "mtp of gemma 4, 3"),
            "server/test_features.py::test_drafts_over_the_targets_cache",
        ),
        of(CARD_SPECULATION, *(f"{name}-{n}" for name in ("eagle", "eagle3", "mtp", "mtp of gemma 4") for n in (1, 3, 7))),
    ),
    Kind(
        "Drafters without causal mask (DFlash)",
        REFUSED,
        of(REFUSALS, *(f"drafter without causal mask{how}" for how in ("", " by its name", " by its flag"))),
    ),
    Kind(
        "Prefix caching, chunked prefill",
        WORKS,
        (
            "server/test_features.py::test_prefixes",
            "server/test_lossless.py::test_prompt_of_several_prefill_chunks_and_its_prefix_cache_hit",
            "server/test_k4v4.py::test_prefix_cache_hit",
        ),
        ("gpu/test_engine.py::test_lossless_codec_follows_auto", "gpu/test_features.py::test_prefixes"),
    ),
    Kind(
        "Embeddings of decoder models",
        WORKS,
        ("server/test_features.py::test_embeddings",),
        ("gpu/test_features.py::test_embeddings",),
    ),
    Kind(
        "Preemption",
        WORKS,
        ("server/test_lossless.py::test_preemption", "server/test_features.py::test_preemption", SCHEDULES),
        (
            "gpu/test_server.py::test_preempted_answers_are_as_close_to_solo_ones_as_autos",
            "gpu/test_features.py::test_preemption",
        ),
    ),
    Kind("Priority scheduling", WORKS, (SCHEDULES,), ("gpu/test_features.py::test_priorities",)),
    Kind("Structured output", WORKS, ("server/test_features.py::test_grammar",), ("gpu/test_features.py::test_grammar",)),
    Kind(
        "LoRA adapters: keys are not calibrated",
        WORKS,
        ("server/test_features.py::test_adapter",),
        ("gpu/test_features.py::test_adapter",),
    ),
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
        of("gpu/test_ranks.py::test_split_models", "tensor"),
    ),
    Kind(
        "Pipeline parallelism: keys are not calibrated (vLLM on a CPU does not take --enforce-eager with it)",
        WORKS,
        of("server/test_parallel.py::test_pipeline_stages", "lossless", "default"),
        of("gpu/test_ranks.py::test_split_models", "pipeline"),
    ),
    Kind("Data parallelism", WORKS, ("server/test_parallel.py::test_replicas",), ("gpu/test_ranks.py::test_replicas",)),
    Kind("Decode context parallelism", REFUSED, of(REFUSALS, "DCP", "DCP and TP")),
    Kind("Sleep mode, levels 1 and 2 (vLLM has none on a CPU)", WORKS, (), ("gpu/test_sleep.py::test_sleep",)),
    Kind(
        "Weights read again, prefix cache reset",
        WORKS,
        ("server/test_features.py::test_weights_read_again", "server/test_features.py::test_prefixes"),
        ("gpu/test_features.py::test_weights_read_again", "gpu/test_features.py::test_prefixes"),
    ),
    Kind(
        "Shared storage of pages (ExampleConnector)",
        WORKS,
        ("server/test_features.py::test_shared_storage",),
        of("gpu/test_features.py::test_blocks_come_back_from_elsewhere", "storage"),
    ),
    Kind(
        "Shared storage of another preset, format, model dtype or calibration",
        REFUSED,
        ("plugin/test_refusals.py::test_shared_storage_of_other_pages",),
    ),
    Kind("A connector with a calibration that other servers do not have", REFUSED, of(REFUSALS, "calibration shared")),
    Kind(
        "Native KV offloading (vLLM has none on a CPU)",
        WORKS,
        ("plugin/test_offloading.py::test_blocks_come_back_elsewhere",),
        of("gpu/test_features.py::test_blocks_come_back_from_elsewhere", "offloading"),
    ),
    Kind(
        "Tiers behind native offloading (files, objects), where a calibration is not told from another",
        REFUSED,
        of(REFUSALS, "tier", "tier inside", "tier without connector"),
    ),
    Kind(
        "NIXL (the server test runs where nixl is installed); its handshake refuses another preset, format or calibration",
        WORKS,
        ("server/test_nixl.py::test_prefilled_elsewhere", "plugin/test_offloading.py::test_nixl_tells_calibrations_apart"),
    ),
    Kind(
        "LMCache, as a connector or for offloading",
        REFUSED,
        of(REFUSALS, "LMCache", "LMCache inside", "LMCache offloading"),
    ),
    Kind(
        "Other connectors: Mooncake, FlexKV, HF3FS, MoRIIO and those of third parties",
        REFUSED,
        of(REFUSALS, "another connector", "another connector inside"),
    ),
    Kind("An attention backend of the user's choice", REFUSED, of(REFUSALS, "backend", "backend per kind")),
    Kind("vLLM's own TurboQuant dtypes on a CPU", REFUSED, of(REFUSALS, "built-in 4bit_nc", "built-in k8v4")),
)
