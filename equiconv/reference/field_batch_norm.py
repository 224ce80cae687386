"""Batch normalisation of fields by its definition, part by part."""
import math

import torch
import torch.nn.functional as F

from ..formats import compute_dtype, like
from .field_norm import _apply, _parts, _spread

#: of the output, in the order of NormFunction in csrc/field_norm.h
FUNCTIONS = {"identity": lambda x: x, "relu": F.relu, "elu": F.elu}
#: what a variance is about, and the mean of a part, in the order of Mean in csrc/field_norm.h: zero; zero, but the
#: variance of each channel about its own mean; one mean for all channels; a projection of the channels' means
MEANS = ("zero", "own", "average", "projected")
#: by what is normalised, in the order of Statistics in csrc/field_norm.h: the variance of the values themselves; its
#: unbiased estimate; the running statistics, after they moved
STATISTICS = ("values", "estimate", "running")
#: of a row of `parts`: channels that share a variance. Places are those in the tensors of a list, one after the other
PART = ("channel", "size", "kind", "samples", "group", "variance", "mean_group", "mean", "projection", "bias_group",
        "bias", "biases", "spread")
NUMBERS = ("scale", "shift", "mean", "deviation")  # rows of what field_norm_statistics returns; 1 / deviation


class Part:
    """A row of `parts`, by the names of its columns."""

    def __init__(self, row):
        self.__dict__.update(zip(PART, row, strict=True))
        self.channels = slice(self.channel, self.channel + self.size)

    def matrix(self, matrices, start, columns):
        return matrices[start:start + self.size * columns].view(self.size, columns)


def parts_of(table):
    return [Part(row) for row in table.tolist()]


def field_norm_statistics(x, moments, fields, bases, parts, matrices, weights, biases, running_means, running_vars,
                          counters, eps, momentum, batch, statistics):
    dtype, by = compute_dtype(x.dtype), STATISTICS[statistics]
    if batch:
        mean, var, count = _moments(x, fields, bases) if moments is None else _unpacked(moments)
        for counter in counters:
            counter.add_(1)
    starts = _starts(running_means, running_vars)
    numbers = x.new_zeros(len(NUMBERS), x.shape[1], dtype=torch.float64)
    for part in parts_of(parts):
        if batch:
            used = _mean_of(part, mean[part.channels], matrices)
            squares = var[part.channels]
            if MEANS[part.kind] in ("zero", "average"):
                squares = squares + (mean[part.channels] - used).square()
            variance = squares.mean()
            estimate = variance * _unbiasing(count * part.samples)
            if running_vars:
                group, rate = part.group, momentum
                if momentum is None:
                    rate = 1 / counters[min(group, len(counters) - 1)].double()
                _move(running_vars[group], part.variance - starts[1][group], estimate[None], rate)
                if part.mean_group >= 0:
                    means = used if MEANS[part.kind] == "projected" else used[:1]
                    _move(running_means[part.mean_group], part.mean - starts[0][part.mean_group], means, rate)
            variance = variance if by == "values" else estimate
        if by == "running":
            variance = _flat(running_vars)[part.variance]
            used = variance.new_zeros(part.size)
            if part.mean_group >= 0:
                length = part.size if MEANS[part.kind] == "projected" else 1
                used = _flat(running_means)[part.mean:][:length].expand(part.size)
        numbers[2, part.channels] = used.double()
        numbers[3, part.channels] = torch.rsqrt(variance.double() + eps)
    numbers[0], numbers[1] = _affine(numbers[2], numbers[3], parts, matrices.double(), weights, biases)
    return numbers.to(dtype)


def field_batch_norm(x, numbers, fields, bases, parts, matrices, weights, biases, eps, through, function):
    return _forward(x, numbers, fields, bases, parts, matrices, weights, biases, eps, through, function)


