"""Layers that move a window over their input: where it stops short of the border, and what would mend that."""
import inspect


def stages(layer, dimensions):
    """The windows that a layer moves over its input, one after the other: each [(kernel, stride, padding) per axis]."""
    if not dimensions or isinstance(layer.padding, str):
        return []
    dilation = per_axis(getattr(layer, "dilation", 1), dimensions)
    kernel = [d * (k - 1) + 1 for k, d in zip(per_axis(layer.kernel_size, dimensions), dilation)]
    stride, padding = (per_axis(value, dimensions) for value in (layer.stride, layer.padding))
    blur_padding = getattr(layer, "_pad", None)
    if blur_padding is None:
        return [list(zip(kernel, stride, padding))]
    blur = list(layer.filter.shape[2:])  # an antialiased max pool: the maximum at every pixel, then a strided blur
    return [list(zip(kernel, [1] * dimensions, padding)),
            list(zip(blur, stride, per_axis(blur_padding, dimensions)))]


def row_left_over(layer, sizes):
    """(kernel, stride, padding, size) of the first window that leaves a row of the input over; or None.

    Its sampled points do not lie symmetrically about the centre of the input then.
    """
    sizes = list(sizes)
    for stage in stages(layer, len(sizes)):
        for axis, (kernel, stride, padding) in enumerate(stage):
            room = sizes[axis] + 2 * padding - kernel
            if room % stride:
                return kernel, stride, padding, sizes[axis]
            sizes[axis] = room // stride + 1
    return None


def fitting_kernels(layer, window):
    """The next smaller and larger kernel sizes that leave no row over with the same stride and padding, as a list.

    Empty where the layer's kernel is not simply its constructor's kernel_size.
    """
    kernel, stride, padding, size = window
    if not takes_kernel_size(layer):
        return []
    room = size + 2 * padding - kernel
    smaller, larger = kernel - (-room) % stride, kernel + room % stride
    return [k for k in (smaller, larger) if k >= max(2, stride) or k == 1 == stride]


def takes_kernel_size(layer):
    """Whether the constructor's kernel_size alone is the size of the layer's window."""
    dilation = getattr(layer, "dilation", 1)
    plain = dilation == 1 or (isinstance(dilation, (tuple, list)) and set(dilation) == {1})
    return plain and not hasattr(layer, "_pad") and "kernel_size" in inspect.signature(type(layer)).parameters


def per_axis(value, dimensions):
    """A value given for all axes, or for each, as a list."""
    return list(value) if isinstance(value, (tuple, list)) else [value] * dimensions
