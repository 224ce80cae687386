"""Conventional twins of the steerable networks that end in a maximum or mean over space, and of those for volumes and
vectors.

Of equal parameters, or of equal width, that is with as many channels as the fields of the steerable network have.
"""
from functools import partial

import torch

from .c8_steerable_cnn import mlp
from .conventional import plain_conv
from .e2sfcnn import POOLED, check_sizes, two_layer_head
from .p4_cnn import check_image_size
from .registry import register
from .se3_cnn import STRIDE, check_volume, head_of


class PlainCNN(torch.nn.Module):
    """Blocks of Conv2d, BatchNorm2d and a nonlinearity, some followed by pooling; perhaps a last Conv2d; the maximum or
    mean over space; a head.

    forward: images [B, in_channels, H, W] -> logits [B, classes]

    pools     {layer: a module behind it}
    activate  makes the nonlinearity
    top       (kernel, padding, channels) of the last Conv2d, or None
    reduce    reduce(x, dimensions)
    """

    def __init__(self, in_channels, widths, kernels, paddings, pools, activate, reduce, top=None, head=None):
        super().__init__()
        layers, channels = [], in_channels
        for i, (width, kernel, padding) in enumerate(zip(widths, kernels, paddings)):
            layers += [plain_conv(channels, width, kernel, padding=padding), torch.nn.BatchNorm2d(width), activate()]
            if i in pools:
                layers.append(pools[i])
            channels = width
        if top is not None:
            layers.append(torch.nn.Conv2d(channels, top[2], top[0], padding=top[1]))
        self.features, self.reduce, self.head = torch.nn.Sequential(*layers), reduce, head or torch.nn.Identity()

    def forward(self, images):  # [B, in_channels, H, W] -> [B, classes]
        return self.head(self.reduce(self.features(images), (2, 3)))


def e2sf_cnn(nn, *, widths=(38, 76, 76, 151, 151, 151), kernels=(9, 7, 7, 7, 7, 5), paddings=(0, 3, 3, 3, 3, 0),
             hidden=96, dropout=0.3, image_size=28, in_channels=1, classes=10):
    """PlainCNN, the twin of e2sfcnn, whose arguments are meant; nn is not needed, and widths are channels."""
    check_sizes(widths, kernels, paddings, image_size)
    return PlainCNN(in_channels, widths, kernels, paddings, {i: torch.nn.MaxPool2d(2) for i in POOLED}, torch.nn.ELU,
                    torch.amax, head=two_layer_head(widths[-1], hidden, dropout, classes))


def exp_e2sf_cnn(nn, *, widths=(32, 64, 64, 128, 128, 128), kernels=(7, 5, 5, 5, 5, 5), paddings=(1, 2, 2, 2, 2, 0),
                 hidden=64, image_size=28, in_channels=1, classes=10):
    """PlainCNN, the twin of exp_e2sfcnn, whose arguments are meant; nn is not needed, and widths are channels."""
    check_sizes(widths, kernels, paddings, image_size)
    return PlainCNN(in_channels, widths, kernels, paddings, {i: torch.nn.MaxPool2d(2) for i in POOLED}, torch.nn.ELU,
                    torch.amax, head=mlp(widths[-1], hidden, classes))


def z2_cnn(nn, *, width=24, image_size=28, in_channels=1, classes=10):
    """PlainCNN, the twin of p4_cnn and p4m_cnn, whose arguments are meant; nn is not needed, width is in channels."""
    check_image_size(image_size)
    return PlainCNN(in_channels, 6 * (width,), 6 * (3,), 6 * (0,), {1: torch.nn.MaxPool2d(2)}, torch.nn.ReLU,
                    torch.amax, top=(4, 0, classes))


