"""precompile(): the fused kernels of a model's convolutions, compiled before they are needed; without a GPU, too."""
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

import torch
from torch.nn import Module

from .basis import cache
from .fused import Unsupported, compiler
from .fused.kernels import NUMBERS, SHARED_BYTES
from .fused.layer import kernels_of, unsupported_reason
from .nn.planner import planned_of

ARCHS = ("sm_80", "sm_90")
DTYPES = tuple(NUMBERS)


@dataclass
class Precompiled:
    """What precompile() did.

    compiled  kernels that were compiled, {architecture: number}
    kept      kernels that were there already, likewise
    left_out  {(name of a convolution, torch.dtype, architecture): why it has no fused kernels}
    failed    errors of the compiler
    """
    compiled: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)
    left_out: dict = field(default_factory=dict)
    failed: list = field(default_factory=list)


def precompile(model, archs=ARCHS, dtypes=DTYPES, *, in_package=False, tick=lambda done, total: None):
    """Compiles the kernels with which method "fused" computes the convolutions of a model, for inputs of every size.

    model       torch.nn.Module with convolutions of equiconv.nn (see accelerate) or models.HarmonicConv, on any
                device, "meta" too
    archs       of the GPUs that it will run on, such as "sm_90"
    dtypes      that it will be computed in: torch.bfloat16, torch.float16, torch.float32 (for TF32)
    in_package  whether they are kept in the package itself, in the place of those of another call, rather than in
                EQUICONV_CACHE. A wheel that is made then contains them
    tick        called with the numbers of kernels done and of all

    Returns Precompiled. Takes seconds to a minute for each kernel and core. Raises TypeError if model is no module,
    ValueError for what kernels cannot be compiled for, or where they cannot be kept.
    """
    archs, dtypes = ((given,) if isinstance(given, one) else tuple(given)
                     for given, one in ((archs, str), (dtypes, torch.dtype)))
    if not isinstance(model, Module):
        raise TypeError(f"precompile: model must be a torch.nn.Module, got {type(model).__name__}")
    for what, given, known in (("archs", archs, SHARED_BYTES), ("dtypes", dtypes, NUMBERS)):
        if unknown := [repr(one) for one in given if one not in known]:
            names = ", ".join(str(one).removeprefix("torch.") for one in known)
            raise ValueError(f"precompile: {what} must be of {names}, got {', '.join(unknown)}")
    if not in_package and not cache.CACHE_FOLDER:
        raise ValueError("precompile: kernels are kept in EQUICONV_CACHE, which is not set, or with in_package "
                         "(--package)")
    if problem := next(filter(None, map(compiler.compiler_problem, archs)), None):
        raise ValueError(f"precompile: {problem}")
    report, wanted = Precompiled(), {}
    for arch in archs:
        for source in _sources(model, arch, dtypes, report.left_out):
            wanted[compiler.name_of(source, arch)] = source, arch
    read, write = ((compiler.read_precompiled, compiler.write_precompiled) if in_package else
                   (cache.read_file, cache.write_file))
    if in_package:
        for path in compiler.PRECOMPILED.glob("*.cubin"):
            if path.name not in wanted:
                path.unlink()
    missing = {name: job for name, job in wanted.items() if not compiler.is_sealed(read(name))}
    for name, (_, arch) in wanted.items():
        counts = report.compiled if name in missing else report.kept
        counts[arch] = counts.get(arch, 0) + 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(compiler.compile_, *job): name for name, job in missing.items()}
        for done, job in enumerate(as_completed(jobs), 1):
            try:
                write(jobs[job], compiler.sealed(job.result()))
                if not compiler.is_sealed(read(jobs[job])):
                    raise compiler.Unavailable(f"{jobs[job]} could not be kept: is the folder writable?")
            except compiler.Unavailable as error:
                report.failed.append(str(error))
                report.compiled[missing[jobs[job]][1]] -= 1
            tick(done, len(jobs))
    return report


def _sources(model, arch, dtypes, left_out):
    """The C++ of all kernels of a model; those that cannot be go into `left_out`."""
    found = {}
    for name, module in model.named_modules():
        if (planned := planned_of(module)) is not None:
            for dtype in dtypes:
                geometry = planned.nominal_geometry
                reason = unsupported_reason(geometry, dtype)
                if reason is None:
                    try:
                        kernels = kernels_of(planned.plan, geometry.kernel, dtype, geometry.stride[0],
                                             SHARED_BYTES[arch])
                        found.update(dict.fromkeys(kernels.sources))
                        continue
                    except Unsupported as problem:
                        reason = str(problem)
                left_out[name, dtype, arch] = reason
    return list(found)
