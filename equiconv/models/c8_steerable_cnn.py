"""The C8-steerable CNN of escnn's example: regular fields, antialiased pooling, group pooling."""
import torch

from .registry import register

POOL_KERNEL = 5  # what escnn's antialiased pooling takes for POOL_SIGMA
POOL_SIGMA = 0.66
POOLED = (1, 3)  # the layers followed by pooling with stride 2


@register(citation="Cesa, Lang, Weiler: A Program to Build E(N)-Equivariant Steerable CNNs, ICLR 2022; "
                   "escnn, examples/model.ipynb: 97.96 % on MNIST-rot",
          input_shape=(1, 29, 29), group="C8")
def c8_steerable_cnn(nn, *, order=8, widths=(24, 48, 48, 96, 96, 64), kernels=(7, 5, 5, 5, 5, 5),
                     paddings=(1, 2, 2, 2, 2, 1), hidden=64, image_size=29, in_channels=1, classes=10):
    """SteerableCNN, a classifier invariant to rotations by 360/order degrees. The defaults are the published sizes.

    nn           namespace of layers: escnn.nn or equiconv.nn
    order        of the rotation group
    widths       regular fields of the six convolutions (each has `order` channels)
    kernels      their kernel sizes, in pixels; odd
    paddings     their zero padding, in pixels
    hidden       units of the head's hidden layer
    image_size   height and width of the input, in pixels
    in_channels  scalar channels of the input
    classes      outputs

    Raises ValueError if the sizes do not fit: six layers, at least one pixel left, and no pooling that leaves a row
    over (which would break the equivariance).
    """
    return SteerableCNN(nn, order, widths, kernels, paddings, hidden, image_size, in_channels, classes)


class SteerableCNN(torch.nn.Module):
    """Six blocks of R2Conv, InnerBatchNorm and ReLU on regular fields, then pooling over space and group, then an MLP.

    flatten: whether the MLP reads every position that pooling leaves, not their mean; rows may be left over then
    forward: images [B, in_channels, H, W] -> logits [B, classes]
    in_type: field type of the images
    """

    def __init__(self, nn, order, widths, kernels, paddings, hidden, image_size, in_channels, classes,
                 flatten=False):
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
        invariant = self.features(self.in_type(images)).tensor  # [B, widths[-1], h, w]; published: h = w = 1
        read = invariant.flatten(1) if self.flatten else invariant.mean((2, 3))
        return self.head(read.to(images.dtype))  # escnn's group pooling always returns float32


def steerable_features(nn, in_type, widths, kernels, paddings, image_size):
    """The layers before the head, from images to the invariant fields of each position: a SequentialModule."""
    layers, fields = [nn.MaskModule(in_type, image_size, margin=1)], in_type
    for i, (width, kernel, padding) in enumerate(zip(widths, kernels, paddings)):
        out = nn.FieldType(in_type.gspace, width * [in_type.gspace.regular_repr])
        layers += [nn.R2Conv(fields, out, kernel, padding=padding, bias=False), nn.InnerBatchNorm(out),
                   nn.ReLU(out, inplace=True)]
        if i in POOLED:
            layers.append(nn.PointwiseAvgPoolAntialiased2D(out, POOL_SIGMA, stride=2))
        fields = out
    return nn.SequentialModule(*layers, nn.PointwiseAvgPoolAntialiased2D(fields, POOL_SIGMA, stride=1, padding=0),
                               nn.GroupPooling(fields))


def mlp(features, hidden, classes):
    """The head: [B, features] -> [B, classes]."""
    return torch.nn.Sequential(torch.nn.Linear(features, hidden), torch.nn.BatchNorm1d(hidden), torch.nn.ELU(),
                               torch.nn.Linear(hidden, classes))


def check_sizes(widths, kernels, paddings, image_size, keeps_rows=True):
    """Raises ValueError if the sizes do not fit; with keeps_rows also where pooling would leave a row over."""
    if not len(widths) == len(kernels) == len(paddings) == 6:
        raise ValueError("six widths, kernels and paddings are needed, got "
                         f"{len(widths)}, {len(kernels)} and {len(paddings)}")
    if any(k % 2 == 0 for k in kernels):
        raise ValueError(f"kernel sizes must be odd, got {tuple(kernels)}")
    if not pixels_left(kernels, paddings, image_size, keeps_rows):
        near = [s for s in range(max(1, image_size - 8), image_size + 9)
                if pixels_left(kernels, paddings, s, keeps_rows)]
        hint = f"near it, {', '.join(map(str, near))} would do" if near else "no size near it would do"
        raise ValueError(f"image size {image_size} with kernels {tuple(kernels)} and paddings {tuple(paddings)} leaves "
                         f"no pixel, or a pooling that leaves a row over; {hint}")


def pixels_left(kernels, paddings, size, keeps_rows=True):
    """Height and width of what steerable_features returns for images of that size; 0 if they do not fit."""
    for i, (kernel, padding) in enumerate(zip(kernels, paddings)):
        size += 2 * padding - kernel + 1
        if i in POOLED:
            if keeps_rows and (size - 1) % 2:  # kernel 5, padding 2, stride 2
                return 0
            size = (size - 1) // 2 + 1
        if size < 1:
            return 0
    return max(0, size - POOL_KERNEL + 1)
