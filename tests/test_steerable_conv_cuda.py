"""The fused steerable convolution: its own source, compiled for a CPU against tests/emulation, and for GPUs by nvcc."""
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from equiconv.formats import CHANNELS_LAST, is_channels_last, like
from equiconv.fused import (
    Unsupported,
    compiler,
    fused_layer,
    fused_unavailable_reason,
    irreps,
    launch,
    packing,
    structure,
)
from equiconv.fused.kernels import SHARED_BYTES, Kernels
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
BF16, F16, TF32 = torch.bfloat16, torch.float16, torch.float32  # as the kernels take float32
ARCHS = ("sm_80", "sm_90")


def is_supported(case):
    options = case.arguments
    return (case.module in ("R2Conv", "R3Conv") and options["kernel_size"] in structure.SIZES[case.dimensions]
            and options.get("stride", 1) in (1, 2) and not {"dilation", "groups"} & set(options))


SUPPORTED = [case for case in SMALL if is_supported(case)]


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
    return layer_between(name, fields, fields, k)


def layer_between(name, in_fields, out_fields, k):
    return Call(plan_between(name, in_fields, out_fields, k), (k, k), {"padding": k // 2}, 1, (9, 10))


# Of E2SFCNN and WRN-28-10: fields before and after, their kernels of the forward and of the gradient of the weights.
WIDE = [("C16", 24, 32, 7, 2, 1), ("C16", 64, 96, 5, 6, 2), ("D8", 40, 40, 5, 3, 1), ("D4", 113, 113, 3, 4, 3),
        ("C2", 452, 452, 3, 4, 3)]


IN_SPACE = ("SO(3)", "octahedral")


def layer_in_space(name, k):
    """The same in three dimensions: irreps of degree 0, 1 and 2, or 8 regular fields of the octahedral group."""
    fields = cases.irreps(0, 1, 2, fields=16) if name == "SO(3)" else regular(8)
    return Call(plan_between(name, fields, fields, k), (k, k, k), {"padding": k // 2}, 1, (5, 6, 9))


def fused(call):
    """The call by fused_steerable_conv: a function of (x, weights, bias)."""
    names = ("stride", "padding", "padding_mode", "activation")
    options = {name: value for name, value in call.options.items() if name in names}
    return lambda x, weights, bias: fused_steerable_conv(x, weights, call.plan, call.kernel, bias=bias, **options)


def inputs(call, dtype, device="cpu", channels_last=False):
    """[x of dtype, weights and bias of float32]"""
    x, *others = call.tensors()
    x = x.to(device, dtype, memory_format=CHANNELS_LAST[x.dim()] if channels_last else torch.contiguous_format)
    return [x, *(None if t is None else t.to(device, torch.float32) for t in others)]


def assert_as_good_as_dense(call, dtype, draws=1, **options):
    """Relative errors of output and gradients are at most twice that of a dense convolution's output in that dtype.

    draws  of random inputs, that are looked at together: the gradient of a few weights may be small by chance
    """
    found = [compare(call.with_(seed=seed), dtype, **options) for seed in range(draws)]
    got, want, (dense,), (exact,) = ([torch.stack(t) for t in zip(*lists)] for lists in zip(*found))
    limit = 2 * errors([dense], [exact])[0]
    assert max(errors(got, want)) <= limit, (errors(got, want), limit)


def compare(call, dtype, **options):
    """(results, those in float64, [output of a dense convolution in that dtype], [the same in float64])"""
    tensors = inputs(call, dtype, **options)
    exact = [None if t is None else t.double() for t in tensors]
    y = call.dense(*exact)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(call.seed + 1))
    grad = like(grad.to(dtype), tensors[0])
    dense = call.convolve(rounded(exact[0], dtype), rounded(filter_of(call, exact[1]), dtype), exact[2])
    got = results(fused(call), tensors, grad)
    assert got[0].dtype == dtype and is_channels_last(got[0]) == is_channels_last(tensors[0])
    return got, results(call.dense, exact, grad), [dense.to(dtype).to(dense.dtype)], [y]


def filter_of(call, weights):
    return expand_filter(weights, call.plan, call.kernel, backend="reference")


def rounded(tensor, dtype):
    """As tensor cores take numbers of that dtype."""
    return torch.from_numpy(irreps.round_to(tensor.double().numpy(), dtype)).to(tensor.dtype)


def kernels_of(call, dtype=BF16, arch="sm_90", shared_bytes=None):
    stride = call.options.get("stride", 1)
    return Kernels(call.plan, call.kernel, dtype, stride, shared_bytes or SHARED_BYTES[arch])


# ---- values and gradients, emulated ----

@needs_gpp
def test_emulated_in_space(gpu):
    """Irreps of more components than are kept at once, with a stride, in TF32."""
    fields = cases.irreps(0, 1)
    assert_as_good_as_dense(Call(plan_between("SO(3)", fields, fields, 3), (3, 3, 3), {"stride": 2, "padding": 1}, 2,
                                 (3, 6, 5)), TF32, draws=4, channels_last=True)


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.name)
def test_emulated_cases(gpu, case):
    assert_as_good_as_dense(Call.of(case), BF16, draws=4)


@needs_gpp
@pytest.mark.slow
def test_emulated_options(gpu):
    """Options that the kernels of one layer take without being compiled again."""
    call = small_call()
    assert_as_good_as_dense(call, BF16)
    assert_as_good_as_dense(call.with_(size=(17, 3), has_bias=False), BF16, channels_last=True)
    assert_as_good_as_dense(call.with_(options={"padding": (0, 3)}), BF16, channels_last=True)
    assert_as_good_as_dense(call.with_(options={"padding": 2, "padding_mode": "reflect"}), BF16)
    y, *gradients = results(fused(call), inputs(call.with_(batch=0), BF16))
    assert y.shape == (0, call.plan.out_channels, 9, 8) and not any(g.any() for g in gradients)
    assert set(gpu.launched) == {f"equiconv_{name}" for name in (
        "pack_channels", "pack_weights", "forward", "unpack_channels", "grad_weight", "reduce", "unpack_gradient")}


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (8, 3), (2, 19)])
def test_small_images(gpu, size):
    assert_as_good_as_dense(small_call().with_(size=size), BF16)


