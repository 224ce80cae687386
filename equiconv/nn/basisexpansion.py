"""escnn's basis expansions, which keep irrep blocks and make the dense sampled basis only when somebody reads it."""
import hashlib

import torch
from escnn.kernels import EmptyBasisException
from escnn.nn.modules.basismanager import BlocksBasisExpansion, SingleBlockBasisExpansion, retrieve_indices
from escnn.nn.modules.basismanager.basisexpansion_singleblock import block_basisexpansion

from ..basis import SampledBasis, SteerableBasis, native_paths
from .expanded import _version

EQUAL = 3e-6   # relative difference below which a stored basis counts as the module's own: escnn's are in float32
SPANNED = 1e-2  # relative distance from the space of kernels that a stored basis may have: bfloat16 rounds to 4e-3


class IrrepBlocksExpansion(BlocksBasisExpansion):
    """The expansion of all pairs of representations of a layer: escnn's BlocksBasisExpansion, its blocks in order.

    in_reprs, out_reprs  escnn representations, one for each field
    basis_generator      function from (in_repr, out_repr) to a SteerableBasis, or to an escnn KernelBasis, which is
                         then expanded as escnn does
    points               [S, dimensions] float64: the taps
    basis_filter         function from the attributes of an element to whether it is kept; None keeps all
    recompute            whether an escnn KernelBasis is sampled anew
    """

    def __init__(self, in_reprs, out_reprs, basis_generator, points, basis_filter=None, recompute=False):
        torch.nn.Module.__init__(self)
        self._in_reprs, self._out_reprs = in_reprs, out_reprs
        self._input_size, self._output_size = (sum(r.size for r in reprs) for reprs in (in_reprs, out_reprs))
        self.points, self.S = points, points.shape[0]
        inputs, outputs = ({r.name: r for r in reversed(reprs)} for reprs in (in_reprs, out_reprs))
        blocks = {}
        for pair in sorted((i, o) for i in inputs for o in outputs):
            try:
                basis = basis_generator(inputs[pair[0]], outputs[pair[1]])
                if isinstance(basis, SteerableBasis):
                    blocks[pair] = IrrepBlocks(SampledBasis.of(basis, points, basis_filter))
                else:
                    blocks[pair] = block_basisexpansion(basis, points, basis_filter=basis_filter, recompute=recompute)
            except EmptyBasisException:
                continue
            self.add_module(f"block_expansion_{self._escape_pair(pair)}", blocks[pair])
        self._representations_pairs, self._n_pairs = list(blocks), len(inputs) * len(outputs)
        self._in_count, in_indices, in_contiguous = retrieve_indices(in_reprs)
        self._out_count, out_indices, out_contiguous = retrieve_indices(out_reprs)
        self._contiguous, self._weights_ranges, self._dim = {}, {}, 0
        for pair in blocks:
            (i, o), name = pair, self._escape_pair(pair)
            self._contiguous[pair] = in_contiguous[i] and out_contiguous[o]
            if self._contiguous[pair]:
                for key, indices in ((f"in_indices_{name}", in_indices[i]), (f"out_indices_{name}", out_indices[o])):
                    setattr(self, key, [indices.min(), indices.max() + 1, indices.max() + 1 - indices.min()])
            else:
                rows, columns = torch.meshgrid(out_indices[o], in_indices[i], indexing="ij")
                self.register_buffer(f"in_indices_{name}", columns.reshape(-1).contiguous())
                self.register_buffer(f"out_indices_{name}", rows.reshape(-1).contiguous())
            weights = blocks[pair].dimension() * self._in_count[i] * self._out_count[o]
            self._weights_ranges[pair] = (self._dim, self._dim + weights)
            self._dim += weights

    def irrep_paths(self):
        """Harmonics and paths (see basis.native_paths), or None where a basis is not the module's own."""
        blocks = [getattr(self, f"block_expansion_{self._escape_pair(pair)}") for pair in self._representations_pairs]
        if all(isinstance(block, IrrepBlocks) and block.foreign_basis is None for block in blocks):
            return native_paths([block.irrep_blocks for block in blocks])
        return None

    def _get_name(self):
        return "BlocksBasisExpansion"

    # Modules are told apart by identity: torch keeps them in sets.
    __eq__, __hash__ = object.__eq__, object.__hash__


