"""norm_max_pool by torch's own pooling of the norms, and its gradient by their derivatives."""
import torch

from ..formats import compute_dtype, like
from .window_pool import max_pool


def norm_max_pool(x, fields, elements, window, stride, padding, dilation, ceil_mode):
    of_field, wide = elements[:, 0], x.detach().to(compute_dtype(x.dtype))  # rounded norms would be equal too often
    squares = wide.new_zeros(len(x), len(fields), *x.shape[2:]).index_add(1, of_field, wide.square())
    pixel = max_pool(squares.sqrt(), window, stride, padding, dilation, ceil_mode, return_indices=True)[1]
    y = x.flatten(2).gather(2, pixel.flatten(2).index_select(1, of_field))
    return like(y.unflatten(2, pixel.shape[2:]), x)


def norm_max_pool_bwd(grad, x, *arguments):
    return like(torch.func.vjp(lambda x: norm_max_pool(x, *arguments), x)[1](grad)[0], x)
