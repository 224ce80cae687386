"""The irreps of a subgroup in the irreps of O(2) and O(3), which act on the harmonics of the plane and of space."""
import numpy as np
from escnn.group import O2, GroupElement

from .averaging import embeddings, haar_rule, irrep_matrices, matrices
from .cache import Memory
from .clebsch_gordan import frequency

_restrictions = Memory(4096)


def restriction(group, subgroup_id, irrep):
    """Where the irreps of a subgroup lie in an irrep of O(2) or O(3).

    group        escnn's O2 or O3
    subgroup_id  of the subgroup, as group.subgroup takes it; None for the group itself
    irrep        id of an irrep of the group

    Returns {id of an irrep j of the subgroup: [d_j, d_irrep, multiplicity]}, projections onto the copies of j.
    """
    if subgroup_id is None:
        size = group.irrep(*irrep).size
        return {irrep: np.eye(size)[:, :, None]}
    subgroup_id = group._process_subgroup_id(subgroup_id)
    key = (type(group), subgroup_key(subgroup_id), irrep)
    return _restrictions.get(key, lambda: _restriction(group, subgroup_id, irrep))


def subgroup_key(subgroup_id):
    """Hashable, and equal for equal ids only: elements that are part of an id print rounded."""
    if isinstance(subgroup_id, tuple):
        return tuple(subgroup_key(part) for part in subgroup_id)
    if isinstance(subgroup_id, GroupElement):
        return subgroup_id.param, subgroup_key(subgroup_id.value)
    return subgroup_id.tobytes() if isinstance(subgroup_id, np.ndarray) else subgroup_id


def _restriction(group, subgroup_id, irrep):
    subgroup, inclusion, _ = group.subgroup(subgroup_id)
    if isinstance(group, O2) or _has_formula(subgroup_id[:-1]):
        change_of_basis, ids = group._restrict_irrep(irrep, subgroup_id)  # escnn's formulas
        found, row = {}, 0
        for j in ids:
            size = subgroup.irrep(*j).size
            found.setdefault(tuple(j), []).append(np.asarray(change_of_basis, dtype=np.float64).T[row:row + size])
            row += size
        return {j: np.stack(rows, axis=-1) for j, rows in found.items()}
    whole, found = group.irrep(*irrep), {}
    candidates = subgroup.irreps()
    highest = max(frequency(j.id) for j in candidates) if subgroup.order() <= 0 else 0
    bandlimit = frequency(irrep) + highest
    elements, weights = haar_rule(subgroup, bandlimit)
    rho = matrices(whole, [inclusion(g) for g in elements])
    for j in candidates:
        copies = embeddings(irrep_matrices(j, bandlimit), rho, weights, j.endomorphism_basis())
        if len(copies):
            found[j.id] = copies.transpose(2, 1, 0)
    return found


def _has_formula(subgroup_id):
    """Whether escnn restricts irreps of O(3) to the subgroup in closed form."""
    if subgroup_id in ((True, "so3"), (False, "so3"), ("cone", -1), (True, False, 1)):
        return True
    return len(subgroup_id) == 3 and subgroup_id[0] is False and not isinstance(subgroup_id[1], str)
