"""field_norm and its moments against their definition; the modules on them against escnn in float64."""
import escnn.nn
import pytest
import torch
from escnn import gspaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import equiconv.nn
from equiconv.formats import compute_dtype
from equiconv.ops import field_norm, field_norm_moments
from tests.field_tables import DTYPES, SHAPES, assert_close, assert_threads_change_nothing, random, tensor
from tests.modules import MODULES, first_field, mixed, plane, pointwise, vectors

OPS = torch.ops.equiconv
STRUCTURES = {  # sizes of the fields, and which of them have a change of basis
    "one": ([1], []), "scalars": ([1] * 5, []), "interleaved": ([3, 1, 8, 3, 2, 8], []),
    "changed": ([4, 1, 5, 4, 1], [0, 2]), "wide": ([17, 40, 3], [1]), "many": ([2, 7] * 20, [1, 4, 11])}
each_structure = pytest.mark.parametrize("structure", STRUCTURES)
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def tables(sizes, changed, dtype=torch.float64):
    """(fields, bases): changes of basis that are invertible and not orthogonal."""
    rows, bases, channel, start = [], [torch.empty(0, dtype=torch.float64)], 0, 0
    for f, size in enumerate(sizes):
        rows.append((channel, size, start if f in changed else -1))
        channel += size
        if f in changed:
            q = torch.linalg.qr(random(size, size, seed=f))[0] + 0.1 * random(size, size, seed=f + 1) / size
            bases += [q.flatten(), q.inverse().flatten()]
            start += 2 * size * size
    return torch.tensor(rows), torch.cat(bases).to(compute_dtype(dtype))


def arguments(structure, shape, dtype=torch.float64, channels_last=False):
    """(x, scale, shift, fields, bases)"""
    sizes, changed = STRUCTURES[structure] if isinstance(structure, str) else structure
    channels = sum(sizes)
    per_channel = (random(channels, seed=s, dtype=compute_dtype(dtype)) for s in (1, 2))
    return tensor(shape, channels, dtype, channels_last), *per_channel, *tables(sizes, changed, dtype)


def in_double(arguments):
    return [a.double() if a.is_floating_point() else a for a in arguments]


def with_gradients(function, arguments, grad, count=3):
    """(output, gradients of the first arguments)"""
    leaves = [a.detach().requires_grad_() for a in arguments[:count]]
    y = function(*leaves, *arguments[count:])
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


@each_structure
@each_shape
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(structure, shape, dtype, channels_last):
    call = arguments(structure, shape, dtype, channels_last)
    grad = random(*call[0].shape, seed=3, dtype=dtype)
    got = with_gradients(lambda *a: field_norm(*a, backend="native"), call, grad)
    want = with_gradients(lambda *a: field_norm(*a, backend="reference"), in_double(call), grad)
    for g, w, of in zip(got, want, (call[0], *call[:3]), strict=True):
        assert g.dtype == of.dtype and (g.numel() == 0 or g.stride() == of.stride())
        assert_close(g, w, g.dtype)


@each_structure
@each_shape
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(structure, shape, dtype, channels_last):
    x, _, _, *structure = arguments(structure, shape, dtype, channels_last)
    got = field_norm_moments(x, *structure, backend="native")
    want = field_norm_moments(x.double(), structure[0], structure[1].double(), backend="reference")
    for g, w in zip(got, want, strict=True):
        assert g.dtype == compute_dtype(dtype)
        assert_close(g, w, g.dtype)


@pytest.mark.parametrize("mean", [1e4, 1e5, 1e6])
def test_variance_of_numbers_far_from_zero(mean):
    x = mean + tensor("wide_plane", 3)
    got = field_norm_moments(x.float(), *tables([3], [], torch.float32))
    assert_close(got[1], field_norm_moments(x.float().double(), *tables([3], []))[1], torch.float32)


