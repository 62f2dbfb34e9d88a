"""A table of PTX instructions: each name has a function of numpy arrays with one element per thread.

Registers hold bits: unsigned integers of their width, or bool for predicates. The type of an instruction says how to
convert bits to values (`decode`) and the result to bits (`encode`): "f32" and "bf16" are float32 arrays, and a packed
"bf16x2" is two rows, the low half first. Therefore np.add implements both s32 and f32.

Results follow the PTX ISA 8.7. Floats round to nearest even and keep subnormals, except under .ftz. A NaN result is the
canonical NaN (0x7fffffff, or 0x7fff in 16 bits). For min and max, -0 is smaller than +0. The table has the instructions
that Triton 3.6 emits for the kernels of this repository. Any other instruction raises Unknown.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Unknown(ValueError):
    """An instruction or a type that is not in the table."""


# ---------------------------------------------------------------------------------------------------------------------
# Types


def width(type_name: str) -> int:
    """Number of bits of a type, 1 for a predicate."""
    if type_name == "pred":
        return 1
    digits = re.fullmatch(r"[a-z]+(8|16|32|64)(x2)?", type_name)
    if digits is None:
        raise Unknown(f"type .{type_name}")
    return int(digits[1]) * (2 if digits[2] else 1)


@functools.cache
def bits_dtype(type_name: str) -> np.dtype:
    """The numpy dtype of a register of this type."""
    return np.dtype(np.bool_ if type_name == "pred" else f"uint{width(type_name)}")


@functools.cache
def _is_float(type_name: str) -> bool:
    return type_name.startswith(("f", "bf"))


def decode(bits: np.ndarray, type_name: str) -> np.ndarray:
    """The values of these bits, read as a type of the same width."""
    if type_name.endswith("x2"):
        halves = np.stack([bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)])
        return decode(halves, type_name[:-2])
    if type_name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_name in ("f16", "f32"):
        return bits.view(f"float{width(type_name)}")
    return bits.view(f"int{width(type_name)}") if type_name[0] == "s" else bits


def encode(values: np.ndarray, type_name: str) -> np.ndarray:
    """The bits of values, written as a type. Floats round to nearest even. A NaN becomes the canonical NaN."""
    if type_name.endswith("x2"):
        low, high = encode(values, type_name[:-2]).astype(np.uint32)
        return low | high << np.uint32(16)
    if type_name == "bf16":
        bits = np.asarray(values, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))
    if _is_float(type_name):
        bits = np.asarray(values, f"float{width(type_name)}").view(bits_dtype(type_name))
        return np.where(np.isnan(values), bits_dtype(type_name).type(2 ** (width(type_name) - 1) - 1), bits)
    return np.asarray(values).astype(bits_dtype(type_name), copy=False)


# ---------------------------------------------------------------------------------------------------------------------
# Functions that numpy lacks


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd in float64, so that rounding it to float32 gives the same
    result as rounding the exact sum.
    """
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(np.float64)


def _larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max.NaN: NaN if an operand is NaN, and +0 is larger than -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.maximum(a, b))


def _smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a == b, np.where(np.signbit(a), a, b), np.minimum(a, b))


def flush(x: np.ndarray) -> np.ndarray:
    """Replace subnormals of float32 by zeros of the same sign, as .ftz does."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _exp2(x: np.ndarray) -> np.ndarray:
    return flush(np.exp2(flush(x).astype(np.float64)).astype(np.float32))


def _reciprocal(x: np.ndarray) -> np.ndarray:
    return flush((1 / flush(x).astype(np.float64)).astype(np.float32))


def nudge(x: np.ndarray, ulps: np.ndarray) -> np.ndarray:
    """Change float32 values by `ulps` units in the last place, except zeros, infinities and NaNs."""
    moved = (x.view(np.int32) + np.asarray(ulps, np.int32)).view(np.float32)
    return np.where(np.isfinite(x) & (x != 0), flush(moved), x)


def _shift_left(x: np.ndarray, amount: np.ndarray) -> np.ndarray:
    limit = 8 * x.dtype.itemsize
    return np.where(amount < limit, x << np.minimum(amount, limit - 1).astype(x.dtype), x.dtype.type(0))


def _shift_right(x: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Shift in zeros for an unsigned type and copies of the sign for a signed one, also beyond the width."""
    limit = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(amount, limit - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(amount < limit, shifted, x.dtype.type(0))


def _multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)


def _widen(x: np.ndarray) -> np.ndarray:
    return x.astype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division, rounded towards zero. PTX leaves a division by zero undefined; here it sets all bits."""
    a, b = a.astype(np.int64), b.astype(np.int64)
    quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b)) * (np.sign(a) * np.sign(b))
    return np.where(b == 0, -1, quotient)


def _permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each nibble of the selector selects one of the eight bytes of (b, a), or if bit 3 is set, its sign."""
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.uint32(0)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(0xFF)).astype(np.uint32)
        sign = np.where(byte >= 0x80, np.uint32(0xFF), np.uint32(0))
        result = result | np.where(nibble >= 8, sign, byte) << np.uint32(8 * i)
    return result


