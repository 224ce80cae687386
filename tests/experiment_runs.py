"""What the tests of experiments share: small runs, Ctrl-C in the middle of them, and what they write."""
import csv
import os
import signal

from rich.console import Console

from equiconv.experiments import comparison, learner


def silent():
    return Console(file=open(os.devnull, "w"))


def rows(path):
    return list(csv.DictReader(open(path)))


def interrupt_at(monkeypatch, step):
    """Ctrl-C in the middle of that step of the first learner that gets there."""
    learn = learner.Learner.learn
    asked = []

    def interrupted(self, *batch):
        if self.step == step and not asked:  # a second signal would end it at once
            asked.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return learn(self, *batch)
    monkeypatch.setattr(learner.Learner, "learn", interrupted)


def compare(experiment, out, networks, train_sizes, **settings):
    """Compares networks ({name: settings}) on the CPU, in one epoch of batches of 8; the rows of comparison.csv."""
    plan = comparison.plan(experiment, {"networks": networks}, {
        "out": str(out), "train_sizes": train_sizes, "device": "cpu", "epochs": 1, "least_steps": 1, "batch_size": 8,
        **settings})
    assert comparison.compare(plan, experiment, silent())
    return rows(out / "comparison.csv")
