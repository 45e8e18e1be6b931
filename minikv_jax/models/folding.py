"""Multipliers of a model's parts, folded into its weights while they are read: what is computed then is LLaMA's.

Of x -> embedding * E[x], residual * f(norm(x)), softmax(attention * q k) and logits / logits of the final norm, every
number can be moved into a matrix or a norm beside it.
"""

from collections.abc import Mapping

from minikv_jax.errors import UnsupportedModelError

MULTIPLIERS = ("embedding", "attention", "residual", "logits")


def scales(multipliers: Mapping[str, float], head_dim: int, tied: bool) -> dict[str, float]:
    """What stored tensors are multiplied by, under our names.

    Args:
        multipliers: those of MULTIPLIERS that a model has; none for a model without them.
        head_dim: the size whose inverse root attention is multiplied by otherwise.
        tied: whether one matrix is both embedding and head; what it is multiplied by as the one, the final norm is
            divided by for the other.

    Raises:
        UnsupportedModelError: for a multiplier that is not positive.
    """
    for name, value in multipliers.items():
        if value <= 0:
            raise UnsupportedModelError(f"The multiplier of {name} must be positive, got {value}.")
    if not multipliers:
        return {}
    embedding, residual = multipliers.get("embedding", 1.0), multipliers.get("residual", 1.0)
    return {
        "head" if tied else "embedding": embedding,
        "norm": 1 / multipliers.get("logits", 1.0) / (embedding if tied else 1.0),
        "query": multipliers.get("attention", head_dim**-0.5) * head_dim**0.5,
        "output": residual,
        "down": residual,
    }
