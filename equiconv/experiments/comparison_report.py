"""Table, figures and report of a comparison."""
import statistics
from dataclasses import dataclass
from pathlib import Path

from .. import models
from . import figures, report
from .files import write_csv, write_text


@dataclass(frozen=True)
class Group:
    """The results of one network on one number of training samples, with every seed."""
    title: str
    results: list

    def mean(self, quantity):
        return statistics.fmean(r[quantity] for r in self.results)

    def spread(self, quantity):
        """Standard deviation over the seeds; 0 for a single one."""
        return statistics.stdev([r[quantity] for r in self.results]) if len(self.results) > 1 else 0.0

    def shown(self, quantity, form="{:.2f}"):
        spread = f" ± {form.format(self.spread(quantity))}" if len(self.results) > 1 else ""
        return form.format(self.mean(quantity)) + spread

    def seconds_to(self, score):
        """Mean time at which a test found that score; None if some seed never did."""
        times = [next((s for s, found in r["curve"] if found >= score), None) for r in self.results]
        return None if None in times else statistics.fmean(times)


def write(plan, experiment, configs, results, test, console):
    """results: {(name, train size, seed): result} of the complete runs; test: the Split"""
    out = Path(plan.out)
    groups = _groups(plan, results)
    details = experiment.comparison.details
    rows = []
    for (name, size, seed), r in results.items():
        more = details(r["outputs"], test.targets) if details else {}
        rows.append({"network": name, "train_size": size, "seed": seed,
                     **{q: r[q] for q in ("weights", "steps", "seconds", "test_loss", "score")}, **more})
    write_csv(out / "comparison.csv", rows)
    parts = [f"# {experiment.name}: {len(plan.networks)} networks compared", f"Data: {experiment.summary}; "
             f"{len(test.targets)} samples to test.", _state(results, configs)]
    if groups:
        header, table = _scores(plan, experiment, groups)
        console.print(report.table(f"test {experiment.score_name}", header, table))
        sentences = _account(plan, experiment, groups)
        for sentence in sentences:
            console.print(sentence.replace("**", ""))
        parts += ["\n".join(f"- {s}" for s in sentences)] * bool(sentences)
        parts += [f"## Test {experiment.score_name}",
                  "Rows: networks; columns: numbers of training samples.", report.markdown(header, table)]
        parts += _figures(plan, experiment, groups, test)
        parts += ["## Every run", report.markdown(rows[0], [[_cell(v) for v in r.values()] for r in rows])]
    parts += _settings(plan, configs)
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    console.print(f"report: {out / 'report.md'}")
    if len(results) < len(configs):
        console.print("interrupted; go on with --resume")


def _groups(plan, results):
    """{train size: {name: Group}}, of those that have every seed."""
    groups = {}
    for size in plan.train_sizes:
        for name, network in plan.networks.items():
            found = [results[key] for key in results if key[:2] == (name, size)]
            if len(found) == plan.seeds:
                groups.setdefault(size, {})[name] = Group(network.title, found)
    return groups


def _state(results, configs):
    if len(results) == len(configs):
        return f"Complete: {len(configs)} runs."
    return f"**Interrupted** after {len(results)} of {len(configs)} runs; `--resume` goes on."


def _scores(plan, experiment, groups):
    header = ["network", "weights", *map(str, groups)]
    rows = []
    for name, network in plan.networks.items():
        found = [by_name[name] for by_name in groups.values() if name in by_name]
        if found:
            cells = [by_name[name].shown("score") if name in by_name else "-" for by_name in groups.values()]
            rows.append([network.title, f"{found[0].results[0]['weights']:,}", *cells])
    return header, rows


def _account(plan, experiment, groups):
    """Sentences: the first network against each of the others, on each number of samples."""
    first = next(iter(plan.networks))
    sentences = []
    for size, by_name in groups.items():
        for name, other in by_name.items():
            if name == first or first not in by_name:
                continue
            own = by_name[first]
            gain = own.mean("score") - other.mean("score")
            reached = own.seconds_to(other.mean("score"))
            passes = "never reached that score" if reached is None else f"reached that score after {reached:.1f} s"
            sentences.append(
                f"With {size} training samples, {experiment.score_name}: **{own.title}** {own.shown('score')}, "
                f"**{other.title}** {other.shown('score')}; {abs(gain):.2f} {'more' if gain >= 0 else 'less'}. "
                f"Training took {own.mean('seconds'):.1f} s instead of {other.mean('seconds'):.1f} s; {own.title} "
                f"{passes}.")
    return sentences


def _figures(plan, experiment, groups, test):
    """Draws them; the lines of the report that show them."""
    out, parts = Path(plan.out), ["## Figures"]
    if len(groups) > 1:
        series = {network.title: [(size, by_name[name].mean("score"), by_name[name].spread("score"))
                                  for size, by_name in groups.items() if name in by_name]
                  for name, network in plan.networks.items()}
        figures.data_efficiency(out / "data_efficiency.png", series, experiment.score_name)
        parts += ["![data efficiency](data_efficiency.png)",
                  f"Test {experiment.score_name} against the number of training samples"
                  + (f"; bars: standard deviation over {plan.seeds} seeds." if plan.seeds > 1 else ".")]
    size, largest = list(groups.items())[-1]
    curves = {group.title: [r["curve"] for r in group.results] for group in largest.values()}
    figures.wall_clock(out / "wall_clock.png", curves, experiment.score_name, size)
    parts += ["![score against time](wall_clock.png)",
              f"Test {experiment.score_name} against the time spent on training steps, with {size} training samples."]
    if experiment.comparison.figures:
        outputs = {group.title: group.results[0]["outputs"] for group in largest.values()}
        for file, caption in experiment.comparison.figures(out, test, outputs).items():
            parts += [f"![{caption}]({file})", f"{caption}; with {size} training samples, seed 0."]
    return parts


def _settings(plan, configs):
    size = max(plan.train_sizes)
    rows = []
    for name, network in plan.networks.items():
        config = configs[name, size, 0]
        own = ", ".join(f"{n} {v}" for n, v in config.model_options.items())
        rows.append((network.title, f"`{name}/`", f"`{config.model}`", own, config.augmentation, config.optimizer,
                     config.lr, config.epochs, models.citation(config.model)))
    header = ("network", "folder", "model", "options", "augmentation", "optimizer", "learning rate", "epochs", "source")
    settings = [(n, f"`{v}`") for n, v in plan.settings.items()]
    settings = [("seeds", plan.seeds), ("least_steps", plan.least_steps), *settings]
    return ["## Networks", f"With {size} training samples:", report.markdown(header, rows), "## Settings",
            report.markdown(("setting", "value"), settings), report.environment_section()]


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else value