@pytest.mark.usefixtures("isa")
def test_instruction_sets():
    for dtype in DTYPES:
        for channels_last in (False, True):
            test_values_and_gradients("changed", "wide_plane", dtype, channels_last)
            test_moments("many", "wide_plane", dtype, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_change_nothing(channels_last):
    call = arguments("many", (8, 33, 31), torch.float32, channels_last)
    grad = random(*call[0].shape, seed=3, dtype=torch.float32)
    assert_threads_change_nothing(
        lambda: (*with_gradients(field_norm, call, grad), *field_norm_moments(call[0], *call[3:])))


def test_gradient_in_another_memory_format():
    call = arguments("interleaved", "plane", channels_last=True)
    grad = tensor("plane", call[0].shape[1], seed=5)
    for g in (grad, grad[..., :1].expand_as(grad), grad.transpose(2, 3).contiguous().transpose(2, 3)):
        got = with_gradients(lambda *a: field_norm(*a, backend="native"), call, g)
        want = with_gradients(lambda *a: field_norm(*a, backend="reference"), call, g)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@each_format
def test_derivatives(channels_last):
    *leaves, fields, bases = arguments("changed", (2, 3, 2), channels_last=channels_last)
    leaves = [t.requires_grad_() for t in leaves]
    for f in (lambda *a: field_norm(*a, fields, bases), lambda *a: OPS.field_norm(*a, fields, bases)):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


def test_opcheck():
    for channels_last in (False, True):
        for requires_grad in (False, True):
            x, scale, shift, *structure = arguments("changed", "plane", torch.float32, channels_last)
            leaves = [t.requires_grad_(requires_grad) for t in (x, scale, shift)]
            opcheck(OPS.field_norm.default, (*leaves, *structure))
            opcheck(OPS.field_norm_bwd.default, (torch.randn_like(x), x, scale, *structure))
        opcheck(OPS.field_norm_moments.default, (x.detach(), *structure))


def test_compile():
    *leaves, fields, bases = arguments("changed", "plane", torch.float32)
    leaves = [t.requires_grad_() for t in leaves]

    def f(x, scale, shift):
        mean, var = field_norm_moments(x, fields, bases)
        return field_norm(x, scale * (var + 1).rsqrt(), shift - mean, fields, bases).sin()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for shape in ("plane", "wide_plane"):
        x = tensor(shape, leaves[0].shape[1], torch.float32).requires_grad_()
        torch.testing.assert_close(compiled(x, *leaves[1:]), f(x, *leaves[1:]))
        got, want = (torch.autograd.grad(g(x, *leaves[1:]).sum(), [x, *leaves[1:]]) for g in (compiled, f))
        torch.testing.assert_close(got, want)


def test_bad_arguments():
    x, scale, shift, fields, bases = arguments("changed", "plane", torch.float32)
    for bad, match in (((x[0, 0, 0], scale, shift, fields, bases), r"x must be \[B, C"),
                       ((x.long(), scale, shift, fields, bases), "floating point"),
                       ((x, scale[1:], shift, fields, bases), "scale must have shape"),
                       ((x, scale, shift.double(), fields, bases), "shift must have .* dtype torch.float32"),
                       ((x, scale, shift, fields.int(), bases), "fields must be int64"),
                       ((x, scale, shift, fields, bases.double()), "bases must have .* dtype torch.float32")):
        with pytest.raises(ValueError, match=match):
            field_norm(*bad)
    with pytest.raises(ValueError, match="this op lacks it"):
        field_norm(x, scale, shift, fields, bases, backend="inductor")
    for bad, match in (((x, scale, shift, fields[1:], bases), "do not follow"),
                       ((x, scale, shift, fields[:-1], bases), "x must have"),
                       ((x[:, :, ::2], scale, shift, fields, bases), "contiguous or channels_last"),
                       ((x, scale.double(), shift, fields, bases), "scale and shift")):
        with pytest.raises(RuntimeError, match=match):
            OPS.field_norm(*bad)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=12), st.integers(0, 4),
       st.lists(st.integers(1, 40), max_size=2), st.booleans())
