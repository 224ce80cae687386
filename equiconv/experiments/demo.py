"""The same steerable CNN trained twice, with escnn and with equiconv, in turns: same data, weights and machine."""
import json
import math
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.progress import TextColumn

from .. import models
from ..testing import check_equivariance
from . import figures, report
from .config import plain
from .files import load_checkpoint, save_checkpoint, write_csv, write_text
from .learner import Learner, batches, steps_per_epoch
from .processes import StopRequest, World
from .training import CHECKPOINT, SAVE_EVERY, Diverged, progress_bar

NAMES = ("escnn", "equiconv")
#: The published network with a quarter of its fields, on 21 x 21 pixels: two CPU cores train it within minutes.
DEFAULTS = {
    "out": "runs/demo", "epochs": 2, "batch_size": 16, "lr": 3e-3, "weight_decay": 1e-5, "schedule": "cosine",
    "model_options": {"widths": [6, 12, 12, 24, 24, 16], "kernels": [5] * 6, "paddings": [0, 2, 2, 2, 2, 2],
                      "image_size": 21},
}
BLOCK = 5  # steps of one network before the other takes its turn
COMPARED = 200  # test images whose outputs are compared before training


@dataclass
class Record:
    """What was measured. losses, milliseconds, scores, construction_seconds, errors: {name: value(s)}

    difference  largest |a - b| / largest |a| of the two networks' outputs before training
    errors      {name: [equivariance error at 90 degree turns, at 45 degree turns]}
    """
    losses: dict = field(default_factory=lambda: {name: [] for name in NAMES})
    milliseconds: dict = field(default_factory=lambda: {name: [] for name in NAMES})
    difference: float = math.nan
    scores: dict = field(default_factory=dict)
    errors: dict = field(default_factory=dict)
    construction_seconds: dict = field(default_factory=dict)

    def timed(self):
        """{name: step times without the first blocks, in which memory and caches warm up}"""
        skip = min(2 * BLOCK, len(self.milliseconds["equiconv"]) // 2)
        return {name: values[skip:] for name, values in self.milliseconds.items()}

    def ratios(self):
        """escnn's median time over equiconv's for each pair of blocks, which ran right after one another."""
        a, b = (self.timed()[name] for name in NAMES)
        return [statistics.median(a[i:i + BLOCK]) / statistics.median(b[i:i + BLOCK]) for i in range(0, len(b), BLOCK)]


def run(config, experiment, console, resume=False, time_construction=True):
    """Trains both networks, prints a table, and writes report.md, demo.png and steps.csv to config.out.

    config             Config of the run; its `accelerate` is ignored
    resume             go on from the checkpoint in config.out
    time_construction  also build each network in a fresh process, and time that

    Returns True if the run is complete, False if it was interrupted. Raises Diverged when a loss is no longer finite.
    """
    world = World(0, 1, torch.device(config.device))
    with StopRequest(world) as stop, _original_threads():
        demo = _Demo(config, experiment, console, world)
        demo.choose_threads()
        if resume:
            demo.load()
        else:
            demo.measure_untrained(time_construction)
        console.print(f"{experiment.summary}; {config.model}, {demo.weights():,} weights")
        complete = demo.train(stop)
        if not complete:
            console.print("stopping: writing checkpoint and report")
        demo.save()
        demo.measure_trained()
        demo.write_report(complete)
    return complete


@contextmanager
def _original_threads():
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Demo:
    def __init__(self, config, experiment, console, world):
        self.config, self.experiment, self.console, self.world = config, experiment, console, world
        self.out = Path(config.out)
        self.train_split, self.test_split = experiment.load(config)
        configs = {name: replace(config, accelerate=name == "equiconv") for name in NAMES}
        self.learners = {name: Learner(c, experiment, world) for name, c in configs.items()}
        self.learners["equiconv"].model.load_state_dict(self.learners["escnn"].model.state_dict())
        self.record = Record()

    def weights(self):
        return self.learners["equiconv"].weights()

    def choose_threads(self):
        """All, or one: where other programs keep the cores busy, one thread is faster than several that wait."""
        if self.config.device != "cpu":
            return
        most = torch.get_num_threads()
        seconds = {threads: self.forward_seconds(threads) for threads in {most, 1}}
        torch.set_num_threads(min(seconds, key=seconds.get))

    def forward_seconds(self, threads):
        torch.set_num_threads(threads)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self.learners["escnn"].outputs(self.test_split.inputs[:32])
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def measure_untrained(self, time_construction):
        a, b = (learner.outputs(self.test_split.inputs[:COMPARED]) for learner in self.learners.values())
        self.record.difference = ((a - b).abs().max() / a.abs().max()).item()
        if time_construction:
            with self.console.status("constructing each network in a fresh process"):
                self.record.construction_seconds = {name: construction_seconds(self.config, name) for name in NAMES}

    def load(self):
        state = load_checkpoint(self.out / CHECKPOINT)
        for name, learner in self.learners.items():
            learner.load_state(state["learners"][name])
        self.record = Record(**state["record"])
        self.console.print(f"resumed after step {self.learners['equiconv'].step}")

    def save(self):
        save_checkpoint(self.out / CHECKPOINT, {
            "config": plain(self.config), "record": vars(self.record),
            "learners": {name: learner.state() for name, learner in self.learners.items()}})

    def train(self, stop):
        """In turns, block by block; returns whether it came to the end."""
        per_epoch = steps_per_epoch(self.config)
        total = self.config.epochs * per_epoch
        saved_at = time.perf_counter()
        with progress_bar(self.console, TextColumn("{task.fields[news]}")) as progress:
            begun = self.learners["equiconv"].step
            tasks = {name: progress.add_task(name.ljust(8), total=total, completed=begun, news="") for name in NAMES}
            while (step := self.learners["equiconv"].step) < total:
                epoch, i = divmod(step, per_epoch)
                block = batches(self.config, epoch, self.world)[i:i + BLOCK]
                # Each network goes first every other time, so that neither always finds the caches of the other.
                for name in NAMES if (step // BLOCK) % 2 == 0 else NAMES[::-1]:
                    for batch in block:
                        self.one_step(name, batch)
                    time_ = statistics.median(self.record.milliseconds[name])
                    progress.update(tasks[name], completed=self.learners[name].step,
                                    news=f"loss {self.record.losses[name][-1]:.3f}  {time_:.1f} ms")
                if stop.asked():
                    return False
                if time.perf_counter() - saved_at > SAVE_EVERY:
                    self.save()
                    saved_at = time.perf_counter()
        return True

    def one_step(self, name, batch):
        inputs, targets = self.train_split.inputs[batch], self.train_split.targets[batch]
        start = time.perf_counter()
        loss = self.learners[name].learn(inputs, targets).item()  # waits for the device
        self.record.milliseconds[name].append(1000 * (time.perf_counter() - start))
        self.record.losses[name].append(loss)
        if not math.isfinite(loss):
            raise Diverged(f"the loss of the network of {name} is {loss} at step {self.learners[name].step}: "
                           "try a lower learning rate")

    def measure_trained(self):
        for name, learner in self.learners.items():
            self.record.scores[name] = learner.evaluate(self.test_split)[1]
            result = check_equivariance(learner.model)
            self.record.errors[name] = [result.max_exact, result.max_interpolated]

    def write_report(self, complete):
        rows = results(self.record, self.experiment.score_name)
        header = ("", *NAMES, "escnn / equiconv")
        self.console.print(report.table(None, header, rows))
        columns = {f"{name}_{key}": values[name] for name in NAMES
                   for key, values in (("loss", self.record.losses), ("ms", self.record.milliseconds))}
        steps = [{"step": i + 1, **dict(zip(columns, row))} for i, row in enumerate(zip(*columns.values()))]
        write_csv(self.out / "steps.csv", steps)
        parts = ["# The same network with escnn and with equiconv"]
        if not complete:
            parts.append(f"**Interrupted** after step {len(steps)}; `--resume` goes on.")
        parts += [self.account(), report.markdown(header, rows)]
        if len(steps) > 1:
            figures.demo_curves(self.out / "demo.png", self.record.losses, self.record.timed())
            parts.append("![loss curves and step times](demo.png)")
        parts += [f"{report.accelerated(self.learners['equiconv'].model)}.",
                  f"Network: {models.citation(self.config.model)}; here in a smaller size.", "## Settings",
                  report.markdown(("setting", "value"), [(n, f"`{v}`") for n, v in plain(self.config).items()
                                                         if n != "accelerate"]),
                  report.environment_section()]
        write_text(self.out / "report.md", "\n\n".join(parts) + "\n")
        self.console.print(f"report: {self.out / 'report.md'}")
        if not complete:
            self.console.print("interrupted; go on with --resume")

    def account(self):
        built = "Construction is timed once in a fresh process, without imports. "
        sizes = f"{self.config.train_size} to train on, {len(self.test_split.targets)} to test"
        return (f"Data: {self.experiment.summary}; {sizes}. Both networks start from the same {self.weights():,} "
                f"weights and see the same batches. They are trained in turns of {BLOCK} steps within one process, so "
                "that other work on the machine meets both alike; a ratio is taken between neighbouring turns. "
                f"{built if self.record.construction_seconds else ''}The equivariance error is the largest relative "
                "change of the trained network's outputs when its input is turned.")


def results(record, score_name):
    """Rows of (quantity, escnn, equiconv, ratio) of a Record."""
    def both(values, form):
        return [form.format(values[name]) if name in values else "-" for name in NAMES]

    rows = [(f"test {score_name}", *both(record.scores, "{:.2f}"), "")]
    times = record.timed()
    if times["equiconv"]:
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append(("median step (ms)", *both(medians, "{:.1f}"), f"{medians['escnn'] / medians['equiconv']:.2f}"))
        ratios = record.ratios()
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(("paired turns: median ratio (quartiles)", "", "",
                     f"{statistics.median(ratios):.2f} ({quartiles[0]:.2f} .. {quartiles[2]:.2f})"))
    if record.construction_seconds:
        seconds = record.construction_seconds
        rows.append(("construction (s of processor time)", *both(seconds, "{:.2f}"),
                     f"{seconds['escnn'] / seconds['equiconv']:.2f}"))
    for i, angle in enumerate(("90 degree turns", "45 degree turns, interpolated")):
        errors = {name: both_errors[i] for name, both_errors in record.errors.items()}
        rows.append((f"equivariance error, {angle}", *both(errors, "{:.1e}"), ""))
    rows.append(("outputs before training: largest relative difference", "", f"{record.difference:.1e}", ""))
    return rows


CONSTRUCT = """\
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from equiconv import models
from equiconv.experiments.learner import layers
nn, options = layers(sys.argv[2] == "equiconv"), json.loads(sys.argv[4])
start = time.process_time()
models.create(sys.argv[3], nn=nn, **options)
print(time.process_time() - start)
"""


def construction_seconds(config, name):
    """Processor time in which a fresh process builds the network, its imports excluded."""
    root = Path(models.__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", CONSTRUCT, root, name, config.model,
               json.dumps(config.model_options)]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)  # Ctrl-C is not for it
    if done.returncode:
        raise RuntimeError(f"the network could not be built in a process of its own:\n{done.stderr}")
    return float(done.stdout.split()[-1])
