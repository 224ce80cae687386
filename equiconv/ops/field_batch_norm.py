"""Batch normalisation of fields in two ops, each one pass over them, whatever the number of parameters.

field_norm_statistics moves the running statistics and returns by what the channels are normalised, as constants;
field_batch_norm normalises, and its gradient flows to x and to the parameters.
"""
import torch

from .. import library
from ..formats import compute_dtype, dense, empty_fields, like
from ..reference import field_batch_norm as reference
from ..reference.field_batch_norm import NUMBERS, PART
from .on_fields import check_fields, check_table, on_backends, pick

FUNCTIONS, MEANS, STATISTICS = tuple(reference.FUNCTIONS), reference.MEANS, reference.STATISTICS


def _statistics_fake(x, *_):
    return x.new_empty(len(NUMBERS), x.shape[1], dtype=compute_dtype(x.dtype))


def _fake(x, numbers, *_):
    return empty_fields(x, x.shape[1])


def _setup_context(ctx, inputs, output):
    x, numbers, *tables, weights, biases, ctx.eps, ctx.through, ctx.function = inputs
    ctx.weights = len(weights)
    ctx.save_for_backward(x, numbers, *tables, *weights, *biases)


def _backward(ctx, backend, grad):
    x, numbers, *rest = ctx.saved_tensors
    tables, weights, biases = rest[:4], rest[4:4 + ctx.weights], rest[4 + ctx.weights:]
    grad_x, *grads = _bwd[backend](like(grad, x), x, numbers, *tables, weights, biases, ctx.eps, ctx.through,
                                   ctx.function)
    return (grad_x, *[None] * 5, *(_like_each(flat, of) for flat, of in zip(grads, (weights, biases))), *[None] * 3)


def _like_each(flat, tensors):
    """The numbers of `flat` as tensors like these."""
    if not tensors:
        return []
    sizes = [t.numel() for t in tensors]
    return [part.view_as(t) for part, t in zip(flat.to(tensors[0].dtype).split(sizes), tensors)]


def _bwd_fake(grad, x, numbers, fields, bases, parts, matrices, weights, biases, *_):
    counts = (sum(t.numel() for t in tensors) for tensors in (weights, biases))
    return empty_fields(x, x.shape[1]), *(numbers.new_empty(count) for count in counts)


def _bwd_setup_context(ctx, inputs, output):
    *tensors, weights, biases, ctx.eps, ctx.through, ctx.function = inputs
    ctx.weights = len(weights)
    ctx.save_for_backward(*tensors, *weights, *biases)


def _bwd_backward(ctx, backend, *grads):
    """By torch's derivatives of the definition, where statistics are functions of x if they are of the values."""
    grad, x, numbers, *rest = ctx.saved_tensors
    tables, parameters = rest[:4], rest[4:]

    def backward(grad, x, *parameters):
        lists = parameters[:ctx.weights], parameters[ctx.weights:]
        return reference.field_batch_norm_bwd(grad, x, numbers, *tables, *lists, ctx.eps, ctx.through, ctx.function)

    of_grad, of_x, *of_parameters = torch.func.vjp(backward, grad, x, *parameters)[1](tuple(grads))
    return (of_grad, of_x, *[None] * 5, of_parameters[:ctx.weights], of_parameters[ctx.weights:], *[None] * 3)


_TABLES = "Tensor fields, Tensor bases, Tensor parts, Tensor matrices"
_PARAMETERS = "Tensor[] weights, Tensor[] biases"
_statistics = library.define_without_derivative(
    "field_norm_statistics", f"(Tensor x, Tensor? moments, {_TABLES}, {_PARAMETERS}, Tensor(a!)[] running_means, "
    "Tensor(b!)[] running_vars, Tensor(c!)[] counters, float eps, float? momentum, bool batch, int statistics) -> "
    "Tensor", on_backends("field_norm", "field_norm_statistics"), fake=_statistics_fake)
_fwd = library.define(
    "field_batch_norm", f"(Tensor x, Tensor numbers, {_TABLES}, {_PARAMETERS}, float eps, bool through, int function) "
    "-> Tensor", on_backends("field_norm", "field_batch_norm"), fake=_fake, setup_context=_setup_context,
    backward=_backward)
_bwd = library.define(
    "field_batch_norm_bwd", f"(Tensor grad, Tensor x, Tensor numbers, {_TABLES}, {_PARAMETERS}, float eps, "
    "bool through, int function) -> (Tensor, Tensor, Tensor)", on_backends("field_norm", "field_batch_norm_bwd"),
    fake=_bwd_fake, setup_context=_bwd_setup_context, backward=_bwd_backward)


