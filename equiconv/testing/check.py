"""check_equivariance(): inputs, transformed and not, through a module; and their answers compared."""
import math
import warnings
from contextlib import contextmanager

import torch
from escnn import gspaces
from escnn.nn import EquivariantModule, FieldType, GeometricTensor

from . import elements as elements_of
from .faults import EquivarianceWarning, Faults, origin
from .result import EXACT_TOLERANCE, EquivarianceResult

DEFAULT_SIZE = {0: 1, 2: 33, 3: 17}  # pixels, by the dimensions of the base space
MOST_ELEMENTS = 16  # taken by default
BATCH = 2


def check_equivariance(module, *, in_type=None, input_size=None, elements=None, tolerance=None, generator=None):
    """Compares a module's answer to a transformed input with the transformed answer, for each group element.

    The input is a random smooth field that vanishes towards the border. The module is put in evaluation mode meanwhile.
    Rotations by 90 degrees, and other elements that map the grid to itself, are exact: there the error of a module
    without fault is rounding. All others are interpolated, and compared within the circle inscribed in the grid only.

    module      an EquivariantModule; or a model from a plain tensor [B, C, H, W] to invariant outputs [B, ...]
    in_type     field type of the input; by default the module's own in_type, or else one scalar field of C8
    input_size  pixels along each axis; by default the module's image_size, or else 33 (17 in three dimensions)
    elements    of the group; by default at most 16 of its testing elements, without the identity
    tolerance   makes result.passed a statement about every element
    generator   torch.Generator of the input, on the CPU; by default one with seed 0

    Returns EquivarianceResult, whose figure() shows the errors. Warns (EquivarianceWarning) about what breaks the
    equivariance, and says how to mend it: strides that leave a row over, output_padding, and, for rotations off the
    grid, subsampling without antialiasing, even kernels, and zero padding around what is not zero; plain torch
    modules on the tensors of fields; and where the error first appears, if even an exact one is large.
    Raises ValueError if the arguments do not fit the module.
    """
    in_type = _in_type(module, in_type)
    space = in_type.gspace
    size = _size(module, input_size, space.dimensionality)
    elements = _elements(space, elements)
    exact = {g for g in elements if elements_of.is_exact(space, g)}
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    generator = generator or torch.Generator().manual_seed(0)
    inputs = in_type(_smooth_field(in_type.size, size, space.dimensionality, generator))

    def answer(fields):  # in the module's dtype and on its device; compared in float64 on the CPU
        tensor = fields.tensor.to(like.device, like.dtype)
        out = module(in_type(tensor) if isinstance(module, EquivariantModule) else tensor)
        return _on_cpu(out)

    def answer_to_nothing(size):
        answer(in_type(inputs.tensor.new_zeros(1, in_type.size, *[size] * space.dimensionality)))

    with evaluation(module), torch.no_grad():
        faults = Faults(module, in_type, size, answer_to_nothing, off_grid=len(exact) < len(elements))
        with faults.scales():
            straight = answer(inputs)
        errors = {g: _error(answer(inputs.transform(g)), straight, g, g in exact) for g in elements}
        problems = faults.messages()
        worst = max(exact, key=errors.get, default=None)
        if worst is not None and errors[worst] > EXACT_TOLERANCE:
            problems += origin(module, answer, inputs, worst, EXACT_TOLERANCE, _error)
    for problem in problems:
        warnings.warn(problem, EquivarianceWarning, stacklevel=2)
    return EquivarianceResult(errors, exact, tolerance, problems, {g: elements_of.name(space, g) for g in elements},
                              {g: elements_of.angle(space, g) for g in elements})


def _in_type(module, given):
    own = getattr(module, "in_type", None)
    own = own if isinstance(own, FieldType) else None
    if isinstance(module, EquivariantModule) and own is None:
        raise ValueError(f"check_equivariance: {type(module).__name__} takes several inputs; check its parts")
    if given is not None and own is not None and given != own:
        raise ValueError(f"check_equivariance: in_type is {given}, but the module's is {own}")
    if given is None and own is None:
        plane = gspaces.rot2dOnR2(8)
        return FieldType(plane, [plane.trivial_repr])
    return given or own


def _size(module, given, dimensions):
    size = given if given is not None else getattr(module, "image_size", DEFAULT_SIZE[dimensions])
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"check_equivariance: input_size must be a positive int (of a square or a cube), got {size!r}")
    return size


def _elements(space, given):
    if given is not None:
        given = list(given)
        if not given or any(g.group != space.fibergroup for g in given):
            raise ValueError(f"check_equivariance: elements must be elements of {space.fibergroup}, at least one")
        return given
    found = [g for g in space.testing_elements if g != space.fibergroup.identity]
    count = min(MOST_ELEMENTS, len(found))
    return [found[i * len(found) // count] for i in range(count)] or [space.fibergroup.identity]


def _smooth_field(channels, size, dimensions, generator):  # -> [BATCH, channels, size, ...] float64
    noise = torch.randn(BATCH, channels, *[size] * dimensions, generator=generator, dtype=torch.float64)
    if dimensions == 0:
        return noise
    position = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    blur = torch.exp(-0.5 * ((position[:, None] - position) / max(1.0, size / 16)) ** 2)  # [size, size]
    radius2 = torch.zeros([size] * dimensions, dtype=torch.float64)
    for axis in range(dimensions):
        noise = torch.movedim(torch.movedim(noise, 2 + axis, -1) @ blur, -1, 2 + axis)
        radius2 = radius2 + position.reshape([-1 if a == axis else 1 for a in range(dimensions)]) ** 2
    window = (1 - radius2 / max(1.0, 0.8 * size / 2) ** 2).clamp(min=0) ** 2
    return noise / noise.std() * window


def _error(turned, straight, g, exact):
    """Of the answer to the transformed input, against the transformed answer."""
    if isinstance(straight, GeometricTensor):
        expected, got = straight.transform(g).tensor, turned.tensor
        if expected.dim() > 2 and not exact:
            disc = _disc(expected.shape[2:])
            expected, got = expected * disc, got * disc
    else:
        expected, got = straight, turned
    norm = expected.norm().item()
    difference = (got - expected).norm().item()
    return difference / norm if norm > 0 else (math.inf if difference > 0 else 0.0)


def _disc(shape):
    axes = torch.meshgrid(*[torch.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")
    return (sum(a ** 2 for a in axes) <= ((min(shape) - 1) / 2) ** 2).double()


def _on_cpu(out):
    if isinstance(out, GeometricTensor):
        return out.type(out.tensor.to("cpu", torch.float64))
    if not isinstance(out, torch.Tensor):
        raise ValueError(f"check_equivariance: the module must return one tensor, got {type(out).__name__}")
    return out.to("cpu", torch.float64)


@contextmanager
def evaluation(module):
    """The module in eval mode, and each of its parts in its own mode again afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():  # from the outermost on, so that frozen parts keep their mode
            if m.training != mode:
                m.train(mode)


