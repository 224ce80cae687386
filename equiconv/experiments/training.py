"""One training run: loop, progress, checkpoint, report."""
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import report
from .config import plain
from .files import load_checkpoint, save_checkpoint, write_csv
from .learner import Learner, batches, steps_per_epoch
from .processes import StopRequest, mean, world

CHECKPOINT = "checkpoint.pt"
WRITTEN = (CHECKPOINT, "steps.csv", "epochs.csv", "curves.png", "report.md")
LOG_EVERY = 10  # steps between reads of the loss, which wait for the device
SAVE_EVERY = 30  # seconds


class Diverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class History:
    """steps   rows of step, loss, milliseconds (the mean over the steps read together)
    epochs  rows of epoch, train_loss, test_loss, score, seconds; of those that were tested
    """
    steps: list = field(default_factory=list)
    epochs: list = field(default_factory=list)


def progress_bar(console, *columns):
    """A rich Progress: name, bar, steps, times, then the columns."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                    TimeRemainingColumn(), *columns, console=console)


def saved_settings(out):
    """The settings of the run that can be resumed from a folder. Raises ValueError if there is none."""
    return load_checkpoint(Path(out) / CHECKPOINT)["config"]


def forget_run(out):
    """Removes what a run left in its folder, a Path; returns whether there was one."""
    found = [path for path in map(out.joinpath, WRITTEN) if path.exists()]
    for path in found:
        path.unlink()
    return bool(found)


def train(config, experiment, console, resume=False):
    """Trains as a Config says, and writes checkpoint, CSV files, figure and report to config.out.

    console  where the progress goes (the main process only writes)
    resume   go on from the checkpoint in config.out

    Returns True if the run is complete, False if it was interrupted. Raises ValueError for settings that cannot be, and
    Diverged when the loss is no longer finite.
    """
    with world(config.device) as processes, StopRequest(processes) as stop:
        console.quiet = console.quiet or not processes.is_main
        run = Run(config, experiment, processes)
        if resume:
            run.load()
            console.print(f"resumed after step {run.learner.step}")
        elif processes.is_main and forget_run(run.out):
            console.print(f"replaces the earlier run in {config.out}; --out names another folder")
        with progress_bar(console, TextColumn("{task.fields[news]}")) as progress:
            complete = run.epochs(stop, progress, progress.add_task(experiment.name, news=""))
        if not complete:
            console.print("stopping: writing the report")
        if processes.is_main:
            run.write_report(complete)
            run.announce(complete, console)
        return complete


class Run:
    """A training run as a Config says, in the processes of a World: from the start, or from where load() finds it.

    Raises ValueError for settings that cannot be.
    """

    def __init__(self, config, experiment, processes):
        self.config, self.experiment, self.processes = config, experiment, processes
        self.out = Path(config.out)
        self.train_split, self.test_split = experiment.load(config)
        self.steps_per_epoch = steps_per_epoch(config)
        batches(config, 0, processes)  # raises before anything is built
        start = time.perf_counter()
        self.learner = Learner(config, experiment, processes)
        self.construction_seconds = time.perf_counter() - start
        self.history = History()

    def load(self):
        state = load_checkpoint(self.out / CHECKPOINT)
        self.learner.load_state(state["learner"])
        self.history = History(**state["history"])

    def save(self):
        if self.processes.is_main:
            save_checkpoint(self.out / CHECKPOINT, {
                "config": plain(self.config), "learner": self.learner.state(), "history": vars(self.history)})

    def epochs(self, stop, progress, task):
        """Trains until the last epoch or a stop, shown as a task of a Progress; returns whether it came to the end.

        Where no bar can move, as in a log, each test is a line.
        """
        total = self.config.epochs * self.steps_per_epoch
        progress.reset(task, total=total, completed=self.learner.step, news="")

        def show(news, tested=False):
            progress.update(task, completed=self.learner.step, news=news)
            if tested and not progress.console.is_terminal:
                progress.print(f"{progress.tasks[task].description}: {news}")
        saved_at = time.perf_counter()
        while self.learner.step < total:
            goes_on = self.one_epoch(stop, show)
            if not goes_on or self.learner.step == total or time.perf_counter() - saved_at > SAVE_EVERY:
                self.save()
                saved_at = time.perf_counter()
            if not goes_on:
                break
        return self.learner.step == total

    def one_epoch(self, stop, show):
        epoch, begun = divmod(self.learner.step, self.steps_per_epoch)
        start = read_at = time.perf_counter()
        unread = []
        stopped = False
        for i, batch in enumerate(batches(self.config, epoch, self.processes)):
            if i < begun:
                continue
            unread.append(self.learner.learn(self.train_split.inputs[batch], self.train_split.targets[batch]))
            stopped = stop.asked()
            if stopped or len(unread) == LOG_EVERY or i + 1 == self.steps_per_epoch:
                losses = mean(torch.stack(unread), self.processes).tolist()
                now = time.perf_counter()
                self.log_steps(losses, 1000 * (now - read_at) / len(losses))
                unread, read_at = [], now
                show(f"epoch {epoch + 1}  loss {losses[-1]:.3f}{self.last_score()}")
            if stopped:
                break
        finished = self.learner.step == (epoch + 1) * self.steps_per_epoch
        tested = (epoch + 1) % self.config.test_every == 0 or epoch + 1 == self.config.epochs
        if finished and tested and self.processes.is_main:
            self.log_epoch(epoch, time.perf_counter() - start)
            show(f"epoch {epoch + 1}  loss {self.history.steps[-1]['loss']:.3f}{self.last_score()}", tested=True)
        return not stopped

    def log_steps(self, losses, milliseconds):
        first = self.learner.step - len(losses) + 1
        self.history.steps += [{"step": first + i, "loss": loss, "milliseconds": milliseconds}
                               for i, loss in enumerate(losses)]
        if not all(map(math.isfinite, losses)):
            raise Diverged(f"the loss is {losses[-1]} at step {self.learner.step}: try a lower learning rate")

    def log_epoch(self, epoch, seconds):
        test_loss, score = self.learner.evaluate(self.test_split)
        losses = [row["loss"] for row in self.history.steps[-self.steps_per_epoch:]]
        self.history.epochs.append({"epoch": epoch + 1, "train_loss": sum(losses) / len(losses), "test_loss": test_loss,
                                    "score": score, "seconds": seconds})

    def last_score(self):
        return f"  test {self.history.epochs[-1]['score']:.2f}" if self.history.epochs else ""

    def write_report(self, complete):
        write_csv(self.out / "steps.csv", self.history.steps)
        write_csv(self.out / "epochs.csv", self.history.epochs)
        report.training_report(self, complete)

    def announce(self, complete, console):
        if self.history.epochs:
            console.print(report.epochs_table(self.history.epochs, self.experiment.score_name))
        console.print(f"report: {self.out / 'report.md'}")
        if not complete:
            console.print(f"interrupted after step {self.learner.step}; go on with --resume")
