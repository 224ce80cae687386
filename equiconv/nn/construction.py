"""Constructors: what escnn's do, with bases from equiconv.basis, and no tensor that nobody reads."""
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from escnn.group import Icosahedral
from escnn.nn import EquivariantModule
from escnn.nn.modules.conv import r2convolution, r3convolution
from escnn.nn.modules.conv.rd_convolution import get_grid_coords
from torch.nn import Parameter

from ..basis import STABILIZERS, has_native_basis, icosahedral_basis, steerable_basis
from . import init
from .basisexpansion import IrrepBlocksExpansion

# The options that escnn keeps as attributes of a convolution.
OPTIONS = ("kernel_size", "stride", "dilation", "padding", "padding_mode", "output_padding", "groups")


@contextmanager
def built_on_cpu(module):
    """Under another default device a module is built on the CPU all the same, and moved: on others one must wait for
    the values of its tables, and "meta" has none."""
    device = torch.get_default_device()
    if device.type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield
        module.to(device)


def construct_convolution(module, d, arguments):
    """Builds an R2Conv, R3Conv, R3IcoConv or transposed one.

    module     the bare object, of the class to build
    d          2 or 3
    arguments  of its constructor, checked, by name
    """
    in_type, out_type = arguments["in_type"], arguments["out_type"]
    EquivariantModule.__init__(module)
    module.d, module.space = d, in_type.gspace
    module.in_type, module.out_type = in_type, out_type
    for name in OPTIONS:
        if name in arguments:
            setattr(module, name, arguments[name])
    if "padding_mode" in arguments:
        padding = arguments["padding"]
        padding = padding if isinstance(padding, tuple) else (padding,) * d
        module._reversed_padding_repeated_twice = tuple(p for p in reversed(padding) for _ in range(2))
    if "samples" in arguments:
        _check_icosahedral(type(module).__name__, arguments)
        module._samples = arguments["samples"]
    conventions = r2convolution if d == 2 else r3convolution
    # the icosahedral orbits have no frequencies to cut off: escnn's bound lets all of them through
    cutoff = 5.0 if "samples" in arguments else arguments["frequencies_cutoff"]
    basis_filter, module._rings, module._sigma, module._maximum_frequency = conventions.compute_basis_params(
        arguments["kernel_size"], _finite(type(module).__name__, cutoff), arguments["rings"], arguments["sigma"],
        arguments["dilation"], arguments["basis_filter"])
    grid = get_grid_coords(d, arguments["kernel_size"], arguments["dilation"])
    _construct(module, arguments, module._build_kernel_basis, grid, basis_filter)


def construct_linear(module, arguments):
    """Builds a Linear: see construct_convolution."""
    if arguments["basisexpansion"] != "blocks":
        raise ValueError(f"Linear: basisexpansion must be 'blocks', got {arguments['basisexpansion']!r}")
    EquivariantModule.__init__(module)
    module.in_type, module.out_type = arguments["in_type"], arguments["out_type"]
    module.space = module.in_type.gspace
    native = has_native_basis(module.space)
    basis = partial(steerable_basis, module.space) if native else module.space.build_fiber_intertwiner_basis
    _construct(module, arguments, basis, np.zeros((1, 1)), None)


def _construct(module, arguments, build_kernel_basis, points, basis_filter):
    in_type, out_type, groups = module.in_type, module.out_type, arguments.get("groups", 1)
    if groups > 1:  # torch's filter is [out, in / groups], and [in, out / groups] if transposed
        if module.transposed:
            out_type = out_type.index_select(list(range(len(out_type) // groups)))
        else:
            in_type = in_type.index_select(list(range(len(in_type) // groups)))
    expansion = bias_expansion(module.out_type) if arguments["bias"] else None
    if expansion is None:
        module.bias = module.expanded_bias = None
    else:
        module.register_buffer("bias_expansion", expansion)
        module.bias = Parameter(expansion.new_zeros(expansion.shape[1]))
        module.register_buffer("expanded_bias", expansion.new_empty(out_type.size, device="meta"))
    module._basisexpansion = IrrepBlocksExpansion(in_type.representations, out_type.representations, build_kernel_basis,
                                                  points, basis_filter, arguments["recompute"])
    if module.basisexpansion.dimension() == 0:
        raise ValueError("the basis is empty")
    module.weights = Parameter(torch.zeros(module.basisexpansion.dimension()))
    channels = (in_type.size, out_type.size) if module.transposed else (out_type.size, in_type.size)
    filter = torch.empty(*channels, *module.kernel, device="meta")  # only its shape is looked at
    module.register_buffer(module.filter_name, filter)
    if arguments["initialize"]:
        init.generalized_he_init(module.weights.data, module.basisexpansion)


def _finite(name, cutoff):
    """The cutoff; one that is a function of the radius, behind a check of its values."""
    if not callable(cutoff):
        return cutoff

    def checked(radius):
        frequency = cutoff(radius)
        if not math.isfinite(frequency):
            raise ValueError(f"{name}: frequencies_cutoff must be finite at each radius, got {frequency} at {radius}")
        return frequency

    return checked


def _check_icosahedral(name, arguments):
    if not isinstance(arguments["in_type"].fibergroup, Icosahedral):
        raise ValueError(f"{name}: in_type must have the icosahedral group, got {arguments['in_type'].fibergroup}")
    if arguments["samples"] not in STABILIZERS:
        raise ValueError(f"{name}: samples must be one of {tuple(STABILIZERS)}, got {arguments['samples']!r}")


def bias_expansion(out_type):
    """[out_type.size, biases]: the columns of the changes of basis that belong to trivial irreps; None without any."""
    columns, start = [], 0
    known = {}
    for representation in out_type.representations:
        if representation.name not in known:
            known[representation.name] = _trivial_columns(representation)
        for column in known[representation.name]:
            columns.append((start, column))
        start += representation.size
    if not columns:
        return None
    expansion = torch.zeros(out_type.size, len(columns))
    for c, (start, column) in enumerate(columns):
        expansion[start:start + len(column), c] = column
    return expansion


def _trivial_columns(representation):
    columns, position = [], 0
    for id in representation.irreps:
        irrep = representation.group.irrep(*id)
        if irrep.is_trivial():
            columns.append(torch.tensor(representation.change_of_basis[:, position]))
        position += irrep.size
    return columns


class SteerableShells:
    """Mixin before an escnn convolution: its kernel basis comes from equiconv.basis, for the gspaces known there."""

    def _build_kernel_basis(self, in_repr, out_repr):
        if not has_native_basis(self.space):
            return super()._build_kernel_basis(in_repr, out_repr)
        return steerable_basis(self.space, in_repr, out_repr, self._rings, self._sigma, self._maximum_frequency)


class IcosahedralOrbits:
    """Mixin before R3IcoConv and R3IcoConvTransposed."""

    def _build_kernel_basis(self, in_repr, out_repr):
        return icosahedral_basis(in_repr, out_repr, self._rings, self._sigma, self._samples)
