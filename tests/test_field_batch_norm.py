"""field_norm_statistics and field_batch_norm against their definition: all kinds of parts, in all memory formats."""
import copy

import pytest
import torch
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from equiconv.formats import compute_dtype
from equiconv.nn.fields import FieldGroup
from equiconv.nn.norm_parts import FieldPart, parts_table
from equiconv.ops import field_batch_norm, field_norm_statistics
from equiconv.ops.field_batch_norm import STATISTICS
from equiconv.reference import field_batch_norm as reference
from tests.field_tables import DTYPES, SHAPES, assert_close, assert_threads_change_nothing, random, tensor
from tests.test_field_norm import tables as field_tables

OPS, EPS = torch.ops.equiconv, 1e-3
VECTOR = [FieldPart(2, "zero")]
IRREPS = [FieldPart(1, "average", 1, 1), FieldPart(2, "zero"), FieldPart(1, "average", 1, 1)]
STRUCTURES = {  # {label: parts of a field}, and the labels of the fields
    "inner": ({s: [FieldPart(s, "average", 1, 1, s)] for s in (3, 1, 8)}, [3, 1, 8, 3]),
    "inner_alone": ({4: [FieldPart(4, "average", 1, 1, 4)]}, [4, 4]),
    "norms": ({"vector": VECTOR, "subfields": [FieldPart(6, "zero", samples=3)]}, ["vector", "subfields", "vector"]),
    "projected": ({"regular": [FieldPart(5, "projected", 5, 2, 1, 0, 25)], "vector": [FieldPart(2, "own")],
                   "other": [FieldPart(3, "projected", 3, 1, 1, 35, 44)]}, ["regular", "vector", "other", "regular"]),
    "irreps": ({"mixed": IRREPS, "vector": VECTOR}, ["mixed", "vector", "mixed"]),
    "many": ({"scalar": [FieldPart(1, "average", 1, 1)], "vector": VECTOR}, ["vector", "scalar"] * 40),
    "wide": ({"wide": [FieldPart(35, "projected", 35, 3, 1, 0, 1225)], "scalar": [FieldPart(1, "average", 1, 1)]},
             ["scalar", "wide"])}
CHANGED = {"irreps_changed": ("irreps", ["mixed"])}  # structures with changes of basis of these fields
each_structure = pytest.mark.parametrize("structure", [*STRUCTURES, *CHANGED])
each_inner = pytest.mark.parametrize("structure", ["inner", "inner_alone"])
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


class Call:
    """Arguments of the two ops, of random numbers.

    affine  whether there are weights and biases
    """

    def __init__(self, structure, shape, dtype=torch.float64, channels_last=False, parameters=None, affine=True):
        of, changed = CHANGED.get(structure, (structure, []))
        parts, labels = STRUCTURES[of]
        sizes = [sum(p.size for p in parts[label]) for label in labels]
        groups = [FieldGroup(label, labels.count(label), sizes[labels.index(label)]) for label in dict.fromkeys(labels)]
        parameters = compute_dtype(dtype) if parameters is None else parameters

        def numbers(name, seed):
            counts = [g.fields * sum(getattr(p, name) if name else 1 for p in parts[g.label]) for g in groups]
            return [random(n, seed=seed + i, dtype=parameters) if n else None for i, n in enumerate(counts)]

        weights, biases, means = numbers("", 10), numbers("biases", 20), numbers("means", 30)
        table = parts_table(labels, groups, parts, *([t is not None for t in of] for of in (means, biases)))
        fields = field_tables(sizes, [f for f, label in enumerate(labels) if label in changed], dtype)
        self.x = tensor(shape, sum(sizes), dtype, channels_last)
        self.tables = *fields, table, random(2000, seed=5, dtype=compute_dtype(dtype))
        self.weights = weights if affine else []
        self.biases = [t for t in biases if t is not None] if affine else []
        variances = [random(len(t), seed=40, dtype=parameters).abs() + 1 for t in weights]
        self.running = [t for t in means if t is not None], variances
        self.counters = [torch.tensor(3)]

    def to(self, change):
        """Another call, its tensors changed."""
        other = copy.copy(self)
        other.__dict__ = tree_map_only(torch.Tensor, change, self.__dict__)
        return other

    def double(self):
        return self.to(lambda t: t.double() if t.is_floating_point() else t)

    def statistics(self, backend, by="estimate", momentum=0.1, **options):
        """Numbers, then what has moved: copies of running statistics and counters."""
        moved = tree_map_only(torch.Tensor, torch.clone, [*self.running, self.counters])
        numbers = field_norm_statistics(self.x, self.tables, self.weights, self.biases, *moved, EPS, momentum, by,
                                        backend=backend, **options)
        return numbers, *(t for of in moved for t in of)

    def with_gradients(self, backend, grad, through=False, function="identity", numbers=None):
        """Output, and gradients of x and of all parameters, from the statistics of x."""
        if numbers is None:
            numbers = self.statistics("reference", "values" if through else "estimate")[0]
        x = self.x.detach().requires_grad_()
        lists = [[t.detach().requires_grad_() for t in of] for of in (self.weights, self.biases)]
        y = field_batch_norm(x, numbers, self.tables, *lists, EPS, through, function, backend=backend)
        return y, *torch.autograd.grad(y, [x, *lists[0], *lists[1]], grad.to(y.dtype))

    def of_values(self, x, weights, biases):
        """The numbers of these values and parameters."""
        with torch.no_grad():
            return field_norm_statistics(x, self.tables, weights, biases, [], [], [], EPS, 0.1, "values",
                                         backend="reference")

    def constants(self, numbers, weights, biases):
        """The numbers of the same statistics with these parameters."""
        with torch.no_grad():
            affine = reference._affine(*numbers[2:], *self.tables[2:], weights, biases)
            return torch.stack([*affine, *numbers[2:]])

    def grad(self, dtype):
        return random(*self.x.shape, seed=3, dtype=dtype)


