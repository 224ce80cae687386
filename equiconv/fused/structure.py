"""The tables that specialise the fused kernels for a layer, as the C++ text that they are compiled with.

csrc/cuda/steerable_conv/structure.cuh says what they mean.
"""
from collections import deque, namedtuple
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product, takewhile

import numpy as np

from .irreps import ALIGNMENT, ROUNDING, Unsupported

# Harmonics that are computed together, where z's do not need more of them: what the gradient of the weights tries in
# turn. Of wide layers it needs fewer kernels where the accumulators are spread over more groups, each of other warps.
GROUPS = (4, 2, 1)
MAX_GROUP = 8            # that many accumulators leave registers for the rest
KEPT_COMPONENTS = 2      # of an irrep, up to which the responses of all are kept; sums over them, where it has more
FORWARD_SUMS = 16        # such sums of a group, 4 registers each
GRADIENT_SUMS = 9        # 8 registers each
SIZES = {2: (3, 5, 7, 9), 3: (3, 5)}  # of kernels; a window has 16 columns
MAX_SLICES = 16          # kernels of one direction: each computes the harmonics again
FORWARD_CHANNELS = {2: 256, 4: 128}  # for numbers of that many bytes: their accumulators take half of the registers
GRADIENT_WARPS = 8
GRADIENT_TILES = 24      # accumulators of a warp, 4 registers each
OTHER_REGISTERS = {2: 104, 4: 120}  # of the gradient, than for sums and accumulators; for numbers of that many bytes
LANES_OF_OPERAND = 256   # numbers of 16 x 16
PADDING = {2: 64, 4: 16}  # bytes after the sheets of copies, for numbers of that many bytes

# What a block of the forward kernel computes: warps along the depth and along the height (each of 2 rows of 8 pixels),
# the copies that are staged at a time, and 2 buffers where the next ones travel meanwhile. The first ones are preferred
# where they do not need more kernels.
Tile = namedtuple("Tile", "planes rows copies buffers")
TILES = {2: (Tile(1, 8, 16, 2), Tile(1, 8, 8, 2), Tile(1, 4, 8, 2)),
         3: (Tile(4, 2, 16, 2), Tile(4, 2, 8, 2), Tile(2, 2, 8, 2), Tile(2, 2, 8, 1))}


def check_kernel(kernel):
    """Raises Unsupported for spatial sizes of a filter that the fused kernels cannot have."""
    if len(set(kernel)) != 1:
        raise Unsupported(f"only kernels of equal sizes are implemented, not {tuple(kernel)}")
    sizes = SIZES[len(kernel)]
    if kernel[0] not in sizes:
        raise Unsupported(f"only kernels of sizes {', '.join(map(str, sizes))} are implemented, not {kernel[0]}")


