import escnn.gspaces
import numpy as np
import pytest
from escnn import group
from escnn.group.groups import ico, octa

from equiconv import gspaces

GROUPS = {"octahedral": group.octa_group, "icosahedral": group.ico_group}


@pytest.mark.parametrize("name", GROUPS)
def test_matrices_from_generators(name):
    G = GROUPS[name]()
    for irrep in G.irreps():
        generators = [(g, irrep(g)) for g in G._generators]
        found = gspaces.matrices_from_generators(G, generators)
        assert list(found) == list(G.elements)
        for element, matrix in found.items():
            np.testing.assert_allclose(matrix, irrep(element), atol=1e-12)


def test_bad_generators():
    G = group.octa_group()
    irrep = G.irrep(1)
    first, *others = ((g, irrep(g)) for g in G._generators)
    with pytest.raises(ValueError, match="generators must generate Octahedral, got . of its 24 elements"):
        gspaces.matrices_from_generators(G, [first])
    with pytest.raises(ValueError, match="matrices of a representation"):
        gspaces.matrices_from_generators(G, [first, *((g, 2 * matrix) for g, matrix in others)])


def test_gspaces_are_those_of_escnn():
    assert gspaces.octaOnR3() == escnn.gspaces.octaOnR3() and gspaces.icoOnR3() == escnn.gspaces.icoOnR3()
    assert set(escnn.gspaces.__all__) <= set(dir(gspaces)) and gspaces.__all__ == escnn.gspaces.__all__


def test_a_group_is_built_without_escnns_products(monkeypatch):
    def slow(*_):
        raise AssertionError("escnn's products were taken")

    for module in (octa, ico):
        monkeypatch.setattr(module, "generate_irrep_matrices_from_generators", slow)
    # as in a process that has built no group and has no cache on disk
    monkeypatch.setattr(octa, "_build_octa_irrep_picklable", octa._build_octa_irrep_picklable.func)
    with gspaces._fast_groups():
        G = octa.Octahedral()
    assert octa.generate_irrep_matrices_from_generators is slow
    for irrep in G.irreps():
        g, h = G._generators[:2]
        np.testing.assert_allclose(irrep(g @ h), irrep(g) @ irrep(h), atol=1e-12)
    with pytest.raises(AssertionError, match="escnn's products"):
        octa.Octahedral()
