"""Kinds of models and what vLLM does around them, on a card: raw numbers in our pages answer as dtype `auto` does, codes nearly.

The tiny models of `server/test_kinds.py` and `server/test_features.py`, in bf16. Each test starts its engines in one process of
its own, half a minute for the first: run with ``-n 8``.
"""

import re
import statistics

import pytest

from vllm_turboquant.kernels.format import PRESETS

from .engines import LOSSLESS

pytest.importorskip("vllm")

from ..server import images
from ..server.features import CROWDED, REGEX, SEEING, SKIPPED, TARGET, UNCALIBRATED, Jobs, example_connector, speculative
from ..server.shapes import SHAPES, VOCABULARY
from ..server.test_engines import deviations
from ..server.test_kinds import K4V4, LLM, OPTIONS, lines, prompt
from ..server.weights import adapter, real_weights

pytestmark = pytest.mark.gpu
DTYPES = ("auto", LOSSLESS, K4V4)
CARD = LLM | {"dtype": "bfloat16", "kv_cache_memory_bytes": 64 << 20}
# Layers that read another layer's cache are refused on a GPU.
KINDS = (*(kind for kind in SHAPES if kind not in ("llama", "gemma 3n", "gemma 4")), "gemma 4, nothing shared")
# bf16 keeps 8 bits: attention that is rounded at other places moves most log-probabilities of these models by a few hundredths,
# and a token whose two best experts are equally good by more. Two tokens that are both moved change places at twice as much.
TOLERANCE = 0.1


class Engines(Jobs):
    """Those of one test: ``run`` starts them in one process, and results are by name."""

    def each(self, kind, job=None, dtypes=DTYPES, **llm):
        """One engine a dtype, named by it."""
        for kv in dtypes:
            self.add(kv, kind, kv, job, **OPTIONS.get(kind, {}) | llm)

    def run(self):
        return super().run(VLLM_USE_FLASHINFER_SAMPLER="0", OMP_NUM_THREADS="2")


@pytest.fixture
def engines(tmp_path, seed):
    return Engines(tmp_path, seed, CARD)


def check_near(ours, plain):
    """Along the texts that two lists of answers have in common. Returns by how much log-probabilities moved on average."""
    moved = []
    for a, b in zip(ours, plain, strict=True):
        parted = next((i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if x != y), None)
        for key, common in (("prompt_logprobs", None), ("logprobs", parted)):
            moved += [abs(x - y) for x, y in zip(a[key][:common], b[key][:common], strict=True)]
        if parted is not None:
            assert b["gaps"][parted] < 2 * TOLERANCE, f"parted at token {parted}, which was {b['gaps'][parted]:.2g} ahead"
    print(f"log-probabilities moved by at most {max(moved):.2g}, by {statistics.mean(moved):.2g} on average")
    assert sorted(moved)[int(0.9 * len(moved))] < TOLERANCE
    return statistics.mean(moved)


def check(results):
    """Every layer in our pages, raw numbers near `auto`'s, codes further away: the comparison can fail."""
    for kv in (LOSSLESS, K4V4):
        assert set(results[kv]["layers"].values()) == {kv}
    raw = check_near(results[LOSSLESS]["answers"], results["auto"]["answers"])
    coded = statistics.mean(deviations(results, K4V4, "auto"))
    print(f"codes move them by {coded:.2g}")
    assert coded > 3 * raw


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, engines):
    engines.each(kind)
    check(engines.run())


def test_hybrids_start_with_any_preset(engines):
    presets = [preset for preset in PRESETS if preset != K4V4]
    engines.each("qwen 3 next", dtypes=presets)
    results = engines.run()
    for preset in presets:
        assert set(results[preset]["layers"].values()) == {preset}
        assert all(len(answer["tokens"]) == 24 for answer in results[preset]["answers"])


