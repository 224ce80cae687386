"""The benchmark runner, its records and its report. No time is asserted."""
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

import equiconv.nn
from benchmarks import (
    arithmetic,
    construction,
    equality,
    field_layers,
    labels,
    layers,
    machine,
    network_steps,
    networks,
    plots,
    precision,
    records,
    registry,
    report,
    run,
    timing,
)
from benchmarks.equality import Differs
from benchmarks.machine import ROOT
from benchmarks.timing import Measurement
from equiconv import models
from tests.cases import CASES, LARGE, REAL, SMALL

TINY = "c4_regular"
FLOAT32 = precision.PRECISIONS["float32"]


def invoke(app, *arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def row(median_ms=2.0, **columns):
    known = dict(date="2026-01-01T00:00:00+00:00", machine="a-machine", case="a_case", op="conv", mode="training",
                 dtype="float32", layout="contiguous", method="equiconv", median_ms=median_ms, p20_ms=median_ms,
                 p80_ms=median_ms, speedup=3.0, speedup_p20=2.9, speedup_p80=3.1, floor_ms=0.5)
    return records.Row(**{**known, **columns})


# cases

def test_names_are_unique():
    assert not [name for name, count in Counter(case.name for case in SMALL + REAL + LARGE).items() if count > 1]


def test_types_are_built_where_they_are_used():
    code = "from tests import cases; assert cases.space.cache_info().currsize == 0; " \
           "assert not any('in_type' in vars(c) or 'out_type' in vars(c) for c in cases.CASES.values())"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_cases_compute(case):
    import escnn.nn
    module, x = case.build(escnn.nn), case.input(batch=1)
    output = module(x).tensor
    assert output.shape[:2] == (1, case.out_type.size) and output.std() > 0.1
    assert torch.equal(module.weights, case.build(escnn.nn).weights)
    assert torch.equal(x.tensor, case.input(batch=1).tensor)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_plain_layer_has_the_same_shape(case):
    import escnn.nn
    x = case.input(batch=1)
    assert layers.plain_layer(case)(x.tensor).shape == case.build(escnn.nn)(x).tensor.shape


def test_presets_name_cases():
    for preset in registry.PRESETS.values():
        assert registry.select(preset.cases) or set(preset.ops) <= set(field_layers.OPS)  # those bring their cases
        assert set(preset.ops) <= set(registry.OPS)
        assert all(name in precision.PRECISIONS for name in preset.dtypes)
        for pattern in preset.compiled:
            assert registry.select([pattern])
    with pytest.raises(ValueError, match="no case matches 'nonsense'"):
        registry.select(["nonsense"])


# the runner

@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(machine, "measure_peaks", lambda *_: machine.Peaks(1e12, 1e11))
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", 0.0)
    monkeypatch.setattr(timing, "MAX_SAMPLE_S", 1e-9)
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)


@pytest.mark.parametrize("case", [TINY, "so3_transposed_stride2", "linear_c8"])
def test_run_writes_rows(small_machine, tmp_path, case):
    out = tmp_path / "out.csv"
    arguments = ["--case", case, "--device", "cpu", "--op", "conv,expand_filter", "--budget", 1e-6, "--out", out]
    result = invoke(run.app, *arguments)
    assert result.exit_code == 0, result.output
    assert out.read_text().splitlines()[0].split(",") == list(records.COLUMNS)
    rows = records.read(out)
    forced = 0 if case == "linear_c8" else 2
    assert len(rows) == (3 + forced) * 3 + 2 * 2  # the methods that convolve; two expand a filter
    for r in rows:
        assert (r.case, r.dtype, r.device) == (case, "float32", "cpu") and r.date and r.machine and r.torch
        assert 0 < r.p20_ms <= r.median_ms <= r.p80_ms and r.speedup > 0 and r.floor_ms > 0
        assert r.method.startswith("equiconv") or r.error == ""
    assert all(r.error < FLOAT32.tolerance for r in rows if r.method.startswith("equiconv"))


@pytest.mark.parametrize("op,case", [("field_norm", "iid_so2"), ("fourier_act", "fourier_so2"),
                                     ("field_gate", "gated_so2"), ("field_pool", "norm_pool_so2"),
                                     ("conv_block", "c4_32_k3_relu"), ("conv_block", "c8_16_k5_norm_elu")])
