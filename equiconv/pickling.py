"""escnn's groups, gspaces, representations and field types as values: copied by reference, pickled by their definition.

escnn's own hold local functions, so that they do not pickle, and deepcopy makes objects that are equal but not
identical, whose comparison costs an np.allclose per field. None of them changes once it is built. A pickle names a
group by its factory's arguments and a representation by its irreps and change of basis; loading it returns the object
that the process has already, where there is one. This is written into escnn's classes, since its modules hold and make
such objects too.
"""
import numpy as np
from escnn.group import (
    Group,
    GroupElement,
    HomSpace,
    IrreducibleRepresentation,
    Representation,
    groups_dict,
    o2_group,
    o3_group,
)
from escnn.gspaces import GSpace, GSpace0D, GSpace2D, GSpace3D
from escnn.kernels import KernelBasis
from escnn.nn import FieldType

_SPACES, _REPRESENTATIONS = {}, {}  # those that were loaded, for later loads


def install():
    """Makes escnn's classes picklable, and deepcopy keep their objects. Called once, when equiconv is imported."""
    for cls, reduce in ((Group, _reduce_group), (GroupElement, _reduce_element), (HomSpace, _reduce_quotient),
                        (GSpace, _reduce_space), (Representation, _reduce_representation),
                        (IrreducibleRepresentation, _reduce_irrep), (FieldType, _reduce_field_type)):
        cls.__reduce__ = reduce
        cls.__copy__ = cls.__deepcopy__ = _itself
    KernelBasis.__deepcopy__ = _itself


def _itself(value, memo=None):
    return value


def _reduce_group(group):
    keys = dict(group._keys)
    if hasattr(group, "_maximum_frequency"):  # one object per process, which holds the irreps up to there
        keys["maximum_frequency"] = group._maximum_frequency
    return _group, (type(group).__name__, keys)


def _group(name, keys):
    return groups_dict[name]._generator(**keys)


def _key(group):
    return type(group).__name__, *sorted(group._keys.items())


def _reduce_element(element):
    return _element, (element.group, element.value, element.param)


def _element(group, value, param):
    return group.element(value, param)


def _reduce_quotient(quotient):
    return _quotient, (quotient.G, quotient.sgid)


def _quotient(group, subgroup_id):
    return group.homspace(subgroup_id)


def _reduce_space(space):
    if isinstance(space, GSpace0D):
        return _point, (space.fibergroup,)
    if type(space) not in (GSpace2D, GSpace3D):
        raise TypeError(f"pickle: gspace must be escnn's GSpace0D, GSpace2D or GSpace3D, got {type(space).__name__}")
    ambient = o2_group if isinstance(space, GSpace2D) else o3_group
    return _space, (type(space), space._sg_id, space.name, ambient(0)._maximum_frequency)


def _point(group):
    return _SPACES.setdefault((GSpace0D, _key(group)), GSpace0D(group))


def _space(cls, subgroup_id, name, maximum_frequency):
    key = (cls, name)  # the name tells spaces of the same subgroup apart that were written differently
    if key not in _SPACES:
        space = cls(subgroup_id, maximum_frequency=maximum_frequency)
        space.name = name
        _SPACES[key] = space
    return _SPACES[key]


def _reduce_irrep(irrep):
    return _irrep, (irrep.group, irrep.id)


def _irrep(group, id):
    return group.irrep(*id)


def _reduce_representation(representation):
    known = representation.group.representations.get(representation.name) is representation
    return _representation, (representation.group, representation.name, tuple(representation.irreps),
                             representation.change_of_basis, representation.change_of_basis_inv,
                             tuple(sorted(representation.supported_nonlinearities)), representation.attributes, known)


def _representation(group, name, irreps, change_of_basis, change_of_basis_inv, nonlinearities, attributes, known):
    """The representation of that content. `known`: its group listed it under its name (regular, quotient, ...)."""
    def is_same(other):
        return (tuple(other.irreps) == irreps and other.supported_nonlinearities == set(nonlinearities)
                and np.array_equal(other.change_of_basis, change_of_basis))

    listed = group.representations.get(name)
    candidates = _REPRESENTATIONS.setdefault((_key(group), name), [])
    for candidate in ([listed] if listed else []) + candidates:
        if is_same(candidate):
            return candidate
    # the constructor refuses a name that the group lists, even for another machine's basis of the same representation
    made = Representation(group, f"{name} (loaded)" if listed else name, list(irreps), change_of_basis,
                          list(nonlinearities), change_of_basis_inv=change_of_basis_inv, **attributes)
    made.name = name
    candidates.append(made)
    if known:
        group.representations.setdefault(name, made)
    return made


def _reduce_field_type(field_type):
    return FieldType, (field_type.gspace, field_type.representations)
