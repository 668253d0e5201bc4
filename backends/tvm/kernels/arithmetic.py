"""Scalar and vector expressions that several kernels use."""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script import tirx as T

# float32 lanes of a vector: AVX-512's; narrower machines take two or four registers for one
LANES: Final = 16
# Relax's pattern of a kernel that is not fused with its neighbours
OPAQUE: Final = 8
# log2(e), and ln 2 in two parts whose sum is exact beyond float32
_LOG2_E: Final = 1.44269504088896341
_LN2_HIGH: Final = 0.693359375
_LN2_LOW: Final = -2.12194440e-4
_EXP_TAYLOR: Final = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp(x: Any) -> Any:
    """e to the power of a float32 expression, relative error 2e-7; vectors stay vectors.

    The C library's `expf`, which TVM would call once a lane, takes most of a softmax's time. Range reduction
    and polynomial of the Cephes library (Moshier 1992), `expf.c`. Below -87.3 the result is 1e-38.
    """
    x = T.max(T.min(x, T.float32(88.0)), T.float32(-87.3))
    n = T.floor(x * T.float32(_LOG2_E) + T.float32(0.5))
    r = x - n * T.float32(_LN2_HIGH) - n * T.float32(_LN2_LOW)
    p: Any = T.float32(1.9875691500e-4)
    for coefficient in _EXP_TAYLOR:
        p = p * r + T.float32(coefficient)
    power = T.reinterpret("float32", (T.Cast("int32", n) + T.int32(127)) << T.int32(23))
    return (p * r * r + r + T.float32(1.0)) * power


def all_of(*conditions: Any) -> Any:
    """Conjunction of one or more conditions."""
    result = conditions[0]
    for condition in conditions[1:]:
        result = tirx.And(result, condition)
    return result


def any_of(*conditions: Any) -> Any:
    """Disjunction of one or more conditions."""
    result = conditions[0]
    for condition in conditions[1:]:
        result = tirx.Or(result, condition)
    return result
