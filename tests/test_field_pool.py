"""field_pool against its definition; the modules on it against escnn in float64."""
import escnn.nn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import equiconv.nn
from equiconv.formats import compute_dtype
from equiconv.ops import field_pool
from tests.field_tables import DTYPES, SHAPES, assert_modules_equal, assert_results_equal, random, tensor
from tests.modules import MODULES, first_field, gates_of_induced, mixed, pointwise, reflections, regular

OPS = torch.ops.equiconv
STRUCTURES = {"one": [(1, 1)], "interleaved": [(3, 3), (1, 1), (8, 2), (3, 1), (8, 4)], "many": [(4, 2), (6, 3)] * 20,
              "wide": [(48, 16), (17, 17), (40, 2)]}  # (channels of a field, of its subfields)
each_structure = pytest.mark.parametrize("structure", STRUCTURES)
each_kind = pytest.mark.parametrize("norms", [False, True], ids=["largest", "norm"])
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def arguments(structure, norms, shape, dtype=torch.float64, channels_last=False):
    """(x, fields, elements)"""
    rows, elements, channel, part = [], [], 0, 0
    for f, (size, subfield) in enumerate(STRUCTURES[structure] if isinstance(structure, str) else structure):
        subfield = subfield if norms else 1
        rows.append((channel, size, subfield))
        elements += [(f, part + i // subfield) for i in range(size)]
        channel, part = channel + size, part + size // subfield
    return tensor(shape, channel, dtype, channels_last), torch.tensor(rows), torch.tensor(elements)


def directions_of(tables, dtype, numbers=2):
    """A vector for each channel of a field."""
    return random(int(tables[0][:, 1].max()), numbers, seed=4, dtype=compute_dtype(dtype))


def with_gradient(backend, x, tables, norms, grad, directions=None):
    x = x.detach().requires_grad_()
    y = field_pool(x, *tables, norms, directions=directions, backend=backend)
    return y, *torch.autograd.grad(y, x, grad.to(y.dtype))


def assert_equals_reference(x, tables, norms, directions=None):
    numbers = 1 if directions is None else directions.shape[1]
    grad = random(x.shape[0], len(tables[0]) * numbers, *x.shape[2:], seed=3, dtype=x.dtype)
    got = with_gradient("native", x, tables, norms, grad, directions)
    directions = None if directions is None else directions.double()
    want = with_gradient("reference", x.double(), tables, norms, grad, directions)
    assert_results_equal(got, want, x)


@each_structure
@each_kind
@each_shape
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(structure, norms, shape, dtype, channels_last):
    x, *tables = arguments(structure, norms, shape, dtype, channels_last)
    assert_equals_reference(x, tables, norms)


@each_structure
@each_shape
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directions(structure, shape, dtype, channels_last):
    x, *tables = arguments(structure, False, shape, dtype, channels_last)
    assert_equals_reference(x - 2, tables, False, directions_of(tables, dtype, numbers=3))  # some of them negative


@each_kind
@each_format
def test_the_gradient_goes_to_the_first_of_equal_maxima(norms, channels_last):
    x, *tables = arguments([(8, 2), (6, 2)], norms, "wide_plane", torch.float32, channels_last)
    assert_equals_reference(x.relu().round().clamp(max=1), tables, norms)  # many zeros and ones


@each_kind
def test_not_a_number(norms):
    x, *tables = arguments("interleaved", norms, "wide_plane", torch.float32)
    x[:, 5, 3] = float("nan")
    x[:, 9, 4] = float("inf")
    got, want = (field_pool(x, *tables, norms, backend=backend) for backend in ("native", "reference"))
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.usefixtures("isa")
def test_instruction_sets():
    for dtype in DTYPES:
        for norms in (False, True):
            for channels_last in (False, True):
                test_values_and_gradients("interleaved", norms, "wide_plane", dtype, channels_last)
        test_directions("interleaved", "wide_plane", dtype, channels_last)


@each_format
@pytest.mark.usefixtures("one_thread")
def test_derivatives_of_directions(channels_last):
    x, *tables = arguments([(4, 2), (3, 3)], False, (2, 2, 2), channels_last=channels_last)
    directions = directions_of(tables, x.dtype)
    for f in (lambda x: field_pool(x, *tables, False, directions=directions),
              lambda x: OPS.field_pool(x, *tables, False, directions)):
        assert torch.autograd.gradcheck(f, (x.requires_grad_(),))
        assert torch.autograd.gradgradcheck(f, (x,))


@each_kind
@each_format
@pytest.mark.usefixtures("one_thread")
def test_derivatives(norms, channels_last):
    x, *tables = arguments([(4, 2), (3, 3)], norms, (2, 2, 2), channels_last=channels_last)
    for f in (lambda x: field_pool(x, *tables, norms), lambda x: OPS.field_pool(x, *tables, norms, None)):
        assert torch.autograd.gradcheck(f, (x.requires_grad_(),))
        assert torch.autograd.gradgradcheck(f, (x,))


@each_kind
def test_opcheck(norms):
    for channels_last in (False, True):
        for requires_grad in (False, True):
            x, *tables = arguments("interleaved", norms, "plane", torch.float32, channels_last)
            x.requires_grad_(requires_grad)
            opcheck(OPS.field_pool.default, (x, *tables, norms, None))
            opcheck(OPS.field_pool_bwd.default, (field_pool(x.detach(), *tables, norms), x, *tables, norms, None))
    x, *tables = arguments([(3, 3), (2, 1)], False, "plane", torch.float32)
    opcheck(OPS.field_pool.default, (x.requires_grad_(), *tables, False, directions_of(tables, x.dtype)))


def test_compile():
    x, *tables = arguments("interleaved", True, "plane", torch.float32)

    def f(x):
        return field_pool(x * 2, *tables, True).sin()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for shape in ("plane", "wide_plane"):
        x = tensor(shape, x.shape[1], torch.float32).requires_grad_()
        torch.testing.assert_close(compiled(x), f(x))
        got, want = (torch.autograd.grad(g(x).sum(), x) for g in (compiled, f))
        torch.testing.assert_close(got, want)


def test_bad_arguments():
    x, fields, elements = arguments("interleaved", True, "plane", torch.float32)
    for bad, match in (((x[0, 0, 0], fields, elements), r"x must be \[B, C"), ((x.int(), fields, elements), "floating"),
                       ((x, fields.int(), elements), "fields must be int64"),
                       ((x, fields, elements[:, :1]), r"elements must be int64 \[n, 2\]")):
        with pytest.raises(ValueError, match=match):
            field_pool(*bad, True)
    directions = directions_of([fields], x.dtype)
    for bad, norms in ((directions, True), (directions[0], False), (directions.double(), False)):
        with pytest.raises(ValueError, match="directions must be a matrix of dtype"):
            field_pool(x, fields, elements, norms, directions=bad)
    for bad, match in (((x, fields[1:], elements, True, None), "do not follow"),
                       ((x, fields, elements, False, None), "divide"),
                       ((x[:, 1:].contiguous(), fields, elements, True, None), "x must have"),
                       ((x, fields, elements, True, directions), "norms false"),
                       ((x[..., ::2], fields, elements, True, None), "contiguous or channels_last")):
        with pytest.raises(RuntimeError, match=match):
            OPS.field_pool(*bad)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=12), st.booleans(),
       st.integers(0, 3), st.lists(st.integers(1, 40), max_size=2), st.booleans())
