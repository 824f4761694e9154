"""What works, what is refused and which test shows it: the registry behind README's table of kinds.

    python -m tests.support        writes the table (so does make figures)

``tests/test_support.py`` holds every row to tests that exist, and README to this registry.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- support: make figures -->\n", "<!-- end of support -->\n"
WORKS, REFUSED = "works", "refused"
UNTESTED = "not tested"


@dataclass(frozen=True)
class Kind:
    """One row. ``cpu``, ``card``: pytest node ids below tests/, without parameters where all of them count."""

    name: str
    outcome: str
    cpu: tuple[str, ...] = ()
    card: tuple[str, ...] = ()


GPU_ENGINE = "gpu/test_engine.py::test_every_attention_call_against_the_oracle"
REFUSALS = "plugin/test_refusals.py::test_refused_by_the_configuration"

KINDS = (
    Kind(
        "Head sizes 64, 128",
        WORKS,
        ("server/test_lossless.py::test_completion", "plugin/test_planning.py::test_every_head_size_and_kv_head_count"),
        ("gpu/test_decode.py::test_grid", "gpu/test_prefill.py::test_mixed_batch", GPU_ENGINE),
    ),
    Kind(
        "Head sizes 80, 96, 112, 192, 256: stored at their own width",
        WORKS,
        (
            "plugin/test_planning.py::test_every_head_size_and_kv_head_count",
            "plugin/test_views.py::test_store_and_load_on_vllm_views",
        ),
        ("gpu/test_decode.py::test_other_head_sizes", "gpu/test_store.py::test_codes_are_the_references"),
    ),
    Kind(
        "Head sizes that are no multiple of 16, or above 576",
        REFUSED,
        (f"{REFUSALS}[head size 24]", f"{REFUSALS}[head size 592]"),
    ),
    Kind("Head sizes above 256 on a GPU", REFUSED, ("plugin/test_refusals.py::test_models_on_a_gpu[head size]",)),
    Kind(
        "Sliding windows in all or some layers (Mistral, Gemma 3)",
        WORKS,
        ("server/test_engines.py::test_sliding_windows_and_mixed_head_sizes[gemma3]",),
        (f"{GPU_ENGINE}[turboquant, window]", "gpu/test_decode.py::test_pages_before_a_window_are_not_looked_up"),
    ),
    Kind(
        "Attention sinks (gpt-oss)",
        WORKS,
        ("kernels/test_reference.py::test_window_soft_cap_and_sinks",),
        ("gpu/test_decode.py::test_window_soft_cap_and_sinks", "gpu/test_prefill.py::test_mixed_batch"),
    ),
    Kind(
        "Soft-capped logits (Gemma 2)",
        WORKS,
        ("kernels/test_reference.py::test_window_soft_cap_and_sinks",),
        (f"{GPU_ENGINE}[turboquant, soft cap]",),
    ),
    Kind("ALiBi (BLOOM, some Falcons)", REFUSED, (f"{REFUSALS}[ALiBi always]", f"{REFUSALS}[ALiBi configured]")),
    Kind(
        "Mixed head sizes (Gemma 4)",
        WORKS,
        (
            "server/test_engines.py::test_sliding_windows_and_mixed_head_sizes[gemma4]",
            "plugin/test_planning.py::test_mixed_head_sizes_pad_nothing",
        ),
    ),
    Kind(
        "Layers that share another layer's cache on a GPU",
        REFUSED,
        ("plugin/test_refusals.py::test_models_on_a_gpu[shared cache]",),
    ),
    Kind(
        "MLA (DeepSeek)",
        REFUSED,
        (f"{REFUSALS}[MLA]", "plugin/test_refusals.py::test_refused_by_llm[MLA]"),
    ),
    Kind("Encoder-decoder models (Whisper)", REFUSED, (f"{REFUSALS}[encoder-decoder]",)),
    Kind("Encoder-only models (BERT)", REFUSED, (f"{REFUSALS}[encoder-only]",)),
    Kind("Models without attention (Mamba)", REFUSED, (f"{REFUSALS}[attention-free]",)),
    Kind("Bidirectional multimodal prefix (Gemma 3 with images)", REFUSED, (f"{REFUSALS}[image prefix]",)),
    Kind(
        "Skipped layers, by index and by type",
        WORKS,
        (
            "server/test_engines.py::test_skipped_layers_are_not_compressed",
            "plugin/test_selection.py::test_skipped_layers_keep_vllms_backend",
            "plugin/test_planning.py::test_skipped_layers_are_counted_at_their_own_size",
        ),
    ),
    Kind(
        "Speculation by n-grams",
        WORKS,
        (
            "server/test_parallel.py::test_ngram_speculation",
            "server/test_schedules.py::test_every_answer_is_that_of_the_request_alone",
        ),
        ("gpu/test_engine.py::test_speculation_changes_no_more_than_autos[ngram]",),
    ),
    Kind(
        "Speculation by a draft model",
        WORKS,
        (),
        (
            "gpu/test_engine.py::test_speculation_changes_no_more_than_autos[draft model]",
            f"{GPU_ENGINE}[lossless, draft model]",
        ),
    ),
    Kind(
        "Prefix caching, chunked prefill",
        WORKS,
        (
            "server/test_lossless.py::test_prompt_of_several_prefill_chunks_and_its_prefix_cache_hit",
            "server/test_k4v4.py::test_prefix_cache_hit",
        ),
        ("gpu/test_engine.py::test_lossless_codec_follows_auto",),
    ),
    Kind(
        "Preemption",
        WORKS,
        ("server/test_lossless.py::test_preemption", "server/test_schedules.py::test_every_answer_is_that_of_the_request_alone"),
        ("gpu/test_server.py::test_preempted_answers_are_as_close_to_solo_ones_as_autos",),
    ),
    Kind("Priority scheduling", WORKS, ("server/test_schedules.py::test_every_answer_is_that_of_the_request_alone",)),
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
    Kind("Decode context parallelism", REFUSED, (f"{REFUSALS}[DCP]", f"{REFUSALS}[DCP and TP]")),
    Kind("Sleep mode on a GPU", REFUSED, ("plugin/test_refusals.py::test_sleep_mode_on_a_gpu",)),
    Kind(
        "LMCache, as a connector or for offloading",
        REFUSED,
        (f"{REFUSALS}[LMCache]", f"{REFUSALS}[LMCache inside]", f"{REFUSALS}[LMCache offloading]"),
    ),
    Kind("An attention backend of the user's choice", REFUSED, (f"{REFUSALS}[backend]", f"{REFUSALS}[backend per kind]")),
    Kind(
        "vLLM's own TurboQuant dtypes on a CPU",
        REFUSED,
        (f"{REFUSALS}[built-in 4bit_nc]",),
    ),
)


def _cell(tests: tuple[str, ...]) -> str:
    return "<br>".join(f"`{test}`" for test in tests) or UNTESTED


def section() -> str:
    """What stands between the markers in README.md."""
    lines = ["| kind | | on a CPU | on a card |", "|---|---|---|---|"]
    lines += [f"| {kind.name} | {kind.outcome} | {_cell(kind.cpu)} | {_cell(kind.card)} |" for kind in KINDS]
    return "".join(f"{line}\n" for line in lines)


def with_section(readme: str) -> str:
    head, rest = readme.split(BEGIN)
    return head + BEGIN + section() + END + rest.split(END)[1]


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_section(readme.read_text()))


if __name__ == "__main__":
    main()
