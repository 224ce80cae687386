"""Compiles every Triton kernel ahead of time, in every configuration: needs no GPU.

    python -m tests.triton_aot [--archs 80 90] [--dtypes fp32 fp64 ...] [--modules expand_filter ...] [--layers ...]
                               [--first]

Prints registers, spills and shared memory of each, and fails on any spill, and where a block needs more registers than
a multiprocessor has. A module of equiconv.triton_kernels names its kernels in ahead_of_time(), which yields (kernel,
{argument: type}, configuration); that of steerable_conv, of the structures of some layers of tests.cases. "i32:16" is
the type of an integer that 16 divides.
--first: of each kernel but those of expand_filter the first configuration alone.
"""
import argparse
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # interpreted kernels cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from equiconv import triton_kernels

REGISTERS = 1 << 16  # of a multiprocessor
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def modules():
    return sorted(m.name for m in pkgutil.iter_modules(triton_kernels.__path__))


@cache
def ahead_of_time(module, layers):
    """List of what the module's ahead_of_time() yields."""
    yields = getattr(import_module(f"equiconv.triton_kernels.{module}"), "ahead_of_time", tuple)
    return list(yields(structures(layers)) if module == "steerable_conv" else yields())


def structures(layers):
    """layout.two_pass.Structures of the layers of these names, and of their adjoints."""
    import equiconv.nn
    from equiconv.layout.two_pass import structure, two_pass_tables
    from tests.cases import CASES
    found = []
    for name in layers:
        layer = CASES[name].build(equiconv.nn)
        for adjoint in (False, True):
            plan = layer.plan.factorised(layer.kernel, adjoint)
            found.append(structure(two_pass_tables(plan, layer.kernel, 1, adjoint)[0]))
    return found


def variants(names, dtypes, layers, first=False):
    """(module, layers, place among what it yields) of all that is to be compiled."""
    seen = set()
    for module in names:
        for i, (kernel, types, _) in enumerate(ahead_of_time(module, layers)):
            used = {t[1:] for t in types.values() if is_pointer(t) and t[1:] not in ("i32", "i64")}
            is_left_out = first and module != "expand_filter" and kernel.__name__ in seen
            if used <= set(dtypes) and not is_left_out:
                seen.add(kernel.__name__)
                yield module, layers, i


def is_pointer(kind):
    return isinstance(kind, str) and kind.startswith("*")


def compile_variant(module, layers, i, arch):
    """(description, whether it spills, or has more registers in a block than there are)"""
    kernel, types, config = ahead_of_time(module, layers)[i]
    names = kernel.arg_names
    constants = {name: config[name] for name in names if name in config}
    types = {name: types.get(name, "constexpr") for name in names}  # a tuple of them, of a tuple of numbers
    signature = {name: t if isinstance(t, tuple) else t.removesuffix(":16") for name, t in types.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names
               if is_pointer(types[name]) or types[name][-3:] == ":16"}
    options = {name: value for name, value in config.items() if name not in constants}
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder  # compiled here, not found
        compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
                                  target=GPUTarget("cuda", arch, 32), options=options)
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        used = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", used.stdout + used.stderr).groups()
    pointers = " ".join(t for t in signature.values() if is_pointer(t) and t not in ("*i32", "*i64"))
    small = {name: value for name, value in config.items() if name not in ("FOLDED", "SUMS", "ROWS")}
    text = (f"sm_{arch} {kernel.__name__} ({pointers}) {small}: {registers} registers, {stack} + {local} bytes "
            f"spilled, {compiled.metadata.shared} bytes shared")
    return text, stack != "0" or local != "0" or int(registers) * 32 * compiled.metadata.num_warps > REGISTERS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "fp64", "bf16", "fp16"])
    parser.add_argument("--modules", nargs="+", choices=modules(), default=modules())
    parser.add_argument("--layers", nargs="+", default=["c8_16_k3"])
    parser.add_argument("--first", action="store_true")
    arguments = parser.parse_args()
    found = variants(arguments.modules, arguments.dtypes, tuple(arguments.layers), arguments.first)
    jobs = [(*variant, arch) for variant in found for arch in arguments.archs]
    failures = 0
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for text, fails in pool.map(compile_variant, *zip(*jobs)):
            print(text, "FAILS" if fails else "", flush=True)
            failures += fails
    print(f"{len(jobs)} compiled, {failures} fail")
    return failures > 0 or not jobs


if __name__ == "__main__":
    sys.exit(main())
