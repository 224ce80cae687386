"""Kernels of the fused convolution without a compiler, with an old driver, compiled before they are needed."""
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import equiconv.nn
from equiconv import autotuning, gspaces, precompilation
from equiconv.basis import cache as disk
from equiconv.fused import Unavailable, compiler, fused_unavailable_reason, launch, origin_of_kernels
from equiconv.fused.kernels import SHARED_BYTES
from equiconv.layout import Geometry
from equiconv.models.harmonic import HarmonicConv, complex_fields
from equiconv.nn import planner
from tests.cases import CASES
from tests.steerable_calls import Call
from tests.test_steerable_conv_cuda import BF16, kernels_of, needs_nvcc

NO_COMPILER = "there is neither NVRTC nor nvcc to compile it"
OLD_DRIVER = 222  # CUDA_ERROR_UNSUPPORTED_PTX_VERSION


class Compiler:
    """In place of NVRTC: "compiles" a text to itself."""
    version, archs = "fake 1", {"sm_80", "sm_90"}

    def __init__(self):
        self.compiled = []

    def compile(self, source, arch):
        if "a mistake" in source:
            raise RuntimeError("line 1: a mistake")
        self.compiled.append((source, arch))
        return f"{source} for {arch}".encode()


class Driver:
    """In place of libcuda: keeps what was loaded; does not load a cubin that holds `unknown`."""

    def __init__(self, unknown=None):
        self.unknown, self.loaded, self.launched, self.current = unknown, [], [], None

    def cuCtxGetCurrent(self, context):
        context._obj.value = self.current
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 77 + device.value
        return 0

    def cuCtxSetCurrent(self, context):
        self.current = context.value
        return 0

    def cuModuleLoadData(self, module, cubin):
        assert self.current is not None
        if self.unknown is not None and self.unknown in cubin:
            return OLD_DRIVER
        self.loaded.append(cubin)
        module._obj.value = len(self.loaded)
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"unsupported toolchain"
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = 100 * module.value
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        return 0

    def cuLaunchKernel(self, function, *rest):
        assert self.current is not None
        self.launched.append(function.value)
        return 0


