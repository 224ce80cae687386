"""Layers as they are built: escnn's basis elements, nothing dense that nobody reads, checkpoints, initialisation."""
import copy
import io
import pickle

import escnn.nn
import numpy as np
import pytest
import torch
from escnn import gspaces

import equiconv.nn
from equiconv.layout import basis_block, plan_of
from equiconv.nn import init
from equiconv.nn.basisexpansion import IrrepBlocks
from equiconv.ops import expand_filter
from equiconv.testing import check_equivariance
from tests.cases import CASES, SMALL

each_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
# Groups for which escnn's bases are formulas, so that they are the same on every machine, and here. (Not on R3: there
# they restrict SO(3)'s, whose Clebsch-Gordan coefficients are solved for numerically where py3nj is missing.)
REPRODUCIBLE = ("C1", "C2", "C3", "C4", "C8", "D1", "flip", "trivial", "SO(2)", "C8 at a point", "SO(2) at a point")


def blocks(module):
    expansion = module.basisexpansion
    return {pair: basis_block(expansion, pair) for pair in expansion._representations_pairs}


def bases(module):
    return {pair: block.sampled_basis for pair, block in blocks(module).items()}


@pytest.fixture(scope="module")
def built():
    """(escnn's layer, equiconv's) by name of the case: built once, and never changed."""
    known = {}

    def get(case):
        if case.name not in known:
            known[case.name] = [case.build(n, recompute=True) for n in (escnn.nn, equiconv.nn)]
        return known[case.name]
    return get


# ---- the basis is escnn's ----

@each_case
def test_elements_are_those_of_escnn(case, built):
    theirs, ours = built(case)
    assert isinstance(ours.basisexpansion, escnn.nn.modules.basismanager.BlocksBasisExpansion)
    for name in ("_representations_pairs", "_weights_ranges", "_contiguous", "_n_pairs", "_in_count", "_out_count"):
        assert getattr(ours.basisexpansion, name) == getattr(theirs.basisexpansion, name), name
    assert ours.basisexpansion.dimension() == theirs.basisexpansion.dimension()
    attributes = list(ours.basisexpansion.get_basis_info())
    assert attributes == list(theirs.basisexpansion.get_basis_info())
    assert ours.basisexpansion.get_element_info(len(attributes) - 1) == attributes[-1]


@each_case
def test_span_is_that_of_escnn(case, built):
    theirs, ours = map(bases, built(case))
    assert ours.keys() == theirs.keys()
    for pair, basis in theirs.items():
        assert basis.shape == ours[pair].shape and basis.dtype == ours[pair].dtype
        want, got = (b.flatten(1).double().numpy() for b in (basis, ours[pair]))
        residual = want - np.linalg.lstsq(got.T, want.T, rcond=None)[0].T @ got
        assert np.linalg.norm(residual, axis=1).max() < 1e-5 * np.linalg.norm(want, axis=1).max()
        if case.space in REPRODUCIBLE:
            np.testing.assert_allclose(got, want, atol=2e-6)


@each_case
def test_plan_of_irrep_blocks(case, built):
    """The plan gives the filter that escnn's expansion makes of the dense basis."""
    _, ours = built(case)
    dense = case.build(equiconv.nn)
    for block in blocks(dense).values():
        block.sampled_basis.add_(0)  # written to: it is taken as it stands
    assert dense.basisexpansion.irrep_paths() is None and ours.basisexpansion.irrep_paths() is not None
    assert plan_of(dense.basisexpansion).weights == ours.plan.weights
    if not case.module.startswith("R3Ico"):  # bumps are almost, but not quite, combinations of fewer harmonics
        assert ours.plan.harmonics.shape == plan_of(dense.basisexpansion).harmonics.shape
    with torch.no_grad():
        want = escnn.nn.modules.basismanager.BlocksBasisExpansion.forward(dense.basisexpansion, ours.weights)
        got = expand_filter(ours.weights, ours.plan, (want.shape[2],))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["d4_k5", "c4_mixed", "o2_irreps", "so3_irreps", "octahedral_quotient", "cone_on_r3",
                                  "mirror_on_r3"])
