"""transformers on torch, as the CPU benchmark's contender. Runs in another interpreter and imports nothing of ours.

    python _torch_contender.py FOLDER STATIC

One JSON object a line: reads {"tokens": [...], "new": n}, answers {"prefill_s": s, "token_s": [...], "tokens": [...]}.
"""

import itertools
import json
import sys
import time

import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM, StaticCache


@torch.inference_mode()
def answer(model, prompt: list[int], new: int, static: bool) -> dict:
    length = len(prompt) + new
    cache = StaticCache(config=model.config, max_cache_len=length) if static else DynamicCache(config=model.config)
    start = time.perf_counter()
    result = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    written = [int(result.logits[0, -1].argmax())]
    times = [time.perf_counter()]
    for _ in range(new - 1):
        result = model(torch.tensor([written[-1:]]), past_key_values=cache, use_cache=True)
        written.append(int(result.logits[0, -1].argmax()))
        times.append(time.perf_counter())
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {"prefill_s": times[0] - start, "token_s": steps, "tokens": written}


def main() -> None:
    folder, static = sys.argv[1], sys.argv[2] == "static"
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(model, request["tokens"], request["new"], static)), flush=True)


if __name__ == "__main__":
    main()
