"""Trained latents beside a model: NAME.cskv.safetensors in the folder of its weights, float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from minikv_jax.errors import CheckpointError, shortened
from minikv_jax.latent import CSKV, rank_of

if TYPE_CHECKING:
    from minikv_jax.models.llama import Llama


class Product(NamedTuple):
    """Two matrices in the place of one, [D, R] and [R, K H]."""

    down: Float[np.ndarray | Array, "D R"]
    up: Float[np.ndarray | Array, "R KH"]


class Products(NamedTuple):
    """Those of a layer."""

    key: Product
    value: Product


def path_of(folder: Path, name: str) -> Path:
    """Where weights of this name lie."""
    return folder / f"{name}.cskv.safetensors"


def write_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """Writes a safetensors file in one step."""
    from safetensors.numpy import save_file

    scratch = path.with_suffix(".new")
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, scratch, about)
    scratch.replace(path)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What `write_arrays` has written.

    Raises:
        CheckpointError: a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read {path}: {shortened(str(error))}.") from None


def write_products(folder: Path, name: str, products: Sequence[Products], about: dict[str, str]) -> Path:
    """Writes the products of all layers, and says where."""
    named = {
        f"layers.{i}.{kind}.{field}": np.asarray(x, np.float32)
        for i, pair in enumerate(products)
        for kind, one in pair._asdict().items()
        for field, x in one._asdict().items()
    }
    write_arrays(path_of(folder, name), named, about)
    return path_of(folder, name)


def read_products(model: "Llama", made: CSKV) -> list[Products]:
    """What `write_products` has written for this model.

    Raises:
        CheckpointError: no such file, a damaged one, or one of other ranks or another model.
    """
    if model.home is None or made.weights is None:
        raise CheckpointError(f"weights={made.weights} lie beside a model's files, and this model came from none.")
    path = path_of(Path(model.home), made.weights)
    if not path.is_file():
        raise CheckpointError(f"There is no {path}: `minikv train cskv --name {made.weights}` writes it.")
    held, _ = read_arrays(path)
    config = model.config
    width = config.num_kv_heads * config.head_dim

    def array(name: str, shape: tuple[int, int]) -> np.ndarray:
        if name not in held or held[name].shape != shape:
            has = held[name].shape if name in held else "not at all"
            raise CheckpointError(
                f"{path} holds {name} {has}, and {made} needs {shape}: it is for another model or other densities."
            )
        return held[name]

    def product(i: int, kind: str, share: float) -> Product:
        rank = rank_of(share, width)
        down = array(f"layers.{i}.{kind}.down", (config.hidden_size, rank))
        return Product(down, array(f"layers.{i}.{kind}.up", (rank, width)))

    return [Products(product(i, "key", made.keys), product(i, "value", made.values)) for i in range(config.num_layers)]
