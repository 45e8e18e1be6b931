"""A warp in numpy: runs the Triton device code lane by lane on a CPU.

The kernel's own Python source is executed with two things replaced: `tl` by the small stand-in below, and the few
functions that are single PTX instructions by what the PTX manual says they do. What this proves is the arithmetic, the
fragment layouts and every address; speed, and acceptance by the compiler, it does not.
"""

import sys
import types

import ml_dtypes
import numpy as np

LANES = 32


class Register(np.ndarray):
    """An array of [32] lanes, or of [1] for a scalar, with the methods of a Triton tensor."""

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else self.astype(dtype)


def register(x, dtype=None):
    x = np.atleast_1d(np.asarray(x, dtype))
    return (x.astype(np.int32) if dtype is None and x.dtype == np.int64 else x).view(Register)


class Pointer:
    """Elements of a flat array; `.to(int64)` gives the byte address within `Memory`."""

    def __init__(self, array, base, offset=0):
        self.array, self.base, self.offset = array, base, offset

    def __add__(self, offset):
        return Pointer(self.array, self.base, self.offset + np.asarray(offset, np.int64))

    def to(self, _dtype):
        return register(np.int64(self.base), np.int64)


class Memory:
    """One byte array that holds all kernel arguments; reading outside an argument raises."""

    def __init__(self, arrays):
        self.bytes = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in arrays]
        self.starts = [(i + 1) << 40 for i in range(len(arrays))]
        self.pointers = [Pointer(np.ascontiguousarray(x).reshape(-1), start) for x, start in zip(arrays, self.starts)]

    def read(self, address):
        """16 bytes from every lane's address: [lanes, 16]."""
        which = int(address[0] >> 40) - 1
        offset = np.asarray(address, np.int64) - self.starts[which]
        assert (offset >= 0).all() and (offset + 16 <= self.bytes[which].size).all(), "read outside an argument"
        assert (offset % 16 == 0).all(), "a copy is not aligned"
        return self.bytes[which][offset[:, None] + np.arange(16)]


class Shared:
    """Shared memory with asynchronous copies at their worst: a target is garbage from start to wait."""

    def __init__(self, memory):
        self.memory = memory

    def reserve(self, _lane, size):
        self.bytes = np.full(size, 0xCD, np.uint8)
        self.open, self.groups = [], []
        return register(np.zeros(LANES), np.int32)

    def copy(self, to, source, valid):
        to, source, valid = (np.broadcast_to(x, (LANES,)) for x in (to, source, valid))
        assert (to % 16 == 0).all()
        use = valid != 0
        if use.any():
            at = to[use][:, None] + np.arange(16)
            self.bytes[at] = 0xCD
            self.open.append((at, self.memory.read(source[use])))

    def close(self, _lane):
        self.groups.append(self.open)
        self.open = []

    def wait(self, _lane):
        while len(self.groups) > 1:
            for at, read in self.groups.pop(0):
                self.bytes[at] = read

    def store(self, address, x):
        self.bytes[address[:, None] + np.arange(4)] = np.ascontiguousarray(x).view(np.uint8).reshape(LANES, 4)

    def words(self, address, count):
        assert (address % (4 * count) == 0).all(), "a load is not aligned to its width"
        read = np.ascontiguousarray(self.bytes[address[:, None] + np.arange(4 * count)]).view(np.int32)
        return tuple(register(read[:, i]) for i in range(count))


def _halves(x):
    """Pairs of float16 as float32 [..., 2]."""
    return np.ascontiguousarray(x).view(np.float16).reshape(*x.shape, 2)


def _pack(x):
    """float16 [32, 2] as words."""
    return np.ascontiguousarray(x.astype(np.float16)).view(np.int32).reshape(-1).view(Register)


_G, _T = np.arange(LANES) // 4, np.arange(LANES) % 4


def _bfloat16s(x):
    """Pairs of bfloat16 as float32 [..., 2]."""
    return np.stack([x << 16, x & np.int32(-65536)], axis=-1).astype(np.int32).view(np.float32)


def _mma(a0, a1, a2, a3, b0, b1, c, numbers=_halves):
    a, b, d = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i in range(2):
        for part, row, column in ((a0, 0, 0), (a1, 8, 0), (a2, 0, 8), (a3, 8, 8)):
            a[_G + row, 2 * _T + i + column] = numbers(part)[:, i]
        for part, row in ((b0, 0), (b1, 8)):
            b[2 * _T + i + row, _G] = numbers(part)[:, i]
        for j in range(2):
            d[_G + 8 * j, 2 * _T + i] = c[2 * j + i]
    d = (d + a @ b).astype(np.float32)
    return tuple(d[_G + 8 * j, 2 * _T + i].view(Register) for j in range(2) for i in range(2))


def _transpose8(x):
    matrix = np.ascontiguousarray(x).view(np.uint16).reshape(8, 8)
    return np.ascontiguousarray(matrix.T).reshape(-1).view(np.int32).view(Register)


def _unpack_float8(x):
    numbers = np.ascontiguousarray(x).view(ml_dtypes.float8_e4m3fn).reshape(LANES, 4)
    return _pack(numbers[:, :2]), _pack(numbers[:, 2:])


def _lanes(x):
    return np.broadcast_to(x, (LANES,))


