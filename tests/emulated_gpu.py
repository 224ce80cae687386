"""A GPU that runs the fused kernels' own source on the CPU: see tests/emulation."""
import ctypes
import re
import subprocess
from functools import cache
from hashlib import blake2b
from pathlib import Path
from weakref import WeakKeyDictionary

from equiconv.fused import launch, layer

ROOT = Path(__file__).parent.parent
KERNEL = re.compile(r"(equiconv_\w+)\(const (\w+) p\)")


class EmulatedGpu:
    """In place of launch.Device.

    last_to_first, copies_land_early   see tests/emulation
    skipped_line, skipped_in           a barrier or wait that does nothing, in that file of csrc/cuda/steerable_conv
    launched                           the kernels in their order
    """
    processors, shared_bytes, arch, capability = 2, 227 * 1024, "sm_90", (9, 0)

    def __init__(self, folder, last_to_first=False, copies_land_early=False, skipped_line=0, skipped_in=""):
        self._folder, self.launched = folder, []
        self._orders, self._skipped = (last_to_first, copies_land_early), (skipped_line, skipped_in)

    def launch(self, source, name, grid, threads, shared_bytes, params):
        self.launched.append(name)
        run = getattr(build(self._folder, source), f"run_{name}")
        run.restype = ctypes.c_bool
        line, file = self._skipped
        skipped = line if f'#include "{file}"' in source else 0
        left = run(ctypes.byref(params), *grid, threads, shared_bytes, *self._orders, skipped)
        assert skipped or not left, "an asynchronous copy was not waited for"


@cache
def build(folder, source):
    """The kernels of that source, compiled for the CPU."""
    kernels = "".join(f"EMULATED({name}, {params})\n" for name, params in KERNEL.findall(source))
    stem = Path(folder, blake2b(source.encode(), digest_size=8).hexdigest())
    text, target = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    text.write_text(source + kernels)
    subprocess.run(["g++", "-std=c++20", "-O1", "-DEQUICONV_EMULATED", "-w", "-fPIC", "-shared",
                    f"-I{ROOT}/csrc/cuda/steerable_conv", f"-I{ROOT}/tests/emulation", text, "-o", target], check=True)
    return ctypes.CDLL(target)


def emulate(monkeypatch, folder, **options):
    """Makes launch.device_of give an EmulatedGpu, which is returned."""
    gpu = EmulatedGpu(folder, **options)
    monkeypatch.setattr(launch, "device_of", lambda device: gpu)
    monkeypatch.setattr(layer, "_LAYERS", WeakKeyDictionary())  # that are made for another GPU
    return gpu
