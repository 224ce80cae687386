"""Which method computes a convolution, that every method computes the same, and how the choice is measured."""
import copy
import pickle
import re
from dataclasses import replace
from pathlib import Path

import escnn.nn
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import equiconv
import equiconv.nn
from equiconv import autotuning, backends, calibration
from equiconv.basis import cache
from equiconv.layout import conv_tables, work
from equiconv.nn import costs, cuda_costs, planner
from equiconv.nn.costs import Costs
from equiconv.nn.planner import PlanReport
from tests import networks
from tests.cases import CASES, REAL, SMALL
from tests.test_nn_conv import assert_equal, gradient_like, run

SPATIAL = [case for case in SMALL if case.dimensions]
NEVER = Costs({"dense": np.zeros(7), "factorised": np.ones(5)})   # costs by which one method always loses
ALWAYS = Costs({"dense": np.ones(7), "factorised": np.zeros(5)})


@pytest.fixture
def layer():
    return CASES["c4_mixed"].build(equiconv.nn)


@pytest.fixture
def x():
    return CASES["c4_mixed"].input().tensor


def ops_of(function):
    """Names of equiconv's ops that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.name.removeprefix("equiconv::") for event in profile.events() if event.name.startswith("equiconv::")}


def cost(monkeypatch, known):
    monkeypatch.setattr(costs, "current", lambda: known)


# ---- the attribute ----

def test_method_is_an_attribute(layer, x):
    assert layer.method == "auto"
    for method, op in (("factorised", "steerable_conv"), ("dense", "expand_filter")):
        layer.method = method
        assert layer.method == method and ops_of(lambda: layer(layer.in_type(x))) == {op}
    with pytest.raises(ValueError, match=r"R2Conv: method must be one of \('auto', .*'dense'\), got 'fast'"):
        layer.method = "fast"
    assert layer.method == "dense"


def test_method_is_copied_and_pickled_but_no_state(layer, x):
    keys = layer.state_dict().keys()
    layer.method = "factorised"
    layer(layer.in_type(x))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.method == "factorised"
        assert torch.equal(other(other.in_type(x)).tensor, layer(layer.in_type(x)).tensor)
    assert layer.state_dict().keys() == keys


def test_accelerate_sets_the_method():
    case = CASES["c4_regular"]
    model = torch.nn.Sequential(case.build(escnn.nn), escnn.nn.ReLU(case.out_type))
    equiconv.accelerate(model)
    assert model[0].method == "auto"
    equiconv.accelerate(model, method="dense")
    assert model[0].method == "dense"
    equiconv.accelerate(model)
    assert model[0].method == "dense"
    report = equiconv.acceleration_report(model)
    assert [row.method for row in report] == ["dense", ""] and "dense" in str(report)
    with pytest.raises(ValueError, match="accelerate: method must be one of .* got 'fast'"):
        equiconv.accelerate(model, method="fast")


# ---- the choice ----

def test_auto_takes_what_costs_less(layer, x, monkeypatch):
    for known, op in ((NEVER, "expand_filter"), (ALWAYS, "steerable_conv")):
        cost(monkeypatch, known)
        layer._choices.clear()
        assert ops_of(lambda: layer(layer.in_type(x))) == {op}
        torch._dynamo.reset()
        compiled = torch.compile(lambda t: layer(layer.in_type(t)).tensor, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(layer.in_type(x)).tensor)
        assert ops_of(lambda: compiled(x)) == {op}  # noqa: B023


def test_a_choice_is_made_once_for_a_shape_and_a_purpose(layer, x, monkeypatch):
    asked = []
    monkeypatch.setattr(costs, "current", lambda: asked.append(1) or NEVER)

    def calls(batch):
        layer(layer.in_type(x[:batch]))
        return len(asked)

    assert [calls(2), calls(2), calls(1), calls(2)] == [1, 1, 2, 2]
    layer.eval()
    with torch.no_grad():
        assert [calls(2), calls(2)] == [3, 3]
    monkeypatch.setattr("equiconv.nn.planner.REMEMBERED", 2)
    for batch in (1, 2, 1, 2):
        calls(batch)
    assert len(layer._choices) <= 3


@pytest.mark.parametrize("name,training,inference", [
    *[(name, "factorised", "factorised") for name in ("c8_16_k5", "d8_16_k5", "c16_32_k5", "so3_16_k5", "c4_32_k3")],
    ("c8_cnn_layer1", "dense", None),         # one channel in, many out: the adjoint's harmonics are of those
    ("e2sfcnn_c16_layer6", None, "dense")])   # one pixel for each image: to pack the weights takes longer
def test_choices_by_the_built_in_costs(name, training, inference, monkeypatch):
    cost(monkeypatch, costs.BUILT_IN)
    case = CASES[name]
    module = case.build(equiconv.nn)
    for mode, method in ((True, training), (False, inference)):
        report = module.train(mode).plan_report((case.cpu_batch, case.in_type.size, *case.size))
        assert method is None or report.method == method


@pytest.fixture
def switches():
    """TF32 where torch computes in float32: set(allowed)."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def set_(convolutions, products):
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products

    yield set_
    set_(*before)


