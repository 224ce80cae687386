"""steerable_conv in two passes: a kernel writes all of z to memory, torch's matrix products mix it.

Tensors are treated as images with their channels last. Forward, and likewise for the gradient of the input on the
adjoint's tables, for one group of the convolution after the other:

    x^ = A x          change_basis_kernel, to a grid that has the padding (and zeros between pixels, if `up`)
    z                 first_pass_kernel: harmonics of x^, and their Clebsch-Gordan sums
    y^ = W z          torch.bmm for all irreps of one shape together; W by gather_kernel
    y = A' y^ + bias  change_basis_kernel

and the gradient of the weights from the same z: z^T g^, where g^ = A'^T (companion). What z takes is bounded: the
pixels are treated in slices. Matrix products are torch's, in TF32 where torch.backends allows it.
"""
from math import prod

import torch
import triton
import triton.language as tl

from ..backends import TRITON_INTERPRET
from ..formats import LOW_PRECISION, like
from ..layout import Geometry
from ..layout.conv_tables import three_axes
from ..layout.two_pass import ABSENT, FIELD, INSTANCE, PLACE, TEMPLATE, TERM, grid_of, pixels_of_slice, structure
from .expand_filter import to_nearest

FIELD_WIDTH, PLACE_WIDTH, INSTANCE_WIDTH, TEMPLATE_WIDTH, TERM_WIDTH = (
    tl.constexpr(len(record)) for record in (FIELD, PLACE, INSTANCE, TEMPLATE, TERM))
MISSING = tl.constexpr(ABSENT)
OF_CHANGE = ("fields_start", "basis_start", "fields", "size", "first", "pixels", "grid_outer", "grid_middle",
             "grid_inner", "outer", "middle", "inner", "low_outer", "low_middle", "low_inner", "insert_outer",
             "insert_middle", "insert_inner", "channels", "channel")
OF_FIRST_PASS = ("coefficients_start", "instances_start", "first", "pixels", "outer", "middle", "inner", "image_step",
                 "outer_step", "middle_step", "inner_step", "outer_tap", "middle_tap", "inner_tap")
OF_GATHER = ("templates_start", "group")


