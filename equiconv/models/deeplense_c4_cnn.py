"""The C4-steerable CNN of the DeepLense project, for images of strong gravitational lenses."""
import torch

from .c8_steerable_cnn import check_sizes, mlp, pixels_left, steerable_features
from .registry import register


@register(citation="ML4SCI DeepLense, Equivariant_Neural_Networks_for_DeepLense_GEO (GSoC 2023), C8SteerableCNN.py: "
                   "AUC 0.9921, 0.9997 and 0.9997 on its data sets I, II and III",
          input_shape=(1, 128, 128))
def deeplense_c4_cnn(nn, *, order=4, widths=(24, 48, 48, 96, 96, 64), kernels=(7, 5, 5, 5, 5, 5),
                     paddings=(1, 2, 2, 2, 2, 1), hidden=64, flatten=True, image_size=128, in_channels=1, classes=3):
    """DeepLenseCNN: the layers of c8_steerable_cnn for C4, on larger images. The defaults are the published sizes.

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
    return DeepLenseCNN(nn, order, widths, kernels, paddings, hidden, flatten, image_size, in_channels, classes)


class DeepLenseCNN(torch.nn.Module):
    """The layers of SteerableCNN, then an MLP on all positions, or on their mean.

    forward: images [B, in_channels, image_size, image_size] -> logits [B, classes]
    in_type: field type of the images
    """

    def __init__(self, nn, order, widths, kernels, paddings, hidden, flatten, image_size, in_channels, classes):
        super().__init__()
        from escnn import gspaces

        check_sizes(widths, kernels, paddings, image_size, keeps_rows=not flatten)
        plane = gspaces.rot2dOnR2(order)
        self.image_size, self.flatten = image_size, flatten
        self.in_type = nn.FieldType(plane, in_channels * [plane.trivial_repr])
        self.features = steerable_features(nn, self.in_type, widths, kernels, paddings, image_size)
        positions = pixels_left(kernels, paddings, image_size, keeps_rows=False) ** 2 if flatten else 1
        self.head = mlp(widths[-1] * positions, hidden, classes)

    def forward(self, images):  # [B, in_channels, H, W] -> [B, classes]
        invariant = self.features(self.in_type(images)).tensor.to(images.dtype)  # escnn's group pooling: float32
        return self.head(invariant.flatten(1) if self.flatten else invariant.mean((2, 3)))
