"""escnn.nn.init without its loops over weights: the same distributions, and the same draws from the same generators."""
from collections import defaultdict

import escnn.nn.init as _escnn_init
import numpy as np
import torch
from escnn.nn.init import *  # noqa: F403
from escnn.nn.modules.basismanager import BlocksBasisExpansion
from scipy import stats

globals().update({name: getattr(_escnn_init, name) for name in dir(_escnn_init)
                  if not name.startswith("_") and name not in globals()})
__all__ = ["deltaorthonormal_init", "generalized_he_init"]


def generalized_he_init(tensor, basismanager, cache=False):
    """He's initialisation for steerable bases (M. Weiler, F. A. Hamprecht, M. Storath, Learning Steerable Filters for
    Rotation Equivariant CNNs, 2018, section 3.4).

    tensor        [basismanager.dimension()] weights, which are overwritten
    basismanager  basis expansion of the layer: module.basisexpansion
    cache         of escnn's, without effect: nothing here is slow

    Raises ValueError if the tensor has another shape.
    """
    _check(tensor, basismanager)
    if not isinstance(basismanager, BlocksBasisExpansion):
        return _escnn_init.generalized_he_init(tensor, basismanager, cache)
    deviations = _he_deviations(basismanager)
    tensor[:] = deviations.to(device=tensor.device) * torch.randn_like(tensor)


def deltaorthonormal_init(tensor, basismanager):
    """Delta-orthogonal initialisation (L. Xiao et al., Dynamical Isometry and a Mean Field Theory of CNNs, 2018): for
    each irrep an orthogonal map at the centre of the kernel, and nothing elsewhere.

    tensor        [basismanager.dimension()] weights, which are overwritten
    basismanager  basis expansion of the layer: module.basisexpansion

    Draws from the generators of NumPy and of torch. Raises ValueError if the tensor has another shape, or if the fields
    of the layer do not allow it.
    """
    _check(tensor, basismanager)
    if not isinstance(basismanager, BlocksBasisExpansion):
        return _escnn_init.deltaorthonormal_init(tensor, basismanager)
    tensor.fill_(0.0)
    irreps, places = _central_elements(basismanager)
    for irrep in irreps:
        weights, inputs, outputs = (np.concatenate(parts) for parts in zip(*places[irrep]))
        inputs, in_order = _by_appearance(inputs)
        outputs, out_order = _by_appearance(outputs)
        n_in, n_out = len(in_order), len(out_order)
        pair = outputs * n_in + inputs
        counts = np.bincount(pair, minlength=n_in * n_out)
        if len(set(counts)) != 1:
            raise ValueError(f"deltaorthonormal_init: every output of irrep {irrep} must have equally many elements at "
                             f"radius 0 from every input, got from {counts.min()} to {counts.max()}")
        copies = int(counts[0])
        if max(n_in, n_out) > 1:
            mixing = torch.from_numpy(stats.ortho_group.rvs(max(n_in, n_out))[:n_out, :n_in]).float()
        else:
            mixing = 2 * torch.randint(0, 1, size=(1, 1)) - 1
        w = torch.randn((n_out, copies))
        w *= 5.0
        w /= (w ** 2).sum(dim=1, keepdim=True).sqrt()
        copy = np.empty(len(pair), dtype=np.int64)  # which of the elements of its pair each weight is
        order = np.argsort(pair, kind="stable")
        copy[order] = np.tile(np.arange(copies), n_in * n_out)
        values = w[outputs, copy] * mixing[outputs, inputs]
        tensor[torch.from_numpy(weights).to(tensor.device)] = values.to(tensor)


def _check(tensor, basismanager):
    if tuple(tensor.shape) != (basismanager.dimension(),):
        raise ValueError(f"tensor must have shape ({basismanager.dimension()},), one weight for each element of the "
                         f"basis, got {tuple(tensor.shape)}")


def _blocks(expansion):
    """[(input name, output name, attributes of its elements)] of each pair of representations, as the weights lie."""
    return [(i, o, list(getattr(expansion, f"block_expansion_{expansion._escape_pair((i, o))}").get_basis_info()))
            for i, o in expansion._representations_pairs]


def _he_deviations(expansion):
    """[weights] float32: 1 / sqrt(irreps that reach an output irrep * elements from that input irrep to it)."""
    blocks = _blocks(expansion)
    elements = defaultdict(int)  # (output name, index of the irrep in it, input irrep) -> elements that reach it
    for i, o, attributes in blocks:
        for attribute in attributes:
            elements[o, attribute["out_irrep_idx"], attribute["in_irrep"]] += expansion._in_count[i]
    irreps = defaultdict(int)
    for o, position, _ in elements:
        irreps[o, position] += 1
    found = []
    for i, o, attributes in blocks:
        of_element = [irreps[o, a["out_irrep_idx"]] * elements[o, a["out_irrep_idx"], a["in_irrep"]]
                      for a in attributes]
        deviations = torch.tensor(1 / np.sqrt(np.array(of_element, dtype=np.float64)), dtype=torch.float32)
        found.append(deviations.repeat(expansion._in_count[i] * expansion._out_count[o]))
    return torch.cat(found)


def _central_elements(expansion):
    """The weights of elements at radius 0 between equal irreps.

    Returns the irreps in the order of the weights, and {irrep: [(weights, input positions, output positions) arrays]},
    where positions count the irreps of all fields.
    """
    starts = {}
    for key, representations in (("in", expansion._in_reprs), ("out", expansion._out_reprs)):
        position = 0
        for representation in representations:
            starts.setdefault((key, representation.name), []).append(position)
            position += len(representation.irreps)
    irreps, places = [], defaultdict(list)
    for i, o, attributes in _blocks(expansion):
        inputs, outputs = np.array(starts["in", i]), np.array(starts["out", o])
        first = expansion._weights_ranges[i, o][0]
        weights = first + np.arange(len(outputs) * len(inputs) * len(attributes)).reshape(len(outputs), len(inputs), -1)
        central = [(p, a) for p, a in enumerate(attributes)
                   if a["in_irrep"] == a["out_irrep"] and abs(a.get("radius", 0.0)) == 0.0]
        for irrep in dict.fromkeys(a["in_irrep"] for _, a in central):
            if irrep not in irreps:
                irreps.append(irrep)
            chosen = [(p, a["in_irrep_idx"], a["out_irrep_idx"]) for p, a in central if a["in_irrep"] == irrep]
            p, in_index, out_index = (np.array(column) for column in zip(*chosen))
            shape = (len(outputs), len(inputs), len(p))
            places[irrep].append((weights[:, :, p].ravel(),
                                  np.broadcast_to(inputs[None, :, None] + in_index, shape).ravel(),
                                  np.broadcast_to(outputs[:, None, None] + out_index, shape).ravel()))
    return irreps, places


def _by_appearance(positions):
    """(index [n] of each position in the order of first appearance, the positions in that order)."""
    values, first, index = np.unique(positions, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[index.reshape(-1)], values[order]
