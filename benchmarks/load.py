"""What other processes take from a measurement on the CPU."""
import os
import time
from pathlib import Path

STAT = Path("/proc/stat")


class OtherLoad:
    """How much of all CPUs other processes use from now on."""

    def __init__(self):
        self.start, self.busy, self.own = time.perf_counter(), _busy_s(), _own_s()

    def share(self):
        """0 to 1, since the start; 0 where it is not known."""
        elapsed = time.perf_counter() - self.start
        if self.busy is None or elapsed < 0.1:  # the kernel counts in hundredths of a second
            return 0.0
        others = (_busy_s() - self.busy) - (_own_s() - self.own)
        return max(0.0, others / (elapsed * os.cpu_count()))


def _own_s():
    return sum(os.times()[:4])


def _busy_s():
    """Seconds that all CPUs worked or were taken by the hypervisor, since the machine started."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, STAT.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
