"""Tiny models of `server/test_kinds.py` and `server/test_features.py` in bf16 on a card: engines, and how near answers are."""

import statistics

import pytest
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from ..server.answers import parting
from ..server.features import Jobs
from ..server.test_engines import deviations
from ..server.test_kinds import K4V4, LLM, OPTIONS, STATES
from .engines import LOSSLESS

DTYPES = ("auto", LOSSLESS, K4V4)
CARD = LLM | {"dtype": "bfloat16", "kv_cache_memory_bytes": 64 << 20}
CARD_OPTIONS = {
    # The other one is compiled by flashinfer, for minutes.
    "qwen 3 next": {"additional_config": {"gdn_prefill_backend": "triton"}},
    "jamba": STATES,
}
# Decodes replay from graphs; without a compiler, which these models would wait for.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
# bf16 keeps 8 bits: attention that is rounded at other places moves most log-probabilities of these models by a few hundredths,
# and a token whose two best experts are equally good by more. Two tokens that are both moved change places at twice as much.
TOLERANCE = 0.1


class Engines(Jobs):
    """Those of one test: ``run`` starts them in one process, and results are by name."""

    def each(self, kind, job=None, dtypes=DTYPES, **llm):
        """One engine a dtype, named by it."""
        for kv in dtypes:
            self.add(kv, kind, kv, job, **OPTIONS.get(kind, {}) | CARD_OPTIONS.get(kind, {}) | llm)

    def run(self):
        return super().run(VLLM_USE_FLASHINFER_SAMPLER="0", OMP_NUM_THREADS="2")


def check_near(ours, plain):
    """Along the texts that two lists of answers have in common. Returns by how much log-probabilities moved on average."""
    moved = []
    for a, b in zip(ours, plain, strict=True):
        parted = parting(a["tokens"], b["tokens"])
        for key, common in (("prompt_logprobs", None), ("logprobs", parted)):
            moved += [abs(x - y) for x, y in zip(a[key][:common], b[key][:common], strict=True)]
        if parted is not None:
            assert b["gaps"][parted] < 2 * TOLERANCE, f"parted at token {parted}, which was {b['gaps'][parted]:.2g} ahead"
    print(f"log-probabilities moved by at most {max(moved):.2g}, by {statistics.mean(moved):.2g} on average")
    assert sorted(moved)[int(0.9 * len(moved))] < TOLERANCE
    return statistics.mean(moved)


def skip_without_large_heads():
    if get_flash_attn_version(head_size=512) != 4:
        pytest.skip("FlashAttention has no heads of 512 dims here")


def check(results):
    """Every layer in our pages, raw numbers near `auto`'s, codes further away: the comparison can fail."""
    for kv in (LOSSLESS, K4V4):
        assert set(results[kv]["layers"].values()) == {kv}
    raw = check_near(results[LOSSLESS]["answers"], results["auto"]["answers"])
    coded = statistics.mean(deviations(results, K4V4, "auto"))
    print(f"codes move them by {coded:.2g}")
    # Least where one layer of six attends, or within chunks: twice as much; elsewhere six times and more.
    assert coded > 1.5 * raw
