"""The size formulas of sections 0.3, 1.7 and 2.2. `G`-token buffers are left out, as in the papers' figures."""

from fractions import Fraction

MIB_BITS = 8 * 2**20


def bits_per_element(bits: int, group: int, metadata_bits: int = 16) -> float:
    """Codes plus one scale and one minimum a group (section 0.3); 16 bits are stored as they are."""
    return 16.0 if bits == 16 else float(bits + Fraction(2 * metadata_bits, group))


def full_mib(tokens: int, layers: int, kv_heads: int, head_size: int) -> float:
    """K and V of `tokens` tokens at 16 bits (section 0.3)."""
    return 2 * tokens * layers * kv_heads * head_size * 16 / MIB_BITS


def minikv_mib(
    prompt: int,
    generated: int,
    layers: int,
    kv_heads: int,
    head_size: int,
    heavy: float = 0.25,
    recent: float = 0.25,
    bits: int = 2,
    group: int = 16,
) -> float:
    """[(heavy + recent) * prompt + generated] tokens at bits + 32 / group (section 1.7)."""
    tokens = (heavy + recent) * prompt + generated
    return 2 * tokens * layers * kv_heads * head_size * bits_per_element(bits, group) / MIB_BITS


def kivi_mib(
    prompt: int, generated: int, layers: int, kv_heads: int, head_size: int, bits: int = 2, group: int = 32
) -> float:
    """Every token at bits + 32 / group (section 1.7)."""
    return minikv_mib(prompt, generated, layers, kv_heads, head_size, 1.0, 0.0, bits, group)


def mikv_share(ratio: float, low_bits: int, high_bits: int, head_size: int) -> float:
    """Size relative to 16 bits, with half-head groups in integer tiers (section 2.2)."""
    low = bits_per_element(low_bits, head_size // 2)
    high = bits_per_element(high_bits, head_size // 2)
    return (ratio * high + (1 - ratio) * low) / 16