@needs_gpp
@pytest.mark.slow
def test_float16(gpu):
    assert_as_good_as_dense(small_call(), F16)


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, TF32], ids=str)
@pytest.mark.parametrize("k", [7, 9])
def test_large_kernels(gpu, k, dtype):
    """Whose windows have so many lines that they are read again for each group of harmonics."""
    call = Call(plan_between("C4", regular(2), regular(3), k), (k, k), {"padding": k // 2}, 1, (9, 10))
    assert_as_good_as_dense(call, dtype, draws=2)


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("name", ["c4_interleaved", "d4_quotient", "so3_irreps", "c4_stride2"])
def test_tf32(gpu, name):
    assert_as_good_as_dense(Call.of(CASES[name]), TF32, draws=4)


def small_call():
    """Irreps of complex and of real type, changes of basis, fields of two types in turn."""
    return Call.of(CASES["c4_interleaved"])


@needs_gpp
@pytest.mark.slow
def test_wide_layers_are_divided(gpu):
    assert_as_good_as_dense(layer_of("C16", 5), BF16)
    assert [gpu.launched.count(f"equiconv_{name}") for name in ("forward", "grad_weight")] == [4, 1]


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, TF32], ids=str)
def test_kernels_take_parts_of_blocks(monkeypatch, gpu, dtype):
    """As if a warp had fewer registers, and a block of threads less shared memory."""
    monkeypatch.setattr(structure, "FORWARD_CHANNELS", {2: 56, 4: 56})
    monkeypatch.setattr(structure, "GRADIENT_TILES", 5)
    gpu.shared_bytes = 20 * 1024 * dtype.itemsize // 2
    call = Call(plan_between("D4", regular(11), regular(21), 3), (3, 3), {"padding": 1}, 1, (7, 9))
    kernels = kernels_of(call, dtype, shared_bytes=gpu.shared_bytes)
    pieces = [[(p.block, p.first, p.copies) for p in k.structure.pieces] for k in kernels.directions[0].forward]
    assert any(first > 0 for _, first, _ in sum(pieces, [])) and len(pieces) > 2 and kernels.map_pixels == 8
    assert_as_good_as_dense(call, dtype)
    assert gpu.launched.count("equiconv_grad_weight") > 2


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, TF32], ids=str)
def test_gradient_of_one_harmonic_for_each_warp(monkeypatch, gpu, dtype):
    """And of shares of the output of two sizes, as if a warp had few accumulators."""
    monkeypatch.setattr(structure, "GRADIENT_TILES", 2)
    call = layer_between("C2", regular(2), regular(24), 5)
    found = [k.structure for k in kernels_of(call, dtype).directions[0].gradient]
    assert [[piece.copies for piece in s.pieces] for s in found] == [[16, 16], [8, 8]]
    assert {s.gradient_threads for s in found} == {32 * 11}
    assert_as_good_as_dense(call, dtype, draws=2)
    assert gpu.launched.count("equiconv_grad_weight") == 4


