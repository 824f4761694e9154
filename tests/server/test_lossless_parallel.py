"""Speculative decoding and tensor parallelism over lossless pages: the answers of the plain server."""

from __future__ import annotations

import json
import random
from pathlib import Path

from .answers import assert_same, complete, story
from .harness import LOSSLESS, Flags, ServerPool, side_by_side
from .test_lossless import EXTRA, flags

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def test_ngram_speculation(pool: ServerPool, smollm2: Path, rng: random.Random) -> None:
    """The verified rows see the drafts before them, and a rejected draft's slot is overwritten."""
    speculating = Flags(smollm2, LOSSLESS, extra=(*EXTRA, f"--speculative-config={json.dumps(NGRAM)}"))
    pair = pool.get(flags(smollm2, LOSSLESS), speculating)
    # Half of a text repeated: the model goes on copying, and n-grams of the prompt predict it.
    texts = [story(rng, 25) for _ in range(3)]
    prompts = [f"{text}\n\n{text[: len(text) // 2]}" for text in texts]
    plain, speculated = side_by_side(
        *(lambda s=s: side_by_side(*(lambda p=p: complete(s, p, 24) for p in prompts)) for s in pair)
    )
    drafted = pair[1].metric("vllm:spec_decode_num_draft_tokens_total")
    accepted = pair[1].metric("vllm:spec_decode_num_accepted_tokens_total")
    print(f"{drafted:.0f} tokens drafted, {accepted:.0f} accepted")
    assert 0 < accepted < drafted
    assert_same(plain, speculated)


def test_tensor_parallel(pool: ServerPool, tiny_models: dict[str, Path], rng: random.Random) -> None:
    extra = ("--max-model-len=512", "--max-num-batched-tokens=128", "--kv-cache-memory-bytes=64M", "--block-size=32")
    one = Flags(tiny_models["llama"], LOSSLESS, extra=extra)
    two = Flags(tiny_models["llama"], LOSSLESS, extra=(*extra, "--tensor-parallel-size=2"), cores=2)
    pair = pool.get(one, two)
    prompts = [story(rng, words) for words in (2, 30, 90)]
    single, parallel = side_by_side(*(lambda s=s: [complete(s, p, 24) for p in prompts] for s in pair))
    assert_same(single, parallel)
    assert len({tuple(a.tokens) for a in single}) == len(prompts), "the model answers the same whatever is asked"
    # Each rank holds one of the two KV heads, so the same memory a rank holds twice the tokens.
    assert pair[1].cache_tokens() == 2 * pair[0].cache_tokens()
