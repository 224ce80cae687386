"""The kernels of the two passes compiled ahead of time: no register is spilled, for sm_80 or sm_90, whatever the layer."""
import pytest

from equiconv import backends
from tests.triton_processes import compiles_without_spills

pytestmark = pytest.mark.skipif(not backends.HAS_TRITON, reason="needs triton")


def test_a_small_layer():
    compiles_without_spills("--modules", "steerable_conv", "--archs", "90", "--dtypes", "fp32", "--layers",
                            "trivial_group")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_all_layers(dtype):
    compiles_without_spills("--modules", "steerable_conv", "--dtypes", *{"fp32", dtype})
