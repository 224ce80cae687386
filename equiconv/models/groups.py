"""Groups of rotations and reflections of the plane by name."""
import re


def parse_group(name):
    """(has reflections, rotations) of C8, D4, ... Raises ValueError for another name."""
    match = re.fullmatch(r"([CD])([1-9]\d*)", name)
    if not match:
        raise ValueError(f"a group must be C or D and a number of rotations, as in D8, got {name!r}")
    return match[1] == "D", int(match[2])


def plane_of(reflections, rotations, frequency=None):
    """escnn's space: the plane with those symmetries.

    rotations  by multiples of 360/rotations degrees; -1: by all angles
    frequency  up to which irreps are needed, where rotations is -1
    """
    from escnn import gspaces

    if rotations == 1:
        return gspaces.flip2dOnR2() if reflections else gspaces.trivialOnR2()
    make = gspaces.flipRot2dOnR2 if reflections else gspaces.rot2dOnR2
    return make(-1, maximum_frequency=frequency) if rotations == -1 else make(rotations)


def restriction(nn, fields, reflections, rotations):
    """The modules that take the fields as fields of a subgroup, split into its own fields."""
    subgroup = rotations
    if fields.gspace.flips_order > 0:
        subgroup = 0 if reflections else None, rotations
    restrict = nn.RestrictionModule(fields, subgroup)
    return [restrict, nn.DisentangleModule(restrict.out_type)]
