"""Runs the whole Triton two-pass attention on the CPU: `jax_triton.triton_call` becomes Triton's own interpreter.

To be imported first, in a process of its own: the interpreter is chosen when `triton` is imported, and it rewrites the
language for good. It multiplies float16 and float32 alone, so bfloat16 is left to a GPU.
"""

import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from triton.runtime import interpreter


class Tensor:
    """What the interpreter asks of a torch tensor, over memory of numpy."""

    def __init__(self, array):
        self.array = np.array(array, order="C")
        self.dtype = {"float16": "fp16", "float32": "fp32", "int32": "i32"}[self.array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def storage(self, *_, **__):
        return self

    def nothing(self, *_):
        return None

    untyped_storage = cpu = new_empty = storage
    set_ = storage_offset = size = stride = copy_ = nothing


def _index_of_one_element(tensor, scope, patch=interpreter._patch_lang_tensor):
    patch(tensor, scope)  # its own way to make an array of one element an integer is an error in newer numpy
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def triton_call(*arguments, kernel, out_type, grid, num_warps, num_stages, compute_capability, **constants):
    def missing(shape):  # what the kernel leaves out is seen in the result
        return Tensor(np.full(shape.shape, np.nan, shape.dtype))

    outputs = jax.tree.map(missing, out_type)
    inputs = [Tensor(x) if isinstance(x, jax.Array) else x.item() if hasattr(x, "item") else x for x in arguments]
    kernel[grid](*inputs, *jax.tree.leaves(outputs), **constants)
    return jax.tree.map(lambda x: jnp.asarray(x.array), outputs)


interpreter._patch_lang_tensor = _index_of_one_element
sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=triton_call)
