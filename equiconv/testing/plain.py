"""Modules of torch on the tensors of fields: which of them a field type forbids, and what to take instead."""
from torch import nn

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
POINTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
             nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softsign)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
CONVOLUTIONS = (nn.modules.conv._ConvNd,)
KEEP_THE_TYPE = (*NORMS, *POINTWISE, *MAX_POOLS, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
                 nn.Dropout, nn.Identity)


def misuse(layer, shape, type):
    """What is wrong with a module of torch for a tensor of that shape [B, C, ...] and type, and a cure; or None."""
    trivial = all(r.is_trivial() for r in type.representations)
    pointwise = all("pointwise" in r.supported_nonlinearities for r in type.representations)
    if isinstance(layer, NORMS) and not trivial:
        return ("normalises each channel by itself, but the group mixes the channels of a field: take InnerBatchNorm "
                "for fields that the group permutes (regular, quotient), IIDBatchNorm or NormBatchNorm for others")
    if isinstance(layer, POINTWISE) and not pointwise:
        return (f"acts on single channels, but the group does not permute those of {_first(type, 'pointwise')}: take "
                "NormNonLinearity, GatedNonLinearity1 or FourierPointwise, or regular fields")
    if isinstance(layer, MAX_POOLS) and not pointwise:
        return (f"compares single channels, but the group does not permute those of {_first(type, 'pointwise')}: take "
                "NormMaxPool or PointwiseAvgPoolAntialiased")
    if isinstance(layer, CONVOLUTIONS) and not (trivial and max(layer.kernel_size) == 1):
        return f"has filters that nothing constrains: take R{len(layer.kernel_size)}Conv"
    if isinstance(layer, nn.Linear):
        if shape[-1] != type.size:
            return "has a weight for each pixel: pool over space, or take a convolution of that kernel size"
        if not trivial:
            return "mixes the channels of fields: put GroupPooling, NormPool or equiconv.nn.Linear before it"
    return None


def _first(type, nonlinearity):
    return next(r.name for r in type.representations if nonlinearity not in r.supported_nonlinearities)
