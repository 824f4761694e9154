"""Engines through `vllm.LLM`, one after another in one process: `python -m tests.server.engine JOBS.json OUT.json`.

For what needs many start-ups and no HTTP. A process of its own, because an engine leaves global state behind and the
other tests import other versions of vLLM. A job: {"name", "prompts": [[token, ...], ...], "max_tokens",
"llm": {arguments}}, and optionally "then": what is done before the prompts are asked again, by the names in ``ACTIONS``, one
list of answers more for each; "given": False leaves out the prompts' log-probabilities, with which no prefix is reused;
"regex": what answers must match; "lora": the folder of an adapter; "images": by prompt the seed of a picture, or null;
"priorities": by prompt, the least is served first; "embed": True asks a pooling model for embeddings instead.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sleep_without_weights(llm: Any) -> None:
    """As people do who bring new weights: memory for the cache comes back last."""
    llm.sleep(2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


ACTIONS: dict[str, Callable[[Any], object]] = {
    "ask again": lambda llm: None,
    "reset the prefix cache": lambda llm: llm.reset_prefix_cache(),
    "reload the weights": lambda llm: llm.collective_rpc("reload_weights"),
    "sleep at level 1": lambda llm: (llm.sleep(1), llm.wake_up()),
    "sleep at level 2": sleep_without_weights,
}
_collect, _freeze = gc.collect, gc.freeze


def ask(llm: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    if job.get("embed"):
        return [{"embedding": output.outputs.embedding} for output in llm.embed(prompts, use_tqdm=False)]
    return generated(llm, job, prompts)


def generated(llm: Any, job: dict[str, Any], prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    from .images import picture

    regex = job.get("regex")
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        ignore_eos=regex is None,
        logprobs=2,
        prompt_logprobs=0 if job.get("given", True) else None,
        detokenize=regex is not None,
        structured_outputs=None if regex is None else StructuredOutputsParams(regex=regex),
    )
    adapter = LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None
    for prompt, seed in zip(prompts, job.get("images", ()), strict=False):
        if seed is not None:
            prompt["multi_modal_data"] = {"image": picture(seed)}
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter, priority=job.get("priorities"))
    answers = []
    for output in outputs:
        steps = [sorted((p.logprob for p in step.values()), reverse=True) for step in output.outputs[0].logprobs]
        read = zip(output.prompt_logprobs or (), output.prompt_token_ids, strict=False)
        answers.append(
            {
                "prompt_logprobs": [step[token].logprob for step, token in read if step],
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [step[0] for step in steps],
                "gaps": [step[0] - step[1] for step in steps],
            }
        )
    return answers


def facts(llm: Any) -> dict[str, Any]:
    """Preset by attention layer, None where it is vLLM's own; which layers' keys are stored under the same basis; blocks of the
    pool; counters, where statistics are on; what the status page asks of pipeline stages, which run in processes of their own."""
    config = llm.llm_engine.vllm_config
    staged = config.parallel_config.pipeline_parallel_size > 1
    layers = config.compilation_config.static_forward_context
    backends = {name: layer.attn_backend for name, layer in layers.items() if hasattr(layer, "attn_backend")}
    bases = {name: getattr(getattr(layer, "impl", None), "basis", None) for name, layer in layers.items()}
    counters = llm.get_metrics() if llm.llm_engine.log_stats else []
    return {
        "layers": {name: getattr(backend, "turboquant_preset", None) for name, backend in backends.items()},
        "bases": {name: None if basis is None else id(basis) for name, basis in bases.items()},
        "blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
        "stages": llm.collective_rpc("turboquant_layers") if staged else [],
        "metrics": {metric.name.removeprefix("vllm:"): metric.value for metric in counters if hasattr(metric, "value")},
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    started = time.monotonic()
    _writers.clear()
    llm = LLM(**job["llm"])
    result: dict[str, Any] = {"answers": ask(llm, job), "then": []}
    for action in job.get("then", ()):
        ACTIONS[action](llm)
        result["then"].append(ask(llm, job))
    result |= facts(llm) | {"writers": sorted(_writers)}
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return result | {"seconds": time.monotonic() - started}


_writers: set[str] = set()


def _note_writers() -> None:
    """Names of compressed layers that stored tokens."""
    from vllm_turboquant.impl import TurboQuantImpl

    original = TurboQuantImpl.do_kv_cache_update

    def do_kv_cache_update(self: Any, layer: Any, *args: Any) -> None:
        _writers.add(layer.layer_name)
        original(self, layer, *args)

    TurboQuantImpl.do_kv_cache_update = do_kv_cache_update  # type: ignore[method-assign]


def _once(owner: Any, name: str) -> None:
    """What looks through all modules, and fails on those that n-gram speculation loads, is done at the first start."""
    original, done = getattr(owner, name), []

    def first() -> None:
        if not done:
            done.append(original())

    setattr(owner, name, first)


def prepare() -> None:
    """What makes a start of a tiny model take one second instead of four; a dummy load gets weights that a cache matters to."""
    import vllm.model_executor.models.registry as registry
    from vllm.platforms import current_platform

    from . import weights

    # vLLM collects garbage eight times a start, each time through all modules there are.
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # type: ignore[assignment]
    gc.collect = lambda generation=2: 0  # type: ignore[assignment]
    # It looks at model classes in processes of their own, to keep CUDA out of this one, and there is no CUDA.
    registry._run_in_subprocess = lambda function: function()  # type: ignore[assignment]
    _once(current_platform, "register_triton_kernel_overrides")
    weights.install()
    _note_writers()


def main() -> None:
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    prepare()
    results = {}
    for job in jobs:
        results[job["name"]] = run(job)
        _collect()
        _freeze()  # what an engine leaves for good is not looked through again
        print(f"JOB {job['name']} {results[job['name']]['seconds']:.1f} s", flush=True)
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
