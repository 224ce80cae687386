"""How long a convolution takes on a GPU by either method: bytes and operations, over the rates of the device."""
import hashlib
from dataclasses import dataclass, fields
from functools import lru_cache
from math import prod

import numpy as np
import torch

from .. import backends
from ..basis import cache
from ..layout.two_pass import grid_of, pixels_of_slice
from .costs import factorised_work

METHODS = ("dense", "two_pass")
PRECISIONS = ("bfloat16", "float16", "tf32", "float32", "float64")
# Kernels and calls of torch that one pass launches, about: the dense method; the two passes without those of each
# irrep; those of each irrep.
DENSE_CALLS, TWO_PASS_CALLS, CALLS_OF_IRREP = 2, 4, 2


@dataclass(frozen=True)
class Rates:
    """What a device reaches on large work.

    bytes         of a copy, read and written, in a second
    products      {precision: multiplications of a matrix product in a second}
    convolutions  {precision: the same of torch's convolution, channels last}
    call          seconds that the host needs for a launch
    """
    bytes: float
    products: dict
    convolutions: dict
    call: float


LANES = 0.57  # share of the rate of products in float32 (or float64) that a kernel without matrix instructions reaches
# Of an H200, by its data sheet: a convolution reaches two thirds of the rate of products.
BUILT_IN = Rates(4.3e12, dict(zip(PRECISIONS, (4e14, 4e14, 2e14, 2.8e13, 2.8e13))),
                 dict(zip(PRECISIONS, (2.6e14, 2.6e14, 1.3e14, 2e13, 1.5e13))), 1e-5)


@dataclass(frozen=True)
class Estimate:
    """seconds of a call; bytes that it needs at most besides its input and output."""
    seconds: float
    scratch: int


def estimate(method, plan, geometry, batch, dtype, backward, rates):
    """Estimate of a call.

    dtype     that it computes in
    backward  whether its gradients are computed too
    """
    return (_dense if method == "dense" else _two_pass)(plan, geometry, batch, dtype, backward, rates)


def _dense(plan, geometry, batch, dtype, backward, rates):
    size, elements = dtype.itemsize, plan.out_channels * plan.in_channels * plan.taps
    source, target = _numbers(geometry, batch)
    places = batch * prod(geometry.source_size if geometry.up else geometry.target_size)
    rate = rates.convolutions[precision(dtype, "convolutions")]
    one = max(places * elements / rate, size * (source + target + elements) / rates.bytes)
    passes, filters = (3, 2) if backward else (1, 1)  # backward to the input and to the filter
    scratch = filters * size * elements
    return Estimate(passes * one + scratch / rates.bytes + passes * DENSE_CALLS * rates.call, scratch)


def _two_pass(plan, geometry, batch, dtype, backward, rates):
    seconds, scratch = _passes(plan, geometry, batch, dtype, False, 1, rates)
    if backward:
        more, again = _passes(plan, geometry.adjoint, batch, dtype, True, 2, rates)  # both gradients on one z
        seconds, scratch = seconds + more, max(scratch, again)
    return Estimate(seconds, scratch)


def _passes(plan, geometry, batch, dtype, adjoint, products, rates):
    work, size = factorised_work(plan, geometry, adjoint), dtype.itemsize
    source, target = _numbers(geometry, batch)
    pixels = batch * prod(geometry.target_size)
    hat = geometry.source_channels * batch * prod(grid_of(geometry))
    lanes = LANES * rates.products["float64" if dtype == torch.float64 else "float32"]
    copies = (source + hat + products * (work.y * pixels + target)) * size / rates.bytes
    first = max((hat + work.z * pixels) * size / rates.bytes, pixels * (2 * work.harmonics + work.combining) / lanes)
    mixing = max((work.z + work.y) * pixels * size / rates.bytes,
                 work.products * pixels / rates.products[precision(dtype, "products")])
    factorised = plan.factorised(geometry.kernel, adjoint)
    irreps = sum(len({row.slot for row in s.rows}) for s in factorised.sources)
    calls = geometry.groups * (TWO_PASS_CALLS * products + CALLS_OF_IRREP * irreps)
    seconds = copies + first + products * mixing + calls * rates.call
    return seconds, size * (hat + pixels_of_slice(pixels, work.z // geometry.groups, size)
                            * (work.z + work.y) // geometry.groups)


def _numbers(geometry, batch):
    """Elements of the source and of the target."""
    return (batch * geometry.source_channels * prod(geometry.source_size),
            batch * geometry.target_channels * prod(geometry.target_size))


def precision(dtype, kind):
    """The key in Rates of what torch's switches make of a dtype: kind is "products" or "convolutions"."""
    allowed = torch.backends.cudnn.allow_tf32 if kind == "convolutions" else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else str(dtype).removeprefix("torch.")


@lru_cache(maxsize=4)
def _calibrated(key, device):
    from ..calibration import measure_rates
    return _from_array(cache.remember(key, lambda: _to_array(measure_rates(device))))


def current(device):
    """The Rates of a device: measured once, where a folder keeps them (EQUICONV_CACHE); else BUILT_IN."""
    if not backends.CACHE_FOLDER or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return BUILT_IN
    return _calibrated(_key(device), device)


def keep(rates, device):
    """Writes the Rates of a device to the folder, in the place of those that it had."""
    cache.replace(_key(device), _to_array(rates))
    _calibrated.cache_clear()


def _key(device):
    name = f"{torch.cuda.get_device_name(device)} {torch.__version__}"
    return f"rates-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


def _to_array(rates):
    values = [getattr(rates, field.name) for field in fields(Rates)]
    return np.concatenate([[value[p] for p in PRECISIONS] if isinstance(value, dict) else [value] for value in values])


def _from_array(array):
    n = len(PRECISIONS)
    bytes, products, convolutions, call = np.split(array, [1, 1 + n, 1 + 2 * n])
    named = [dict(zip(PRECISIONS, rates.tolist())) for rates in (products, convolutions)]
    return Rates(float(bytes[0]), *named, float(call[0]))