def test_run_of_layers_between_convolutions(small_machine, tmp_path, monkeypatch, op, case):
    small = replace(field_layers.LAYERS[case], size=(5, 5), batch=2)
    monkeypatch.setitem(field_layers.LAYERS, case, small)
    monkeypatch.setitem(registry.CASES_OF_OPS, case, small)
    out = tmp_path / "out.csv"
    result = invoke(run.app, "--case", case, "--device", "cpu", "--op", op, "--budget", 1e-6, "--out", out)
    assert result.exit_code == 0, result.output
    rows = records.read(out)
    assert [(r.case, r.op, r.mode, r.method) for r in rows] == [
        (case, op, field_layers.OPS[op], method) for method in ("escnn", "equiconv")]
    assert rows[1].error < FLOAT32.tolerance and rows[1].memory_mb > 0
    assert op == "conv_block" or rows[1].memory_mb <= rows[0].memory_mb  # of so small an image, weights take the most


def test_run_of_a_step_of_a_whole_network(small_machine, tmp_path, monkeypatch):
    small = network_steps.Network("p4_cnn", "z2_cnn", batches=(2, 2))
    monkeypatch.setitem(registry.CASES_OF_OPS, "p4_cnn", small)
    out = tmp_path / "out.csv"
    result = invoke(run.app, "--case", "p4_cnn", "--device", "cpu", "--op", "network", "--budget", 1e-6, "--out", out)
    assert result.exit_code == 0, result.output
    rows = {r.method: r for r in records.read(out)}
    assert list(rows) == ["escnn", "equiconv_convolutions", "equiconv", "equiconv_irreps", "torch", "twin"]
    assert all((r.case, r.op, r.mode, r.size) == ("p4_cnn", "network", "training", "28x28") for r in rows.values())
    assert rows["equiconv"].error < FLOAT32.tolerance and rows["equiconv"].median_ms > 0
    assert (rows["torch"].note, rows["twin"].note) == ("z2_cnn_wide", "z2_cnn")


def test_a_network_that_computes_something_else_is_not_timed(monkeypatch):
    case = network_steps.Network("p4_cnn", "z2_cnn", batches=(2, 2))
    build = network_steps._uninitialised

    def other(name, options):
        model = build(name, options)
        model.register_forward_hook(lambda model, images, logits: 1.01 * logits)  # of its accelerated copy, too
        return model

    monkeypatch.setattr(network_steps, "_uninitialised", other)
    with pytest.raises(Differs, match="p4_cnn, equiconv: relative error"):
        network_steps.measure(case, "cpu", "float32", 0, lambda *_: pytest.fail("timed"))


def test_networks_are_published_with_twins():
    assert not set(network_steps.NETWORKS) & {*CASES, *field_layers.LAYERS}
    for case in network_steps.NETWORKS.values():
        assert {case.model or case.name, case.twin, f"{case.twin}_wide"} <= set(models.names())
        assert case.shape_on("cuda") == models.input_shape(case.model or case.name)
    assert network_steps.NETWORKS["e2wrn28_10"].shape_on("cpu") == (3, 16, 16)
    sized = network_steps.NETWORKS["deeplense_c4_cnn"]
    assert sized.size_on("cpu") == {"image_size": 64} and sized.size_on("cuda") == {}


def test_a_step_changes_every_weight():
    model = models.create("z2_cnn", width=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = network_steps.Step(model, torch.randn(4, 1, 28, 28), torch.arange(4), FLOAT32)
    step.optimizer.param_groups[0]["lr"] = 0.1
    step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() > 1)


def test_layers_between_convolutions():
    assert not set(field_layers.LAYERS) & set(CASES)
    for layer in field_layers.LAYERS.values():
        assert layer.op in registry.OPS


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_run_in_other_dtypes(small_machine, tmp_path, dtype):
    out = tmp_path / "out.csv"
    result = invoke(run.app, "--case", TINY, "--device", "cpu", "--dtype", dtype, "--op", "conv", "--layout",
                    "channels_last", "--budget", 1e-6, "--out", out)
    assert result.exit_code == 0, result.output
    assert {(r.dtype, r.layout) for r in records.read(out)} == {(dtype, "channels_last")}


