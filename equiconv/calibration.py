"""The constants of nn.costs for this machine: layers timed by both methods, and the costs that explain the times.

And those of nn.cuda_costs for a GPU: what it reaches on large copies, matrix products and convolutions.
"""
import time
from functools import partial
from itertools import product

import numpy as np
import torch
from escnn import gspaces
from scipy.optimize import nnls

from . import nn
from .nn import costs, cuda_costs

BUDGET_S = 0.04  # of each measurement
ROUNDS = 3       # at least
RATES_BUDGET_S = 0.02
REWEIGHTED, CLOSE = 20, 0.1  # rounds of a fit; relative errors below this count as squares


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
    yield _plane(4, 0, 2, 1, 32, 40)
    yield _plane(8, 2, 1, 1, 8, 48)
    yield _plane(4, 8, 0, 3, 8, 28)
    yield _plane(4, 1, 16, 3, 8, 20)
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
                module.train(backward).method = method
                amounts, seconds = rows[method]
                amounts.append(costs.amounts(method, module.plan, module.geometry(shape), shape[0], backward, backward))
                seconds.append(time_of(partial(run, module, x, backward)))
    finally:
        torch.set_num_threads(threads)
    return costs.Costs({method: _fit(*map(np.array, found)) for method, found in rows.items()})


@torch.inference_mode(False)
@torch.no_grad()
def measure_rates(device):
    """nn.cuda_costs.Rates of a CUDA device; takes about a second."""
    def time(function):
        return time_of(function, RATES_BUDGET_S, device)

    empty, source = torch.empty(1, device=device), torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target, products, convolutions = torch.empty_like(source), {}, {}
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        for name in cuda_costs.PRECISIONS:
            matmul.allow_tf32 = cudnn.allow_tf32 = name == "tf32"
            dtype = torch.float32 if name == "tf32" else getattr(torch, name)
            a = torch.randn(4096, 4096, device=device, dtype=dtype)
            products[name] = len(a)**3 / time(lambda: torch.mm(a, a))  # noqa: B023
            x = torch.randn(16, 256, 64, 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            filter = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            seconds = time(lambda: torch.conv2d(x, filter, padding=1))  # noqa: B023
            convolutions[name] = x.numel() * filter[0].numel() / seconds
        calls = 100
        call = time(lambda: [empty.zero_() for _ in range(calls)]) / calls
        return cuda_costs.Rates(2 * source.nbytes / time(lambda: target.copy_(source)), products, convolutions, call)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def run(module, x, backward):
    """A forward pass of a module, and a backward pass to the input (if it wants a gradient) and the weights."""
    with torch.set_grad_enabled(backward):
        y = module.forward(module.in_type(x)).tensor
        if backward:
            torch.autograd.grad(y, [t for t in (x, *module.parameters()) if t.requires_grad], torch.ones_like(y))


def time_of(function, budget_s=BUDGET_S, device=None):
    """Seconds of a call: the least of several, which other processes disturb least. A GPU is waited for."""
    wait = partial(torch.cuda.synchronize, device) if device is not None and device.type == "cuda" else lambda: None
    function()
    wait()
    times, end = [], time.perf_counter() + budget_s
    while len(times) < ROUNDS or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def _fit(amounts, seconds):
    """Costs >= 0 whose sums come closest to the times, in relative terms: least absolute errors, by reweighted squares.

    So a layer that was disturbed, or that torch computes in some other way, does not bend the costs of all others.
    """
    scale = amounts.max(0)
    relative, weights = amounts / seconds[:, None] / scale, np.ones(len(seconds))
    for _ in range(REWEIGHTED):
        found, _ = nnls(relative * weights[:, None], weights)
        weights = np.maximum(np.abs(relative @ found - 1), CLOSE) ** -0.5
    return found / scale
