"""The kernels of the two passes compiled ahead of time, for sm_80 and sm_90: no register is spilled."""
import pytest

from equiconv import backends
from tests.triton_processes import compiles_without_spills

# groups and kernel sizes of each kind
LAYERS = ("c8_16_k3", "c8_16_k5", "c8_cnn_layer1", "d8_16_k5", "c16_32_k5", "so2_16_k5", "o2_16_k5", "so3_16_k3",
          "so3_16_k5", "octahedral_8_k3", "octahedral_8_k5", "ico_regular")
pytestmark = pytest.mark.skipif(not backends.HAS_TRITON, reason="needs triton")


@pytest.mark.slow  # .ci/run calls tests.triton_aot
def test_a_small_layer():
    compiles_without_spills("--modules", "steerable_conv", "--archs", "90", "--dtypes", "fp32", "--layers",
                            "trivial_group")


@pytest.mark.slow
@pytest.mark.parametrize("dtypes,layers", [
    (("fp32",), LAYERS), (("fp32", "bf16"), LAYERS), (("fp32", "fp16"), ("c8_16_k3",)), (("fp64",), ("c8_16_k3",))],
    ids=["float32", "bfloat16", "float16", "float64"])
def test_layers(dtypes, layers):
    compiles_without_spills("--modules", "steerable_conv", "--dtypes", *dtypes, "--layers", *layers)
