"""A plain NumPy simulation of every KV-cache compression method, written from the papers' rules alone.

It shares no code with the library and is slow on purpose: loops over heads, tokens and groups, one sequence, one
layer. Property tests run the library and this simulation on the same inputs and compare positions, lengths, stored
numbers and outputs.

Shapes: `query [T, N, H]`, `key [T, K, H]`, `value [T, K, H]` for a prompt and `[N, H]`, `[K, H]`, `[K, H]` for one
decoded token, all after rotary embedding. Section numbers in the docstrings are those of the project's method
specification.
"""

from .allocation import count_of, pyramid_ratios, pyramidkv_budgets, top_positions
from .attention import View, attend, causal_attention, causal_probabilities, column_sums, pool, softmax, window_scores
from .methods import (
    H2O,
    KIVI,
    Bits,
    Full,
    KVMerger,
    Method,
    MiKV,
    MiniKV,
    MiniKVPlus,
    PyramidKV,
    QHitter,
    SnapKV,
    StreamingLLM,
    ThinK,
    channel_balancer,
)
from .quantiser import (
    METADATA_BITS,
    Quantised,
    damped,
    dequantise,
    gptq,
    hadamard,
    integer_zero_roundtrip,
    pack_interleaved,
    quantise,
    roundtrip_per_channel,
    roundtrip_per_token,
    short_floats,
    unpack_interleaved,
)
from .sizes import bits_per_element, full_mib, kivi_mib, mikv_share, minikv_mib

__all__ = [
    "H2O",
    "KIVI",
    "METADATA_BITS",
    "Bits",
    "Full",
    "KVMerger",
    "Method",
    "MiKV",
    "MiniKV",
    "MiniKVPlus",
    "PyramidKV",
    "QHitter",
    "Quantised",
    "SnapKV",
    "StreamingLLM",
    "ThinK",
    "View",
    "attend",
    "bits_per_element",
    "causal_attention",
    "causal_probabilities",
    "channel_balancer",
    "column_sums",
    "count_of",
    "damped",
    "dequantise",
    "full_mib",
    "gptq",
    "hadamard",
    "integer_zero_roundtrip",
    "kivi_mib",
    "mikv_share",
    "minikv_mib",
    "pack_interleaved",
    "pool",
    "pyramid_ratios",
    "pyramidkv_budgets",
    "quantise",
    "roundtrip_per_channel",
    "roundtrip_per_token",
    "short_floats",
    "softmax",
    "top_positions",
    "unpack_interleaved",
    "window_scores",
]
