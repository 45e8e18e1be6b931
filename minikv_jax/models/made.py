"""What methods do to a model's weights before it is read: `params = made(params, config.weights)`."""

from minikv_jax.latent import LoRC, Weights
from minikv_jax.model import Params
from minikv_jax.models.latent import cskv, lorc
from minikv_jax.models.shared import kvsharer
from minikv_jax.sharing import KVSharer


def made(params: Params, weights: Weights | None) -> Params:
    """The params made into the weights that a method asks for (`CacheConfig.weights`): themselves, for most.

    Raises:
        ConfigError: another kind of model.
        CheckpointError: trained weights that are not there or do not fit.
    """
    if weights is None:
        return params
    if isinstance(weights, KVSharer):
        return kvsharer(params, weights.layers, weights.sources)
    if isinstance(weights, LoRC):
        return lorc(params, weights.least, weights.most)
    return cskv(params, weights.keys, weights.values, weights.weights)
