"""The fused steerable convolution on a GPU: values and gradients, races, graphs, streams."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from equiconv.fused import fused_unavailable_reason
from equiconv.layout import Geometry
from equiconv.ops import fused_steerable_conv
from tests.steerable_calls import Call, results
from tests.test_steerable_conv_cuda import (
    BF16,
    F16,
    SUPPORTED,
    TF32,
    assert_as_good_as_dense,
    fused,
    inputs,
    layer_of,
    small_call,
)

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


FAST = ("c4_interleaved", "d4_quotient", "so2_irreps", "c4_stride2", "so3_irreps")


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow), TF32], ids=str)
@pytest.mark.parametrize("case", [pytest.param(case, marks=[] if case.name in FAST else pytest.mark.slow)
                                  for case in SUPPORTED], ids=lambda case: case.name)
def test_cases(case, dtype):
    assert_as_good_as_dense(Call.of(case), dtype, draws=4, device="cuda")


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name,k", [("C8", 3), ("C8", 5), ("D4", 3), ("D8", 5), *(
    pytest.param(name, k, marks=pytest.mark.slow) for name, k in (("C8", 7), ("C16", 5), ("SO(2)", 5), ("O(2)", 5)))])
def test_layers(name, k, channels_last):
    call = layer_of(name, k).with_(batch=3, size=(37, 45))
    assert_as_good_as_dense(call, BF16, device="cuda", channels_last=channels_last)


def test_available():
    call = small_call()
    geometry = Geometry(call.kernel, (1, 1), (1, 1), (1, 1), 1, False, *call.channels, call.size, call.size)
    assert fused_unavailable_reason(call.plan, geometry, torch.device("cuda", 0), BF16) is None


def test_the_same_every_time():
    call = layer_of("C8", 5).with_(batch=8, size=(33, 31))
    tensors = inputs(call, BF16, "cuda")
    first = results(fused(call), tensors)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(fused(call), tensors)))


def training_step(call):
    """(function that computes output and gradients into static tensors, function that returns them)"""
    x, weights, bias = (t.requires_grad_() for t in inputs(call, BF16, "cuda"))
    grad = torch.randn(call.dense(*inputs(call, torch.float64)).shape, device="cuda").to(BF16)

    def step():
        y = fused(call)(x, weights, bias)
        return [y, *torch.autograd.grad(y, [x, weights, bias], grad)]

    return step, x


def test_graph_capture():
    step, x = training_step(layer_of("C8", 3).with_(batch=4, size=(20, 21)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_streams():
    """Calls on several streams at once do not disturb one another."""
    steps = [training_step(layer_of(name, 3).with_(batch=4, size=(24, 24), seed=i))[0]
             for i, name in enumerate(("C8", "D4", "C8"))]
    want = [step() for step in steps]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in steps], []
    for _ in range(10):
        got = []
        for step, stream in zip(steps, streams):
            with torch.cuda.stream(stream):
                got.append(step())
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for one, other in zip(got, want) for a, b in zip(one, other))


def test_launches():
    """Forward: two changes of channels, the packing of the weights, and one fused kernel."""
    call = layer_of("C8", 3)
    tensors = inputs(call, BF16, "cuda")
    fused(call)(*tensors)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fused(call)(*tensors)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(kernels) == ["equiconv_forward", "equiconv_pack_channels", "equiconv_pack_weights",
                               "equiconv_unpack_channels"]


def test_compile():
    call = layer_of("C8", 3)
    x, weights, bias = inputs(call, BF16, "cuda")
    compiled = torch.compile(lambda x, w, b: fused_steerable_conv(x, w, call.plan, call.kernel, bias=b, padding=1) * 2,
                             fullgraph=True)
    assert torch.equal(compiled(x, weights, bias), fused(call)(x, weights, bias) * 2)


SMALL_STEP = """
import equiconv, torch
from tests.test_steerable_conv_cuda import BF16, fused, inputs, small_call, staged_call
from tests.steerable_calls import results
for call in (small_call(), staged_call("C4")):
    results(fused(call), inputs(call, BF16, "cuda"))
torch.cuda.synchronize()
"""


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """A folder for compiled kernels."""
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizer(tool, kernels):
    options = ["--report-api-errors=no"] if tool == "memcheck" else []  # those of torch's calls, which torch handles
    done = subprocess.run(["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", "--kernel-name=kns=equiconv_",
                           *options, sys.executable, "-W", "ignore", "-c", SMALL_STEP], cwd=ROOT,
                          env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "EQUICONV_CACHE": str(kernels)},
                          capture_output=True, text=True)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0 and " SUMMARY: 0 " in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