def _instructions(shared):
    def multiply2(x, y):
        return _pack(_halves(_lanes(x)) * _halves(_lanes(y)))

    def pair(low, high, BFLOAT16=False):
        numbers = np.stack([_lanes(low), _lanes(high)], axis=1)
        if not BFLOAT16:
            return _pack(numbers)
        return numbers.astype(ml_dtypes.bfloat16).view(np.int32).reshape(-1).view(Register)

    def mma(a0, a1, a2, a3, b0, b1, c, BFLOAT16=False):
        words = (_lanes(x) for x in (a0, a1, a2, a3, b0, b1))
        return _mma(*words, tuple(_lanes(x) for x in c), numbers=_bfloat16s if BFLOAT16 else _halves)

    def read4(address, valid):
        address, valid = _lanes(address), _lanes(valid).astype(bool)
        words = np.zeros((LANES, 4), np.int32)
        if valid.any():
            words[valid] = np.ascontiguousarray(shared.memory.read(address[valid])).view(np.int32)
        return tuple(register(words[:, i]) for i in range(4))

    return {
        "limit_registers": lambda count: None,
        "read": lambda pointer, valid: _load(pointer, _lanes(valid)),
        "write": lambda pointer, x, valid: _store(pointer, x, valid),
        "ring": shared.reserve,
        "copy16": shared.copy,
        "close_group": shared.close,
        "wait_group": shared.wait,
        "warp_barrier": lambda lane: None,
        "store1": shared.store,
        "load1": lambda a: shared.words(a, 1)[0],
        "load2": lambda a: shared.words(a, 2),
        "load4": lambda a: shared.words(a, 4),
        "mma": mma,
        "masked_mma": lambda a, b0, b1, c, MASK: mma(*(x & np.int32(MASK) for x in a), b0, b1, c),
        "twice_masked_mma": lambda a, e, b0, b1, c, MASK, THIRD: mma(
            *(x & np.int32(MASK) | y & np.int32(THIRD) for x, y in zip(a, e)), b0, b1, c
        ),
        "read4": read4,
        "transpose8": _transpose8,
        "shuffle": lambda x, lane: _lanes(x)[_lanes(lane)].view(Register),
        "warp_max": lambda x: register(np.full(LANES, x.max(), np.int32)),
        "spread": lambda x: ((x & 0xFF) | ((x & 0xFF00) << 8), ((x >> 16) & 0xFF) | ((x >> 8) & 0xFF0000)),
        "spread_up": lambda x: (
            ((x & 0xFF) << 8) | ((x & 0xFF00) << 16),
            ((x >> 8) & 0xFF00) | (x & np.int32(-16777216)),
        ),
        "unpack_float8": lambda x: _unpack_float8(_lanes(x)),
        "multiply2": multiply2,
        "subtract2": lambda x, y: _pack(_halves(_lanes(x)) - _halves(_lanes(y))),
        "half_as_float": lambda x, shift: (
            _halves(_lanes(x))[np.arange(LANES), _lanes(shift) // 16].astype(np.float32).view(Register)
        ),
        "pair": pair,
    }


def _where(condition, x, y):
    out = np.where(condition, x, y)
    return out.astype(np.float32 if out.dtype.kind == "f" else np.int32).view(Register)


def _load(pointer, mask=None, other=0.0):
    offset = np.atleast_1d(pointer.offset)
    mask = np.broadcast_to(True if mask is None else mask, offset.shape)
    value = pointer.array[np.where(mask, offset, 0)]
    return register(np.where(mask, value, np.asarray(other, value.dtype)), value.dtype)


def _store(pointer, value, mask=None):
    offset = np.atleast_1d(pointer.offset)
    mask = np.broadcast_to(True if mask is None else mask, offset.shape)
    pointer.array[offset[mask]] = np.broadcast_to(value, offset.shape)[mask]


def run(module, kernel, grid, arrays, scalars_at, constants):
    """Runs every program of a grid. `arrays` are changed in place where the kernel stores.

    Args:
        scalars_at: index in the argument list -> scalar, for arguments that are no arrays.
        constants: the kernel's constexpr arguments.
    """
    memory = Memory(arrays)
    program = [0, 0, 0]
    tl = types.SimpleNamespace(
        constexpr=None,
        int32=np.int32,
        int64=np.int64,
        float32=np.float32,
        static_range=range,
        arange=lambda a, b: register(np.arange(a, b, dtype=np.int32)),
        zeros=lambda shape, dtype: np.zeros(shape, dtype).view(Register),
        full=lambda shape, x, dtype: np.full(shape, x, dtype).view(Register),
        where=_where,
        maximum=np.fmax,
        minimum=np.minimum,
        exp2=np.exp2,
        abs=np.abs,
        load=_load,
        store=_store,
        program_id=lambda axis: register(np.int32(program[axis])),
    )

    def steps(first, last, step=1):
        return [register(np.int32(i)) for i in range(int(first[0]), int(last[0]), step)]

    space = {"tl": tl, "__builtins__": __builtins__, "range": steps}
    functions = [x for x in vars(module).values() if hasattr(x, "fn")]
    modules = {sys.modules[x.fn.__module__] for x in functions}
    for name, value in (item for m in modules for item in vars(m).items()):
        if hasattr(value, "fn"):
            space[name] = types.FunctionType(value.fn.__code__, space, name, value.fn.__defaults__)
    space |= _instructions(Shared(memory))
    arguments = list(memory.pointers)
    for index, scalar in scalars_at.items():
        arguments.insert(index, scalar)
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    program[:] = [x, y, z]
                    space[kernel](*arguments, **constants)
    return [pointer.array for pointer in memory.pointers]