def test_any_structure(fields, norms, batch, spatial, channels_last):
    structure = [(parts * subfield, subfield) for parts, subfield in fields]
    x, *tables = arguments(structure, norms, (batch, *spatial), channels_last=channels_last)
    assert_equals_reference(x, tables, norms)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written():
    for norms in (False, True):
        for channels_last in (False, True):
            test_values_and_gradients("interleaved", norms, "wide_plane", torch.float32, channels_last)


# ---- the modules ----

def several_subfields():
    gate, _, vector, _ = gates_of_induced().representations
    return escnn.nn.FieldType(reflections(), [vector, gate, vector])


@pytest.mark.parametrize("name,make_type", [("GroupPooling", pointwise), ("NormPool", mixed),
                                            ("GroupPooling", lambda: first_field(pointwise())),
                                            ("NormPool", lambda: first_field(mixed())),
                                            ("VectorFieldNonLinearity", regular),
                                            ("InducedNormPool", several_subfields)])
@each_format
def test_modules_equal_escnn_in_double(name, make_type, channels_last, monkeypatch):
    monkeypatch.setattr(torch, "float", torch.float64)  # escnn makes float32 of everything
    theirs, ours = (getattr(n, name)(make_type()).double() for n in (escnn.nn, equiconv.nn))
    for size in ((3, 6, 5), (2, 17, 17), (4, 1, 1)):
        x = tensor(size, theirs.in_type.size, channels_last=channels_last)
        assert_modules_equal(theirs, ours, x)


@pytest.mark.parametrize("name", ["GroupPooling", "NormPool", "InducedNormPool", "VectorFieldNonLinearity"])
def test_one_op_whatever_the_number_of_representations(name):
    module = MODULES[name].build(equiconv.nn)
    x, = MODULES[name].inputs(module, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x).tensor.sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith("equiconv::")]
    assert sorted(names) == ["equiconv::field_pool", "equiconv::field_pool_bwd"]
