"""Random serving in one engine, step by step: `python schedule.py JOB.json OUT.json`.

Requests with common prefixes arrive, end, are aborted and preempted in a small pool, with speculation. Between steps every byte
that no token owns is overwritten: blocks that nobody uses or could hit, and slots behind what requests have stored. Then each
request is run alone. A job: {"llm": arguments, "steps", "seed", "vocabulary"}.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNNING = 16


@dataclass
class Asked:
    prompt: list[int]
    max_tokens: int
    priority: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    aborted: bool = False
    alone: list[int] = field(default_factory=list)
    alone_logprobs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # of the run alone: how far the best token is ahead of the second


def chosen(choice: Any) -> list[float]:
    return [step[token].logprob for step, token in zip(choice.logprobs, choice.token_ids, strict=True)]


class Serving:
    def __init__(self, llm: Any, rng: random.Random, vocabulary: int) -> None:
        import torch

        self.llm, self.engine, self.rng, self.vocabulary = llm, llm.llm_engine, rng, vocabulary
        self.core = self.engine.engine_core.engine_core
        self.asked: dict[str, Asked] = {}
        self.running: set[str] = set()
        self.noise = torch.Generator().manual_seed(rng.randrange(2**31))
        context = self.core.vllm_config.compilation_config.static_forward_context
        self.layers = [layer for layer in context.values() if hasattr(layer, "impl")]
        self.bases = [self.base() for _ in range(3)]
        self.poisoned = self.tails = 0

    def base(self) -> list[int]:
        return [self.rng.randrange(3, self.vocabulary) for _ in range(150)]

    def ask(self) -> None:
        rng = self.rng
        if rng.random() < 0.1:  # old prefixes go out of fashion, so that their blocks are used again
            self.bases[rng.randrange(len(self.bases))] = self.base()
        motif = [rng.randrange(3, self.vocabulary) for _ in range(rng.randint(1, 12))]  # repeated, for ngram speculation
        own = (motif * 8)[: rng.randint(1, 50)]
        prompt = rng.choice(self.bases)[: rng.choice((0, 10, 48, 70, 130))] + own
        one = Asked(prompt, rng.randint(1, 60), rng.randrange(3))
        self.add(str(len(self.asked)), one)
        self.asked[str(len(self.asked))] = one

    def add(self, name: str, one: Asked, logprobs: int = 0) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=one.max_tokens, ignore_eos=True, detokenize=False, logprobs=logprobs)
        self.engine.add_request(name, {"prompt_token_ids": one.prompt}, sampling, priority=one.priority)
        self.running.add(name)

    def step(self) -> None:
        for output in self.engine.step():
            one, choice = self.asked[output.request_id], output.outputs[0]
            one.tokens, one.logprobs = list(choice.token_ids), chosen(choice)
            if output.finished:
                self.running.discard(output.request_id)

    def poison(self) -> None:
        """Overwrites what no token owns."""
        import torch

        from vllm_turboquant.impl import TurboQuantImpl
        from vllm_turboquant.kernels.packing import write_tokens

        scheduler = self.core.scheduler
        manager = scheduler.kv_cache_manager
        unused = [b.block_id for b in manager.block_pool.blocks if b.ref_cnt == 0 and b.block_hash is None and not b.is_null]
        slots: list[int] = []
        size = manager.block_pool.hash_block_size
        for request in scheduler.running:
            (blocks,) = manager.get_block_ids(request.request_id)
            stored = request.num_computed_tokens
            slots += [blocks[p // size] * size + p % size for p in range(stored, len(blocks) * size)]
        self.poisoned += len(unused)
        self.tails += len(slots)
        for layer in self.layers:
            pages = layer.kv_cache
            if not isinstance(layer.impl, TurboQuantImpl):
                continue
            shape = (len(unused), *pages.shape[1:])
            pages[unused] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.noise) | self.rng.choice((0, 0xFF))
            raw = torch.randint(0, 256, (len(slots), pages.shape[1], pages.shape[3]), dtype=torch.uint8, generator=self.noise)
            write_tokens(pages, torch.tensor(slots, dtype=torch.int64), raw | self.rng.choice((0, 0xFF)), layer.impl.format)

    def serve(self, steps: int) -> None:
        aborts = set(self.rng.sample(range(steps // 10, steps), max(3, steps // 100)))
        for step in range(steps):
            while len(self.running) < RUNNING and self.rng.random() < 0.4:
                self.ask()
            if self.running and step in aborts:
                name = self.rng.choice(sorted(self.running))
                self.engine.abort_request([name])
                self.running.discard(name)
                self.asked[name].aborted = True
            self.step()
            self.poison()
        while self.running:
            self.step()
            self.poison()

    def alone(self) -> None:
        """Every request once more, with the pool to itself and without prefix hits."""
        for number, one in enumerate(self.asked.values()):
            assert self.llm.reset_prefix_cache()
            self.poison()
            self.add(f"alone {number}", one, logprobs=2)
            while f"alone {number}" in self.running:
                for output in self.engine.step():
                    choice = output.outputs[0]
                    if output.finished:
                        self.running.discard(output.request_id)
                        one.alone, one.alone_logprobs = list(choice.token_ids), chosen(choice)
                        ranked = [sorted((p.logprob for p in step.values()), reverse=True) for step in choice.logprobs]
                        one.gaps = [step[0] - step[1] for step in ranked]


def main() -> None:
    from vllm import LLM

    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    llm = LLM(**job["llm"])
    serving = Serving(llm, random.Random(job["seed"]), job["vocabulary"])
    serving.serve(job["steps"])
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    wanted = ("num_preemptions", "prefix_cache_hits", "spec_decode_num_accepted_tokens")
    counts = {name: metrics.get(f"vllm:{name}", 0) for name in wanted}
    serving.alone()
    counts |= {"poisoned blocks": serving.poisoned, "poisoned slots": serving.tails}
    out.write_text(json.dumps({"requests": [vars(one) for one in serving.asked.values()], "counts": counts}))


if __name__ == "__main__":
    main()
