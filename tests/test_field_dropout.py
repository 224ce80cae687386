"""field_dropout against its definition; the distribution of what it drops; the modules on it."""
import escnn.nn
import pytest
import torch
from torch.library import opcheck

import equiconv.nn
from equiconv.ops import field_dropout
from equiconv.reference.field_dropout import philox
from tests.field_tables import DTYPES, SHAPES, assert_threads_change_nothing, random, tensor
from tests.modules import MODULES, mixed, pointwise

OPS = torch.ops.equiconv
STRUCTURES = {"one": [1], "interleaved": [3, 1, 8, 3, 2, 8], "many": [2, 7] * 12, "channels": [1] * 37}
SEED = torch.tensor([0x123456789ABCDEF])
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def table(sizes):
    sizes = torch.tensor(sizes)
    return torch.stack([sizes.cumsum(0) - sizes, sizes], 1)


def with_gradient(backend, x, fields, p=0.3, seed=SEED):
    x = x.detach().requires_grad_()
    y = field_dropout(x, fields, p, seed=seed, backend=backend)
    return y, *torch.autograd.grad(y, x, random(*y.shape, seed=3, dtype=torch.float32).to(y))


def assert_equals_reference(x, fields, backend="native"):
    """The same numbers are dropped; what stays differs by rounding at most."""
    got, want = (with_gradient(b, x, fields) for b in (backend, "reference"))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == x.dtype and torch.equal(g == 0, w == 0)
        torch.testing.assert_close(g, w)
    assert x.numel() == 0 or got[0].stride() == got[1].stride() == x.stride()


def test_random_bits_are_those_of_the_publication():
    """Known answers of the authors' library, Random123."""
    digits = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    for words, key, want in (([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
                             (*digits, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1])):
        found = philox([torch.tensor([w]) for w in words], [torch.tensor([k]) for k in key])
        assert [word.item() for word in found] == want


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES)
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(structure, shape, dtype, channels_last):
    sizes = STRUCTURES[structure]
    assert_equals_reference(tensor(shape, sum(sizes), dtype, channels_last), table(sizes))


@pytest.mark.usefixtures("isa")
def test_instruction_sets():
    for dtype in DTYPES:
        for channels_last in (False, True):
            test_values_and_gradients("interleaved", "wide_plane", dtype, channels_last)


@each_format
def test_threads_change_nothing(channels_last):
    x = tensor((8, 33, 31), 72, torch.float32, channels_last)
    assert_threads_change_nothing(lambda: with_gradient("native", x, table([3] * 24)))


def test_derivatives():
    x, fields = tensor((2, 2, 2), 6).requires_grad_(), table([2, 1, 3])
    for f in (lambda x: field_dropout(x, fields, 0.4, seed=SEED), lambda x: OPS.field_dropout(x, SEED, fields, 0.4)):
        assert torch.autograd.gradcheck(f, (x,))
        assert torch.autograd.gradgradcheck(f, (x,))


def test_opcheck():
    for channels_last in (False, True):
        x = tensor("plane", 6, torch.float32, channels_last)
        opcheck(OPS.field_dropout.default, (x.requires_grad_(), SEED, table([2, 1, 3]), 0.4))


def test_bad_arguments():
    x, fields = tensor("plane", 6, torch.float32), table([2, 1, 3])
    for bad, match in (({"x": x[0, 0, 0]}, r"x must be \[B, C"), ({"fields": fields.int()}, "fields must be int64"),
                       ({"p": 1.5}, "p must be between"), ({"p": float("nan")}, "p must be between"),
                       ({"seed": SEED.int()}, "seed must be")):
        with pytest.raises(ValueError, match=match):
            field_dropout(**{"x": x, "fields": fields, "p": 0.5, **bad})
    for bad, match in (((x[:, 1:].contiguous(), SEED, fields, 0.5), "x must have"),
                       ((x, SEED, fields[1:], 0.5), "do not follow"), ((x, SEED[:0], fields, 0.5), "seed must be"),
                       ((x[..., ::2], SEED, fields, 0.5), "contiguous or channels_last")):
        with pytest.raises(RuntimeError, match=match):
            OPS.field_dropout(*bad)


# ---- the distribution: bounds of five standard deviations, which a fair generator misses once in two million ----