@pytest.mark.parametrize("name,choices", [  # in bfloat16, TF32 and float32
    ("c8_16_k3", ("dense", "dense", "two_pass")), ("c8_16_k5", ("dense", "dense", "two_pass")),
    ("c16_32_k5", ("two_pass",) * 3), ("so3_16_k5", ("two_pass",) * 3), ("wrn28_10_d8", ("two_pass",) * 3),
    ("c8_cnn_layer1", ("dense",) * 3), ("e2sfcnn_c16_layer2", ("two_pass",) * 3)])
def test_choices_on_a_gpu_by_the_built_in_rates(name, choices, switches):
    """Two passes win in float32, and where layers are wide: what they move grows less than a convolution's work."""
    case = CASES[name]
    module = case.build(equiconv.nn)
    geometry = module.geometry((case.batch, module.in_type.size, *case.size))
    for dtype, tf32, choice in zip((torch.bfloat16, torch.float32, torch.float32), (False, True, False), choices):
        switches(tf32, tf32)
        found = planner.cuda_costs_of(module.plan, geometry, case.batch, True, torch.device("cpu"), dtype)
        assert min(found, key=found.get) == choice, (dtype, found)


def test_estimates_on_a_gpu(switches):
    switches(False, False)
    case = CASES["c8_16_k5"]
    module = case.build(equiconv.nn)

    def found(method, batch=64, dtype=torch.float32, backward=False, rates=cuda_costs.BUILT_IN):
        geometry = module.geometry((batch, 128, 32, 32))
        return cuda_costs.estimate(method, module.plan, geometry, batch, dtype, backward, rates)

    for method in cuda_costs.METHODS:
        assert found(method).seconds < found(method, backward=True).seconds < 4 * found(method).seconds
        assert found(method, dtype=torch.bfloat16).seconds < found(method).seconds
        slow = replace(cuda_costs.BUILT_IN, call=1.0)
        assert 1 < found(method, rates=slow).seconds / (2 if method == "dense" else 4) < 10
    pixels = 64 * 32 * 32  # 1408 z's and 128 of y^ for each, in slices; and x^
    assert found("two_pass").scratch <= 4 * (128 * 64 * 36 * 36 + (1 << 26) * 1.1 + 1536)
    assert found("two_pass", batch=1).scratch == 4 * (128 * 36 * 36 + 32 * 32 * (1408 + 128)) < 4 * pixels * 1408
    assert found("dense").scratch == 4 * 128 * 128 * 25
    switches(True, False)
    assert cuda_costs.precision(torch.float32, "convolutions") == "tf32"
    assert cuda_costs.precision(torch.float32, "products") == "float32"
    assert cuda_costs.precision(torch.bfloat16, "convolutions") == "bfloat16"


def test_rates_are_kept_as_they_are():
    kept = cuda_costs._from_array(cuda_costs._to_array(cuda_costs.BUILT_IN))
    assert kept == cuda_costs.BUILT_IN and cuda_costs.current(torch.device("cpu")) is cuda_costs.BUILT_IN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_without_a_gpu(layer, x, dtype, reason="it needs a CUDA device, not 'cpu'"):
    layer.to(dtype).method = "fused"
    with pytest.raises(ValueError, match=f"method 'fused' cannot be used here: .*{reason}"):
        layer(layer.in_type(x.to(dtype)))
    report = layer.plan_report()
    assert report.method == "dense" and reason in report.reason
    assert layer.candidates(x) == ("factorised", "dense")


