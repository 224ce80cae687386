"""The constants of nn.costs for this machine: layers timed by both methods, and the costs that explain the times."""
import time
from functools import partial
from itertools import product

import numpy as np
import torch
from escnn import gspaces
from scipy.optimize import nnls

from . import nn
from .nn import costs

BUDGET_S = 0.04  # of each measurement
ROUNDS = 3       # at least


def _plane(order, fields_in, fields_out, kernel_size, batch, size):
    """(module, input shape) between regular fields of C_order; a single scalar field where there are none."""
    space = gspaces.rot2dOnR2(order)
    types = [nn.FieldType(space, fields * [space.regular_repr] or [space.trivial_repr])
             for fields in (fields_in, fields_out)]
    module = nn.R2Conv(*types, kernel_size, padding=kernel_size // 2, initialize=False)
    return module, (batch, module.in_type.size, size, size)


def _volume(fields, kernel_size, batch, size):
    space = gspaces.rot3dOnR3(1)
    type_ = nn.FieldType(space, [space.irrep(l) for l in (0, 1) for _ in range(fields)])
    module = nn.R3Conv(type_, type_, kernel_size, padding=kernel_size // 2, initialize=False)
    return module, (batch, type_.size, size, size, size)


def _layers():
    """Wide and narrow layers on large and small images, so that each cost dominates one of them."""
    yield _plane(8, 16, 16, 5, 2, 32)
    yield _plane(4, 32, 32, 3, 4, 24)
    yield _plane(8, 4, 4, 3, 4, 9)
    yield _plane(4, 2, 2, 3, 2, 7)
    yield _plane(8, 0, 8, 5, 4, 28)
    yield _plane(4, 4, 4, 1, 4, 24)
    yield _plane(4, 4, 4, 3, 64, 4)
    yield _plane(8, 24, 24, 5, 1, 7)
    yield _volume(8, 3, 1, 12)
    yield _volume(8, 5, 1, 8)


@torch.inference_mode(False)
def measure():
    """nn.costs.Costs of this machine; takes a few seconds.

    On one thread: on more, another process that is busy meanwhile would count for more than the layers do.
    """
    rows, threads = {method: ([], []) for method in costs.METHODS}, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for module, shape in _layers():
            x = torch.randn(shape, requires_grad=True)
            for method, backward in product(costs.METHODS, (False, True)):
                module.method = method
                amounts, seconds = rows[method]
                amounts.append(costs.amounts(method, module.plan, module.geometry(shape), shape[0], backward))
                seconds.append(time_of(partial(run, module, x, backward)))
    finally:
        torch.set_num_threads(threads)
    return costs.Costs({method: _fit(*map(np.array, found)) for method, found in rows.items()})


def run(module, x, backward):
    """A forward pass of a module, and a backward pass to the input (if it wants a gradient) and the weights."""
    with torch.set_grad_enabled(backward):
        y = module.forward(module.in_type(x)).tensor
        if backward:
            torch.autograd.grad(y, [t for t in (x, *module.parameters()) if t.requires_grad], torch.ones_like(y))


def time_of(function, budget_s=BUDGET_S):
    """Seconds of a call: the least of several, which other processes disturb least."""
    function()
    times, end = [], time.perf_counter() + budget_s
    while len(times) < ROUNDS or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _fit(amounts, seconds):
    """Costs >= 0 whose sums come closest to the times, in relative terms."""
    scale = amounts.max(0)
    found, _ = nnls(amounts / seconds[:, None] / scale, np.ones(len(seconds)))
    return found / scale
