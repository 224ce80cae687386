"""An MLP that is equivariant to rotations: no space, only fields on a point."""
import torch

from .grids import numerical_grid
from .registry import register


@register(citation="Cesa, Lang, Weiler: A Program to Build E(N)-Equivariant Steerable CNNs, ICLR 2022; "
                   "escnn, examples/mlp.ipynb, with grids of snub cubes",
          input_shape=(3,), group="SO(3)")
def equivariant_mlp(nn, *, widths=(3, 8, 8, 5), frequencies=(1, 3, 3, 2), out_frequency=2, grid="thomson_cube",
                    points=(1, 1, 1, 1)):
    """EquivariantMLP, from a vector to a field of one frequency. Widths and frequencies default to those of the source.

    nn             namespace of layers: escnn.nn or equiconv.nn
    widths         signals on the sphere after each layer
    frequencies    up to which they are band-limited
    out_frequency  of the output
    grid           kind of the grids on which the nonlinearities sample the sphere, as of escnn's sphere_grid:
                   "thomson_cube" (exactly equivariant to the rotations of a cube), or "thomson", the source's
    points         the grids' sizes: 24 * N points, or N for "thomson"; the source's are (16, 40, 40, 25). All but
                   24 points are searched for, which takes minutes at first

    Raises ValueError if there are not as many frequencies and points as widths.
    """
    return EquivariantMLP(nn, widths, frequencies, out_frequency, grid, points)


class EquivariantMLP(torch.nn.Module):
    """Blocks of Linear, IIDBatchNorm1d and QuotientFourierELU on signals on the sphere, then a Linear.

    forward: vectors [B, 3] -> fields of out_type [B, 2 * out_frequency + 1]
    in_type, out_type: field types of the vectors and of the output
    """

    def __init__(self, nn, widths, frequencies, out_frequency, grid, points):
        super().__init__()
        from escnn import group, gspaces

        if not len(widths) == len(frequencies) == len(points):
            raise ValueError("as many frequencies and points as widths are needed, got "
                             f"{len(frequencies)}, {len(points)} and {len(widths)}")
        so3 = group.so3_group()
        space = gspaces.no_base_space(so3)
        self.in_type = nn.FieldType(space, [so3.standard_representation()])
        self.out_type = nn.FieldType(space, [so3.irrep(out_frequency)])
        layers, fields = [], self.in_type
        for width, frequency, count in zip(widths, frequencies, points):
            activation = nn.QuotientFourierELU(space, (False, -1), width,
                                               so3.bl_sphere_representation(L=frequency).irreps,
                                               grid=numerical_grid(so3.sphere_grid, type=grid, N=count))
            layers += [nn.Linear(fields, activation.in_type), nn.IIDBatchNorm1d(activation.in_type), activation]
            fields = activation.out_type
        self.layers = nn.SequentialModule(*layers, nn.Linear(fields, self.out_type))

    def forward(self, vectors):  # [B, 3] -> [B, 2 * out_frequency + 1]
        return self.layers(self.in_type(vectors)).tensor
