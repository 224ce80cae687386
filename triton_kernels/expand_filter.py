"""expand_filter in Triton: tiles of the basis are made from the irrep blocks where they are used, never stored.

Programs walk over the tiles of all pairs, whose sizes only the device knows, so that the host need not wait for it.
"""
import math

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..layout.plan import PAIR
from ..reference.expand_filter import memory_format
from .numbers import to_nearest

WIDTH = tl.constexpr(len(PAIR))
WEIGHTS, PATHS, OUT_FIELDS, IN_FIELDS, OUT_SIZE, IN_SIZE, OUT_CHANNELS, IN_CHANNELS, OUT_BASIS, IN_BASIS, BLOCKS = (
    tl.constexpr(PAIR.index(name)) for name in (
        "weights_start", "paths", "out_fields", "in_fields", "out_size", "in_size", "out_channels_start",
        "in_channels_start", "out_basis_start", "in_basis_start", "blocks_start"))
SIZES = ("num_pairs", "taps", "weights", "stride_out", "stride_in", "stride_tap")  # one kernel for all layers


@triton.jit
def change_of_basis(values_ptr, start, element, size, slot, slot_size, at, exists):
    """(at, whether that component exists, Q[element, slot + at]). Without Q, the only one is `element` itself."""
    split = start < 0
    at = tl.where(split, element - slot, at)
    exists = exists & (at >= 0) & (at < slot_size)
    in_table = exists & (at < tl.where(split, 0, slot_size))
    q = tl.load(values_ptr + start + element * size + slot + at, mask=in_table, other=0.0)
    return at, exists, tl.where(split, exists.to(q.dtype), q)


@triton.jit
def basis_tile(index_ptr, values_ptr, row, taps, path, path_exists, i, j, s, exists):
    """(Q_out B_path[s] Q_in^-1)[i, j] for path [P, 1] and elements i, j, s [1, E]: [P, E]."""
    out_size, in_size = tl.load(row + OUT_SIZE), tl.load(row + IN_SIZE)
    out_basis, in_basis = tl.load(row + OUT_BASIS), tl.load(row + IN_BASIS)
    block = index_ptr + tl.load(row + BLOCKS) + path * 5
    out_slot = tl.load(block, mask=path_exists, other=0)
    out_slot_size = tl.load(block + 1, mask=path_exists, other=0)
    in_slot = tl.load(block + 2, mask=path_exists, other=0)
    in_slot_size = tl.load(block + 3, mask=path_exists, other=0)
    start = tl.load(block + 4, mask=path_exists, other=0)
    out_steps = tl.where(out_basis < 0, 1, tl.max(out_slot_size))
    in_steps = tl.where(in_basis < 0, 1, tl.max(in_slot_size))
    all_exist = path_exists & exists
    basis = tl.zeros(all_exist.shape, values_ptr.dtype.element_ty)
    for a in range(out_steps):
        n, has_n, q_out = change_of_basis(values_ptr, out_basis, i, out_size, out_slot, out_slot_size, a, all_exist)
        for b in range(in_steps):
            m, has_m, q_in = change_of_basis(values_ptr, in_basis, j, in_size, in_slot, in_slot_size, b, all_exist)
            element = tl.load(values_ptr + start + (n * in_slot_size + m) * taps + s, mask=has_n & has_m, other=0.0)
            basis += q_out * q_in * element
    return basis


@triton.jit
def find_tile(tiles, tile):
    """The pair that has it, and which one of that pair's it is. tiles: how many each pair has."""
    before = tl.cumsum(tiles, 0) <= tile
    return tl.sum(before.to(tl.int32)), tile - tl.sum(tl.where(before, tiles, 0))


@triton.jit
def element_of(element, out_size, in_size, taps, in_is_nearer, tap_is_nearer):
    """(i, j, s) of an element of a block, in the order of the filter's memory."""
    near = tl.where(in_is_nearer, in_size, out_size)
    fastest = tl.where(tap_is_nearer, taps, near)
    slower = tl.where(tap_is_nearer, near, taps)
    first, second, third = element % fastest, element // fastest % slower, element // fastest // slower
    s, near_at = tl.where(tap_is_nearer, first, second), tl.where(tap_is_nearer, second, first)
    return tl.where(in_is_nearer, third, near_at), tl.where(in_is_nearer, near_at, third), s


