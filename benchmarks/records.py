"""Rows of results, and the CSV file of each machine that they are appended to."""
import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One method doing one kind of work on one case. Times are per call; "" stands for what does not apply.

    op, mode    conv: forward, training, inference; expand_filter: expand, expand_training; construction: warm, ...;
                network: training (a step of a whole network)
    method      escnn, escnn_compiled, torch (a plain layer or network of equal width), twin (a plain network of equal
                parameters), equiconv, and equiconv by one method of its convolutions: equiconv_dense,
                equiconv_factorised, equiconv_two_pass, equiconv_fused; of networks equiconv_irreps (irrep_domain),
                and equiconv_convolutions: its other layers are escnn's
    layout      memory layout of the input: contiguous or channels_last
    batch, size of the input
    speedup     median over the rounds of escnn's time / this one's, with its p20 and p80
    memory_mb   peak allocated beyond what was allocated before the call (on a CPU: only of the layers between
                convolutions); construction: peak of the process
    gflop, mbytes, floor_ms     what the method must compute and move, and the time of that at the machine's peaks
    peak_gflops, peak_gbytes_s  measured in the same run: a large matrix product, a large copy
    error       largest relative L2 difference from escnn, over outputs and gradients
    noisy       why the times mean nothing, or ""
    note        what went wrong or is worth knowing
    """
    date: str = ""
    machine: str = ""
    device: str = ""
    threads: int = 0
    commit: str = ""
    python: str = ""
    torch: str = ""
    escnn: str = ""
    equiconv: str = ""
    case: str = ""
    source: str = ""
    op: str = ""
    mode: str = ""
    dtype: str = ""
    layout: str = ""
    method: str = ""
    batch: object = ""
    size: str = ""
    median_ms: object = ""
    p20_ms: object = ""
    p80_ms: object = ""
    samples: object = ""
    speedup: object = ""
    speedup_p20: object = ""
    speedup_p80: object = ""
    memory_mb: object = ""
    gflop: object = ""
    mbytes: object = ""
    floor_ms: object = ""
    peak_gflops: object = ""
    peak_gbytes_s: object = ""
    error: object = ""
    noisy: str = ""
    note: str = ""

    @property
    def of_bound(self):
        """Share of the method's own bound that it reaches: floor_ms / median_ms; "" where either is missing."""
        return self.floor_ms / self.median_ms if "" not in (self.floor_ms, self.median_ms) else ""

    @property
    def work(self):
        """What a later row must equal to take the place of this one."""
        return self.machine, self.case, self.op, self.mode, self.dtype, self.layout, self.method


COLUMNS = tuple(f.name for f in fields(Row))
NUMBERS = ("median_ms", "p20_ms", "p80_ms", "speedup", "speedup_p20", "speedup_p80", "memory_mb", "gflop", "mbytes",
           "floor_ms", "peak_gflops", "peak_gbytes_s", "error")


def append(path, rows):
    """Writes rows at the end of a CSV file, after its header. Raises ValueError where it has other columns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        _check_header(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)


def read(path):
    """All Rows of a CSV file, its numbers as floats."""
    _check_header(path)
    with open(path, newline="") as file:
        rows = [Row(**values) for values in csv.DictReader(file)]
    for row in rows:
        for name in NUMBERS:
            value = getattr(row, name)
            setattr(row, name, float(value) if value != "" else "")
    return rows


def latest(rows):
    """The last Row of each kind of work, in the order of the file (later rows were measured later)."""
    return list({row.work: row for row in rows}.values())


def _check_header(path):
    with open(path, newline="") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes: expected {COLUMNS}, got {header}")
