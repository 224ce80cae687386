"""The CUDA source itself, compiled for the CPU against tests/emulation, compared with the reference in float64."""
import ctypes
import math
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from escnn import gspaces, nn

from equiconv.layout import plan_of
from equiconv.reference.expand_filter import expand_filter

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of DType in csrc/dtype.h
GUARD = 64  # elements before and after an output
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def alternating(a, b, n):
    return [r for _ in range(n) for r in (a, b)]


def c8(k=5):
    g = gspaces.rot2dOnR2(8)
    return nn.R2Conv(nn.FieldType(g, 3 * [g.regular_repr]), nn.FieldType(g, 2 * [g.regular_repr]), k, initialize=False)


def c4_transposed():
    g = gspaces.rot2dOnR2(4)
    three, two = (nn.FieldType(g, n * [g.regular_repr]) for n in (3, 2))
    return nn.R2ConvTransposed(three, two, 3, initialize=False)


def d4_interleaved():
    g = gspaces.flipRot2dOnR2(4)
    t = nn.FieldType(g, alternating(g.regular_repr, g.trivial_repr, 3) + [g.irrep(1, 1)])
    return nn.R2Conv(t, t, 3, initialize=False)


def so2_zero_pairs():
    g = gspaces.rot2dOnR2(-1, maximum_frequency=3)
    t = nn.FieldType(g, [g.irrep(l) for l in (0, 3, 1, 0, 2, 3, 0)])
    return nn.R2Conv(t, t, 3, initialize=False)  # no kernel between 0 and 3


def so2_many_pairs():  # more than a block has threads
    g = gspaces.rot2dOnR2(-1, maximum_frequency=16)
    t = nn.FieldType(g, [g.irrep(l) for l in range(17)])
    return nn.R2Conv(t, t, 3, initialize=False)


def so3():
    g = gspaces.rot3dOnR3(maximum_frequency=3)
    t = nn.FieldType(g, [g.irrep(l) for l in (0, 1, 2, 1, 0)])
    return nn.R3Conv(t, t, 3, initialize=False)


def so3_direct_sum():  # a large field without a change of basis
    g = gspaces.rot3dOnR3(maximum_frequency=3)
    spectral = g.fibergroup.bl_sphere_representation(3)
    return nn.R3Conv(nn.FieldType(g, 2 * [spectral]), nn.FieldType(g, [spectral, g.trivial_repr]), 3, initialize=False)


def octahedral():
    g = gspaces.octaOnR3()
    return nn.R3Conv(nn.FieldType(g, 2 * [g.regular_repr]), nn.FieldType(g, [g.regular_repr]), 3, initialize=False)


def linear():
    g = gspaces.no_base_space(gspaces.flipRot2dOnR2(4).fibergroup)
    out_type = nn.FieldType(g, [g.trivial_repr] + 2 * [g.regular_repr])
    return nn.Linear(nn.FieldType(g, 3 * [g.regular_repr]), out_type, initialize=False)


CASES = {f.__name__: f for f in (c8, c4_transposed, d4_interleaved, so2_zero_pairs, so2_many_pairs, so3, so3_direct_sum,
                                 octahedral, linear)}