def test_layers_are_equivariant(name):
    module = CASES[name].build(equiconv.nn)
    module.padding = module.kernel_size // 2
    result = check_equivariance(module)
    assert all(result.errors[g] < 1e-4 for g in result.exact)
    assert result.max < 0.6  # the others are interpolated


def test_other_spaces_build_their_own_bases():
    """A subclass of a gspace or of a layer may define another basis."""

    class OnlyScalars(gspaces.GSpace2D):
        def _basis_generator(self, in_repr, out_repr, rings, sigma, **kwargs):
            return super()._basis_generator(in_repr, out_repr, rings[:1], sigma[:1], maximum_frequency=0)

    class Layer(equiconv.nn.R2Conv):
        def _build_kernel_basis(self, in_repr, out_repr):
            return self.space.build_kernel_basis(in_repr, out_repr, self._sigma[:1], self._rings[:1],
                                                 maximum_frequency=0)

    for space, cls in ((OnlyScalars((None, 4)), equiconv.nn.R2Conv), (gspaces.rot2dOnR2(4), Layer)):
        fields = escnn.nn.FieldType(space, [space.regular_repr])
        module = cls(fields, fields, 3, bias=False)
        assert len(module.weights) == 4  # one ring, no frequencies: the group algebra
        assert not any(isinstance(block, IrrepBlocks) for block in blocks(module).values())
        y = module(fields(torch.randn(1, 4, 5, 5))).tensor
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("arguments,match", [
    (dict(samples="cube"), "samples must be one of"),
    (dict(in_type="so3_irreps", out_type="so3_irreps"), "icosahedral")])
def test_bad_arguments_of_icosahedral_layers(arguments, match):
    case = CASES["ico_ico"]
    types = {key: CASES[value].in_type for key, value in arguments.items() if key.endswith("type")}
    with pytest.raises(ValueError, match=match):
        equiconv.nn.R3IcoConv(**{"in_type": case.in_type, "out_type": case.out_type, "kernel_size": 3, **arguments,
                                 **types})


def test_bad_arguments_of_linear():
    case = CASES["linear_c8"]
    with pytest.raises(ValueError, match="basisexpansion must be 'blocks', got 'dense'"):
        equiconv.nn.Linear(case.in_type, case.out_type, basisexpansion="dense")


# ---- nothing dense that nobody reads ----

def test_nothing_dense_is_made(monkeypatch):
    def dense(self):
        raise AssertionError("a dense basis was made")

    monkeypatch.setattr(IrrepBlocks, "dense", dense)
    case = CASES["d4_k5"]
    module = case.build(equiconv.nn, initialize=True)
    module(case.input()).tensor.sum().backward()
    module = copy.deepcopy(module.double()).to("cpu")
    module.eval()(case.input(dtype=torch.float64))
    assert not [name for name, _ in module.named_buffers() if "sampled_basis" in name]
    with pytest.raises(AssertionError, match="dense basis was made"):
        module.state_dict()


def test_dense_basis_is_made_when_read():
    case = CASES["d4_k5"]
    module = case.build(equiconv.nn).double()
    block, = blocks(module).values()
    plan = module.plan
    basis = block.sampled_basis
    assert basis.dtype == torch.float64 and block.sampled_basis is basis
    assert not [name for name, _ in module.named_buffers() if "sampled_basis" in name]
    assert block.foreign_basis is None and module.plan.weights == plan.weights
    saved, = (value for key, value in module.state_dict().items() if "sampled_basis" in key)
    assert torch.equal(saved, basis)
    assert block(torch.randn(1, len(basis)).double()).shape == (1, *basis.shape[1:])
    module.float()
    assert block.foreign_basis is None and block.sampled_basis.dtype == torch.float32
    block.sampled_basis = block.sampled_basis
    assert block.foreign_basis is None
    block.sampled_basis.mul_(2)
    assert block.foreign_basis is not None
    copied, = blocks(copy.deepcopy(module)).values()
    assert torch.equal(copied.foreign_basis, block.sampled_basis)
    block.sampled_basis = basis
    assert block.foreign_basis is basis and block.double().foreign_basis.dtype == torch.float64


