"""Every module of equiconv.nn against escnn's, in every dtype and memory format; graphs, derivatives, export."""
import escnn.nn
import pytest
import torch

import equiconv.nn
from tests.modules import (
    MODULES,
    adjacent_irreps,
    gates_of_induced,
    mixed,
    of,
    outputs,
    plane,
    pointwise,
    reflected_ball,
    reflections,
)
from tests.synchronisation import NoSynchronisation

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = {cls.__name__ for cls in equiconv.nn.ACCELERATED.values()}
CONVOLUTIONS = {name for name in NAMES if "Conv" in name}
ACCELERATED = [case for name, case in MODULES.items() if name in NAMES]
each_case = pytest.mark.parametrize("case", ACCELERATED, ids=lambda case: case.name)
#: those whose output autocast leaves in the input's dtype, because they are no matrix product
KEEP_DTYPE = {"BranchingModule", "MergeModule", "MultipleModule", "DisentangleModule", "FieldDropout", "MaskModule",
              "ReshuffleModule", "PointwiseNonLinearity", "PointwiseDropout", "HarmonicPolynomialR3"} | {
    name for name in NAMES if any(word in name for word in ("Norm", "Gated", "Vector", "Concatenated", "Pool"))
    and "Antialiased" not in name}


def run(module, inputs, seed=0):
    """(outputs, gradients of the inputs and parameters)."""
    torch.manual_seed(seed)
    result = outputs(module(*inputs))
    grad = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).to(y) for i, y in enumerate(result)]
    leaves = [t.tensor for x in inputs for t in (x.values() if isinstance(x, dict) else [x])]
    parameters = [p for _, p in sorted(module.named_parameters()) if p.requires_grad]
    return result, torch.autograd.grad(result, [*leaves, *parameters], grad, allow_unused=True)


def test_every_class_has_a_case():
    classes = {getattr(escnn.nn, name) for name in escnn.nn.__all__ if isinstance(getattr(escnn.nn, name), type)}
    names = {c.__name__ for c in classes if issubclass(c, escnn.nn.EquivariantModule)} - {"EquivariantModule"}
    assert {n for n in names if not n.endswith("PointConv")} == set(MODULES)


@each_case
def test_equals_escnn(case):
    theirs, ours = case.build(escnn.nn), case.build(equiconv.nn)
    ours.load_state_dict(theirs.state_dict())  # escnn's choice of a basis differs from run to run
    assert isinstance(ours, type(theirs)) and sorted(repr(ours).split("\n")) == sorted(repr(theirs).split("\n"))
    for mode in (False,) if "Dropout" in case.name else (True, False):  # masks: tests/test_field_dropout.py
        theirs.train(mode), ours.train(mode)
        want, want_grad = run(theirs, case.inputs(theirs, requires_grad=True))
        got, got_grad = run(ours, case.inputs(ours, requires_grad=True))
        for g, w in zip([*got, *got_grad], [*want, *want_grad], strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-4, atol=2e-5)
        state = ours.state_dict()
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(state[name], buffer)


