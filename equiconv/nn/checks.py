"""Errors of the users of equiconv.nn: each names the argument, what was expected and what came."""
import functools
import inspect
import math

import escnn.nn
from escnn import gspaces

from ..ops.steerable_conv import PADDING_MODES
from .construction import built_on_cpu, construct_convolution, construct_linear

SPACES = {0: gspaces.GSpace0D, 2: gspaces.GSpace2D, 3: gspaces.GSpace3D}


def checked_init(base, dimensions):
    """The constructor of an escnn class with `dimensions` spatial dimensions, behind checks that escnn only asserts."""

    @functools.wraps(base.__init__)
    def __init__(self, *args, **kwargs):
        bound = inspect.signature(base.__init__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        check_constructor(base.__name__, dimensions, bound.arguments)
        try:
            with built_on_cpu(self):
                if dimensions:
                    construct_convolution(self, dimensions, bound.arguments)
                else:
                    construct_linear(self, bound.arguments)
                self._adopt()
        except ValueError as error:
            if "empty" not in str(error):
                raise
            raise ValueError(
                f"{base.__name__}: no equivariant kernel exists with these arguments: expected at least one basis "
                f"element between in_type {bound.arguments['in_type']} and out_type {bound.arguments['out_type']}, got "
                "none; allow more through kernel_size, frequencies_cutoff, rings, sigma or basis_filter") from None

    return __init__


def check_constructor(name, dimensions, arguments):
    in_type, out_type = arguments["in_type"], arguments["out_type"]
    for key in ("in_type", "out_type"):
        if not isinstance(arguments[key], escnn.nn.FieldType):
            raise TypeError(f"{name}: {key} must be a FieldType, got {shown(arguments[key])}")
        if not isinstance(arguments[key].gspace, SPACES[dimensions]):
            raise ValueError(f"{name}: {key} must live on a {SPACES[dimensions].__name__}, got {arguments[key].gspace}")
    if in_type.gspace != out_type.gspace:
        raise ValueError(f"{name}: in_type and out_type must have the same gspace, got {in_type.gspace} and "
                         f"{out_type.gspace}")
    for key in ("kernel_size", "dilation", "groups"):
        if key in arguments:
            _check_integer(name, key, arguments[key], minimum=1)
    for key, minimum in (("stride", 1), ("padding", 0), ("output_padding", 0)):
        if key in arguments:
            sequences = tuple if key == "padding" else (tuple, list)  # as escnn has it
            _check_integers(name, key, arguments[key], dimensions, minimum, sequences)
    if arguments.get("padding_mode", "zeros") not in PADDING_MODES:
        raise ValueError(f"{name}: padding_mode must be one of {PADDING_MODES}, got {arguments['padding_mode']!r}")
    if "rings" in arguments:
        _check_rings(name, dimensions, arguments)
    cutoff = arguments.get("frequencies_cutoff")
    named = dimensions == 3 and isinstance(cutoff, str)  # "default1" and others: escnn refuses unknown ones
    if not (cutoff is None or isinstance(cutoff, float) or callable(cutoff) or named):
        raise TypeError(f"{name}: frequencies_cutoff must be a float or a function of the radius, got {shown(cutoff)}")
    if isinstance(cutoff, float) and not math.isfinite(cutoff):
        raise ValueError(f"{name}: frequencies_cutoff must be finite, got {cutoff}")
    basis_filter = arguments.get("basis_filter")
    if basis_filter is not None and not callable(basis_filter):
        raise TypeError(f"{name}: basis_filter must be a function of the attributes of a basis element, got "
                        f"{shown(basis_filter)}")
    if arguments.get("groups", 1) > 1:
        for key in ("in_type", "out_type"):
            _check_groups(name, key, arguments[key], arguments["groups"])


def same_type(one, other):
    """Whether field types are equal. Mostly they are the same object; to compare two takes long, and breaks graphs."""
    return one is other or one == other


def check_type(module, input, expected=None):
    """Raises unless `input` is a GeometricTensor of the type `expected`, by default the module's `in_type`."""
    name, expected = type(module).__name__, module.in_type if expected is None else expected
    if not isinstance(input, escnn.nn.GeometricTensor):
        raise TypeError(f"{name}: input must be a GeometricTensor of type {expected}, got {shown(input)}; "
                        "wrap a tensor with in_type(tensor)")
    if not same_type(input.type, expected):
        raise ValueError(f"{name}: input must have type {expected}, got {input.type}")


def check_input(module, input):
    """Raises unless `input` is a GeometricTensor that the module can take."""
    check_type(module, input)
    name, x, weights = type(module).__name__, input.tensor, module.weights
    if x.device != weights.device:
        raise ValueError(f"{name}: input must be on {weights.device}, where the weights are, got {x.device}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: input must be floating point, got {x.dtype}")


def check_dtype(module, x, filter):
    """Raises unless input and filter have one dtype (outside autocast, which casts)."""
    if x.dtype != filter.dtype:
        raise ValueError(f"{type(module).__name__}: input must have dtype {filter.dtype}, that of the weights, got "
                         f"{x.dtype}")


def shown(value):
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _check_integer(name, key, value, minimum):
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: {key} must be an integer, got {shown(value)}")
    if value < minimum:
        raise ValueError(f"{name}: {key} must be at least {minimum}, got {value}")


def _check_integers(name, key, value, dimensions, minimum, sequences):
    if isinstance(value, (tuple, list)):
        if len(value) != dimensions or not isinstance(value, sequences):
            raise ValueError(f"{name}: {key} must be an integer or a tuple of {dimensions} integers, got "
                             f"{shown(value)}")
        for element in value:
            _check_integer(name, key, element, minimum)
    else:
        _check_integer(name, key, value, minimum)


def _check_rings(name, dimensions, arguments):
    rings, sigma, kernel_size = arguments["rings"], arguments["sigma"], arguments["kernel_size"]
    largest = arguments["dilation"] * (kernel_size - 1) / 2 * math.sqrt(dimensions)
    if rings is not None:
        _check_numbers(name, "rings", rings, f"from 0 to {largest:.4g}, the distance of the kernel's corner",
                       lambda radius: 0 <= radius <= largest)
    if sigma is not None:
        _check_numbers(name, "sigma", [sigma] if isinstance(sigma, float) else sigma, "finite and positive",
                       lambda width: 0 < width < math.inf)
    if sigma is not None and not isinstance(sigma, float):
        count = math.ceil(kernel_size / 2) if rings is None else len(rings)
        if len(sigma) != count:
            raise ValueError(f"{name}: sigma must be a float or have one for each of the {count} rings, got "
                             f"{shown(sigma)}")


def _check_numbers(name, key, values, expected, accepts):
    """Raises unless `values` is a list of numbers that `accepts`, which `expected` puts in words."""
    if not isinstance(values, (list, tuple)) or not values:
        raise (ValueError if isinstance(values, (list, tuple)) else TypeError)(
            f"{name}: {key} must be a list of numbers, got {shown(values)}")
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not accepts(number):
            raise ValueError(f"{name}: {key} must be {expected}, got {shown(values)}")


def _check_groups(name, key, field_type, groups):
    size = len(field_type) // groups
    if len(field_type) % groups or any(r != field_type.representations[i % size]
                                       for i, r in enumerate(field_type.representations)):
        raise ValueError(f"{name}: {key} must consist of groups={groups} equal groups of fields, got {field_type}")