def test_functional_call_with_the_whole_state():
    case = CASES["d4_k5"]
    module, x = case.build(equiconv.nn), case.input()
    want = module(x).tensor
    torch.testing.assert_close(torch.func.functional_call(module, module.state_dict(), (x,)).tensor, want)
    assert all(block.foreign_basis is None for block in blocks(module).values())
    assert torch.equal(module(x).tensor, want)


@pytest.mark.parametrize("options", [{}, {"avg_fn": torch.optim.swa_utils.get_ema_avg_fn(0.9)}], ids=["mean", "ema"])
def test_averages_of_weights_and_buffers(options):
    case = CASES["d4_k5"]
    module = case.build(equiconv.nn)
    module.load_state_dict(mixed_basis(module, torch.Generator().manual_seed(5)))
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True, **options)
    for _ in range(5):
        averaged.update_parameters(module)
    torch.testing.assert_close(averaged(case.input()).tensor, module(case.input()).tensor)


def test_weights_of_another_basis_are_noticed():
    """As DistributedDataParallel brings them from a process that has loaded another basis."""
    case = CASES["d4_k5"]
    module, other = case.build(equiconv.nn), case.build(equiconv.nn)
    other.load_state_dict(mixed_basis(module, torch.Generator().manual_seed(5)))
    assert [(n, b.shape) for n, b in other.named_buffers()] == [(n, b.shape) for n, b in module.named_buffers()]
    for loaded in (other, copy.deepcopy(other), copy.deepcopy(other).half().float()):
        for receiver in (case.build(equiconv.nn), copy.deepcopy(module).double()):
            receiver(case.input(dtype=receiver.weights.dtype))
            with torch.no_grad():
                for buffer, sent in zip(receiver.buffers(), loaded.buffers(), strict=True):
                    buffer.copy_(sent)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="every rank must load the checkpoint"):
                    receiver(case.input(dtype=receiver.weights.dtype))
    receiver = copy.deepcopy(other)
    with torch.no_grad():
        for buffer, sent in zip(receiver.buffers(), other.buffers(), strict=True):
            buffer.copy_(sent)
    assert torch.equal(receiver(case.input()).tensor, other(case.input()).tensor)


@each_case
def test_irrep_blocks_pickle(case, built):
    for block in blocks(built(case)[1]).values():
        copied = pickle.loads(pickle.dumps(block.irrep_blocks))
        assert copied.key == block.irrep_blocks.key and list(copied.basis) == list(block.basis)
        for (_, got), (_, want) in zip(copied.chunks(), block.irrep_blocks.chunks()):
            assert np.array_equal(got, want)


def test_layers_share_nothing_that_changes():
    case = CASES["c4_mixed"]
    first, second = (case.build(equiconv.nn) for _ in range(2))
    want = second(case.input()).tensor
    first.double()
    for basis in bases(first).values():
        basis.mul_(3)
    assert all(basis.dtype == torch.float32 for basis in bases(second).values())
    torch.testing.assert_close(second(case.input()).tensor, want)
    third = case.build(equiconv.nn)
    torch.testing.assert_close(third(case.input()).tensor, want)


def test_buffers_are_in_one_order():
    """Whatever the hash seed: DDP broadcasts buffers by order."""
    for name in ("c4_mixed", "c4_interleaved", "so2_irreps"):
        expansion = CASES[name].build(equiconv.nn).basisexpansion
        pairs = expansion._representations_pairs
        assert list(expansion._modules) == [f"block_expansion_{expansion._escape_pair(pair)}" for pair in sorted(pairs)]
        names = [name for name in expansion._buffers if name.startswith("in_indices")]
        assert names == sorted(names)


# ---- checkpoints ----

