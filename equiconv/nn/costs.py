"""How long a convolution takes by either method: its amounts of work, times what a machine needs for each of them."""
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

import numpy as np
import torch

from .. import backends
from ..basis import cache
from ..machine import instruction_set, processor

METHODS = ("factorised", "dense")
AMOUNTS = {
    "dense": ("forward",        # multiplications of torch's convolution
              "backward",
              "moved",          # numbers of its input and output
              "moved back",
              "filter",         # elements of the filter that are expanded, or whose gradients are gathered
              "expansions",
              "calls"),
    "factorised": ("harmonics",  # multiplications of harmonics, sums and changes of basis, on whole vectors
                   "mixing",     # of the matrix products
                   "entries",    # of W that are packed, or whose gradients are gathered
                   "tiles",
                   "calls"),
}
LANES = 16   # pixels of the vectors that a tile is made of
TILE = 512   # pixels of a typical tile
WHOLE = ("expansions", "calls")  # amounts that threads do not share
NARROW_IN, NARROW_OUT = 4, 16  # channels of which torch's convolution takes as long as of fewer


@dataclass(frozen=True)
class Costs:
    """Seconds of one thread for one of each of AMOUNTS[method]: {method: array}."""
    seconds: dict

    def time(self, method, amounts):
        """Seconds of an array of amounts on torch's present number of threads; calls do not get faster with more."""
        share = [1 / torch.get_num_threads() if name not in WHOLE else 1 for name in AMOUNTS[method]]
        return float(self.seconds[method] @ (amounts * share))


# Of two threads of an AMD EPYC (Zen 4): what explains 678 timings of random layers, small and large, and of published
# ones. By these, one choice in five is wrong: half of them by less than a fifth, one in three by more than 30 %.
BUILT_IN = Costs({"dense": np.array([1.6e-11, 2.1e-11, 3.9e-10, 1.1e-9, 1.5e-9, 1.1e-4, 7.9e-5]),
                  "factorised": np.array([6.6e-11, 3.1e-11, 1.9e-9, 3.2e-6, 9.2e-5])})


def amounts(method, plan, geometry, batch, backward, expands=True):
    """Array of AMOUNTS[method] of one call.

    geometry   layout.Geometry of the convolution
    backward   whether its gradients are computed too
    expands    dense: whether the filter is expanded, not kept
    """
    if method == "dense":
        pixels = batch * prod(geometry.source_size if geometry.up else geometry.target_size)
        elements = plan.out_channels * plan.in_channels * plan.taps
        products = pixels * plan.taps * _whole(plan.out_channels, NARROW_OUT) * _whole(plan.in_channels, NARROW_IN)
        moved = batch * (geometry.source_channels * prod(geometry.source_size)
                         + geometry.target_channels * prod(geometry.target_size))
        expansions = expands + backward
        return np.array([products, 2 * backward * products, moved, 2 * backward * moved, expansions * elements,
                         expansions, 1 + 2 * backward])
    found = _factorised(plan, geometry, batch, False, 1)
    return found + _factorised(plan, geometry.adjoint, batch, True, 2) if backward else found  # both gradients on one z


def _factorised(plan, geometry, batch, adjoint, products):
    work = factorised_work(plan, geometry, adjoint)
    pixels = batch * padded_pixels(geometry)
    phases = prod(geometry.stride) if geometry.up else 1
    tiles = batch * geometry.groups * phases * ceil(padded_pixels(geometry) / phases / TILE)
    return np.array([pixels * work.pointwise, pixels * work.mixing * products,
                     products * work.entries, tiles, products])


def padded_pixels(geometry):
    """Pixels of an image of the target in whole vectors: of its rows, or of the rows one after the other."""
    stride = geometry.stride if geometry.up else (1,) * len(geometry.stride)
    *outer, row = (ceil(n / s) for n, s in zip(geometry.target_size, stride))
    halo = (geometry.kernel[-1] - 1) * geometry.dilation[-1] // geometry.stride[-1]
    rows = prod(outer)
    in_rows = rows * _whole(row, LANES)
    in_one = prod(outer[:-1]) * _whole((outer[-1] - 1) * (row + halo) + row, LANES)
    return prod(stride) * min(in_rows, in_one)


def _whole(count, lanes):
    return ceil(count / lanes) * lanes


def factorised_work(plan, geometry, adjoint=False):
    """layout.work.Work of a FilterPlan along a Geometry (in the adjoint: that of the adjoint)."""
    return plan.work(geometry.kernel, geometry.stride, geometry.dilation, geometry.groups, geometry.up, adjoint)


@lru_cache(maxsize=1)
def _calibrated(key):
    from ..calibration import measure
    return _from_array(cache.remember(key, lambda: _to_array(measure())))


def current():
    """The Costs of this machine: measured once, where a folder keeps them (EQUICONV_CACHE); else BUILT_IN."""
    return _calibrated(_key()) if backends.CACHE_FOLDER else BUILT_IN


def keep(costs):
    """Writes the Costs of this machine to the folder, in the place of those that it had."""
    cache.replace(_key(), _to_array(costs))
    _calibrated.cache_clear()


def _key():
    machine = f"{processor()} {instruction_set()} {torch.__version__} {AMOUNTS}"
    return f"costs-{hashlib.blake2b(machine.encode(), digest_size=8).hexdigest()}"


def _to_array(costs):
    return np.concatenate([*(costs.seconds[method] for method in AMOUNTS)])


def _from_array(array):
    ends = np.cumsum([len(names) for names in AMOUNTS.values()])
    return Costs(dict(zip(AMOUNTS, np.split(array, ends[:-1]))))