class IrrepBlocks(SingleBlockBasisExpansion):
    """The expansion of one pair of representations: escnn's SingleBlockBasisExpansion.

    The dense `sampled_basis` [D, out, in, S] is made when it is read or saved. A checkpoint's basis is compared with
    it: one of the same elements is not kept, one of other elements of the same space is, any other raises ValueError.

    It is no buffer, so that the buffers of all processes of a distributed training are the same, whatever each has
    read or loaded. `basis_id` is one, of a single number: by it a process notices that the weights which
    DistributedDataParallel sent it belong to another basis than its own.
    """

    def __init__(self, irrep_blocks):
        torch.nn.Module.__init__(self)
        if not len(irrep_blocks):
            raise EmptyBasisException
        self.irrep_blocks, self.basis = irrep_blocks, irrep_blocks.basis
        self._mask = torch.from_numpy(irrep_blocks.kept)
        self._like = torch.empty(0)  # has the dtype and the device that the basis would have
        self._set_foreign_basis(None)

    @property
    def foreign_basis(self):
        """The dense basis that is not the module's own: loaded, set or written to; None if there is none."""
        if self._foreign_basis is None and self._read is not None and _version(self._read[0]) != self._read[1]:
            self._set_foreign_basis(self._read[0])
        if _version(self.basis_id) != self._known_version:
            self._check_id()
        return self._foreign_basis

    @property
    def sampled_basis(self):
        if self.foreign_basis is not None:
            return self.foreign_basis
        if self._read is None:  # the dense basis that was made for a reader, and its version
            dense = self.dense()
            self._read = (dense, _version(dense))
        return self._read[0]

    @sampled_basis.setter
    def sampled_basis(self, basis):
        read = self._read
        is_own = read is not None and basis is read[0] and _version(basis) == read[1]
        self._set_foreign_basis(None if is_own else basis)
        self._read = read  # torch.func.functional_call puts it back

    def dense(self):
        """A new tensor [D, out, in, S], of the module's dtype and device."""
        blocks = self.irrep_blocks
        shape = (len(blocks), blocks.out_layout.size, blocks.in_layout.size, blocks.taps)
        if self._like.is_meta:
            return self._like.new_empty(shape)
        dense = torch.empty(shape, dtype=self._like.dtype)
        for first, kernels in blocks.chunks():
            dense[first:first + len(kernels)] = torch.from_numpy(kernels)
        return dense.to(self._like.device)

    def dimension(self):
        return len(self.irrep_blocks)

    def get_basis_info(self):
        kept = (attributes for attributes, keep in zip(self.basis, self.irrep_blocks.kept) if keep)
        for index, attributes in enumerate(kept):
            attributes["id"] = index
            yield attributes

    def get_element_info(self, id):
        return next(attributes for attributes in self.get_basis_info() if attributes["id"] == id)

    def _apply(self, fn, *args, **kwargs):
        foreign = self.foreign_basis
        super()._apply(fn, *args, **kwargs)
        self._like = fn(self._like)
        self._set_foreign_basis(None if foreign is None else fn(foreign), self._id)
        return self

    def _set_foreign_basis(self, basis, id=None):
        """id  of the basis, if that is known"""
        self._foreign_basis, self._read = basis, None
        self._id = (_id_of(basis) if id is None else id) if basis is not None else 0
        self.register_buffer("basis_id", torch.full((), self._id, device=self._like.device), persistent=False)
        self._known_version = _version(self.basis_id)

    def _check_id(self):
        # an average of equal buffers, as torch.optim.swa_utils makes it, may be rounded
        if not self.basis_id.is_meta and abs(self.basis_id.item() - self._id) > 1:
            raise RuntimeError("the weights of this process belong to the steerable basis of another, which sent them: "
                               "every rank must load the checkpoint, not the first alone")
        self._known_version = _version(self.basis_id)

    def __getstate__(self):
        return {**self.__dict__, "_foreign_basis": self.foreign_basis, "_read": None, "_known_version": -1}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        basis = self.foreign_basis
        basis = self.dense() if basis is None else basis
        destination[prefix + "sampled_basis"] = basis if keep_vars else basis.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs):
        key = prefix + "sampled_basis"
        if key not in state_dict:
            missing_keys.append(key)
            return
        stored, blocks = state_dict[key], self.irrep_blocks
        shape = (len(blocks), blocks.out_layout.size, blocks.in_layout.size, blocks.taps)
        if tuple(stored.shape) != shape:
            error_msgs.append(f"size mismatch for {key}: copying a param with shape {tuple(stored.shape)} from "
                              f"checkpoint, the shape in current model is {shape}.")
            return
        if self._like.is_meta and local_metadata.get("assign_to_params_buffers"):
            self._like = stored.new_empty(0)
        self._set_foreign_basis(None)
        if stored.is_meta:
            return
        kernels = stored.detach().cpu()
        if blocks.distance(kernels) <= EQUAL:
            return
        residual = blocks.residual(kernels, SPANNED)
        if not residual <= SPANNED:
            raise ValueError(f"{key} must span the kernels of this module, got a basis at a relative distance of "
                             f"{residual:.2g} from them: that of a layer with other rings, sigma, frequencies or "
                             "group, or a damaged one")
        self._set_foreign_basis(stored.detach().to(self._like.device, self._like.dtype, copy=True))

    def _get_name(self):
        return "SingleBlockBasisExpansion"

    __eq__, __hash__ = object.__eq__, object.__hash__


def _id_of(basis):
    """A number from 2 to 65537, which most likely differs for bases whose contents differ."""
    if basis.is_meta:
        return 2
    contents = basis.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data
    return 2 + int.from_bytes(hashlib.blake2b(contents, digest_size=2).digest(), "big")
