"""field_pool by its definition, field by field."""
import torch

from ..formats import compute_dtype, like

FIELD = ("channel", "size", "subfield")  # of a row of `fields`
ELEMENT = ("field", "part")              # of a row of `elements`: of each channel its field, and which subfield of all


def field_pool(x, fields, elements, norms):
    wide, pooled = x.to(compute_dtype(x.dtype)), []
    for channel, size, subfield in fields.tolist():
        parts = wide[:, channel:channel + size].unflatten(1, (-1, subfield))
        values = parts.norm(dim=2) if norms else parts.squeeze(2)
        pooled.append(values.max(1)[0])  # not amax: the gradient goes to one of equal maxima
    return like(torch.stack(pooled, 1).to(x.dtype), x)
