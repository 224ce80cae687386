"""Wigner D matrices where lie_learn is missing, against lie_learn's where it is there; escnn built on them."""
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from equiconv.wigner import wigner_D_matrix

ANGLES = [(0.0, 0.0, 0.0), (0.3, 1.1, 2.9), (5.9, 3.1, 0.2), (1.0, np.pi, -0.5), (0.4, 0.0, 1.0)]


@pytest.mark.parametrize("l", range(9))
def test_equals_lie_learn(l):
    theirs = pytest.importorskip("lie_learn.representations.SO3.wigner_d")
    for angles in ANGLES:
        np.testing.assert_allclose(wigner_D_matrix(l, *angles), theirs.wigner_D_matrix(l, *angles), atol=1e-11)


@pytest.mark.filterwarnings("ignore:Gimbal lock")
@pytest.mark.parametrize("l", range(9))
def test_is_a_representation(l):
    for first in ANGLES:
        for second in ANGLES:
            product = (Rotation.from_euler("ZYZ", first) * Rotation.from_euler("ZYZ", second)).as_euler("ZYZ")
            got = wigner_D_matrix(l, *first) @ wigner_D_matrix(l, *second)
            np.testing.assert_allclose(got, wigner_D_matrix(l, *product), atol=1e-9)


def test_only_the_real_basis():
    with pytest.raises(ValueError, match="field must be 'real', got 'complex'"):
        wigner_D_matrix(1, 0.1, 0.2, 0.3, field="complex")


def test_escnn_without_lie_learn():
    script = ("import importlib.util, sys\n"
              "find = importlib.util.find_spec\n"
              "importlib.util.find_spec = lambda name, *rest: None if name == 'lie_learn' else find(name, *rest)\n"
              "import equiconv\n"
              "from escnn.group import so3_group\n"
              "print(sys.modules['lie_learn.representations.SO3.wigner_d'].wigner_D_matrix.__module__)\n"
              "so3 = so3_group(2)\n"
              "a, b = so3.sample(), so3.sample()\n"
              "rho = so3.irrep(2)\n"
              "print(abs(rho(a) @ rho(b) - rho(a @ b)).max() < 1e-9)\n")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["equiconv.wigner", "True"]
