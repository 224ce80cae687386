"""The harmonic network (H-Net) for rotated MNIST."""
import torch

from .harmonic import HarmonicConv, ModulusBatchNorm, ModulusReLU, complex_fields, modulus
from .registry import register


@register(citation="Worrall, Garbin, Turmukhambetov, Brostow: Harmonic Networks, CVPR 2017: 1.69 % error on MNIST-rot",
          input_shape=(1, 28, 28), group="SO(2)")
def hnet(nn, *, features=8, gain=2, kernel=5, rings=4, orders=(0, 1), image_size=28, in_channels=1, classes=10):
    """HNet, a classifier invariant to rotations. The defaults are the published sizes.

    nn           namespace of layers: escnn.nn or equiconv.nn
    features     complex fields of each rotation order in the first two convolutions
    gain         by which they grow after each pooling
    kernel       size of the filters, in pixels; odd
    rings        of their radial profiles
    orders       rotation orders of the fields
    image_size   height and width of the input, in pixels
    in_channels  scalar channels of the input
    classes      outputs

    Raises ValueError for an even kernel, or an image size that pooling leaves a row of (which would break the
    equivariance).
    """
    if image_size % 4:
        raise ValueError(f"image size {image_size} leaves a row over in the pooling: it must be a multiple of 4")
    return HNet(nn, features, gain, kernel, rings, orders, image_size, in_channels, classes)


class HNet(torch.nn.Module):
    """Three blocks of HarmonicConv, ModulusReLU, HarmonicConv and ModulusBatchNorm with mean pooling between; a last
    HarmonicConv without phases; the moduli, summed over rotation orders and averaged over space.

    forward: images [B, in_channels, H, W] -> logits [B, classes]
    in_type: field type of the images
    """

    def __init__(self, nn, features, gain, kernel, rings, orders, image_size, in_channels, classes):
        super().__init__()
        from escnn import gspaces

        plane = gspaces.rot2dOnR2(-1, maximum_frequency=max(orders))
        self.image_size, self.classes = image_size, classes
        self.in_type = nn.FieldType(plane, in_channels * [plane.trivial_repr])
        layers, fields = [], self.in_type
        options = {"rings": rings, "padding": kernel // 2, "factorised": nn.__name__ == "equiconv.nn"}
        for block in range(3):
            if block > 0:
                layers.append(nn.PointwiseAvgPool2D(fields, 2))
            out = complex_fields(nn, plane, orders, int(features * gain ** block))
            layers += [HarmonicConv(fields, out, kernel, **options), ModulusReLU(out),
                       HarmonicConv(out, out, kernel, **options), ModulusBatchNorm(out)]
            fields = out
        layers.append(HarmonicConv(fields, complex_fields(nn, plane, orders, classes), kernel, phase=False, **options))
        self.features = nn.SequentialModule(*layers)
        self.bias = torch.nn.Parameter(torch.full((classes,), 0.01))

    def forward(self, images):  # [B, in_channels, H, W] -> [B, classes]
        moduli = modulus(self.features(self.in_type(images)))  # [B, orders * classes, H / 4, W / 4]
        return moduli.unflatten(1, (-1, self.classes)).sum(1).mean((2, 3)) + self.bias
