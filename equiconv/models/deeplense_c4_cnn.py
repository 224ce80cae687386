"""The C4-steerable CNN of the DeepLense project, for images of strong gravitational lenses."""
from .c8_steerable_cnn import SteerableCNN
from .registry import register


@register(citation="ML4SCI DeepLense, Equivariant_Neural_Networks_for_DeepLense_GEO (GSoC 2023), C8SteerableCNN.py: "
                   "AUC 0.9921, 0.9997 and 0.9997 on its data sets I, II and III",
          input_shape=(1, 128, 128), group="C4")
def deeplense_c4_cnn(nn, *, order=4, widths=(24, 48, 48, 96, 96, 64), kernels=(7, 5, 5, 5, 5, 5),
                     paddings=(1, 2, 2, 2, 2, 1), hidden=64, flatten=True, image_size=128, in_channels=1, classes=3):
    """SteerableCNN, as c8_steerable_cnn, for C4 and on larger images. The defaults are the published sizes.

    As published it is not invariant: its head reads every position, and pooling leaves a row over. With flatten=False
    the head reads the mean over space instead, and the image size must be one at which no row is left over, such as
    129: then the network is invariant.

    nn           namespace of layers: escnn.nn or equiconv.nn
    order        of the rotation group
    widths       regular fields of the six convolutions (each has `order` channels)
    kernels      their kernel sizes, in pixels; odd
    paddings     their zero padding, in pixels
    hidden       units of the head's hidden layer
    flatten      whether the head reads every position
    image_size   height and width of the input, in pixels
    in_channels  scalar channels of the input
    classes      outputs

    Raises ValueError if the sizes do not fit.
    """
    return SteerableCNN(nn, order, widths, kernels, paddings, hidden, image_size, in_channels, classes, flatten)