@needs_gpp
@pytest.mark.slow
def test_second_derivatives(gpu):
    call = small_call()

    def second(function, tensors):
        x, w, b = (t.detach().requires_grad_() for t in tensors)
        v = [rounded(torch.randn(t.shape, generator=torch.Generator().manual_seed(i)), BF16).to(t)
             for i, t in enumerate((x, w))]
        first = torch.autograd.grad(function(x, w, b).square().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum((g * u).sum() for g, u in zip(first, v)), (x, w))

    tensors = inputs(call, BF16)
    want = second(call.dense, [t.double() for t in tensors])
    assert max(errors(second(fused(call), tensors), want)) < 0.015


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("name,fields,dtype", [("C3", (3, 3), BF16), ("D1", (17, 2), BF16), ("C4", (8, 8), TF32)])
def test_fields_are_written_by_the_kernel_itself(gpu, name, fields, dtype):
    """Of channels_last tensors; one number at a time, two or 16 bytes."""
    call = Call(plan_between(name, *map(regular, fields), 3), (3, 3), {"padding": 1}, 2, (5, 9))
    assert_as_good_as_dense(call, dtype, channels_last=True)
    assert gpu.launched.count("equiconv_forward") == 2 and "equiconv_unpack_channels" not in gpu.launched


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_activations(gpu, channels_last):
    call = staged_call("D1")
    tensors = inputs(call, BF16, channels_last=channels_last)
    grad = like(torch.randn(1, 4, *call.size), tensors[0])
    for name, function in (("relu", F.relu), ("elu", F.elu)):
        got = results(fused(call.with_(options={**call.options, "activation": name})), tensors, grad)
        want = results(lambda *tensors, f=function: f(fused(call)(*tensors)), tensors, grad)
        assert max(errors(got, [t.double() for t in want])) < (1e-9 if name == "relu" else 4e-3), name


@needs_gpp
def test_opcheck(gpu):
    call = small_call()
    x, weights, bias = inputs(call, BF16)
    arguments = (call.plan.key(), [3, 3], 1, False, [1, 1], [call.plan.out_channels, 9, 8])
    opcheck(torch.ops.equiconv.steerable_conv.fused, (x, weights, bias, *arguments, "elu"))
    y = torch.ones(2, call.plan.out_channels, 9, 8, dtype=BF16)
    opcheck(torch.ops.equiconv.steerable_conv_bwd.fused, (x, weights, y, *arguments, True, True))


@needs_gpp
def test_graphs(gpu):
    """One graph, forward and backward, with the plan as a constant of it."""
    call = small_call()
    torch._dynamo.reset()
    compiled = torch.compile(fused(call), backend="aot_eager", fullgraph=True)
    tensors = inputs(call, BF16)
    assert all(torch.equal(a, b) for a, b in zip(results(compiled, tensors), results(fused(call), tensors)))


# ---- barriers and waits ----

@needs_gpp
@pytest.mark.parametrize("name", [pytest.param("D1"), pytest.param("C4", marks=pytest.mark.slow)])
def test_order_of_threads_and_copies_does_not_matter(monkeypatch, folder, name):
    found = []
    for last_to_first in (False, True):
        for copies_land_early in (False, True):
            emulated_gpu.emulate(monkeypatch, folder, last_to_first=last_to_first, copies_land_early=copies_land_early)
            found.append(staged_results(name))
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def staged_call(name):
    """More copies of an irrep than are staged at a time, and several tiles of pixels."""
    return Call(plan_between(name, regular(17), regular(2), 3), (3, 3), {"padding": 1}, 1, (17, 10))


