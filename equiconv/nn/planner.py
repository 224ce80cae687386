"""Which method computes a convolution: factorised (ops.steerable_conv), or dense with the expanded filter."""
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from .. import backends
from ..layout import Geometry
from ..layout.work import dense_work
from ..library import autocast_dtype
from . import costs

METHODS = ("auto", *costs.METHODS)
NOMINAL = {2: (4, 32, 32), 3: (2, 16, 16, 16)}  # batch and size of an image, where none is known
REMEMBERED = 256  # choices of a module


@dataclass(frozen=True)
class PlanReport:
    """How a convolution is computed, and why.

    method                      "factorised" or "dense"
    input_shape                 [B, channels, *spatial] that this holds for
    factorised, dense           multiplications of the forward pass, for one pixel of the output
    factorised_bytes, dense_bytes   the weights as either method multiplies by them: mixing matrices, filter
    reason
    """
    method: str
    input_shape: tuple
    factorised: float
    dense: float
    factorised_bytes: int
    dense_bytes: int
    reason: str

    def __str__(self):
        return (f"{self.method} for an input of {list(self.input_shape)}: {self.reason}\n"
                f"factorised: {self.factorised:,.0f} multiplications per pixel, {self.factorised_bytes:,} bytes\n"
                f"dense: {self.dense:,.0f} multiplications per pixel, {self.dense_bytes:,} bytes")


class Planned:
    """Mixin of the convolutions. `method` is "auto", "factorised" or "dense"; it is no part of the state_dict.

    "auto" chooses by the costs of the machine, for each shape of the input; in a compiled graph, which serves many, for
    a nominal one. What the factorised method cannot do is dense then, and a ValueError where it is asked for by name.
    """

    _method = "auto"

    def _adopt(self):
        super()._adopt()
        self._choices, self._last_shape = {}, None

    def __getstate__(self):
        return {**super().__getstate__(), "_choices": {}}

    @property
    def method(self):
        return self._method

    @method.setter
    def method(self, value):
        if value not in METHODS:
            raise ValueError(f"{type(self).__name__}: method must be one of {METHODS}, got {value!r}")
        self._method = value

    def plan_report(self, input_shape=None):
        """PlanReport for inputs [B, in_type.size, *spatial] of the weights' dtype; by default as in the last call."""
        shape = tuple(input_shape or self._last_shape or self._nominal_shape())
        plan, geometry = self.plan, self.geometry(shape)  # the plan is made anew if it must be
        problem = self._why_not_for(self.weights)
        if problem is not None:
            method, reason = "dense", f"the factorised method cannot be used: {problem}"
        elif self._method != "auto":
            method, reason = self._method, "as the module's method says"
        else:
            method, reason = self._choose(shape, self.training)
        work, size = costs.factorised_work(plan, geometry), self.weights.itemsize
        return PlanReport(method, shape, work.multiplications, dense_work(plan, geometry.stride, geometry.up),
                          size * work.packed, size * plan.out_channels * plan.in_channels * plan.taps, reason)

    def geometry(self, input_shape):
        """layout.Geometry for inputs [B, in_type.size, *spatial]."""
        each = [tuple(self._each(v)) for v in (self.stride, self.padding, self.dilation)]
        return Geometry(self.kernel, *each, self.groups, self.transposed, self.in_type.size, self.out_type.size,
                        tuple(input_shape[2:]), tuple(self.evaluate_output_shape(input_shape)[2:]))

    def method_for(self, x):
        """"factorised" or "dense", for the input tensor x [B, in_type.size, *spatial]."""
        if self._method == "dense":
            return "dense"
        problem = self.why_not_factorised(x)
        if problem is not None:
            if self._method == "factorised":
                raise ValueError(f"{type(self).__name__}: method 'factorised' cannot be used here: {problem}; 'auto' "
                                 "takes the dense method then")
            return "dense"
        if torch.compiler.is_compiling():
            return self._method_of_graphs()
        self.__dict__["_last_shape"] = x.shape
        if self._method == "factorised":
            return "factorised"
        with_backward = self.training or (torch.is_grad_enabled() and (x.requires_grad or self.weights.requires_grad))
        return self._choose(tuple(x.shape), with_backward)[0]

    def why_not_factorised(self, x):
        """Why the factorised method cannot take the input tensor x here and now, or None."""
        self._refresh_plan()
        if not torch.compiler.is_compiling():
            for tensor in (x, self.weights):
                if type(tensor) is not torch.Tensor and type(tensor) is not Parameter:
                    return f"a tensor is a {type(tensor).__name__}"
            if torch._C._are_functorch_transforms_active():
                return "a transform of torch.func is active"
            if torch.onnx.is_in_onnx_export():
                return "the graph of an export is dense"
        elif torch.compiler.is_exporting():
            return "the graph of an export is dense"
        if autocast_dtype(x.device.type) is not None:
            return "autocast is on"
        if x.dtype != self.weights.dtype:
            return f"the input is {x.dtype}, the weights are {self.weights.dtype}"
        return self._why_not_for(x)

    def _why_not_for(self, like):
        if like.device.type != "cpu" or not backends.HAS_NATIVE["cpu"]:
            return f"no kernels on {like.device.type!r}"
        if like.dtype not in (torch.float32, torch.float64):
            return f"it computes in float32 and float64, not in {like.dtype}"
        return self._problem_of_plan()

    @torch.compiler.assume_constant_result
    def _problem_of_plan(self):
        return self._plan[0].too_large_to_factorise(self.kernel)

    @torch.compiler.assume_constant_result
    def _method_of_graphs(self):
        method = "factorised" if self._method == "factorised" else self._choose(self._nominal_shape(), True)[0]
        if method == "factorised":  # its tables are made before the trace
            shape = (self.kernel, tuple(self._each(self.stride)), tuple(self._each(self.dilation)), self.groups)
            for adjoint in (False, True):
                self._plan[0].conv_tables(*shape, self.transposed != adjoint, adjoint, self.weights.device,
                                          self.weights.dtype)
        return method

    def _nominal_shape(self):
        batch, *size = NOMINAL[self.d]
        return (batch, self.in_type.size, *size)

    def _choose(self, shape, with_backward):
        """(method, reason) by the costs of the machine."""
        plan = self._plan[0]
        key = (plan, shape, with_backward, torch.get_num_threads())
        if key not in self._choices:
            if len(self._choices) >= REMEMBERED:
                self._choices.clear()
            found, geometry, known = {}, self.geometry(shape), costs.current()
            for method in costs.METHODS:
                amounts = costs.amounts(method, plan, geometry, shape[0], with_backward, expands=with_backward)
                found[method] = known.time(method, amounts)
            best = min(found, key=found.get)
            times = ", ".join(f"{method} {seconds * 1e3:.3g} ms" for method, seconds in found.items())
            work = "a training step" if with_backward else "inference"
            self._choices[key] = best, f"estimated for {work}: {times}"
        return self._choices[key]

