"""Compiles every Triton kernel ahead of time, in every configuration: needs no GPU.

    python -m tests.triton_aot [--archs 80 90] [--dtypes fp32 fp64 ...] [--modules expand_filter ...]

Prints registers, spills and shared memory of each, and fails on any spill. A module of equiconv.triton_kernels names
its kernels in ahead_of_time(), which yields (kernel, {argument: type}, configuration). "i32:16" is the type of an
integer that 16 divides.
"""
import argparse
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # interpreted kernels cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from equiconv import triton_kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


MODULES = sorted(m.name for m in pkgutil.iter_modules(triton_kernels.__path__))


def variants(modules, dtypes):
    """(module, place among what it yields) of all that is to be compiled."""
    for module in modules:
        yielded = getattr(import_module(f"equiconv.triton_kernels.{module}"), "ahead_of_time", tuple)()
        for i, (_, types, _) in enumerate(yielded):
            used = {t[1:] for t in types.values() if t.startswith("*") and t[1:] not in ("i32", "i64")}
            if used <= set(dtypes):
                yield module, i


def compile_variant(module, i, arch):
    """(description, whether it spills)"""
    kernel, types, config = list(import_module(f"equiconv.triton_kernels.{module}").ahead_of_time())[i]
    names = kernel.arg_names
    constants = {name: config[name] for name in names if name in config}
    signature = {name: types.get(name, "constexpr").removesuffix(":16") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names
               if signature[name].startswith("*") or types.get(name, "").endswith(":16")}
    options = {name: value for name, value in config.items() if name not in constants}
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder  # compiled here, not found
        compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
                                  target=GPUTarget("cuda", arch, 32), options=options)
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        used = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", used.stdout + used.stderr).groups()
    pointers = " ".join(t for t in signature.values() if t.startswith("*") and t not in ("*i32", "*i64"))
    text = (f"sm_{arch} {kernel.__name__} ({pointers}) {config}: {registers} registers, {stack} + {local} bytes "
            f"spilled, {compiled.metadata.shared} bytes shared")
    return text, stack != "0" or local != "0"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "fp64", "bf16", "fp16"])
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES)
    arguments = parser.parse_args()
    jobs = [(*variant, arch) for variant in variants(arguments.modules, arguments.dtypes)
            for arch in arguments.archs]
    failures = 0
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for text, spills in pool.map(compile_variant, *zip(*jobs)):
            print(text, "SPILLS" if spills else "", flush=True)
            failures += spills
    print(f"{len(jobs)} compiled, {failures} with spills")
    return failures > 0 or not jobs


if __name__ == "__main__":
    sys.exit(main())
