"""The plugin libraries against the schemas declared in Python, with or without a GPU."""
import re
from pathlib import Path

import pytest
import torch

from equiconv import backends
from equiconv.layout import PAIR
from equiconv.reference import field_batch_norm, field_dropout, field_gate, field_norm, field_pool

ROOT = Path(__file__).parent.parent
OPS = ("expand_filter", "expand_filter_bwd")
CPU_OPS = ("steerable_conv", "steerable_conv_activated", "steerable_conv_bwd", "field_norm", "field_norm_bwd",
           "field_norm_moments", "field_batch_norm", "field_batch_norm_bwd",
           "fourier_act", "fourier_act_bwd", "field_gate", "field_gate_bwd", "field_pool",
           "field_pool_bwd", "field_dropout", "concatenated_act", "concatenated_act_bwd", "window_pool",
           "window_pool_bwd", "norm_max_pool", "norm_max_pool_bwd")
PACKED_OPS = ("steerable_conv_pack", "steerable_conv_packed")  # without a derivative
TRITON_OPS = ("steerable_conv_two_pass", "steerable_conv_two_pass_bwd")

has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


@pytest.fixture(scope="module", autouse=True)
def cuda_library():
    if backends.HAS_NATIVE["cuda"]:
        torch.ops.load_library(backends.HERE / "_cuda.so")  # its stream symbol is weak: it loads on a CPU-only torch


def test_every_implementation_has_a_schema():
    assert not [d for d in torch._C._dispatch_find_dangling_impls() if "equiconv" in d]


@pytest.mark.parametrize("op", OPS)
def test_every_schema_has_an_implementation(op):
    for device_type, built in backends.HAS_NATIVE.items():
        assert has_kernel(f"equiconv::{op}", device_type.upper()) == built
    assert has_kernel(f"equiconv::{op}.triton", "CUDA")
    for overload in ("", ".triton"):
        assert has_kernel(f"equiconv::{op}{overload}", "Autograd")


@pytest.mark.parametrize("op", ["steerable_conv.fused", "steerable_conv_bwd.fused"])
def test_the_fused_convolution_is_one_of_cuda(op):
    assert all(has_kernel(f"equiconv::{op}", key) for key in ("CUDA", "Autograd"))


@pytest.mark.parametrize("op", CPU_OPS)
def test_every_schema_of_the_cpu_has_an_implementation(op):
    assert has_kernel(f"equiconv::{op}", "CPU") == backends.HAS_NATIVE["cpu"]
    assert not has_kernel(f"equiconv::{op}", "CUDA") and has_kernel(f"equiconv::{op}", "Autograd")
    if not op.startswith("steerable"):
        assert has_kernel(f"equiconv::{op}.triton", "CUDA") and has_kernel(f"equiconv::{op}.triton", "Autograd")


@pytest.mark.parametrize("op", PACKED_OPS)
def test_ops_of_packed_weights(op):
    assert has_kernel(f"equiconv::{op}", "CPU") == backends.HAS_NATIVE["cpu"]
    assert not has_kernel(f"equiconv::{op}", "CUDA")


@pytest.mark.parametrize("op", TRITON_OPS)
def test_ops_of_triton_alone(op):
    for key in ("CUDA", "Autograd"):
        assert has_kernel(f"equiconv::{op}.triton", key)
    assert f"equiconv::{op}" not in torch._C._dispatch_get_all_op_names()


def test_cuda_glue_takes_the_schemas_arguments():
    """Boxed functions check their number of arguments only when called: so call them, past the dispatcher's choice."""
    if not backends.HAS_NATIVE["cuda"] or torch.cuda.is_available():
        pytest.skip("needs _cuda and no GPU")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    table, values, ops = torch.ones(2, 3, dtype=torch.int32), torch.ones(3), torch.ops.equiconv
    with pytest.raises(RuntimeError, match="expand_filter: .*tables of a plan"):  # reached the glue's own check
        ops.expand_filter.default.redispatch(cuda, values, table, table[0], values, [1, 1], torch.float32, False, False)
    with pytest.raises(RuntimeError, match="expand_filter_bwd: .*tables of a plan"):
        ops.expand_filter_bwd.default.redispatch(cuda, values[None], table, table[0], values, 3, False)


def test_the_pair_of_python_is_that_of_cpp():
    """One name each, in the same order: the tables are read through the struct."""
    assert members("expand_filter.h", "ExpandFilterPair") == PAIR


def test_the_fields_of_python_are_those_of_cpp():
    assert members("field_norm.h", "FieldNormField") == field_norm.FIELD
    assert members("field_norm.h", "FieldNormPart") == field_batch_norm.PART
    assert members("field_gate.h", "FieldGateField") == field_gate.FIELD
    assert members("field_pool.h", "FieldPoolField") == field_pool.FIELD
    assert members("field_dropout.h", "FieldDropoutField") == field_dropout.FIELD


def members(header, struct):
    """The names of a struct's members in their order."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / header).read_text())
    return tuple(re.findall(r"\b[a-z]\w+(?=[,;])", re.search(rf"struct {struct} {{(.*?)}};", text, re.S)[1]))
