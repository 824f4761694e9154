"""What vLLM does around a model: speculation, reused and preempted blocks, adapters, grammars, connectors, ranks.

Raw numbers in our pages answer as a plain engine of dtype ``auto`` does; codes run. All engines in one process.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from . import features
from .answers import assert_same
from .features import BOTH, CODED, QUANTISED, REGEX, SKIPPED, SPECULATION
from .harness import LOSSLESS
from .test_engines import Results, answers, deviations
from .test_kinds import BF16_TOLERANCE, K4V4, TOLERANCE, lines


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def results(root: Path, smollm2: Path) -> Results:
    seed = random.SystemRandom().randrange(2**31)
    print(f"prompts by seed {seed}")
    return features.run(root, seed, smollm2)


def again(results: Results, name: str, index: int) -> Results:
    """The answers of the ``index``-th repetition, as a job of their own."""
    return {"again": {"answers": results[name]["then"][index]}}


@pytest.mark.parametrize("case", SPECULATION)
def test_speculation(case: str, results: Results) -> None:
    """Drafts are verified, most are rejected; requests wait for others to end and join those that run."""
    kind = SPECULATION[case][0]
    plain = f"{kind}/auto"
    lossless = results[f"{case}/{LOSSLESS}"]
    drafted, accepted = (lossless["metrics"][f"spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    print(f"{case}: {accepted} of {drafted} drafts accepted")
    assert drafted > accepted
    if not case.startswith("mtp"):  # which is never right with random weights
        assert accepted > 0
    assert max(deviations(results, f"{case}/{LOSSLESS}", plain)) < TOLERANCE
    assert_same(answers(results, plain), answers(results, f"{case}/{LOSSLESS}"))
    for dtype in BOTH if SPECULATION[case][2] == CODED else (LOSSLESS,):
        found = results[f"{case}/{dtype}"]
        assert set(found["layers"].values()) == {dtype}
        added = [name for name in found["layers"] if name not in results[plain]["layers"]]
        assert len(added) == (0 if case.startswith("ngram") else 2 if "gemma" in case else 1), "the drafter's layers"
        assert found["metrics"]["spec_decode_num_draft_tokens"] > 0


@pytest.mark.parametrize("kind", ["llama", "gemma 3"])
def test_prefixes(kind: str, results: Results) -> None:
    """Chunks of 64 tokens; asked again from reused blocks, and once more after these were given up."""
    for dtype in ("auto", *BOTH):
        name = f"prefixes of {kind}/{dtype}"
        first = answers(results, name)
        assert results[name]["metrics"]["prefix_cache_hits"] >= 128
        for index in (0, 1):
            assert_same(first, answers(again(results, name, index), "again"))
    assert_same(*(answers(results, f"prefixes of {kind}/{dtype}") for dtype in ("auto", LOSSLESS)))


def test_embeddings(results: Results) -> None:
    """Of a decoder's last token. Raw numbers give the plain engine's, codes come near."""
    plain, raw, codes = (
        torch.tensor([answer["embedding"] for answer in results[f"embedding/{dtype}"]["answers"]]) for dtype in ("auto", *BOTH)
    )
    assert plain.shape[0] == 5 and (plain - raw).abs().max() <= TOLERANCE
    closeness = torch.cosine_similarity(plain, codes)
    # Codes of 4 bits cost a random model percents; an answer that owes nothing to the cache would cost nothing.
    assert (closeness > 0.8).all() and (closeness < 1 - 1e-4).any(), closeness


def test_prefixes_beside_states(results: Results, root: Path) -> None:
    """A prompt of 1000 tokens is shorter than a block, whose length is said at start-up; a longer one is found again."""
    found = results["states/turboquant"]
    assert 1000 < found["block_size"] < 2100
    assert found["metrics"]["prefix_cache_hits"] == found["block_size"]
    said = f"cached prefixes are reused in steps of {found['block_size']} tokens, shorter ones not at all"
    assert sum(said in line for line in lines(root)["states/turboquant"]) == 1
    first, second = answers(results, "states/turboquant"), answers(again(results, "states/turboquant", 0), "again")
    assert [a.tokens for a in first] == [a.tokens for a in second]
    # With the option that the line names, hits end inside a block, which vLLM then copies.
    found = results["finer states/turboquant"]
    assert found["metrics"]["prefix_cache_hits"] == 992 + 2096
    assert sum("reused in steps of 16 tokens" in line for line in lines(root)["finer states/turboquant"]) == 1
    again_finer = answers(again(results, "finer states/turboquant", 0), "again")
    # The state itself is rounded to bf16 at other places of the prompt.
    assert all(abs(a.logprobs[0] - b.logprobs[0]) < BF16_TOLERANCE for a, b in zip(first, again_finer, strict=True))


def test_drafts_over_the_targets_cache(results: Results) -> None:
    """Calibrated keys are read under what they were stored under: each of the drafter's layers has that of a target's layer."""
    bases = results[f"mtp of gemma 4, 3/{K4V4}"]["bases"]
    drafter = {name: basis for name, basis in bases.items() if name.startswith("draft_model.")}
    assert [bases[f"model.layers.{index}.self_attn.attn"] for index in (3, 2)] == list(drafter.values())
    assert None not in drafter.values() and len(set(drafter.values())) == 2


def test_prompts_that_pass_shared_layers_by(results: Results) -> None:
    """--kv-sharing-fast-prefill: what shares a cache sees a prompt's last token alone, which reads the same codes."""
    for dtype in ("auto", *BOTH):
        assert_same(answers(results, f"shared, False/{dtype}"), answers(results, f"shared, True/{dtype}"))
    assert_same(answers(results, "shared, True/auto"), answers(results, f"shared, True/{LOSSLESS}"))


