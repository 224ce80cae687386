"""Harmonic polynomials of points in space."""
import escnn.nn
import torch

from .tensors import OnTensors, adopting_init


class HarmonicPolynomialR3(OnTensors, escnn.nn.HarmonicPolynomialR3):
    """escnn.nn.HarmonicPolynomialR3, with the same arguments and state."""
    __init__ = adopting_init(escnn.nn.HarmonicPolynomialR3)

    def _compute(self, x):
        """x [points, 3] -> [points, (L + 1)^2]."""
        features = [torch.ones_like(x[:, :1])]
        for l in range(1, self.L + 1):
            # each degree is the highest in the product of the one before and the first
            product = x if l == 1 else (features[-1].unsqueeze(2) * features[1].unsqueeze(1)).flatten(1)
            features.append(product @ getattr(self.harmonics_generator, f"cob_{l}").t())
        return torch.cat(features, 1).to(x.dtype)
