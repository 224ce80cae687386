"""The Triton kernels of expand_filter in each of their configurations: interpreted, and compiled ahead of time."""
import pytest
import torch
from escnn import gspaces, nn

from equiconv import backends
from equiconv.layout import plan_of
from equiconv.reference import expand_filter as reference
from tests.triton_processes import compiles_without_spills

if not backends.HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)
from equiconv.triton_kernels import expand_filter as kernels

# several tiles of everything
SMALLEST = {"BLOCK_PAIRS": 2, "BLOCK_FIELDS": 16, "BLOCK_ELEMENTS": 16, "BLOCK_PATHS": 16}


@pytest.mark.triton
@pytest.mark.parametrize("config", [*kernels.CONFIGS, kernels.IN_INTERPRETER, SMALLEST])
@pytest.mark.parametrize("dtype, programs, splits", [
    (torch.float32, 2, 1), (torch.float64, 1024, 64), (torch.bfloat16, 1024, 64)])
def test_configurations(monkeypatch, config, dtype, programs, splits):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not backends.TRITON_INTERPRET:
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    monkeypatch.setattr(kernels, "config", lambda *_: config)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    monkeypatch.setattr(kernels, "MAX_SPLITS", splits)
    g = gspaces.rot2dOnR2(4)
    t = nn.FieldType(g, [g.trivial_repr, g.regular_repr, g.irrep(2), g.trivial_repr])
    plan = plan_of(nn.R2Conv(t, t, 3, initialize=False).basisexpansion)
    size = [plan.out_channels, plan.in_channels, 3, 3]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randn(plan.weights, dtype=acc, device=device, requires_grad=True)
    exact_tables = plan.tables(device, torch.float64)
    exact = reference.expand_filter(weights.double(), *exact_tables, size, torch.float64, True, False)

    filter = kernels.expand_filter(weights.detach(), *plan.tables(device, acc), size, dtype, True, False)
    torch.testing.assert_close(filter, exact.detach().to(dtype))
    assert filter.stride() == exact.stride()

    grad_filter = torch.randn_like(filter)
    grad_weights = kernels.expand_filter_bwd(grad_filter, *plan.tables(device, acc), plan.weights, False)
    torch.testing.assert_close(grad_weights, torch.autograd.grad(exact, weights, grad_filter.double())[0])


@pytest.mark.slow  # .ci/run calls tests.triton_aot
def test_ahead_of_time():
    compiles_without_spills("--modules", "expand_filter")
