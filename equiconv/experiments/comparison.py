"""Several networks trained on several numbers of samples, with several seeds, and compared."""
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from pathlib import Path

import torch
from rich.progress import TextColumn

from .. import models
from . import comparison_report
from .config import FREE_ON_RESUME, Config, resolve
from .experiment import Network
from .files import load_checkpoint, save_checkpoint, write_text
from .processes import StopRequest, world
from .training import CHECKPOINT, Run, forget_run, progress_bar

PLAN = "plan.json"
RESULT = "result.pt"  # of each complete run
TESTS = 10  # of a run, if it trains long enough
TEST_AFTER = 1000  # samples at least, or a short run would take most of its time for tests
CHOICES = ("networks", "train_sizes", "seeds", "least_steps")
OF_A_RUN = ("model", "model_options", "train_size", "seed", "test_every", "experiment")  # differ from run to run


@dataclass(frozen=True)
class Plan:
    """networks     {name: Network} to compare; the first with each of the others
    train_sizes  numbers of training samples
    seeds        how many runs of each: with the seeds 0, 1, ...
    least_steps  runs on few samples take more epochs, so as to have at least so many steps
    settings     of Config, for all runs; those of a network come before them
    out          folder of everything that is written
    """
    networks: dict
    train_sizes: tuple
    seeds: int
    least_steps: int
    settings: dict
    out: str

    def __post_init__(self):
        if not self.networks:
            raise ValueError("networks must name at least one network")
        for name, values in (("train_sizes", self.train_sizes), ("seeds", [self.seeds]),
                             ("least_steps", [self.least_steps])):
            if not values or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
                raise ValueError(f"{name} must be at least 1 and whole, got {getattr(self, name)!r}")

    def configs(self, experiment):
        """{(name, train size, seed): Config} of all runs. Raises ValueError for settings that cannot be."""
        return {(name, size, seed): self.config(experiment, name, size, seed)
                for size in self.train_sizes for seed in range(self.seeds) for name in self.networks}

    def config(self, experiment, name, train_size, seed):
        """Config of one run."""
        settings = {**self.settings, **self.networks[name].settings}
        batch_size = min(settings.get("batch_size", Config.batch_size), train_size)
        epochs = max(settings.get("epochs", Config.epochs), math.ceil(self.least_steps / (train_size // batch_size)))
        tests = max(1, min(TESTS, epochs * train_size // TEST_AFTER))
        return resolve(experiment, settings, {
            "batch_size": batch_size, "epochs": epochs, "train_size": train_size, "seed": seed,
            "test_every": epochs // min(tests, epochs), "out": str(Path(self.out) / name / f"{train_size}-{seed}")})


def plan(experiment, file_settings, flags):
    """The Plan of an Experiment: its own, then a file's settings, then the flags.

    file_settings, flags  dicts of CHOICES and of settings of Config; flags that are None were not given. `networks` is
                          a list of names or {name: settings}; those of a known name are added to the experiment's

    Raises ValueError for unknown names and bad values.
    """
    flags = {name: value for name, value in flags.items() if value is not None}
    given = {**file_settings, **flags}
    known = {f.name for f in fields(Config)} - set(OF_A_RUN) | set(CHOICES)
    of_a_run = sorted(set(given) & set(OF_A_RUN))
    if of_a_run:
        raise ValueError(f"a comparison takes no {', '.join(of_a_run)}, but {', '.join(CHOICES)}")
    if set(given) - known:
        raise ValueError(f"unknown settings: {', '.join(sorted(set(given) - known))}")
    own = experiment.comparison
    chosen = {"networks": list(own.networks), "train_sizes": own.train_sizes, "seeds": 1,
              "least_steps": own.least_steps, **{n: given[n] for n in CHOICES if n in given}}
    general = {**experiment.defaults, **own.settings, **given}
    out = general.pop("out", f"runs/{experiment.name}-comparison")
    in_flags = {name: value for name, value in flags.items() if name not in (*CHOICES, "out")}
    networks = {name: replace(network, settings={**network.settings, **in_flags})
                for name, network in _networks(own, chosen["networks"]).items()}
    sizes = chosen["train_sizes"]
    return Plan(networks, tuple(sizes) if isinstance(sizes, (list, tuple)) else (), chosen["seeds"],
                chosen["least_steps"], {n: v for n, v in general.items() if n not in (*CHOICES, *OF_A_RUN)}, out)


def _networks(comparison, chosen):
    """{name: Network} from a list of names or a table of settings."""
    if not isinstance(chosen, (dict, list)):
        raise ValueError(f"networks must be a list of names, or a table of names and settings, got {chosen!r}")
    found = {}
    for name in chosen:
        settings = dict(chosen[name]) if isinstance(chosen, dict) else {}
        known = comparison.networks.get(name)
        if known is None and "model" not in settings:
            raise ValueError(f"there is no network {name!r}; there are {', '.join(comparison.networks)}, and a file of "
                             "settings can add others by their model")
        title = settings.pop("title", known.title if known else name)
        base = known.settings if known and settings.get("model", known.settings["model"]) == known.settings["model"] \
            else {}
        options = {**base.get("model_options", {}), **settings.get("model_options", {})}
        found[name] = Network(title, {**base, **settings, "model_options": options})
    return found


def saved_plan(out, flags):
    """The Plan of the comparison that can be resumed from a folder, with flags that a resumed one can take.

    Raises ValueError if there is none, or for other flags.
    """
    path = Path(out) / PLAN
    if not path.exists():
        raise ValueError(f"nothing to resume: there is no {path}")
    given = {name: value for name, value in flags.items() if value is not None and name != "out"}
    changed = sorted(set(given) - (set(FREE_ON_RESUME) - {"epochs"}))
    if changed:
        raise ValueError(f"a comparison is resumed with its own settings, without {', '.join(changed)}")
    saved = json.loads(path.read_text())
    networks = {name: Network(n["title"], {**n["settings"], **given}) for name, n in saved["networks"].items()}
    return Plan(**{**saved, "networks": networks, "train_sizes": tuple(saved["train_sizes"]), "out": str(out)})


def compare(plan, experiment, console, resume=False):
    """Trains everything of a Plan, and writes comparison.csv, figures and report.md to its folder.

    Each run has a folder of its own there, as train() writes it. resume: take the results of complete runs, and go on
    with the one that was interrupted.

    Returns True if it is complete, False if it was interrupted. Raises ValueError for settings that cannot be, and
    Diverged when a loss is no longer finite.
    """
    configs = plan.configs(experiment)
    device = next(iter(configs.values())).device
    with world(device) as processes, StopRequest(processes) as stop:
        console.quiet = console.quiet or not processes.is_main
        _check(plan, experiment, configs)
        results = _saved_results(configs) if resume else {}
        if processes.is_main and not resume:
            _begin(plan, configs)
        _train(configs, experiment, console, processes, stop, results, resume)
        complete = len(results) == len(configs)
        if processes.is_main:
            _, test = experiment.load(configs[next(iter(configs))])
            comparison_report.write(plan, experiment, configs, results, test, console)
        return complete


def _check(plan, experiment, configs):
    """Raises before anything is trained what the last run would raise."""
    size = max(plan.train_sizes)
    for name in plan.networks:
        config = configs[name, size, 0]
        experiment.load(config)
        with torch.device("meta"):
            models.create(config.model, **config.model_options)


def _begin(plan, configs):
    for config in configs.values():  # what is left of an earlier comparison
        (Path(config.out) / RESULT).unlink(missing_ok=True)
        forget_run(Path(config.out))
    write_text(Path(plan.out) / PLAN, json.dumps(asdict(plan), indent=2) + "\n")


def _saved_results(configs):
    found = {key: Path(config.out) / RESULT for key, config in configs.items()}
    return {key: load_checkpoint(path) for key, path in found.items() if path.exists()}


def _train(configs, experiment, console, processes, stop, results, resume):
    """Adds the result of each run to `results`, until all are there or a stop."""
    with progress_bar(console, TextColumn("{task.fields[news]}")) as progress:
        overall = progress.add_task(f"{experiment.name}: runs", total=len(configs), completed=len(results), news="")
        task = progress.add_task("", news="")
        for key, config in configs.items():
            if key in results:
                continue
            name, size, seed = key
            progress.update(task, description=f"{name}, {size}, seed {seed}")
            run = Run(config, experiment, processes)
            if resume and (Path(config.out) / CHECKPOINT).exists():
                run.load()
            complete = run.epochs(stop, progress, task)
            if processes.is_main:
                run.write_report(complete)
            if complete:
                results[key] = _result(run, experiment)
                if processes.is_main:
                    save_checkpoint(Path(config.out) / RESULT, results[key])
                    console.print(f"{name}, {size} samples, seed {seed}: {experiment.score_name} "
                                  f"{results[key]['score']:.2f} after {results[key]['seconds']:.0f} s")
                progress.update(overall, completed=len(results))
            if stop.asked():
                return


def _result(run, experiment):
    """What a comparison keeps of a complete run. curve: [seconds of training, score] of each test"""
    if not run.processes.is_main:
        return {}
    clock = list(accumulate(row["milliseconds"] / 1000 for row in run.history.steps))
    curve = [[clock[row["epoch"] * run.steps_per_epoch - 1], row["score"]] for row in run.history.epochs]
    last = run.history.epochs[-1]
    outputs = run.learner.outputs(run.test_split.inputs) if experiment.comparison.needs_outputs else None
    return {"weights": run.learner.weights(), "steps": run.learner.step, "seconds": clock[-1], "score": last["score"],
            "test_loss": last["test_loss"], "curve": curve, "outputs": outputs}
