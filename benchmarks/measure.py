"""One case in one dtype: the layers are built, compared, and timed in turn; out come Rows without machine or date."""
from . import construction
from .arithmetic import work_of
from .equality import check
from .layers import FORCED, METHODS, Unavailable, build
from .precision import lookup, torch_switches
from .records import Row
from .registry import OPS
from .timing import interleave, paired_ratios, peak_memory, percentile


def measure(case, device, dtype, ops, budget_s, peaks, layout="contiguous", compiled=False, report=print):
    """Rows of a case for the ops "conv" and "expand_filter".

    peaks   machine.Peaks of this device and dtype
    report  called with a line about each method that is left out

    Raises Differs, before anything is timed, where a method does not compute what escnn computes.
    """
    precision = lookup(dtype, device)
    with torch_switches(precision):
        layers, notes = _build_all(case, device, precision, layout, compiled, report)
        modes = [(op, mode) for op in ops for mode in OPS[op]]
        blank = dict(case=case.name, source=case.source, dtype=dtype, layout=layout, batch=case.batch_on(device),
                     size="x".join(map(str, case.size)))
        rows = [Row(**blank, op=op, mode=mode, method=method, note=note)
                for method, note in notes.items() if method not in layers for op, mode in modes]
        works = {method: work_of(method, case, layer) for method, layer in layers.items()}
        errors = {mode: _errors(case, mode, layers, precision) for _, mode in modes}
        for op, mode in modes:
            for method, columns in timed(_functions(mode, layers), device, budget_s).items():
                row = Row(**blank, **columns, **_floor(works[method][mode], peaks), op=op, mode=mode, method=method,
                          error=errors[mode].get(method, ""), note=notes.get(method, ""))
                if not row.noisy and row.median_ms < row.floor_ms:
                    row.noisy = "below the floor: the machine was slower when its peaks were measured"
                rows.append(row)
    return rows


def measure_construction(case, methods, report=print):
    """Rows of a case for the op "construction": how long the constructor takes in a fresh process."""
    rows = []
    for mode in construction.SUBJECTS.get(case.name, construction.MODES):
        try:
            found = construction.measure(case.name, methods, mode)
        except construction.Failed as error:
            report(f"{case.name}, construction, {mode}: {error}")
            continue
        rows += [Row(case=case.name, source=case.source, op="construction", mode=mode, method=method,
                     **_columns(m, found["escnn"]), memory_mb=m.peak_mb) for method, m in found.items()]
    return rows


def _build_all(case, device, precision, layout, compiled, report):
    """({method: Layer}, {method: note}); a method that is not available has a note and no layer."""
    layers, notes = {"escnn": build(case, "escnn", device, precision, layout)}, {}
    for method in METHODS[1:]:
        if method == "escnn_compiled" and not compiled:
            continue
        try:
            layers[method] = build(case, method, device, precision, layout, like=layers["escnn"])
            notes[method] = getattr(layers[method], "note", "")
        except Unavailable as error:
            if method in FORCED:
                continue  # then there is nothing to compare: equiconv's own row is the only method's
            notes[method] = str(error)
            report(f"{case.name}: {method} is left out: {error}")
    return layers, notes


def _functions(mode, layers):
    """{method: function} of one kind of work, with the modules in the mode that it wants."""
    for layer in layers.values():
        layer.module.train(mode != "inference")
    if mode.startswith("expand"):  # a plain layer has no filter to expand; the compiled layer shares escnn's
        layers = {method: layer for method, layer in layers.items() if method in ("escnn", "equiconv")}
    return {method: getattr(layer, mode) for method, layer in layers.items()}


def _errors(case, mode, layers, precision):
    functions = _functions(mode, layers)
    expected = functions.pop("escnn")()
    functions.pop("torch", None)
    return {method: check(f"{case.name}, {mode}, {method}", function(), expected, precision.tolerance)
            for method, function in functions.items()}


def timed(functions, device, budget_s):
    """{method: columns of a Row} of functions that were each called before."""
    memory = {method: peak_memory(function, device) for method, function in functions.items()}
    found = interleave(functions, device, budget_s)
    columns = {method: _columns(m, found["escnn"]) for method, m in found.items()}
    for method, bytes in memory.items():
        columns[method]["memory_mb"] = "" if bytes is None else bytes * 1e-6
    return columns


def _floor(work, peaks):
    return dict(gflop=work.flops * 1e-9, mbytes=work.bytes * 1e-6, floor_ms=peaks.floor(work.flops, work.bytes) * 1e3,
                peak_gflops=peaks.flops_per_s * 1e-9, peak_gbytes_s=peaks.bytes_per_s * 1e-9)


def _columns(measurement, escnn):
    times, ratios = measurement.samples, paired_ratios(escnn, measurement)
    return dict(median_ms=percentile(times, 50) * 1e3, p20_ms=percentile(times, 20) * 1e3,
                p80_ms=percentile(times, 80) * 1e3, samples=len(times), noisy=measurement.noisy,
                speedup=percentile(ratios, 50), speedup_p20=percentile(ratios, 20), speedup_p80=percentile(ratios, 80))
