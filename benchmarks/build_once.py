"""python -m benchmarks.build_once NAME METHOD INITIALIZE: builds a layer or a network in this process, once.

NAME        a case, or a network of benchmarks.networks
METHOD      escnn or equiconv
INITIALIZE  1 or 0: whether the weights are initialised

Prints {"types_s", "seconds", "peak_mb", "escnn"}: for the field types, for the modules and the plans of their filters,
the peak of the process's memory, and where escnn was imported from.
"""
import json
import re
import sys
import time
import warnings
from pathlib import Path


def main(name, method, initialize):
    warnings.simplefilter("ignore")
    import escnn.nn

    from tests import cases

    from . import networks
    if method == "equiconv":
        import equiconv.nn as namespace
        from equiconv import gspaces
        cases.gspaces = gspaces
    else:
        namespace = escnn.nn
    start, types = time.perf_counter(), 0.0
    initialize = bool(int(initialize))
    if name in cases.CASES:
        case = cases.CASES[name]
        assert case.in_type.gspace == case.out_type.gspace  # a case makes its types when they are asked for
        types = time.perf_counter() - start
        modules = [case.build(namespace, initialize=initialize)]
    else:
        modules = getattr(networks, name)(namespace, initialize=initialize)
    if method == "equiconv":
        assert all(module.plan.weights == module.weights.numel() for module in modules)
    seconds = time.perf_counter() - start - types
    print(json.dumps(dict(types_s=types, seconds=seconds, peak_mb=_peak_mb(), escnn=escnn.__file__)))


def _peak_mb():
    """Of this process alone: getrusage would count what its parent held when it was started."""
    kilobytes, = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
