"""Parts of fields, whose channels share a variance: what one program makes of the numbers of all channels.

Statistics, running averages, and gradients of parameters: a few numbers for each channel, by the last program that sums
over pixels. Parameters and running statistics are separate tensors; tables of their addresses are kept on the device.
"""
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..reference.field_batch_norm import MEANS, PART

WIDTH = tl.constexpr(len(PART))
(CHANNEL, SIZE, KIND, SAMPLES, GROUP, VARIANCE, MEAN_GROUP, MEAN, PROJECTION, BIAS_GROUP, BIAS, BIASES, SPREAD) = (
    tl.constexpr(i) for i in range(len(PART)))
ZERO, OWN, AVERAGE, PROJECTED = (tl.constexpr(MEANS.index(name)) for name in ("zero", "own", "average", "projected"))
LISTS = ("weights", "biases", "running_means", "running_vars", "counters")  # rows of the table of addresses
WEIGHTS, BIASES_LIST, RUNNING_MEANS, RUNNING_VARS, COUNTERS = (tl.constexpr(i) for i in range(len(LISTS)))
BLOCKS = {"BLOCK_PARTS": 64, "PART_SIZE": 4}  # few registers: less than what sums over pixels need
# Of statistics_kernel; ptxas would spill to fit more blocks into a multiprocessor.
FEW = {**BLOCKS, "BLOCK_PARTS": 32, **({} if TRITON_INTERPRET else {"maxnreg": 255})}


@triton.jit
def column(parts_ptr, part, exists, NAME: tl.constexpr):
    return tl.load(parts_ptr + part * WIDTH + NAME, mask=exists, other=0)


