"""The C_N-steerable CNN that set the published results on rotated MNIST."""
import torch

from .registry import register

POOLED = (1, 3)  # the layers followed by max pooling


@register(citation="Weiler, Cesa: General E(2)-Equivariant Steerable CNNs, NeurIPS 2019; "
                   "e2cnn_experiments, models/e2sfcnn.py",
          input_shape=(1, 28, 28), group="C16")
def e2sfcnn(nn, *, order=16, widths=(24, 32, 36, 36, 64, 96), kernels=(9, 7, 7, 7, 7, 5), paddings=(0, 3, 3, 3, 3, 0),
            hidden=96, dropout=0.3, image_size=28, in_channels=1, classes=10):
    """E2SFCNN, a classifier invariant to rotations by 360/order degrees. The defaults are the published sizes.

    The bases of the kernels are escnn's defaults, which hold fewer angular frequencies than the published ones.

    nn           namespace of layers: escnn.nn or equiconv.nn
    order        of the rotation group
    widths       regular fields of the six convolutions (each has `order` channels)
    kernels      their kernel sizes, in pixels; odd
    paddings     their zero padding, in pixels
    hidden       units of the head's two hidden layers
    dropout      of the head
    image_size   height and width of the input, in pixels
    in_channels  scalar channels of the input
    classes      outputs

    Raises ValueError if the sizes do not fit: six layers, odd kernels, and at least one pixel left.
    """
    return E2SFCNN(nn, order, widths, kernels, paddings, hidden, dropout, image_size, in_channels, classes)


class E2SFCNN(torch.nn.Module):
    """Six blocks of R2Conv, InnerBatchNorm and ELU on regular fields; the last pools over the group; then an MLP.

    forward: images [B, in_channels, H, W] -> logits [B, classes]
    in_type: field type of the images
    """

    def __init__(self, nn, order, widths, kernels, paddings, hidden, dropout, image_size, in_channels, classes):
        super().__init__()
        from escnn import gspaces

        check_sizes(widths, kernels, paddings, image_size)
        plane = gspaces.rot2dOnR2(order)
        self.in_type = nn.FieldType(plane, in_channels * [plane.trivial_repr])
        layers, fields = [], self.in_type
        for i, (width, kernel, padding) in enumerate(zip(widths, kernels, paddings)):
            out = nn.FieldType(plane, width * [plane.regular_repr])
            layers += [nn.R2Conv(fields, out, kernel, padding=padding), nn.InnerBatchNorm(out)]
            if i == len(widths) - 1:
                layers.append(nn.GroupPooling(out))
                out = layers[-1].out_type
            if i in POOLED:
                layers.append(nn.PointwiseMaxPool2D(out, 2))
            layers.append(nn.ELU(out, inplace=True))
            fields = out
        layers.append(nn.PointwiseAdaptiveMaxPool2D(fields, 1))
        self.features = nn.SequentialModule(*layers)
        self.head = two_layer_head(widths[-1], hidden, dropout, classes)

    def forward(self, images):  # [B, in_channels, H, W] -> [B, classes]
        invariant = self.features(self.in_type(images)).tensor  # [B, widths[-1], 1, 1]
        return self.head(invariant.flatten(1).to(images.dtype))  # escnn's group pooling always returns float32


def two_layer_head(features, hidden, dropout, classes):
    """[B, features] -> [B, classes], through two hidden layers."""
    layers = []
    for units in (features, hidden):
        layers += [torch.nn.Dropout(dropout), torch.nn.Linear(units, hidden), torch.nn.BatchNorm1d(hidden),
                   torch.nn.ELU()]
    return torch.nn.Sequential(*layers, torch.nn.Dropout(dropout), torch.nn.Linear(hidden, classes))


def check_sizes(widths, kernels, paddings, size):
    """Raises ValueError if they are not of six layers, with odd kernels, that leave a pixel after their pooling."""
    if not len(widths) == len(kernels) == len(paddings) == 6:
        raise ValueError("six widths, kernels and paddings are needed, got "
                         f"{len(widths)}, {len(kernels)} and {len(paddings)}")
    if any(k % 2 == 0 for k in kernels):
        raise ValueError(f"kernel sizes must be odd, got {tuple(kernels)}")
    left = size
    for i, (kernel, padding) in enumerate(zip(kernels, paddings)):
        left = (left + 2 * padding - kernel + 1) // (2 if i in POOLED else 1)
        if left < 1:
            raise ValueError(f"image size {size} with kernels {tuple(kernels)} and paddings {tuple(paddings)} leaves "
                             f"no pixel after layer {i + 1}")
