"""Builds the native parts with ninja: `_cpu` and `_cuda`, plugin libraries for torch, and `_host`, a Python module.

EQUICONV_CUDA=0         leaves `_cuda` out (so does the absence of nvcc)
EQUICONV_CUDA_ARCHS     default "80;86;89;90"; PTX is added for the last one
EQUICONV_PRECOMPILE     arguments of `equiconv precompile`, such as "p4_cnn c8_steerable_cnn --arch sm_90": a wheel gets
                        these kernels (by default, those that the source tree has in equiconv/precompiled)
EQUICONV_SANITIZE       for example "address,undefined": for `_cpu` and `_host`
CXX                     default "g++"
"""
import fcntl
import filecmp
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = "equiconv"
CXX = os.environ.get("CXX", "g++")
NVCC = shutil.which("nvcc") if os.environ.get("EQUICONV_CUDA", "1") != "0" else None
ARCHS = os.environ.get("EQUICONV_CUDA_ARCHS", "80;86;89;90").split(";")
PRECOMPILE = shlex.split(os.environ.get("EQUICONV_PRECOMPILE", ""))
SANITIZE = os.environ.get("EQUICONV_SANITIZE", "")
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {"portable": ""}
if X86:
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
CPU_OPS = sorted(p.stem for p in Path("csrc/cpu").glob("*.cpp") if p.stem != "isa")
CUDA_OPS = sorted(p.stem for p in Path("csrc/cuda").glob("*.cu")) if NVCC else []

# -MD, not -MMD: another torch or CUDA in the same place changes system headers too. The comments are for what changes
# without a newer header.
RULES = """\
rule cxx
  command = {cxx} -std=c++20 -O3 -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra {sanitize} $
    $flags -MD -MF $out.d -c $in -o $out  # {torch}, {cxx_version}
  depfile = $out.d
  description = $out
rule nvcc
  command = {nvcc} -std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v --threads 0 {gencode} $
    -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)  # {nvcc_version}
  depfile = $out.d
  description = $out
rule link
  command = {cxx} -shared {sanitize} $in -o $out $flags
  description = $out
rule link_cuda
  command = {nvcc} -shared --no-device-link -cudart static $in -o $out $flags
  description = $out
"""


def torch_dir():
    """Where torch lies, without importing it (that takes seconds). Also from pip's isolated build, which hides it."""
    spec = PathFinder.find_spec("torch") or PathFinder.find_spec("torch", site.getsitepackages())
    if spec is None:
        raise SystemExit(f"{PACKAGE} compiles against torch: install torch first")
    return Path(spec.origin).parent


def include_dirs(torch):
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise SystemExit(f"no Python.h in {python}: install Python's headers (on Debian: apt install python3-dev)")
    return f"-isystem {torch}/include", f"-isystem {python} -isystem {torch}/include"  # torch carries pybind11


def torch_version(torch):
    version, major, minor = re.search(r"__version__ = '((\d+)\.(\d+).*?)'", (torch / "version.py").read_text()).groups()
    if (int(major), int(minor)) < (2, 10):
        raise SystemExit(f"{PACKAGE} needs torch >= 2.10, this is {version}: {torch}")
    return f"torch {version}"


def tool_version(tool, line):
    text = subprocess.run(f"{tool} --version", shell=True, check=True, capture_output=True, text=True).stdout
    return text.splitlines()[line].replace("$", "")


