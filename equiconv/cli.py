"""The command line: equiconv info | calibrate | precompile | models | demo | train | gallery | bench.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted (go on with --resume).
"""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Fused kernels behind drop-in replacements of escnn's layers.")

gallery_app = typer.Typer(invoke_without_command=True, help="Draws what equivariance is: by default, the rotating "
                          "image and the rotating volume.")
app.add_typer(gallery_app, name="gallery")

Device = Annotated[str | None, Option(help="cpu or cuda; by default cuda where there is one")]
Out = Annotated[str | None, Option(help="folder of all that the run writes")]
Resume = Annotated[bool, Option("--resume", help="go on from the checkpoint in the output folder")]
Seed = Annotated[int | None, Option(help="of weights and batches")]
Epochs = Annotated[int | None, Option(help="passes over the training samples")]
BatchSize = Annotated[int | None, Option(help="samples of a step, over all processes")]
TrainSize = Annotated[int | None, Option(help="samples to train on")]


def main():
    app(prog_name="equiconv")


def _show_version(asked):
    if asked:
        from . import __version__
        typer.echo(f"equiconv {__version__}")
        raise typer.Exit


@app.callback()
def of_all_commands(version: Annotated[bool, Option("--version", callback=_show_version, is_eager=True,
                                                    help="print the version and exit")] = False):
    pass


@app.command()
def info(every_op: Annotated[bool, Option("--ops", help="also the backends of each op by itself")] = False):
    """Versions, machine, and which backends can run here."""
    from .experiments import environment
    from .experiments.report import table
    console = Console()
    for title, facts in (("versions", environment.versions()), ("machine", environment.machine()),
                         ("optional packages", environment.optional_packages()), ("build", environment.build())):
        console.print(table(title, ("", ""), facts.items()))
    reasons = environment.backends_of_ops()
    console.print(table("backends", ("device", "backend", "runs here"),
                        [(*place, _summary(found)) for place, found in reasons.items()]))
    if every_op:
        rows = [(op, *place, f"no: {reason}" if reason else "yes")
                for op in environment.ops() for place, found in reasons.items() for reason in [found[op]]]
        console.print(table("ops", ("op", "device", "backend", "runs here"), rows))
    console.print(table("convolutions", ("", ""), environment.convolutions().items()))


def _summary(reasons):
    """Whether ops run, in a line, from {op: None or why it does not}."""
    by_reason = {}
    for op, reason in reasons.items():
        by_reason.setdefault(reason, []).append(op)
    if list(by_reason) == [None]:
        return "yes"
    if None in by_reason:
        return "yes, but " + "; ".join(f"{', '.join(ops)}: {reason}" for reason, ops in by_reason.items() if reason)
    return "no: " + "; ".join(by_reason)


@app.command()
def calibrate():
    """Measures the costs by which a convolution chooses its method, and keeps them in EQUICONV_CACHE."""
    import torch

    from . import backends, calibration
    from .experiments.report import table
    from .nn import costs, cuda_costs
    found, rates = calibration.measure(), None
    rows = [(method, amount, f"{seconds:.3g}") for method, names in costs.AMOUNTS.items()
            for amount, seconds in zip(names, found.seconds[method], strict=True)]
    Console().print(table("costs", ("method", "amount", "seconds for one, on one thread"), rows))
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        rates = calibration.measure_rates(device)
        rows = [("copied bytes", "", f"{rates.bytes:.3g}"), ("launches", "", f"{1 / rates.call:.3g}")]
        rows += [(f"multiplications of {kind}", name, f"{rate:.3g}")
                 for kind in ("products", "convolutions") for name, rate in getattr(rates, kind).items()]
        Console().print(table("rates of the GPU", ("amount", "precision", "in a second"), rows))
    if backends.CACHE_FOLDER:
        costs.keep(found)
        if rates is not None:
            cuda_costs.keep(rates, device)
        typer.echo(f"kept in {backends.CACHE_FOLDER}")
    else:
        typer.echo("not kept: set EQUICONV_CACHE to a folder")


