"""field_pool by its definition, field by field."""
import torch

from ..formats import compute_dtype, like

FIELD = ("channel", "size", "subfield")  # of a row of `fields`
ELEMENT = ("field", "part")              # of a row of `elements`: of each channel its field, and which subfield of all


def field_pool(x, fields, elements, norms, directions=None):
    wide, pooled = x.to(compute_dtype(x.dtype)), []
    for channel, size, subfield in fields.tolist():
        parts = wide[:, channel:channel + size].unflatten(1, (-1, subfield))
        values = parts.norm(dim=2) if norms else parts.squeeze(2)
        largest, part = values.max(1, keepdim=True)  # not amax: the gradient goes to one of equal maxima
        if directions is not None:
            largest = largest.relu() * directions[part.squeeze(1)].movedim(-1, 1)
        pooled.append(largest)
    return like(torch.cat(pooled, 1).to(x.dtype), x)
