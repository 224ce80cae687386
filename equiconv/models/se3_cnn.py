"""The SE(3)-equivariant residual CNN of escnn's example for volumes."""
import torch

from .grids import numerical_grid
from .registry import register

STRIDE = 2  # of each residual block


@register(citation="Cesa, Lang, Weiler: A Program to Build E(N)-Equivariant Steerable CNNs, ICLR 2022; "
                   "escnn, examples/se3_3Dcnn.py: 89.5 % on rotated ModelNet10",
          input_shape=(1, 33, 33, 33), group="SO(3)")
def se3_cnn(nn, *, stem=3, widths=(2, 6, 12, 8), samples=(200, 480, 480, 960), frequency=2, cube_orbits=4, pooled=128,
            hidden=256, dropout=0.1, image_size=33, in_channels=1, classes=10):
    """SE3CNN, a classifier invariant to rotations. The defaults are the published sizes.

    nn           namespace of layers: escnn.nn or equiconv.nn
    stem         fields after the first convolution: polynomials of degree 2 of the coordinates
    widths       fields after each residual block: polynomials of degree 3
    samples      about how many samples on the group each residual block's nonlinearity takes, over all its fields
    frequency    of its band-limited functions on SO(3)
    cube_orbits  its grid has 24 * cube_orbits rotations
    pooled       functions on the sphere before the last nonlinearity
    hidden       units of the head's first hidden layer; the second has half as many
    dropout      of the head
    image_size   depth, height and width of the input, in voxels
    in_channels  scalar channels of the input
    classes      outputs

    Raises ValueError if the sizes do not fit: as many samples as widths, and odd sizes down to the last block, or its
    stride breaks the equivariance.
    """
    return SE3CNN(nn, stem, widths, samples, frequency, cube_orbits, pooled, hidden, dropout, image_size, in_channels,
                  classes)


class SE3CNN(torch.nn.Module):
    """A stem, residual blocks with Fourier nonlinearities on SO(3), pooling through functions on the sphere; an MLP.

    forward: volumes [B, in_channels, D, H, W] -> logits [B, classes]
    in_type: field type of the volumes
    """

    def __init__(self, nn, stem, widths, samples, frequency, cube_orbits, pooled, hidden, dropout, image_size,
                 in_channels, classes):
        super().__init__()
        from escnn import gspaces

        check_volume(widths, samples, image_size)
        space = gspaces.rot3dOnR3()
        so3 = space.fibergroup
        self.in_type = nn.FieldType(space, in_channels * [space.trivial_repr])
        fields = nn.FieldType(space, stem * [polynomials(space, 2)])
        cubic = polynomials(space, 3)
        self.stem = nn.R3Conv(self.in_type, fields, 5, padding=2, bias=False)
        self.blocks = torch.nn.Sequential()
        for width, count in zip(widths, samples):
            out = nn.FieldType(space, width * [cubic])
            self.blocks.append(ResidualBlock(nn, fields, out, count, frequency, cube_orbits))
            fields = out
        snub_cube = numerical_grid(so3.sphere_grid, type="thomson_cube", N=1)  # its 24 points
        pool = nn.QuotientFourierELU(space, (False, -1), pooled, so3.bl_irreps(2), out_irreps=so3.bl_irreps(0),
                                     grid=snub_cube)
        self.pool = nn.SequentialModule(nn.R3Conv(fields, pool.in_type, 3, bias=False), pool)
        self.head = head_of(pool.out_type.size, hidden, dropout, classes)

    def forward(self, volumes):  # [B, in_channels, D, H, W] -> [B, classes]
        invariant = self.pool(self.blocks(self.stem(self.in_type(volumes)))).tensor  # [B, pooled, d, h, w]
        return self.head(invariant.mean((2, 3, 4)))


class ResidualBlock(torch.nn.Module):
    """R3Conv, IIDBatchNorm3d, FourierELU and R3Conv with a stride, beside a skip connection.

    forward: GeometricTensor of in_type -> GeometricTensor of out_type, at half the resolution
    """

    def __init__(self, nn, in_type, out_type, samples, frequency, cube_orbits):
        super().__init__()
        group = in_type.fibergroup
        grid = {"type": "thomson_cube", "N": cube_orbits}
        functions = max(1, round(samples / len(numerical_grid(group.grid, **grid))))
        activation = nn.FourierELU(in_type.gspace, functions, group.bl_irreps(frequency), **grid)
        self.residual = nn.SequentialModule(
            nn.R3Conv(in_type, activation.in_type, 3, padding=1, bias=False), nn.IIDBatchNorm3d(activation.in_type),
            activation, nn.R3Conv(activation.out_type, out_type, 3, padding=1, stride=STRIDE, bias=False))
        self.skip = nn.SequentialModule(nn.PointwiseAvgPoolAntialiased3D(in_type, 0.33, STRIDE, 1),
                                        nn.R3Conv(in_type, out_type, 1, bias=False))

    def forward(self, fields):
        return self.skip(fields) + self.residual(fields)


def polynomials(space, degree):
    """The representation on polynomials of the coordinates up to that degree: 1 + x + x (x) x + ..."""
    from escnn.group import directsum

    vector = space.irrep(1)
    powers = [space.trivial_repr, vector]
    while len(powers) <= degree:
        powers.append(powers[-1].tensor(vector))
    return directsum(powers, name=f"polynomial_{degree}")


def head_of(features, hidden, dropout, classes):
    """[B, features] -> [B, classes], through layers of `hidden` and half as many units."""
    layers, units = [], features
    for size in (hidden, hidden // 2):
        layers += [torch.nn.Linear(units, size, bias=False), torch.nn.BatchNorm1d(size), torch.nn.ELU(),
                   torch.nn.Dropout(dropout)]
        units = size
    return torch.nn.Sequential(*layers, torch.nn.Linear(units, classes))


def check_volume(widths, samples, image_size):
    """Raises ValueError if there are not as many samples as widths, or the size breaks the equivariance."""
    if len(widths) != len(samples):
        raise ValueError(f"as many samples as widths are needed, got {len(samples)} and {len(widths)}")
    size = image_size
    for _ in widths:
        if size % 2 == 0:
            raise ValueError(f"image size {image_size} has {size} voxels before a stride, which must be an odd number: "
                             f"{2 * STRIDE ** len(widths) + 1} would do")
        size = (size - 1) // STRIDE + 1
    if size < 3:
        raise ValueError(f"image size {image_size} leaves {size} voxels for the last kernel of 3")
