"""Compiles the fused kernels when a layer first needs them: with NVRTC, or nvcc; keeps the result in EQUICONV_CACHE."""
import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from ..backends import HERE
from ..basis import cache as disk

SOURCES = HERE / "cuda_kernels"
STANDARD = "-std=c++17"


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
        self.version, listed = (subprocess.run([path, option], check=True, capture_output=True, text=True).stdout
                                for option in ("--version", "--list-gpu-code"))
        self.archs = set(listed.split())

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


def why_not(arch):
    """None if the kernels can be compiled for an architecture such as "sm_90", else the reason."""
    found = compiler()
    if found is None:
        return "there is neither NVRTC nor nvcc to compile it"
    return None if arch in found.archs else f"the compiler here does not know {arch}: {found.version}"


@cache
def compiler():
    """An Nvrtc or Nvcc, or None where neither is to be found."""
    for library in _libraries():
        try:
            return Nvrtc(library)
        except (OSError, AttributeError, RuntimeError):  # there is none of that name, or it is broken
            continue
    nvcc = shutil.which("nvcc")
    return Nvcc(nvcc) if nvcc else None


def _libraries():
    """Names of NVRTC: where torch's packages have it, and wherever the system looks."""
    if not torch.version.cuda:
        return []
    major = torch.version.cuda.split(".")[0]
    packages = Path(torch.__file__).parent.parent / "nvidia"
    return [*map(str, sorted(packages.glob(f"*/lib/libnvrtc.so.{major}"))), f"libnvrtc.so.{major}", "libnvrtc.so"]


def compiled(source, arch):
    """The cubin of that source: from the cache on disk, or compiled."""
    reason = why_not(arch)
    if reason is not None:
        raise RuntimeError(f"the fused convolution cannot run here: {reason}")
    found, digest = compiler(), hashlib.blake2b(digest_size=20)
    for part in (found.version, arch, source, *(path.read_text() for path in sorted(SOURCES.glob("*.cuh")))):
        digest.update(part.encode())
        digest.update(b"\0")
    name = f"steerable_conv_{digest.hexdigest()}.cubin"
    cubin = disk.read_file(name)
    if cubin is None:
        cubin = found.compile(source, arch)
        disk.write_file(name, cubin)
    return cubin
