"""The convolutions of whole networks, for timing their construction."""
import math

from escnn import gspaces
from escnn.nn import FieldType


def wrn28_10(namespace, **arguments):
    """The convolutions of WRN-28-10 D8D4D1 (M. Weiler, G. Cesa, General E(2)-Equivariant Steerable CNNs, 2019).

    Four blocks of two convolutions for D8 (kernel 5), D4 and D1 (kernel 3), with as many weights as a plain WRN-28-10.

    namespace  escnn.nn or equiconv.nn
    arguments  of each R2Conv
    """
    layers = []

    def convolution(in_type, out_type, kernel_size, stride=1):
        layers.append(namespace.R2Conv(in_type, out_type, kernel_size, padding=kernel_size // 2, stride=stride,
                                       bias=False, frequencies_cutoff=3.0, **arguments))

    space = gspaces.flipRot2dOnR2(8)
    current = _regular(space, 16)
    convolution(FieldType(space, 3 * [space.trivial_repr]), current, 5)
    for order, planes, kernel_size, stride in ((8, 160, 5, 1), (4, 320, 3, 2), (1, 640, 3, 2)):
        space = gspaces.flipRot2dOnR2(order)
        # fields of a larger group are several regular fields of its subgroup
        current = FieldType(space, current.size // space.regular_repr.size * [space.regular_repr])
        wide = _regular(space, planes)
        for block in range(4):
            convolution(current, wide, kernel_size)
            convolution(wide, wide, kernel_size, stride if block == 0 else 1)
            if block == 0:
                convolution(current, wide, 1, stride)
            current = wide
    return layers


def _regular(space, planes):
    """So many regular fields that a convolution between two such types has the weights of one between `planes`."""
    order = space.fibergroup.order()
    return FieldType(space, int(planes * math.sqrt(order) / order) * [space.regular_repr])