def hnet_cnn(nn, *, features=6, gain=2, kernel=5, in_channels=1, classes=10):
    """PlainCNN, the twin of hnet, whose arguments are meant; nn is not needed, and features are channels."""
    widths = [int(features * gain ** block) for block in (0, 0, 1, 1, 2, 2)]
    return PlainCNN(in_channels, widths, 6 * (kernel,), 6 * (kernel // 2,), {i: torch.nn.AvgPool2d(2) for i in POOLED},
                    torch.nn.ReLU, torch.mean, top=(kernel, kernel // 2, classes))


def cnn_3d(nn, *, stem=6, widths=(12, 24, 36, 24), inner=(12, 24, 34, 34), pooled=32, hidden=256, dropout=0.1,
           image_size=33, in_channels=1, classes=10):
    """PlainCNN3D, the twin of se3_cnn, whose arguments are meant; nn is not needed, and widths are channels.

    inner  channels inside of each residual block
    """
    check_volume(widths, inner, image_size)
    return PlainCNN3D(stem, widths, inner, pooled, hidden, dropout, in_channels, classes)


class PlainCNN3D(torch.nn.Module):
    """A stem, residual blocks with a stride, a last convolution, the mean over space; an MLP.

    forward: volumes [B, in_channels, D, H, W] -> logits [B, classes]
    """

    def __init__(self, stem, widths, inner, pooled, hidden, dropout, in_channels, classes):
        super().__init__()
        layers, channels = [_conv_3d(in_channels, stem, 5)], stem
        for width, inside in zip(widths, inner):
            layers.append(PlainBlock3D(channels, inside, width))
            channels = width
        self.features = torch.nn.Sequential(*layers, _conv_3d(channels, pooled, 3, padding=0), torch.nn.ELU())
        self.head = head_of(pooled, hidden, dropout, classes)

    def forward(self, volumes):  # [B, in_channels, D, H, W] -> [B, classes]
        return self.head(self.features(volumes).mean((2, 3, 4)))


class PlainBlock3D(torch.nn.Module):
    """Conv3d, BatchNorm3d, ELU and Conv3d with a stride, beside a skip connection of mean pooling and Conv3d."""

    def __init__(self, in_channels, inner, out_channels):
        super().__init__()
        self.residual = torch.nn.Sequential(_conv_3d(in_channels, inner, 3), torch.nn.BatchNorm3d(inner),
                                            torch.nn.ELU(), _conv_3d(inner, out_channels, 3, STRIDE))
        self.skip = torch.nn.Sequential(torch.nn.AvgPool3d(3, STRIDE, padding=1),
                                        _conv_3d(in_channels, out_channels, 1))

    def forward(self, x):
        return self.skip(x) + self.residual(x)


def plain_mlp(nn, *, widths=(10, 11, 11, 10), in_features=3, out_features=5):
    """Linear, BatchNorm1d and ELU for each width, then Linear: the twin of equivariant_mlp. nn is not needed."""
    layers, features = [], in_features
    for width in widths:
        layers += [torch.nn.Linear(features, width, bias=False), torch.nn.BatchNorm1d(width), torch.nn.ELU()]
        features = width
    return torch.nn.Sequential(*layers, torch.nn.Linear(features, out_features, bias=False))


def _conv_3d(in_channels, out_channels, kernel, stride=1, padding=None):
    conv = torch.nn.Conv3d(in_channels, out_channels, kernel, stride, kernel // 2 if padding is None else padding,
                           bias=False)
    torch.nn.init.kaiming_normal_(conv.weight)
    return conv


for _name, _build, _shape, _of, _wide in (
    ("e2sf_cnn", e2sf_cnn, (1, 28, 28), "e2sfcnn", {"widths": (384, 512, 576, 576, 1024, 1536)}),
    ("exp_e2sf_cnn", exp_e2sf_cnn, (1, 28, 28), "exp_e2sfcnn", {"widths": (256, 384, 512, 512, 768, 1024)}),
    ("z2_cnn", z2_cnn, (1, 28, 28), "p4_cnn", {"width": 40}),
    ("z2_cnn_p4m", partial(z2_cnn, width=25), (1, 28, 28), "p4m_cnn", {"width": 56}),
    ("hnet_cnn", hnet_cnn, (1, 28, 28), "hnet", {"features": 32}),
    ("cnn_3d", cnn_3d, (1, 33, 33, 33), "se3_cnn", {"stem": 39, "widths": (80, 240, 480, 320),
                                                    "inner": (70, 175, 175, 350), "pooled": 1152}),
    ("plain_mlp", plain_mlp, (3,), "equivariant_mlp", {"widths": (12, 128, 128, 45)}),
):
    register(name=_name, twin=(_of, "parameters"), input_shape=_shape)(_build)
    register(name=f"{_name}_wide", twin=(_of, "width"), input_shape=_shape)(partial(_build, **_wide))