def assert_statistics_equal_definition(call, dtype, by="estimate", **options):
    got, want = call.statistics("native", by, **options), call.double().statistics("reference", by, **options)
    assert got[0].dtype == compute_dtype(dtype)
    for g, w in zip(got[0], want[0], strict=True):  # each of the numbers of the channels
        assert_close(g, w, g.dtype)
    for g, w in zip(got[1:], want[1:], strict=True):  # as exact as what they are made of
        assert_close(g, w, got[0].dtype if g.dtype == torch.float64 else g.dtype)


def assert_equals_definition(call, dtype, backend="native", **options):
    grad = call.grad(dtype)
    numbers = call.double().statistics("reference", "values" if options.get("through") else "estimate")[0]
    got = call.with_gradients(backend, grad, numbers=numbers.to(compute_dtype(dtype)), **options)
    want = call.double().with_gradients("reference", grad, numbers=numbers, **options)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, g.dtype)
    assert got[0].dtype == got[1].dtype == dtype
    assert call.x.numel() == 0 or got[0].stride() == got[1].stride() == call.x.stride()


@each_structure
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(structure, dtype, channels_last):
    for shape in ("plane", "wide_plane", "points", "one_pixel"):
        call = Call(structure, shape, dtype, channels_last)
        for by in STATISTICS:
            assert_statistics_equal_definition(call, dtype, by)


@each_structure
def test_options_of_statistics(structure):
    call = Call(structure, "plane")
    assert_statistics_equal_definition(call, torch.float64, momentum=None)
    assert_statistics_equal_definition(call, torch.float64, momentum=0.75)
    assert_statistics_equal_definition(call, torch.float64, "running", batch=False)
    channels = call.x.shape[1]
    moments = torch.cat([random(channels, seed=6), random(channels, seed=7).abs(), torch.tensor([17.0])]).double()
    assert_statistics_equal_definition(call, torch.float64, moments=moments)
    assert_statistics_equal_definition(Call(structure, "plane", affine=False), torch.float64)
    for dtype in DTYPES:
        assert_statistics_equal_definition(Call(structure, "plane", torch.float32, parameters=dtype), torch.float32)
    call.running, call.counters = ([], []), []
    assert_statistics_equal_definition(call, torch.float64, momentum=None)


def test_statistics_of_one_value_and_of_none():
    """A single value has no variance, and no value no mean either."""
    call = Call("many", "one_point", torch.float32)
    assert all(t.isfinite().all() for t in call.statistics("native"))
    numbers = Call("many", "empty", torch.float32).statistics("native")[0]
    assert numbers[3].isnan().all()


def test_running_statistics_count_as_changed():
    call = Call("inner", "plane")
    tensors = [*call.running[0], *call.running[1], *call.counters]
    before = [t._version for t in tensors]
    arguments = call.x, call.tables, call.weights, call.biases, *call.running, call.counters, EPS, 0.1
    field_norm_statistics(*arguments, "running", batch=False)
    assert [t._version for t in tensors] == before and call.counters[0] == 3
    field_norm_statistics(*arguments, "values")
    assert all(t._version > b for t, b in zip(tensors, before)) and call.counters[0] == 4