@triton.jit
def pointers(addresses_ptr, lists, NAME: tl.constexpr, group, place, exists, like_ptr):
    """Of numbers at these places in the tensors of a list, of which `like_ptr` is one."""
    start = tl.load(addresses_ptr + NAME * lists + group, mask=exists, other=0)
    return (start + place * (like_ptr.dtype.element_ty.primitive_bitwidth // 8)).to(like_ptr.dtype)


@triton.jit
def moved(at, exists, value, rate):
    """Moves running numbers by torch's formula of lerp, and returns where to."""
    old = tl.load(at, mask=exists, other=0.0).to(tl.float64)
    apart = value - old
    new = tl.where(rate < 0.5, old + rate * apart, value - apart * (1 - rate))
    rounded = new.to(at.dtype.element_ty)
    tl.store(at, rounded, mask=exists)
    return new


@triton.jit
def load_sum(of_channel_ptr, channel, exists):
    """What other programs stored, past the first-level cache."""
    return tl.load(of_channel_ptr + channel, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float64)


@triton.jit
def projected(matrices_ptr, start, size, mean_ptr, channel, i, exists, largest):
    """[parts, channels]: the matrix of each part applied to the means of its channels."""
    total = tl.zeros(exists.shape, tl.float64)
    for j in range(0, largest):
        both = exists & (j < size)[:, None]
        matrix = tl.load(matrices_ptr + start[:, None] + i[None, :] * size[:, None] + j, mask=both, other=0.0)
        total += matrix.to(tl.float64) * load_sum(mean_ptr, channel + j, j < size)[:, None]
    return total


@triton.jit
def finish_statistics(mean_ptr, var_ptr, numbers_ptr, parts_ptr, matrices_ptr, addresses_ptr, weight_ptr, bias_ptr,
                      running_ptr, counter_ptr, num_parts, channels, lists, counters, values, EPS: tl.constexpr,
                      MOMENTUM: tl.constexpr, BATCH: tl.constexpr, BY: tl.constexpr, BLOCK_PARTS: tl.constexpr,
                      PART_SIZE: tl.constexpr):
    """The numbers [4, channels] of all parts, from mean and variance of each channel over so many values.

    Moves the running statistics. weight_ptr, bias_ptr, running_ptr and counter_ptr: a tensor of their list, or None.
    """
    if BATCH and counter_ptr is not None:
        c = tl.arange(0, BLOCK_PARTS)
        batches_at = pointers(addresses_ptr, lists, COUNTERS, c, 0, c < counters, counter_ptr)
        tl.store(batches_at, tl.load(batches_at, mask=c < counters, other=0) + 1, mask=c < counters)
        tl.debug_barrier()
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        has = part < num_parts
        channel, size = column(parts_ptr, part, has, CHANNEL), column(parts_ptr, part, has, SIZE).to(tl.int32)
        kind, variance_place = column(parts_ptr, part, has, KIND), column(parts_ptr, part, has, VARIANCE)
        group, mean_group = column(parts_ptr, part, has, GROUP), column(parts_ptr, part, has, MEAN_GROUP)
        mean_place, projection = column(parts_ptr, part, has, MEAN), column(parts_ptr, part, has, PROJECTION)
        largest = tl.max(size)
        average, variance = tl.zeros(has.shape, tl.float64), tl.zeros(has.shape, tl.float64)
        rate = average
        if MOMENTUM is not None:
            rate += MOMENTUM
        if BATCH:
            for start in range(0, largest, PART_SIZE):
                i = start + tl.arange(0, PART_SIZE)
                exists = i[None, :] < size[:, None]
                average += tl.sum(load_sum(mean_ptr, channel[:, None] + i[None, :], exists), 1)
            average = tl.where(kind == AVERAGE, average / tl.maximum(size, 1), 0.0)
            for start in range(0, largest, PART_SIZE):
                i = start + tl.arange(0, PART_SIZE)
                exists = i[None, :] < size[:, None]
                own = load_sum(mean_ptr, channel[:, None] + i[None, :], exists)
                apart = tl.where(((kind == ZERO) | (kind == AVERAGE))[:, None], own - average[:, None], 0.0)
                squares = load_sum(var_ptr, channel[:, None] + i[None, :], exists) + apart * apart
                variance += tl.sum(tl.where(exists, squares, 0.0), 1)
            variance = variance / tl.maximum(size, 1)
            observed = values * column(parts_ptr, part, has, SAMPLES).to(tl.float64)
            estimate = variance * (observed / tl.maximum(observed - 1, 1.0))
            if running_ptr is not None:
                if MOMENTUM is None:
                    of = pointers(addresses_ptr, lists, COUNTERS, tl.minimum(group, counters - 1), 0, has, counter_ptr)
                    batches = tl.load(of, mask=has, other=1).to(tl.float64)
                    rate = 1 / batches
                running_at = pointers(addresses_ptr, lists, RUNNING_VARS, group, variance_place, has, running_ptr)
                running = moved(running_at, has, estimate, rate)
            if BY == "estimate":
                variance = estimate
            if BY == "running":
                variance = running
        else:
            running_at = pointers(addresses_ptr, lists, RUNNING_VARS, group, variance_place, has, running_ptr)
            variance = tl.load(running_at, mask=has, other=1.0).to(tl.float64)
        deviation = 1 / tl.sqrt(variance + EPS)
        scale = deviation
        if weight_ptr is not None:
            weight_at = pointers(addresses_ptr, lists, WEIGHTS, group, variance_place, has, weight_ptr)
            scale = deviation * tl.load(weight_at, mask=has, other=0.0).to(tl.float64)
        for start in range(0, largest, PART_SIZE):
            i = start + tl.arange(0, PART_SIZE)
            exists = i[None, :] < size[:, None]
            mean = tl.where(exists, average[:, None], 0.0)
            if BATCH:
                is_projected = exists & (kind == PROJECTED)[:, None]
                if tl.max(is_projected.to(tl.int32)) > 0:
                    mean += projected(matrices_ptr, projection, size, mean_ptr, channel, i, is_projected, largest)
            if running_ptr is not None:
                has_mean = exists & ((mean_group >= 0) & ((kind == AVERAGE) | (kind == PROJECTED)))[:, None]
                place = mean_place[:, None] + tl.where((kind == PROJECTED)[:, None], i[None, :], 0)
                mean_at = pointers(addresses_ptr, lists, RUNNING_MEANS, mean_group[:, None], place, has_mean,
                                   running_ptr)
                one = has_mean & ((kind == PROJECTED)[:, None] | (i[None, :] == 0))
                if BATCH:
                    moved(mean_at, one, mean, rate[:, None])
                    if BY == "running":
                        tl.debug_barrier()
                        mean = tl.load(mean_at, mask=has_mean, other=0.0).to(tl.float64)
                else:
                    mean = tl.load(mean_at, mask=has_mean, other=0.0).to(tl.float64)
            shift = -mean * scale[:, None]
            if bias_ptr is not None:
                shift += spread(parts_ptr, part, has, matrices_ptr, addresses_ptr, lists, bias_ptr, i, exists)
            to = numbers_ptr + channel[:, None] + i[None, :]
            tl.store(to, (scale[:, None] + tl.zeros_like(mean)).to(to.dtype.element_ty), mask=exists)
            tl.store(to + channels, shift.to(to.dtype.element_ty), mask=exists)
            tl.store(to + 2 * channels, mean.to(to.dtype.element_ty), mask=exists)
            tl.store(to + 3 * channels, (deviation[:, None] + tl.zeros_like(mean)).to(to.dtype.element_ty), mask=exists)


@triton.jit
def spread(parts_ptr, part, has, matrices_ptr, addresses_ptr, lists, bias_ptr, i, exists):
    """[parts, channels]: the biases of the channels i of parts."""
    group, place = column(parts_ptr, part, has, BIAS_GROUP), column(parts_ptr, part, has, BIAS)
    count, matrix = column(parts_ptr, part, has, BIASES), column(parts_ptr, part, has, SPREAD)
    total = tl.zeros(exists.shape, tl.float64)
    for b in range(0, tl.max(count)):
        both = exists & (b < count)[:, None]
        at = pointers(addresses_ptr, lists, BIASES_LIST, group, place + b, has & (b < count), bias_ptr)
        bias = tl.load(at, mask=has & (b < count), other=0.0).to(tl.float64)
        entry = tl.load(matrices_ptr + matrix[:, None] + i[None, :] * count[:, None] + b,
                        mask=both & (matrix >= 0)[:, None], other=1.0)
        total += tl.where(both, entry.to(tl.float64) * bias[:, None], 0.0)
    return total


@triton.jit
def finish_gradients(products_ptr, sums_ptr, numbers_ptr, through_ptr, parts_ptr, matrices_ptr, grad_weights_ptr,
                     grad_biases_ptr, num_parts, channels, values, BLOCK_PARTS: tl.constexpr,
                     PART_SIZE: tl.constexpr):
    """Gradients of weights and biases from the sums of g * (z - mean) and of g of each channel.

    through_ptr  None, or [2, channels]: slope and shift of grad_x = scale * g + slope * (x - mean) + shift
    """
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        has = part < num_parts
        channel, size = column(parts_ptr, part, has, CHANNEL), column(parts_ptr, part, has, SIZE).to(tl.int32)
        largest = tl.max(size)
        product, total = tl.zeros(has.shape, tl.float64), tl.zeros(has.shape, tl.float64)
        for start in range(0, largest, PART_SIZE):
            i = start + tl.arange(0, PART_SIZE)
            exists = i[None, :] < size[:, None]
            product += tl.sum(load_sum(products_ptr, channel[:, None] + i[None, :], exists), 1)
            total += tl.sum(load_sum(sums_ptr, channel[:, None] + i[None, :], exists), 1)
        scale = tl.load(numbers_ptr + channel, mask=has, other=0.0).to(tl.float64)
        deviation = tl.load(numbers_ptr + 3 * channels + channel, mask=has, other=0.0).to(tl.float64)
        if grad_weights_ptr is not None:
            tl.store(grad_weights_ptr + column(parts_ptr, part, has, VARIANCE),
                     (product * deviation).to(grad_weights_ptr.dtype.element_ty), mask=has)
        if grad_biases_ptr is not None:
            place, count = column(parts_ptr, part, has, BIAS), column(parts_ptr, part, has, BIASES)
            matrix = column(parts_ptr, part, has, SPREAD)
            for b in range(0, tl.max(count)):
                of_bias = tl.zeros(has.shape, tl.float64)
                for start in range(0, largest, PART_SIZE):
                    i = start + tl.arange(0, PART_SIZE)
                    exists = (i[None, :] < size[:, None]) & (b < count)[:, None]
                    entry = tl.load(matrices_ptr + matrix[:, None] + i[None, :] * count[:, None] + b,
                                    mask=exists & (matrix >= 0)[:, None], other=1.0)
                    of_bias += tl.sum(entry.to(tl.float64) * load_sum(
                        sums_ptr, channel[:, None] + i[None, :], exists), 1)
                tl.store(grad_biases_ptr + place + b, of_bias.to(grad_biases_ptr.dtype.element_ty),
                         mask=has & (b < count))
        if through_ptr is not None:
            count = values * tl.maximum(size, 1)
            slope, shift = -scale * deviation * deviation * product / count, -scale * total / count
            for start in range(0, largest, PART_SIZE):
                i = start + tl.arange(0, PART_SIZE)
                exists = i[None, :] < size[:, None]
                to = through_ptr + channel[:, None] + i[None, :]
                tl.store(to, (slope[:, None] + tl.zeros(exists.shape, tl.float64)).to(to.dtype.element_ty), mask=exists)
                tl.store(to + channels, (shift[:, None] + tl.zeros(exists.shape, tl.float64)).to(
                    to.dtype.element_ty), mask=exists)


@triton.jit
def statistics_kernel(mean_ptr, var_ptr, count_ptr, numbers_ptr, parts_ptr, matrices_ptr, addresses_ptr, weight_ptr,
                      bias_ptr, running_ptr, counter_ptr, num_parts, channels, lists, counters, EPS: tl.constexpr,
                      MOMENTUM: tl.constexpr, BATCH: tl.constexpr, BY: tl.constexpr, BLOCK_PARTS: tl.constexpr,
                      PART_SIZE: tl.constexpr):
    """One program, for statistics that are known: those of all processes, or the running ones."""
    values = 0.0
    if BATCH:
        values = tl.load(count_ptr)
    finish_statistics(mean_ptr, var_ptr, numbers_ptr, parts_ptr, matrices_ptr, addresses_ptr, weight_ptr, bias_ptr,
                      running_ptr, counter_ptr, num_parts, channels, lists, counters, values, EPS, MOMENTUM, BATCH, BY,
                      BLOCK_PARTS, PART_SIZE)


@lru_cache(maxsize=1024)
def _addresses(starts, lists, device):
    table = torch.tensor(starts, dtype=torch.int64).view(len(LISTS), lists)
    return table.to(device, non_blocking=True)


def address_table(tensors, device):
    """(int64 [LISTS, n] on the device, n): where the numbers of the tensors of each list begin, for flat places.

    It is kept as long as the tensors stay where they are.
    """
    lists, starts = max(1, *map(len, tensors)), []
    for of in tensors:
        place = 0
        for t in of:
            starts.append(t.data_ptr() - place * t.element_size())
            place += t.numel() if t.is_floating_point() else 0  # counters have no places
        starts += [0] * (lists - len(of))
    return _addresses(tuple(starts), lists, device), lists


def parameter_arguments(parts, matrices, lists, device):
    """Arguments of finish_statistics for LISTS of tensors."""
    for name, of in zip(LISTS, lists):
        if len({t.dtype for t in of}) > 1 or not all(t.is_contiguous() for t in of):
            raise ValueError(f"field_norm_statistics: {name} must be contiguous, of one dtype")
    addresses, width = address_table(lists, device)
    weights, biases, _, running, counters = (of[0] if of else None for of in lists)
    return dict(parts_ptr=parts.contiguous(), matrices_ptr=matrices.contiguous(), addresses_ptr=addresses,
                weight_ptr=weights, bias_ptr=biases, running_ptr=running, counter_ptr=counters, num_parts=len(parts),
                lists=width, counters=len(lists[-1]))