def test_two_passes_without_a_gpu(layer, x, monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INTERPRET", False)
    layer.method = "two_pass"
    with pytest.raises(ValueError, match="method 'two_pass' cannot be used here: no kernels on 'cpu': it runs on CUDA"):
        layer(layer.in_type(x))
    report = layer.plan_report()
    assert report.method == "dense" and "'two_pass' cannot be used: no kernels on 'cpu'" in report.reason
    large = CASES["ico_icosidodeca"].build(equiconv.nn)
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    large.method = "two_pass"
    assert large.plan_report().method == "dense" and "sums over the taps are supported" in large.plan_report().reason


def test_plan_report(layer, x):
    report = layer.plan_report()
    assert isinstance(report, PlanReport) and report.input_shape == (4, x.shape[1], 32, 32)
    layer(layer.in_type(x))
    report = layer.plan_report()
    filter = layer.expand_parameters()[0]
    assert report.input_shape == tuple(x.shape)
    assert report.dense == filter.numel() and report.dense_bytes == filter.numel() * 4
    assert report.method in ("factorised", "dense") and "estimated for a training step" in report.reason
    assert "multiplications per pixel" in str(report) and str(list(x.shape)) in str(report)
    assert "inference" in layer.eval().plan_report().reason
    layer.method = "dense"
    assert layer.plan_report().method == "dense" and "module's method" in layer.plan_report().reason
    layer(layer.in_type(x[:1]))
    assert layer.plan_report().input_shape == (1, *x.shape[1:])
    half = CASES["c4_mixed"].build(equiconv.nn, recompute=True).bfloat16()
    assert half.plan_report().method == "dense" and "bfloat16" in half.plan_report().reason


@pytest.mark.parametrize("name,products,mixing,all_of_it", [
    ("c8_16_k3", 21504, 16896, 22000), ("c8_16_k5", 39424, 30976, 45000), ("c16_32_k5", 337920, 259072, 323000),
    ("d4_16_k3", 18432, 18432, 23100), ("d8_16_k5", 78848, 78848, 111000), ("so2_16_k5", 30464, 23552, 34000),
    ("o2_16_k5", 15616, 15616, 26000), ("so3_16_k5", 28416, 28416, 90000)])
def test_multiplications_of_layers(name, products, mixing, all_of_it):
    """Products: sum over the paths of multiplicities and size of the output irrep, counted by hand.

    Mixing takes three instead of four for each output irrep that is complex.
    """
    module = CASES[name].build(equiconv.nn)
    geometry = module.geometry((1, module.in_type.size, *CASES[name].size))
    for adjoint in (False, True):
        found = costs.factorised_work(module.plan, geometry.adjoint if adjoint else geometry, adjoint)
        assert (found.products, found.mixing) == (products, mixing) and mixing < found.multiplications <= all_of_it
    assert module.plan_report().factorised <= all_of_it < module.plan_report().dense


def test_multiplications_of_strided_and_grouped_layers():
    def report(name):
        module = CASES[name].build(equiconv.nn)
        return module.plan_report(), module.expand_parameters()[0].numel()

    found, elements = report("c8_16_k5_transposed")  # each output pixel sees a quarter of the taps
    assert found.dense == elements / 4
    found, elements = report("c4_depthwise")
    assert found.dense == elements
    one, _ = report("c4_regular")
    assert found.factorised_bytes < one.factorised_bytes


@pytest.mark.parametrize("case", SPATIAL, ids=lambda case: case.name)
def test_packed_weights_are_those_of_the_report(case):
    """At least one element for each product of a weight, none where nothing is mixed."""
    module = case.build(equiconv.nn)
    found = work.work_of(module.plan.factorised(module.kernel), module.kernel, *[(1,) * module.d] * 2, 1, False)
    assert 0 < found.packed <= found.mixing and found.entries > 0


def test_padded_pixels():
    module = CASES["c4_k7"].build(equiconv.nn)
    for size, most in (((64, 64), 1.1), ((5, 5), 2.7), ((1, 1), 16), ((1, 100), 1.2)):
        pixels = costs.padded_pixels(module.geometry((1, module.in_type.size, *size)))
        assert size[0] * size[1] <= pixels <= most * size[0] * size[1]
    transposed = CASES["c8_16_k5_transposed"].build(equiconv.nn)
    geometry = transposed.geometry((1, transposed.in_type.size, 16, 16))
    assert geometry.target_size == (32, 32) and 1024 <= costs.padded_pixels(geometry) <= 1.5 * 1024


# ---- what the factorised method cannot do ----

def dense_and_forced(module, call, match, error=ValueError):
    """Auto computes as the dense method does; the factorised one, asked for, raises and says why."""
    module.method = "dense"
    want = call()
    module.method = "auto"
    assert torch.equal(call(), want)
    module.method = "factorised"
    with pytest.raises(error, match=match):
        call()


@pytest.fixture
def eager_to_factorise(monkeypatch):
    cost(monkeypatch, ALWAYS)


@pytest.mark.usefixtures("eager_to_factorise")
class TestDenseInstead:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, layer, x, dtype):
        def call():
            with torch.autocast("cpu", dtype=dtype):
                return layer(layer.in_type(x)).tensor

        dense_and_forced(layer, call, "'factorised' cannot be used here: autocast is on")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_low_precision(self, x, dtype):
        module = CASES["c4_mixed"].build(equiconv.nn, recompute=True).to(dtype)
        dense_and_forced(module, lambda: module(module.in_type(x.to(dtype))).tensor, f"not in {dtype}")

    def test_functional_transforms(self, layer, x):
        layer.eval()

        def call():
            return torch.func.vmap(lambda image: layer(layer.in_type(image[None])).tensor[0])(x)

        dense_and_forced(layer, call, "torch.func")

    def test_forward_mode(self, layer, x):
        y = layer(layer.in_type(x)).tensor
        no_bias = y - layer(layer.in_type(0 * x)).tensor

        def call():
            with forward_ad.dual_level(), torch.no_grad():
                dual = layer(layer.in_type(forward_ad.make_dual(x, x))).tensor
                torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, no_bias, rtol=1e-4, atol=1e-5)
                return dual.clone()

        dense_and_forced(layer, call, "forward mode")

    def test_other_devices(self, layer, x):
        layer.to("meta").method = "factorised"
        with pytest.raises(ValueError, match="no kernels on 'meta'"):
            layer(layer.in_type(x.to("meta")))
        layer.method = "auto"
        assert layer.method_for(x.to("meta")) == "dense"

    def test_tensor_subclasses(self, layer, x):
        class Mine(torch.Tensor):
            pass

        dense_and_forced(layer, lambda: layer(layer.in_type(x.as_subclass(Mine))).tensor.as_subclass(torch.Tensor),
                         "a tensor is a Mine")

    def test_without_kernels(self, layer, x, monkeypatch):
        monkeypatch.setitem(backends.HAS_NATIVE, "cpu", False)
        with pytest.raises(ValueError, match="no kernels on 'cpu'"):
            layer.method = "factorised"
            layer(layer.in_type(x))
        layer.method = "auto"
        assert layer.plan_report().method == "dense"

    def test_layers_that_are_too_large(self, layer, x, monkeypatch):
        monkeypatch.setattr(conv_tables, "MAX_TERMS", 3)
        dense_and_forced(layer, lambda: layer(layer.in_type(x)).tensor, "at most 3 components of a field and terms")
        with pytest.raises(ValueError, match="cannot be computed in factorised form: at most 3 components"):
            equiconv.ops.steerable_conv(x, layer.weights, layer.plan, layer.kernel, padding=1)

    def test_other_dtypes_raise_as_before(self, layer, x):
        with pytest.raises(ValueError, match="input must have dtype torch.float32.*float64"):
            layer(layer.in_type(x.double()))

    def test_export(self, layer, x):
        want = layer.eval()(layer.in_type(x)).tensor.detach()

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                return self.layer(self.layer.in_type(x)).tensor

        with torch.no_grad():
            program = torch.export.export(Model(), (x,))
        assert not [n for n in program.graph.nodes if "steerable_conv" in str(n.target)]
        torch.testing.assert_close(program.module()(x), want)
        torch.testing.assert_close(layer.export()(x), want)
        layer.method = "factorised"
        with pytest.raises(Exception, match="the graph of an export is dense"):
            torch.export.export(Model(), (x,))

    def test_limit_is_that_of_the_kernels(self):
        source = (Path(__file__).parent.parent / "csrc" / "cpu" / "steerable_conv.cpp").read_text()
        assert int(re.search(r"\bkMaxTerms = (\d+)", source)[1]) == conv_tables.MAX_TERMS


