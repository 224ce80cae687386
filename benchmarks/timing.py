"""Times of several functions that do the same work, taken in turn so that a drift of the machine meets all of them."""
import gc
import math
import statistics
import time
from dataclasses import dataclass

import torch

from .load import OtherLoad

MIN_SAMPLE_S, MAX_SAMPLE_S = 2e-3, 0.1  # a sample repeats a call for as long as the slowest one takes, within these
MIN_ROUNDS, MAX_ROUNDS = 5, 200
SPREAD_LIMIT = 1.25  # p80 / p20 above this says nothing about the method
DRIFT_LIMIT = 0.10   # relative change of the median between the two halves of a measurement
OTHERS_LIMIT = 0.10  # share of the CPUs that other processes may use meanwhile


@dataclass(frozen=True)
class Measurement:
    """Seconds per call, one sample for each round; and the share of the CPUs that other processes used meanwhile."""
    samples: tuple
    others: float = 0.0

    @property
    def drift(self):
        half = len(self.samples) // 2
        if half == 0:
            return 0.0
        return abs(statistics.median(self.samples[-half:]) / statistics.median(self.samples[:half]) - 1)

    @property
    def noisy(self):
        """Why this measurement is not to be trusted, or ""."""
        if len(self.samples) < MIN_ROUNDS:
            return f"samples: {len(self.samples)}"
        if self.others > OTHERS_LIMIT:
            return f"CPUs {self.others:.0%} busy elsewhere"
        spread = percentile(self.samples, 80) / percentile(self.samples, 20)
        if spread > SPREAD_LIMIT:
            return f"spread p80/p20 {spread:.2f}"
        if self.drift > DRIFT_LIMIT:
            return f"drift {self.drift:.0%}"
        return ""


def percentile(samples, percent):
    """By linear interpolation."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def paired_ratios(numerator, denominator):
    """Ratio of two Measurements in each round: what they have in common cancels."""
    return [a / b for a, b in zip(numerator.samples, denominator.samples)]


def interleave(functions, device, budget_s):
    """{name: Measurement} of {name: function}, sampled A B C, C B A, A B C, ... for about budget_s seconds.

    Each function is called once more before the first round. Samples are of about the same length: what another
    function leaves behind, in caches and in the processor's clock, weighs alike in all of them.
    """
    sample = _sample_cuda if torch.device(device).type == "cuda" else _sample_cpu
    seconds, samples = {}, {name: [] for name in functions}
    for name, function in functions.items():
        sample(function, 2)  # warm-up
        seconds[name] = max(sample(function, 1), 1e-7)
    length = max(MIN_SAMPLE_S, min(MAX_SAMPLE_S, max(seconds.values())))
    calls = {name: math.ceil(length / once) for name, once in seconds.items()}
    order, collects = list(functions), gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle of a sample is not the work that is measured
    start, load = time.perf_counter(), OtherLoad()
    try:
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
                break
            for name in order:
                samples[name].append(sample(functions[name], calls[name]))
            order.reverse()
    finally:
        if collects:
            gc.enable()
    others = load.share()
    return {name: Measurement(tuple(values), others) for name, values in samples.items()}


def peak_memory(function, device):
    """Bytes allocated at most during a call, beyond those before it; None on the CPU, where torch does not count."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_memory_on_cpu(function):
    """Bytes that torch allocated at most during a call, beyond those before it, by the profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _sample_cpu(function, calls):
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _sample_cuda(function, calls):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls
