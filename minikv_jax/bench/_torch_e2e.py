"""transformers on torch, as the GPU benchmark's contender. Runs in a process of its own and imports nothing of ours.

    python _torch_e2e.py '{"shape": {...}, "cache": "dynamic" | "quanto-2bit", "batch": B, "prompt": S, "seconds": s,
                           "parts": ["decode", "prefill"]}'

Weights are random. What a cache that is decoded from holds of a prompt is random too: keys and values go through the
cache's own `update`. Prints "ready", waits for a line, and prints one JSON object. The quantised cache needs the
package optimum-quanto. Without a GPU it runs on the CPU, for trying it out.
"""

import json
import sys
import time
import types

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def quantised(config: LlamaConfig) -> QuantizedCache:
    """Two bits in groups of 32 along the channels; a residual of 128 exact tokens, as in KIVI."""
    return QuantizedCache("quanto", config, nbits=2, axis_key=0, axis_value=0, q_group_size=32)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """All first codes of the bytes, then all second ones, as optimum-quanto's operations of torch do it."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def unpacking() -> str:
    """Makes optimum-quanto's way of unpacking codes ready, and says which one it is.

    Its CUDA kernels are compiled when they are first used, for minutes, by a toolkit that is not on every machine. A
    module `quanto_cuda` that was compiled before is taken instead; without either, its own operations of torch.
    """
    from optimum.quanto.library.extensions import get_extension, is_extension_available

    if not is_extension_available("quanto_cuda"):
        return "torch operations"
    extension = get_extension("quanto_cuda")
    try:
        import quanto_cuda

        extension._lib = quanto_cuda
    except ImportError:
        try:
            assert extension.lib
        except Exception as error:  # of a compiler, a linker or a loader
            print(f"optimum-quanto's kernels do not compile: {error}", file=sys.stderr)
            extension._lib = types.SimpleNamespace(unpack=unpack)
            return "torch operations"
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    assert torch.equal(torch.ops.quanto.unpack(codes, 2), unpack(codes, 2)), "quanto_cuda unpacks something else"
    return "CUDA kernel"


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def start_of_peak() -> None:
    synchronize()
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def peak() -> int | None:
    return torch.cuda.max_memory_allocated() if GPU else None


def sample(logits) -> torch.Tensor:
    return torch.multinomial(torch.softmax(logits[:, -1].float(), -1), 1)


def decode(model, cache, batch: int, prompt: int, seconds: float) -> dict:
    """The decode loop's figures, after a prompt of noise."""
    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(batch, heads, prompt, size, device=DEVICE) for _ in range(2))
        cache.update(key, value, layer)
        del key, value
    assert cache.get_seq_length() == prompt
    token = torch.ones((batch, 1), dtype=torch.long, device=DEVICE)
    start_of_peak()
    times, last = [], time.perf_counter()
    while len(times) < 4 or (sum(times) < seconds and len(times) < 64):
        token = sample(model(token, past_key_values=cache, use_cache=True).logits)
        synchronize()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    warm = sorted(times[2:])
    return {"step_ms": 1e3 * warm[len(warm) // 2], "steps": len(times), "decode_peak_bytes": peak()}


def prefill(model, new_cache, batch: int, prompt: int) -> dict:
    """Time to the first token, the second time."""
    tokens = torch.randint(model.config.vocab_size, (batch, prompt), device=DEVICE)
    start_of_peak()
    for _ in range(2):
        synchronize()
        start = time.perf_counter()
        sample(model(tokens, past_key_values=new_cache(), use_cache=True, logits_to_keep=1).logits)
        synchronize()
        seconds = time.perf_counter() - start
    return {"ttft_s": seconds, "ttft_warm": True, "prefill_peak_bytes": peak()}


@torch.inference_mode()
def main() -> None:
    case = json.loads(sys.argv[1])
    config = LlamaConfig(**case["shape"], tie_word_embeddings=False, attn_implementation="sdpa")
    row = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    if case["cache"] == "quanto-2bit":
        row["unpacking"] = unpacking()
    print("ready", flush=True)  # next to nothing is on the device; the benchmark says when it is this process's turn
    sys.stdin.readline()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE), transformers.initialization.no_init_weights():
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.02)

    def new_cache():
        return quantised(config) if case["cache"] == "quanto-2bit" else DynamicCache(config=config)

    if "decode" in case["parts"]:
        row |= decode(model, new_cache(), case["batch"], case["prompt"], case["seconds"])
    if "prefill" in case["parts"]:
        row |= prefill(model, new_cache, case["batch"], case["prompt"])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