class Harmonics:
    """How the harmonics of an IrrepLayer are computed.

    values      [R, depth, height, width]
    groups      list of ({harmonic: slot}, pairs, first slab, last slab)
    group_of    {(source block, target block): number of the group of each of the layer's tensors}
    slabs       list of (tap plane, phase, whether odd along z, fragments, pairs that are complete then), (first, last)
    fragments   list of (pair, tap row, whether odd along y, whether there are two harmonics, harmonics before it)
    of_fragment list of (harmonics, tap plane, tap row, phase)
    """

    def __init__(self, layer, sums, group=GROUPS[0]):
        """The most that a group may have: sums over the components of an irrep; harmonics, where they need no sums."""
        taps = layer.harmonics.shape[1:]
        self.values, self.stride = layer.harmonics.reshape(-1, *(1,) * (3 - len(taps)), *taps), layer.stride
        self.depth_taps, self.taps = self.values.shape[1:3]
        self.parities = [_parities(h) for h in self.values]
        if None in self.parities:
            raise Unsupported("a harmonic is neither even nor odd")
        self.groups, self.slabs, self.fragments, self.of_fragment = [], [], [], []
        for together in self._groups(layer, sums, group):
            pairs = self._pairs(together)
            first = len(self.slabs)
            for odd in (False, True):
                mine = [i for i, pair in enumerate(pairs) if self.parities[pair[0]][0] == odd]
                if mine:
                    self._add_slabs(pairs, odd, (mine[0], mine[-1] + 1))
            slots = {h: 2 * i + j for i, pair in enumerate(pairs) for j, h in enumerate(pair)}
            self.groups.append((slots, len(pairs), first, len(self.slabs)))
        groups = {h: g for g, (slots, *_) in enumerate(self.groups) for h in slots}
        self.group_of = {blocks: [groups[_harmonics_of(tensor)[0]] for tensor in tensors]
                         for blocks, tensors in layer.tensors.items()}

    @property
    def harmonics_of_fragments(self):
        return sum(len(harmonics) for harmonics, *_ in self.of_fragment)

    def _pairs(self, group):
        """Pairs of harmonics that are odd or even along z and y alike; a few harmonics are left alone."""
        alike = {}
        for h in group:
            alike.setdefault(self.parities[h][:2], []).append(h)
        return [hs[i:i + 2] for _, hs in sorted(alike.items()) for i in range(0, len(hs), 2)]

    def _add_slabs(self, pairs, odd, mine):
        """Of pairs mine[0] .. mine[1], which are alike along z."""
        planes = range(odd, self.depth_taps // 2 + 1)  # an odd one is zero in the plane of the centre
        places = list(product(planes, range(self.stride)))
        for plane, phase in places:
            first = len(self.fragments)
            for i in range(*mine):
                odd_y = self.parities[pairs[i][0]][1]
                for row in range(odd_y, self.taps // 2 + 1):
                    self.fragments.append((i, row, odd_y, len(pairs[i]) == 2, self.harmonics_of_fragments))
                    self.of_fragment.append((pairs[i], plane, row, phase))
            done = mine if (plane, phase) == places[-1] else (0, 0)
            self.slabs.append((plane, phase, odd, (first, len(self.fragments)), done))

    def _groups(self, layer, sums, most):
        """Lists of harmonics. Those of one z go together, and with others of the same parities."""
        joined = {h: frozenset([h]) for h in range(len(self.values))}
        for tensors in layer.tensors.values():
            for tensor in tensors:
                union = frozenset().union(*(joined[h] for h in _harmonics_of(tensor)))
                joined.update(dict.fromkeys(union, union))
        by_parities = {}
        for together in sorted(map(sorted, set(joined.values()))):
            if len(together) > MAX_GROUP:
                raise Unsupported(f"{len(together)} harmonics occur in sums together, at most {MAX_GROUP} can")
            by_parities.setdefault(tuple(sorted(self.parities[h] for h in together)), []).append(together)
        groups = []
        for parts in by_parities.values():
            groups.append([])
            for together in parts:
                if groups[-1] and not _fits(layer, groups[-1] + together, sums, most):
                    groups.append([])
                groups[-1] += together
        return groups


def _fits(layer, group, most_sums, most):
    """Whether the registers suffice for those harmonics together."""
    sums = [0 for _ in layer.source.blocks]
    for (m, n), tensors in layer.tensors.items():
        if layer.source.blocks[m].size > KEPT_COMPONENTS:
            mine = sum(set(_harmonics_of(tensor)) <= set(group) for tensor in tensors)
            sums[m] += mine * layer.target.blocks[n].size
    return max(sums) <= most_sums if any(sums) else len(group) <= most


def _parities(harmonic):
    """For each axis whether it is odd; None where it is neither."""
    found = []
    for axis in range(harmonic.ndim):
        mirrored = np.flip(harmonic, axis)
        if not (harmonic == mirrored).all() and not (harmonic == -mirrored).all():
            return None
        found.append(not (harmonic == mirrored).all())
    return tuple(found)


def _harmonics_of(tensor):
    return np.flatnonzero(np.abs(tensor).sum((0, 1))).tolist()


@dataclass(frozen=True)
class Piece:
    """Copies first .. first + copies of one block of the target."""
    block: int
    first: int
    copies: int

    def cut(self, copies):
        """Its first copies, and the others."""
        return (Piece(self.block, self.first, copies), Piece(self.block, self.first + copies, self.copies - copies))


class Structure:
    """The part of a layer that one kernel computes: all of its source, some pieces of its target.

    steps      list of (number of the piece, z0, z1)
    steps_of   for each source block and group of harmonics (first step, last step)
    z          list of (first term, last term), one for each component
    terms      list of (component, slot, coefficient)
    products   {(source block, piece, z of the layer): (step, 0 or 1: z0 or z1)}
    """

    def __init__(self, layer, harmonics, pieces):
        self.layer, self.harmonics, self.pieces = layer, harmonics, pieces
        self.steps, self.steps_of, self.z, self.terms, self.products, self._places = [], [], [], [], {}, {}
        for m in range(len(layer.source.blocks)):
            self.steps_of.append([])
            for group, (slots, *_) in enumerate(harmonics.groups):
                first = len(self.steps)
                for n, piece in enumerate(pieces):
                    of_piece = harmonics.group_of.get((m, piece.block), [])
                    self._add_steps(m, n, [z for z, g in enumerate(of_piece) if g == group], slots)
                self.steps_of[-1].append((first, len(self.steps)))

    def _add_steps(self, m, n, mine, slots):
        width = 1 if self.is_complex(n) else 2
        for i in range(0, len(mine), width):
            for which, z in enumerate(mine[i:i + width]):
                self.products[m, n, z] = len(self.steps), which
            places = [self._place(m, self.pieces[n].block, z, slots) for z in mine[i:i + width]]
            self.steps.append((n, *places, -1)[:3])

    def _place(self, m, block, z, slots):
        key = (m, block, z)
        if key not in self._places:
            self._places[key] = len(self.z)
            for component in self.layer.tensors[m, block][z]:
                first = len(self.terms)
                self.terms += [(b, slots[h], float(np.float32(component[b, h]))) for b, h in np.argwhere(component)]
                self.z.append((first, len(self.terms)))
        return self._places[key]

    def is_complex(self, n):
        return self.layer.is_complex[self.pieces[n].block]

    def size(self, n):
        return self.layer.target.blocks[self.pieces[n].block].size

    @cached_property
    def channels(self):
        return sum(self.size(n) * piece.copies for n, piece in enumerate(self.pieces))

    # ---- the numbers that structure.cuh, forward.cuh and grad_weight.cuh derive too; the text asserts that they agree

    def steps_of_source(self, m):
        return range(self.steps_of[m][0][0], self.steps_of[m][-1][1])

    @cached_property
    def operand(self):
        """For each step, the place of its first operand among those of 8 copies of its source block."""
        return self._places_of(lambda step: -(-self.pieces[self.steps[step][0]].copies // 16))[0]

    @cached_property
    def operands(self):
        """For each source block the operands of 8 copies."""
        return self._places_of(lambda step: -(-self.pieces[self.steps[step][0]].copies // 16))[1]

    @cached_property
    def operand_base(self):
        """For each source block its first operand; and the number of all."""
        counts = [n * block.copies // 8 for n, block in zip(self.operands, self.layer.source.blocks)]
        return np.concatenate([[0], np.cumsum(counts)]).astype(int)

    @cached_property
    def tile(self):
        """For each step, the place of its first tile of the weights' gradient among those of 16 copies."""
        return self._places_of(self._tiles)[0]

    @cached_property
    def tiles(self):
        """For each source block the tiles of 16 copies."""
        return self._places_of(self._tiles)[1]

    @cached_property
    def tile_base(self):
        counts = [n * -(-block.copies // 16) for n, block in zip(self.tiles, self.layer.source.blocks)]
        return np.concatenate([[0], np.cumsum(counts)]).astype(int)

    @property
    def jobs(self):
        """Blocks of threads among which the gradient kernel divides the source's copies."""
        return sum(-(-block.copies // 16) for block in self.layer.source.blocks)

    @property
    def max_tiles(self):
        return max(sum(map(self._tiles, range(*steps))) for of_groups in self.steps_of for steps in of_groups)

    @property
    def max_sums(self):
        """The most components of z that are kept as sums: those of one source block and group of harmonics."""
        most = 0
        for block, of_groups in zip(self.layer.source.blocks, self.steps_of):
            for steps in of_groups if block.size > KEPT_COMPONENTS else ():
                places = {z: self.size(n) for n, *zs in self.steps[slice(*steps)] for z in zs if z >= 0}
                most = max(most, sum(places.values()))
        return most

    def _tiles(self, step):
        n, _, z1 = self.steps[step]
        return self.pieces[n].copies // 8 * (2 if self.is_complex(n) or z1 >= 0 else 1)

    def _places_of(self, count):
        places, totals = np.zeros(len(self.steps), int), []
        for m in range(len(self.steps_of)):
            total = 0
            for step in self.steps_of_source(m):
                places[step] = total
                total += count(step)
            totals.append(total)
        return places, totals

    @property
    def row_warps(self):
        return max(1, GRADIENT_WARPS // len(self.harmonics.groups))

    @property
    def gradient_threads(self):
        return 32 * self.row_warps * len(self.harmonics.groups)

    @property
    def gradient_registers(self):
        """Of a thread, for accumulators and sums: each quarter of a processor has 512 for its warps, in units of 8."""
        warps = -(-self.gradient_threads // 128)
        return 512 // warps // 8 * 8 - OTHER_REGISTERS[self._bytes]

    def forward_bytes(self, tile):
        """Of shared memory."""
        weights = tile.copies // 8 * max(self.operands) * self._bytes * LANES_OF_OPERAND
        return tile.buffers * (self._staged(tile.planes, 2 * tile.rows, tile.copies) + weights) + self._toeplitz_bytes

    def gradient_bytes(self, buffers):
        gradient = self.channels * self._bytes // 16 * (16 * self.row_warps + 1) * 16
        return buffers * (self._staged(1, 2 * self.row_warps, 16) + gradient) + self._toeplitz_bytes

    @property
    def _bytes(self):
        return self.layer.dtype.itemsize

    @property
    def _toeplitz_bytes(self):
        return self._bytes * LANES_OF_OPERAND // 2 * self.harmonics.harmonics_of_fragments

    def _staged(self, planes, rows, copies):
        """Bytes of the source that a tile of so many planes and rows reads."""
        stride, taps = self.layer.stride, self.harmonics.taps
        lines = (stride * (planes - 1) + self.harmonics.depth_taps) * (stride * (rows - 1) + taps)
        columns = stride * (8 + (taps - 1) // stride)
        sheet = -(-lines * columns * 16 // 128) * 128 + PADDING[self._bytes]
        return max(block.size for block in self.layer.source.blocks) * copies * self._bytes // 16 * sheet + 128

    @cached_property
    def fields(self):
        """Tables for the basis of the fields, or None where the kernel cannot write fields: see store.cuh.

        It can where it has all irreps of all fields, and each irrep of 8 fields in 8 copies that one tile has.
        """
        side, fields, components, shares = self.layer.target, [], [], []
        whole = [Piece(n, 0, block.copies) for n, block in enumerate(side.blocks)]
        if self.pieces != whole or sum(len(f) * f.layout.size for f in side.fields) != side.to_packed.shape[1]:
            return None
        for f in side.fields:
            start, size = f.channels[0], f.layout.size
            if f.channels != tuple(range(start, start + size * len(f), size)):
                return None
            fields.append((size, start, len(f), (len(components), len(components) + size)))
            for column in side.to_packed[:, start:start + size].T:
                first = len(shares)
                for n, block in enumerate(side.blocks):
                    part = column[block.channel:block.channel + block.size * block.copies].reshape(block.size, -1)
                    for component, copy in np.argwhere(np.abs(part) > ROUNDING):
                        if copy % ALIGNMENT:
                            return None
                        value = float(np.float32(part[component, copy]))
                        shares.append((n, int(component), int(copy) // ALIGNMENT, value))
                components.append((first, len(shares)))
        return fields, components, shares

    # ---- text

    def forward_source(self, number, tile, in_fields=False):
        """C++ of the kernel equiconv_forward for a number format of device.cuh; what it writes: irreps or fields."""
        store = "InFields" if in_fields else "Irreps"
        kernel = (f"Forward<Layer, {number}, {tile.planes}, {tile.rows}, {tile.copies}, {tile.buffers}, "
                  f"{store}<Layer, {number}>>")
        return self._source("forward", kernel, self.forward_bytes(tile), "run", in_fields)

    def gradient_source(self, number, buffers):
        """C++ of the kernel equiconv_grad_weight."""
        kernel = f"GradWeight<Layer, {number}, {self.row_warps}, {buffers}>"
        return self._source("grad_weight", kernel, self.gradient_bytes(buffers), "start")

    def _source(self, name, kernel, shared_bytes, function, in_fields=False):
        params = "".join(part.capitalize() for part in name.split("_")) + "Params"
        return (f'#include "{name}.cuh"\nnamespace equiconv {{\n{self._tables(in_fields)}'
                f"using Kernel = {kernel};\n"
                f'static_assert(Kernel::shared_bytes == {shared_bytes}, "structure.py knows the shared memory");\n'
                f'extern "C" __global__ void __launch_bounds__(Kernel::threads, 1) equiconv_{name}(const {params} p) '
                f"{{ Kernel::{function}(p); }}\n}}  // namespace equiconv\n")

    def _tables(self, in_fields):
        harmonics, layer = self.harmonics, self.layer
        source = [(b.size, b.copies, b.channel, b.copies, False) for b in layer.source.blocks]
        target = [(self.size(n), piece.copies, block.channel + piece.first, block.copies, bool(self.is_complex(n)))
                  for n, piece in enumerate(self.pieces) for block in [layer.target.blocks[piece.block]]]
        numbers = {"taps": harmonics.taps, "depth_taps": harmonics.depth_taps, "stride": layer.stride, "up": layer.up}
        fields = ""
        if in_fields:
            numbers["field_channels"] = layer.target.to_packed.shape[1]
            fields = "".join(map(_array, ("Fields fields[]", "Range components[]", "Share shares[]"), self.fields))
        groups = [(pairs, (first, last)) for _, pairs, first, last in harmonics.groups]
        return ("struct Layer {\n  static constexpr int "
                + ", ".join(f"{name} = {value}" for name, value in numbers.items()) + ";\n"
                + _array("Irrep in[]", source) + _array("Irrep out[]", target) + _array("Group groups[]", groups)
                + _array("Slab slabs[]", harmonics.slabs) + _array("Fragment fragments[]", harmonics.fragments)
                + _array(f"Range steps_of[][{len(groups)}]", self.steps_of) + _array("Step steps[]", self.steps)
                + _array("Range z[]", self.z) + _array("Term terms[]", self.terms) + fields + "};\n")


def _array(declaration, rows):
    lines, line = [], ""
    for item in map(_text, rows):
        if len(line) + len(item) > 110:
            lines.append(line)
            line = ""
        line += f"{item}, "
    text = "".join(f"    {one.rstrip()}\n" for one in [*lines, line])
    return f"  static constexpr {declaration} = {{\n{text}  }};\n"


def _text(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value!r}f"
    return "{" + ", ".join(map(_text, value)) + "}" if isinstance(value, (list, tuple)) else str(value)


def tile_for(tile, height):
    """The Tile for images of that many rows: half as high, where that covers them."""
    return tile._replace(rows=tile.rows // 2) if height <= tile.rows else tile


def forward_structures(layer, shared_bytes):
    """(Tile, Structures for the forward kernel): as few as fit into that much shared memory of a block."""
    channels = FORWARD_CHANNELS[layer.dtype.itemsize]
    options = product(TILES[layer.harmonics.ndim - 1], [Harmonics(layer, FORWARD_SUMS)], _IN_TURN)
    return _fewest(layer, options, lambda s, tile: (
        s.channels <= channels and s.max_sums <= FORWARD_SUMS and s.forward_bytes(tile) <= shared_bytes))


def gradient_structures(layer, shared_bytes):
    """The same for the gradient of the weights, of (whether the next pixels travel meanwhile: 2 buffers or 1, ...).

    A warp has accumulators for what its harmonics give, mostly two of the target's irreps for one of the source's: then
    shares of all irreps need as few kernels as there can be.
    """
    grouped = [Harmonics(layer, GRADIENT_SUMS, group) for group in GROUPS]
    return _fewest(layer, product((2, 1), grouped, (*_IN_TURN, _shares)), lambda s, buffers: (
        s.max_tiles <= GRADIENT_TILES and s.max_sums <= GRADIENT_SUMS
        and 4 * s.max_tiles + 8 * s.max_sums <= s.gradient_registers and s.gradient_bytes(buffers) <= shared_bytes))


def _fewest(layer, options, fits):
    """(one, Structures that fit with it) of the option (one, Harmonics, division) with which they are fewest."""
    found, problem = [], None
    for option, harmonics, divide in options:
        try:
            structures = divide(layer, harmonics, lambda s, option=option: fits(s, option))
        except Unsupported as reason:
            problem = problem or reason
            continue
        found.append((option, structures))
        if len(structures) == 1:
            break
    if not found:
        raise problem
    return min(found, key=lambda one: len(one[1]))


def _shares(layer, harmonics, fits):
    """Structures that fit, each with an equal share of every block."""
    for count in range(2, MAX_SLICES + 1):
        shares = [pieces for i in range(count) if (pieces := _share(layer.target.blocks, i, count))]
        found = list(takewhile(fits, (Structure(layer, harmonics, pieces) for pieces in shares)))
        if len(found) == len(shares):
            return found
    raise _too_wide()


def _share(blocks, i, count):
    pieces = []
    for n, block in enumerate(blocks):
        first, last = (-(-block.copies // ALIGNMENT * j // count) * ALIGNMENT for j in (i, i + 1))
        if first < last:
            pieces.append(Piece(n, first, last - first))
    return pieces


def _too_wide():
    return Unsupported(f"its output is too wide for {MAX_SLICES} kernels")


def _slices(layer, harmonics, fits, fill):
    """Structures that fit, one after another. fill: whether one takes a part of a block, where not all of it fits"""
    waiting = deque(Piece(n, 0, block.copies) for n, block in enumerate(layer.target.blocks))
    found, current = [], None

    def longer(piece):
        structure = Structure(layer, harmonics, [*(current.pieces if current else []), piece])
        return structure if fits(structure) else None

    while waiting:
        piece = waiting.popleft()
        structure = longer(piece)
        if structure:
            current = structure
            continue
        if current and fill:
            for copies in range(piece.copies - ALIGNMENT, 0, -ALIGNMENT):
                part, rest = piece.cut(copies)
                if structure := longer(part):
                    current, piece = structure, rest
                    break
        if current:
            found.append(current)
            current = None
            waiting.appendleft(piece)
        elif piece.copies > ALIGNMENT:
            waiting.extendleft(reversed(piece.cut(-(-piece.copies // 2 // ALIGNMENT) * ALIGNMENT)))
        else:
            raise Unsupported("its weights need more shared memory or registers than there are")
        if len(found) >= MAX_SLICES:
            raise _too_wide()
    return [*found, current]


_IN_TURN = partial(_slices, fill=False), partial(_slices, fill=True)
