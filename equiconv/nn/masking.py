"""Masks in space."""
import escnn.nn

from .checks import check_type
from .tensors import OnTensors, adopting_init


class MaskModule(OnTensors, escnn.nn.MaskModule):
    """escnn.nn.MaskModule, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.MaskModule)

    def forward(self, input):
        """input: GeometricTensor [B, in_type.size, S, S(, S)] -> GeometricTensor of the same shape."""
        check_type(self, input)
        if input.shape[2:] != self.mask.shape[2:]:
            raise ValueError(f"MaskModule: input must have the spatial shape {tuple(self.mask.shape[2:])}, got "
                             f"{tuple(input.shape[2:])}")
        return super().forward(input)

    def _compute(self, x):
        return (x * self.mask).to(x.dtype)