@pytest.fixture
def cuda_compiler(monkeypatch):
    """A Compiler; use(None) takes it away."""
    found = Compiler()
    found.use = lambda other: monkeypatch.setattr(compiler, "compiler", lambda: other)
    found.use(found)
    return found


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The package's and the cache's, both empty."""
    found = SimpleNamespace(package=tmp_path / "package", cache=tmp_path / "cache")
    monkeypatch.setattr(compiler, "PRECOMPILED", found.package)
    monkeypatch.setattr(disk, "CACHE_FOLDER", str(found.cache))
    return found


@pytest.fixture
def gpu(monkeypatch):
    """A launch.Device with a Driver as its `driver`."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132,
                                 shared_memory_per_block_optin=SHARED_BYTES["sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=0))
    device = launch.Device(0)
    device.driver = Driver()
    monkeypatch.setattr(launch, "_driver", lambda: device.driver)
    monkeypatch.setattr(launch, "device_of", lambda _: device)
    return device


CALL = Call.of(CASES["c4_interleaved"])
GEOMETRY = Geometry(CALL.kernel, (1, 1), (1, 1), (1, 1), 1, False, *CALL.channels, (9, 9), (9, 9))


def why_not():
    return fused_unavailable_reason(CALL.plan, GEOMETRY, torch.device("cuda", 0), BF16)


def origin():
    return origin_of_kernels(CALL.plan, GEOMETRY, torch.device("cuda", 0), BF16)


def run(gpu, source="text"):
    gpu.launch(source, "kernel", (1, 1), 32, 0, launch.MapParams())


# ---- kept on disk ----

def test_a_kept_kernel_needs_no_compiler(cuda_compiler, folders):
    assert list(compiler.cubins("text", "sm_80")) == [b"text for sm_80"]
    cuda_compiler.use(None)
    cubins = compiler.cubins("text", "sm_80")
    assert next(cubins) == b"text for sm_80"
    with pytest.raises(Unavailable, match=NO_COMPILER):  # should that one not load
        next(cubins)
    for source, arch in (("text", "sm_90"), ("another text", "sm_80")):
        with pytest.raises(Unavailable, match=NO_COMPILER):
            next(compiler.cubins(source, arch))


def test_each_kernel_is_compiled_once(cuda_compiler, folders):
    for source, arch, count in (("A", "sm_80", 1), ("A", "sm_80", 1), ("A", "sm_90", 2), ("B", "sm_90", 3)):
        assert next(compiler.cubins(source, arch)) == f"{source} for {arch}".encode()
        assert len(cuda_compiler.compiled) == count


def test_other_headers_make_another_kernel(cuda_compiler, folders, monkeypatch):
    next(compiler.cubins("text", "sm_90"))
    monkeypatch.setattr(compiler, "_headers", lambda: "changed")
    assert compiler.kept("text", "sm_90") is None
    next(compiler.cubins("text", "sm_90"))
    assert len(cuda_compiler.compiled) == 2


@pytest.mark.parametrize("damage", [lambda text: b"", lambda text: text[:-1], lambda text: b"!" + text[1:]],
                         ids=["empty", "cut", "changed"])
def test_a_damaged_file_is_made_again(cuda_compiler, folders, damage):
    next(compiler.cubins("text", "sm_90"))
    file, = folders.cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert next(compiler.cubins("text", "sm_90")) == b"text for sm_90"
    assert file.read_bytes() == whole and len(cuda_compiler.compiled) == 2


def test_nothing_is_kept_without_a_folder(cuda_compiler, folders, monkeypatch):
    monkeypatch.setattr(disk, "CACHE_FOLDER", "")
    for count in (1, 2):
        next(compiler.cubins("text", "sm_90"))
        assert len(cuda_compiler.compiled) == count


# ---- what cannot run ----

def test_no_compiler(cuda_compiler, folders, gpu):
    cuda_compiler.use(None)
    count = len(kernels_of(CALL).sources)
    assert why_not() == f"{NO_COMPILER}, and {count} of its {count} kernels are not kept for sm_90"
    with pytest.raises(Unavailable, match=NO_COMPILER):
        run(gpu)


def test_a_compiler_that_does_not_know_the_gpu(cuda_compiler, folders, gpu):
    cuda_compiler.archs = {"sm_80"}
    assert why_not().startswith("the compiler here does not know sm_90: fake 1, and ")


def test_compilers_that_do_not_work(monkeypatch):
    monkeypatch.setattr(compiler, "_libraries", lambda: ["libnvrtc.so.of_no_version"])
    for path in (None, shutil.which("false")):
        monkeypatch.setattr(compiler.shutil, "which", lambda name, path=path: path)
        monkeypatch.setenv("PATH", "")
        assert compiler.compiler.__wrapped__() is None


def test_a_driver_that_is_older_than_the_compiler(cuda_compiler, folders, gpu):
    gpu.driver.unknown = b"ChangeChannels"
    assert why_not() == "the driver does not load it: CUDA: unsupported toolchain"
    assert len(cuda_compiler.compiled) == 1
    assert why_not() and len(cuda_compiler.compiled) == 1  # it is remembered


def test_no_driver(cuda_compiler, folders, gpu, monkeypatch):
    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")
    monkeypatch.setattr(launch, "_driver", missing)
    assert why_not() == "the driver does not load it: libcuda.so.1: cannot open shared object file"


def test_a_kept_kernel_that_does_not_load_is_compiled_again(cuda_compiler, folders, gpu):
    for folder in (folders.package, folders.cache):
        folder.mkdir()
        (folder / compiler.name_of("text", "sm_90")).write_bytes(compiler.sealed(b"by a newer toolkit"))
    gpu.driver.unknown = b"newer"
    run(gpu)
    assert gpu.driver.loaded == [b"text for sm_90"]
    assert next(folders.cache.iterdir()).read_bytes() == compiler.sealed(b"text for sm_90")


def test_a_kernel_that_does_not_compile(cuda_compiler, folders, gpu):
    with pytest.raises(Unavailable, match="a kernel does not compile: line 1: a mistake"):
        run(gpu, "a mistake")
    assert why_not() is None
    gpu.driver.unknown = b"equiconv_forward"
    with pytest.raises(Unavailable, match="unsupported toolchain"):  # which is found when it is first needed
        run(gpu, kernels_of(CALL).sources[-1])
    assert why_not() == "the driver does not load it: CUDA: unsupported toolchain"


def test_a_new_thread_gets_a_context(cuda_compiler, folders, gpu):
    run(gpu)
    assert gpu.driver.launched == [100] and gpu.driver.current == 77
    gpu.driver.current = None  # as in a thread of autograd's
    run(gpu)
    assert gpu.driver.launched == [100, 100] and gpu.driver.current == 77 and len(gpu.driver.loaded) == 1


def test_a_layer_without_a_compiler(cuda_compiler, folders, gpu, monkeypatch):
    """It says why when asked for the method by name, and computes by another one otherwise."""
    cuda_compiler.use(None)
    monkeypatch.setattr(planner, "fused_unavailable_reason", lambda *_: why_not())
    case = CASES["c4_interleaved"]
    layer, x = case.build(equiconv.nn), case.input()
    report = layer.plan_report()
    assert report.why_not_fused == why_not() and f"fused: not possible, {NO_COMPILER}" in str(report)
    want = layer(x).tensor
    layer.method = "fused"
    report = layer.plan_report()
    assert report.method == "dense" and f"the method 'fused' cannot be used: {NO_COMPILER}" in report.reason
    with pytest.raises(ValueError, match=f"method 'fused' cannot be used here: {NO_COMPILER}"):
        layer(x)
    layer.method = "dense"
    torch.testing.assert_close(layer(x).tensor, want)


def test_autotune_leaves_out_what_does_not_compile(monkeypatch):
    layer, x = CASES["c4_interleaved"].build(equiconv.nn), CASES["c4_interleaved"].input()
    monkeypatch.setattr(type(layer), "candidates", lambda self, x: ("fused", "factorised", "dense"))

    def time_of(step, *_):
        if layer.method == "fused":
            raise Unavailable("the compiler ran out of memory")
        return {"factorised": 1, "dense": 2}[layer.method]
    monkeypatch.setattr(autotuning, "time_of", time_of)
    tuned, = equiconv.autotune(layer, x)
    assert tuned.seconds == {"factorised": 1, "dense": 2} and layer.method == "factorised"


# ---- compiled before they are needed ----

def model():
    return torch.nn.Sequential(CASES["c4_interleaved"].build(equiconv.nn), torch.nn.ReLU())


@pytest.mark.parametrize("in_package,place", [(False, "kept in EQUICONV_CACHE"), (True, "precompiled in the package")])
def test_precompiled_kernels_need_no_compiler(cuda_compiler, folders, gpu, in_package, place):
    count, ticks = len(kernels_of(CALL).sources), []
    assert origin() == f"{count} compiled by fake 1 when they are needed"
    report = equiconv.precompile(model(), ["sm_90"], [BF16], in_package=in_package, tick=lambda *n: ticks.append(n))
    assert (report.compiled, report.kept, report.failed, report.left_out) == ({"sm_90": count}, {}, [], {})
    assert ticks == [(i + 1, count) for i in range(count)]
    assert compiler.precompiled() == ({"sm_90": count} if in_package else {})
    cuda_compiler.use(None)
    assert why_not() is None and origin() == f"{count} {place}"
    for source in kernels_of(CALL).sources:
        run(gpu, source)
    assert len(gpu.driver.loaded) == count == len(cuda_compiler.compiled)


def test_precompiled_for_harmonic_networks(cuda_compiler, folders):
    """With what HarmonicConv computes by."""
    plane = gspaces.rot2dOnR2(-1, maximum_frequency=1)
    conv = HarmonicConv(*(complex_fields(equiconv.nn, plane, [0, 1], 4) for _ in range(2)), 5, padding=2)
    report, again = (equiconv.precompile(module, ["sm_90"], [BF16]) for module in (conv, conv.planned))
    count = len(cuda_compiler.compiled)
    assert count > 0 and report.compiled == again.kept == {"sm_90": count}
    assert report.left_out == again.left_out == again.compiled == {}


def test_what_is_kept_is_not_compiled_again(cuda_compiler, folders):
    equiconv.precompile(model(), ["sm_90"], [BF16], in_package=True)
    stale = folders.package / "sm_90_of_other_headers.cubin"
    stale.write_bytes(b"")
    report = equiconv.precompile(model(), ["sm_90", "sm_80"], [BF16, torch.float16], in_package=True)
    count = len(kernels_of(CALL).sources)
    assert report.kept == {"sm_90": count} and report.compiled == {"sm_90": count, "sm_80": 2 * count}
    assert len(cuda_compiler.compiled) == 4 * count and not stale.exists()


def test_precompile_says_what_it_left_out(cuda_compiler, folders, monkeypatch):
    transposed = CASES["c4_transposed_stride2"].build(equiconv.nn)
    report = equiconv.precompile(torch.nn.Sequential(transposed), ["sm_90"], [BF16])
    assert report.left_out == {("0", BF16, "sm_90"): "transposed convolutions are not implemented"}
    assert report.compiled == report.kept == {}
    monkeypatch.setattr(cuda_compiler, "compile", lambda source, arch: (_ for _ in ()).throw(RuntimeError("no disk")))
    report = equiconv.precompile(model(), ["sm_90"], [BF16])
    assert len(report.failed) == len(kernels_of(CALL).sources) and "no disk" in report.failed[0]
    assert report.compiled == {"sm_90": 0} and not folders.cache.exists()


@pytest.mark.parametrize("changes,error,message", [
    ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
    ({"archs": ["sm_75"]}, ValueError, "archs must be of sm_80, .*, got 'sm_75'"),
    ({"dtypes": [torch.float64]}, ValueError, "dtypes must be of bfloat16, .*, got torch.float64"),
    ({"dtypes": torch.int8}, ValueError, "dtypes must be of .*, got torch.int8"),
    ({"archs": "sm_9"}, ValueError, "archs must be of .*, got 'sm_9'"),
    ({"archs": ["sm_89"]}, ValueError, "the compiler here does not know sm_89: fake 1")])
def test_bad_arguments(cuda_compiler, folders, changes, error, message):
    with pytest.raises(error, match=f"precompile: {message}"):
        equiconv.precompile(**{"model": model(), **changes})


def test_what_cannot_be_kept_has_failed(cuda_compiler, folders, monkeypatch):
    folders.package.parent.mkdir(parents=True, exist_ok=True)
    file = folders.package.parent / "a file"
    file.touch()
    monkeypatch.setattr(disk, "CACHE_FOLDER", str(file))
    report = equiconv.precompile(model(), (arch for arch in ["sm_90"]), BF16)
    assert len(report.failed) == len(kernels_of(CALL).sources) and "could not be kept" in report.failed[0]
    assert report.compiled == {"sm_90": 0}


def test_without_a_folder(cuda_compiler, monkeypatch):
    monkeypatch.setattr(disk, "CACHE_FOLDER", "")
    with pytest.raises(ValueError, match="kept in EQUICONV_CACHE, which is not set, or with in_package"):
        equiconv.precompile(model())


def test_networks_from_the_command_line(cuda_compiler, folders):
    from typer.testing import CliRunner

    from equiconv.cli import MISUSED, app

    def call(*arguments):
        return CliRunner(env={"COLUMNS": "160"}).invoke(app, list(arguments))

    done = call("precompile", "p4_cnn", "--arch", "sm_90", "--dtype", "bfloat16", "--package")
    assert done.exit_code == 0, done.output
    count = len(list(folders.package.glob("sm_90_*.cubin")))
    assert count == len(cuda_compiler.compiled) and re.search(rf"sm_90\W+{count}\W+0\W", done.output)
    assert "none for 1 convolutions in torch.bfloat16 on sm_90: only kernels of sizes" in done.output
    done = call("info")
    assert f"{count} for sm_90" in done.output and "fake 1" in done.output
    for arguments, message in ((("nothing",), "there is no model 'nothing'"),
                               (("p4_cnn", "--dtype", "number"), "got 'number'")):
        done = call("precompile", *arguments)
        assert done.exit_code == MISUSED and message in done.output


@needs_nvcc
@pytest.mark.slow
def test_really_compiled(folders, monkeypatch):
    space = gspaces.trivialOnR2()
    fields = equiconv.nn.FieldType(space, [space.trivial_repr])
    layer = equiconv.nn.R2Conv(fields, fields, 3)
    report = equiconv.precompile(layer, ["sm_90"], [BF16], in_package=True)
    assert report.compiled["sm_90"] > 3 and not report.failed
    monkeypatch.setattr(compiler, "compiler", lambda: None)
    for source in precompilation._sources(layer, "sm_90", [BF16], {}):
        assert next(compiler.cubins(source, "sm_90"))[:4] == b"\x7fELF"
