"""The machine of a measurement: its name, the software on it, and the speed that it can reach."""
import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from .precision import autocast, torch_switches

ROOT = Path(__file__).parent.parent


def machine_name(device):
    """Slug of the GPU's or the CPU's model: "nvidia-h200", "xeon-2-threads"."""
    if torch.device(device).type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return f"{cpu_slug(_cpu_model())}-{torch.get_num_threads()}-threads"


def cpu_slug(model):
    model = re.sub(r"\((R|TM|tm)\)|@.*|\b(CPU|Processor|Intel|\d+-Core)\b", " ", model)
    return _slug(model) or "cpu"


def environment():
    """The columns of a row that say where it was measured."""
    return {"commit": _commit(), "python": platform.python_version(), "torch": torch.__version__,
            "escnn": _version("escnn"), "equiconv": _version("equiconv"), "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Peaks:
    """What the machine reaches on easy work: a large matrix product; a large copy (bytes read plus bytes written)."""
    flops_per_s: float
    bytes_per_s: float

    def floor(self, flops, bytes):
        """Seconds that no implementation of that much work can beat."""
        return max(flops / self.flops_per_s, bytes / self.bytes_per_s)


def measure_peaks(device, precision):
    on_cuda = torch.device(device).type == "cuda"
    n, elements = (8192, 1 << 28) if on_cuda else (2048, 1 << 26)
    a, b = (torch.randn(n, n, device=device, dtype=precision.parameters) for _ in range(2))
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    with torch_switches(precision), autocast(precision, device):
        if precision.autocast is not None:
            a, b = a.to(precision.autocast), b.to(precision.autocast)
        product = _fastest(lambda: torch.mm(a, b), on_cuda)
    copy = _fastest(lambda: target.copy_(source), on_cuda)
    return Peaks(2 * n**3 / product, 2 * source.nbytes / copy)


def _fastest(function, on_cuda, repeats=5):
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cpu_model():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        module = __import__(package)  # on the path, not installed
        return getattr(module, "__version__", "unknown")


@cache
def _commit():
    """Of the working tree, with "-dirty" where files differ from it; "unknown" outside a repository."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True,
                              env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}).stdout.strip()
    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
