"""What the build left: only where the source tree and its build folder are at hand."""
import re
import subprocess
from pathlib import Path

import pytest

from equiconv import backends

ROOT = Path(__file__).parent.parent
OBJECTS = sorted(ROOT.glob("build/native/cpython-*-linux-gnu/_c*/*"))


def test_kernel_objects_have_no_weak_symbols():
    kernels = [o for o in OBJECTS if re.search(r"\.(portable|avx2|avx512)\.o$", o.name)]
    if not kernels:
        pytest.skip("no build folder")
    for o in kernels:
        symbols = subprocess.run(["nm", "-C", "--defined-only", o], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"^\S+ [WVu] .*$", symbols, re.M), o


def test_no_spills():
    logs = [o for o in OBJECTS if o.name.endswith(".o.log")]
    if not logs:
        pytest.skip("no nvcc log")
    for log in logs:
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.read_text())
        assert spills and set(spills) == {("0", "0")}, log


def test_cubins():
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not backends.HAS_NATIVE["cuda"] or not tool.exists():
        pytest.skip("no _cuda or no cuobjdump")
    from equiconv import _host
    listed = subprocess.run([tool, "--list-elf", "--list-ptx", backends.HERE / "_cuda.so"],
                            capture_output=True, text=True).stdout
    archs = _host.cuda_archs.split(";")
    assert set(re.findall(r"sm_(\d+)\.cubin", listed)) == set(archs)
    assert set(re.findall(r"sm_(\d+)\.ptx", listed)) == {archs[-1]}