# ---- whole networks ----

@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_compute_the_same(name):
    """Outputs in both modes, and the loss over steps of training."""
    found = {}
    for method in ("factorised", "dense"):
        model = equiconv.accelerate(networks.build(name), method=method)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        images, outputs = networks.images(name), []
        for _ in range(3):
            y = model(images)
            outputs.append(y.detach())
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            outputs.append(model.eval()(images))
        found[method] = outputs
    assert_equal(found["factorised"], found["dense"], 1e-4)


def test_activation_checkpointing():
    case = CASES["c4_mixed"]
    module, x = case.build(equiconv.nn), case.input().tensor
    module.method = "factorised"
    want = run(module, x)[1]
    for reentrant in (False, True):
        leaf = x.clone().requires_grad_()
        y = checkpoint(lambda t: module(module.in_type(t)).tensor, leaf, use_reentrant=reentrant)
        y.backward(gradient_like(y))
        assert_equal([leaf.grad], [want], 1e-6)


# ---- measurements ----

def test_calibration_finds_costs(monkeypatch):
    monkeypatch.setattr(calibration, "BUDGET_S", 0.0)
    threads = torch.get_num_threads()
    with torch.inference_mode():
        found = calibration.measure()
    assert torch.get_num_threads() == threads
    for method, names in costs.AMOUNTS.items():
        seconds = found.seconds[method]
        assert seconds.shape == (len(names),) and (seconds >= 0).all() and (seconds > 0).sum() >= 2


