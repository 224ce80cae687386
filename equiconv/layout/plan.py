"""The plan of a layer's filter: its paths and harmonics, and the tables that the kernels read."""
import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch

from .conv_tables import conv_tables, too_large
from .factorised import factorise
from .flat_table import PADDING, FlatTable
from .folding import point_symmetrise
from .paths import find_paths
from .representations import FieldsOf, group_fields
from .two_pass import too_large as too_large_for_two_passes
from .two_pass import two_pass_tables
from .work import work_of

# One row of `pairs`, for one (input, output) pair of representations; ExpandFilterPair in csrc/expand_filter.h is the
# same. Weights of a pair are [out_fields, in_fields, paths]. "start" counts elements of `weights`, `index` or `values`.
PAIR = (
    "weights_start",         # in weights
    "paths",                 # D
    "out_fields", "in_fields",
    "out_size", "in_size",   # of the two representations
    "harmonics",             # R: the harmonics that this pair uses
    "even_harmonics",        # the first so many are even when the taps are reversed, the others odd; -1: not known
    "out_channels_start",    # in index: the first channel of each output field
    "in_channels_start",
    "row_start",             # in index: [out_size * in_size * R + 1] CSR over rows (n, m, h) of the pair's terms
    "terms_start",           # in index: path of each term, sorted by row; and in values: its coefficient
    "coefficients_start",
    "path_start",            # in index: [D + 1] CSR over paths of the pair's terms
    "path_terms_start",      # in index: (row, place among the pair's coefficients) of each term, sorted by path
    "out_basis_start",       # in values: Q_out [out_size, out_size]; -1 for the identity
    "in_basis_start",        # in values: (Q_in^-1)^T [in_size, in_size]; -1 for the identity
    "harmonics_start",       # in values: H [R, S]
    "blocks_start",          # in index: (out component, d_out, in component, d_in, start in values) of each path
)


@dataclass(frozen=True)
class Pair:
    """The paths between the fields of one input and one output representation. None of them: a zero block."""
    in_fields: FieldsOf
    out_fields: FieldsOf
    paths: list


