"""The layers between the convolutions, beside escnn's: their training step; of convolutions with them, inference."""
from dataclasses import dataclass
from functools import partial

import escnn.nn
import torch
from escnn import group
from escnn.nn import FieldType, GeometricTensor

from equiconv import accelerate
from tests.cases import CASES, alternating, irreps, regular, space, together

from .equality import check
from .layers import Layer, equiconv_nn
from .precision import lookup, torch_switches
from .records import Row
from .timing import peak_memory_on_cpu

OPS = {"conv_block": "inference", **dict.fromkeys(  # and the work that is timed
    ("field_norm", "fourier_act", "field_gate", "field_pool", "concatenated_act", "window_pool", "norm_max_pool"),
    "training")}
METHODS = ("escnn", "equiconv")


@dataclass(frozen=True)
class FieldLayer:
    """A layer on fields and the size of its input.

    op      that computes it here
    make    make(namespace) -> module
    passes  how often the work must read or write a tensor like its input, and one like its output: by default
            the input twice, its gradient, the output, and its gradient
    """
    name: str
    op: str
    make: object
    size: tuple
    batch: int = 16
    passes: tuple = (3, 2)
    source: str = ""

    @property
    def module(self):
        return type(self.build(escnn.nn)).__name__

    def batch_on(self, device):
        """More than caches hold on a GPU, whose memory is what limits these layers."""
        return self.batch * (16 if torch.device(device).type == "cuda" else 1)

    def build(self, namespace):
        torch.manual_seed(0)
        return self.make(namespace)


def _of(name, fields):
    return FieldType(space(name), fields(space(name)))


def _on_type(name, kind, fields, nn):
    return getattr(nn, kind)(_of(name, fields))


def _with_options(name, kind, fields, *options_and_nn):
    *options, nn = options_and_nn
    return getattr(nn, kind)(_of(name, fields), *options)


def _polynomials(g):
    vector = g.irrep(1)
    return 8 * [group.directsum([g.trivial_repr, vector, vector.tensor(vector)], name="polynomial_2")]


def _norm_then_relu(nn):
    t = _of("C8", regular(24))
    return nn.SequentialModule(nn.InnerBatchNorm(t), nn.ReLU(t))


def _gated(nn):
    return nn.GatedNonLinearity1(_of("SO(2)", together(irreps(0, fields=48), irreps(1, 2, fields=24))))


def _fourier(name, kind, channels, frequencies, nn, **grid):
    return getattr(nn, kind)(space(name), channels, frequencies, **grid)


def _block(case, function, norm, fold, nn):
    """A convolution, a batch norm if `norm` says so, and a pointwise function; folded if it is equiconv's."""
    convolution = CASES[case].build(nn, recompute=True)
    t = convolution.out_type
    block = nn.SequentialModule(convolution, *([nn.InnerBatchNorm(t)] if norm else []), getattr(nn, function)(t))
    return block if nn is escnn.nn else accelerate(block, fold=fold)


def _blocks(case, function, norm):
    size, batch = CASES[case].size, CASES[case].batch
    return [FieldLayer(f"{case}_{'norm_' if norm else ''}{function.lower()}{suffix}", "conv_block",
                       partial(_block, case, function, norm, fold), size, batch, (1, 1))
            for suffix, fold in (("", True), ("_unfolded", False))]


