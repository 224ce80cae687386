"""What the modules share whose linear map is expanded from weights: plan, filter, cache of evaluation, state."""
import copy

import torch
from escnn.nn import EquivariantModule, GeometricTensor
from escnn.nn.modules import basismanager

from ..formats import compute_dtype
from ..layout import basis_block, plan_of
from ..library import autocast_dtype
from ..ops import expand_filter, plain_filter
from .bases import FIELDS, changes_of_basis


class Expanded:
    """Mixin before an escnn module with `weights`, `bias`, `bias_expansion` and `basisexpansion`.

    escnn keeps the expanded filter and bias in buffers that come and go with the mode. Here they are never stored.
    The state_dict has their keys in every mode, with what the weights expand to now: a new escnn module and one in eval
    mode load it strictly, and compute with it what this module computes. (An escnn module after .train() has no such
    keys, so it needs strict=False.) Loading takes the keys or their absence, and reads the weights only; who drops them
    has a smaller file.
    """

    filter_name = "filter"
    transposed = False
    kernel = ()  # spatial sizes of the filter

    def _adopt(self):
        """Makes an escnn module that was just built, or one built long ago, into one of this class."""
        for name in (self.filter_name, "expanded_bias"):
            self._buffers.pop(name, None)
        self._own_basis()
        self._plan, self._evaluated = None, {}

    def _own_basis(self):
        """Buffers of this module's own, in an order that does not depend on the hash seed.

        escnn shares them between modules, so that .double() of one changes all, and adds them in the order of a set,
        by which DistributedDataParallel would write one rank's buffers over others of another rank.
        """
        expansion = self.basisexpansion
        for name, block in expansion._modules.items():
            if type(block) is not basismanager.SingleBlockBasisExpansion:  # made by this package, for this module
                continue
            expansion._modules[name] = own = copy.copy(block)
            own.__class__ = SingleBlockBasisExpansion
            own.__dict__["_buffers"] = {
                key: buffer.to(self.weights, copy=True) for key, buffer in block._buffers.items()}
        for name, buffer in expansion._buffers.items():  # some are overlapping views, which cannot be loaded into
            expansion._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
        expansion._modules = dict(sorted(expansion._modules.items()))

    @property
    def plan(self):
        """layout.FilterPlan of this module, made again when a checkpoint brought another basis."""
        self._refresh_plan()
        return self._plan[0]

    @torch.compiler.assume_constant_result  # a compiler's trace runs it once, and guards the plan that it then reads
    def _refresh_plan(self):
        if torch.compiler.is_exporting() and self._plan is not None:  # the buffers hold no data then
            return
        if self._plan is None or any(block.foreign_basis is not basis or _version(basis) != version
                                     for block, basis, version in self._plan[1]):
            with torch.device("cpu"):  # whatever the default device is
                self._set_plan(plan_of(self.basisexpansion))

    def _set_plan(self, plan):
        """Takes the plan for that of the bases as they are now."""
        blocks = [basis_block(self.basisexpansion, pair) for pair in self.basisexpansion._representations_pairs]
        bases = [block.foreign_basis for block in blocks]
        self._plan = (plan, [(block, basis, _version(basis)) for block, basis in zip(blocks, bases)])
        if not self.weights.is_meta:
            plan.tables(self.weights.device, compute_dtype(self.weights.dtype))

    def _apply(self, *args, **kwargs):
        # A module that is moved or cast keeps its plan: it is more precise than a basis in bfloat16.
        plan = None if self._plan is None and self.weights.is_meta else self.plan
        super()._apply(*args, **kwargs)
        self._evaluated = {}
        if plan is not None:
            self._set_plan(plan)
        return self

    def expand_parameters(self, channels_last=False):
        """(filter, bias) as the convolution takes them, differentiable; bias is None where there is none."""
        return self._expand(self.weights, self.bias, channels_last)

    def _expand(self, weights, bias, channels_last=False, bases=FIELDS):
        return self._filter(weights, channels_last, bases), self._bias_of_channels(bias, bases)

    def _filter(self, weights, channels_last, bases):
        plan = self.plan.in_irreps(*bases)
        if torch.onnx.is_in_onnx_export():
            return plain_filter(weights, plan, self.kernel, self.transposed)
        return expand_filter(weights, plan, self.kernel, channels_last=channels_last, transposed=self.transposed)

    def _bias_of_channels(self, bias, bases):
        return None if bias is None else self._in_output_basis(self.bias_expansion @ bias, bases)

    def _in_output_basis(self, bias, bases):
        return changes_of_basis(self.out_type).to_irreps(bias) if bases.writes_irreps else bias

    def filter_and_bias(self, channels_last=False, norm=None, bases=FIELDS):
        """expand_parameters, from the cache in evaluation without gradients.

        norm   a batch norm in evaluation (see why_not_foldable) to make part of them
        bases  Bases of the features
        """
        def make():
            if norm is None:
                return self._expand(self.weights, self.bias, channels_last, bases)
            weights, bias = self._folded(norm, bases)
            return self._filter(weights, channels_last, bases), bias

        return self._kept("filter", (self.plan, bases, channels_last), norm, make)

    def weights_and_bias(self, norm=None, bases=FIELDS, pack=None):
        """(weights, bias of each channel or None, pack(weights) or None), from the cache as in filter_and_bias.

        pack   a function, called where its result is kept
        """
        def make():
            if norm is None:
                weights, bias = None, self._bias_of_channels(self.bias, bases)  # its own weights need not be kept
            else:
                weights, bias = self._folded(norm, bases)
            packs = pack is not None and self._keeps(norm)
            return weights, bias, pack(self.weights if norm is None else weights) if packs else None

        weights, bias, packed = self._kept("weights", (self.plan, bases, pack is None), norm, make)
        return self.weights if norm is None else weights, bias, packed

    def why_not_foldable(self, norm):
        """Why a batch norm that follows cannot become part of the filter and bias in evaluation, or None."""
        if norm.in_type is not self.out_type and norm.in_type != self.out_type:
            return "its fields are not those of the convolution before it"
        if self.plan.out_components(self.weights.device) is None:
            return "the checkpoint's basis of the convolution before it does not separate into irreps"
        return norm.why_not_affine()

    def _folded(self, norm, bases):
        """(weights, bias of each channel) of this map followed by a batch norm in evaluation.

        The norm multiplies all components of an irrep of the output alike, so each weight, which leads to one irrep,
        takes the factor of that.
        """
        components = self.plan.out_components(self.weights.device)
        weights = self.weights * norm.scale_in_evaluation().index_select(0, components)
        bias = self.weights.new_zeros(self.out_type.size) if self.bias is None else self.bias_expansion @ self.bias
        pixel = GeometricTensor(bias.view(1, -1, *[1] * len(self.kernel)), self.out_type)
        bias = self._in_output_basis(norm.forward(pixel).tensor.flatten(), bases)
        return weights.to(self.weights.dtype), bias

    def _kept(self, name, key, norm, make):
        """make(), from the cache in evaluation without gradients."""
        if not self._keeps(norm):
            return make()
        key = (*key, autocast_dtype("cpu"))
        if norm is not None:
            key = (*key, norm, *[module.eps for module in norm.modules()])
        tensors = self._expanded_tensors(norm)
        known, copies, result = self._evaluated.get(name, (None, (), None))
        if known == key and all(c.dtype == t.dtype and torch.equal(c, t) for c, t in zip(copies, tensors)):
            return result
        with torch.inference_mode(False), torch.no_grad():  # its tensors serve later calls that need gradients
            result = make()
            self._evaluated[name] = key, [t.detach().clone() for t in tensors], result
        return result

    def _keeps(self, norm):
        """Whether the cache serves: in evaluation without gradients, on a CPU, outside of graphs.

        Whether the weights are still the same is asked of their contents: an assignment through .data leaves no other
        trace. On a GPU the answer would have to be waited for, which costs more than the expansion.
        """
        if torch.compiler.is_compiling() or self.training or self.weights.device.type != "cpu":
            return False
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in self._expanded_tensors(norm))

    def _expanded_tensors(self, norm):
        own = [self.weights] if self.bias is None else [self.weights, self.bias, self.bias_expansion]
        return own if norm is None else [*own, *norm.parameters(), *norm.buffers()]

    def _fill(self, exported):
        """A plain torch module with this one's filter and bias, device and dtype, in eval mode."""
        exported = exported.to(self.weights.device, self.weights.dtype).eval()
        filter, bias = self.expand_parameters()
        exported.weight.data = filter.detach()
        if bias is not None:
            exported.bias.data = bias.detach()
        return exported

    def train(self, mode=True):
        self._evaluated = {}
        if not mode and not self.weights.is_meta:
            self._refresh_plan()  # torch.export needs it before it starts
        return EquivariantModule.train(self, mode)

    def __getattr__(self, name):
        # escnn's attributes in eval mode; here in any, since torch.distributed.checkpoint reads each key of the state
        if name in (self.filter_name, "expanded_bias") and "_plan" in self.__dict__:
            with torch.no_grad():
                return self._expanded_state()[name != self.filter_name]
        return super().__getattr__(name)

    def __getstate__(self):
        return {**self.__dict__, "_plan": None, "_evaluated": {}}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        with torch.no_grad():
            filter, bias = self._expanded_state()
        destination[prefix + self.filter_name] = filter
        if bias is not None:
            destination[prefix + "expanded_bias"] = bias

    def _expanded_state(self):
        weights, bias = self.weights, self.bias
        if weights.is_meta:
            sizes = (self.basisexpansion._output_size, self.basisexpansion._input_size)
            filter = weights.new_empty((*(reversed(sizes) if self.transposed else sizes), *self.kernel))
            return filter, None if bias is None else bias.new_empty(self.out_type.size)
        if hasattr(weights, "full_tensor"):  # sharded by fully_shard; its class takes a second to import
            weights, bias = weights.full_tensor(), None if bias is None else bias.full_tensor()
        with torch.autocast(weights.device.type, enabled=False):
            return self._expand(weights, bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        expanded = (prefix + self.filter_name, prefix + "expanded_bias")
        ignored = {key: state_dict.pop(key) for key in expanded if key in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)  # its hooks may change the dict
        state_dict.update(ignored)
        self._plan = None  # a compiled graph guards the plan, not the basis


class SingleBlockBasisExpansion(basismanager.SingleBlockBasisExpansion):
    """escnn's, told apart by identity: by the contents, torch.export could not keep it in its dictionaries."""
    __eq__, __hash__ = object.__eq__, object.__hash__

    @property
    def foreign_basis(self):
        """See IrrepBlocks: escnn's own is always taken as it stands."""
        return self._buffers["sampled_basis"]


def _version(tensor):
    """Changes when the tensor is written to (an inference tensor does not count)."""
    return None if tensor is None or tensor.is_inference() else tensor._version