def test_each_variance_has_its_counter():
    call = Call("inner", "plane")
    call.counters = [torch.tensor(n) for n in (0, 9, 99)]
    assert_statistics_equal_definition(call, torch.float64, momentum=None)


@each_structure
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(structure, dtype, channels_last):
    for shape in ("plane", "solid", "points", "empty"):
        assert_equals_definition(Call(structure, shape, dtype, channels_last), dtype)


@each_inner
@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_through_statistics(structure, dtype, channels_last):
    for shape in SHAPES:
        if shape not in ("one_point", "empty"):
            assert_equals_definition(Call(structure, shape, dtype, channels_last), dtype, through=True)
    for function in ("relu", "elu"):
        for shape in ("plane", "wide_plane"):
            call = Call(structure, shape, dtype, channels_last)
            assert_equals_definition(call, dtype, through=True, function=function)


def test_gradients_without_values():
    for shape in ("one_point", "empty"):
        call = Call("inner", shape, torch.float32)
        numbers = call.statistics("native", "values")[0]
        y, grad_x, *_ = call.with_gradients("native", torch.ones_like(call.x), through=True, numbers=numbers)
        assert y.isfinite().all() and grad_x.isfinite().all()


@each_structure
def test_without_parameters_and_with_those_of_another_dtype(structure):
    assert_equals_definition(Call(structure, "plane", affine=False), torch.float64)
    call = Call(structure, "plane", torch.float32, parameters=torch.bfloat16)
    assert_equals_definition(call, torch.float32)
    grads = call.with_gradients("native", call.grad(torch.float32))
    assert {g.dtype for g in grads[2:]} == {torch.bfloat16}


@pytest.mark.usefixtures("isa")
def test_instruction_sets():
    for channels_last in (False, True):
        assert_equals_definition(Call("irreps_changed", "wide_plane", torch.float32, channels_last), torch.float32)
        for function in ("identity", "elu"):
            call = Call("inner", "wide_plane", torch.float32, channels_last)
            assert_equals_definition(call, torch.float32, through=True, function=function)


@each_format
def test_threads_change_nothing(channels_last):
    call = Call("inner", (8, 67, 61), torch.float32, channels_last)
    assert_threads_change_nothing(lambda: (*call.statistics("native"), *call.with_gradients(
        "native", call.grad(torch.float32), through=True, numbers=call.statistics("native", "values")[0])))


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written():
    for structure in (*STRUCTURES, *CHANGED):
        call = Call(structure, "wide_plane", torch.float32)
        assert_statistics_equal_definition(call, torch.float32)
        assert_equals_definition(call, torch.float32, through=structure.startswith("inner"))


def test_gradient_in_another_memory_format():
    call = Call("inner", "plane", channels_last=True)
    grad = call.grad(torch.float64)
    for g in (grad, grad[..., :1].expand_as(grad), grad.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(call.with_gradients("native", g, through=True),
                                   call.with_gradients("reference", g, through=True), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("structure,options", [
    ("projected", {}), ("irreps_changed", {}), ("inner", dict(through=True)),
    ("inner_alone", dict(through=True, function="elu"))], ids=["projected", "changed", "through", "elu"])
@each_format
def test_derivatives(structure, options, channels_last):
    call = Call(structure, (2, 2, 2), channels_last=channels_last)
    weights, biases = len(call.weights), len(call.biases)
    numbers = call.statistics("native", "values" if options else "estimate")[0]
    leaves = [t.requires_grad_() for t in (call.x, *call.weights, *call.biases)]
    function = ("identity", "relu", "elu").index(options.get("function", "identity"))

    def split(parameters):
        return list(parameters[:weights]), list(parameters[weights:weights + biases])

    def fresh(x, lists):
        return call.of_values(x, *lists) if options else call.constants(numbers, *lists)

    def eager(x, *parameters):
        lists = split(parameters)
        return field_batch_norm(x, fresh(x, lists), call.tables, *lists, EPS, **options)

    def registered(x, *parameters):
        lists = split(parameters)
        return OPS.field_batch_norm(x, fresh(x, lists), *call.tables, *lists, EPS, bool(options), function)

    for f in (eager, registered):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


def op_arguments(call, moments=None, by=1, momentum=0.1):
    """Of field_norm_statistics."""
    return (call.x, moments, *call.tables, call.weights, call.biases, *call.running, call.counters, EPS, momentum,
            True, by)


def test_opcheck():
    for structure in ("inner", "projected", "irreps_changed"):
        call = Call(structure, "plane", torch.float32, channels_last=True)
        opcheck(OPS.field_norm_statistics.default, op_arguments(call))
        through = structure == "inner"
        rest = call.statistics("native")[0], *call.tables, call.weights, call.biases, EPS, through, 2 * through
        opcheck(OPS.field_batch_norm.default, (call.x, *rest))
        opcheck(OPS.field_batch_norm_bwd.default, (torch.randn_like(call.x), call.x, *rest))
        call.x.requires_grad_()
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        opcheck(OPS.field_batch_norm.default, (call.x, *rest), test_utils=utilities)


def test_compile():
    """Also what the running statistics become."""
    call = Call("projected", "plane", torch.float32)
    moved = tree_map_only(torch.Tensor, torch.clone, [*call.running, call.counters])

    def f(x, weights, biases, means, variances, counters):
        numbers = field_norm_statistics(x, call.tables, weights, biases, means, variances, counters, EPS, 0.1,
                                        "estimate")
        return field_batch_norm(x, numbers, call.tables, weights, biases, EPS).sin()

    leaves = [t.requires_grad_() for t in (call.x, *call.weights, *call.biases)]
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got = compiled(call.x, call.weights, call.biases, *moved)
    want = f(call.x, call.weights, call.biases, *call.running, call.counters)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(moved, [*call.running, call.counters])
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)))


