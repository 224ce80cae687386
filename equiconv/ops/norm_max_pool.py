from ..formats import dense, like
from ..reference import norm_max_pool as reference
from ..reference.field_pool import ELEMENT, FIELD
from .on_fields import check_fields, check_table, define_with_linear_gradient, pick
from .window_pool import check_geometry, check_windows, out_size


def empty_output(x, window, stride, padding, dilation, ceil_mode):
    """An empty tensor like the output, in x's memory format."""
    size = out_size(x.shape[2:], window, padding, dilation, (), stride, (), ceil_mode)
    return like(x.new_empty([*x.shape[:2], *size]), x)


def _fake(x, fields, elements, *geometry):
    return empty_output(x, *geometry)


_op = define_with_linear_gradient(
    "norm_max_pool", ("Tensor fields", "Tensor elements"),
    ("int[] window", "int[] stride", "int[] padding", "int[] dilation", "bool ceil_mode"), _fake,
    reference.norm_max_pool)


def norm_max_pool(x, fields, elements, *, window, stride, padding, dilation, ceil_mode=False, backend=None):
    """Each field in a window as it is at the pixel where its norm is the largest: the first of equal norms.

    The gradient goes to that pixel. Every size is a sequence of as many integers as there are spatial dimensions.

    x          [B, C, *spatial] with two or three spatial dimensions, float32, float64, float16 or bfloat16 (whose norms
               are computed in float32)
    fields     int64 [F, 3], on x's device: the first channel of each field in turn, its size, and a number that is not
               used: as ops.field_pool has them
    elements   int64 [C, 2]: of each channel its row of `fields`, and a number that is not used
    window     its size
    stride     of the windows
    padding    beyond the edges of x, where there is nothing; at most half of the window
    dilation   distance of the pixels in a window
    ceil_mode  whether a last window may reach beyond the padding

    Returns [B, C, *spatial'] in x's dtype and memory format. Raises ValueError for what does not fit together.
    """
    check_fields("norm_max_pool", x)
    for name, table, columns in (("fields", fields, FIELD), ("elements", elements, ELEMENT)):
        check_table("norm_max_pool", name, table, columns)
    geometry = [list(sizes) for sizes in (window, stride, padding, dilation)]
    check_geometry("norm_max_pool", x, geometry, (len(x.shape[2:]),))
    if any(2 * p > d * (w - 1) + 1 for w, p, d in zip(window, padding, dilation)):
        raise ValueError(f"norm_max_pool: padding must be at most half of the window, got {tuple(padding)} for "
                         f"{tuple(window)} with dilation {tuple(dilation)}")
    if min(out_size(x.shape[2:], window, padding, dilation, (), stride, (), ceil_mode)) < 1:
        raise ValueError(f"norm_max_pool: x must be at least as large as the windows, got {tuple(x.shape)}")
    check_windows("norm_max_pool", x.shape[2:], window, stride, padding, dilation, ceil_mode)
    chosen = pick(x, backend)
    if chosen == "reference":
        return reference.norm_max_pool(x, fields, elements, *geometry, ceil_mode)
    return _op[chosen](dense(x), fields.contiguous(), elements, *geometry, ceil_mode)