def test_wrong_results_are_not_timed(small_machine, tmp_path, monkeypatch):
    namespace = layers.equiconv_nn()
    forward = namespace.R2Conv._convolve
    monkeypatch.setattr(namespace.R2Conv, "_convolve", lambda *arguments: 1.001 * forward(*arguments))
    out = tmp_path / "out.csv"
    result = invoke(run.app, "--case", TINY, "--device", "cpu", "--op", "conv", "--out", out)
    assert result.exit_code == 1 and "relative error 1.0e-03" in result.output and not out.exists()


@pytest.mark.parametrize("arguments, message", [
    (["--case", "nonsense"], "no case matches"), (["--dtype", "int8"], "dtype must be"),
    (["--op", "nonsense"], "op must be"), (["--preset", "nonsense"], "preset must be"),
    (["--layout", "nonsense"], "layout must be"), (["--device", "nonsense"], "device must be"),
    (["--device", "cpu", "--dtype", "tf32"], "needs a CUDA"),
])
def test_wrong_arguments(arguments, message):
    result = invoke(run.app, *arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.slow
def test_compiled_escnn():
    case = CASES[TINY]
    layer = layers.build(case, "escnn", "cpu", FLOAT32)
    compiled = layers.build(case, "escnn_compiled", "cpu", FLOAT32, like=layer)
    assert equality.worst_error(compiled.training(), layer.training()) < FLOAT32.tolerance


def test_failed_compilation_is_recorded(monkeypatch):
    def fail(_):
        raise RuntimeError("no compiler here\nand much more")

    layer = layers.build(CASES[TINY], "escnn", "cpu", FLOAT32)
    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(layers.Unavailable, match="torch.compile: RuntimeError: no compiler here$"):
        layers.build(CASES[TINY], "escnn_compiled", "cpu", FLOAT32, like=layer)


@pytest.mark.slow
def test_construction(monkeypatch):
    monkeypatch.setattr(construction, "REPEATS", 1)
    found = construction.measure(TINY, construction.METHODS, "cold_no_init")
    assert all(built.samples[0] > 0 and built.types_s > 0 and built.peak_mb > 50 for built in found.values())
    with pytest.raises(construction.Failed, match="nonsense"):
        construction.measure("nonsense", ["escnn"], "warm")


@pytest.mark.slow
@pytest.mark.parametrize("name,initialize,seconds,megabytes", [
    ("d8_16_k5", False, 0.5, 1000), ("d16_16_k5", False, 1, 1000), ("octahedral_1_k5", False, 2, 1000),
    ("icosahedral_1_k5", False, 10, 1000), ("d8_64_k5", True, 0.5, 1000), ("wrn28_10", True, 20, 3000)])
def test_layers_are_built_in_time(name, initialize, seconds, megabytes):
    found = construction._build_in_process(name, "equiconv", initialize, timeout_s=120)
    assert found["types_s"] + found["seconds"] < seconds and found["peak_mb"] < megabytes


@pytest.fixture
def two_to_one(monkeypatch):
    """escnn builds everything in two seconds, equiconv in one."""
    monkeypatch.setattr(construction, "_build_in_process",
                        lambda name, method, *_: dict(seconds=1.0 + (method == "escnn"), types_s=0.5, peak_mb=99))


def test_run_of_construction_alone(two_to_one, tmp_path):
    out = tmp_path / "out.csv"
    result = invoke(run.app, "--device", "cpu", "--op", "construction", "--out", out)
    assert result.exit_code == 0, result.output
    rows = records.read(out)
    built = {name: set(modes) for name, modes in construction.SUBJECTS.items() if name in CASES}
    assert {row.case for row in rows} == built.keys() and len(built) > 5
    for name, modes in built.items():
        assert {row.mode for row in rows if row.case == name} == modes
    assert {row.speedup for row in rows if row.method == "equiconv"} == {2.0}


def test_construction_table(two_to_one):
    result = invoke(construction.app, "--case", TINY, "--mode", "warm")
    assert result.exit_code == 0 and f"{TINY}, warm: escnn 2 s, equiconv 1 s" in result.output
    assert invoke(construction.app, "--mode", "tepid").exit_code == 2
    for name, modes in construction.SUBJECTS.items():
        assert (name in CASES or hasattr(networks, name)) and set(modes) <= set(construction.MODES)


def test_wrn28_10_has_the_weights_of_the_plain_network():
    layers = networks.wrn28_10(equiconv.nn, initialize=False)
    assert len(layers) == 1 + 3 * (8 + 1)
    assert 36.0e6 < sum(layer.weights.numel() for layer in layers) < 37.0e6


# arithmetic, timing, equality

def test_work_of_a_known_layer():
    """c8_16_k3: per pixel 147k dense multiply-adds; 21.5k of mixing, and 17 of folded harmonics per channel.

    With three real products for a complex one, 16.9k of mixing.
    """
    case = CASES["c8_16_k3"]
    pixels = case.cpu_batch * 32 * 32
    escnn_layer = layers.build(case, "escnn", "cpu", FLOAT32)
    dense = arithmetic.work_of("torch", case, layers.build(case, "torch", "cpu", FLOAT32, like=escnn_layer))
    layer = layers.build(case, "equiconv", "cpu", FLOAT32, like=escnn_layer)
    ours, one, two = (arithmetic.work_of(m, case, layer)
                      for m in ("equiconv", "equiconv_factorised", "equiconv_two_pass"))
    assert dense["inference"].flops == 2 * pixels * 128 * 128 * 9
    pointwise = 128 * 17 + 768 + 32 * 8 * 8  # harmonics, sums, changes of basis of 16 fields each
    for found, mixing in ((ours, 16896), (one, 16896), (two, 21504)):
        assert found["inference"].flops == 2 * pixels * (pointwise + mixing)
        assert found["training"].flops == 2 * pixels * (2 * pointwise + 3 * mixing)  # one z for both gradients
    hat = case.cpu_batch * 34 * 34 * 128  # x^ with its padding; for each pixel 768 z's and 128 numbers of y^
    assert two["forward"].bytes - one["forward"].bytes == 4 * 2 * (hat + pixels * (768 + 128))
    more = 4 * 2 * hat + 4 * pixels * (3 * 768 + 4 * 128)  # z is read by both products, and g^ is made as y^ is
    assert two["training"].bytes - one["training"].bytes == two["forward"].bytes - one["forward"].bytes + more
    assert dense["training"].flops == 3 * dense["inference"].flops
    assert arithmetic.work_of("escnn", case, escnn_layer)["forward"].flops > dense["forward"].flops


@pytest.mark.parametrize("measurement, reason", [
    (Measurement((1.0,) * 10), ""),
    (Measurement((1.0,) * 4), "samples: 4"),
    (Measurement((1.0, 1.5) * 10), "spread p80/p20 1.50"),
    (Measurement((1.0,) * 10 + (1.2,) * 10), "drift 20%"),
    (Measurement((1.0,) * 10, others=0.4), "CPUs 40% busy elsewhere"),
    (Measurement((1.0,) * 19 + (5.0,)), ""),  # a single slow sample does no harm
])
def test_noise(measurement, reason):
    assert measurement.noisy == reason


def test_samples_are_of_one_length():
    calls = {"slow": 0, "fast": 0}

    def wait(name, seconds):
        calls[name] += 1
        time.sleep(seconds)
    timing.interleave({"slow": lambda: wait("slow", 20e-3), "fast": lambda: wait("fast", 2e-3)}, "cpu", budget_s=0.0)
    fast, slow = calls["fast"] - 3, calls["slow"] - 3  # without the first ones
    assert slow == timing.MIN_ROUNDS and 3 * slow <= fast <= 10 * slow  # a short sleep lasts longer than it should


def test_samples_are_interleaved():
    calls = []
    found = timing.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, "cpu", budget_s=0.0)
    assert all(len(m.samples) == timing.MIN_ROUNDS for m in found.values())
    order = [name for name, before in zip(calls, [None, *calls]) if name != before]
    assert "".join(order[-5:]) in ("ababa", "babab")


