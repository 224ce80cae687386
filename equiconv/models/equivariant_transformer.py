"""Equivariant Transformers: layers that estimate how an image is transformed, and undo it.

In coordinates (u, v) that are canonical for a group of transformations, these are translations. So an image sampled on
a grid of them is shifted when it is transformed; a CNN finds the position of a pattern along u or v, which moves with
it; and the image resampled by the transformation of that position does not change any more. Coordinates of images are
x (to the right) and y (down), from -1 to 1 between the centres of the outermost pixels.

S. Tai, P. Bailis, G. Valiant, Equivariant Transformer Networks, ICML 2019: sections 3 and 4, table 1.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from .registry import register

LEAST_DEPTH = 1e-3  # of points that a perspective transformation maps to: it has none at or behind the horizon
OUTSIDE = 2.0  # where images are zero


@dataclass(frozen=True)
class Axis:
    """An axis of canonical coordinates, from low to high. It `moves` where the transformations shift it."""
    low: float
    high: float
    moves: bool = False
    periodic: bool = False

    def positions(self, count):
        """[count], evenly spaced; without the last of count + 1 where the axis is periodic."""
        positions = torch.linspace(self.low, self.high, count + self.periodic)
        return positions[:count]


class Transformation:
    """A group of projective transformations of the plane, and coordinates that they shift.

    u, v  Axis of the columns and of the rows of a grid of these coordinates
    """
    u: Axis
    v: Axis

    def points(self, u, v):  # [rows, columns] each -> the points x, y of each sheet, that is each part of the plane
        raise NotImplementedError

    def matrix(self, *parameters):
        """[B, 3, 3] that acts on (x, y, 1), of parameters [B]: the shifts of the axes that move, u before v."""
        raise NotImplementedError

    @property
    def axes(self):
        """[(dimension of an image [B, C, rows, columns], Axis)] of those that move."""
        return [(dim, axis) for dim, axis in ((3, self.u), (2, self.v)) if axis.moves]

    def grid(self, rows, columns):
        """[sheets, rows, columns, 2]: points x, y."""
        v, u = torch.meshgrid(self.v.positions(rows), self.u.positions(columns), indexing="ij")
        return torch.stack([torch.stack(point, -1) for point in self.points(u, v)])


class RotationScale(Transformation):
    """Rotations and scalings about the centre, in log-polar coordinates: by e^s, u moves by s; by an angle, v."""
    u = Axis(-math.log(10), math.log(2) / 2, moves=True)  # up to the corners
    v = Axis(-math.pi, math.pi, moves=True, periodic=True)

    def points(self, u, v):
        return [(u.exp() * v.cos(), u.exp() * v.sin())]

    def matrix(self, log_scale, angle):
        cos, sin = log_scale.exp() * angle.cos(), log_scale.exp() * angle.sin()
        return _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


class ShearX(Transformation):
    """(x + s y, y), in coordinates u = y, v = x / y."""
    u = Axis(-1.0, 1.0)
    v = Axis(-5.0, 5.0, moves=True)

    def points(self, u, v):
        return [(u * v, u)]

    def matrix(self, shear):
        return _matrix([[1, shear, 0], [0, 1, 0], [0, 0, 1]], shear)


class HyperbolicRotation(Transformation):
    """(e^s x, e^-s y), in coordinates u = sqrt(|x y|), v = log(|x / y|) / 2, with u of the sign of x.

    Two sheets: one where x and y have the same sign, one where they have not.
    """
    u = Axis(-math.sqrt(0.5), math.sqrt(0.5))
    v = Axis(-math.log(6), math.log(6), moves=True)

    def points(self, u, v):
        return [(u * v.exp(), u * (-v).exp()), (u * v.exp(), -u * (-v).exp())]

    def matrix(self, log_scale):
        return _matrix([[log_scale.exp(), 0, 0], [0, (-log_scale).exp(), 0], [0, 0, 1]])


class PerspectiveX(Transformation):
    """(x, y) / (1 + s x), in coordinates u = 1 / x, v = atan(y / x). Two sheets: u > 0 and u < 0."""
    u = Axis(1.0, 7.0, moves=True)
    v = Axis(-0.495 * math.pi, 0.495 * math.pi)

    def points(self, u, v):
        backward = u - (self.u.low + self.u.high)  # increases from left to right too
        return [(1 / u, v.tan() / u), (1 / backward, v.tan() / backward)]

    def matrix(self, perspective):
        return _matrix([[1, 0, 0], [0, 1, 0], [perspective, 0, 1]], perspective)


class PerspectiveY(PerspectiveX):
    """(x, y) / (1 + s y), in coordinates u = 1 / y, v = atan(x / y). Two sheets: u > 0 and u < 0."""

    def points(self, u, v):
        return [(x, y) for y, x in super().points(u, v)]

    def matrix(self, perspective):
        return _matrix([[1, 0, 0], [0, 1, 0], [0, perspective, 1]], perspective)


class Cartesian(Transformation):
    """No transformations: the coordinates of the image itself."""
    u = v = Axis(-1.0, 1.0)

    def points(self, u, v):
        return [(u, v)]


TRANSFORMATIONS = {t.__name__: t() for t in (RotationScale, ShearX, HyperbolicRotation, PerspectiveX, PerspectiveY)}
COORDINATES = {"cartesian": Cartesian(), "log-polar": TRANSFORMATIONS["RotationScale"]}


class PosePredictor(torch.nn.Module):
    """Two convolutions, and for each axis that moves the centroid of a softmax along it.

    The parameters found move by s with an image whose patterns all move by s along the axis: exactly along a periodic
    axis (by multiples of the strides), and along another as far as the softmax is peaked and nothing leaves the grid.

    axes         of Transformation: along which to predict
    periodic     whether the rows and the columns are
    in_channels, size of the images [B, in_channels, *size]
    features     channels inside
    kernel       size of the kernels; odd
    strides      of the convolutions

    forward: images -> as many parameters [B] as axes
    """

    def __init__(self, axes, periodic, in_channels, size, features, kernel, strides):
        super().__init__()
        self.axes, self.periodic, self.pad = [dim for dim, _ in axes], periodic, kernel // 2
        layers, channels = [], in_channels
        for stride in strides:
            layers.append(torch.nn.Sequential(torch.nn.Conv2d(channels, features, kernel, stride, bias=False),
                                              torch.nn.BatchNorm2d(features), torch.nn.LeakyReLU(0.1)))
            channels = features
        self.layers = torch.nn.ModuleList(layers)
        self.heatmaps = torch.nn.ModuleList(torch.nn.Conv1d(features, 1, kernel, bias=False) for _ in axes)
        self.offsets = torch.nn.Parameter(torch.zeros(len(axes)))  # of the pose that counts as none
        self.radii = [(axis.high - axis.low) / 2 for _, axis in axes]
        for i, (dim, axis) in enumerate(axes):
            positions = axis.positions(size[dim - 2])[::math.prod(strides)]
            if not axis.periodic:
                positions = positions - positions.mean()
            self.register_buffer(f"positions{i}", positions, persistent=False)

    def forward(self, images):
        for layer in self.layers:
            images = layer(pad(images, self.pad, self.periodic))
        found = []
        for i, (dim, heatmap) in enumerate(zip(self.axes, self.heatmaps)):
            line = images.amax(5 - dim)  # [B, features, positions along the axis]
            periodic, positions = self.periodic[dim - 2], getattr(self, f"positions{i}")
            weights = heatmap(F.pad(line, 2 * [self.pad], "circular" if periodic else "constant"))[:, 0].softmax(-1)
            if periodic:  # angles
                centre = torch.atan2(weights @ positions.sin(), weights @ positions.cos())
            else:
                centre = weights @ positions
            found.append(centre + self.offsets[i].tanh() * self.radii[i])
        return found


class TransformerLayer(torch.nn.Module):
    """Estimates one of the TRANSFORMATIONS: its coordinates, and a PosePredictor in them.

    forward: images [B, C, H, W], matrix [B, 3, 3] or None -> that matrix times the estimated one. What is estimated is
    how the image is transformed which those resampled by the given matrix show.
    """

    def __init__(self, transformation, in_channels, grid, features=32, kernel=3, strides=(2, 1)):
        super().__init__()
        self.transformation = transformation
        points = transformation.grid(grid, grid)
        self.register_buffer("points", points, persistent=False)
        self.pose = PosePredictor(transformation.axes, (transformation.v.periodic, transformation.u.periodic),
                                  len(points) * in_channels, (grid, grid), features, kernel, strides)

    def canonical(self, images, matrix=None):
        """The images in canonical coordinates: [B, sheets * C, rows, columns]."""
        return torch.cat([resample(images, points, matrix) for points in self.points], 1)

    def forward(self, images, matrix=None):
        found = self.transformation.matrix(*self.pose(self.canonical(images, matrix)))
        return found if matrix is None else matrix @ found


class EquivariantTransformer(torch.nn.Module):
    """A front for any classifier: images in, images with the transformations undone out.

    transformations  names in TRANSFORMATIONS, estimated one after the other, each in the image that those before leave
    in_channels      of the images
    grid             rows and columns of the canonical coordinates and of the output; a multiple of the strides' product
    coordinates      of the output: "cartesian", or "log-polar", where what is left of rotations and scalings is a shift
    features, kernel, strides
                     of each PosePredictor

    forward: images [B, in_channels, H, W] -> [B, in_channels, grid, grid]
    matrix:  images -> [B, 3, 3], the transformation that the images show: they are resampled at its points

    Each value is interpolated once, from the input, and differentiably: the classifier's loss trains the layers.
    The paper's code lays the two sheets of coordinates side by side along an axis; here they are channels, so that an
    axis that moves does so as a whole.

    Raises ValueError for an unknown name or a size that does not fit.
    """

    def __init__(self, transformations, in_channels=1, grid=64, coordinates="cartesian", features=32, kernel=3,
                 strides=(2, 1)):
        super().__init__()
        for given, known, what in ((transformations, TRANSFORMATIONS, "transformations"),
                                   ((coordinates,), COORDINATES, "coordinates")):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"{what} must be of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        if grid < 1 or grid % math.prod(strides):
            raise ValueError(f"grid must be a multiple of {math.prod(strides)}, the strides' product, got {grid}")
        self.layers = torch.nn.ModuleList(TransformerLayer(TRANSFORMATIONS[name], in_channels, grid, features, kernel,
                                                           strides) for name in transformations)
        self.register_buffer("points", COORDINATES[coordinates].grid(grid, grid)[0], persistent=False)

    def matrix(self, images):
        matrix = None
        for layer in self.layers:
            matrix = layer(images, matrix)
        return matrix

    def forward(self, images):
        return resample(images, self.points, self.matrix(images))


class ETNetwork(torch.nn.Module):
    """An EquivariantTransformer before seven 3x3 convolutions and the maximum over space.

    forward: images [B, in_channels, H, W] -> logits [B, classes]
    """

    def __init__(self, front, periodic, in_channels, features, dropout, classes):
        super().__init__()
        self.front, self.periodic = front, periodic
        blocks, channels = [], in_channels
        for i in range(6):
            layers = [torch.nn.Conv2d(channels, features, 3, bias=False), torch.nn.BatchNorm2d(features),
                      torch.nn.ReLU(inplace=True)]
            if i < 2:
                layers.append(torch.nn.AvgPool2d(2))
            if i in (2, 5):
                layers.append(torch.nn.Dropout(dropout))
            blocks.append(torch.nn.Sequential(*layers))
            channels = features
        self.blocks = torch.nn.ModuleList([*blocks, torch.nn.Conv2d(channels, classes, 3)])

    def forward(self, images):
        x = self.front(images)
        for block in self.blocks:
            x = block(F.pad(x, (0, 0, 1, 1), "circular") if self.periodic else x)
        return x.amax((2, 3))


def equivariant_transformer(nn, *, transformations=("ShearX", "HyperbolicRotation", "PerspectiveX", "PerspectiveY"),
                            coordinates="log-polar", grid=64, features=32, pose_features=32, pose_kernel=3,
                            pose_strides=(2, 1), dropout=0.3, in_channels=1, classes=10):
    """ETNetwork, a classifier that undoes projective transformations. The defaults are those for projective MNIST.

    nn               namespace of layers, of which it needs none
    transformations  of the layers in front: names in TRANSFORMATIONS, in the order in which they are undone; may be ()
    coordinates      in which the CNN sees the image: "log-polar" (the paper's) or "cartesian"
    grid             rows and columns there, and in the layers; the input may have any other size
    features         of the CNN
    pose_features, pose_kernel, pose_strides
                     of the layers in front
    dropout          of the CNN, after its third and sixth layer
    in_channels      of the images
    classes          outputs

    In log-polar coordinates the CNN's padding is cyclic in the angle. By itself it is invariant to rotations about the
    centre, to those by 90 degrees exactly if the grid is a multiple of 16; behind layers for other transformations, as
    far as these find the same pose in a rotated image.

    Raises ValueError for unknown names and a grid that the CNN or the strides do not fit.
    """
    left = ((grid - 2) // 2 - 2) // 2 - 10  # two layers that pool and five that do not, each of which takes 2 pixels
    if left < 1:
        raise ValueError(f"grid {grid} leaves no pixel after seven convolutions: 50 is the smallest")
    front = EquivariantTransformer(transformations, in_channels, grid, coordinates, pose_features, pose_kernel,
                                   pose_strides)
    return ETNetwork(front, COORDINATES[coordinates].v.periodic, in_channels, features, dropout, classes)


def resample(images, points, matrix=None):
    """The images at some points, bilinearly, and zero outside of them.

    images  [B, C, H, W]
    points  [h, w, 2]: x, y from -1 to 1 between the centres of the outermost pixels
    matrix  [B, 3, 3], projective, or None: the image is taken at its products with (x, y, 1)

    Returns [B, C, h, w]. Points at or behind the matrix's horizon count as outside.
    """
    points = points.to(images.dtype)
    if matrix is None:
        points = points.expand(len(images), *points.shape)
    else:
        mapped = F.pad(points, (0, 1), value=1.0) @ matrix.to(images.dtype)[:, None].mT  # [B, h, w, 3]
        depth = mapped[..., 2:]
        points = torch.where(depth > LEAST_DEPTH, mapped[..., :2] / depth.clamp(min=LEAST_DEPTH), OUTSIDE)
    return F.grid_sample(images, points, align_corners=True)


def pad(images, amount, periodic):
    """Images with `amount` more rows and columns on each side: cyclic where (rows, columns) are periodic, else zero."""
    for is_periodic, width in zip(periodic, ((0, 0, amount, amount), (amount, amount, 0, 0))):
        images = F.pad(images, width, "circular" if is_periodic else "constant")
    return images


def _matrix(rows, like=None):
    """[B, 3, 3] of numbers and tensors [B]."""
    like = rows[0][0] if like is None else like
    return torch.stack([torch.stack([x if isinstance(x, torch.Tensor) else torch.full_like(like, x) for x in row], -1)
                        for row in rows], -2)


PAPER = "Tai, Bailis, Valiant: Equivariant Transformer Networks, ICML 2019"
register(citation=f"{PAPER}; projective MNIST", input_shape=(1, 64, 64), group="projective")(equivariant_transformer)
register(name="equivariant_transformer_rotation", input_shape=(1, 64, 64),
         group="SO(2) x R+", citation=f"{PAPER}: rotation and scale undone by one layer")(
    partial(equivariant_transformer, transformations=("RotationScale",), coordinates="cartesian"))
register(name="et_cnn", input_shape=(1, 64, 64), twin=("equivariant_transformer", "parameters"),
         citation="its CNN alone")(
    partial(equivariant_transformer, transformations=(), coordinates="cartesian", features=43))
register(name="et_cnn_wide", input_shape=(1, 64, 64), twin=("equivariant_transformer", "width"),
         citation="its CNN alone")(
    partial(equivariant_transformer, transformations=(), coordinates="cartesian"))