@app.command()
def precompile(
    networks: Annotated[list[str], typer.Argument(help="names in equiconv.models")],
    arch: Annotated[str, Option(help="of the GPUs, with commas between")] = "sm_80,sm_90",
    dtype: Annotated[str, Option(help="bfloat16, float16, float32 (for TF32), with commas")] =
        "bfloat16,float16,float32",
    package: Annotated[bool, Option("--package", help="into the package itself, in the place of what it has: a wheel "
                                                      "that is made then contains them")] = False,
):
    """Compiles the fused CUDA kernels of networks before they are needed, and keeps them in EQUICONV_CACHE.

    Needs NVRTC or nvcc, but no GPU. Takes seconds to a minute for each kernel and core.
    """
    def run(console):
        import torch

        from . import models
        from .experiments.report import table
        from .experiments.training import progress_bar
        from .precompilation import DTYPES
        from .precompilation import precompile as compile_all
        with torch.device("meta"):
            chosen = torch.nn.ModuleDict({name: models.create(name) for name in networks})
        known = {str(one).removeprefix("torch."): one for one in DTYPES}
        dtypes = [known.get(name, name) for name in dtype.split(",")]
        with progress_bar(console) as progress:
            task = progress.add_task("kernels", total=None)
            report = compile_all(chosen, arch.split(","), dtypes, in_package=package,
                                 tick=lambda done, total: progress.update(task, completed=done, total=total))
        rows = [(one, report.compiled.get(one, 0), report.kept.get(one, 0)) for one in arch.split(",")]
        console.print(table("fused kernels", ("architecture", "compiled", "kept already"), rows))
        for (of_dtype, of_arch, reason), count in Counter(
                (dtype, arch, reason) for (_, dtype, arch), reason in report.left_out.items()).items():
            console.print(f"none for {count} convolutions in {of_dtype} on {of_arch}: {reason}")
        if report.failed:
            _fail(f"{len(report.failed)} kernels failed, the first with: {report.failed[0]}", FAILED)
        return True
    _run(run)


@app.command("models")
def list_models(weights: Annotated[bool, Option("--weights", help="also weights and GMAC for one input: builds the "
                                                                  "networks, in some seconds")] = False):
    """The networks: their groups, their inputs, the experiments that take them, and where they come from."""
    from . import models
    from .experiments import taking
    from .experiments.report import table
    from .experiments.training import progress_bar
    console, names, further = Console(), models.names(), {name: () for name in models.names()}
    if weights:
        with progress_bar(console) as progress:
            sizes = {name: models.complexity(name) for name in progress.track(names, description="networks")}
        further = {name: (f"{size.parameters:,}", f"{size.macs / 1e9:.3g}") for name, size in sizes.items()}
    columns = (*(("weights", "GMAC") if weights else ()), "experiments")
    twins = [name for name in names if models.twin(name)]
    others = [name for name in names if name not in twins]

    def row(name, *facts):
        return name, *facts, *further[name], ", ".join(taking(name))
    console.print(table("networks", ("name", "group", "input", *columns), [
        row(name, models.group(name), " x ".join(map(str, models.input_shape(name)))) for name in others]))
    console.print(table("their conventional twins", ("name", "twin of", "of equal", *columns), [
        row(name, *models.twin(name)) for name in twins]))
    console.print(table("sources", ("name", "source"), [(name, models.citation(name)) for name in others]))


@app.command()
def demo(
    out: Out = None, device: Device = None, seed: Seed = None, epochs: Epochs = None, batch_size: BatchSize = None,
    train_size: TrainSize = None, resume: Resume = False,
    construction: Annotated[bool, Option(help="also time the construction of both, in fresh processes")] = True,
):
    """Trains a small C8-steerable CNN with escnn and with equiconv, in turns, and compares them."""
    from .experiments import demo as demonstration
    from .experiments import get
    flags = {"out": out, "device": device, "seed": seed, "epochs": epochs, "batch_size": batch_size,
             "train_size": train_size}
    experiment = get("mnist-rot")
    config = _settings(experiment, flags, resume, defaults=demonstration.DEFAULTS)
    _run(lambda console: demonstration.run(config, experiment, console, resume, construction))