def kept(p, shape=(64, 40, 16, 16), seed=SEED):
    """Which fields of one channel stay: as float64 [batch, fields, *spatial]."""
    return field_dropout(torch.ones(shape), table([1] * shape[1]), p, seed=seed).ne(0).double()


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_a_share_of_p_is_dropped_everywhere(p):
    stays = kept(p)
    for dims in ((0, 1, 2, 3), (0, 2, 3), (1, 2, 3), (0, 1)):  # of all, of a field, of an image, of a pixel
        share = stays.mean(dims)
        deviation = (p * (1 - p) / (stays.numel() / share.numel())) ** 0.5
        assert (share - (1 - p)).abs().max() < (5 if share.numel() == 1 else 6) * deviation


def test_fields_pixels_images_and_calls_are_independent():
    p = 0.5
    stays = kept(p) - p
    other = kept(p, seed=SEED + 1) - p
    pairs = [(stays[:, i:], stays[:, :-i]) for i in (1, 2, 3, 4)] + [(stays[1:], stays[:-1]), (stays, other)]
    pairs += [(stays[..., i:], stays[..., :-i]) for i in (1, 2, 4, 8)] + [(stays[:, :, 1:], stays[:, :, :-1])]
    for a, b in pairs:
        assert (a * b).mean().abs() < 5 * p * (1 - p) / a.numel() ** 0.5


def test_the_mean_is_kept():
    x = torch.rand(64, 40, 16, 16, generator=torch.Generator().manual_seed(0)) + 1
    y = field_dropout(x, table([2] * 20), 0.3, seed=SEED)
    assert abs((y.mean() / x.mean() - 1).item()) < 5 * (0.3 / 0.7 / (x.numel() / 2)) ** 0.5
    torch.testing.assert_close(y[y != 0], x[y != 0] / 0.7)


def test_all_and_nothing():
    x, fields = tensor("plane", 6), table([2, 1, 3])
    assert torch.equal(field_dropout(x, fields, 0.0), x) and not field_dropout(x, fields, 1.0).any()


# ---- the modules ----

@pytest.mark.parametrize("name,make_type", [("FieldDropout", mixed), ("PointwiseDropout", pointwise)])
@each_format
def test_modules(name, make_type, channels_last):
    """Whole fields at each pixel, or channels; as escnn's, but for the generator."""
    module, theirs = (getattr(n, name)(make_type(), p=0.4) for n in (equiconv.nn, escnn.nn))
    x = module.in_type(tensor((40, 9, 9), module.in_type.size, torch.float32, channels_last).abs() + 1)
    torch.manual_seed(5)
    y = module(x).tensor
    torch.manual_seed(5)
    assert torch.equal(module(x).tensor, y) and not torch.equal(module(x).tensor, y)
    assert y.stride() == x.tensor.stride()
    for result in (y, theirs(module.in_type(x.tensor.contiguous())).tensor):
        stays = result != 0
        torch.testing.assert_close(result[stays], x.tensor[stays] / 0.6)
        sizes = module.in_type.fields_end - module.in_type.fields_start
        sizes = sizes.tolist() if name == "FieldDropout" else [1] * module.in_type.size
        for field in stays.split(sizes, 1):
            assert torch.equal(field.all(1), field.any(1))
            assert abs(field[:, 0].double().mean() - 0.6) < 5 * (0.24 / field[:, 0].numel()) ** 0.5
    module.eval()
    assert torch.equal(module(x).tensor, x.tensor)


def test_in_place():
    module = equiconv.nn.FieldDropout(mixed(), inplace=True)
    x = mixed()(tensor("plane", mixed().size, torch.float32))
    before = x.tensor.clone()
    y = module(x).tensor
    assert y.data_ptr() == x.tensor.data_ptr() and (y == 0).any() and not torch.equal(y, before)


@pytest.mark.parametrize("name", ["FieldDropout", "PointwiseDropout"])
def test_compiled_calls_draw_anew(name):
    module = MODULES[name].build(equiconv.nn)
    x, = MODULES[name].inputs(module, batch=16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: module(x).tensor, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["FieldDropout", "PointwiseDropout"])
def test_one_op_each_way(name):
    module = MODULES[name].build(equiconv.nn)
    x, = MODULES[name].inputs(module, batch=16, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x).tensor.sum().backward()
    assert [e.name for e in profile.events() if e.name.startswith("equiconv::")] == 2 * ["equiconv::field_dropout"]
