"""What tests of the Hopper kernels share."""

import pytest

from pallas_kernels import mosaic

on_mosaic = pytest.mark.skipif(not mosaic.jax_is_new_enough(), reason=f"Mosaic's kernels want jax {mosaic.OLDEST_JAX}")
