"""Which implementation serves a call. The only reader of environment variables (once, at import)."""
import os
from pathlib import Path

HERE = Path(__file__).parent
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
CACHE_FOLDER = os.path.expanduser(os.environ.get("EQUICONV_CACHE", ""))  # of equiconv.basis; none by default
try:
    import triton  # noqa: F401
    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

HAS_NATIVE = {"cpu": (HERE / "_cpu.so").exists(), "cuda": (HERE / "_cuda.so").exists()}
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}


def why_not(backend, device_type):
    """None if `backend` can run on that type of device, else the reason. Traceable by torch.compile."""
    if backend == "reference":
        return None
    if backend == "native":
        return None if HAS_NATIVE.get(device_type) else f"the package was built without code for {device_type!r}"
    if backend == "triton":
        if not HAS_TRITON:
            return "triton is not installed"
        can_run = device_type == "cuda" or (device_type == "cpu" and TRITON_INTERPRET)
        return None if can_run else "it runs on CUDA tensors only (or TRITON_INTERPRET=1)"
    return "there is no such backend"


def defaults(available, native=tuple(PREFERENCE)):
    """{type of device: the backend that serves it}, of the backends that an op has; `native` on these devices."""
    def exists(backend, device_type):
        return backend == "reference" or (backend in available and (backend != "native" or device_type in native))
    return {device_type: next(b for b in order if exists(b, device_type) and why_not(b, device_type) is None)
            for device_type, order in PREFERENCE.items()}


def pick(defaults, available, device_type, backend=None):
    if backend is None:
        return defaults.get(device_type, "reference")
    reason = why_not(backend, device_type) if backend in available or backend == "reference" else "this op lacks it"
    if reason is not None:
        raise ValueError(f"backend {backend!r} on {device_type!r}: {reason}")
    return backend