def test_costs_that_explain_the_times_are_found():
    generator = np.random.default_rng(0)
    exact = np.array([1e-11, 3e-9, 0, 5e-5])
    amounts = generator.uniform(1, 10, (12, 4)) * [1e8, 1e5, 1e6, 1]
    assert np.allclose(calibration._fit(amounts, amounts @ exact), exact, rtol=1e-6, atol=1e-18)


def test_a_disturbed_layer_does_not_bend_the_costs_of_others():
    exact = np.array([1e-11, 3e-9, 5e-5])
    amounts = np.random.default_rng(0).uniform(1, 10, (12, 3)) * [1e8, 1e5, 1]
    seconds = amounts @ exact
    seconds[3] *= 5
    assert np.allclose(calibration._fit(amounts, seconds), exact, rtol=0.15)  # squares alone: by more than half


def test_amounts_of_the_dense_method():
    """One channel out is computed as sixteen; a filter that is kept is not expanded."""
    module = CASES["c4_regular"].build(equiconv.nn)
    plan, geometry = module.plan, module.geometry((2, module.in_type.size, 9, 7))
    names = costs.AMOUNTS["dense"]
    kept, forward, training = (dict(zip(names, costs.amounts("dense", plan, geometry, 2, *options)))
                               for options in ((False, False), (False, True), (True, True)))
    pixels = 2 * np.prod(geometry.target_size)
    assert kept["forward"] == pixels * plan.taps * 4 * np.ceil(plan.in_channels / 4) * 16 * np.ceil(
        plan.out_channels / 16)
    assert kept["moved"] == 2 * 9 * 7 * plan.in_channels + pixels * plan.out_channels
    assert [a["filter"] for a in (kept, forward, training)] == [n * plan.out_channels * plan.in_channels * plan.taps
                                                                for n in (0, 1, 2)]
    assert [a["expansions"] for a in (kept, forward, training)] == [0, 1, 2]
    assert [a["calls"] for a in (kept, forward, training)] == [1, 1, 3]
    assert training["moved back"] == 2 * kept["moved"] and kept["moved back"] == kept["backward"] == 0


