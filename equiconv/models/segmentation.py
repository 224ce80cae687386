"""Networks that classify every voxel of a volume: SE(3)-equivariant, and their conventional twin."""
import torch

from .grids import numerical_grid
from .registry import register


@register(citation="after Weiler, Geiger, Welling, Boomsma, Cohen: 3D Steerable CNNs, NeurIPS 2018, with the Fourier "
                   "nonlinearities of Cesa, Lang, Weiler, ICLR 2022", input_shape=(1, 33, 33, 33), group="SO(3)")
def se3_segmenter(nn, *, widths=(6, 8, 8), kernels=(5, 3, 3), frequency=2, in_channels=1, classes=3):
    """SE3Segmenter, equivariant to rotations: a rotated volume has the rotated classes.

    nn           namespace of layers: escnn.nn or equiconv.nn
    widths       functions on the sphere after each convolution
    kernels      their kernel sizes, in voxels; odd
    frequency    of the band-limited functions
    in_channels  scalar channels of the volumes
    classes      outputs for each voxel

    Raises ValueError for even kernels, or not as many as widths.
    """
    _check(widths, kernels)
    return SE3Segmenter(nn, widths, kernels, frequency, in_channels, classes)


class SE3Segmenter(torch.nn.Module):
    """R3Conv, IIDBatchNorm3d and QuotientFourierELU on functions on the sphere, several times; a pointwise R3Conv.

    forward: volumes [B, in_channels, D, H, W] -> logits [B, classes, D, H, W]
    in_type, out_type: field types of the two
    """

    def __init__(self, nn, widths, kernels, frequency, in_channels, classes):
        super().__init__()
        from escnn import gspaces

        space = gspaces.rot3dOnR3()
        so3 = space.fibergroup
        points = numerical_grid(so3.sphere_grid, type="thomson_cube", N=1)  # of the snub cube: 24
        fields = self.in_type = nn.FieldType(space, in_channels * [space.trivial_repr])
        layers = []
        for width, kernel in zip(widths, kernels):
            activation = nn.QuotientFourierELU(space, (False, -1), width, so3.bl_irreps(frequency), grid=points)
            layers += [nn.R3Conv(fields, activation.in_type, kernel, padding=kernel // 2, bias=False),
                       nn.IIDBatchNorm3d(activation.in_type), activation]
            fields = activation.out_type
        self.out_type = nn.FieldType(space, classes * [space.trivial_repr])
        self.layers = nn.SequentialModule(*layers, nn.R3Conv(fields, self.out_type, 1))

    def forward(self, volumes):
        return self.layers(self.in_type(volumes)).tensor


@register(twin=("se3_segmenter", "parameters"), input_shape=(1, 33, 33, 33))
def cnn_segmenter(nn, *, widths=(4, 6, 6), kernels=(5, 3, 3), in_channels=1, classes=3):
    """The twin of se3_segmenter, whose arguments are meant; nn is not needed, and widths are channels."""
    _check(widths, kernels)
    layers, channels = [], in_channels
    for width, kernel in zip(widths, kernels):
        layers += [torch.nn.Conv3d(channels, width, kernel, padding=kernel // 2, bias=False),
                   torch.nn.BatchNorm3d(width), torch.nn.ELU()]
        channels = width
    return torch.nn.Sequential(*layers, torch.nn.Conv3d(channels, classes, 1))


def _check(widths, kernels):
    if len(widths) != len(kernels) or any(k % 2 == 0 for k in kernels):
        raise ValueError(f"as many odd kernels as widths are needed, got {tuple(kernels)} and {tuple(widths)}")
