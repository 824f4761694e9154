"""Engines through `vllm.LLM`, one after another in one process: `python engine.py JOBS.json OUT.json`.

For what needs many start-ups and no HTTP. A process of its own, because an engine leaves global state behind and the
other tests import other versions of vLLM. A job: {"name", "prompts": [[token, ...], ...], "max_tokens",
"llm": {arguments}}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    started = time.monotonic()
    llm = LLM(**job["llm"])
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=2, prompt_logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    answers = []
    for output in outputs:
        steps = [sorted((p.logprob for p in step.values()), reverse=True) for step in output.outputs[0].logprobs]
        given = [step[token].logprob for step, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True) if step]
        answers.append(
            {
                "prompt_logprobs": given,
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [step[0] for step in steps],
                "gaps": [step[0] - step[1] for step in steps],
            }
        )
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {"answers": answers, "seconds": time.monotonic() - started}


def main() -> None:
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {}
    for job in jobs:
        results[job["name"]] = run(job)
        print(f"JOB {job['name']} {results[job['name']]['seconds']:.0f} s", flush=True)
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