def test_text_alone(results: Results) -> None:
    """A model whose images are a bidirectional prefix, without images: vLLM then attends causally everywhere."""
    assert set(results[f"text alone/{K4V4}"]["layers"].values()) == {K4V4}
    assert_same(answers(results, "text alone/auto"), answers(results, f"text alone/{LOSSLESS}"))


def test_preemption(results: Results) -> None:
    for dtype in ("auto", *BOTH):
        assert results[f"preemption/{dtype}"]["metrics"]["num_preemptions"] > 0, dtype
    assert_same(answers(results, "llama/auto"), answers(results, f"preemption/{LOSSLESS}"))


def test_grammar(results: Results, smollm2: Path) -> None:
    """Decoded here: vLLM repeats pieces of a prompt that is no text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for dtype in ("auto", *BOTH):
        texts = [tokenizer.decode(one["tokens"], skip_special_tokens=True) for one in results[f"grammar/{dtype}"]["answers"]]
        assert all(re.fullmatch(REGEX, text) for text in texts), texts
        assert len(set(texts)) > 1
    assert_same(*(answers(results, f"grammar/{dtype}") for dtype in ("auto", LOSSLESS)))


def test_adapter(results: Results, root: Path) -> None:
    assert_same(*(answers(results, f"adapter/{dtype}") for dtype in ("auto", LOSSLESS)))
    assert [a.tokens for a in answers(results, "adapter/auto")] != [a.tokens for a in answers(results, "llama/auto")]
    assert any("models that serve LoRA adapters are not handled" in line for line in lines(root)[f"adapter/{K4V4}"])


@pytest.mark.parametrize("dtype", BOTH)
def test_weights_read_again(dtype: str, results: Results) -> None:
    assert_same(answers(results, f"reload/{dtype}"), answers(again(results, f"reload/{dtype}", 0), "again"))


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights(kind: str, results: Results) -> None:
    """Which are computed in bfloat16; attention that is rounded at other places moved a log-probability by 0.02."""
    moved, coded = (deviations(results, f"{kind}/{dtype}", f"{kind}/auto") for dtype in BOTH)
    print(f"{kind}: log-probabilities move by at most {max(moved):.2g}, by codes {max(coded):.2g}")
    assert max(moved) < BF16_TOLERANCE < max(coded)
    assert set(results[f"{kind}/{K4V4}"]["layers"].values()) == {K4V4}


def test_images(results: Results, root: Path) -> None:
    """One picture and another in the same words, and words alone."""
    first, second, _ = answers(results, "images/auto")
    assert first.tokens != second.tokens, "the model does not see"
    assert_same(*(answers(results, f"images/{dtype}") for dtype in ("auto", LOSSLESS)))
    moved, coded = (deviations(results, f"images/{dtype}", "images/auto") for dtype in BOTH)
    print(f"images: log-probabilities move by at most {max(moved):.2g}, by codes {max(coded):.2g}")
    assert max(moved) < TOLERANCE < max(coded) / 50
    for dtype in BOTH:
        assert set(results[f"images/{dtype}"]["layers"].values()) == {dtype}
    assert "keys are stored without calibration: multimodal models are not handled." in lines(root)[f"images/{K4V4}"]


def test_checkpoint_with_a_cache_of_its_own(results: Results, root: Path) -> None:
    """Pages are ours, scales are not applied, and a line says so. The weights are those of llama."""
    assert set(results[f"own cache/{LOSSLESS}"]["layers"].values()) == {LOSSLESS}
    assert_same(answers(results, "llama/auto"), answers(results, f"own cache/{LOSSLESS}"))
    for dtype in BOTH:
        said = "the checkpoint's own KV cache, kv_cache_scheme float8, and its scales are ignored: --kv-cache-dtype "
        assert any(line == f"{said}{dtype} was asked for." for line in lines(root)[f"own cache/{dtype}"])


@pytest.mark.parametrize("skip", SKIPPED)
def test_skipped_layers(skip: str, results: Results, root: Path) -> None:
    """Beside windows: the same answers, and layers, pages and log agree, whether the first layer is skipped or not."""
    assert_same(answers(results, "gemma 3/auto"), answers(results, f"skip {skip}/{LOSSLESS}"))
    found = results[f"skip {skip}/{K4V4}"]
    kept = {int(re.findall(r"\.(\d+)\.", name)[0]) for name, preset in found["layers"].items() if preset is None}
    assert kept == SKIPPED[skip]
    (line,) = (line for line in lines(root)[f"skip {skip}/{K4V4}"] if line.startswith(f"{K4V4}; "))
    names = [name for name, preset in found["layers"].items() if preset is None]
    assert f"{4 - len(kept)} attention layers compressed" in line
    assert f"{len(kept)} not, by --kv-cache-dtype-skip-layers ({', '.join(names)})" in line
    (more,) = re.findall(r" tokens, ([\d.]+)x of auto's", line)
    print(f"skip {skip}: {more}x the tokens")
    assert float(more) > 1.2


@pytest.mark.parametrize("dtype", BOTH)
def test_shared_storage(dtype: str, results: Results) -> None:
    """Blocks that another engine stored, and that this one gave up, answer as those that were never away."""
    plain = "llama/auto" if dtype == LOSSLESS else "plain/turboquant"
    for name in (f"storage/{dtype}", f"storage again/{dtype}"):
        assert results[name]["metrics"]["external_prefix_cache_hits"] > 128
        assert_same(answers(results, plain), answers(results, name))
    assert_same(answers(results, plain), answers(again(results, f"storage/{dtype}", 0), "again"))
