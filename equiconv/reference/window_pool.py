"""window_pool by torch's own functions, and its gradient by their derivatives."""
import torch
import torch.nn.functional as F

from ..formats import compute_dtype, like

MAX_POOL, CONVOLUTION = {2: F.max_pool2d, 3: F.max_pool3d}, {2: F.conv2d, 3: F.conv3d}


def max_pool(x, *arguments, **options):
    """torch's pooling of x [B, C, *spatial], with two or three spatial dimensions."""
    return MAX_POOL[x.dim() - 2](x, *arguments, **options)


def window_pool(x, filter, window, window_padding, dilation, kernel, stride, padding, ceil_mode):
    y, dimensions = x.to(compute_dtype(x.dtype)), x.dim() - 2
    if window:
        steps, ceil_mode = (stride, ceil_mode) if filter is None else (1, False)
        y = max_pool(y, window, steps, window_padding, dilation, ceil_mode)
    if filter is not None:
        weight = filter.mT.reshape(filter.shape[1], 1, *kernel)
        y = CONVOLUTION[dimensions](y, weight, None, stride, padding, groups=filter.shape[1])
    return like(y.to(x.dtype), x)


def window_pool_bwd(grad, x, *arguments):
    return like(torch.func.vjp(lambda x: window_pool(x, *arguments), x)[1](grad)[0], x)
