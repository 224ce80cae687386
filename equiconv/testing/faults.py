"""What in a module breaks its equivariance, found in its answer to an empty input; and how to mend it."""
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from escnn.nn import EquivariantModule, FieldType, GeometricTensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import plain, windows

SIZES_BELOW, SIZES_ABOVE = 4, 8  # within which other input sizes are proposed
VISIBLE = 0.02  # of the root mean square of a layer's input: a constant background below that is not mentioned
SMALL_EVEN = 4  # the largest even kernel that is not worse off the grid than its odd neighbours
SHOWN = 3


class EquivarianceWarning(UserWarning):
    """Something in a module breaks its equivariance."""


@dataclass
class Call:
    """A layer at work: its input's shape, the value in the input's corners, and the field type if known."""
    name: str
    layer: torch.nn.Module
    shape: tuple
    corner: float
    rms: float
    type: FieldType | None

    def __str__(self):
        return f"{self.name} ({type(self.layer).__name__})"

    @property
    def sizes(self):
        return self.shape[2:]

    @property
    def has_window(self):  # a transposed convolution has output_padding
        return all(hasattr(self.layer, a) for a in ("kernel_size", "stride", "padding"))

    @property
    def left_over(self):
        if not self.has_window or hasattr(self.layer, "output_padding"):
            return None
        return windows.row_left_over(self.layer, self.sizes)


class Faults:
    """module            the one to examine
    in_type           field type of its input
    size              of the input
    answer_to_nothing function that runs the module on zeros of a size
    off_grid          whether elements that need interpolation matter
    """

    def __init__(self, module, in_type, size, answer_to_nothing, off_grid):
        self.module, self.in_type, self.size, self.off_grid = module, in_type, size, off_grid
        self.answer_to_nothing = answer_to_nothing
        self.calls = self._calls_at(size)
        self.rms = {}

    def _calls_at(self, size):
        with observed(self.module, self.in_type) as calls:
            self.answer_to_nothing(size)
        return list({call.name: call for call in reversed(calls)}.values())[::-1]  # the first call of each layer

    @contextmanager
    def scales(self):
        """Meanwhile notes how large the layers' inputs are."""
        with observed(self.module, self.in_type) as calls:
            yield
        self.rms = {call.name: call.rms for call in calls}

    def messages(self):
        """What breaks the equivariance, and how to mend it."""
        found = [*self._left_over(), *self._one_sided(), *self._misused()]
        if self.off_grid:
            found += [*self._subsampled(), *self._spread(), *self._even(), *self._bordered()]
        return found

    def _left_over(self):
        bad = [call for call in self.calls if call.left_over]
        good = self._fitting_sizes() if bad else []
        for call in bad:
            kernel, stride, padding, size = call.left_over
            cures = [f"input sizes {', '.join(good)} would do"] if good else []
            if kernels := windows.fitting_kernels(call.layer, call.left_over):
                cures.append(f"so would kernel_size={' or '.join(map(str, kernels))} here")
            yield (f"{call}: kernel {kernel}, stride {stride}, padding {padding} on {size} pixels leaves a row over, "
                   "which breaks the equivariance: make (size + 2*padding - kernel) % stride == 0 (stride 2: odd "
                   "kernels need odd sizes, even kernels even ones)" + "".join(f"; {cure}" for cure in cures))

    def _fitting_sizes(self):
        good = []
        for size in range(max(1, self.size - SIZES_BELOW), self.size + SIZES_ABOVE + 1):
            try:
                if not any(call.left_over for call in self._calls_at(size)):
                    good.append(str(size))
            except (RuntimeError, ValueError, AssertionError):  # the network does not take that size
                continue
        return good

    def _one_sided(self):
        for call in self.calls:
            extra = getattr(call.layer, "output_padding", 0)
            extra = max(extra) if isinstance(extra, (tuple, list)) else extra
            if extra:
                mend = ""
                if windows.takes_kernel_size(call.layer):
                    kernel = call.layer.kernel_size
                    kernel = kernel[0] if isinstance(kernel, tuple) else kernel
                    mend = f": kernel_size={kernel + extra} without it gives the same size"
                yield (f"{call}: output_padding={extra} adds to one side only, which breaks the equivariance{mend}")

    def _misused(self):
        together = {}
        for call in self.calls:
            if call.type is not None and (wrong := plain.misuse(call.layer, call.shape, call.type)):
                together.setdefault(wrong, []).append(call)
        for wrong, calls in together.items():
            yield f"{_some(calls)}: {wrong}"

    def _subsampled(self):
        bad = [call for call in self.calls if call.has_window and not hasattr(call.layer, "output_padding")
               and "Antialiased" not in type(call.layer).__name__
               and any(stride > 1 for stage in windows.stages(call.layer, len(call.sizes)) for _, stride, _ in stage)]
        if bad:
            yield (f"{_some(bad)}: subsampling without antialiasing; for rotations off the grid use "
                   "PointwiseAvgPoolAntialiased or PointwiseMaxPoolAntialiased, after a convolution with stride 1")

    def _spread(self):
        bad = [call for call in self.calls if hasattr(call.layer, "output_padding")
               and max(windows.per_axis(call.layer.stride, len(call.sizes)), default=1) > 1]
        if bad:
            yield (f"{_some(bad)}: a transposed convolution with a stride treats neighbouring pixels differently; for "
                   "rotations off the grid use R2Upsampling or R3Upsampling, then a convolution with stride 1")

    def _even(self):
        bad = [call for call in self.calls if hasattr(call.layer, "basisexpansion") and len(call.sizes) == 2
               and call.layer.kernel_size % 2 == 0 and call.layer.kernel_size > SMALL_EVEN]
        if bad:
            sizes = sorted({call.layer.kernel_size + change for call in bad for change in (-1, 1)})
            yield (f"{_some(bad)}: an even kernel has no pixel at its centre, and samples its inner rings too coarsely "
                   f"for rotations off the grid: take an odd one, kernel_size={' or '.join(map(str, sizes))}")

    def _bordered(self):
        bad = [call for call in self.calls if call.has_window and not hasattr(call.layer, "output_padding")
               and getattr(call.layer, "padding_mode", "zeros") == "zeros"
               and any(padding > 0 for stage in windows.stages(call.layer, len(call.sizes)) for *_, padding in stage)
               and call.corner > VISIBLE * self.rms.get(call.name, 0)]
        if bad:
            yield (f"{_some(bad)}: pads with zeros what is not zero where the image is empty; the square border that "
                   "appears does not turn with the image: for rotations off the grid put a MaskModule before it, leave "
                   "out the biases before it, or take padding_mode=\"replicate\"")


