"""Sizes and strides of a convolution, in the two directions that it can run."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """A convolution from a source [B, source_channels, *source_size] to a target [B, target_channels, *target_size].

    Tap j joins the positions p and q of the two, along each axis, with p + padding = stride * q + dilation * j. If `up`
    is false, q is in the target (a convolution); if true, in the source (a transposed convolution, and the gradient of
    a convolution).
    """
    kernel: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int
    up: bool
    source_channels: int
    target_channels: int
    source_size: tuple
    target_size: tuple

    @property
    def adjoint(self):
        """The same taps from the target to the source."""
        return Geometry(self.kernel, self.stride, self.padding, self.dilation, self.groups, not self.up,
                        self.target_channels, self.source_channels, self.target_size, self.source_size)

    def fields(self, fields, of_source):
        """How many of a plan's fields belong to one group: those of p serve every group, those of q are divided."""
        return len(fields) // self.groups if of_source == self.up else len(fields)
