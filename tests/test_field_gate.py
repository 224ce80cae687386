"""field_gate against its definition; the modules on it against escnn in float64."""
import escnn.nn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import equiconv.nn
from equiconv.formats import compute_dtype
from equiconv.ops import field_gate
from equiconv.ops.field_gate import FUNCTIONS
from tests.field_tables import DTYPES, SHAPES, assert_close, assert_threads_change_nothing, random, tensor
from tests.modules import MODULES, first_field, gated, mixed, plane, vectors

OPS = torch.ops.equiconv
KINDS = ("norm", "gates in x", "gates in x, kept", "gates apart")
STRUCTURES = {"one": [1], "interleaved": [3, 1, 8, 3, 2, 8], "many": [2, 7] * 12, "wide": [40, 17, 5]}
each_structure = pytest.mark.parametrize("structure", STRUCTURES)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def arguments(structure, kind, shape, dtype=torch.float64, channels_last=False, function="softplus", has_bias=True):
    """(x, bias or None, gates or None), and what follows them; the gates lie in turn before and behind their fields."""
    sizes, channel, out_channel, rows = STRUCTURES.get(structure) if isinstance(structure, str) else structure, 0, 0, []
    for f, size in enumerate(sizes):
        gate = gate_out = -1
        if kind.startswith("gates in x"):
            gate, channel = (channel, channel + 1) if f % 2 else (channel + size, channel)
            if kind.endswith("kept"):
                gate_out, out_channel = (out_channel, out_channel + 1) if f % 2 else (out_channel + size, out_channel)
        elif kind == "gates apart":
            gate = len(sizes) - 1 - f
        rows.append((channel, out_channel, size, gate, gate_out, (f + 1) % len(sizes)))
        channel = max(channel + size, gate + 1 if kind != "gates apart" else 0)
        out_channel = max(out_channel + size, gate_out + 1)
    elements = [(row[0] + i, row[1] + i, f) for f, row in enumerate(rows) for i in range(row[2])]
    bias = random(len(sizes), seed=1, dtype=compute_dtype(dtype)) if has_bias else None
    gates = tensor(shape, len(sizes), dtype, channels_last, seed=2) if kind == "gates apart" else None
    rest = dict(fields=torch.tensor(rows), elements=torch.tensor(elements), out_channels=out_channel,
                function=function if kind == "norm" else "gate",
                eps=torch.tensor(1e-10, dtype=compute_dtype(dtype)) if kind == "norm" else None)
    return [tensor(shape, channel, dtype, channels_last), bias, gates], rest


def with_gradients(backend, leaves, rest, grad):
    leaves = [t if t is None else t.detach().requires_grad_() for t in leaves]
    x, bias, gates = leaves
    y = field_gate(x, bias, gates=gates, **rest, backend=backend)
    return y, *torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(y.dtype))


def assert_equals_reference(leaves, rest, dtype):
    x = leaves[0]
    grad = random(x.shape[0], rest["out_channels"], *x.shape[2:], seed=3, dtype=dtype)
    got = with_gradients("native", leaves, rest, grad)
    double = {k: v.double() if k == "eps" and v is not None else v for k, v in rest.items()}
    want = with_gradients("reference", [None if t is None else t.double() for t in leaves], double, grad)
    for g, w, of in zip(got, want, [x, *[t for t in leaves if t is not None]], strict=True):
        assert g.dtype == of.dtype
        assert_close(g, w, g.dtype)
    assert x.numel() == 0 or got[1].stride() == x.stride()


@each_structure
@each_kind
@each_shape
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(structure, kind, shape, dtype, channels_last):
    assert_equals_reference(*arguments(structure, kind, shape, dtype, channels_last), dtype)


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f != "gate"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_of_the_norm(function, has_bias, dtype):
    has_bias = has_bias and function != "squash"  # of norms, which are not negative
    leaves, rest = arguments("interleaved", "norm", "wide_plane", dtype, function=function, has_bias=has_bias)
    leaves[0][:, :, 3] = 0  # where the norm has no derivative
    leaves[0][:, :, 5] *= 40
    assert_equals_reference(leaves, rest, dtype)


