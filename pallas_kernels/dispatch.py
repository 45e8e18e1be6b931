"""Choice of an implementation, the way `jax.nn.dot_product_attention` and tokamax do it."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax

type Implementation = str | Sequence[str] | None


def device_kind() -> str:
    """What the program is traced for: the abstract device of a cross-lowering, or the default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.device_kind if abstract.platform == "cuda" else abstract.platform
    device = jax.config.jax_default_device or jax.local_devices()[0]
    platform = device if isinstance(device, str) else device.platform
    return getattr(device, "device_kind", platform) if platform in ("gpu", "cuda") else platform


def first_that_accepts(
    operation: str,
    implementations: Mapping[str, Callable],
    chosen: Implementation,
    default: Sequence[str],
    *args,
    **kwargs,
):
    """Calls the first implementation that does not decline by `NotImplementedError`.

    Args:
        chosen: None tries `default` in order; a name must run; a sequence of names is tried in order.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: no candidate accepts; the message holds every reason.
    """
    names = default if chosen is None else (chosen,) if isinstance(chosen, str) else tuple(chosen)
    unknown = [name for name in names if name not in implementations]
    if unknown or not names:
        raise ValueError(
            f"{operation}: unknown implementation {unknown or chosen!r}: choose from {sorted(implementations)}."
        )
    reasons = []
    for name in names:
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{operation}: no implementation accepts these arguments. " + "; ".join(reasons))


def without_soft_cap(kernel: Callable) -> Callable:
    """A kernel that bounds no logits, as an implementation that declines to."""

    @functools.wraps(kernel)
    def run(*args, soft_cap: float | None, **kwargs):
        if soft_cap is not None:
            raise NotImplementedError(f"soft_cap={soft_cap}: this kernel bounds no logits")
        return kernel(*args, **kwargs)

    return run


def check_softmax(soft_cap: float | None, sinks: jax.Array | None, query_heads: int) -> None:
    """Refuses what is no bound of logits, and sinks of other heads.

    Raises:
        ValueError: naming it.
    """
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: give None or a number above 0.")
    if sinks is not None and sinks.shape != (query_heads,):
        raise ValueError(f"sinks {sinks.shape} must be [N]={(query_heads,)}.")
