"""The first group-equivariant CNN, for rotations by 90 degrees (p4), and for reflections too (p4m)."""
import math
from collections import Counter
from functools import partial

import torch

from .registry import register

LAYERS = 6  # with kernels of 3; the top one has 4
POOLED = 1  # the layer followed by max pooling
TOP_KERNEL = 4
# Of the filters' rings, in pixels. Harmonics that vanish on all taps of their ring live on its tails on the others:
# were the rings narrower, these would be rounding errors, normalised.
RING_WIDTH = 0.4


def p4_cnn(nn, *, reflections=False, width=10, image_size=28, in_channels=1, classes=10):
    """P4CNN, a classifier invariant to rotations by 90 degrees. The defaults are the published sizes.

    nn           namespace of layers: escnn.nn or equiconv.nn
    reflections  invariant to these too: p4m for p4
    width        regular fields of each layer (of 4 channels, 8 with reflections)
    image_size   height and width of the input, in pixels
    in_channels  scalar channels of the input
    classes      outputs

    Raises ValueError if the image size leaves no pixel, or a row over in the pooling (which would break the
    equivariance).
    """
    return P4CNN(nn, reflections, width, image_size, in_channels, classes)


class P4CNN(torch.nn.Module):
    """Six blocks of R2Conv, InnerBatchNorm and ReLU on regular fields, a top R2Conv with one field for each class,
    and the maximum over group and space.

    The filters are all those of a group convolution, as published: harmonics on rings through the taps span the taps.
    They do so with 11 weights for 9 taps (18 for 16), for some are linearly dependent.

    forward: images [B, in_channels, H, W] -> logits [B, classes]
    in_type: field type of the images
    """

    def __init__(self, nn, reflections, width, image_size, in_channels, classes):
        super().__init__()
        from escnn import gspaces

        check_image_size(image_size)
        plane = (gspaces.flipRot2dOnR2 if reflections else gspaces.rot2dOnR2)(4)
        self.image_size = image_size
        self.in_type = nn.FieldType(plane, in_channels * [plane.trivial_repr])
        out = nn.FieldType(plane, width * [plane.regular_repr])
        layers, fields = [], self.in_type
        for i in range(LAYERS):
            layers += [nn.R2Conv(fields, out, 3, bias=False, **all_taps(3)), nn.InnerBatchNorm(out),
                       nn.ReLU(out, inplace=True)]
            if i == POOLED:
                layers.append(nn.PointwiseMaxPool2D(out, 2))
            fields = out
        top = nn.FieldType(plane, classes * [plane.regular_repr])
        layers += [nn.R2Conv(fields, top, TOP_KERNEL, **all_taps(TOP_KERNEL)), nn.GroupPooling(top)]
        self.features = nn.SequentialModule(*layers)

    def forward(self, images):  # [B, in_channels, H, W] -> [B, classes]
        scores = self.features(self.in_type(images)).tensor  # [B, classes, h, w]; published: h = w = 1
        return scores.amax((2, 3)).to(images.dtype)  # escnn's group pooling always returns float32


def all_taps(kernel):
    """Options of an R2Conv whose steerable filters, for groups that map the grid to itself, span all filters of that
    size: one ring through each set of taps at equal radius, and all frequencies that its taps can tell apart.
    """
    positions = range(1 - kernel, kernel, 2)  # in half pixels, from the centre
    taps = Counter(x * x + y * y for x in positions for y in positions)
    squares = sorted(taps)
    return {"rings": [math.sqrt(q) / 2 for q in squares], "sigma": len(squares) * [RING_WIDTH],
            "frequencies_cutoff": partial(_most_frequencies, {q: taps[q] // 2 for q in squares})}


def _most_frequencies(by_square, radius):
    return by_square[round((2 * radius) ** 2)]


def check_image_size(image_size):
    """Raises ValueError if it leaves no pixel, or a row over in the pooling."""
    pooled = image_size - 2 * (POOLED + 1)  # each kernel of 3 takes 2 pixels
    if pooled % 2:
        raise ValueError(f"image size {image_size} leaves a row over in the pooling: it must be even")
    left = pooled // 2 - 2 * (LAYERS - POOLED - 1)
    if left < TOP_KERNEL:
        least = 2 * (TOP_KERNEL + 2 * (LAYERS - POOLED - 1)) + 2 * (POOLED + 1)
        raise ValueError(f"image size {image_size} leaves {max(left, 0)} pixels for the last kernel of {TOP_KERNEL}: "
                         f"{least} is the smallest")


PAPER = "Cohen, Welling: Group Equivariant Convolutional Networks, ICML 2016"
register(citation=f"{PAPER}; gconv_experiments, MNIST_ROT/models/P4CNN.py", input_shape=(1, 28, 28), group="C4")(p4_cnn)
register(name="p4m_cnn", citation=f"{PAPER}: its p4 CNN, under p4m at about equal parameters",
         input_shape=(1, 28, 28), group="D4")(partial(p4_cnn, reflections=True, width=7))
