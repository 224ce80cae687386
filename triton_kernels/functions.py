"""Pointwise functions and their derivatives, by the names that the ops on fields have for them."""
import math

import triton
import triton.language as tl

INVERSE_FACTORIAL = tl.constexpr(tuple(1 / math.factorial(k) for k in range(15)))
LOG2_E = tl.constexpr(math.log2(math.e))
LOG_2, LOG_2_REST = tl.constexpr(float.fromhex("0x1.62e4p-1")), tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
LOG_2_DOUBLE = tl.constexpr(float.fromhex("0x1.62e42fefap-1"))
LOG_2_REST_DOUBLE = tl.constexpr(float.fromhex("0x1.cf79abc9e3b3ap-40"))


@triton.jit
def expm1(x):
    """exp(x) - 1 to the last places, also near zero, where tl.exp(x) - 1 cancels; NaN where x is.

    2^n (1 + q) - 1 with q = exp(r) - 1 and |r| <= ln(2) / 2.
    """
    if x.dtype == tl.float64:
        limited = tl.minimum(tl.maximum(x, -708.0), 709.0)
        n = tl.floor(limited * LOG2_E + 0.5)
        r = limited - n * LOG_2_DOUBLE - n * LOG_2_REST_DOUBLE
        power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
        TERMS: tl.constexpr = 14
    else:
        limited = tl.minimum(tl.maximum(x, -87.0), 88.0)
        n = tl.floor(limited * LOG2_E + 0.5)
        r = limited - n * LOG_2 - n * LOG_2_REST
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        TERMS: tl.constexpr = 7
    q = r * 0 + INVERSE_FACTORIAL[TERMS]
    for k in tl.static_range(TERMS - 1):
        q = q * r + INVERSE_FACTORIAL[TERMS - 1 - k]
    q *= r
    return tl.where(x == x, power * q + (power - 1), x)


@triton.jit
def sigmoid(x):
    return 1 / (expm1(-x) + 2)


@triton.jit
def tanh(x):
    e = expm1(2 * tl.where(x > 20, 20.0, x))
    return e / (e + 2)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), above 20 the identity, as in torch: max(x, 0) + 2 atanh(u / (u + 2)) with u = exp(-|x|)."""
    u = expm1(-tl.abs(x)) + 1
    z = u / (u + 2)
    TERMS: tl.constexpr = 18 if x.dtype == tl.float64 else 9  # of the series: z <= 1 / 3
    total = z * 0 + 1 / (2 * TERMS - 1)
    for k in tl.static_range(TERMS - 1):
        total = total * (z * z) + 1 / (2 * (TERMS - 1 - k) - 1)
    return tl.where(x > 20, x, tl.where(x <= 0, 0.0, x) + 2 * z * total)


@triton.jit
def value_of(x, FUNCTION: tl.constexpr):
    if FUNCTION == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif FUNCTION == "elu":
        return tl.where(x > 0, x, expm1(x))
    elif FUNCTION == "sigmoid":
        return sigmoid(x)
    elif FUNCTION == "tanh":
        return tanh(x)
    elif FUNCTION == "softplus":
        return softplus(x)
    else:
        tl.static_assert(FUNCTION == "squash")
        return x / (1 + x)


@triton.jit
def slope_of(x, FUNCTION: tl.constexpr):
    """The derivative of value_of."""
    if FUNCTION == "relu":
        return tl.where(x <= 0, x * 0, x * 0 + 1)
    elif FUNCTION == "elu":
        return tl.where(x > 0, 1.0, expm1(x) + 1)
    elif FUNCTION == "sigmoid":
        y = sigmoid(x)
        return y * (1 - y)
    elif FUNCTION == "tanh":
        y = tanh(x)
        return 1 - y * y
    elif FUNCTION == "softplus":
        return tl.where(x > 20, 1.0, sigmoid(x))
    else:
        tl.static_assert(FUNCTION == "squash")
        return 1 / ((1 + x) * (1 + x))
