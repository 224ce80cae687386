"""check_equivariance(): how equivariant is a module, group element by group element?"""
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from escnn import gspaces
from escnn.nn import EquivariantModule, FieldType, GeometricTensor

DEFAULT_SIZE = {0: 1, 2: 33, 3: 17}  # pixels, by the dimensions of the base space
MOST_ELEMENTS = 16  # taken by default
EXACT_TOLERANCE = 1e-4  # escnn samples its filters in float32
BATCH = 2


class EquivarianceWarning(UserWarning):
    """A layer cannot be equivariant at this input size."""


@dataclass
class EquivarianceResult:
    """errors     {group element: relative L2 error ||f(g x) - g f(x)|| / ||g f(x)||}
    exact      the elements that map the grid to itself; the errors of all others contain that of interpolation
    tolerance  what was asked for, or None
    warnings   what in the layers breaks the equivariance at this size, and how to mend it

    Prints as a table.
    """
    errors: dict
    exact: set
    tolerance: float = None
    warnings: list = field(default_factory=list)
    names: dict = field(default_factory=dict)

    @property
    def mean(self):
        return sum(self.errors.values()) / len(self.errors)

    @property
    def max(self):
        return max(self.errors.values())

    @property
    def max_exact(self):
        """Over the elements that need no interpolation; nan if there are none."""
        return max((e for g, e in self.errors.items() if g in self.exact), default=math.nan)

    @property
    def max_interpolated(self):
        """Over the elements that need interpolation; nan if there are none."""
        return max((e for g, e in self.errors.items() if g not in self.exact), default=math.nan)

    @property
    def passed(self):
        """Whether every error is within the tolerance; without one, whether the exact ones are within 1e-4."""
        if self.tolerance is not None:
            return self.max <= self.tolerance
        return not self.exact or self.max_exact <= EXACT_TOLERANCE

    def __str__(self):
        width = max(len(name) for name in self.names.values())
        lines = [f"{'element'.ljust(width)}  relative error"]
        for g, error in self.errors.items():
            lines.append(f"{self.names[g].ljust(width)}  {error:.2e}" + ("" if g in self.exact else "  interpolated"))
        lines += [f"{'mean'.ljust(width)}  {self.mean:.2e}", f"{'max'.ljust(width)}  {self.max:.2e}"]
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


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

    Returns EquivarianceResult; warns (EquivarianceWarning) about layers whose stride leaves a row over at this size.
    Raises ValueError if the arguments do not fit the module.
    """
    in_type = _in_type(module, in_type)
    space = in_type.gspace
    size = _size(module, input_size, space.dimensionality)
    elements = _elements(space, elements)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    generator = generator or torch.Generator().manual_seed(0)
    inputs = in_type(_smooth_field(in_type.size, size, space.dimensionality, generator))

    def shape(size):
        return [1, in_type.size, *[size] * space.dimensionality]

    def answer(fields):  # in the module's dtype and on its device; compared in float64 on the CPU
        tensor = fields.tensor.to(like.device, like.dtype)
        out = module(in_type(tensor) if isinstance(module, EquivariantModule) else tensor)
        return _on_cpu(out)

    with evaluation(module), torch.no_grad():
        problems = _misfits(module, lambda s: answer(in_type(inputs.tensor.new_zeros(shape(s)))), size,
                            any(not _is_exact(space, g) for g in elements))
        straight = answer(inputs)
        errors = {g: _error(answer(inputs.transform(g)), straight, g, _is_exact(space, g)) for g in elements}
    for problem in problems:
        warnings.warn(problem, EquivarianceWarning, stacklevel=2)
    return EquivarianceResult(errors, {g for g in elements if _is_exact(space, g)}, tolerance, problems,
                              {g: _name(space, g) for g in elements})


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


def _is_exact(space, g):
    """Whether g maps a square grid to itself: a signed permutation of the axes."""
    if space.dimensionality == 0:
        return True
    action = torch.as_tensor(space.basespace_action(g)).abs()
    return bool(((action < 1e-3) | (action > 1 - 1e-3)).all())  # as GeometricTensor.transform decides


def _name(space, g):
    if space.dimensionality not in (2, 3):
        return " ".join(str(g).split())
    action = np.asarray(space.basespace_action(g))
    turn = np.linalg.det(action) > 0
    if space.dimensionality == 3:
        rotation = action if turn else -action
        angle = _degrees(math.acos(np.clip((np.trace(rotation) - 1) / 2, -1, 1)))
        _, _, rows = np.linalg.svd(rotation - np.eye(3))
        about = ", ".join(f"{v + 0:g}" for v in rows[-1].round(2))
        return f"rotation by {angle:g} deg about ±({about})" + ("" if turn else " and inversion")
    angle = _degrees(math.atan2(action[1][0], action[0][0]))
    return f"rotation by {angle:g} deg" if turn else f"reflection in the axis at {angle / 2:g} deg"


def _degrees(angle):
    return round(math.degrees(angle) % 360, 2) % 360


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


def _misfits(module, run, size, off_grid):
    """Messages about the layers whose sampled points do not lie symmetrically about the centre of their input."""
    found, plain_strides = _bad_layers(module, run, size)
    problems = []
    if found:
        good = []
        for other in range(max(1, size - 4), size + 9):
            try:
                if not _bad_layers(module, run, other)[0]:
                    good.append(str(other))
            except (RuntimeError, ValueError, AssertionError):  # the network does not take that size
                continue
        mend = f"; input sizes {', '.join(good)} would do" if good else ""
        for name, layer, stage, at in found:
            kernel, stride, padding = stage
            problems.append(
                f"{name} ({layer}): kernel {kernel}, stride {stride}, padding {padding} on {at} pixels leaves a row "
                "over, which breaks the equivariance: make (size + 2*padding - kernel) % stride == 0 (odd kernels: odd "
                f"sizes){mend}")
    if plain_strides and off_grid:
        problems.append(f"{', '.join(plain_strides)}: subsampling without antialiasing; for rotations off the grid use "
                        "PointwiseAvgPoolAntialiased or PointwiseMaxPoolAntialiased")
    return problems


def _bad_layers(module, run, size):
    found, plain_strides, hooks = [], [], []

    def look(name, layer):
        def hook(_, inputs):
            x = inputs[0].tensor if isinstance(inputs[0], GeometricTensor) else inputs[0]
            sizes = list(x.shape[2:])
            stages = _stages(layer, len(sizes))
            for stage in stages:
                for axis, (kernel, stride, padding) in enumerate(stage):
                    if (sizes[axis] + 2 * padding - kernel) % stride and not any(f[0] == name for f in found):
                        found.append((name, type(layer).__name__, (kernel, stride, padding), sizes[axis]))
                    sizes[axis] = (sizes[axis] + 2 * padding - kernel) // stride + 1
            strided = any(stride > 1 for stage in stages for _, stride, _ in stage)
            if strided and "Antialiased" not in type(layer).__name__:
                plain_strides.append(f"{name} ({type(layer).__name__})")
        return hook

    for name, layer in module.named_modules():
        windowed = all(hasattr(layer, a) for a in ("kernel_size", "stride", "padding"))
        if windowed and not hasattr(layer, "output_padding"):  # which transposed convolutions have
            hooks.append(layer.register_forward_pre_hook(look(name or "the module", layer)))
    try:
        run(size)
    finally:
        for hook in hooks:
            hook.remove()
    return found, plain_strides


def _stages(layer, dimensions):
    """The windows that a layer moves over its input, one after the other: each [(kernel, stride, padding) per axis]."""
    def per_axis(value):
        return list(value) if isinstance(value, (tuple, list)) else [value] * dimensions
    if not dimensions or isinstance(layer.padding, str):
        return []
    dilation = per_axis(getattr(layer, "dilation", 1))
    kernel = [d * (k - 1) + 1 for k, d in zip(per_axis(layer.kernel_size), dilation)]
    stride, padding = per_axis(layer.stride), per_axis(layer.padding)
    blur_padding = getattr(layer, "_pad", None)
    if blur_padding is None:
        return [list(zip(kernel, stride, padding))]
    blur = list(layer.filter.shape[2:])  # an antialiased max pool: the maximum at every pixel, then a strided blur
    return [list(zip(kernel, [1] * dimensions, padding)), list(zip(blur, stride, per_axis(blur_padding)))]