@triton.jit(do_not_specialize=OF_CHANGE)
def change_basis_kernel(fields_ptr, hat_ptr, bias_ptr, index_ptr, values_ptr, fields_start, basis_start, fields, size,
                        first, pixels, grid_outer, grid_middle, grid_inner, outer, middle, inner, low_outer, low_middle,
                        low_inner, insert_outer, insert_middle, insert_inner, channels, channel,
                        TO_IRREPS: tl.constexpr, TRANSPOSED: tl.constexpr, ADDS: tl.constexpr,
                        HAS_BIAS: tl.constexpr, HAS_BASIS: tl.constexpr,
                        PRECISION: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_FIELDS: tl.constexpr,
                        BLOCK_SIZE: tl.constexpr):
    """Fields of images [., outer, middle, inner, channels] to x^, or y^ to the fields, by a matrix or its transpose.

    Pixels first ... first + pixels - 1 of a grid; pixel p of the grid is (p - low) / insert of the image, or none.
    """
    ROWS: tl.constexpr = BLOCK_PIXELS * BLOCK_FIELDS
    row = tl.arange(0, ROWS)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + row // BLOCK_FIELDS
    field = tl.program_id(1) * BLOCK_FIELDS + row % BLOCK_FIELDS
    exists = (pixel < pixels) & (field < fields)
    at = first + pixel
    i, m, o = at % grid_inner, at // grid_inner % grid_middle, at // grid_inner // grid_middle % grid_outer
    image = at // grid_inner // grid_middle // grid_outer
    i, m, o = i - low_inner, m - low_middle, o - low_outer
    inside = exists & (i >= 0) & (m >= 0) & (o >= 0)
    inside = inside & (i % insert_inner == 0) & (m % insert_middle == 0) & (o % insert_outer == 0)
    i, m, o = i // insert_inner, m // insert_middle, o // insert_outer
    inside = inside & (i < inner) & (m < middle) & (o < outer)
    begin = (((image * outer + o) * middle + m) * inner + i) * channels + channel
    component = tl.arange(0, BLOCK_SIZE)[None, :]
    exists, inside = exists[:, None] & (component < size), inside[:, None] & (component < size)
    record = index_ptr + fields_start + (field[:, None] * size + component) * FIELD_WIDTH
    of_channel = tl.load(record, mask=exists, other=0)
    before = tl.load(record + 1, mask=exists, other=0)
    step, place = tl.load(record + 2, mask=exists, other=0), tl.load(record + 3, mask=exists, other=0)
    of_fields = fields_ptr + begin[:, None] + of_channel
    of_hat = hat_ptr + before.to(tl.int64) * pixels + pixel[:, None] * step + place
    in_hat = exists & (before != MISSING)
    if TO_IRREPS:
        x = tl.load(of_fields, mask=inside, other=0.0)
    else:
        x = tl.load(of_hat, mask=in_hat, other=0.0)
    x = x.to(values_ptr.dtype.element_ty)
    if HAS_BASIS:
        j = tl.arange(0, BLOCK_SIZE)[:, None]
        element = j * size + component if TRANSPOSED else component * size + j
        basis = tl.load(values_ptr + basis_start + element, mask=(component < size) & (j < size), other=0.0)
        x = tl.dot(x, basis, input_precision=PRECISION, out_dtype=values_ptr.dtype.element_ty)
    if TO_IRREPS:
        tl.store(of_hat, to_nearest(x, hat_ptr.dtype.element_ty), mask=in_hat)
    else:
        if HAS_BIAS:
            x += tl.load(bias_ptr + channel + of_channel, mask=exists, other=0.0).to(x.dtype)
        if ADDS:
            x += tl.load(of_fields, mask=inside, other=0.0).to(x.dtype)
        tl.store(of_fields, to_nearest(x, fields_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sums_and_differences(a, b):
    """(a + b, a - b) of two tuples."""
    found = ()
    for n in tl.static_range(len(a)):
        found = found + (a[n] + b[n],)
    for n in tl.static_range(len(a)):
        found = found + (a[n] - b[n],)
    return found


@triton.jit
def fold(row, tap, mask, dtype: tl.constexpr, I: tl.constexpr, MIRRORED: tl.constexpr):
    """(sum, difference) of two taps along the inner axis; of one that is its own mirror image, itself."""
    a = tl.load(row + I * tap, mask=mask, other=0.0).to(dtype)
    if I == MIRRORED:
        return a, a
    else:
        b = tl.load(row + MIRRORED * tap, mask=mask, other=0.0).to(dtype)
        return a + b, a - b


@triton.jit(do_not_specialize=OF_FIRST_PASS)
def first_pass_kernel(hat_ptr, z_ptr, index_ptr, values_ptr, coefficients_start, instances_start, first, pixels, outer,
                      middle, inner, image_step, outer_step, middle_step, inner_step, outer_tap, middle_tap, inner_tap,
                      KERNEL: tl.constexpr, FOLDED: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
                      COMPONENTS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
                      BLOCK_COPIES: tl.constexpr):
    """z of some copies of an irrep at the pixels first ... first + pixels - 1 of the target [., outer, middle, inner].

    A pixel lies at multiples of the steps in x^, and the taps of its window at multiples of tap * ALIGNED from there.
    """
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    instance = index_ptr + instances_start + tl.program_id(2) * INSTANCE_WIDTH
    column, copies = tl.multiple_of(tl.load(instance), ALIGNED), tl.multiple_of(tl.load(instance + 1), ALIGNED)
    copy = (tl.program_id(1) * BLOCK_COPIES + tl.arange(0, BLOCK_COPIES))[None, :]
    pixel = (tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS))[:, None]
    mask = (pixel < pixels) & (copy < copies)
    at = first + pixel
    slab = at // inner // middle
    begin = slab // outer * image_step + slab % outer * outer_step
    begin += at // inner % middle * middle_step + at % inner * inner_step
    window = hat_ptr + tl.multiple_of(begin, [1, ALIGNED]) + (column + copy)
    outer_tap, middle_tap, inner_tap = outer_tap * ALIGNED, middle_tap * ALIGNED, inner_tap * ALIGNED

    sums = ()
    for _ in tl.static_range(len(SUMS)):
        sums = sums + (tl.zeros((BLOCK_PIXELS, BLOCK_COPIES), dtype),)
    half_middle: tl.constexpr = (KERNEL[1] + 1) // 2
    half_inner: tl.constexpr = (KERNEL[2] + 1) // 2
    last: tl.constexpr = KERNEL[2] - 1
    for position in range((KERNEL[0] + 1) // 2 * half_middle):
        o, m = position // half_middle, position % half_middle
        here, mirrored = window + o * outer_tap, window + (KERNEL[0] - 1 - o) * outer_tap
        near, far = m * middle_tap, (KERNEL[1] - 1 - m) * middle_tap
        for i in tl.static_range(half_inner):
            coefficients = ()
            for p in tl.static_range(len(FOLDED)):
                at_tap = (position * half_inner + i) * len(FOLDED) + p
                coefficients = coefficients + (tl.load(values_ptr + coefficients_start + at_tap),)
            more = ()
            for b in tl.static_range(COMPONENTS):
                upper, lower = here + b * copies, mirrored + b * copies
                folded = fold(upper + near, inner_tap, mask, dtype, i, last - i)  # (even, odd)
                if KERNEL[1] > 1:
                    folded = sums_and_differences(folded, fold(upper + far, inner_tap, mask, dtype, i, last - i))
                if KERNEL[0] > 1:
                    other = fold(lower + near, inner_tap, mask, dtype, i, last - i)
                    if KERNEL[1] > 1:
                        other = sums_and_differences(other, fold(lower + far, inner_tap, mask, dtype, i, last - i))
                    folded = sums_and_differences(folded, other)
                for n in tl.static_range(len(SUMS)):
                    if SUMS[n][0] == b:
                        if i != last - i or FOLDED[SUMS[n][1]] % 2 == 0:
                            more = more + (sums[n] + coefficients[SUMS[n][1]] * folded[FOLDED[SUMS[n][1]]],)
                        else:
                            more = more + (sums[n],)
            sums = more

    rows = index_ptr + tl.load(instance + 2)
    for r in tl.static_range(len(ROWS)):
        z = sums[ROWS[r][0][0]] * ROWS[r][0][1]
        for t in tl.static_range(1, len(ROWS[r])):
            z += sums[ROWS[r][t][0]] * ROWS[r][t][1]
        before = tl.load(rows + r * PLACE_WIDTH).to(tl.int64)
        step, place = tl.load(rows + r * PLACE_WIDTH + 1), tl.load(rows + r * PLACE_WIDTH + 2)
        before, step = tl.multiple_of(before, ALIGNED), tl.multiple_of(step, ALIGNED)
        to = z_ptr + before * pixels + pixel * step + (tl.multiple_of(place, ALIGNED) + copy)
        tl.store(to, to_nearest(z, z_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=OF_GATHER)
def gather_kernel(from_ptr, to_ptr, index_ptr, values_ptr, templates_start, group, BLOCK: tl.constexpr):
    """See layout.two_pass.Gather. One template for each program, and some of its pairs of fields."""
    template = index_ptr + templates_start + tl.program_id(0) * TEMPLATE_WIDTH
    sources, targets = tl.load(template + 4), tl.load(template + 5)
    terms, terms_start, scales_start = tl.load(template + 6), tl.load(template + 7), tl.load(template + 8)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists, source, target = pair < sources * targets, pair // targets, pair % targets
    to = tl.load(template) + source * tl.load(template + 1) + target * tl.load(template + 2)
    sum = tl.zeros((BLOCK,), values_ptr.dtype.element_ty)
    for t in range(terms):
        term = index_ptr + terms_start + t * TERM_WIDTH
        at = tl.load(term) + source * tl.load(term + 1) + target * tl.load(term + 2) + group * tl.load(term + 3)
        scale = tl.load(values_ptr + scales_start + t)
        sum += scale * tl.load(from_ptr + at, mask=exists, other=0.0).to(sum.dtype)
    tl.store(to_ptr + to + group * tl.load(template + 3), to_nearest(sum, to_ptr.dtype.element_ty), mask=exists)


OPTIONS = {"num_warps": 4, "maxnreg": 255, "enable_fp_fusion": True}  # without a limit, ptxas spills to save registers
THREADS, PROGRAM_ELEMENTS = 128, 4096  # of a program; the latter in the interpreter, where programs are slow
REGISTERS = 64                          # of a thread, for its sums


def config_of_part(part):
    """Tiles of first_pass_kernel, so that a thread's sums fit into its registers."""
    elements = 4 if 4 * len(part.sums) <= REGISTERS else 2 if 2 * len(part.sums) <= REGISTERS else 1
    copies = min(64, triton.next_power_of_2(part.copies))
    total = PROGRAM_ELEMENTS if TRITON_INTERPRET else THREADS * elements
    return {"ALIGNED": part.aligned, "BLOCK_PIXELS": max(1, total // copies), "BLOCK_COPIES": copies,
            **OPTIONS}


def compiled_for(structure, part):
    """What first_pass_kernel takes from the tables as constants."""
    outer = 4 if structure.kernel[1] > 1 else 2
    folded = tuple(o * outer + m * 2 + i for o, m, i in structure.parities)  # places in sums_and_differences of fold
    return {"KERNEL": structure.kernel, "FOLDED": folded, "SUMS": part.sums, "ROWS": part.rows,
            "COMPONENTS": part.components}


def config_of_change(change, low_precision):
    """Tiles of change_basis_kernel. Numbers of low precision are exact in TF32."""
    has_basis = change.basis_start >= 0
    size = max(16, triton.next_power_of_2(change.size)) if has_basis else 1
    fields = min(32 if has_basis else 64, triton.next_power_of_2(change.fields))
    total = PROGRAM_ELEMENTS if TRITON_INTERPRET else 2048 if has_basis else 512
    rows = max(16 if has_basis else 1, total // size)
    return {"HAS_BASIS": has_basis, "PRECISION": "tf32" if low_precision else "ieee", "BLOCK_SIZE": size,
            "BLOCK_PIXELS": max(1, rows // fields), "BLOCK_FIELDS": min(fields, rows), **OPTIONS,
            "num_warps": 8 if size == 64 else 4}


class _Call:
    """One call: the source, and what of it does not depend on the group of the convolution."""

    def __init__(self, source, index, values, key, kernel, stride, padding, dilation, groups, up, target_size):
        self.structure, self.index, self.values, self.groups = structure(key), index, values, groups
        self.source, self.batch = source.movedim(1, -1).contiguous(), source.shape[0]
        self.target_channels = target_size[0]
        geometry = Geometry(tuple(kernel), stride, padding, dilation, groups, up, source.shape[1], target_size[0],
                            source.shape[2:], target_size[1:])
        self.grid = three_axes(grid_of(geometry))
        self.source_size, self.target_size = three_axes(geometry.source_size), three_axes(geometry.target_size)
        stride, self.dilation = three_axes(stride), three_axes(dilation)
        low = [d * (k - 1) - p if up else p for d, k, p in zip(dilation, kernel, padding)]
        self.low = low if len(low) == 3 else (low[0], 0, low[1])
        self.insert, self.step = (stride, (1, 1, 1)) if up else ((1, 1, 1), stride)
        self.pixels = self.batch * prod(self.target_size)
        self.slice = pixels_of_slice(self.pixels, self.structure.z_size, source.element_size())

    def new(self, *size):
        return self.source.new_empty(size)

    def change_basis(self, changes, images, hat, size, grid, low, insert, first, pixels, group, to_irreps, transposed,
                     bias=None):
        """Between images [batch, *size, channels of all groups] and the hat of one group."""
        channels = images.shape[-1]
        for change in changes:
            c = config_of_change(change, images.dtype in LOW_PRECISION)
            programs = triton.cdiv(pixels, c["BLOCK_PIXELS"]), triton.cdiv(change.fields, c["BLOCK_FIELDS"])
            change_basis_kernel[programs](
                images, hat, hat if bias is None else bias, self.index, self.values, change.fields_start,
                change.basis_start, change.fields, change.size, first, pixels, *grid, *size, *low, *insert, channels,
                group * (channels // self.groups), TO_IRREPS=to_irreps, TRANSPOSED=transposed,
                ADDS=change.adds and not to_irreps, HAS_BIAS=bias is not None and not change.adds, **c)

    def source_hat(self, group):
        """x^ of one group: [batch, *grid, channels]."""
        pixels = self.batch * prod(self.grid)
        hat = self.new(pixels * self.structure.channels)
        self.change_basis(self.structure.sources, self.source, hat, self.source_size, self.grid, self.low, self.insert,
                          0, pixels, group, True, False)
        return hat

    def target_hat(self, images, hat, first, pixels, group, to_irreps, bias=None):
        """Between y^ of one slice and group and images [batch, *target_size, channels]."""
        self.change_basis(self.structure.targets, images, hat, self.target_size, self.target_size, (0, 0, 0), (1, 1, 1),
                          first, pixels, group, to_irreps, to_irreps, bias)

    def first_pass(self, hat, z, first, pixels):
        s = self.structure
        _, middle, inner = self.grid
        tap = middle * inner * s.channels, inner * s.channels, s.channels
        for part in s.parts:
            c = config_of_part(part)
            programs = (triton.cdiv(pixels, c["BLOCK_PIXELS"]), triton.cdiv(part.copies, c["BLOCK_COPIES"]),
                        part.instances)
            first_pass_kernel[programs](
                hat, z, self.index, self.values, s.coefficients_start, part.instances_start, first, pixels,
                *self.target_size, prod(self.grid) * s.channels, *(t * n for t, n in zip(tap, self.step)),
                *(t * d // part.aligned for t, d in zip(tap, self.dilation)), **compiled_for(s, part), **c)

    def gather(self, gather, from_, to, group):
        block = 1024 if TRITON_INTERPRET else 256
        programs = gather.templates, triton.cdiv(gather.pairs, block)
        if prod(programs):
            gather_kernel[programs](from_, to, self.index, self.values, gather.start, group, BLOCK=block, **OPTIONS)

    def packed(self, weights, group):
        """All W of one group."""
        packed = self.source.new_zeros(self.structure.packed)
        self.gather(self.structure.pack, weights, packed, group)
        return packed

    def run(self, weights, bias=None, companion=None, wants_target=True):
        """(target as images or None, gradient of the weights or None)."""
        s = self.structure
        target = self.new(self.batch, *self.target_size, self.target_channels) if wants_target else None
        grad_weights = None if companion is None else torch.empty_like(weights)
        images = None if companion is None else companion.movedim(1, -1).contiguous()
        if self.pixels == 0 and grad_weights is not None:
            grad_weights.zero_()
        z, y = self.new(self.slice * s.z_size), self.new(self.slice * s.y_size)
        with torch.cuda.device_of(self.source):
            for group in range(self.groups if self.pixels else 0):
                hat, packed = self.source_hat(group), self.packed(weights, group) if wants_target else None
                grad_packed = None if companion is None else self.source.new_zeros(s.packed, dtype=self.values.dtype)
                for first in range(0, self.pixels, self.slice):
                    here = first, min(self.slice, self.pixels - first), group
                    self.first_pass(hat, z, *here[:2])
                    if companion is not None:
                        self.add_gradient(grad_packed, images, z, y, here)
                    if wants_target:
                        self.mix(target, packed, bias, z, y, here)
                if companion is not None:
                    self.gather(s.unpack, grad_packed, grad_weights, group)
        return target, grad_weights

    def mix(self, target, packed, bias, z, y, here):
        """The target of a slice, from its z: (first pixel, pixels, group)."""
        for z_of, y_of, w_of in self._products(z, y, packed, here[1]):
            torch.bmm(z_of, w_of, out=y_of)
        self.target_hat(target, y, *here, False, bias)

    def add_gradient(self, grad_packed, companion, z, y, here):
        """Adds what a slice contributes to the gradient of all W."""
        self.target_hat(companion, y, *here, True)
        for z_of, y_of, w_of in self._products(z, y, grad_packed, here[1]):
            w_of += torch.bmm(z_of.transpose(1, 2), y_of, out=self.new(*w_of.shape))  # without autocast, for the `out`

    def _products(self, z, y, packed, pixels):
        """(z, y^, W) of each shape of matrix products: [count, pixels * components, depth], ..."""
        for p in self.structure.products:
            rows = pixels * p.components
            yield (_part_of(z, pixels * p.z_start, p.count, rows, p.depth),
                   _part_of(y, pixels * p.y_start, p.count, rows, p.height),
                   _part_of(packed, p.packed_start, p.count, p.depth, p.height))


def _part_of(flat, start, *shape):
    return flat[start:start + prod(shape)].view(shape)


def _as_tensor(images, target_size, format_of):
    """Images [batch, outer, middle, inner, channels] as [batch, channels, *spatial], in another's memory format."""
    return like(images.view(images.shape[0], *target_size[1:], target_size[0]).movedim(-1, 1), format_of)


def steerable_conv(source, weights, bias, index, values, key, adjoint_index, adjoint_values, adjoint_key, kernel,
                   stride, padding, dilation, groups, up, target_size):
    call = _Call(source, index, values, key, kernel, stride, padding, dilation, groups, up, target_size)
    return _as_tensor(call.run(weights, bias)[0], target_size, source)


def steerable_conv_bwd(source, weights, companion, index, values, key, adjoint_index, adjoint_values, adjoint_key,
                       kernel, stride, padding, dilation, groups, up, target_size, wants_target, wants_weights):
    call = _Call(source, index, values, key, kernel, stride, padding, dilation, groups, up, target_size)
    target, grad_weights = call.run(weights, None, companion if wants_weights else None, wants_target)
    return (_as_tensor(target, target_size, companion) if wants_target else source.new_empty(0),
            grad_weights if wants_weights else weights.new_empty(0))


def ahead_of_time(structures):
    """What a GPU may ask for, of some layout.two_pass.Structures: (kernel, {argument: type}, configuration)."""
    seen = []
    for acc, dtype in (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp64", "fp64")):
        tables = {"index_ptr": "*i32", "values_ptr": "*" + acc}
        for to in (dtype, acc):  # the weights to W; the gradient of all W to that of the weights
            pointers = {"from_ptr": "*" + acc, "to_ptr": "*" + to}
            yield from _new(seen, gather_kernel, {**tables, **pointers, **_integers(OF_GATHER)},
                            {"BLOCK": 256, **OPTIONS})
        for s in structures:
            changes = [(change, True, False) for change in s.sources]
            changes += [(change, to_irreps, to_irreps) for change in s.targets for to_irreps in (True, False)]
            pointers = dict.fromkeys(("fields_ptr", "hat_ptr", "bias_ptr"), "*" + dtype)
            for change, to_irreps, transposed in changes:
                yield from _new(seen, change_basis_kernel, {**tables, **pointers, **_integers(OF_CHANGE)}, {
                    **config_of_change(change, dtype in ("bf16", "fp16")), "TO_IRREPS": to_irreps,
                    "TRANSPOSED": transposed, "ADDS": change.adds and not to_irreps,
                    "HAS_BIAS": not to_irreps and not change.adds})
            pointers = {"hat_ptr": "*" + dtype, "z_ptr": "*" + dtype}
            for part in s.parts:
                yield from _new(seen, first_pass_kernel, {**tables, **pointers, **_integers(OF_FIRST_PASS)},
                                {**config_of_part(part), **compiled_for(s, part)})


def _integers(names):
    return dict.fromkeys(names, "i32")


def _new(seen, *variant):
    if variant not in seen:
        seen.append(variant)
        yield variant
