"""Conventional twins of the steerable networks: the same layers, with filters that nothing constrains.

Of equal parameters, or of equal width, that is with as many channels as the fields of the steerable network have.
"""
from functools import partial

import torch

from .c8_steerable_cnn import POOL_SIGMA, POOLED, check_sizes, mlp, pixels_left
from .e2wrn import STAGE_STRIDES, check_depth
from .registry import register


def cnn(nn, *, widths=(45, 90, 90, 180, 180, 120), kernels=(7, 5, 5, 5, 5, 5), paddings=(1, 2, 2, 2, 2, 1), hidden=64,
        flatten=False, image_size=29, in_channels=1, classes=10):
    """CNN, the twin of c8_steerable_cnn. The defaults give it as many parameters as that has at its published sizes.

    nn           namespace of layers: escnn.nn or equiconv.nn, for the mask and the antialiased pooling
    widths       channels of the six convolutions
    flatten      as in deeplense_c4_cnn
    kernels, paddings, hidden, image_size, in_channels, classes
                 as in c8_steerable_cnn

    Raises ValueError if the sizes do not fit.
    """
    return CNN(nn, widths, kernels, paddings, hidden, flatten, image_size, in_channels, classes)


class CNN(torch.nn.Module):
    """Six blocks of Conv2d, BatchNorm2d and ReLU, antialiased pooling, then an MLP.

    forward: images [B, in_channels, H, W] -> logits [B, classes]
    """

    def __init__(self, nn, widths, kernels, paddings, hidden, flatten, image_size, in_channels, classes):
        super().__init__()
        check_sizes(widths, kernels, paddings, image_size, keeps_rows=not flatten)
        self.image_size, self.flatten = image_size, flatten
        layers = [OnChannels(nn.MaskModule(scalars(nn, in_channels), image_size, margin=1))]
        channels = in_channels
        for i, (width, kernel, padding) in enumerate(zip(widths, kernels, paddings)):
            layers += [plain_conv(channels, width, kernel, padding=padding), torch.nn.BatchNorm2d(width),
                       torch.nn.ReLU(inplace=True)]
            if i in POOLED:
                layers.append(OnChannels(nn.PointwiseAvgPoolAntialiased2D(scalars(nn, width), POOL_SIGMA, stride=2)))
            channels = width
        layers.append(OnChannels(nn.PointwiseAvgPoolAntialiased2D(scalars(nn, channels), POOL_SIGMA, stride=1,
                                                                  padding=0)))
        self.features = torch.nn.Sequential(*layers)
        positions = pixels_left(kernels, paddings, image_size, keeps_rows=False) ** 2 if flatten else 1
        self.head = mlp(channels * positions, hidden, classes)

    def forward(self, images):  # [B, in_channels, H, W] -> [B, classes]
        features = self.features(images)
        return self.head(features.flatten(1) if self.flatten else features.mean((2, 3)))