@each_case
def test_accelerate(case):
    module = case.build(escnn.nn)
    other = case.build(equiconv.nn)
    other.load_state_dict(module.state_dict())
    equiconv.accelerate(module)
    assert type(module) is type(other)
    torch.manual_seed(0)
    want = outputs(other(*case.inputs(other)))
    torch.manual_seed(0)
    for g, w in zip(outputs(module(*case.inputs(module))), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("name", ["InnerBatchNorm", "IIDBatchNorm2d"])
def test_options_of_batch_norm(name, options, momentum):
    field_type = pointwise()
    theirs, ours = (getattr(n, name)(field_type, momentum=momentum, **options) for n in (escnn.nn, equiconv.nn))
    x = torch.randn(3, field_type.size, 5, 5, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        torch.testing.assert_close(ours(field_type(x + step)).tensor, theirs(field_type(x + step)).tensor,
                                   rtol=1e-4, atol=1e-5)
    theirs.eval(), ours.eval()
    torch.testing.assert_close(ours(field_type(x)).tensor, theirs(field_type(x)).tensor, rtol=1e-4, atol=1e-5)
    if ours.track_running_stats:
        torch.testing.assert_close(ours.export()(x), ours(field_type(x)).tensor, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="track_running_stats must be True"):
            ours.export()


def test_batch_norm_of_points_and_types_that_escnn_cannot_take():
    points = torch.randn(7, 3), pointwise(reflected_ball)
    inner = equiconv.nn.InnerBatchNorm(points[1])
    x = torch.randn(7, points[1].size)
    y = inner(points[1](x, points[0])).tensor
    torch.testing.assert_close(y[:, :2].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="expected 6D input"):
        escnn.nn.InnerBatchNorm(points[1])(points[1](x, points[0]))
    field_type = mixed()
    module = equiconv.nn.GNormBatchNorm(field_type)
    y = module(field_type(3 * torch.randn(64, field_type.size, 5, 5) + 1)).tensor
    torch.testing.assert_close(y.square().mean((0, 2, 3)), torch.ones(field_type.size), atol=0.2, rtol=0)
    with pytest.raises(RuntimeError):
        escnn.nn.GNormBatchNorm(field_type)(field_type(torch.randn(2, field_type.size, 5, 5)))


def test_induced_fields_of_several_sizes():
    """Subfields of two sizes and several fields of each, in turn."""
    g = reflections()
    gate, _, vector, _ = gates_of_induced().representations  # subfields of one channel, and of two
    several = equiconv.nn.FieldType(g, [vector, gate, vector])
    x = several(torch.randn(3, several.size, 5, 5, generator=torch.Generator().manual_seed(0)))
    for name in ("InducedNormNonLinearity", "InducedNormPool"):
        theirs, ours = (getattr(n, name)(several) for n in (escnn.nn, equiconv.nn))
        torch.testing.assert_close(ours(x).tensor, theirs(x).tensor)


def test_gates_of_induced_fields_may_stay():
    field_type = gates_of_induced()
    module = equiconv.nn.InducedGatedNonLinearity1(field_type, drop_gates=False)
    dropping = equiconv.nn.InducedGatedNonLinearity1(field_type)
    dropping.load_state_dict(module.state_dict(), strict=False)
    x = field_type(torch.randn(2, field_type.size, 5, 5, generator=torch.Generator().manual_seed(0)))
    y = module(x)
    gates = field_type.size - dropping.out_type.size
    assert y.type == field_type
    torch.testing.assert_close(y.tensor[:, gates:], dropping(x).tensor)
    bias = module.bias.flatten().repeat_interleave(gates // module.bias.numel())
    torch.testing.assert_close(y.tensor[:, :gates], torch.sigmoid(x.tensor[:, :gates] - bias[:, None, None]))


def test_input_of_another_size_than_the_mask():
    module = equiconv.nn.MaskModule(mixed(), 6)
    for size in (1, 5):
        with pytest.raises(ValueError, match=rf"MaskModule: input must have the .* shape \(6, 6\), got \({size}, "):
            module(mixed()(torch.ones(1, mixed().size, size, size)))


# ---- precision and memory format ----

@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_of_the_input_is_kept(case, dtype):
    module = case.build(equiconv.nn).to(dtype)
    inputs = case.inputs(module, dtype=dtype, requires_grad=True)
    result, grads = run(module, inputs)
    for y in result:
        assert y.dtype == dtype and torch.isfinite(y).all()
    assert all(g.dtype == dtype for g in grads if g is not None)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, dtype):
    module, exact = case.build(equiconv.nn), case.build(equiconv.nn).double()
    inputs = case.inputs(module, dtype=dtype, requires_grad=True)  # as a convolution under autocast returns them
    with torch.autocast("cpu", dtype=dtype):
        result, grads = run(module, inputs)
        kinds = {y.dtype for y in outputs(module(*case.inputs(module)))}
    want, want_grads = run(exact, [doubled(x) for x in inputs])
    for got, exactly in zip([*result, *grads], [*want, *want_grads], strict=True):
        assert (got is None) == (exactly is None)
        if got is not None:
            tolerance = 3e-2 if dtype == torch.bfloat16 else 4e-3
            assert (got.double() - exactly).norm() <= tolerance * exactly.norm().clamp(min=1)
    assert {y.dtype for y in result} == {dtype}
    assert kinds == {torch.float32 if case.name in KEEP_DTYPE else dtype}


def doubled(x):
    if isinstance(x, dict):
        return {label: doubled(t) for label, t in x.items()}
    return x.type(x.tensor.detach().double().requires_grad_())


@each_case
def test_channels_last(case):
    if not case.size:
        pytest.skip("no spatial dimensions")
    module, reference = case.build(equiconv.nn), case.build(equiconv.nn)
    memory_format = {2: torch.channels_last, 3: torch.channels_last_3d}[len(case.size)]
    for mode in (True, False):
        module.train(mode), reference.train(mode)
        torch.manual_seed(0)
        want = outputs(reference(*case.inputs(reference)))
        torch.manual_seed(0)
        got = outputs(module(*case.inputs(module, memory_format=memory_format)))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4)
            assert case.name == "BranchingModule" or g.is_contiguous(memory_format=memory_format)


# ---- graphs, synchronisation, derivatives, export ----

@each_case
def test_nothing_waits_for_a_value(case):
    module = case.build(equiconv.nn)
    for mode in (True, False):
        module.train(mode)
        inputs = case.inputs(module, requires_grad=True)
        run(module, inputs)  # plans are made at the first call
        with NoSynchronisation():
            run(module, inputs)


@each_case
def test_compiles_to_one_graph(case):
    module, reference = case.build(equiconv.nn), case.build(equiconv.nn)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: outputs(module(*inputs)), fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        module.train(mode), reference.train(mode)
        torch.manual_seed(0)
        got = compiled(*case.inputs(module))
        torch.manual_seed(0)
        for g, w in zip(got, outputs(reference(*case.inputs(reference))), strict=True):
            torch.testing.assert_close(g, w)


@each_case
def test_double_backward(case):
    """The gradient penalty's derivative, against a directional difference."""
    module = case.build(equiconv.nn).double()
    if "BatchNorm" in case.name and case.name != "InnerBatchNorm":
        module.eval()  # while training they take their statistics for constants, as escnn does

    def penalty(inputs):
        torch.manual_seed(0)
        leaves = [t.tensor for x in inputs for t in (x.values() if isinstance(x, dict) else [x])]
        total = sum(y.square().sum() for y in outputs(module(*inputs)))
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return sum(g.square().sum() for g in grads), leaves

    value, leaves = penalty([doubled(x) for x in case.inputs(module)])
    grads = torch.autograd.grad(value, leaves)
    direction = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) for x in leaves]
    slope = sum((g * d).sum() for g, d in zip(grads, direction))

    def moved(step):
        remaining = iter(direction)

        def move(x):
            if isinstance(x, dict):
                return {label: move(t) for label, t in x.items()}
            return x.type((x.tensor.double() + step * next(remaining)).requires_grad_())

        return penalty([move(x) for x in case.inputs(module)])[0]

    step = 1e-6
    torch.testing.assert_close((moved(step) - moved(-step)) / (2 * step), slope, rtol=1e-4, atol=1e-4)


