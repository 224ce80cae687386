"""Machine code of the fused kernels: kept, in the package or in EQUICONV_CACHE, or compiled by NVRTC or nvcc.

What is kept is found without a compiler: its name says what it was compiled from, but not by which compiler.
"""
import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import torch

from ..backends import HERE
from ..basis import cache as disk

SOURCES = HERE / "cuda_kernels"
PRECOMPILED = HERE / "precompiled"  # of the package: equiconv.precompilation fills it
STANDARD = "-std=c++17"
DIGEST_BYTES = 20


class Nvrtc:
    """The library of CUDA that compiles in the process; torch brings it along."""

    def __init__(self, library):
        folder = Path(library).parent
        for part in sorted(folder.glob("libnvrtc-builtins.so.*")) if folder.is_absolute() else ():
            ctypes.CDLL(part)  # which NVRTC looks for by its name only
        self._library = ctypes.CDLL(library)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"nvrtc {major.value}.{minor.value}"
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        archs = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(archs))
        self.archs = {f"sm_{arch}" for arch in archs}

    def compile(self, source, arch):
        """The cubin of C++ source for an architecture such as "sm_90". Raises RuntimeError with the errors."""
        program = ctypes.c_void_p()
        self._check(self._library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"steerable_conv.cu", 0, None, None))
        try:
            options = [f"--gpu-architecture={arch}", STANDARD, "-default-device", f"-I{SOURCES}"]
            encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self._library.nvrtcCompileProgram(program, len(options), encoded) != 0:
                raise RuntimeError(f"NVRTC: {self._text(program, 'ProgramLog')}")
            return self._bytes(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program, what):
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _text(self, program, what):
        return self._bytes(program, what).rstrip(b"\0").decode(errors="replace")

    def _check(self, status):
        if status != 0:
            get = self._library.nvrtcGetErrorString
            get.restype = ctypes.c_char_p
            raise RuntimeError(f"NVRTC: {get(status).decode()}")


class Nvcc:
    """The compiler of a CUDA toolkit."""

    def __init__(self, path):
        self._path = path
        version, listed = (subprocess.run([path, option], check=True, capture_output=True, text=True).stdout
                           for option in ("--version", "--list-gpu-code"))
        release = re.search(r"release ([\d.]+)", version)
        self.version, self.archs = f"nvcc {release[1] if release else version.strip()}", set(listed.split())

    def compile(self, source, arch):
        """As Nvrtc.compile."""
        with tempfile.TemporaryDirectory() as folder:
            text, target = Path(folder, "steerable_conv.cu"), Path(folder, "steerable_conv.cubin")
            text.write_text(source)
            done = subprocess.run([self._path, STANDARD, f"-arch={arch}", "-cubin", f"-I{SOURCES}", text, "-o", target],
                                  capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc: {done.stderr}")
            return target.read_bytes()


class Unavailable(RuntimeError):
    """A kernel that cannot be had, or not be loaded, on this machine; says why."""


@cache
def compiler():
    """An Nvrtc or Nvcc, or None where neither is to be found, or works."""
    for library in _libraries():
        try:
            return Nvrtc(library)
        except (OSError, AttributeError, RuntimeError):  # there is none of that name, or it is broken
            continue
    try:
        return Nvcc(shutil.which("nvcc") or "nvcc")
    except (OSError, subprocess.CalledProcessError):
        return None


def _libraries():
    """Names of NVRTC: where torch's packages have it, and wherever the system looks."""
    if not torch.version.cuda:
        return []
    major = torch.version.cuda.split(".")[0]
    packages = Path(torch.__file__).parent.parent / "nvidia"
    return [*map(str, sorted(packages.glob(f"*/lib/libnvrtc.so.{major}"))), f"libnvrtc.so.{major}", "libnvrtc.so"]


def why_not(sources, arch):
    """None if the kernels of those sources can be had for an architecture such as "sm_90", else the reason."""
    problem = compiler_problem(arch)
    missing = 0 if problem is None else sum(kept(source, arch) is None for source in sources)
    return f"{problem}, and {missing} of its {len(sources)} kernels are not kept for {arch}" if missing else None


def compiler_problem(arch):
    """None if there is a compiler for that architecture, else the reason."""
    found = compiler()
    if found is None:
        return "there is neither NVRTC nor nvcc to compile it"
    return None if arch in found.archs else f"the compiler here does not know {arch}: {found.version}"


def kept(source, arch):
    """The cubin of that source that is in the package or in the cache on disk, or None."""
    return next((cubin for cubin, _ in _kept(source, arch)), None)


def cubins(source, arch):
    """Yields cubins of that source, of which the first that can be loaded serves: kept ones, then one compiled now.

    Raises Unavailable where a compiler is needed and there is none.
    """
    yield from (cubin for cubin, _ in _kept(source, arch))
    problem = compiler_problem(arch)
    if problem is not None:
        raise Unavailable(problem)
    cubin = compile_(source, arch)
    disk.write_file(name_of(source, arch), sealed(cubin))
    yield cubin


def compile_(source, arch):
    """The cubin of that source, compiled now. Raises Unavailable with the compiler's errors."""
    try:
        return compiler().compile(source, arch)
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"a kernel does not compile: {error}") from error


def origin(sources, arch):
    """Where the kernels of those sources come from, in words."""
    found = compiler()
    compiled = "missing" if found is None else f"compiled by {found.version} when they are needed"
    where = Counter(next((place for _, place in _kept(source, arch)), compiled) for source in sources)
    return ", ".join(f"{count} {place}" for place, count in where.items())


def name_of(source, arch):
    """The file that keeps the cubin of that source: another one for other headers."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in (arch, STANDARD, source, _headers()):
        digest.update(part.encode())
        digest.update(b"\0")
    return f"{arch}_{digest.hexdigest()}.cubin"


def sealed(cubin):
    """The contents of that file."""
    return cubin + hashlib.blake2b(cubin, digest_size=DIGEST_BYTES).digest()


def is_sealed(contents):
    """Whether these are the contents of such a file, undamaged. contents: bytes, or None where there is no file"""
    return contents is not None and sealed(contents[:-DIGEST_BYTES]) == contents


def precompiled():
    """{architecture: kernels in the package, of sources old and new}"""
    return dict(sorted(Counter(path.name.rpartition("_")[0] for path in PRECOMPILED.glob("*.cubin")).items()))


def read_precompiled(name):
    """The contents of a file of the package, or None."""
    try:
        return (PRECOMPILED / name).read_bytes()
    except OSError:
        return None


def write_precompiled(name, contents):
    PRECOMPILED.mkdir(exist_ok=True)
    (PRECOMPILED / name).write_bytes(contents)


@cache
def _headers():
    return "\0".join(path.read_text() for path in sorted(SOURCES.glob("*.cuh")))


def _kept(source, arch):
    """Yields (cubin, where it is kept)."""
    name = name_of(source, arch)
    for read, place in ((read_precompiled, "precompiled in the package"), (disk.read_file, "kept in EQUICONV_CACHE")):
        contents = read(name)
        if is_sealed(contents):
            yield contents[:-DIGEST_BYTES], place