def mixed_basis(module, generator):
    """The state of a module whose basis elements are mixed, and whose weights make the same filter."""
    state = {key: value.clone() for key, value in module.state_dict().items()}
    expansion = module.basisexpansion
    for pair, block in blocks(module).items():
        key, = (k for k in state if k.endswith(f"{expansion._escape_pair(pair)}.sampled_basis"))
        # mix elements between the same two irreps, as other vectors of the same space
        places = [(a["in_irrep_idx"], a["out_irrep_idx"]) for a in block.get_basis_info()]
        mixing = torch.zeros(len(places), len(places), dtype=torch.float64)
        for place in set(places):
            index = torch.tensor([p == place for p in places]).nonzero()[:, 0]
            matrix = torch.randn(len(index), len(index), generator=generator, dtype=torch.float64)
            mixing[index[:, None], index] = 1.5 * torch.linalg.qr(matrix)[0]
        state[key] = torch.einsum("pq,q...->p...", mixing, state[key].double()).float()
        first, last = expansion._weights_ranges[pair]
        weights = state["weights"][first:last].reshape(-1, len(places)).double()
        state["weights"][first:last] = (weights @ mixing.inverse()).reshape(-1).float()
    return state


@pytest.mark.parametrize("name", ["d4_k5", "c4_mixed", "octahedral_quotient", "so3_irreps_k5", "linear_octahedral",
                                  "ico_ico", "c4_transposed_mixed"])