def test_ratios_are_paired():
    slow, fast = Measurement((2.0, 20.0, 4.0)), Measurement((1.0, 10.0, 2.0))
    assert timing.paired_ratios(slow, fast) == [2.0, 2.0, 2.0]
    assert timing.percentile([1, 2, 3, 4, 5], 20) == pytest.approx(1.8)


@pytest.mark.parametrize("actual", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, float("nan")]), torch.ones(3)])
def test_differences_are_refused(actual):
    with pytest.raises(equality.Differs, match="a case"):
        equality.check("a case", [actual], [torch.tensor([1.0, 2.0])], 1e-2)


def test_names_of_machines():
    assert machine.cpu_slug("Intel(R) Xeon(R) Processor @ 2.60GHz") == "xeon"
    assert machine.cpu_slug("AMD EPYC 7763 64-Core Processor") == "amd-epyc-7763"
    assert machine.cpu_slug("") == "cpu"


# records and report

def test_latest_rows_win(tmp_path):
    old, new, other = row(median_ms=5.0), row(median_ms=4.0), row(dtype="bfloat16")
    records.append(tmp_path / "a.csv", [old, other])
    records.append(tmp_path / "a.csv", [new])
    assert [r.median_ms for r in records.latest(records.read(tmp_path / "a.csv"))] == [4.0, 2.0]


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("date,machine\n")
    with pytest.raises(ValueError, match="other columns"):
        records.append(path, [row()])


