"""One engine in one process: generates greedily for prompts of token ids and prints ids and log-probabilities as JSON."""

import json
import os
import sys


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    os.environ |= {"TURBOQUANT_DEBUG": "1", "VLLM_LOGGING_LEVEL": "INFO", **job.get("env", {})}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        gpu_memory_utilization=0.3,
        kv_cache_dtype=job["kv_cache_dtype"],
        **job.get("options", {}),
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
    answers = []
    for _ in range(job.get("repeats", 1)):
        for output in llm.generate(prompts, sampling, use_tqdm=False):
            choice = output.outputs[0]
            ids = list(choice.token_ids)
            answers.append({"ids": ids, "logprobs": [step[i].logprob for step, i in zip(choice.logprobs, ids, strict=True)]})
    print("ANSWERS", json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