@pytest.mark.usefixtures("isa")
def test_instruction_sets():
    for dtype in DTYPES:
        for kind in KINDS:
            for channels_last in (False, True):
                test_values_and_gradients("interleaved", kind, "wide_plane", dtype, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_change_nothing(channels_last):
    leaves, rest = arguments("many", "norm", (8, 33, 31), torch.float32, channels_last)
    grad = random(8, rest["out_channels"], 33, 31, seed=3, dtype=torch.float32)
    assert_threads_change_nothing(lambda: with_gradients("native", leaves, rest, grad))


@each_kind
@each_format
@pytest.mark.usefixtures("one_thread")
def test_derivatives(kind, channels_last):
    leaves, rest = arguments([2, 1, 3], kind, (2, 2, 2), channels_last=channels_last)
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    given = [t for t in leaves if t is not None]

    def public(*given):
        x, bias, *gates = given
        return field_gate(x, bias, gates=gates[0] if gates else None, **rest)

    def registered(*given):
        x, bias, *gates = given
        return OPS.field_gate(x, gates[0] if gates else None, bias, rest["fields"], rest["elements"],
                              FUNCTIONS.index(rest["function"]), rest["eps"], rest["out_channels"])

    for f in (public, registered):
        assert torch.autograd.gradcheck(f, given)
        assert torch.autograd.gradgradcheck(f, given)


@each_kind
def test_opcheck(kind):
    for channels_last in (False, True):
        for requires_grad in (False, True):
            leaves, rest = arguments("interleaved", kind, "plane", torch.float32, channels_last)
            x, bias, gates = (None if t is None else t.requires_grad_(requires_grad) for t in leaves)
            call = (x, gates, bias, rest["fields"], rest["elements"], FUNCTIONS.index(rest["function"]), rest["eps"])
            opcheck(OPS.field_gate.default, (*call, rest["out_channels"]))
            grad = torch.randn_like(OPS.field_gate(*call, rest["out_channels"]).detach())
            utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
            opcheck(OPS.field_gate_bwd.default, (grad, *call), test_utils=utilities)


def test_compile():
    leaves, rest = arguments("interleaved", "norm", "plane", torch.float32)

    def f(x, bias):
        return field_gate(x * 2, bias, **rest).sin()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    bias = leaves[1].requires_grad_()
    for shape in ("plane", "wide_plane"):
        x = tensor(shape, leaves[0].shape[1], torch.float32).requires_grad_()
        torch.testing.assert_close(compiled(x, bias), f(x, bias))
        got, want = (torch.autograd.grad(g(x, bias).sum(), [x, bias]) for g in (compiled, f))
        torch.testing.assert_close(got, want)


def test_bad_arguments():
    (x, bias, _), rest = arguments("interleaved", "norm", "plane", torch.float32)
    for options, match in (({"function": "elu"}, "function must be one of"), ({"function": "gate"}, "eps belongs to"),
                           ({"fields": rest["fields"].int()}, "fields must be int64"),
                           ({"elements": rest["elements"][:, :2]}, r"elements must be int64 \[n, 3\]"),
                           ({"bias": bias.double()}, "bias must have dtype"), ({"x": x[0, 0, 0]}, r"x must be \[B, C"),
                           ({"gates": x[:1]}, "gates must have the dtype, batch and spatial size")):
        with pytest.raises(ValueError, match=match):
            field_gate(**{"x": x, "bias": bias, **rest, **options})
    call = [x, None, bias, rest["fields"], rest["elements"], 0, rest["eps"], rest["out_channels"]]
    for place, bad, match in ((0, x[:, :-1].contiguous(), "do not fit"), (2, bias[:-1], "do not fit"),
                              (2, bias.double(), "bias and eps"), (5, 9, "function"), (7, 3, "do not fit"),
                              (0, x[..., ::2], "contiguous or channels_last"), (3, rest["fields"][:, :3], "table")):
        with pytest.raises(RuntimeError, match=match):
            OPS.field_gate(*call[:place], bad, *call[place + 1:])


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.sampled_from(KINDS), st.integers(0, 3),
       st.lists(st.integers(1, 40), max_size=2), st.booleans(), st.booleans())