def staged_results(name):
    call = staged_call(name)
    return results(fused(call), inputs(call, BF16))


def lines_of(file, pattern):
    found = [i for i, line in enumerate((FOLDER / file).read_text().splitlines(), 1) if re.search(pattern, line)]
    assert found
    return [(file, line) for line in found]


SYNCHRONISATION = [at for file in ("forward.cuh", "grad_weight.cuh", "maps.cuh")
                   for at in lines_of(file, r"__syncthreads\(\)|wait_copies<")]


@needs_gpp
@pytest.mark.slow
@pytest.mark.parametrize("file,line", SYNCHRONISATION)
def test_every_barrier_and_wait_is_needed(monkeypatch, folder, file, line):
    emulated_gpu.emulate(monkeypatch, folder)
    right, wrong = staged_results("D1"), []
    for options in ((a, b) for a in (False, True) for b in (False, True)):
        emulated_gpu.emulate(monkeypatch, folder, last_to_first=options[0], copies_land_early=options[1],
                             skipped_line=line, skipped_in=file)
        wrong.append(not all(torch.equal(a, b) for a, b in zip(right, staged_results("D1"))))
    assert any(wrong)


# ---- text and numbers ----

def test_structs_of_python_are_those_of_cpp():
    text = re.sub(r"//.*", "", "".join(path.read_text() for path in FOLDER.glob("*.cuh")))
    for struct in (launch.Image, launch.Output, launch.Terms, launch.Channels, launch.ForwardParams,
                   launch.GradWeightParams, launch.ChangeChannelsParams, launch.MapParams, launch.ReduceParams):
        body = re.search(rf"struct {struct.__name__} {{(.*?)}};", text, re.S)[1]
        found = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            type_, rest = re.fullmatch(r"((?:const )?(?:long long|\w+))\s*(.*)", declaration, re.S).groups()
            for member in rest.split(","):
                is_pointer = "*" in member
                found.append((member.strip(" *\n"), launch.POINTER if is_pointer else
                              {"int": launch.INT, "long long": launch.LONG}.get(type_) or getattr(launch, type_)))
        assert found == struct._fields_, struct.__name__


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("k", [3, 5, 7])
def test_harmonics_lose_little_when_rounded(k, dtype):
    plan = plan_between("C8", regular(1), regular(1), k)
    harmonics = irreps.IrrepLayer(plan, (k, k), irreps.sides_of(plan), False, dtype).harmonics
    lost = torch.from_numpy(harmonics).to(dtype).double().numpy() - harmonics
    size = np.sqrt(np.square(harmonics).sum((1, 2)))
    assert (np.sqrt(np.square(lost).sum((1, 2))) < torch.finfo(dtype).eps / 12 * size).all()


@pytest.mark.parametrize("name,k,forward,gradient", [("C8", 5, 1, 1), ("D8", 5, 1, 1), ("C16", 5, 2, 1)])
def test_number_of_kernels(name, k, forward, gradient):
    there, back = kernels_of(layer_of(name, k)).directions
    assert [len(there.forward), len(back.forward), len(there.gradient)] == [forward, forward, gradient]
    assert not back.gradient


@pytest.mark.parametrize("dtype,forward", [(BF16, 1), (TF32, 2)], ids=["bf16", "tf32"])
@pytest.mark.parametrize("k", [3, 5])
def test_number_of_kernels_in_space(k, dtype, forward):
    there, _ = kernels_of(layer_in_space("SO(3)", k), dtype).directions
    assert [len(there.forward), len(there.gradient)] == [forward, 1]


@pytest.mark.parametrize("name,source,target,k,forward,gradient", WIDE)
def test_number_of_kernels_of_wide_layers(name, source, target, k, forward, gradient):
    there, _ = kernels_of(layer_between(name, regular(source), regular(target), k)).directions
    assert [len(there.forward), len(there.gradient)] == [forward, gradient]


@pytest.mark.parametrize("dtype,warps,tiles", [(BF16, 9, [16]), (TF32, 5, [16, 16])], ids=["bf16", "tf32"])
def test_many_warps_have_few_accumulators(dtype, warps, tiles):
    """9 warps leave 168 registers to a thread, which TF32 needs for other things than those accumulators."""
    kernels = kernels_of(layer_between("C16", regular(24), regular(32), 7), dtype).directions[0].gradient
    assert {k.structure.gradient_threads for k in kernels} == {32 * warps}
    assert [k.structure.max_tiles for k in kernels] == tiles


