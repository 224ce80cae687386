"""field_gate by its definition, all fields at once; and its gradient by torch's own derivatives."""
import torch
import torch.nn.functional as F

from ..formats import compute_dtype, like

FIELD = ("channel", "out_channel", "size", "gate", "gate_out", "bias")  # of a row of `fields`
ELEMENT = ("channel", "out_channel", "field")                           # of a row of `elements`
#: {name: function of the norm less its bias}, in the order of GateFunction in csrc/field_gate.h; None: of a gate
FUNCTIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "softplus": F.softplus, "squash": lambda n: n / (1 + n),
             "gate": None}


def field_gate(x, gates, bias, fields, elements, function, eps, out_channels):
    wide, spatial = x.to(compute_dtype(x.dtype)), (None,) * (x.dim() - 2)
    channel, out_channel, field = elements.unbind(1)
    parts = wide.index_select(1, channel)
    shift = 0 if bias is None else bias.index_select(0, fields[:, FIELD.index("bias")])[(...,) + spatial]
    if function == "gate":
        source = wide if gates is None else gates.to(wide.dtype)
        m = torch.sigmoid(source.index_select(1, fields[:, FIELD.index("gate")]) - shift)  # [B, fields, *spatial]
    else:
        square = wide.new_zeros(len(x), len(fields), *x.shape[2:]).index_add(1, field, parts.square())
        is_large = square > eps.square()
        norm = torch.where(is_large, square, 1).sqrt()
        m = torch.where(is_large, FUNCTIONS[function](norm - shift) / norm, 0)
    y = wide.new_zeros(len(x), out_channels, *x.shape[2:])
    y = y.index_copy(1, out_channel, parts * m.index_select(1, field))
    if out_channels > len(elements):  # the gates stay
        y = y.index_copy(1, fields[:, FIELD.index("gate_out")], m)
    return like(y.to(x.dtype), x)


def field_gate_bwd(grad, x, gates, bias, fields, elements, function, eps):
    """(grad_x, grad_gates, grad_bias); the last two empty where there are no gates, and no bias."""
    given = [t for t in (x, gates, bias) if t is not None]

    def forward(*given):
        remaining = iter(given)
        inputs = [None if t is None else next(remaining) for t in (x, gates, bias)]
        return field_gate(*inputs, fields, elements, function, eps, grad.shape[1])

    grads = iter(torch.func.vjp(forward, *given)[1](grad))
    grad_x = next(grads)
    grad_gates = next(grads) if gates is not None else x.new_empty(len(x), 0, *x.shape[2:])
    return like(grad_x, x), grad_gates, next(grads) if bias is not None else x.new_empty(0, dtype=torch.float32)