@cache
def case(name):
    """(plan, spatial sizes of the filter)"""
    layer = CASES[name]()
    plan = plan_of(layer.basisexpansion)
    k = getattr(layer, "kernel_size", 1)
    return plan, () if name == "linear" else (k,) * round(math.log(plan.taps, k))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The kernels with as much shared memory as they ask for, or so little that every array is staged in parts."""
    @cache
    def build(shared_bytes):
        folder = tmp_path_factory.mktemp("emulation")
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        source, wanted = folder / "csrc/cuda/expand_filter.cu", "kSharedBytes = 46080;"
        text = source.read_text()
        assert text.count(wanted) == 1
        source.write_text(text.replace(wanted, f"kSharedBytes = {shared_bytes};"))
        target = folder / "expand_filter.so"
        subprocess.run(["g++", "-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared", f"-I{folder}",
                        f"-I{ROOT}/tests/emulation", ROOT / "tests/emulation/expand_filter.cpp", "-o", target],
                       check=True)
        loaded = ctypes.CDLL(target)
        loaded.run.restype = ctypes.c_char_p
        return loaded

    return build


def guarded(like):
    """(NaN of that shape, strides and dtype; a function that checks the elements around it)"""
    storage = like.new_full((like.numel() + 2 * GUARD,), 77.0)
    inside = storage[GUARD:GUARD + like.numel()]
    inside.fill_(math.nan)

    def check():
        assert (storage[:GUARD] == 77).all() and (storage[-GUARD:] == 77).all(), "wrote outside"

    return inside.as_strided(like.shape, like.stride()), check


def run(library, tables, weights, filter, transposed, *, backward, last_to_first=False):
    pairs, index, values = tables
    strides = list(filter.stride()[:2])
    if transposed:
        strides.reverse()
    taps = filter[0, 0].numel()
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (pairs, index, values, weights, filter)]
    error = library.run(backward, last_to_first, pointers[0], ctypes.c_int64(len(pairs)), *pointers[1:],
                        *map(ctypes.c_int64, (taps, *strides, filter.stride(-1) if filter.dim() > 2 else 1)),
                        DTYPES.index(values.dtype), DTYPES.index(filter.dtype))
    assert error is None, error


def assert_close(ours, ref, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert (ours.double() - ref).abs().max() <= tolerance * ref.abs().max() + 1e-30  # NaN fails


def compare(library, name, dtype, channels_last, transposed):
    plan, kernel = case(name)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    tables, exact = plan.tables(torch.device("cpu"), acc), plan.tables(torch.device("cpu"), torch.float64)
    size = [plan.out_channels, plan.in_channels, *kernel]
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(plan.weights, dtype=acc, generator=random)
    leaf = weights.double().requires_grad_()
    ref = expand_filter(leaf, *exact, size, torch.float64, channels_last, transposed)

    filter, check = guarded(ref.detach().to(dtype))
    run(library, tables, weights, filter, transposed, backward=False)
    check()
    assert_close(filter, ref.detach(), dtype)

    grad_filter = filter.clone()  # keeps the strides
    grad_filter.copy_(torch.randn(filter.shape, generator=random))
    grad_ref, = torch.autograd.grad(ref, leaf, grad_filter.double())
    grad_weights, check = guarded(weights)
    run(library, tables, grad_weights, grad_filter, transposed, backward=True)
    check()
    assert_close(grad_weights, grad_ref, acc)


@pytest.mark.parametrize("name", CASES)
def test_cases(library, name):
    compare(library(46080), name, torch.float32, False, name == "c4_transposed")


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name, dtype", [
    ("d4_interleaved", torch.float64), ("c8", torch.bfloat16), ("so3", torch.float16)])
def test_layouts(library, name, dtype, channels_last, transposed):
    compare(library(46080), name, dtype, channels_last, transposed)


@pytest.mark.parametrize("shared_bytes, dtype", [
    (1600, torch.float32), pytest.param(400, torch.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, channels_last", [("d4_interleaved", False), ("so3", True)])
def test_fields_larger_than_shared_memory(library, name, channels_last, shared_bytes, dtype):
    compare(library(shared_bytes), name, dtype, channels_last, False)


@pytest.mark.parametrize("name, shared_bytes", [
    ("d4_interleaved", 46080), ("d4_interleaved", 1600), ("so2_many_pairs", 46080)])
def test_barriers(library, name, shared_bytes):
    """The order of the threads between two barriers does not matter."""
    plan, kernel = case(name)
    tables = plan.tables(torch.device("cpu"), torch.float32)
    weights, filter = torch.randn(plan.weights), torch.randn(plan.out_channels, plan.in_channels, *kernel)
    for backward, output in ((False, filter), (True, weights)):
        outputs = []
        for last_to_first in (False, True):
            run(library(shared_bytes), tables, weights, filter, False, backward=backward, last_to_first=last_to_first)
            outputs.append(output.clone())
        assert torch.equal(*outputs)