def test_complex_types_share_their_z():
    plan = plan_between("C8", regular(1), regular(1), 5)
    layer = irreps.IrrepLayer(plan, (5, 5), irreps.sides_of(plan), False, BF16)
    assert layer.is_complex == [False, True, True, True, False]
    assert sum(map(len, layer.tensors.values())) == 55  # of 88 paths


def test_sparse_map():
    matrix = np.array([[0, 2, 0], [0, 0, 0], [1, 0, -3.5]])
    sparse = packing.SparseMap.of_matrix(matrix)
    assert sparse.start.tolist() == [0, 1, 1, 3] and sparse.index.tolist() == [1, 0, 2]
    assert sparse.coefficients.tolist() == [2, 1, -3.5]


# ---- what it cannot do ----

@pytest.mark.parametrize("changes,dtype,reason", [
    ({}, torch.float64, "bfloat16, float16 and TF32"), ({"up": True}, BF16, "transposed"),
    ({"stride": (2, 1)}, BF16, r"the same along every axis, not \(2, 1\)"),
    ({"dilation": (1, 2)}, BF16, "a dilation of 1"), ({"kernel": (3, 5)}, BF16, "equal sizes"),
    ({"groups": 2}, BF16, "groups"), ({}, BF16, "needs a CUDA device, not 'cpu'")])
def test_reasons(changes, dtype, reason):
    call = small_call()
    values = dict(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, up=False,
                  source_channels=call.plan.in_channels, target_channels=call.plan.out_channels, source_size=(9, 9),
                  target_size=(9, 9))
    found = fused_unavailable_reason(call.plan, Geometry(**{**values, **changes}), torch.device("cpu"), dtype)
    assert re.search(reason, found)


@pytest.mark.parametrize("name,reason", [
    ("c4_k1", "sizes 3, 5, 7, 9 .* not 1"), ("c4_k4", "not 4")])
def test_unsupported_layers(monkeypatch, tmp_path, name, reason):
    emulated_gpu.emulate(monkeypatch, tmp_path)
    call = Call.of(CASES[name])
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(Unsupported, match=reason):
            fused_layer(call.plan, call.kernel, torch.device("cpu"), BF16)


def test_kernels_in_space_are_small():
    structure.check_kernel((5, 5, 5))
    with pytest.raises(Unsupported, match="sizes 3, 5 are implemented, not 7"):
        structure.check_kernel((7, 7, 7))


@pytest.mark.parametrize("kilobytes,reason", [
    (16, "its channels need more shared memory"), (21, "too wide for 16 kernels|its weights need more shared memory")])
def test_a_layer_that_is_too_wide(monkeypatch, tmp_path, kilobytes, reason):
    emulated_gpu.emulate(monkeypatch, tmp_path).shared_bytes = kilobytes * 1024
    call = layer_of("C16", 5)
    with pytest.raises(Unsupported, match=reason):
        fused_layer(call.plan, call.kernel, torch.device("cpu"), BF16)


@pytest.mark.parametrize("changes,message", [
    ({"x": torch.zeros(1, 10, 5, 5).double()}, "x must be bfloat16, float16 or float32, got torch.float64"),
    ({"x": torch.zeros(1, 3, 5, 5, dtype=BF16)}, r"x must have shape \[B, 10, \*size\] .* got \(1, 3, 5, 5\)"),
    ({"stride": 3}, r"stride must be 1 or 2, .* got \(3, 3\)"),
    ({"weights": torch.zeros(3)}, "weights must be "),
    ({"kernel_size": (5, 5)}, "kernel_size must be .* product is 9"),
    ({"padding": -1}, r"padding must be .* got \(-1, -1\)"),
    ({"bias": torch.zeros(4)}, r"bias must have shape \(18,\)"),
    ({"x": torch.zeros(1, 10, 2, 2, dtype=BF16)}, r"x is too small .* sizes \(2, 2\) give \[0, 0\]")])