def test_any_structure(fields, batch, spatial, channels_last):
    structure = [size for size, _ in fields], [f for f, (_, changes) in enumerate(fields) if changes]
    call = arguments(structure, (batch, *spatial), channels_last=channels_last)
    grad = random(*call[0].shape, seed=3)
    got = with_gradients(lambda *a: field_norm(*a, backend="native"), call, grad)
    want = with_gradients(lambda *a: field_norm(*a, backend="reference"), call, grad)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    got, want = (field_norm_moments(call[0], *call[3:], backend=b) for b in ("native", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written():
    for channels_last in (False, True):
        test_values_and_gradients("changed", "wide_plane", torch.float32, channels_last)


# ---- the modules ----

def changed_basis():
    """Fields whose representation is no direct sum of irreps in their own basis: regular ones."""
    g = plane()
    return escnn.nn.FieldType(g, [g.regular_repr] * 3)


CASES = [*((name, lambda make_type=make_type: first_field(make_type()), {}) for name, make_type in (
             ("IIDBatchNorm2d", mixed), ("NormBatchNorm", vectors), ("InnerBatchNorm", pointwise),
             ("GNormBatchNorm", lambda: MODULES["GNormBatchNorm"].build(escnn.nn).in_type),
             ("InducedNormBatchNorm", lambda: MODULES["InducedNormBatchNorm"].build(escnn.nn).in_type))),
         ("IIDBatchNorm2d", mixed, {}), ("IIDBatchNorm2d", mixed, {"momentum": None}),
         ("IIDBatchNorm2d", mixed, {"affine": False}), ("IIDBatchNorm2d", mixed, {"track_running_stats": False}),
         ("NormBatchNorm", vectors, {}), ("NormBatchNorm", vectors, {"affine": False}),
         ("InnerBatchNorm", changed_basis, {}), ("InnerBatchNorm", pointwise, {}),
         ("InnerBatchNorm", pointwise, {"momentum": None}), ("InnerBatchNorm", pointwise, {"affine": False}),
         ("InnerBatchNorm", pointwise, {"track_running_stats": False}),
         ("GNormBatchNorm", lambda: MODULES["GNormBatchNorm"].build(escnn.nn).in_type, {}),
         ("InducedNormBatchNorm", lambda: MODULES["InducedNormBatchNorm"].build(escnn.nn).in_type, {})]


@pytest.mark.parametrize("name,make_type,options", CASES)
@each_format
@pytest.mark.parametrize("size", [(3, 6, 5), (4, 1, 1), (2, 17, 17)])
def test_modules_equal_escnn_in_double(name, make_type, options, channels_last, size):
    """Values, gradients and running statistics over several steps, then in eval mode."""
    field_type = make_type()
    theirs, ours = (getattr(n, name)(field_type, **options).double() for n in (escnn.nn, equiconv.nn))
    if channels_last and "Induced" in name or name == "GNormBatchNorm" and channels_last:
        x_format = torch.contiguous_format  # escnn's views refuse the other
    else:
        x_format = torch.channels_last if channels_last else torch.contiguous_format
    for step in range(4):
        if step == 3:
            theirs.eval(), ours.eval()
        x = tensor(size, field_type.size, seed=step)
        inputs = [x.contiguous(memory_format=f).requires_grad_()
                  for f in (x_format, torch.channels_last if channels_last else torch.contiguous_format)]
        results = []
        for module, leaf in zip((theirs, ours), inputs):
            y = module(field_type(leaf)).tensor
            parameters = [p for _, p in sorted(module.named_parameters())]
            results.append((y, *torch.autograd.grad(y, [leaf, *parameters], random(*y.shape, seed=9))))
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-11)
        state = ours.state_dict()
        for key, buffer in theirs.named_buffers():
            torch.testing.assert_close(state[key], buffer, rtol=1e-12, atol=1e-12)


def test_regular_fields_by_their_irreps():
    """GNormBatchNorm of fields with a change of basis, against the definition: unit variance of every irrep."""
    g = gspaces.rot2dOnR2(8)
    field_type = equiconv.nn.FieldType(g, [g.regular_repr, g.irrep(1), g.regular_repr])
    module = equiconv.nn.GNormBatchNorm(field_type).double()
    x = tensor((64, 9, 9), field_type.size)
    y = module(field_type(x)).tensor
    q_inv = torch.tensor(g.regular_repr.change_of_basis_inv)
    z = torch.einsum("ij,bj...->bi...", q_inv, y[:, -8:])
    torch.testing.assert_close(z.square().mean((0, 2, 3)), torch.ones(8, dtype=torch.float64), rtol=0, atol=0.05)
    element = g.fibergroup.element(3)
    turned = module(field_type(x).transform_fibers(element)).tensor
    torch.testing.assert_close(turned, field_type(y).transform_fibers(element).tensor, rtol=0, atol=1e-2)


def test_a_single_value_has_no_variance():
    """One image of one pixel: escnn asserts, or divides zero by zero. The statistics stay as they are."""
    field_type = mixed()
    module = equiconv.nn.IIDBatchNorm2d(field_type)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(field_type(torch.randn(1, field_type.size, 1, 1)))
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_synchronised_and_frozen_children_are_left_to_torch():
    module = equiconv.nn.InnerBatchNorm(pointwise())
    x = pointwise()(tensor("plane", pointwise().size, torch.float32))
    first, *others = module.children()
    first.eval()  # frozen, while the others train
    module(x)
    assert first.num_batches_tracked == 0 and all(child.num_batches_tracked == 1 for child in others)


@pytest.mark.parametrize("name", ["InnerBatchNorm", "IIDBatchNorm2d", "GNormBatchNorm", "NormBatchNorm",
                                  "InducedNormBatchNorm"])
def test_two_passes_whatever_the_number_of_representations(name):
    module = MODULES[name].build(equiconv.nn)
    x, = MODULES[name].inputs(module, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x).tensor.sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith("equiconv::")]
    assert sorted(names) == ["equiconv::field_batch_norm", "equiconv::field_batch_norm_bwd",
                             "equiconv::field_norm_statistics"]