def wrn(nn, *, depth=28, widths=(160, 320, 640), kernels=(3, 3, 3), stem=16, stem_kernel=3, stride=1, dropout=0.3,
        in_channels=3, classes=10):
    """WideResNet, the twin of e2wrn; with widths of (16, 32, 64) * widening it has about as many parameters.

    nn           namespace of layers, of which it needs none
    depth        6 * blocks per stage + 4
    widths       channels of the three stages
    kernels      their kernel sizes, in pixels
    stem         channels of the first convolution
    stem_kernel  its kernel size
    stride       of the first stage; published: 2 for STL-10
    dropout      of each block
    in_channels  channels of the input
    classes      outputs

    Raises ValueError for a depth or kernels that do not fit.
    """
    check_depth(depth, kernels)
    return WideResNet((depth - 4) // 6, widths, kernels, stem, stem_kernel, stride, dropout, in_channels, classes)


class WideResNet(torch.nn.Module):
    """A stem, three stages of pre-activated residual blocks, pooling, a linear classifier.

    As in e2wrn, the second convolution of a block has the stride.

    forward: images [B, in_channels, H, W] -> logits [B, classes]
    """

    def __init__(self, blocks, widths, kernels, stem, stem_kernel, stride, dropout, in_channels, classes):
        super().__init__()
        layers, channels = [plain_conv(in_channels, stem, stem_kernel)], stem
        strides = (stride, *STAGE_STRIDES[1:])
        for width, kernel, stride in zip(widths, kernels, strides, strict=True):
            for block in range(blocks):
                layers.append(WideBlock(channels, width, kernel, stride if block == 0 else 1, dropout))
                channels = width
        self.features = torch.nn.Sequential(*layers, torch.nn.BatchNorm2d(channels), torch.nn.ReLU(inplace=True))
        self.head = torch.nn.Linear(channels, classes)

    def forward(self, images):  # [B, in_channels, H, W] -> [B, classes]
        return self.head(self.features(images).mean((2, 3)))


class WideBlock(torch.nn.Module):
    """Batch norm, ReLU and Conv2d, twice, with dropout between, beside a skip connection."""

    def __init__(self, in_channels, out_channels, kernel, stride, dropout):
        super().__init__()
        self.activated = torch.nn.Sequential(torch.nn.BatchNorm2d(in_channels), torch.nn.ReLU(inplace=True))
        self.residual = torch.nn.Sequential(
            plain_conv(in_channels, out_channels, kernel), torch.nn.BatchNorm2d(out_channels),
            torch.nn.ReLU(inplace=True), torch.nn.Dropout(dropout),
            plain_conv(out_channels, out_channels, kernel, stride))
        self.skip = None
        if stride != 1 or in_channels != out_channels:
            self.skip = plain_conv(in_channels, out_channels, 1, stride)

    def forward(self, x):  # [B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride]
        activated = self.activated(x)
        return self.residual(activated) + (x if self.skip is None else self.skip(activated))


class OnChannels(torch.nn.Module):
    """A module for scalar fields as a module for plain tensors."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):  # [B, C, H, W]
        return self.module(self.module.in_type(x)).tensor


def scalars(nn, channels):
    """The type of fields that no group acts on."""
    from escnn import gspaces

    plane = gspaces.trivialOnR2()
    return nn.FieldType(plane, channels * [plane.trivial_repr])


def plain_conv(in_channels, out_channels, kernel, stride=1, padding=None):
    padding = kernel // 2 if padding is None else padding
    conv = torch.nn.Conv2d(in_channels, out_channels, kernel, padding=padding, stride=stride, bias=False)
    torch.nn.init.kaiming_normal_(conv.weight)  # He's, as of the steerable networks
    return conv


register(twin=("c8_steerable_cnn", "parameters"), input_shape=(1, 29, 29))(cnn)
register(name="cnn_wide", twin=("c8_steerable_cnn", "width"), input_shape=(1, 29, 29))(
    partial(cnn, widths=(192, 384, 384, 768, 768, 512)))
_DEEPLENSE = {"flatten": True, "image_size": 128, "classes": 3}
register(name="deeplense_cnn", twin=("deeplense_c4_cnn", "parameters"), input_shape=(1, 128, 128))(
    partial(cnn, widths=(32, 64, 64, 128, 128, 64), **_DEEPLENSE))
register(name="deeplense_cnn_wide", twin=("deeplense_c4_cnn", "width"), input_shape=(1, 128, 128))(
    partial(cnn, widths=(96, 192, 192, 384, 384, 256), **_DEEPLENSE))
for _name, _settings, _shape in (
    ("wrn10_4", {"depth": 10, "widths": (64, 128, 256)}, (3, 33, 33)),
    ("wrn16_8", {"depth": 16, "widths": (128, 256, 512), "stride": 2}, (3, 96, 96)),
    ("wrn28_7", {"widths": (112, 224, 448)}, (3, 32, 32)),
    ("wrn28_10", {}, (3, 32, 32)),
):
    register(name=_name, citation="Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016",
             twin=(f"e2{_name}", "parameters"), input_shape=_shape)(partial(wrn, **_settings))
for _name, _settings, _shape in (
    ("wrn10_4", {"depth": 10, "widths": (176, 360, 720), "stem": 40}, (3, 33, 33)),
    ("wrn16_8", {"depth": 16, "widths": (512, 720, 724), "kernels": (5, 3, 3), "stem": 64, "stride": 2}, (3, 96, 96)),
    ("wrn28_7", {"widths": (448, 632, 632), "kernels": (5, 3, 3), "stem": 64}, (3, 32, 32)),
    ("wrn28_10", {"widths": (640, 904, 904), "kernels": (5, 3, 3), "stem": 64}, (3, 32, 32)),
):
    register(name=f"{_name}_wide", twin=(f"e2{_name}", "width"), input_shape=_shape)(
        partial(wrn, stem_kernel=5, **_settings))