def _logic3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: for each bit position, the result is bit 4a + 2b + c of the table."""
    result = np.uint32(0)
    for i in range(8):
        is_entry = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result = result | np.where(table >> np.uint32(i) & np.uint32(1), is_entry, np.uint32(0))
    return result


def _extract_bits(x: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: `length` bits (1 to 32) from `position` (0 to 31) on. A signed type repeats the highest of them."""
    if not ((position < 32) & (length >= 1) & (length <= 32)).all():
        raise Unknown("bfe of no bits, or from beyond the register")
    wide = _widen(x)  # adds zeros, or copies of the sign, above bit 31
    gap = (64 - length).astype(wide.dtype)
    return (wide >> position.astype(wide.dtype) << gap >> gap).astype(x.dtype)


def _is_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def _or_nan(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) | _is_nan(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# The table


class Operation(NamedTuple):
    """A function and the types of its operands and result. "t" is the instruction's type, "w" is twice as wide."""

    function: Callable
    operands: tuple[str, ...]
    result: str


def _operation(function: Callable, operands: str = "t t", result: str = "t") -> Operation:
    return Operation(function, tuple(operands.split()), result)


_INTEGER = {
    "add": _operation(np.add),
    "sub": _operation(np.subtract),
    "mul.lo": _operation(np.multiply),
    "mul.hi": _operation(_multiply_high),
    "mul.wide": _operation(lambda a, b: _widen(a) * _widen(b), result="w"),
    "mad.lo": _operation(lambda a, b, c: a * b + c, "t t t"),
    "mad.wide": _operation(lambda a, b, c: _widen(a) * _widen(b) + c, "t t w", "w"),
    "div": _operation(_divide),
    "neg": _operation(np.negative, "t"),
    "min": _operation(np.minimum),
    "max": _operation(np.maximum),
    "and": _operation(np.bitwise_and),
    "or": _operation(np.bitwise_or),
    "xor": _operation(np.bitwise_xor),
    "not": _operation(np.invert, "t"),
    "shl": _operation(_shift_left, "t u32"),
    "shr": _operation(_shift_right, "t u32"),
    "bfe": _operation(_extract_bits, "t u32 u32"),
    "prmt": _operation(_permute_bytes, "t t t"),
    "lop3": _operation(_logic3, "t t t t"),
}
_FLOAT = {
    "add.rn": _operation(np.add),
    "sub.rn": _operation(np.subtract),
    "mul.rn": _operation(np.multiply),
    "fma.rn": _operation(fma, "t t t"),
    "div.rn": _operation(np.divide),
    "sqrt.rn": _operation(np.sqrt, "t"),
    "abs": _operation(np.abs, "t"),
    "neg": _operation(np.negative, "t"),
    "min.NaN": _operation(_smaller),
    "max.NaN": _operation(_larger),
    "ex2.approx.ftz": _operation(_exp2, "t"),
    "rcp.approx.ftz": _operation(_reciprocal, "t"),
}
_ORDER = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_INTEGER_COMPARISONS = _ORDER | {"eq": np.equal, "ne": np.not_equal}
_FLOAT_COMPARISONS = (
    _ORDER
    | {"eq": np.equal, "ne": lambda a, b: (a != b) & ~_is_nan(a, b), "neu": np.not_equal}
    | {f"{name}u": _or_nan(compare) for name, compare in (_ORDER | {"eq": np.equal}).items()}
    | {"num": lambda a, b: ~_is_nan(a, b), "nan": _is_nan}
)
_CONVERSIONS = re.compile(r"(cvt(?:\.rn)?)\.(\w+)\.(\w+)")

# The largest error of the approximate instructions in units in the last place
APPROXIMATE_ULPS = {"ex2.approx.ftz.f32": 2, "rcp.approx.ftz.f32": 1}


def _conversion(name: str, to: str, source: str) -> Operation:
    if (name, source) == ("cvt.rn", "f32") and to.endswith("x2"):  # the first operand goes into the high half
        return Operation(lambda high, low: np.stack(np.broadcast_arrays(low, high)), (source, source), to)
    if _is_float(to) != _is_float(source) or (name == "cvt.rn") != (width(to) < width(source) and _is_float(to)):
        raise Unknown(f"{name}.{to}.{source}")
    return Operation(lambda x: x, (source,), to)


@functools.cache
def find(opcode: str) -> Operation:
    """The operation for a full name such as "max.NaN.bf16x2", with its types filled in. Raises Unknown."""
    if conversion := _CONVERSIONS.fullmatch(opcode):
        return _conversion(*conversion.groups())
    name, _, kind = opcode.rpartition(".")
    if name.startswith("setp."):
        comparisons = _FLOAT_COMPARISONS if _is_float(kind) else _INTEGER_COMPARISONS
        function = comparisons.get(name.removeprefix("setp."))
        operation = function and _operation(function, result="pred")
    elif name == "selp":
        kind = f"b{width(kind)}"  # it copies bits
        operation = _operation(lambda a, b, condition: np.where(condition, a, b), "t t pred")
    else:
        operation = (_FLOAT if _is_float(kind) else _INTEGER).get(name)
    if operation is None:
        raise Unknown(opcode)
    types = {"t": kind, "w": f"{kind[0]}{2 * width(kind)}"}
    operands = tuple(types.get(operand, operand) for operand in operation.operands)
    return Operation(operation.function, operands, types.get(operation.result, operation.result))
