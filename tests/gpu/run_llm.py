"""One engine in one process: runs the job in argv[1] (JSON) and prints its result as one line of JSON.

``prompts``: token ids a prompt; generated greedily, ``repeats`` times. ``forced``: a .pt file of token ids ``[texts, T]`` that
are fed one by one instead of what the model would say; made up first, ``sampled`` (texts, T), when the file is missing. The
logits of all steps go to ``logits`` or are compared with those in ``against``. ``shadow``: every attention call is checked.
"""

import json
import os
import sys
from pathlib import Path


def generate(llm, job):
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
    answers = []
    for _ in range(job.get("repeats", 1)):
        for output in llm.generate(prompts, sampling, use_tqdm=False):
            choice = output.outputs[0]
            ids = list(choice.token_ids)
            answers.append({"ids": ids, "logprobs": [step[i].logprob for step, i in zip(choice.logprobs, ids, strict=True)]})
    return answers


def sample_texts(llm, count, tokens):
    """Token ids ``[count, tokens]`` of what the model itself says at temperature 1: text without a text to ship."""
    import torch
    from vllm import SamplingParams

    sampling = [
        SamplingParams(max_tokens=tokens, temperature=1.0, seed=i, ignore_eos=True, detokenize=False) for i in range(count)
    ]
    outputs = llm.generate([{"prompt_token_ids": [1]}] * count, sampling, use_tqdm=False)
    return torch.tensor([list(output.outputs[0].token_ids) for output in outputs])


def forced_logits(llm, texts):
    """Logits ``[T - 1, texts, vocabulary]`` where every step was a decode step: all context was read from pages.

    All requests start together with one token and stay in step, so row i of a step is text i; checked by what comes out.
    """
    import torch
    from vllm import SamplingParams

    seen = []

    def patch(model):
        compute = model.compute_logits

        def force(hidden, *args, **kwargs):
            logits = compute(hidden, *args, **kwargs)
            seen.append(logits.cpu())
            choice = torch.zeros_like(logits)
            choice.scatter_(1, texts[:, len(seen)].to(logits.device)[:, None], 100.0)
            return choice

        model.compute_logits = force

    llm.apply_model(patch)
    steps = texts.shape[1] - 1
    sampling = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": [ids[0]]} for ids in texts.tolist()], sampling, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == texts[:, 1:].tolist()
    return torch.stack(seen)


def divergence(logits, path):
    """Mean KL of the next token in nats, from the logits in ``path`` to ``logits``: of each text, but for its first token, which
    is its request's prompt and attends to itself before it is coded.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.zeros(logits.shape[1], dtype=torch.float64)
    for reference, ours in zip(torch.load(path, mmap=True)[1:], logits[1:], strict=True):
        p, q = (x.to(device).double().log_softmax(-1) for x in (reference, ours))
        total += (p.exp() * (p - q)).sum(-1).cpu()
    return (total / (len(logits) - 1)).tolist()


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    os.environ |= {"TURBOQUANT_DEBUG": "1", "VLLM_LOGGING_LEVEL": "INFO", **job.get("env", {})}
    import torch
    from vllm import LLM

    errors = None
    if job.get("shadow"):
        from tests.gpu.shadow import install

        errors = install()
    options = {
        "additional_config": {"turboquant": {"calibration": "off"}},
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.1,
        # Several engines share a card, so vLLM must not size the pool by what it finds free.
        "kv_cache_memory_bytes": 2**30,
        **job.get("options", {}),
    }
    llm = LLM(model=job["model"], skip_tokenizer_init=True, kv_cache_dtype=job["kv_cache_dtype"], **options)
    result = {}
    if "prompts" in job:
        result["answers"] = generate(llm, job)
    if "forced" in job:
        path = Path(job["forced"])
        if not path.exists():
            torch.save(sample_texts(llm, *job["sampled"]), path)
        logits = forced_logits(llm, torch.load(path))
        if "logits" in job:
            torch.save(logits, job["logits"])
        if "against" in job:
            result["kl"] = divergence(logits, job["against"])
    if errors is not None:
        result["errors"] = errors
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