class FilterPlan:
    """How a layer's weights become its filter.

    filter[o + i, c + j, s] = sum_p w[p] sum_(n,m,h) Q_out[i, n] T[p, n, m, h] H[h, s] Q_in^-1[m, j] for fields whose
    first channels are o and c.

    in_channels, out_channels, taps   sizes of the filter
    weights                           number of weights
    harmonics, parities               [R, S] and [R], NumPy: see folding.point_symmetrise
    pairs                             list of Pair, in the order of the weights; pairs without paths last
    """

    def __init__(self, harmonics, pairs, in_channels, out_channels):
        self.harmonics, self.parities = point_symmetrise(harmonics)
        self.pairs = pairs
        self.in_channels, self.out_channels, self.taps = in_channels, out_channels, harmonics.shape[1]
        self.weights = sum(len(p.paths) * len(p.in_fields) * len(p.out_fields) for p in pairs)
        self._pairs, self._index, self._values = _tables(pairs, self.harmonics, self.parities)
        self._placed, self._factorised = {}, {}

    def tables(self, device, dtype):
        """(pairs [P, len(PAIR)] int32, index [.] int32, values [.] of dtype) on that device."""
        key = (device, dtype)
        if key not in self._placed:
            self._placed[key] = (self._pairs.to(device), self._index.to(device), self._values.to(device, dtype))
        return self._placed[key]

    def out_components(self, device):
        """[weights] int64: the first component, of Q_out^-1 times the output, that each weight adds to.

        The components of an irrep follow each other. None where kernels do not separate into irreps of the output.
        """
        key = ("out components", device)
        if key not in self._placed:
            found = None
            if not any(path.out_slot.irrep is None for pair in self.pairs for path in pair.paths):
                found = np.concatenate([np.empty(0, np.int64), *[_out_components(pair) for pair in self.pairs]])
                with torch.inference_mode(False):  # it serves later calls that need gradients
                    found = torch.from_numpy(found).to(device)
            self._placed[key] = found
        return self._placed[key]

    def separates(self):
        """(of the input, of the output): whether all kernels separate into irreps of it."""
        layouts = [(pair.in_fields.layout, pair.out_fields.layout) for pair in self.pairs if pair.paths]
        return tuple(not any(layout.is_opaque for layout in side) for side in zip(*layouts))

    def in_irreps(self, reads, writes):
        """The plan, of the same weights, between features in the basis of their irreps: Q^-1 x in place of fields x.

        reads, writes  whether the input and the output are such; they must separate
        """
        key = ("in irreps", reads, writes)
        if not any(key[1:]):
            return self
        if key not in self._factorised:
            pairs = [Pair(_in_irreps(p.in_fields, reads), _in_irreps(p.out_fields, writes), p.paths)
                     for p in self.pairs]
            self._factorised[key] = FilterPlan(self.harmonics, pairs, self.in_channels, self.out_channels)
        return self._factorised[key]

    def factorised(self, kernel, adjoint=False):
        """FactorisedPlan for a grid of taps of shape `kernel`."""
        key = (kernel, adjoint)
        if key not in self._factorised:
            self._factorised[key] = factorise(self, kernel, adjoint)
        return self._factorised[key]

    def conv_tables(self, kernel, stride, dilation, groups, up, adjoint, device, dtype):
        """(index int32, values of dtype) on that device: see layout.conv_tables."""
        key = (kernel, stride, dilation, groups, up, adjoint, device, dtype)
        if key not in self._placed:
            problem = self.too_large_to_factorise(kernel)
            if problem is not None:
                raise ValueError(f"this layer cannot be computed in factorised form: {problem}")
            index, values = conv_tables(self.factorised(kernel, adjoint), kernel, stride, dilation, groups, up)
            self._placed[key] = index.to(device), values.to(device, dtype)
        return self._placed[key]

    def two_pass_tables(self, kernel, groups, up, adjoint, device, dtype):
        """(index int32, values of dtype) on that device, and the key of their Structure: see layout.two_pass."""
        placed = ("two passes", kernel, groups, up, adjoint, device, dtype)
        if placed not in self._placed:
            problem = self.too_large_to_factorise(kernel, in_two_passes=True)
            if problem is not None:
                raise ValueError(f"this layer cannot be computed in two passes: {problem}")
            made = ("two passes", kernel, groups, up, adjoint)
            if made not in self._factorised:
                self._factorised[made] = two_pass_tables(self.factorised(kernel, adjoint), kernel, groups, up)
            key, index, values = self._factorised[made]
            self._placed[placed] = index.to(device), values.to(device, dtype), key
        return self._placed[placed]

    def too_large_to_factorise(self, kernel, in_two_passes=False):
        """Why the kernels cannot compute this layer in factorised form, or None."""
        key = ("too large", kernel, in_two_passes)
        if key not in self._factorised:
            plans = (self.factorised(kernel, adjoint) for adjoint in (False, True))
            reasons = (too_large_for_two_passes(p, kernel) if in_two_passes else too_large(p) for p in plans)
            self._factorised[key] = next((r for r in reasons if r is not None), None)
        return self._factorised[key]

    def work(self, kernel, stride, dilation, groups, up, adjoint):
        """layout.work.Work of the stages, from the input to the output or, in the adjoint, the other way."""
        key = ("work", kernel, stride, dilation, groups, up, adjoint)
        if key not in self._factorised:
            self._factorised[key] = work_of(self.factorised(kernel, adjoint), kernel, stride, dilation, groups, up)
        return self._factorised[key]

    def __deepcopy__(self, memo):
        return self  # never changed after construction

    @torch.compiler.assume_constant_result  # of a method: some torch takes no such plan as the argument of a function
    def key(self):
        """A string that stands for this plan in the arguments of an op, in this process and for as long as it lives."""
        if self not in _keys:
            _keys[self] = key = str(next(_numbers))
            _plans[key] = self
        return _keys[self]


_plans, _keys, _numbers = WeakValueDictionary(), WeakKeyDictionary(), count()


def plan_of_key(key):
    """The plan whose key() that is."""
    return _plans[key]


def _in_irreps(fields, wanted):
    return replace(fields, layout=fields.layout.in_irreps()) if wanted else fields


def _out_components(pair):
    starts = np.array([path.out_slot.start for path in pair.paths], np.int64)
    components = np.array(pair.out_fields.channels)[:, None, None] + starts  # [out_fields, 1, paths]
    return np.broadcast_to(components, (len(pair.out_fields), len(pair.in_fields), len(starts))).ravel()


def _tables(pairs, harmonics, parities):
    index, values, rows, weights = FlatTable(np.int32), FlatTable(np.float64), [], 0
    for pair in pairs:
        out, in_ = pair.out_fields.layout, pair.in_fields.layout
        row = dict.fromkeys(PAIR, 0)
        row.update(weights_start=weights, paths=len(pair.paths), out_fields=len(pair.out_fields),
                   in_fields=len(pair.in_fields), out_size=out.size, in_size=in_.size,
                   out_channels_start=index.add(pair.out_fields.channels),
                   in_channels_start=index.add(pair.in_fields.channels))
        if pair.paths:
            row.update(_terms(pair, harmonics, parities, index, values))
            row["out_basis_start"] = -1 if out.is_split else values.add(out.change_of_basis)
            row["in_basis_start"] = -1 if in_.is_split else values.add(in_.change_of_basis_inv.T)
        weights += len(pair.paths) * len(pair.out_fields) * len(pair.in_fields)
        rows.append([row[name] for name in PAIR])
    if max(index.size, values.size, weights) >= 2**31:
        raise ValueError("this layer is too large: its tables need more than 2^31 elements")
    return torch.tensor(rows, dtype=torch.int32), index.tensor(), values.tensor(PADDING)


