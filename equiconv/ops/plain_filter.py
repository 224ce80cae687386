import numpy as np
import torch


def plain_filter(weights, plan, kernel_size, transposed=False):
    """expand_filter in operations that every exporter knows: for graphs that run without equiconv, as ONNX does.

    One product with a dense basis per pair of representations; the bases become constants of the graph.

    weights      [plan.weights]
    plan         layout.FilterPlan
    kernel_size  tuple of the spatial sizes
    transposed   as torch's transposed convolutions want it

    Returns [out_channels, in_channels, *kernel_size], or [in_channels, out_channels, *kernel_size] if transposed.
    """
    blocks, starts, position = {}, [], 0
    for pair in plan.pairs:
        starts.append(position)
        position += len(pair.paths) * len(pair.out_fields) * len(pair.in_fields)
    for pair, start in zip(plan.pairs, starts):
        blocks[pair.out_fields.channels, pair.in_fields.channels] = _block(weights, start, pair, plan)
    outs, ins = ({getattr(p, side).channels: getattr(p, side).layout.size for p in plan.pairs}
                 for side in ("out_fields", "in_fields"))
    filter = torch.cat([torch.cat([blocks[o, i] for i in ins], 1) for o in outs], 0)
    filter = filter.index_select(0, _places(outs, weights.device)).index_select(1, _places(ins, weights.device))
    filter = filter.unflatten(2, kernel_size) if kernel_size else filter.squeeze(2)
    return filter.transpose(0, 1) if transposed else filter


def _block(weights, start, pair, plan):
    """The filter between the fields of a pair: [out_fields * out_size, in_fields * in_size, taps]."""
    outs, ins = pair.out_fields, pair.in_fields
    shape = (len(outs), len(ins), len(pair.paths))
    if not pair.paths:
        return weights.new_zeros(len(outs) * outs.layout.size, len(ins) * ins.layout.size, plan.taps)
    basis = np.stack([_kernel(path, outs.layout, ins.layout, plan.harmonics) for path in pair.paths])
    basis = torch.from_numpy(basis).to(weights.device, weights.dtype)
    own = weights.narrow(0, start, shape[0] * shape[1] * shape[2]).view(shape)
    return torch.einsum("ocp,pijs->oicjs", own, basis).flatten(2, 3).flatten(0, 1)


def _kernel(path, out_layout, in_layout, harmonics):
    """Q_out (T H) Q_in^-1 of one path: [out_size, in_size, taps]."""
    left = out_layout.change_of_basis[:, path.out_slot.components]
    right = in_layout.change_of_basis_inv[path.in_slot.components]
    return np.einsum("ia,abs,bj->ijs", left, path.coefficients @ harmonics, right, optimize=True)


def _places(fields, device):
    """Where each channel of the type lies among channels that are grouped by representation."""
    channels = [start + i for starts, size in fields.items() for start in starts for i in range(size)]
    return torch.from_numpy(np.argsort(channels)).to(device)