def test_gradients_by_torch_func():
    call = Call("projected", "plane")
    numbers = call.statistics("native")[0]

    def loss(x, weights):
        return field_batch_norm(x, numbers, call.tables, weights, call.biases, EPS).square().sum()

    got = torch.func.grad(loss, (0, 1))(call.x, call.weights)
    leaves = [t.requires_grad_() for t in (call.x, *call.weights)]
    torch.testing.assert_close((got[0], *got[1]), torch.autograd.grad(loss(call.x, call.weights), leaves))


def test_bad_arguments():
    call = Call("projected", "plane", torch.float32)
    numbers = call.statistics("native")[0]
    lists = call.weights, call.biases
    fields, bases, parts, matrices = call.tables
    for change, match in ((dict(x=call.x.int()), "floating point"),
                          (dict(numbers=numbers[:3]), r"numbers must be .*\[4, 15\]"),
                          (dict(tables=(fields, bases, parts[:, 1:], matrices)), "parts must be int64"),
                          (dict(tables=(fields, bases, parts, matrices.double())), "bases and matrices must"),
                          (dict(function="tanh"), "function must be one of .* got 'tanh'")):
        arguments = dict(dict(x=call.x, numbers=numbers, tables=call.tables, function="identity"), **change)
        with pytest.raises(ValueError, match=match):
            field_batch_norm(arguments["x"], arguments["numbers"], arguments["tables"], *lists, EPS,
                             function=arguments["function"])
    with pytest.raises(ValueError, match="statistics must be one of .* got 'mean'"):
        call.statistics(None, "mean")
    for change, match in ((dict(weights=call.weights[:1]), "too few weights"),
                          (dict(biases=call.biases[:1]), "too few biases"),
                          (dict(running=(call.running[0][:1], call.running[1])), "too few running means"),
                          (dict(running=(call.running[0], call.running[1][:1])), "too few running variances"),
                          (dict(tables=(fields, bases, parts[1:], matrices)), "do not follow"),
                          (dict(tables=(fields, bases, parts[:-1], matrices)), "x must have"),
                          (dict(tables=(fields, bases, parts, matrices[:20])), "no such matrix"),
                          (dict(weights=[t.int() for t in call.weights]), "floating point"),
                          (dict(weights=[t.repeat(2)[::2] for t in call.weights]), "contiguous"),
                          (dict(counters=[torch.tensor(0.0)]), "counters must be int64")):
        bad = copy.copy(call)
        bad.__dict__ = {**call.__dict__, **change}
        with pytest.raises(RuntimeError, match=match):
            bad.statistics("native")
    with pytest.raises(RuntimeError, match="an average needs a counter"):
        OPS.field_norm_statistics(*op_arguments(call, momentum=None)[:10], [], EPS, None, True, 1)
    with pytest.raises(RuntimeError, match="moments must be float64"):
        OPS.field_norm_statistics(*op_arguments(call, moments=torch.zeros(31)))
    for options, match in ((dict(function="relu"), "a function needs"), (dict(through=True), "without a change")):
        changed = Call("irreps_changed", "plane", torch.float32)
        with pytest.raises(RuntimeError, match=match):
            changed.with_gradients("native", changed.grad(torch.float32), numbers=changed.statistics("native")[0],
                                   **options)