def test_basis_of_a_checkpoint_is_adopted(name):
    case = CASES[name]
    module, other = case.build(equiconv.nn), case.build(equiconv.nn)
    want = module(case.input()).tensor
    state = mixed_basis(module, torch.Generator().manual_seed(5))
    other.load_state_dict(state)
    assert other.basisexpansion.irrep_paths() is None
    torch.testing.assert_close(other(case.input()).tensor, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    for key, value in other.state_dict().items():
        if key in ("filter", "matrix", "expanded_bias"):  # expanded anew
            torch.testing.assert_close(value, state[key], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(value, state[key])
    other.load_state_dict(module.state_dict())  # its own basis again
    assert other.basisexpansion.irrep_paths() is not None
    torch.testing.assert_close(other(case.input()).tensor, want)


@pytest.mark.parametrize("change,match", [
    (lambda b: torch.randn_like(b), "must span the kernels of this module"),
    (lambda b: b + 0.1 * torch.randn_like(b), "must span the kernels of this module"),
    (lambda b: b.roll(1, -1), "must span the kernels of this module"),
    (torch.zeros_like, "must span the kernels of this module"),
    (lambda b: torch.full_like(b, float("nan")), "must span the kernels of this module"),
    (lambda b: torch.full_like(b, float("inf")), "must span the kernels of this module"),
    (lambda b: b[[0, *range(len(b) - 1)]], "must span the kernels of this module"),
    (lambda b: torch.cat([b[:-1], b[:-1].sum(0, keepdim=True)]), "must span the kernels of this module")],
    ids=["random", "noise", "shifted", "zero", "nan", "infinite", "repeated", "dependent"])
def test_basis_of_another_space_raises(change, match):
    torch.manual_seed(0)
    for name in ("d4_k5", "so3_irreps"):
        module = CASES[name].build(equiconv.nn)
        state = module.state_dict()
        key = next(k for k in state if "sampled_basis" in k and len(state[k]) > 1)
        with pytest.raises(ValueError, match=match):
            module.load_state_dict({**state, key: change(state[key])})


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rounded_basis_of_the_same_space(case, dtype, built):
    """Also where elements almost depend on each other, on few taps."""
    generator = torch.Generator().manual_seed(0)
    for block in blocks(built(case)[1]).values():
        kernels = block.dense().double()
        assert block.irrep_blocks.residual(kernels.to(dtype), 1e-2) < 1e-2
        mixing = torch.linalg.qr(torch.randn(len(kernels), len(kernels), generator=generator, dtype=torch.float64))[0]
        mixed = torch.einsum("pq,q...->p...", mixing, kernels)
        assert block.irrep_blocks.residual(mixed.to(dtype), 1e-2) < 1e-2


def test_basis_of_other_rings_raises():
    case = CASES["c4_k5"]
    module, other = case.build(equiconv.nn), case.build(equiconv.nn, sigma=[0.3, 0.9, 0.9])
    assert module.weights.shape == other.weights.shape
    with pytest.raises(ValueError, match="rings, sigma, frequencies or group"):
        module.load_state_dict(other.state_dict())


def test_incomplete_and_misshapen_checkpoints():
    module = CASES["c4_k5"].build(equiconv.nn)
    state = module.state_dict()
    key, = (k for k in state if "sampled_basis" in k)
    with pytest.raises(RuntimeError, match="size mismatch.*sampled_basis"):
        module.load_state_dict({**state, key: state[key][1:]})
    del state[key]
    with pytest.raises(RuntimeError, match="Missing key.*sampled_basis"):
        module.load_state_dict(state)
    assert module.load_state_dict(state, strict=False).missing_keys == [key]


def test_files_go_both_ways():
    case = CASES["d4_k5"]
    theirs, ours = case.build(escnn.nn, recompute=True), case.build(equiconv.nn)
    with torch.no_grad():
        ours.weights.normal_()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    theirs.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True)
    with torch.no_grad():
        want = theirs(case.input()).tensor
    torch.testing.assert_close(ours(case.input()).tensor, want, rtol=1e-4, atol=1e-5)


# ---- initialisation ----

def test_init_has_every_name_of_escnn():
    public = [name for name in dir(escnn.nn.init) if not name.startswith("_")]
    assert [name for name in public if not hasattr(equiconv.nn.init, name)] == []
    assert set(escnn.nn.init.__all__) <= set(init.__all__)


def drawn(function, expansion, dtype=torch.float32):
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 scipy draws from the global generator, in escnn too
    weights = torch.empty(expansion.dimension(), dtype=dtype)
    function(weights, expansion)
    return weights, torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002


@each_case
def test_he_init_draws_what_escnn_draws(case, built):
    for module in built(case):
        for got, want in zip(drawn(init.generalized_he_init, module.basisexpansion),
                             drawn(escnn.nn.init.generalized_he_init, module.basisexpansion)):
            assert np.array_equal(got, want)


ORTHONORMAL = ["c4_regular", "c8_regular", "d4_regular", "c1_regular", "so2_irreps", "c4_17_fields", "c4_interleaved",
               "c8_quotient", "d4_quotient", "so3_irreps", "octahedral_quotient", "linear_d4", "linear_so3", "c4_mixed",
               "trivial_group", "c4_groups2", "c4_depthwise", "d2_odd_fields", "linear_no_bias", "so3_sphere"]


@pytest.mark.parametrize("name", ORTHONORMAL)
def test_deltaorthonormal_init_draws_what_escnn_draws(name, built):
    case = CASES[name]
    for module, dtype in zip(built(case), (torch.float32, torch.float64)):
        got, want = (drawn(f, module.basisexpansion, dtype) for f in (init.deltaorthonormal_init,
                                                                      escnn.nn.init.deltaorthonormal_init))
        assert got[0].dtype == dtype and got[0].abs().sum() > 0
        assert all(np.array_equal(g, w) for g, w in zip(got, want))


class OtherManager(escnn.nn.modules.basismanager.BasisManager):
    """A basis of someone else's: the elements of a layer, without its blocks."""

    def __init__(self, expansion):
        self.attributes = list(expansion.get_basis_info())

    def dimension(self):
        return len(self.attributes)

    def get_element_info(self, index):
        return self.attributes[index]

    def get_basis_info(self):
        return self.attributes


def test_init_of_other_basis_managers(built):
    expansion = built(CASES["c4_mixed"])[1].basisexpansion
    for function in (init.generalized_he_init, init.deltaorthonormal_init):
        assert torch.equal(drawn(function, OtherManager(expansion))[0], drawn(function, expansion)[0])


def test_bad_arguments_of_init():
    module = CASES["d4_regular"].build(equiconv.nn)
    for function in (init.generalized_he_init, init.deltaorthonormal_init):
        with pytest.raises(ValueError, match=f"tensor must have shape \\({len(module.weights)},\\)"):
            function(torch.empty(3), module.basisexpansion)
    holes = CASES["d4_regular"].build(
        equiconv.nn, basis_filter=lambda a: (a["in_irrep_idx"], a["out_irrep_idx"]) != (2, 3))
    with pytest.raises(ValueError, match="deltaorthonormal_init: every output of irrep"):
        init.deltaorthonormal_init(holes.weights.data, holes.basisexpansion)
