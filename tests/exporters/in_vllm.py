"""Run by an interpreter that has vLLM: ``in_vllm.py JOBS OUT``, log-probabilities of the next token on a CPU.

JOBS is json: a list of {folder, dtype, ids}; OUT gets one entry a job, log-probabilities [N, T, V] or what went wrong.
"""

import gc
import json
import os
import sys

# One process, no threads bound to cores, a small cache, and nothing is asked of the hub.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def log_probabilities(folder, dtype, ids):
    from vllm import LLM, SamplingParams

    with open(f"{folder}/config.json") as file:
        size = json.load(file)["vocab_size"]
    model = LLM(folder, skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, max_logprobs=-1, max_model_len=128)
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=size, logprobs=size, detokenize=False)
    found = model.generate([{"prompt_token_ids": row} for row in ids], settings, use_tqdm=False)
    places = [[*text.prompt_logprobs[1:], *text.outputs[0].logprobs] for text in found]
    return [[[place[token].logprob for token in range(size)] for place in text] for text in places]


def main(jobs, out):
    from vllm.distributed import cleanup_dist_env_and_memory

    results = []
    with open(jobs) as file:
        for job in json.load(file):
            try:
                results.append(log_probabilities(**job))
            except Exception as error:
                results.append(f"{type(error).__name__}: {error}")
            gc.collect()
            cleanup_dist_env_and_memory()
    with open(out, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
