"""What gets installed, and what must never stand in the tree."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def distribution(monkeypatch):
    """What setup.py and pyproject.toml declare; nothing is built."""
    pytest.importorskip("setuptools")  # which brings distutils
    from distutils.core import run_setup
    monkeypatch.chdir(ROOT)
    return run_setup("setup.py", stop_after="config")


def test_packages(distribution):
    linked = {"triton_kernels": ROOT / "triton_kernels", "cuda_kernels": ROOT / "csrc/cuda/steerable_conv"}
    folders = dict(linked)
    folders |= {str(p.parent.relative_to(ROOT / "equiconv")): p.parent for p in (ROOT / "equiconv").rglob("*.py")}
    expected = {".".join(["equiconv", *Path(name).parts]) for name in folders}
    assert set(distribution.packages) == expected  # one without an __init__.py would be left out
    assert distribution.package_dir == {f"equiconv.{name}": str(f.relative_to(ROOT)) for name, f in linked.items()}
    assert distribution.package_data == {"equiconv.cuda_kernels": ["*.cuh"], "equiconv": ["precompiled/*.cubin"]}
    others = [p for name, f in folders.items() for p in f.iterdir()
              if p.is_file() and p.suffix not in (".py", ".so", *([".cuh"] if name == "cuda_kernels" else []))]
    assert not others, "only Python files, the native parts and what is compiled when it is needed are installed"


def test_kernels_from_the_source_tree():
    assert (ROOT / "equiconv" / "triton_kernels").samefile(ROOT / "triton_kernels")
    assert (ROOT / "equiconv" / "cuda_kernels").samefile(ROOT / "csrc/cuda/steerable_conv")


def test_console_script(distribution):
    assert distribution.entry_points == {"console_scripts": ["equiconv = equiconv.cli:main"]}


def test_dependencies_install_without_a_fortran_compiler(distribution):
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in distribution.install_requires}
    assert {"torch", "numpy", "lie_learn"} <= names
    # py3nj (through escnn) is Fortran source; scikit-learn (through mlxtend) breaks escnn's numerical Clebsch-Gordan
    assert not names & {"escnn", "py3nj", "mlxtend", "scikit-learn"}


def test_no_registry_and_no_path_of_a_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True, text=True).stdout
    forbidden = re.compile(rb"\b(?:pypi|pythonhosted|download\.pytorch)\.(?:org|io)\b|index-url|find-links"
                           rb"|(?<![\w.])/(?:home|root|work|Users)/\w")
    for name in filter(None, listed.split("\0")):
        if name != "tests/test_packaging.py" and (ROOT / name).is_file():
            assert not (found := forbidden.search((ROOT / name).read_bytes())), f"{name}: {found[0]!r}"


@pytest.mark.slow
def test_wheel_outside_the_source_tree(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "csrc", "triton_kernels", "equiconv", "build/native"):
        if (ROOT / name).is_dir():  # build/native, with its times: what is compiled already is not compiled again
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, source)
    left_over = source / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/equiconv/left_over.py"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    precompiled = source / "equiconv/precompiled/sm_90_some_kernel.cubin"
    precompiled.parent.mkdir(exist_ok=True)
    precompiled.touch()
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path,
                    source], check=True)
    wheel, = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
        names = z.namelist()
    assert {Path(name).parts[0] for name in names} == {"equiconv", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    assert {"equiconv/_cpu.so", "equiconv/cuda_kernels/forward.cuh",
            "equiconv/precompiled/sm_90_some_kernel.cubin"} <= set(names)
    assert not [name for name in names if "left_over" in name]
    code = "import equiconv, equiconv.triton_kernels as t, torch; print(equiconv.__file__, t.__file__); " \
           "print(torch.ops.equiconv.limit_isa(''))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(site)) == 2