@each_case
def test_export(case):
    module = case.build(equiconv.nn)
    exported = module.export()
    inputs = case.inputs(module)

    def bare(x):
        return {label: t.tensor for label, t in x.items()} if isinstance(x, dict) else x.tensor

    with torch.no_grad():
        got = exported(*[bare(x) for x in inputs])
        for g, w in zip([got[k] for k in sorted(got)] if isinstance(got, dict) else [got], outputs(module(*inputs))):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, escnn.nn.EquivariantModule) for m in exported.modules())


@pytest.mark.parametrize("case", ACCELERATED, ids=lambda case: case.name)
def test_bad_input(case):
    module = case.build(equiconv.nn)
    if case.name == "MergeModule":
        pytest.skip("checked by its modules")
    inputs = case.inputs(module)
    with pytest.raises(TypeError, match=f"{case.name}: input must be a GeometricTensor .* got Tensor"):
        module(*[x.tensor for x in inputs])
    other = adjacent_irreps() if inputs[0].type != adjacent_irreps() else mixed()
    if not case.size or len(case.size) == 3:
        return
    with pytest.raises(ValueError, match=f"{case.name}: input must have type"):
        module(*[other(torch.randn(1, other.size, *case.size)) for _ in inputs])


@pytest.mark.parametrize("name,supports", [("InnerBatchNorm", "pointwise"), ("GroupPooling", "pointwise"),
                                           ("VectorFieldNonLinearity", "vectorfield")])