def test_bad_input(changes, message):
    plan = small_call().plan
    arguments = {"x": torch.zeros(1, 10, 5, 5, dtype=BF16), "weights": torch.zeros(plan.weights), "plan": plan,
                 "kernel_size": (3, 3), **changes}
    with pytest.raises(ValueError, match=f"fused_steerable_conv: {message}"):
        fused_steerable_conv(**arguments)


def test_on_a_cpu():
    call = small_call()
    with pytest.raises(ValueError, match="runs on CUDA devices only, got 'cpu'"):
        fused(call)(*inputs(call, BF16))


# ---- compiled for GPUs ----

def compile_(folder, source, arch):
    """Compiles it by nvcc; asserts that no register is spilled and that the shared memory suffices."""
    file = Path(folder, "kernel.cu")
    file.write_text(source)
    done = subprocess.run(["nvcc", compiler.STANDARD, f"-arch={arch}", "-cubin", "-Xptxas", "-v", f"-I{FOLDER}", file,
                           "-o", file.with_suffix(".cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0")}, done.stderr


@needs_nvcc
def test_kernels_compile(tmp_path):
    compile_(tmp_path, kernels_of(small_call()).sources[1], "sm_80")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_all_kernels_of_a_layer_compile(tmp_path, dtype, arch):
    for source in kernels_of(small_call(), dtype, arch).sources:
        compile_(tmp_path, source, arch)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name,k", [
    *((name, k) for name in ("C4", "C8", "D4") for k in (3, 5, 7)), ("D8", 3), ("D8", 5), ("C16", 3),
    ("C16", 5), ("C16", 7), ("SO(2)", 5), ("O(2)", 5)])
def test_layers_compile_without_spills(tmp_path, name, k, arch):
    for source in kernels_of(layer_of(name, k), arch=arch).sources:
        compile_(tmp_path, source, arch)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype,stride", [(BF16, 1), (BF16, 2), (TF32, 1)], ids=["bf16", "bf16_stride2", "tf32"])
@pytest.mark.parametrize("name,k", [("C8", 3), ("C8", 5), ("C8", 7), ("D8", 5), *(
    (name, k) for name in IN_SPACE for k in (3, 5))])
def test_more_layers_compile_without_spills(tmp_path, name, k, dtype, stride, arch):
    call = (layer_in_space if name in IN_SPACE else layer_of)(name, k)
    call = call.with_(options={**call.options, "stride": stride})
    if (name, k, arch) == ("SO(3)", 5, "sm_80") and (stride, dtype) != (1, BF16):  # its shared memory is small
        with pytest.raises(Unsupported, match="shared memory"):
            kernels_of(call, dtype, arch)
        return
    for source in kernels_of(call, dtype, arch).sources:
        compile_(tmp_path, source, arch)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, TF32], ids=["bf16", "tf32"])
@pytest.mark.parametrize("name,source,target,k", [wide[:4] for wide in WIDE])
def test_gradients_of_wide_layers_compile_without_spills(tmp_path, name, source, target, k, dtype):
    there, _ = kernels_of(layer_between(name, regular(source), regular(target), k), dtype).directions
    for kernel in there.gradient:
        compile_(tmp_path, kernel.source(buffers=there.buffers), "sm_90")


@needs_nvcc
def test_nvcc_in_place_of_nvrtc(monkeypatch):
    monkeypatch.setattr(compiler, "_libraries", lambda: ["libnvrtc.so.of_no_version"])
    compiler.compiler.cache_clear()
    try:
        found = compiler.compiler()
        assert isinstance(found, compiler.Nvcc)
        assert found.compile(kernels_of(small_call(), F16).maps, "sm_80")[:4] == b"\x7fELF"
        with pytest.raises(RuntimeError, match="nvcc: .*undefined"):
            found.compile("int x = y;", "sm_80")
    finally:
        compiler.compiler.cache_clear()


@pytest.mark.slow
def test_nvrtc():
    """Where the library is: it needs no GPU."""
    for name in compiler._libraries() or ["libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            found = compiler.Nvrtc(name)
        except OSError:
            continue
        for source in kernels_of(small_call()).sources:
            assert found.compile(source, "sm_90")[:4] == b"\x7fELF"
        with pytest.raises(RuntimeError, match="NVRTC: .*undefined"):
            found.compile("int x = y;", "sm_90")
        return
    pytest.skip("needs NVRTC")