def _terms(pair, harmonics, parities, index, values):
    """Tables of a pair's terms: the nonzero elements of T[p, n, m, h], by row (n, m, h) and by path p."""
    used = np.unique(np.concatenate([path.harmonics for path in pair.paths]))
    used = used[np.argsort(-parities[used], kind="stable")]  # even ones first
    local = np.zeros(len(harmonics), dtype=np.int64)
    local[used] = np.arange(len(used))
    in_size, count = pair.in_fields.layout.size, len(used)
    term_path, term_row, coefficients, blocks = [], [], [], []
    for p, path in enumerate(pair.paths):
        a, b, h = path.coefficients.nonzero()
        term_row.append(((path.out_slot.start + a) * in_size + path.in_slot.start + b) * count + local[h])
        term_path.append(np.full(len(a), p))
        coefficients.append(path.coefficients[a, b, h])
        blocks.append((path.out_slot.start, path.out_slot.size, path.in_slot.start, path.in_slot.size,
                       values.add(path.coefficients @ harmonics)))
    term_path, term_row, coefficients = map(np.concatenate, (term_path, term_row, coefficients))
    rows = pair.out_fields.layout.size * in_size * count
    by_row, by_path = np.argsort(term_row, kind="stable"), np.argsort(term_path, kind="stable")
    place = np.empty_like(by_row)
    place[by_row] = np.arange(len(by_row))
    return dict(
        harmonics=count, even_harmonics=np.sum(parities[used] > 0) if parities[used].all() else -1,
        harmonics_start=values.add(harmonics[used]),
        row_start=index.add(np.searchsorted(term_row[by_row], np.arange(rows + 1))),
        terms_start=index.add(term_path[by_row]), coefficients_start=values.add(coefficients[by_row]),
        path_start=index.add(np.searchsorted(term_path[by_path], np.arange(len(pair.paths) + 1))),
        path_terms_start=index.add(np.stack([term_row[by_path], place[by_path]], 1)),
        blocks_start=index.add(blocks))


_CACHE, _CACHE_SIZE, _LOCK = OrderedDict(), 64, Lock()


def build_plan(in_representations, out_representations, bases):
    """FilterPlan of a layer.

    in_representations, out_representations  escnn representations, one for each field
    bases                                    {(input name, output name): sampled basis [D, out, in, S] tensor}, without
                                             the empty ones; the weights are ordered by the sorted names

    Layers with the same bases share the search for harmonics and paths.
    """
    in_fields, out_fields = group_fields(in_representations), group_fields(out_representations)
    names = sorted(bases)
    digest = hashlib.blake2b()
    for name in names:
        digest.update(repr((name, bases[name].shape, bases[name].dtype)).encode())
        digest.update(bases[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for name in sorted({i for i, _ in names} | {o for _, o in names}):
        layout = (in_fields.get(name) or out_fields[name]).layout
        digest.update(layout.change_of_basis)
        digest.update(repr(layout.slots).encode())
    key = digest.digest()
    with _LOCK:
        if key not in _CACHE:
            _CACHE[key] = find_paths([(bases[i, o], out_fields[o].layout, in_fields[i].layout) for i, o in names])
            if len(_CACHE) > _CACHE_SIZE:
                _CACHE.popitem(last=False)
        _CACHE.move_to_end(key)
        harmonics, found = _CACHE[key]
    return _plan(in_representations, out_representations, in_fields, out_fields, names, harmonics, found)


def _plan(in_representations, out_representations, in_fields, out_fields, names, harmonics, found):
    """FilterPlan from what find_paths says of the pairs of representation names."""
    pairs = [Pair(replace(in_fields[i], layout=in_layout), replace(out_fields[o], layout=out_layout), paths)
             for (i, o), (out_layout, in_layout, paths) in zip(names, found)]
    pairs += [Pair(in_fields[i], out_fields[o], []) for i in in_fields for o in out_fields if (i, o) not in names]
    in_channels, out_channels = (sum(r.size for r in reps) for reps in (in_representations, out_representations))
    return FilterPlan(harmonics, pairs, in_channels, out_channels)


def plan_of(basisexpansion):
    """FilterPlan of an escnn BlocksBasisExpansion, from the bases that it holds (which may come from a checkpoint).

    Of an expansion that knows its irrep blocks, from those (see nn.basisexpansion).
    """
    native = getattr(basisexpansion, "irrep_paths", lambda: None)()
    if native is not None:
        in_reprs, out_reprs = basisexpansion._in_reprs, basisexpansion._out_reprs
        return _plan(in_reprs, out_reprs, group_fields(in_reprs), group_fields(out_reprs),
                     basisexpansion._representations_pairs, *native)
    bases = {pair: basis_block(basisexpansion, pair).sampled_basis for pair in basisexpansion._representations_pairs}
    return build_plan(basisexpansion._in_reprs, basisexpansion._out_reprs, bases)


def basis_block(basisexpansion, pair):
    """The submodule that holds the buffer `sampled_basis` [D, out, in, S] of one pair of representation names."""
    return getattr(basisexpansion, f"block_expansion_{basisexpansion._escape_pair(pair)}")