@triton.jit
def filter_offset(index_ptr, row, field, field_exists, i, j, s, stride_out, stride_in, stride_tap):
    """Of elements i, j, s [1, E] of the blocks of pairs of fields [F, 1]: [F, E]."""
    in_fields = tl.load(row + IN_FIELDS)
    out_channel = tl.load(index_ptr + tl.load(row + OUT_CHANNELS) + field // in_fields, mask=field_exists, other=0) + i
    in_channel = tl.load(index_ptr + tl.load(row + IN_CHANNELS) + field % in_fields, mask=field_exists, other=0) + j
    return out_channel.to(tl.int64) * stride_out + in_channel.to(tl.int64) * stride_in + s * stride_tap


@triton.jit(do_not_specialize=SIZES)
def expand_filter_kernel(pairs_ptr, index_ptr, values_ptr, weights_ptr, filter_ptr, num_pairs, taps,
                         stride_out, stride_in, stride_tap,
                         BLOCK_PAIRS: tl.constexpr, BLOCK_FIELDS: tl.constexpr, BLOCK_ELEMENTS: tl.constexpr,
                         BLOCK_PATHS: tl.constexpr):
    in_is_nearer = stride_in <= stride_out
    tap_is_nearer = stride_tap < tl.minimum(stride_in, stride_out)
    tile = tl.program_id(0)  # of those of the pairs from `first_pair` on
    for first_pair in range(0, num_pairs, BLOCK_PAIRS):
        some = first_pair + tl.arange(0, BLOCK_PAIRS)
        rows, exist = pairs_ptr + some * WIDTH, some < num_pairs
        fields = tl.load(rows + OUT_FIELDS, mask=exist, other=0) * tl.load(rows + IN_FIELDS, mask=exist, other=0)
        elements = tl.load(rows + OUT_SIZE, mask=exist, other=0) * tl.load(rows + IN_SIZE, mask=exist, other=0) * taps
        tiles = tl.cdiv(fields, BLOCK_FIELDS) * tl.cdiv(elements, BLOCK_ELEMENTS)
        total = tl.sum(tiles)
        while tile < total:
            pair, here = find_tile(tiles, tile)
            row = pairs_ptr + (first_pair + pair) * WIDTH
            paths, out_size, in_size = tl.load(row + PATHS), tl.load(row + OUT_SIZE), tl.load(row + IN_SIZE)
            element_tiles = tl.cdiv(out_size * in_size * taps, BLOCK_ELEMENTS)
            field = here // element_tiles * BLOCK_FIELDS + tl.arange(0, BLOCK_FIELDS)[:, None]
            field_exists = field < tl.load(row + OUT_FIELDS) * tl.load(row + IN_FIELDS)
            element = here % element_tiles * BLOCK_ELEMENTS + tl.arange(0, BLOCK_ELEMENTS)[None, :]
            exists = element < out_size * in_size * taps
            i, j, s = element_of(element, out_size, in_size, taps, in_is_nearer, tap_is_nearer)
            weights = weights_ptr + tl.load(row + WEIGHTS) + field * paths
            acc = tl.zeros((BLOCK_FIELDS, BLOCK_ELEMENTS), values_ptr.dtype.element_ty)
            for first_path in range(0, paths, BLOCK_PATHS):
                path = first_path + tl.arange(0, BLOCK_PATHS)
                has = path < paths
                w = tl.load(weights + path[None, :], mask=field_exists & has[None, :], other=0.0)
                basis = basis_tile(index_ptr, values_ptr, row, taps, path[:, None], has[:, None], i, j, s, exists)
                acc = tl.dot(w, basis, acc, input_precision="ieee", out_dtype=acc.dtype)
            offset = filter_offset(index_ptr, row, field, field_exists, i, j, s, stride_out, stride_in, stride_tap)
            tl.store(filter_ptr + offset, to_nearest(acc, filter_ptr.dtype.element_ty), mask=field_exists & exists)
            tile += tl.num_programs(0)
        tile -= total


@triton.jit(do_not_specialize=SIZES)
def expand_filter_bwd_kernel(pairs_ptr, index_ptr, values_ptr, partial_ptr, grad_filter_ptr, num_pairs, taps, weights,
                             stride_out, stride_in, stride_tap,
                             BLOCK_PAIRS: tl.constexpr, BLOCK_FIELDS: tl.constexpr, BLOCK_ELEMENTS: tl.constexpr,
                             BLOCK_PATHS: tl.constexpr):
    """partial [splits, weights]: program (., split) sums every `splits`-th tile of elements."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    in_is_nearer = stride_in <= stride_out
    tap_is_nearer = stride_tap < tl.minimum(stride_in, stride_out)
    tile = tl.program_id(0)
    for first_pair in range(0, num_pairs, BLOCK_PAIRS):
        some = first_pair + tl.arange(0, BLOCK_PAIRS)
        rows, exist = pairs_ptr + some * WIDTH, some < num_pairs
        fields = tl.load(rows + OUT_FIELDS, mask=exist, other=0) * tl.load(rows + IN_FIELDS, mask=exist, other=0)
        tiles = tl.cdiv(fields, BLOCK_FIELDS) * tl.cdiv(tl.load(rows + PATHS, mask=exist, other=0), BLOCK_PATHS)
        total = tl.sum(tiles)
        while tile < total:
            pair, here = find_tile(tiles, tile)
            row = pairs_ptr + (first_pair + pair) * WIDTH
            paths, out_size, in_size = tl.load(row + PATHS), tl.load(row + OUT_SIZE), tl.load(row + IN_SIZE)
            path_tiles = tl.cdiv(paths, BLOCK_PATHS)
            field = here // path_tiles * BLOCK_FIELDS + tl.arange(0, BLOCK_FIELDS)[:, None]
            field_exists = field < tl.load(row + OUT_FIELDS) * tl.load(row + IN_FIELDS)
            path = here % path_tiles * BLOCK_PATHS + tl.arange(0, BLOCK_PATHS)
            has = path < paths
            elements = out_size * in_size * taps
            acc = tl.zeros((BLOCK_FIELDS, BLOCK_PATHS), values_ptr.dtype.element_ty)
            for first in range(split * BLOCK_ELEMENTS, elements, splits * BLOCK_ELEMENTS):
                element = first + tl.arange(0, BLOCK_ELEMENTS)[None, :]
                exists = element < elements
                i, j, s = element_of(element, out_size, in_size, taps, in_is_nearer, tap_is_nearer)
                offset = filter_offset(index_ptr, row, field, field_exists, i, j, s, stride_out, stride_in, stride_tap)
                grad = tl.load(grad_filter_ptr + offset, mask=field_exists & exists, other=0.0).to(acc.dtype)
                basis = basis_tile(index_ptr, values_ptr, row, taps, path[:, None], has[:, None], i, j, s, exists)
                acc = tl.dot(grad, tl.trans(basis), acc, input_precision="ieee", out_dtype=acc.dtype)
            to = partial_ptr + split.to(tl.int64) * weights + tl.load(row + WEIGHTS) + field * paths + path[None, :]
            tl.store(to, acc, mask=field_exists & has[None, :])
            tile += tl.num_programs(0)
        tile -= total


CONFIGS = (  # without maxnreg, ptxas spills to fit one more block into a multiprocessor
    {"BLOCK_PAIRS": 64, "BLOCK_FIELDS": 16, "BLOCK_ELEMENTS": 32, "BLOCK_PATHS": 16, "num_warps": 4, "maxnreg": 255},
    {"BLOCK_PAIRS": 64, "BLOCK_FIELDS": 64, "BLOCK_ELEMENTS": 64, "BLOCK_PATHS": 16, "num_warps": 8, "maxnreg": 255},
)
IN_INTERPRETER = {"BLOCK_PAIRS": 64, "BLOCK_FIELDS": 16, "BLOCK_ELEMENTS": 512, "BLOCK_PATHS": 64}  # large: fewer calls
MANY_WEIGHTS = 1 << 15  # of an average pair: enough fields for the larger tiles
PROGRAMS, MAX_SPLITS = 1024, 64


def config(weights, num_pairs):
    return IN_INTERPRETER if TRITON_INTERPRET else CONFIGS[weights >= MANY_WEIGHTS * num_pairs]


def by_channel(filter, transposed):
    """A filter of any memory format as [out_channels, in_channels, taps]."""
    filter = filter.reshape(*filter.shape[:2], math.prod(filter.shape[2:]))
    return filter.transpose(0, 1) if transposed else filter


def expand_filter(weights, pairs, index, values, size, dtype, channels_last, transposed):
    out_channels, in_channels, *kernel = size
    filter = torch.empty([in_channels, out_channels, *kernel] if transposed else size, dtype=dtype,
                         device=weights.device, memory_format=memory_format(len(kernel), channels_last))
    if filter.numel():
        c = config(weights.numel(), len(pairs))
        programs = triton.cdiv(filter.numel(), c["BLOCK_FIELDS"] * c["BLOCK_ELEMENTS"]) + len(pairs)
        flat = by_channel(filter, transposed)
        with torch.cuda.device_of(weights):
            expand_filter_kernel[(min(programs, PROGRAMS),)](
                pairs, index, values, weights, flat, len(pairs), flat.shape[2], *flat.stride(), **c)
    return filter


def expand_filter_bwd(grad_filter, pairs, index, values, weights, transposed):
    if weights == 0:
        return values.new_empty(0)
    c = config(weights, len(pairs))
    tiles = triton.cdiv(weights, c["BLOCK_FIELDS"] * c["BLOCK_PATHS"]) + len(pairs)
    # Few weights of a large filter: several programs share each tile.
    splits = max(1, min(MAX_SPLITS, PROGRAMS // tiles, triton.cdiv(grad_filter.numel(), c["BLOCK_ELEMENTS"] * tiles)))
    partial = values.new_empty(splits, weights)
    flat = by_channel(grad_filter, transposed)
    with torch.cuda.device_of(values):
        expand_filter_bwd_kernel[(min(tiles, PROGRAMS), splits)](
            pairs, index, values, partial, flat, len(pairs), flat.shape[2], weights, *flat.stride(), **c)
    return partial[0] if splits == 1 else partial.sum(0)


def ahead_of_time():
    """What a GPU may ask for: (kernel, {argument: type}, configuration)."""
    integers = dict.fromkeys(SIZES, "i32")
    for c in CONFIGS:
        for dtype, filter_dtype in (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp64", "fp64")):
            tables = {"pairs_ptr": "*i32", "index_ptr": "*i32", "values_ptr": "*" + dtype}
            yield (expand_filter_kernel,
                   {**tables, "weights_ptr": "*" + dtype, "filter_ptr": "*" + filter_dtype, **integers}, c)
            yield (expand_filter_bwd_kernel,
                   {**tables, "partial_ptr": "*" + dtype, "grad_filter_ptr": "*" + filter_dtype, **integers}, c)