def test_any_structure(sizes, kind, batch, spatial, channels_last, has_bias):
    call = arguments(sizes, kind, (batch, *spatial), channels_last=channels_last, has_bias=has_bias)
    assert_equals_reference(*call, torch.float64)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written():
    for kind in KINDS:
        for channels_last in (False, True):
            test_values_and_gradients("interleaved", kind, "wide_plane", torch.float32, channels_last)


# ---- the modules ----

def apart():
    return escnn.nn.FieldType(plane(), 5 * [plane().trivial_repr])


CASES = [("NormNonLinearity", lambda n, function=function: n.NormNonLinearity(vectors(), function))
         for function in ("n_relu", "n_sigmoid", "n_softplus")]
CASES += [("NormNonLinearity", lambda n: n.NormNonLinearity(vectors(), "squash", bias=False)),
          ("NormNonLinearity", lambda n: n.NormNonLinearity(first_field(vectors()), "n_relu")),
          ("InducedNormNonLinearity", MODULES["InducedNormNonLinearity"].make),
          ("GatedNonLinearity1", lambda n: n.GatedNonLinearity1(
              gated(), ["gate", "gated", "gate", "gated", "gated", "gate"], drop_gates=False)),
          ("GatedNonLinearity2", lambda n: n.GatedNonLinearity2((apart(), mixed())))]
CASES += [(name, MODULES[name].make) for name in ("GatedNonLinearity1", "InducedGatedNonLinearity1",
                                                  "GatedNonLinearityUniform")]


@pytest.mark.parametrize("name,make", CASES)
@each_format
def test_modules_equal_escnn_in_double(name, make, channels_last, monkeypatch):
    monkeypatch.setattr(torch, "float", torch.float64)  # escnn's gates make float32 of everything
    theirs, ours = make(escnn.nn).double(), make(equiconv.nn).double()
    with torch.no_grad():
        for module in (theirs, ours):
            for key, parameter in sorted(module.named_parameters()):
                if parameter.requires_grad:
                    parameter.copy_(0.3 * random(*parameter.shape, seed=len(key)))
    types = theirs.in_type if isinstance(theirs.in_type, tuple) else (theirs.in_type,)
    for size in ((3, 6, 5), (2, 17, 17), (4, 1, 1)):
        size += size[:1] * (types[0].gspace.dimensionality - 2)
        inputs = [tensor(size, t.size, channels_last=channels_last, seed=i).requires_grad_()
                  for i, t in enumerate(types)]
        results = []
        for module in (theirs, ours):
            plain = [x.detach().contiguous().requires_grad_() if module is theirs else x for x in inputs]
            y = module(*[t(x) for t, x in zip(types, plain)]).tensor
            leaves = [*plain, *[p for _, p in sorted(module.named_parameters()) if p.requires_grad]]
            results.append((y, *torch.autograd.grad(y, leaves, random(*y.shape, seed=9))))
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["NormNonLinearity", "InducedNormNonLinearity", "GatedNonLinearity1",
                                  "GatedNonLinearity2", "InducedGatedNonLinearity1", "GatedNonLinearityUniform"])
def test_one_op_whatever_the_number_of_representations(name):
    module = MODULES[name].build(equiconv.nn)
    inputs = MODULES[name].inputs(module, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(*inputs).tensor.sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith("equiconv::")]
    assert sorted(names) == ["equiconv::field_gate", "equiconv::field_gate_bwd"]