def test_numbers_survive_the_file(tmp_path):
    records.append(tmp_path / "a.csv", [row(note="a, \"b\"", memory_mb="")])
    assert asdict(records.read(tmp_path / "a.csv")[0]) == {**asdict(row(note="a, \"b\"")), "threads": "0"}


@pytest.fixture
def results(tmp_path):
    rows = [row(), row(method="escnn", median_ms=6.0), row(method="torch", median_ms=5.0),
            row(case="noisy_case", noisy="drift 20%"), row(case="noisy_case", method="escnn", median_ms=6.0),
            row(case="failed_case", method="escnn_compiled", median_ms="", note="did not compile"),
            row(op="construction", mode="warm", dtype="", layout="", floor_ms=""),
            row(op="construction", mode="warm", dtype="", layout="", floor_ms="", method="escnn", median_ms=9.0)]
    records.append(tmp_path / "a-machine.csv", rows)
    return tmp_path


def test_report(results):
    readme = results / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nan old table\n{report.END}\nafter\n")
    result = invoke(report.app, "--results", results, "--readme", readme)
    assert result.exit_code == 0, result.output
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "an old table" not in text
    assert "| a_case | training step | 6 | 5 | 2 | **3.00x** | 0.5 |" in text
    assert "| noisy_case | training step | 6 | - | 2 ~ | 3.00x ~ | 0.5 |" in text
    assert "failed_case" not in text
    assert sorted(p.name for p in results.glob("*.png")) == ["a-machine-construction.png", "a-machine-float32.png"]


def test_report_without_markers(results):
    readme = results / "README.md"
    readme.write_text("no markers\n")
    result = invoke(report.app, "--results", results, "--readme", readme)
    assert result.exit_code == 1 and "benchmarks:begin" in result.output and readme.read_text() == "no markers\n"
    assert invoke(report.app, "--results", results / "empty", "--readme", readme).exit_code == 1


def test_share_of_the_bound():
    assert records.Row(floor_ms=1.0, median_ms=4.0).of_bound == 0.25
    assert records.Row(floor_ms="", median_ms=4.0).of_bound == records.Row(floor_ms=1.0).of_bound == ""


@pytest.mark.cuda
def test_cuda(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    out = tmp_path / "out.csv"
    result = invoke(run.app, "--case", TINY, "--device", "cuda", "--dtype", "float32,tf32,bfloat16", "--op",
                    "conv,expand_filter", "--budget", 1e-3, "--out", out)
    assert result.exit_code == 0, result.output
    assert all(r.memory_mb >= 0 for r in records.read(out))


def test_every_method_has_a_colour_and_a_name():
    assert set(plots.COLOURS) == set(labels.METHODS)
