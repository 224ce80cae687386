"""Every public name of escnn.gspaces. octaOnR3 and icoOnR3 build their groups without escnn's cache on disk, in a
fraction of the time: escnn multiplies all pairs of group elements, one after the other, for each irrep.
"""
from contextlib import contextmanager
from threading import Lock

import escnn.gspaces as _escnn_gspaces
import numpy as np
from escnn.group.groups import ico as _ico
from escnn.group.groups import octa as _octa

globals().update({name: getattr(_escnn_gspaces, name) for name in dir(_escnn_gspaces) if not name.startswith("_")})
__all__ = list(_escnn_gspaces.__all__)

_lock = Lock()


def octaOnR3():
    """escnn.gspaces.octaOnR3."""
    with _fast_groups():
        return _escnn_gspaces.octaOnR3()


def icoOnR3():
    """escnn.gspaces.icoOnR3."""
    with _fast_groups():
        return _escnn_gspaces.icoOnR3()


def matrices_from_generators(group, generators):
    """The matrices of a representation at all elements of a group of rotations.

    group       escnn's Octahedral or Icosahedral
    generators  [(element, matrix [d, d])]

    Returns {element: [d, d]}. Raises ValueError if the elements do not generate the group, or if their matrices do not
    multiply as they do.
    """
    elements = list(group.elements)
    rotations = np.stack([e.to("MAT") for e in elements])  # [n, 3, 3]
    # left[g, e]: the index of (generator g) @ (element e), by the rotation that it is closest to
    products = np.einsum("gab,ebc->geac", np.stack([g.to("MAT") for g, _ in generators]), rotations)
    left = np.einsum("geac,fac->gef", products, rotations).argmax(-1)
    found = {elements.index(group.identity): np.eye(len(generators[0][1]))}
    frontier = list(found)
    while frontier:
        reached = []
        for table, (_, matrix) in zip(left, generators):
            for e in frontier:
                if table[e] not in found:
                    found[table[e]] = matrix @ found[e]
                    reached.append(table[e])
        frontier = reached
    if len(found) < len(elements):
        raise ValueError(f"generators must generate {group}, got {len(found)} of its {len(elements)} elements")
    rho = np.stack([found[i] for i in range(len(elements))])
    for table, (_, matrix) in zip(left, generators):
        if not np.allclose(rho[table], matrix @ rho):
            raise ValueError("generators must have matrices of a representation: their products differ")
    return dict(zip(elements, rho))


@contextmanager
def _fast_groups():
    """Puts matrices_from_generators in the place of escnn's function, in its two modules, for the time being."""
    name = "generate_irrep_matrices_from_generators"
    with _lock:
        before = [(module, getattr(module, name)) for module in (_octa, _ico)]
        try:
            for module, _ in before:
                setattr(module, name, matrices_from_generators)
            yield
        finally:
            for module, function in before:
                setattr(module, name, function)