STATISTICS, INNER, INNER_RELU = (4, 2), (5, 3), (5, 8)  # passes: statistics of x; and of its gradient; and then ReLU
PLANE, BALL = (29, 29), (15, 15, 15)
MIXED, VECTORS = irreps(0, 1, 2, 3, fields=16), irreps(1, 2, fields=32)
IN_TURN = alternating(irreps(1, fields=32), irreps(2, fields=32))
LAYERS = {case.name: case for case in (
    FieldLayer("inner_c8", "field_norm", partial(_on_type, "C8", "InnerBatchNorm", regular(24)), PLANE, passes=INNER),
    FieldLayer("inner_relu_c8", "field_norm", _norm_then_relu, PLANE, passes=INNER_RELU),
    FieldLayer("iid_so2", "field_norm", partial(_on_type, "SO(2)", "IIDBatchNorm2d", MIXED), PLANE, passes=STATISTICS),
    FieldLayer("iid_so3", "field_norm", partial(_on_type, "SO(3)", "IIDBatchNorm3d", _polynomials), BALL, 4,
               STATISTICS),
    FieldLayer("gnorm_so2", "field_norm", partial(_on_type, "SO(2)", "GNormBatchNorm", MIXED), PLANE,
               passes=STATISTICS),
    FieldLayer("normbn_so2", "field_norm", partial(_on_type, "SO(2)", "NormBatchNorm", VECTORS), PLANE,
               passes=STATISTICS),
    FieldLayer("normbn_so2_in_turn", "field_norm", partial(_on_type, "SO(2)", "NormBatchNorm", IN_TURN), PLANE,
               passes=STATISTICS),
    FieldLayer("fourier_so2", "fourier_act", partial(
        _fourier, "SO(2)", "FourierPointwise", 16, [(k,) for k in range(4)], N=16, type="regular"), PLANE),
    FieldLayer("fourier_so3", "fourier_act", partial(
        _fourier, "SO(3)", "FourierELU", 6, [(l,) for l in range(3)], N=4, type="thomson_cube"), BALL, 4),
    FieldLayer("norm_so2", "field_gate", partial(_on_type, "SO(2)", "NormNonLinearity", VECTORS), PLANE),
    FieldLayer("norm_so2_in_turn", "field_gate", partial(_on_type, "SO(2)", "NormNonLinearity", IN_TURN), PLANE),
    FieldLayer("gated_so2", "field_gate", _gated, PLANE),
    FieldLayer("group_pool_c8", "field_pool", partial(_on_type, "C8", "GroupPooling", regular(24)), PLANE),
    FieldLayer("norm_pool_so2", "field_pool", partial(_on_type, "SO(2)", "NormPool", VECTORS), PLANE),
    FieldLayer("vectors_c8", "field_pool", partial(_on_type, "C8", "VectorFieldNonLinearity", regular(24)), PLANE),
    FieldLayer("concatenated_c8", "concatenated_act", partial(_on_type, "C8", "ConcatenatedNonLinearity", regular(24)),
               PLANE),
    FieldLayer("max_blur_c8", "window_pool", partial(
        _with_options, "C8", "PointwiseMaxPoolAntialiased2D", regular(24), 2), PLANE),
    FieldLayer("average_blur_so3", "window_pool", partial(
        _with_options, "SO(3)", "PointwiseAvgPoolAntialiased3D", _polynomials, 0.66, 2), BALL, 4),
    FieldLayer("norm_max_pool_so2", "norm_max_pool", partial(_with_options, "SO(2)", "NormMaxPool", VECTORS, 2), PLANE),
    *_blocks("c8_16_k5", "ELU", norm=True), *_blocks("c4_32_k3", "ReLU", norm=False),
)}


def measure(case, device, dtype, budget_s, timed, bytes_per_s, layout="contiguous"):
    """Rows of a FieldLayer. Raises Differs, before anything is timed, where the methods differ.

    timed        timed(functions, device, budget_s) -> {method: columns of a Row}
    bytes_per_s  of a large copy on that device: what the least number of bytes takes is the floor of equiconv
    """
    precision = lookup(dtype, device)
    with torch_switches(precision):
        layers = _layers(case, device, precision, layout)
        mode = OPS[case.op]
        for layer in layers.values():
            layer.module.train(mode != "inference")
        functions = {method: getattr(layer, mode) for method, layer in layers.items()}
        expected = functions["escnn"]()
        error = check(f"{case.name}, equiconv", functions["equiconv"](), expected, precision.tolerance)
        rows = timed(functions, device, budget_s)
        rows["equiconv"].update(_of_a_copy(_bytes(case, layers["equiconv"]), rows["equiconv"], bytes_per_s))
        if torch.device(device).type == "cpu":
            for method, function in functions.items():
                rows[method]["memory_mb"] = peak_memory_on_cpu(function) * 1e-6
        return [Row(case=case.name, source=case.source, op=case.op, mode=mode, dtype=dtype, layout=layout,
                    batch=case.batch_on(device), size="x".join(map(str, case.size)), method=method, **columns,
                    error=error if method == "equiconv" else "")
                for method, columns in rows.items()]


def _bytes(case, layer):
    """That the work must move."""
    return case.passes[0] * layer.x.nbytes + case.passes[1] * layer.grad.nbytes


def _of_a_copy(bytes, columns, bytes_per_s):
    """Columns about these bytes: how fast they were moved, beside a copy of as many."""
    speed = bytes / (columns["median_ms"] * 1e-3)
    return dict(mbytes=bytes * 1e-6, floor_ms=bytes / bytes_per_s * 1e3, peak_gbytes_s=bytes_per_s * 1e-9,
                note=f"{speed * 1e-9:.0f} GB/s, {speed / bytes_per_s:.0%} of a copy's")


def _of_tensor(module, x):
    return module(GeometricTensor(x, module.in_type)).tensor  # its own type: others are compared number by number


def _layers(case, device, precision, layout):
    """{method: Layer}, with one input, one gradient and equal parameters."""
    modules = {method: case.build(namespace).to(device, precision.parameters).train()
               for method, namespace in zip(METHODS, (escnn.nn, equiconv_nn()))}
    in_type = modules["escnn"].in_type
    x = torch.randn(case.batch_on(device), in_type.size, *case.size, device=device, dtype=precision.activations)
    if layout == "channels_last":
        x = x.contiguous(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[len(case.size)])
    x.requires_grad_()
    layers = {}
    for method, module in modules.items():
        layer = Layer(module, partial(_of_tensor, module), x, None, precision)
        layer.parameters = [p for _, p in sorted(module.named_parameters()) if p.requires_grad]
        layers[method] = layer
    with torch.no_grad():
        grad = torch.randn_like(layers["escnn"].forward()[0])
    for layer in layers.values():
        layer.grad = grad
    modules["equiconv"].load_state_dict(modules["escnn"].state_dict())  # also the running statistics of that forward
    return layers
