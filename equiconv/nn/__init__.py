"""Every public name of escnn.nn, with accelerated modules in the place of escnn's where there is one."""
import escnn.nn as _escnn_nn

from . import init
from .batchnorm import GNormBatchNorm, IIDBatchNorm1d, IIDBatchNorm2d, IIDBatchNorm3d, InnerBatchNorm
from .containers import BranchingModule, MergeModule, MultipleModule, ReshuffleModule, SequentialModule
from .conv import R2Conv, R2ConvTransposed, R3Conv, R3ConvTransposed, R3IcoConv, R3IcoConvTransposed
from .disentangle import DisentangleModule
from .dropout import FieldDropout, PointwiseDropout
from .fourier import FourierELU, FourierPointwise, QuotientFourierELU, QuotientFourierPointwise
from .harmonics import HarmonicPolynomialR3
from .invariants import GroupPooling, InducedNormPool, NormPool
from .linear import Linear
from .masking import MaskModule
from .nonlinearities import (
    ConcatenatedNonLinearity,
    GatedNonLinearity1,
    GatedNonLinearity2,
    GatedNonLinearityUniform,
    InducedGatedNonLinearity1,
    InducedNormNonLinearity,
    NormNonLinearity,
    PointwiseNonLinearity,
    VectorFieldNonLinearity,
)
from .norm_batchnorm import InducedNormBatchNorm, NormBatchNorm
from .pooling import (
    NormMaxPool,
    PointwiseAdaptiveAvgPool,
    PointwiseAdaptiveAvgPool2D,
    PointwiseAdaptiveAvgPool3D,
    PointwiseAdaptiveMaxPool,
    PointwiseAdaptiveMaxPool2D,
    PointwiseAdaptiveMaxPool3D,
    PointwiseAvgPool,
    PointwiseAvgPool2D,
    PointwiseAvgPool3D,
    PointwiseAvgPoolAntialiased,
    PointwiseAvgPoolAntialiased2D,
    PointwiseAvgPoolAntialiased3D,
    PointwiseMaxPool,
    PointwiseMaxPool2D,
    PointwiseMaxPool3D,
    PointwiseMaxPoolAntialiased,
    PointwiseMaxPoolAntialiased2D,
    PointwiseMaxPoolAntialiased3D,
)
from .tensor_product import TensorProductModule

#: {class of escnn.nn: its accelerated subclass}
ACCELERATED = {getattr(_escnn_nn, name): cls for name, cls in list(globals().items())
               if isinstance(cls, type) and issubclass(cls, _escnn_nn.EquivariantModule)}

globals().update({name: getattr(_escnn_nn, name) for name in dir(_escnn_nn)
                  if not name.startswith("_") and name not in globals()})
__all__ = list(_escnn_nn.__all__)
