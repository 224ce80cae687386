"""The fused steerable convolution: its own source, compiled for the CPU against tests/emulation, and for GPUs by nvcc."""
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.library import opcheck

from equiconv import backends
from equiconv.basis import cache as disk
from equiconv.fused import Unsupported, compiler, fused_layer, fused_unavailable_reason, irreps, launch, packing, structure
from equiconv.fused.layer import maps_source
from equiconv.formats import is_channels_last
from equiconv.layout import Geometry
from equiconv.ops import expand_filter, fused_steerable_conv
from tests import cases, emulated_gpu
from tests.cases import CASES, SMALL, regular
from tests.steerable_calls import Call, errors, plan_between, results

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "csrc/cuda/steerable_conv"
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
BF16, F16 = torch.bfloat16, torch.float16
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes of a block


def is_supported(case):
    options = case.arguments
    return (case.module == "R2Conv" and options["kernel_size"] in (3, 5, 7)
            and not {"stride", "dilation", "groups"} & set(options))


SUPPORTED = [case for case in SMALL if is_supported(case)]
FAST = ("c4_interleaved", "d4_quotient")  # complex and real type, changes of basis, odd multiplicities


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def gpu(monkeypatch, folder):
    return emulated_gpu.emulate(monkeypatch, folder)


def layer_of(name, k):
    """A call of a layer from 16 (of C4: 32) fields to as many, as the benchmarks have it."""
    fields = {"SO(2)": cases.irreps(0, 1, 2, 3, fields=16), "C4": regular(32), "C16": regular(32),
              "O(2)": cases.irreps((0, 0), (1, 1), (1, 2), (1, 3), fields=16)}.get(name, regular(16))
    return Call(plan_between(name, fields, fields, k), (k, k), {"padding": k // 2}, 1, (9, 10))


def fused(call):
    """The call by fused_steerable_conv: a function of (x, weights, bias)."""
    names = ("padding", "padding_mode")
    options = {name: value for name, value in call.options.items() if name in names}
    return lambda x, weights, bias: fused_steerable_conv(x, weights, call.plan, call.kernel, bias=bias, **options)


def inputs(call, dtype, device="cpu", channels_last=False):
    """[x of dtype, weights and bias of float32]"""
    x, *others = call.tensors()
    x = x.to(device, dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return [x, *(None if t is None else t.to(device, torch.float32) for t in others)]


def rounded_dense(call, dtype):
    """call.dense with what a convolution in that dtype rounds: filter and output, and in the backward pass the
    gradients of both; sums are exact."""
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.to(dtype).to(x.dtype)

        @staticmethod
        def backward(ctx, grad):
            return grad.to(dtype).to(grad.dtype)

    def function(x, weights, bias):
        filter = Round.apply(expand_filter(weights, call.plan, call.kernel, backend="reference"))
        return Round.apply(call.convolve(Round.apply(x), filter, bias))

    return function


def assert_as_good_as_dense(call, dtype, **options):
    """Errors of output and gradients at most twice those of a dense convolution in the same dtype."""
    tensors = inputs(call, dtype, **options)
    exact = [None if t is None else t.double() for t in tensors]
    grad = torch.randn(call.dense(*exact).shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want, dense, got = (results(f, t, grad) for f, t in (
        (call.dense, exact), (rounded_dense(call, dtype), exact), (fused(call), tensors)))
    assert got[0].dtype == dtype and is_channels_last(got[0]) == is_channels_last(tensors[0])
    limits = [2 * error for error in errors(dense, want)]
    found = errors(got, want)
    print(found, limits)
    assert all(f <= limit for f, limit in zip(found, limits)), (found, limits)


# ---- values and gradients, emulated ----

@needs_gpp
@pytest.mark.parametrize("case", [pytest.param(case, marks=[] if case.name in FAST else pytest.mark.slow)
                                  for case in SUPPORTED], ids=lambda case: case.name)
def test_emulated_cases(gpu, case):
    assert_as_good_as_dense(Call.of(case), BF16)