def test_more_threads_share_all_but_the_calls(monkeypatch):
    known = Costs({"dense": np.ones(7), "factorised": np.ones(5)})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert known.time("dense", np.full(7, 4)) == 13 and known.time("factorised", np.full(5, 4)) == 8


def test_costs_are_measured_once_and_kept(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(calibration, "measure", lambda: measured.append(1) or ALWAYS)
    assert costs.current() is costs.BUILT_IN and not measured
    for module in (backends, cache):
        monkeypatch.setattr(module, "CACHE_FOLDER", str(tmp_path))
    for _ in range(2):
        for method in costs.METHODS:
            assert np.array_equal(costs.current().seconds[method], ALWAYS.seconds[method])
        costs._calibrated.cache_clear()
        cache.forget()  # as in another process
    assert measured == [1] and len(list(tmp_path.iterdir())) == 1
    costs.keep(NEVER)
    assert np.array_equal(costs.current().seconds["factorised"], NEVER.seconds["factorised"]) and measured == [1]
    costs._calibrated.cache_clear()
    cache.forget()
    assert np.array_equal(costs.current().seconds["factorised"], NEVER.seconds["factorised"]) and measured == [1]
    costs._calibrated.cache_clear()
    cache.forget()


@pytest.mark.parametrize("train", [True, False])
def test_autotune_takes_the_faster_method(monkeypatch, train):
    name = "c8_steerable_cnn"
    model = networks.build(name, equiconv.nn).train(train)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    measured = []

    def time_of(function, budget_s, device):
        function()
        measured.append(budget_s)
        assert device.type == "cpu"
        return 1.0 if len(measured) % 3 else 2.0

    monkeypatch.setattr(autotuning, "time_of", time_of)
    report = equiconv.autotune(model, networks.images(name), budget_s=0.5)
    convolutions = {n: m for n, m in model.named_modules() if hasattr(m, "method")}
    assert [t.name for t in report] == list(convolutions) and len(measured) == 2 * len(report)
    for tuned in report:
        assert tuned.method == convolutions[tuned.name].method
        assert tuned.method == min(tuned.seconds, key=tuned.seconds.get) and set(tuned.seconds) == set(costs.METHODS)
        assert tuned.input_shape[0] == 3 and tuned.name in str(report)
    assert {t.method for t in report} == {"factorised", "dense"}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(m.training == train for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_autotune_leaves_what_has_no_choice(x):
    reached, other = (CASES["c4_mixed"].build(equiconv.nn) for _ in range(2))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.reached, self.other = reached, other

        def forward(self, x):
            return self.reached(x)

    model = Model()
    other.method = "dense"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = equiconv.autotune(model, reached.in_type(x))
    assert [t.method for t in report] == ["auto", "dense"]
    assert report[0].reason == "autocast is on" and report[1].reason == "the example does not reach it"
    assert str(autotuning.TuningReport()) == "no convolutions"
    with pytest.raises(TypeError, match="autotune: model must be a torch.nn.Module, got str"):
        equiconv.autotune("model", x)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in REAL if case.dimensions], ids=lambda case: case.name)
def test_estimates_are_of_the_right_order(case, monkeypatch):
    """Where the methods differ by more than a factor of four, auto takes the faster one."""
    cost(monkeypatch, calibration.measure())
    module = case.build(equiconv.nn)
    x = case.input(batch=1).tensor.requires_grad_()
    seconds = {}
    for method in costs.METHODS:
        module.method = method
        seconds[method] = calibration.time_of(lambda: calibration.run(module, x, True), 0.2)
    module.method = "auto"
    if max(seconds.values()) > 4 * min(seconds.values()):
        assert module.method_for(x) == min(seconds, key=seconds.get)


def test_a_submodule_by_the_name_of_planned(layer):
    model = torch.nn.Module()
    model.planned = layer
    assert planner.planned_of(model) is None and planner.planned_of(layer) is layer
