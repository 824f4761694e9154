"""Stock vLLM on a card with a tiny random model: every path of the backend against dtype `auto`, lossless codec and default.

Log-probabilities are compared along the common prefix of two greedy texts; bf16 engines differ by rounding, so a near tie may
end that prefix.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
TOKENS = 24
CHUNKED = {"max_num_batched_tokens": 256, "max_num_seqs": 16}
NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
LOSSLESS = "turboquant-debug-lossless"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Head size 128, group 4, weights large enough that attention is not flat."""
    pytest.importorskip("vllm")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=4096,
        initializer_range=0.06,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def prompts():
    stream = random.Random(1)
    motif = [stream.randrange(1024) for _ in range(40)]
    return [(motif * 20)[:length] for length in (17, 64, 700)] + [
        [stream.randrange(1024) for _ in range(length)] for length in (1, 300, 513)
    ]


def generate(model, prompts, kv_cache_dtype, **job):
    job = {"model": model, "prompts": prompts, "kv_cache_dtype": kv_cache_dtype, "tokens": TOKENS, **job}
    script = Path(__file__).with_name("run_llm.py")
    child = subprocess.run([sys.executable, str(script), json.dumps(job)], capture_output=True, text=True)
    lines = [line for line in child.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, f"engine failed:\n{child.stdout[-3000:]}\n{child.stderr[-6000:]}"
    return json.loads(lines[0].removeprefix("ANSWERS "))


@pytest.fixture(scope="module")
def auto(model, prompts):
    return generate(model, prompts, "auto", options={"enforce_eager": True})


def compare(answers, reference, tolerance):
    """Largest gap of log-probabilities on common prefixes, and the share of tokens in common."""
    gaps, common = [0.0], 0
    for ours, theirs in zip(answers, reference, strict=True):
        for a, b, x, y in zip(ours["ids"], theirs["ids"], ours["logprobs"], theirs["logprobs"], strict=True):
            if a != b:
                break
            gaps.append(abs(x - y))
            common += 1
    share = common / (TOKENS * len(reference))
    print(f"largest gap {max(gaps):.4f}, {share:.0%} of tokens in the common prefix")
    assert max(gaps) < tolerance
    return share


# bf16 keeps 8 bits: four layers of rounding move a log-probability by a few hundredths.
BF16 = 0.12
CASES = {
    "eager": {"options": {"enforce_eager": True}},
    "graphs": {"options": {}},
    "first runner": {"options": {}, "env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
    "chunked": {"options": {"enforce_eager": True, **CHUNKED}},
    "ngram": {"options": NGRAM},
    "prefix hits": {"options": {"enable_prefix_caching": True}, "repeats": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_lossless_codec_follows_auto(model, prompts, auto, case):
    answers = generate(model, prompts, LOSSLESS, **CASES[case])
    if case == "prefix hits":
        compare(answers[len(auto) :], auto, BF16)
        answers = answers[: len(auto)]
    # Near ties end common prefixes: 0.6 (eager) to 0.9 (graphs) was measured on an H100; a plumbing fault parts at once.
    assert compare(answers, auto, BF16) > 0.5


@pytest.mark.parametrize("preset", ("turboquant", "turboquant-k8v4", "turboquant-k3v3", "turboquant-k4v4-qjl"))
def test_presets_run(model, prompts, auto, preset):
    answers = generate(model, prompts, preset, options=CHUNKED)
    for ours, theirs in zip(answers, auto, strict=True):
        assert len(ours["ids"]) == TOKENS and bool(torch.isfinite(torch.tensor(ours["logprobs"])).all())
        # Prompts within one chunk attend to raw keys and values, longer ones to codes too, whose loss stays far below one nat
        # where the token is the same; keys or values in a wrong basis would not.
        if ours["ids"][0] == theirs["ids"][0]:
            assert abs(ours["logprobs"][0] - theirs["logprobs"][0]) < 1.0