def _some(calls):
    names = [str(call) for call in calls]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@contextmanager
def observed(module, in_type):
    """A list of the Calls of all layers with a window and of torch's own modules, while the module is run."""
    calls, handles = [], []
    types = {}  # by storage: what the plain tensors that are in use contain

    def remember(tensor, type):
        storage = tensor.untyped_storage()
        types[storage.data_ptr()] = StorageWeakRef(storage), type

    def recall(tensor):
        alive, type = types.get(tensor.untyped_storage().data_ptr(), (None, None))
        return None if alive is None or alive.expired() else type

    def before(name, layer):
        def hook(_, inputs):
            if not inputs:
                return
            x = inputs[0]
            if layer is module and isinstance(x, torch.Tensor):
                remember(x, in_type)
            if isinstance(x, GeometricTensor):
                x = x.tensor
                remember(x, inputs[0].type)
            elif not isinstance(x, torch.Tensor):
                return
            type = None if isinstance(layer, EquivariantModule) or _is_part(name, modules) else recall(x)
            corners = x[(..., *[slice(None, None, max(1, n - 1)) for n in x.shape[2:]])]
            calls.append(Call(name, layer, tuple(x.shape), *(_rms(part) for part in (corners, x)), type))
        return hook

    def after(layer):
        def hook(_, inputs, out):
            if isinstance(out, GeometricTensor):
                remember(out.tensor, out.type)
            elif isinstance(layer, plain.KEEP_THE_TYPE) and (type := recall(inputs[0])) is not None:
                remember(out, type)
        return hook

    modules = dict(module.named_modules())
    for name, layer in modules.items():
        handles += [layer.register_forward_pre_hook(before(name or "the module", layer)),
                    layer.register_forward_hook(after(layer))]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _rms(x):
    return x.detach().to("cpu", torch.float64).square().mean().sqrt().item()


def origin(module, answer, inputs, g, tolerance, error):
    """[where the error of the exact element g first appears among the fields within the module]; [] if nowhere.

    answer     function that runs the module on a GeometricTensor
    tolerance  above which an error counts
    error      function (turned, straight, g, exact)
    """
    def fields_of(x):
        outputs, handles = [], []

        def note(name, layer):
            def hook(_, inputs, out):
                if isinstance(out, GeometricTensor):
                    outputs.append((f"{name} ({type(layer).__name__})", out.type(out.tensor.to("cpu", torch.float64))))
            return hook

        for name, layer in module.named_modules():
            handles.append(layer.register_forward_hook(note(name or "the module", layer)))
        try:
            answer(x)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    last = None
    for (name, straight), (_, turned) in zip(fields_of(inputs), fields_of(inputs.transform(g))):
        if straight.type.fibergroup != g.group:
            continue
        if error(turned, straight, g, True) > tolerance:
            return [f"the error first appears in the fields that {name} returns; those of {last} are equivariant"
                    ] if last else []
        last = name
    return [f"the error appears after {last}, whose fields are equivariant"] if last else []


def _is_part(name, modules):
    """Whether a layer belongs to an equivariant module of escnn's or ours, which knows what it does with it."""
    steps = name.split(".")
    parents = [modules.get(".".join(steps[:depth])) for depth in range(len(steps))]
    known = [type(parent).__module__ for parent in parents if isinstance(parent, EquivariantModule)]
    return any(module.startswith(("escnn.nn.", "equiconv.nn.")) for module in known)
