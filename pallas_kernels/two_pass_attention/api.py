"""Exact prefill attention that also returns how much attention every key received."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, check_softmax, first_that_accepts, without_soft_cap
from pallas_kernels.partial import with_sinks
from pallas_kernels.two_pass_attention import xla
from pallas_kernels.two_pass_attention.common import ScoreRows


def _mosaic_gpu(*args, **kwargs):
    try:  # on the first call: programs without a GPU never pay for the import
        from pallas_kernels.two_pass_attention import mosaic_gpu
    except ImportError as error:
        raise NotImplementedError(f"this JAX has no Pallas Mosaic GPU ({error})") from error
    return mosaic_gpu.two_pass_attention(*args, **kwargs)


def _triton(*args, **kwargs):
    from pallas_kernels.two_pass_attention import triton

    return triton.two_pass_attention(*args, **kwargs)


def _xla(query, key, value, query_lengths, key_value_lengths, query_offset, **kwargs):
    full = jnp.full((query.shape[0],), 1, jnp.int32)
    query_lengths = full * query.shape[1] if query_lengths is None else query_lengths
    key_value_lengths = full * key.shape[1] if key_value_lengths is None else key_value_lengths
    return xla.two_pass_attention(query, key, value, query_lengths, key_value_lengths, query_offset, **kwargs)


def _without_sinks(kernel):
    """A kernel that knows no sinks: they take their share of the output afterwards, but not of the scores."""

    def run(*args, sinks, score_rows, **kwargs):
        if sinks is not None and score_rows != 0:
            raise NotImplementedError("sinks with scores: this kernel sums attention without them")
        output, scores, lse = kernel(*args, score_rows=score_rows, **kwargs)
        if sinks is None:
            return output, scores, lse
        output, whole = with_sinks(output, lse, sinks)
        # Rows of padding see nothing, no sink either.
        return output, scores, jnp.where(jnp.isneginf(lse), lse, whole)

    return run


_IMPLEMENTATIONS = {
    "mosaic_gpu": _without_sinks(without_soft_cap(_mosaic_gpu)),
    "triton": _without_sinks(without_soft_cap(_triton)),
    "xla": _xla,
}
# An implementation declines devices that it cannot run on, so a CPU always gets "xla".
_DEFAULT = ("mosaic_gpu", "triton", "xla")


def two_pass_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    query_lengths: Int[Array, "B"] | None = None,
    key_value_lengths: Int[Array, "B"] | None = None,
    query_offset: Int[Array, "B"] | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    sliding_window: int | None = None,
    score_rows: ScoreRows = "all",
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S"], Float[Array, "B T N"]]:
    """Attention output, attention received per key, and log-sum-exp, in memory linear in T and S.

    The score of a key is the sum of its softmax probabilities over the chosen query rows and over the query heads of
    its group (MiniKV, arXiv 2411.18077, Algorithm 1; with the last W rows: SnapKV, arXiv 2404.14469).
    Rows and columns of padding contribute exactly nothing, whatever they hold. On a GPU no array beside the results
    grows with T or S, but where one is no multiple of 8 "mosaic_gpu" copies query, key and value into padded arrays.

    Args:
        query: [B, T, N, H]. Row i of sequence b stands at position `query_offset[b] + i`.
        key: [B, S, K, H]. Column j stands at position j.
        value: [B, S, K, H].
        query_lengths: [B] real rows; default T, and more than T means T.
        key_value_lengths: [B] real columns; default S, and more than S means S.
        query_offset: [B] position of the first row; default 0. With it a prompt is read in chunks.
        scale: of the logits; default H ** -0.5.
        is_causal: a row sees only columns at or before its position.
        sliding_window: a row sees only the last this many columns up to its position; None: all.
        score_rows: "all", or W: only each sequence's last W rows add to the scores (0: none, scores are zero).
        soft_cap: c bounds logits x by c tanh(x / c); "xla" alone does so.
        sinks: [N] logits that take a share of each row's attention and have no value; with scores "xla" alone.
        implementation: None (the first that runs here), "mosaic_gpu" (Hopper), "triton" (CUDA from Ampere on), "xla",
            or a sequence of names to try.

    Returns:
        output [B, T, N, H] in the query's dtype, scores [B, K, S] float32, natural log-sum-exp [B, T, N] float32.
        Rows of padding have output 0 and log-sum-exp -inf.

    Raises:
        ValueError: shapes or options that contradict each other.
        NotImplementedError: a named implementation cannot run these arguments.
    """
    b, _, n, h = query.shape
    if key.shape != value.shape or key.shape[0] != b or key.shape[3] != h or n % key.shape[2]:
        raise ValueError(f"query {query.shape}, key {key.shape} and value {value.shape} do not fit together.")
    if score_rows != "all" and (isinstance(score_rows, str) or score_rows < 0):
        raise ValueError(f"score_rows={score_rows!r}: give 'all' or a number of rows >= 0.")
    if sliding_window is not None and (sliding_window < 1 or not is_causal):
        raise ValueError(f"sliding_window={sliding_window} needs is_causal=True and at least 1 column.")
    check_softmax(soft_cap, sinks, n)
    # Kernels derive addresses from lengths.
    query_lengths, key_value_lengths = (
        None if lengths is None else jnp.clip(lengths, 0, x.shape[1])
        for lengths, x in ((query_lengths, query), (key_value_lengths, key))
    )
    return first_that_accepts(
        "two_pass_attention",
        _IMPLEMENTATIONS,
        implementation,
        _DEFAULT,
        query,
        key,
        value,
        query_lengths,
        key_value_lengths,
        query_offset,
        scale=h**-0.5 if scale is None else scale,
        is_causal=is_causal,
        sliding_window=sliding_window,
        score_rows=score_rows,
        soft_cap=soft_cap,
        sinks=sinks,
    )
