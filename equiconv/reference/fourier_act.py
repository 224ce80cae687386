"""fourier_act by its definition: all samples at once."""
import torch
import torch.nn.functional as F

from ..formats import compute_dtype, like

#: {name: (function, its derivative, the derivative of that)}, in the order of Function in csrc/fourier_act.h
FUNCTIONS = {
    "relu": (F.relu, lambda s: (s > 0).to(s.dtype), torch.zeros_like),
    "elu": (F.elu, lambda s: torch.where(s > 0, 1, s.clamp(max=0).exp()),
            lambda s: torch.where(s > 0, 0, s.clamp(max=0).exp())),
    "sigmoid": (torch.sigmoid, lambda s: s.sigmoid() * (-s).sigmoid(),
                lambda s: s.sigmoid() * (-s).sigmoid() * (1 - 2 * s.sigmoid())),
    "tanh": (torch.tanh, lambda s: 1 - s.tanh().square(), lambda s: -2 * s.tanh() * (1 - s.tanh().square())),
}


def fourier_act(x, a, a_inv, function):
    return project(FUNCTIONS[function][0](sample(x, a)), a_inv, x)


def sample(x, a):
    """[B, fields * in_size, *spatial] -> [B, fields, samples, *spatial] in the dtype that is computed in."""
    fields = x.to(compute_dtype(x.dtype)).unflatten(1, (-1, a.shape[1]))
    return torch.einsum("gd,bfd...->bfg...", a, fields)


def project(samples, a_inv, x):
    """[B, fields, samples, *spatial] -> [B, fields * out_size, *spatial] in the dtype and memory format of x."""
    return like(torch.einsum("dg,bfg...->bfd...", a_inv, samples).flatten(1, 2).to(x.dtype), x)