def field_norm_statistics(x, tables, weights, biases, running_means, running_vars, counters, eps, momentum,
                          statistics, *, batch=True, moments=None, backend=None):
    """Numbers by which channels are normalised: [4, C], NUMBERS of equiconv/reference/field_batch_norm.py; constants.

    x              [B, C, *spatial], float32, float64, float16 or bfloat16 (the last two are computed in float32)
    tables         (fields, bases) as field_norm has them, and (parts, matrices): int64 [P, 13], a row PART of
                   equiconv/reference/field_batch_norm.py for each part of a field, in turn; and what it names of
                   matrices, [N], in the dtype that is computed in
    weights        list of tensors, one number for each part, one after the other; empty: without weights
    biases         list of tensors, as many numbers as the parts say; empty: without biases
    running_means  list of tensors, as many numbers as the parts say. They move towards the statistics of the batch
    running_vars   list of tensors, one number for each part; they move, too; empty: nothing does
    counters       list of int64 tensors, of batches: one, or one for each of running_vars. They are counted up by one
    eps            float, added to the variance
    momentum       float: how far running statistics move; None: they are averages of all batches
    statistics     one of STATISTICS, by which the channels are normalised
    batch          whether x is read: if not, nothing moves, and the channels are normalised by running statistics
    moments        None, or float64 [2 C + 1]: means and variances of the components Q^-1 x, and the number of values
                   that they are of, instead of those of x
    backend        "native", "triton" or "reference"; None: the best that can run

    Raises ValueError for what does not fit together.
    """
    chosen = _choose("field_norm_statistics", x, tables, backend)
    if statistics not in STATISTICS:
        raise ValueError(f"field_norm_statistics: statistics must be one of {STATISTICS}, got {statistics!r}")
    arguments = (moments, *tables, weights, biases, running_means, running_vars, counters, eps, momentum, batch,
                 STATISTICS.index(statistics))
    if chosen == "reference":
        with torch.no_grad():
            return reference.field_norm_statistics(x, *arguments)
    numbers = _statistics[chosen](dense(x), *arguments)
    if batch and not torch.compiler.is_compiling():
        changed = [t for t in (*running_means, *running_vars, *counters) if not t.is_inference()]
        torch.autograd.graph.increment_version(changed)
    return numbers


def field_batch_norm(x, numbers, tables, weights, biases, eps, through=False, function="identity", *, backend=None):
    """Batch normalisation of fields: y = function(Q (scale * (Q^-1 x) + shift)) for each field and pixel.

    x         [B, C, *spatial], float32, float64, float16 or bfloat16 (the last two are computed in float32)
    numbers   [4, C], of field_norm_statistics for these tables, weights, biases and eps
    through   whether gradients flow through the statistics: of "values" of x, and parts that have one mean each
    function  one of FUNCTIONS, applied in the same pass; of fields that have no change of basis, with `through`
    backend   "native", "triton" or "reference"; None: the best that can run

    Returns [B, C, *spatial] in x's dtype and memory format. Gradients flow to x and to the parameters, weights and
    biases. Raises ValueError for what does not fit together.
    """
    chosen = _choose("field_batch_norm", x, tables, backend)
    if function not in FUNCTIONS:
        raise ValueError(f"field_batch_norm: function must be one of {FUNCTIONS}, got {function!r}")
    if numbers.shape != (len(NUMBERS), x.shape[1]) or numbers.dtype != compute_dtype(x.dtype):
        raise ValueError(f"field_batch_norm: numbers must be {compute_dtype(x.dtype)} [{len(NUMBERS)}, {x.shape[1]}], "
                         f"got {numbers.dtype} {tuple(numbers.shape)}")
    arguments = (numbers, *tables, weights, biases, eps, through, FUNCTIONS.index(function))
    if chosen == "reference":
        return reference.field_batch_norm(x, *arguments)
    return _fwd[chosen](dense(x), *arguments)


def _choose(op, x, tables, backend):
    check_fields(op, x)
    _, bases, parts, matrices = tables
    check_table(op, "parts", parts, PART, rows="P")
    if bases.dtype != compute_dtype(x.dtype) or matrices.dtype != bases.dtype:
        raise ValueError(f"{op}: bases and matrices must have dtype {compute_dtype(x.dtype)}, got {bases.dtype} and "
                         f"{matrices.dtype}")
    return pick(x, backend)