def test_loud_key_biases(engines):
    kind = "gpt-oss, loud key biases"
    engines.add("auto", kind, "auto")
    engines.add("rule", kind, K4V4, **UNCALIBRATED)
    engines.add("by hand", kind, K4V4, kv_cache_dtype_skip_layers=["1"], **UNCALIBRATED)
    results = engines.run()
    (name,) = (name for name, preset in results["rule"]["layers"].items() if preset is None)
    assert ".1." in name
    check_near(results["rule"]["answers"], results["by hand"]["answers"])
    assert statistics.mean(deviations(results, "rule", "auto")) > 0.001  # the other layers' codes: 0.03 and more in float32


@pytest.mark.parametrize("kind", ("awq", "gptq", "fp8"))
def test_quantised_weights(kind, engines):
    engines.each(kind)
    check(engines.run())


def test_images(engines, smollm2):
    folder, image = images.write(engines.root, smollm2)
    before, after = prompt(engines.rng, 9), prompt(engines.rng, 70)
    asked = {"prompts": [[*before, image, *after]] * 2 + [prompt(engines.rng, 60)], "images": [1, 2, None]}
    engines.each("llama", asked, model=folder, **SEEING)
    results = engines.run()
    first, second, _ = results["auto"]["answers"]
    assert first["tokens"] != second["tokens"], "the model does not see"
    check(results)


@pytest.mark.parametrize("skip", SKIPPED)
def test_skipped_layers(skip, engines):
    engines.each("gemma 3", dtypes=("auto",))
    engines.each("gemma 3", dtypes=(LOSSLESS, K4V4), kv_cache_dtype_skip_layers=skip.split())
    results = engines.run()
    check_near(results[LOSSLESS]["answers"], results["auto"]["answers"])
    kept = {int(re.findall(r"\.(\d+)\.", name)[0]) for name, preset in results[K4V4]["layers"].items() if preset is None}
    assert kept == SKIPPED[skip]


DRAFTERS = {"ngram": (TARGET, None), "eagle": (TARGET, "eagle"), "eagle3": (TARGET, "eagle 3"), "mtp": ("glm 4 moe", None)}


@pytest.mark.parametrize("drafts", (1, 3, 7))
@pytest.mark.parametrize("method", DRAFTERS)
def test_speculation(method, drafts, engines):
    """Short blocks, and requests that wait for others to end and join those that run."""
    kind, drafter = DRAFTERS[method]
    config = speculative(method, drafter, drafts, engines.root)
    engines.each(kind, dtypes=("auto",))
    engines.each(kind, dtypes=(LOSSLESS, K4V4), speculative_config=config, disable_log_stats=False, **CROWDED)
    results = engines.run()
    check(results)
    for kv in (LOSSLESS, K4V4):
        assert results[kv]["metrics"]["spec_decode_num_draft_tokens"] > results[kv]["metrics"]["spec_decode_num_accepted_tokens"]


@pytest.mark.parametrize("kind", (TARGET, "gemma 3"))
def test_prefixes(kind, engines):
    """Asked again from reused blocks, and once more after these were given up."""
    asked = {"given": False, "max_tokens": 8, "then": ["ask again", "reset the prefix cache"]}
    engines.each(kind, asked, disable_log_stats=False)
    results = engines.run()
    for kv in DTYPES:
        assert results[kv]["metrics"]["prefix_cache_hits"] >= 128
        # In the first pass a prompt's tokens attend to one another before they are coded.
        if kv != K4V4:
            check_near(results[kv]["then"][0], results[kv]["answers"])
        check_near(results[kv]["then"][1], results[kv]["answers"])
    check_near(results[LOSSLESS]["answers"], results["auto"]["answers"])


