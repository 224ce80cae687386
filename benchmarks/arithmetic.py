"""How much arithmetic and memory traffic a method needs for a case: what its time is held against."""
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and the bytes that move if every operand is read and written once."""
    flops: float = 0
    bytes: float = 0

    def __add__(self, other):
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times):
        return Work(self.flops * times, self.bytes * times)


def work_of(method, case, layer):
    """{mode: Work} of one call of each kind of work of a Layer.

    escnn       a dense basis times the weights, then a dense convolution
    torch       a dense convolution
    equiconv_dense       a sum over irrep blocks, then a dense convolution
    equiconv_factorised  harmonics of the input and mixing of irreps; backward those of the gradient, mixed twice
    equiconv_fused       the same, with four real products for a complex one instead of three
    equiconv_two_pass    the same, with all of z (and of what lies on either side of the products) written and read
    equiconv    the least of these: what is known to be enough
    """
    if method == "equiconv":
        found = [work_of(m, case, layer) for m in ("equiconv_dense", "equiconv_factorised")
                 if m == "equiconv_dense" or hasattr(layer.module, "method")]
        return {mode: min((work[mode] for work in found), key=lambda work: work.flops) for mode in found[0]}
    if method in ("equiconv_factorised", "equiconv_fused", "equiconv_two_pass"):
        return _factorised(layer, method)
    tensor = layer.x if case.is_transposed else layer.grad
    pixels = tensor.shape[0] * prod(tensor.shape[2:])  # places where the whole filter is applied
    filter = layer.filter_grad if layer.filter_grad is not None else layer.module.weight
    size = layer.precision.activations.itemsize
    flops, expansion = 2 * pixels * filter.numel(), Work()
    if method == "equiconv_dense":
        expansion = _expansion_by_blocks(layer.module.plan, layer)
    elif method != "torch":
        expansion = _dense_expansion(layer)
    convolution = Work(flops, size * (layer.x.numel() + layer.grad.numel() + filter.numel()))
    return {"forward": expansion + convolution,
            "training": expansion * 2 + convolution * 3,  # backward to the input and to the filter
            "inference": convolution,
            "expand": expansion, "expand_training": expansion * 2}


def _factorised(layer, method):
    from equiconv.nn.costs import factorised_work
    module, x, grad = layer.module, layer.x, layer.grad
    geometry, size = module.geometry(x.shape), layer.precision.activations.itemsize
    forward = factorised_work(module.plan, geometry)
    back = factorised_work(module.plan, geometry.adjoint, adjoint=True)
    mixing, mixing_back = ((w.mixing if method == "equiconv_factorised" else w.products) for w in (forward, back))
    pixels, pixels_back = (t.shape[0] * prod(t.shape[2:]) for t in (grad, x))
    convolution = Work(2 * pixels * (forward.pointwise + mixing), size * (x.numel() + grad.numel() + forward.packed))
    backward = Work(2 * pixels_back * (back.pointwise + 2 * mixing_back),
                    size * (2 * x.numel() + grad.numel() + 2 * back.packed))
    if method == "equiconv_two_pass":  # x^, z and y^ go to memory and come back: z and y^ for each of the products
        convolution += Work(0, 2 * size * (_hat(geometry, x.shape[0]) + pixels * (forward.z + forward.y)))
        backward += Work(0, size * (2 * _hat(geometry.adjoint, x.shape[0]) + pixels_back * (3 * back.z + 4 * back.y)))
    expansion = _expansion_by_blocks(module.plan, layer)
    return {"forward": convolution, "training": convolution + backward, "inference": convolution, "expand": expansion,
            "expand_training": expansion * 2}


def _hat(geometry, batch):
    """Numbers of x^."""
    from equiconv.layout.two_pass import grid_of
    return batch * geometry.source_channels * prod(grid_of(geometry))


def _expansion_by_blocks(plan, layer):
    blocks = [(len(pair.in_fields) * len(pair.out_fields), path.out_slot.size * path.in_slot.size * plan.taps)
              for pair in plan.pairs for path in pair.paths]
    return _expansion(2 * sum(times * block for times, block in blocks), sum(block for _, block in blocks), layer)


def _dense_expansion(layer):
    expansion, flops, basis = layer.module.basisexpansion, 0, 0
    for pair in expansion._representations_pairs:
        kernels = getattr(expansion, f"block_expansion_{expansion._escape_pair(pair)}").sampled_basis  # [D, out, in, S]
        first, last = expansion._weights_ranges[pair]
        flops += 2 * (last - first) * kernels[0].numel()
        basis += kernels.numel()
    return _expansion(flops, basis, layer)


def _expansion(flops, basis, layer):
    size = layer.precision.parameters.itemsize
    return Work(flops, size * (layer.module.weights.numel() + basis + layer.filter_grad.numel()))