def ninja_file(build, targets):
    torch = torch_dir()
    torch_include, host_includes = include_dirs(torch)
    torch_flags = f"{torch_include} -DTORCH_TARGET_VERSION=0x020a000000000000" + (" -DEQUICONV_X86" if X86 else "")
    link_torch = f"-L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu"
    lines, parts = [], {"_cpu": [], "_cuda": [], "_host": []}

    def compile_(part, source, flags, rule="cxx", tag=""):
        obj = f"{build}/{part}/{Path(source).parent.name}_{Path(source).stem}{tag}.o"
        lines.append(f"build {obj}: {rule} {source}\n  flags = {flags}")
        parts[part].append(obj)

    compile_("_cpu", "csrc/cpu/isa.cpp", torch_flags)
    compile_("_cpu", "csrc/torch/isa.cpp", torch_flags)
    for op in CPU_OPS:
        compile_("_cpu", f"csrc/torch/{op}.cpp", torch_flags)
        for isa, flags in ISAS.items():
            compile_("_cpu", f"csrc/cpu/{op}.cpp", f"-DEQUICONV_ISA={isa} {flags}", tag=f".{isa}")
    for op in CUDA_OPS:
        compile_("_cuda", f"csrc/torch/{op}.cpp", torch_flags + " -DEQUICONV_WITH_CUDA")
        compile_("_cuda", f"csrc/cuda/{op}.cu", "", rule="nvcc")
    archs = ";".join(ARCHS) if CUDA_OPS else ""
    compile_("_host", "csrc/host/host.cpp", f"{host_includes} '-DEQUICONV_CUDA_ARCHS=\"{archs}\"'")

    # nvcc itself links _cuda: it knows where its runtime lies, even where `nvcc` on the PATH is a wrapper script
    link = {"_cpu": ("link", link_torch), "_cuda": ("link_cuda", link_torch.replace("-Wl,", "-Xlinker ")),
            "_host": ("link", "")}
    for part, target in targets.items():
        rule, flags = link[part]
        lines.append(f"build {target}: {rule} {' '.join(parts[part])}\n  flags = {flags}")
    gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in ARCHS)
    gencode += f" -gencode arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"
    # -O1: at -O3 the checks of so many inlined templates take g++ ten minutes a file
    sanitize = f"-O1 -fsanitize={SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g" if SANITIZE else ""
    rules = RULES.format(cxx=CXX, nvcc=NVCC, gencode=gencode, sanitize=sanitize, torch=torch_version(torch),
                         cxx_version=tool_version(CXX, 0), nvcc_version=tool_version(NVCC, -1) if NVCC else "")
    return "\n".join([f"builddir = {build}", rules, *lines]) + "\n"


def ninja_command():
    if found := shutil.which("ninja"):
        return [found]
    if PathFinder.find_spec("ninja") is None:
        raise SystemExit(f"{PACKAGE} is built with ninja: pip install ninja")
    return [sys.executable, "-m", "ninja"]


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):  # the plugin libraries are not Python modules: no ABI in their names
        name = fullname.rpartition(".")[2]
        return super().get_ext_filename(fullname) if name == "_host" else fullname.replace(".", os.sep) + ".so"

    def build_extensions(self):
        # Not self.build_temp: pip's editable build makes that a temporary folder, and nothing would be incremental.
        tag = f"{sysconfig.get_config_var('SOABI')}{'-' + SANITIZE.replace(',', '-') if SANITIZE else ''}"
        build = Path("build/native", tag)
        build.mkdir(parents=True, exist_ok=True)
        names = {e.name.rpartition(".")[2]: self.get_ext_filename(e.name) for e in self.extensions}
        self.built = {name: build / Path(name).name for name in names.values()}  # where it belongs: where it lies
        text = ninja_file(build, {part: self.built[name] for part, name in names.items()})
        with open(build / "lock", "w") as lock:  # two builds at once would write the same objects
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (build / "build.ninja").exists() or (build / "build.ninja").read_text() != text:
                (build / "build.ninja").write_text(text)
            # run from the root, so that __FILE__ in messages is csrc/...
            verbose = ["-v"] if self.verbose else []
            subprocess.run([*ninja_command(), "-f", str(build / "build.ninja"), *verbose], check=True)
        self.install_libraries(Path(self.build_lib))

    def copy_extensions_to_source(self):
        self.install_libraries(Path("."))

    def install_libraries(self, root):
        if f"{PACKAGE}/_cuda.so" not in self.built:
            (root / PACKAGE / "_cuda.so").unlink(missing_ok=True)  # of an earlier build, with nvcc
        for name, built in self.built.items():
            target = root / name
            if not target.exists() or not filecmp.cmp(built, target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(built, f"{target}.new")
                os.replace(f"{target}.new", target)  # a process that has the old one loaded keeps it


class BuildPython(build_py):
    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)  # or modules deleted since an earlier build would be packed
        if PRECOMPILE:
            subprocess.run([sys.executable, "-m", PACKAGE, "precompile", "--package", *PRECOMPILE], check=True)
            self.__dict__.pop("data_files", None)  # listed anew, with them
        super().run()


LINKED = {f"{PACKAGE}.triton_kernels": "triton_kernels", f"{PACKAGE}.cuda_kernels": "csrc/cuda/steerable_conv"}
SOURCES = [str(p) for p in sorted(Path("csrc").rglob("*")) if p.is_file()]  # for the source distribution
setup(
    packages=sorted({*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), *LINKED}),
    package_dir=LINKED,
    package_data={f"{PACKAGE}.cuda_kernels": ["*.cuh"],  # compiled on the user's machine, for a layer
                  PACKAGE: ["precompiled/*.cubin"]},
    ext_modules=[Extension(f"{PACKAGE}.{part}", [], depends=SOURCES) for part in ("_cpu", "_cuda", "_host")
                 if part != "_cuda" or CUDA_OPS],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
