"""Random serving in a small pool: whatever happens around a request, its answer is the one that it gets alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import schedule
from .answers import LOGPROB_TOLERANCE
from .harness import ENVIRONMENT, RECENT, end_with_parent

STEPS = int(os.environ.get("TEST_STEPS", 250))  # in company; alone the same requests take ten times as many
VOCABULARY = 1000
POOL = 64  # blocks, and one that is vLLM's own
LLM = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 16,
    "block_size": 16,
    "num_gpu_blocks_override": POOL + 1,
    "kv_cache_memory_bytes": 64 << 20,
    "gpu_memory_utilization": 0.1,
    "scheduling_policy": "priority",
    "async_scheduling": False,  # a step's outputs are known before bytes are overwritten
    "disable_log_stats": False,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights: large enough that answers depend on the cache, small enough that they fall into loops to speculate on."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("schedules") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def run(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    todo, done, log = folder / "job.json", folder / "result.json", folder / "engine.log"
    todo.write_text(json.dumps(job))
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CACHE_ROOT": str(folder / "cache")}
    with log.open("wb") as output:
        status = subprocess.run(
            [sys.executable, schedule.__file__, str(todo), str(done)],
            env=os.environ | ENVIRONMENT | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
            timeout=600 + 2 * STEPS,
        ).returncode
    assert status == 0, "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    return json.loads(done.read_text())


# Sums in another order round otherwise: in raw pages that is all; in codes, a value that lies on an edge between two levels moves
# an answer by some thousandths.
@pytest.mark.parametrize(("dtype", "tolerance"), ((RECENT, LOGPROB_TOLERANCE), ("turboquant", 0.03)))
def test_every_answer_is_that_of_the_request_alone(dtype: str, tolerance: float, model: str, tmp_path: Path, seed: int) -> None:
    """Arrivals, ends, aborts, preemptions, prefix hits, partial blocks, verified drafts; every byte that nobody owns is noise.

    Raw pages with the newest tokens beside them, and codes of four bits, calibrated.
    """
    llm = LLM | {"model": model, "kv_cache_dtype": dtype}
    result = run(tmp_path, {"llm": llm, "steps": STEPS, "seed": seed, "vocabulary": VOCABULARY})
    requests, counts = result["requests"], result["counts"]
    print(f"{len(requests)} requests, {sum(len(r['tokens']) for r in requests)} tokens, {counts}")
    assert min(counts.values()) > 0, "something that this test is about did not happen"
    assert any(r["aborted"] for r in requests)
    ties, worst = 0, 0.0
    for number, request in enumerate(requests):
        tokens, alone = request["tokens"], request["alone"]
        assert len(alone) == request["max_tokens"] and (request["aborted"] or len(tokens) == len(alone))
        parted = next((i for i, (a, b) in enumerate(zip(tokens, alone, strict=False)) if a != b), None)
        pairs = list(zip(request["logprobs"], request["alone_logprobs"], strict=False))[:parted]
        moved = max((abs(a - b) for a, b in pairs), default=0.0)
        assert moved <= tolerance, f"request {number}: log-probabilities are {moved:.2g} from those that it gets alone"
        worst = max(worst, moved)
        if parted is not None:
            gap = request["gaps"][parted]
            assert gap < 2 * tolerance, f"request {number} parts at token {parted} from its answer alone, {gap:.2g} ahead there"
            ties += 1
    print(f"log-probabilities differ by at most {worst:.2g}, {ties} answers part at ties")
    assert ties <= len(requests) // 50, f"{ties} of {len(requests)} answers part at ties"