@app.command(add_help_option=False)
def train(
    context: typer.Context,
    experiment: Annotated[str, typer.Argument(help="mnist-rot, projective, lensing, volumes, volumes-brain, cifar or "
                                                   "cifar100")] = "mnist-rot",
    config: Annotated[Path | None, Option(help="JSON or TOML file of settings; flags come before it")] = None,
    compare: Annotated[bool, Option("--compare", help="train several networks, and compare them")] = False,
    networks: Annotated[str | None, Option(help="to compare: names, with commas between")] = None,
    train_sizes: Annotated[str | None, Option(help="to compare on: numbers of training samples, with commas")] = None,
    seeds: Annotated[int | None, Option(help="to compare with: 0, 1, ... so many")] = None,
    least_steps: Annotated[int | None, Option(help="of each compared run: on few samples it takes more epochs")] = None,
    model: Annotated[str | None, Option(help="name of one that the experiment takes")] = None,
    model_options: Annotated[str | None, Option(help='as JSON: \'{"order": 4}\'')] = None,
    image_size: Annotated[int | None, Option(help="pixels of the inputs; by default what fits the model")] = None,
    data: Annotated[str | None, Option(help="folder of the data, where an experiment needs or keeps one")] = None,
    device: Device = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16, float16 (both by autocast) or float64")] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    train_size: TrainSize = None,
    test_every: Annotated[int | None, Option(help="epochs from one test to the next")] = None,
    seed: Seed = None,
    lr: Annotated[float | None, Option(help="learning rate")] = None,
    weight_decay: Annotated[float | None, Option(help="of the optimizer")] = None,
    optimizer: Annotated[str | None, Option(help="adam, amsgrad or sgd")] = None,
    schedule: Annotated[str | None, Option(help="of the learning rate: constant, cosine or steps")] = None,
    augmentation: Annotated[str | None, Option(help="of the training samples: none, rotation or crop-flip")] = None,
    accelerate: Annotated[bool | None, Option("--accelerate/--no-accelerate", show_default="accelerate",
                                              help="layers of equiconv, or of escnn")] = None,
    compile: Annotated[bool | None, Option("--compile/--no-compile", show_default="no-compile",
                                           help="torch.compile the network")] = None,
    out: Out = None,
    resume: Resume = False,
    help: Annotated[bool, Option("--help", help="show this, with the defaults of the experiment")] = False,
):
    """Trains a network, or with --compare several; under torchrun in several processes."""
    if help:
        _train_help(context, experiment)
    flags = {**context.params, "model_options": _json(model_options), "networks": _list(networks),
             "train_sizes": _list(train_sizes, int)}
    for name in ("experiment", "help", "config", "compare", "resume"):
        del flags[name]
    from .experiments import get
    from .experiments.config import read_file
    from .experiments.training import train as run
    try:
        chosen = get(experiment)
        in_file = read_file(config) if config else {}
    except ValueError as error:
        _fail(error, MISUSED)
    if compare:
        _compare(chosen, flags, resume, in_file)
    for name in ("networks", "train_sizes", "seeds", "least_steps"):
        if flags.pop(name) is not None:
            _fail(f"--{name.replace('_', '-')} goes with --compare", MISUSED)
    settings = _settings(chosen, flags, resume, in_file)
    _run(lambda console: run(settings, chosen, console, resume))


Folder = Annotated[Path, Option(help="folder of the pictures")]
Frames = Annotated[int | None, Option(help="angles in a full turn")]
Pixels = Annotated[int | None, Option(help="size of the networks' input")]
WeightsSeed = Annotated[int, Option(help="of the random weights")]


@gallery_app.callback()
def gallery(context: typer.Context):
    if context.invoked_subcommand is None:
        for turn in (gallery_image, gallery_volume):
            try:
                turn()
            except typer.Exit as done:
                if done.exit_code:
                    raise


@gallery_app.command("image")
def gallery_image(image: Annotated[Path | None, Option(help="photograph; by default a portrait")] = None,
                  out: Folder = Path("gallery"), frames: Frames = None, size: Pixels = None, seed: WeightsSeed = 0):
    """The responses of a steerable and of a conventional CNN to a rotating image: PNG, GIF and errors."""
    _turn("rotating-image", "IMAGE", "rotate_image", {"image": image}, out, frames, size, seed)


@gallery_app.command("volume")
def gallery_volume(volume: Annotated[Path | None, Option(
                       help=".npy file, axes -z -y x; else nilearn's brain, or without nilearn a phantom")] = None,
                   out: Folder = Path("gallery"), frames: Frames = None, size: Pixels = None, seed: WeightsSeed = 0):
    """The same for a volume, in three slices."""
    _turn("rotating-volume", "VOLUME", "rotate_volume", {"volume": volume}, out, frames, size, seed)


def _turn(name, kind, function, source, out, frames, size, seed):
    from .experiments.training import progress_bar
    from .gallery import moving

    def run(console):
        count = getattr(moving, f"{kind}_FRAMES") if frames is None else frames
        pixels = getattr(moving, f"{kind}_SIZE") if size is None else size
        with progress_bar(console) as progress:
            task = progress.add_task(name, total=2 * count)
            errors = getattr(moving, function)(out, size=pixels, frames=count, seed=seed,
                                               tick=lambda: progress.advance(task), **source)
        for network, error in errors.items():
            console.print(f"{network}: mean equivariance error {moving.percent(error)}")
        console.print(f"{out / name}.png, .gif and .json")
        return True
    _run(run)


