"""Versions and machine, as reports and `equiconv info` state them."""
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from .. import backends
from ..fused import compiler
from ..machine import instruction_set, processor
from ..nn.planner import Planned

PACKAGES = ("torch", "escnn", "triton", "numpy", "equiconv")


def versions():
    """{name: version}; "not installed" where it is not."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def machine():
    """{fact: value} about processor, instruction set and GPUs."""
    return {"processor": processor(), "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
            "instruction set of the CPU kernels": instruction_set(), "GPU": _gpus()}


def optional_packages():
    """{package: what its presence or absence means}"""
    meanings = {
        "py3nj": ("installed", "not installed: escnn computes SO(3) Clebsch-Gordan coefficients numerically"),
        "sklearn": ("installed: beside it and without its cache, escnn 1.0.11 cannot build layers for D_N and "
                    "polyhedral groups; equiconv can", "not installed"),
        "lenstronomy": ("installed", "not installed: no experiment lensing"),
        "nilearn": ("installed", "not installed: no experiment volumes-brain"),
    }
    return {name: meaning[find_spec(name) is None] for name, meaning in meanings.items()}


def build():
    """{fact: value} about the compilation of the native parts."""
    try:
        from .. import _host
    except ImportError as error:
        return {"native parts": f"not built ({error})"}
    return {"compiler": _host.compiler, "CUDA architectures": _host.cuda_archs.replace(";", ", ") or "none",
            "torch built for CUDA": torch.version.cuda or "none"}


def convolutions():
    """{fact: value} about the choice of a convolution's method."""
    folder, found = backends.CACHE_FOLDER, compiler.compiler()
    precompiled = ", ".join(f"{count} for {arch}" for arch, count in compiler.precompiled().items())
    return {"default method": Planned._method,
            "its costs": f"measured once, kept in {folder}" if folder else "built in (EQUICONV_CACHE keeps others)",
            "compiler of fused kernels": found.version if found else "none: neither NVRTC nor nvcc",
            "precompiled fused kernels": precompiled or "none",
            "compiled fused kernels": f"kept in {folder}" if folder else "not kept (EQUICONV_CACHE keeps them)"}


def ops():
    """Names of the library's ops that compute something forward, sorted."""
    qualnames = torch._C._dispatch_get_all_op_names()
    found = {q.removeprefix("equiconv::").partition(".")[0] for q in qualnames if q.startswith("equiconv::")}
    return sorted(name for name in found if name != "limit_isa" and "_bwd" not in name)


def backends_of_ops():
    """{(device, backend): {op: None if that backend runs the op on that device on this machine, else the reason}}"""
    return {(device, backend): {op: why_not(op, backend, device) for op in ops()}
            for device in ("cpu", "cuda") for backend in ("native", "triton", "reference")}


def why_not(op, backend, device_type):
    """None if that backend runs the op on that type of device on this machine, else the reason."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
    reason = backends.why_not(backend, device_type)
    if reason or backend == "reference":
        return reason
    qualname = f"equiconv::{op}" + ("" if backend == "native" else f".{backend}")
    if not _declared(qualname):
        return "this op lacks it"
    implemented = torch._C._dispatch_has_kernel_for_dispatch_key(qualname, device_type.upper())
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(qualname, "CompositeExplicitAutograd")
    return None if implemented or composite else f"this op is not implemented for {device_type}"


def _declared(qualname):
    return qualname in torch._C._dispatch_get_all_op_names()


def _version(name):
    if name == "equiconv":
        import equiconv
        return getattr(equiconv, "__version__", "unknown")
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _gpus():
    if not torch.cuda.is_available():
        return "none"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)" for p in found)