def test_prefixes_beside_states(engines):
    """A prompt that is shorter than a block of states is found again in steps of 16 tokens, where the option asks for it."""
    asked = {"prompts": [prompt(engines.rng, 1000)], "max_tokens": 8, "given": False, "then": ["ask again"]}
    options = {"max_model_len": 4096, "max_num_batched_tokens": 1024, "enable_prefix_caching": True, "prefix_match_unit": 16}
    engines.each("qwen 3 next", asked, dtypes=(LOSSLESS, K4V4), disable_log_stats=False, **options)
    results = engines.run()
    assert results[K4V4]["block_size"] > 1000
    assert all(found["metrics"]["prefix_cache_hits"] == 992 for found in results.values())
    check_near(results[LOSSLESS]["then"][0], results[LOSSLESS]["answers"])


def test_preemption(engines):
    engines.each("llama", dtypes=("auto",))
    engines.each("llama", dtypes=(LOSSLESS, K4V4), disable_log_stats=False, num_gpu_blocks_override=9)
    results = engines.run()
    assert all(results[kv]["metrics"]["num_preemptions"] > 0 for kv in (LOSSLESS, K4V4))
    check(results)


def test_grammar(engines, smollm2):
    from transformers import AutoTokenizer

    engines.each("words", {"regex": REGEX}, tokenizer=smollm2, skip_tokenizer_init=False)
    results, tokenizer = engines.run(), AutoTokenizer.from_pretrained(smollm2)
    for kv in DTYPES:
        texts = [tokenizer.decode(one["tokens"], skip_special_tokens=True) for one in results[kv]["answers"]]
        assert all(re.fullmatch(REGEX, text) for text in texts), texts


def test_embeddings(engines, smollm2):
    options = {"runner": "pooling", "convert": "embed", "tokenizer": smollm2, "skip_tokenizer_init": False}
    engines.each("words", {"embed": True}, **options)
    results = engines.run()
    plain, raw, codes = ([one["embedding"] for one in results[kv]["answers"]] for kv in DTYPES)

    def apart(ours):
        return [sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 for a, b in zip(ours, plain, strict=True)]

    print(f"unit vectors apart: raw {max(apart(raw)):.2g}, codes {max(apart(codes)):.2g}")
    # bf16 keeps 8 bits, 0.004, in each of two layers; on a CPU raw pages moved these by 0.003 and codes by 0.17. A vector that
    # owes nothing to what was asked is 1.4 away.
    assert max(apart(raw)) < 0.05 and max(apart(raw)) < max(apart(codes)) < 0.7


def test_adapter(engines):
    options = {"lora": adapter(engines.root), "given": False}
    engines.each("llama", options, enable_lora=True, max_lora_rank=8)
    engines.add("without", "llama", "auto", {"given": False})
    results = engines.run()
    check_near(results[LOSSLESS]["answers"], results["auto"]["answers"])
    assert [a["tokens"] for a in results["auto"]["answers"]] != [a["tokens"] for a in results["without"]["answers"]]
    assert any("models that serve LoRA adapters are not handled" in line for line in lines(engines.root)[K4V4])


def test_weights_read_again(engines):
    real = {"model": real_weights(engines.root, VOCABULARY), "load_format": "auto"}
    engines.each("llama", {"then": ["reload the weights"]}, dtypes=(LOSSLESS, K4V4), **real)
    for found in engines.run().values():
        check_near(found["then"][0], found["answers"])


@pytest.mark.parametrize("where", ("storage", "offloading"))
def test_blocks_come_back_from_elsewhere(where, engines):
    """After the prefix cache was given up: from a folder, from the host's memory."""
    asked = {"given": False, "then": ["reset the prefix cache"], "max_tokens": 8}
    options = UNCALIBRATED | {"max_num_batched_tokens": 512, "disable_log_stats": False}
    for kv in (LOSSLESS, K4V4):
        if where == "storage":
            options |= {"kv_transfer_config": example_connector(engines.root / kv)}
        else:
            options |= {"kv_offloading_size": 1.0, "kv_offloading_backend": "native"}
        engines.add(kv, TARGET, kv, asked, **options)
    for found in engines.run().values():
        assert found["metrics"]["external_prefix_cache_hits"] > 128
        check_near(found["then"][0], found["answers"])