@gallery_app.command("kernels")
def gallery_kernels(
    group: Annotated[str, Option(help="C8, D4, SO2, O2, SO3, O3, octa, ico, ...")] = "SO2",
    in_type: Annotated[str, Option(help="fields: trivial, regular, or frequencies of irreps, like 0,1")] = "trivial",
    out_type: Annotated[str, Option(help="likewise")] = "0,1,2",
    kernel_size: Annotated[int, Option(help="in pixels")] = 9,
    random: Annotated[bool, Option("--random", help="one filter of random weights instead of the basis")] = False,
    out: Folder = Path("gallery"), seed: WeightsSeed = 0,
):
    """The steerable kernels between two field types."""
    def run(console):
        import torch

        from .gallery import kernels
        torch.manual_seed(seed)
        conv = kernels.build(group, in_type, out_type, kernel_size)
        path = out / f"kernels-{group}.png"
        total = kernels.draw_kernels(path, conv, filter_only=random)
        console.print(f"{path}: the basis has {total} kernels")
        return True
    _run(run)


@gallery_app.command("errors")
def gallery_errors(models: Annotated[str | None, Option(help="names, with commas; by default the smaller networks for "
                                                        "images")] = None,
                   out: Folder = Path("gallery"), seed: WeightsSeed = 0):
    """The equivariance error of networks with random weights, against the angle."""
    def run(console):
        from .experiments.training import progress_bar
        from .gallery import errors
        with console.status("choosing networks"):
            names = models.split(",") if models else errors.default_networks()
        errors.check_names(names)
        curves = {}
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(names))
            for name in names:
                progress.update(task, description=name)
                curves[name] = errors.error_curve(name, seed)
                found = curves[name][0].values()
                progress.advance(task)
                progress.print(f"{name:32} mean {sum(found) / len(found):.1e}  largest {max(found):.1e}")
        errors.draw_errors(out, curves)
        console.print(f"{out / 'equivariance-errors'}.png and .csv")
        return True
    _run(run)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context):
    """Runs the benchmarks; arguments go to benchmarks.run. Only in the repository."""
    if not Path("benchmarks/run.py").exists():
        _fail("the benchmarks are not part of the package: run this in the root of equiconv's repository", MISUSED)
    raise typer.Exit(subprocess.run([sys.executable, "-m", "benchmarks.run", *context.args]).returncode)


def _train_help(context, experiment):
    """Shows the options with their defaults in an experiment, and the experiments."""
    from .experiments import get, names
    from .experiments.config import plain, resolve
    from .experiments.report import table
    try:
        chosen = get(experiment)
    except ValueError as error:
        _fail(error, MISUSED)
    compared = chosen.comparison
    defaults = {name: value for name, value in plain(resolve(chosen, {}, {})).items()
                if name not in ("experiment", "image_size", "accelerate", "compile") and value != ""}
    context.default_map = {
        **defaults, "model_options": json.dumps(defaults["model_options"]), "networks": ", ".join(compared.networks),
        "train_sizes": ", ".join(map(str, compared.train_sizes)), "seeds": 1, "least_steps": compared.least_steps}
    typer.echo(context.get_help())
    Console().print(table("experiments", ("name", "data", "models; the first is the default"), [
        (name, get(name).summary, ", ".join(get(name).models)) for name in names()]))
    raise typer.Exit


def _settings(experiment, flags, resume, in_file=None, defaults=None):
    """The Config from defaults, file and flags; to resume, what the run was started with takes the defaults' place."""
    from .experiments.config import resolve
    from .experiments.training import saved_settings
    try:
        in_file = in_file or {}
        started = {**(defaults or {}), **in_file}
        if not resume:
            return resolve(experiment, started, flags)
        place = {"out": started["out"]} if "out" in started else {}
        out = resolve(experiment, place, {"out": flags["out"]}).out
        return resolve(experiment, in_file, flags, saved_settings(out))
    except ValueError as error:
        _fail(error, MISUSED)


def _compare(experiment, flags, resume, in_file):
    from .experiments import comparison
    try:
        plan = comparison.plan(experiment, in_file, flags)
        if resume:
            plan = comparison.saved_plan(plan.out, {**in_file, **flags})
    except ValueError as error:
        _fail(error, MISUSED)
    _run(lambda console: comparison.compare(plan, experiment, console, resume))


def _run(run):
    """Calls run(console) and exits with what came of it."""
    from .experiments.data import MissingData
    from .experiments.training import Diverged
    try:
        complete = run(Console())
    except ValueError as error:
        _fail(error, MISUSED)
    except (Diverged, MissingData, OSError) as error:
        _fail(error, FAILED)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(0 if complete else INTERRUPTED)


def _json(text):
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        _fail(f"--model-options is not JSON: {error}", MISUSED)


def _list(text, kind=str):
    try:
        return None if text is None else [kind(part.strip()) for part in text.split(",")]
    except ValueError as error:
        _fail(f"--train-sizes must be whole numbers with commas between, got {text!r} ({error})", MISUSED)


def _fail(message, code):
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)
