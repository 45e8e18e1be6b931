"""How many experts a mixture has, and how a token's are chosen."""

from dataclasses import dataclass

from minikv_jax.errors import UnsupportedModelError, shortened
from minikv_jax.models.entries import is_integer


@dataclass(frozen=True)
class Experts:
    """The experts of every layer: gated MLPs, of which a softmax router chooses a few for each token.

    Attributes:
        count: experts of a layer.
        chosen: experts that a token goes through.
        size: of an expert's inner vector.
        renormalised: whether the chosen experts' probabilities are divided by their sum.

    Raises:
        UnsupportedModelError: if sizes are not positive, or more are chosen than there are.
    """

    count: int
    chosen: int
    size: int
    renormalised: bool

    def __post_init__(self) -> None:
        for name, value in (("experts", self.count), ("chosen experts", self.chosen), ("expert size", self.size)):
            if not is_integer(value) or value < 1:
                raise UnsupportedModelError(f"The number of {name} must be a positive integer, got {shortened(value)}.")
        if self.chosen > self.count:
            raise UnsupportedModelError(f"A token cannot choose {self.chosen} of {self.count} experts.")