def test_unsupported_representations(name, supports):
    g = plane()
    with pytest.raises(ValueError, match=f"{name}: .* must support '{supports}'.* got 'irrep_1'"):
        getattr(equiconv.nn, name)(equiconv.nn.FieldType(g, [g.irrep(1)]))
    with pytest.raises(TypeError, match=f"{name}: in_type must be a FieldType, got str"):
        getattr(equiconv.nn, name)("regular")


@pytest.mark.parametrize("name", ["GNormBatchNorm", "IIDBatchNorm2d", "InnerBatchNorm", "VectorFieldNonLinearity"])
def test_jit_trace(name):
    module = MODULES[name].build(equiconv.nn).eval()
    (x,) = MODULES[name].inputs(module)
    container = torch.nn.Module()
    container.module, container.forward = module, lambda t: module(module.in_type(t)).tensor
    with torch.no_grad():
        traced = torch.jit.trace(container, x.tensor, check_trace=False)
        torch.testing.assert_close(traced(x.tensor), module(x).tensor)


@pytest.mark.parametrize("name", ["IIDBatchNorm1d", "IIDBatchNorm2d", "IIDBatchNorm3d", "InnerBatchNorm",
                                  "GNormBatchNorm", "NormBatchNorm", "InducedNormBatchNorm"])
def test_one_value_to_train_with(name):
    """Raises where escnn does; fields of several channels have more than one value in InnerBatchNorm."""
    ours, theirs = (MODULES[name].build(n).train().double() for n in (equiconv.nn, escnn.nn))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    shape = 1, ours.in_type.size, *[1] * (MODULES[name].inputs(ours)[0].tensor.dim() - 2)
    x = torch.randn(shape, dtype=torch.float64)
    if name.startswith(("IID", "Inner")):
        with pytest.raises((ValueError, AssertionError)):
            theirs(theirs.in_type(x))
        with pytest.raises(ValueError, match=f"{name}: expected more than 1 value per channel when training, got"):
            ours(ours.in_type(x))
        assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())
        ours.eval()
        assert torch.isfinite(ours(ours.in_type(x)).tensor).all()
    else:
        torch.testing.assert_close(ours(ours.in_type(x)).tensor, theirs(theirs.in_type(x)).tensor)


def test_one_pixel_of_wide_fields_has_several_values():
    ours, theirs = (n.InnerBatchNorm(of(plane(), plane().regular_repr)) for n in (equiconv.nn, escnn.nn))
    x = torch.randn(1, ours.in_type.size, 1, 1)
    torch.testing.assert_close(ours(ours.in_type(x)).tensor, theirs(theirs.in_type(x)).tensor)


@pytest.mark.parametrize("name", ["GNormBatchNorm", "IIDBatchNorm2d", "InnerBatchNorm", "NormBatchNorm"])
def test_nothing_to_train_with(name):
    module = MODULES[name].build(equiconv.nn).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name}: expected values to train with, got an input of"):
        module(module.in_type(torch.zeros(0, module.in_type.size, 4, 4)))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
