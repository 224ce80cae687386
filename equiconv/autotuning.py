"""autotune(): each convolution of a model takes the method that is faster on the input that it really gets."""
from dataclasses import dataclass, field

import torch
from torch.nn import Module

from .calibration import run, time_of
from .fused import Unavailable
from .nn.planner import planned_of
from .testing import evaluation

BUDGET_S = 0.2  # of each measurement


@dataclass(frozen=True)
class Tuned:
    """What was found for one convolution.

    seconds  {method: of a training step or, in eval mode, of inference}
    reason   why nothing was measured, or ""
    """
    name: str
    method: str
    input_shape: tuple = ()
    seconds: dict = field(default_factory=dict)
    reason: str = ""


class TuningReport(list):
    """List of Tuned; prints as a table."""

    def __str__(self):
        if not self:
            return "no convolutions"
        return "\n".join(f"{t.name or '(the model)'}: {t.method}, {t.reason or _times(t)}" for t in self)


def _times(t):
    times = ", ".join(f"{method} {seconds * 1e3:.3g} ms" for method, seconds in t.seconds.items())
    return f"{times} for {list(t.input_shape)}"


def autotune(model, example_input, *, budget_s=BUDGET_S):
    """Measures the methods for every convolution of a model, and sets its `method` to the faster one.

    model          torch.nn.Module with convolutions of equiconv.nn (see accelerate) or models.HarmonicConv, in the mode
                   that matters: training steps are measured of modules in training mode, inference of those in eval
    example_input  what the model takes: a tensor, a GeometricTensor, or a tuple of arguments
    budget_s       seconds for each method of each convolution

    Returns TuningReport. Convolutions that the example does not reach, or that have no choice, stay as they are. One
    that is called several times is measured with its first input. Raises TypeError if model is not a module.
    """
    if not isinstance(model, Module):
        raise TypeError(f"autotune: model must be a torch.nn.Module, got {type(model).__name__}")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    convolutions = {name: module for name, module in model.named_modules() if planned_of(module) is not None}
    inputs = _inputs(model, convolutions, arguments)
    return TuningReport(_tune(name, module, inputs.get(name), budget_s) for name, module in convolutions.items())


def _inputs(model, convolutions, arguments):
    """{name: tensor} of the convolutions that the model calls. In eval mode: running statistics stay as they are."""
    found, hooks = {}, []

    def look(name):
        def hook(_, inputs):
            found.setdefault(name, inputs[0].tensor.detach())
        return hook

    for name, module in convolutions.items():
        hooks.append(module.register_forward_pre_hook(look(name)))
    try:
        with evaluation(model), torch.no_grad():
            model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tune(name, module, x, budget_s):
    if x is None:
        return Tuned(name, module.method, reason="the example does not reach it")
    problem = planned_of(module).why_not_factorised(x)
    if problem is not None:
        return Tuned(name, module.method, tuple(x.shape), reason=problem)
    before, seconds = module.method, {}
    x.requires_grad_(module.training)
    try:
        for method in planned_of(module).candidates(x):
            module.method = method
            try:
                seconds[method] = time_of(lambda: run(module, x, module.training), budget_s, x.device)
            except Unavailable:  # plan_report() says why
                continue
    except BaseException:
        module.method = before
        raise
    module.method = min(seconds, key=seconds.get)
    return Tuned(name, module.method, tuple(x.shape), seconds)