def field_batch_norm_bwd(grad, x, numbers, fields, bases, parts, matrices, weights, biases, eps, through, function):
    """(grad_x, those of weights and of biases, each one after the other, in the dtype that is computed in)."""
    def forward(x, weights, biases):
        return _forward(x, numbers, fields, bases, parts, matrices, weights, biases, eps, through, function)

    lists = [[t.to(numbers.dtype) for t in of] for of in (weights, biases)]
    grad_x, *rest = torch.func.vjp(forward, x, *lists)[1](grad)
    return like(grad_x, x), *(_flat(of, numbers) for of in rest)


def _forward(x, numbers, fields, bases, parts, matrices, weights, biases, eps, through, function):
    """As a function of x and of the parameters, also through the statistics of x if `through`."""
    mean, deviation = numbers[2], numbers[3]
    if through:
        mean, deviation = _through(x, parts, eps)
    scale, shift = _affine(mean, deviation, parts, matrices, weights, biases)
    z = torch.cat([_apply(q_inv, part) for _, q_inv, part in _parts(x, fields, bases)], 1)
    normed = FUNCTIONS[list(FUNCTIONS)[function]](_spread(scale, x) * z + _spread(shift, x))
    return like(torch.cat([_apply(q, part) for q, _, part in _parts(normed, fields, bases)], 1).to(x.dtype), x)


def _through(x, parts, eps):
    """(mean, 1 / deviation) of each channel, as functions of x; of parts whose channels have one mean."""
    x, means, deviations = x.to(compute_dtype(x.dtype)), [], []
    for part in parts_of(parts):
        values = x[:, part.channels]
        mean = values.mean()
        means.append(mean.expand(part.size))
        deviations.append(torch.rsqrt((values - mean).square().mean() + eps).expand(part.size))
    return torch.cat(means), torch.cat(deviations)


def _affine(mean, deviation, parts, matrices, weights, biases):
    """(scale, shift) of each channel."""
    scales, shifts = [], []
    weights, biases = _flat(weights, mean), _flat(biases, mean)
    for part in parts_of(parts):
        scale = deviation[part.channels]
        if len(weights):
            scale = scale * weights[part.variance]
        shift = -mean[part.channels] * scale
        if len(biases) and part.biases:
            bias = biases[part.bias:part.bias + part.biases]
            shift = shift + (bias if part.spread < 0 else part.matrix(matrices, part.spread, part.biases) @ bias)
        scales.append(scale)
        shifts.append(shift)
    return torch.cat(scales), torch.cat(shifts)


def _moments(x, fields, bases):
    from .field_norm import field_norm_moments
    return *field_norm_moments(x, fields, bases), x.shape[0] * math.prod(x.shape[2:])


def _unpacked(moments):
    """(means, variances, their number) of what gather_moments returns."""
    mean, var = moments[:-1].chunk(2)
    return mean, var, moments[-1]


def _mean_of(part, mean, matrices):
    kind = MEANS[part.kind]
    if kind == "average":
        return mean.mean().expand(part.size)
    if kind == "projected":
        return part.matrix(matrices, part.projection, part.size).to(mean.dtype) @ mean
    return torch.zeros_like(mean)


def _unbiasing(count):
    return count / ((count - 1).clamp(min=1) if isinstance(count, torch.Tensor) else max(count - 1, 1))


def _move(running, place, values, rate):
    """Moves some numbers of a running average towards values."""
    numbers = running.view(-1)[place:place + len(values)]
    rate = rate.to(running.dtype) if isinstance(rate, torch.Tensor) else rate
    numbers.lerp_(values.to(running.dtype), rate)


def _starts(*lists):
    """For each list of tensors, where each of them begins among the numbers of all."""
    return [[sum(t.numel() for t in of[:i]) for i in range(len(of))] for of in lists]


def _flat(tensors, like=None):
    """The numbers of all, one after the other, in the dtype of `like`."""
    if not tensors:
        return like.new_empty(0)
    flat = torch.cat([t.flatten() for t in tensors])
    return flat if like is None else flat.to(like.dtype)
