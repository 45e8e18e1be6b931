"""transformers on torch, as the GPU benchmark's contender. Runs in a process of its own and imports nothing of ours.

    python _torch_e2e.py '{"shape": {...}, "cache": "dynamic" | "quanto-2bit", "batch": B, "prompt": S, "seconds": s}'

Weights are random, and so is what the cache holds of a prompt: keys and values go through the cache's own `update`.
Prints "ready", waits for a line, and prints one JSON object. The quantised cache needs the package optimum-quanto.
"""

import json
import sys
import time

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache


def quantised(config: LlamaConfig, bits: int) -> QuantizedCache:
    """Groups of 32 along the channels; a residual of 128 exact tokens, as in KIVI."""
    return QuantizedCache("quanto", config, nbits=bits, axis_key=0, axis_value=0, q_group_size=32)


@torch.inference_mode()
def main() -> None:
    case = json.loads(sys.argv[1])
    shape, batch, prompt = case["shape"], case["batch"], case["prompt"]
    config = LlamaConfig(**shape, tie_word_embeddings=False, attn_implementation="sdpa")
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    bits = 2 if case["cache"] == "quanto-2bit" else None
    if bits:  # optimum-quanto compiles its kernels when they are first used, for minutes
        cache = quantised(config, bits)
        for tokens in (64, 1):
            cache.update(*(torch.zeros(1, heads, tokens, size, device="cuda"),) * 2, 0)
    print("ready", flush=True)  # next to nothing is on the device; the benchmark says when it is this process's turn
    sys.stdin.readline()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), transformers.initialization.no_init_weights():
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    cache = quantised(config, bits) if bits else DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(batch, heads, prompt, size, device="cuda") for _ in range(2))
        cache.update(key, value, layer)
        del key, value
    token = torch.ones((batch, 1), dtype=torch.long, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, last = [], time.perf_counter()
    while len(times) < 4 or (sum(times) < case["seconds"] and len(times) < 64):
        logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1]
        token = torch.multinomial(torch.softmax(logits.float(), -1), 1)
        torch.cuda.synchronize()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    warm = sorted(times[2:])
    row = {
        "step_ms": 1e3 * warm[len(warm) // 2],
        "steps": len(times),
        "decode_peak_bytes": torch.cuda.max_memory_allocated(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
