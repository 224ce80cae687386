from ..formats import compute_dtype, dense, like
from ..reference import window_pool as reference
from .on_fields import check_fields, define_with_linear_gradient, pick

_GEOMETRY = ("int[] window", "int[] window_padding", "int[] dilation", "int[] kernel", "int[] stride",
             "int[] padding", "bool ceil_mode")


def out_size(size, window, window_padding, dilation, kernel, stride, padding, ceil_mode):
    """The spatial size of the output, as torch's pools and convolutions have it."""
    if window:
        steps = [1] * len(size) if kernel else stride
        size = [_count(*each, ceil_mode and not kernel) for each in zip(size, window, steps, window_padding, dilation)]
    if kernel:
        size = [_count(*each, 1, False) for each in zip(size, kernel, stride, padding)]
    return size


def _count(size, taps, stride, padding, dilation, ceil_mode):
    places = size + 2 * padding - dilation * (taps - 1) - 1
    if not ceil_mode:
        return places // stride + 1
    count = (places + stride - 1) // stride + 1
    return count - ((count - 1) * stride >= size + padding)  # the last window begins within x or its first padding


def _fake(x, filter, *geometry):
    return like(x.new_empty([*x.shape[:2], *out_size(x.shape[2:], *geometry)]), x)


_op = define_with_linear_gradient("window_pool", ("Tensor? filter",), _GEOMETRY, _fake, reference.window_pool)


def check_geometry(op, x, geometry, lengths):
    """Raises ValueError unless x has two or three spatial dimensions, and each of the sizes one of these lengths."""
    if x.dim() - 2 not in reference.MAX_POOL or any(len(sizes) not in lengths for sizes in geometry):
        raise ValueError(f"{op}: x must have two or three spatial dimensions, and every size a number for each, "
                         f"got {tuple(x.shape)} and {geometry}")


def check_windows(op, size, window, stride, padding, dilation, ceil_mode):
    """Raises ValueError where a window would see nothing of x: its taps step over an axis shorter than the dilation."""
    for n, *each in zip(size, window, stride, padding, dilation):
        w, s, p, d = each
        if n < d and any(all(not 0 <= o * s - p + j * d < n for j in range(w))
                         for o in range(_count(n, *each, ceil_mode))):
            raise ValueError(f"{op}: windows of {w} with dilation {d} and padding {p} step over an axis of size {n}")


def window_pool(x, filter, *, window=(), window_padding=(), dilation=(), kernel=(), stride=(), padding=(),
                ceil_mode=False, backend=None):
    """The largest number in a window around each pixel, channel by channel, and then their weighted sum with a stride.

    Or one of the two alone. The gradient goes to the first of equal maxima. Every size is a sequence of as many
    integers as there are spatial dimensions.

    x               [B, C, *spatial] with two or three spatial dimensions, float32, float64, float16 or bfloat16 (the
                    last two are computed in float32)
    filter          weights [taps, C] of the sum, in the dtype that is computed in, or None: no sum. A constant, to
                    which no gradient flows
    window          size of the window whose largest number is taken; (): none is. Its stride is 1 if there is a sum
    window_padding  beyond the edges of x, where there are no numbers
    dilation        distance of the numbers in the window
    kernel          size of the sum's window: its taps in row-major order are the rows of `filter`
    stride          of the last of the two
    padding         of the sum, by zeros
    ceil_mode       whether a last window may reach beyond the padding, without a sum

    Returns [B, C, *spatial'] in x's dtype and memory format. Raises ValueError for what does not fit together.
    """
    check_fields("window_pool", x)
    geometry = [list(sizes) for sizes in (window, window_padding, dilation, kernel, stride, padding)]
    check_geometry("window_pool", x, geometry, (0, x.dim() - 2))
    if (filter is None) == bool(kernel) or not (window or kernel):
        raise ValueError(f"window_pool: expected a window, a filter with its kernel, or both, got {window}, {kernel}")
    if filter is not None and (filter.dtype != compute_dtype(x.dtype) or filter.dim() != 2):
        raise ValueError(f"window_pool: filter must be [taps, C] of dtype {compute_dtype(x.dtype)}, got "
                         f"{tuple(filter.shape)} and {filter.dtype}")
    if min(out_size(x.shape[2:], *geometry, ceil_mode)) < 1:
        raise ValueError(f"window_pool: x must be at least as large as the windows, got {tuple(x.shape)}")
    check_windows("window_pool", x.shape[2:], window, [1] * len(window) if kernel else stride, window_padding, dilation,
                  ceil_mode and not kernel)
    chosen = pick(x, backend)
    if chosen == "reference":
        return reference.window_pool(x, filter, *geometry, ceil_mode)
    return _op[chosen](dense(x), None if filter is None else filter.contiguous(), *geometry, ceil_mode)
