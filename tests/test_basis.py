"""Steerable bases: Clebsch-Gordan coefficients, harmonics, kernels, caches; and that all machines find the same."""
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from escnn import group, gspaces
from escnn.group import _clebsh_gordan, _numerical
from escnn.kernels import GaussianRadialProfile

import equiconv.nn
from equiconv import basis
from equiconv.basis import cache, so3
from equiconv.basis.averaging import embeddings, haar_rule, matrices
from equiconv.basis.clebsch_gordan import tensor_product
from equiconv.basis.harmonics import CircularShells, Rings, SphericalShells
from equiconv.basis.restriction import restriction
from tests.cases import CASES, SMALL

GROUPS = {
    **{f"C{n}": lambda n=n: group.cyclic_group(n) for n in (1, 2, 3, 4, 5, 8)},
    **{f"D{n}": lambda n=n: group.dihedral_group(n) for n in (1, 2, 3, 4, 5, 6, 8)},
    "SO(2)": lambda: group.so2_group(6), "O(2)": lambda: group.o2_group(6),
    "SO(3)": lambda: group.so3_group(2), "O(3)": lambda: group.o3_group(2),
    "octahedral": group.octa_group, "icosahedral": group.ico_group,
    "C4 x C2": lambda: group.direct_product(group.cyclic_group(4), group.cyclic_group(2)),
    "C3 x C4": lambda: group.direct_product(group.cyclic_group(3), group.cyclic_group(4)),
    "full cylinder of order 4": lambda: group.full_cylinder_discrete_group(4),
}


@pytest.mark.parametrize("name", GROUPS)
def test_clebsch_gordan(name):
    """The copies intertwine, are orthonormal and fill the product, up to endomorphisms."""
    G = GROUPS[name]()
    rng = np.random.default_rng(0)
    elements = [G.sample() for _ in range(3)] if G.order() <= 0 else list(rng.choice(G.elements, 3))
    irreps = [psi for psi in G.irreps() if psi.size > 1][:5] + [psi for psi in G.irreps() if psi.size == 1][:3]
    for left, right in itertools.product(irreps, irreps):
        found = 0
        for j, cg in tensor_product(G, left.id, right.id):
            psi = G.irrep(*j)
            endomorphisms = psi.endomorphism_basis()
            # all intertwiners: each copy, followed by each endomorphism
            whole = np.einsum("lrsj,kji->lrski", cg, endomorphisms)
            for g in elements:
                turned = np.einsum("xl,yr,lrski->xyski", left(g), right(g), whole)
                np.testing.assert_allclose(turned, np.einsum("lrskj,ji->lrski", whole, psi(g)), atol=1e-10)
            gram = np.einsum("lrski,lrtmi->sktm", whole, whole) / psi.size
            gram = gram.reshape(2 * (gram.shape[0] * gram.shape[1],))
            np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-10)
            assert (np.diag(gram) > 0.1).all()
            found += cg.shape[2] * psi.size
        assert found == left.size * right.size


def test_coefficients_of_so3():
    wigner = pytest.importorskip("sympy.physics.wigner")
    for l1, l2, l in ((1, 1, 2), (2, 1, 2), (2, 3, 4), (3, 3, 0)):
        for m1, m2 in itertools.product(range(-l1, l1 + 1), range(-l2, l2 + 1)):
            want = float(wigner.clebsch_gordan(l1, l2, l, m1, m2, m1 + m2))
            assert so3.complex_coefficient(l1, m1, l2, m2, l, m1 + m2) == pytest.approx(want, abs=1e-15)


def quaternion_group():
    """[8, 4, 4]: 1, i, j, k and their opposites, by left multiplication; of quaternionic type."""
    turn = np.array([[0.0, -1], [1, 0]])
    i, j = np.kron(np.diag([1.0, -1]), turn), np.kron(turn, np.eye(2))
    return np.stack([s * q for q in (np.eye(4), i, j, i @ j) for s in (1, -1)])


def test_embeddings_of_a_quaternionic_irrep():
    rho = quaternion_group()
    weights = np.full(8, 1 / 8)
    commuting = np.linalg.svd(np.concatenate([np.kron(g, np.eye(4)) - np.kron(np.eye(4), g.T) for g in rho]))[2][-4:]
    endomorphisms = 2 * commuting.reshape(4, 4, 4)  # orthogonal matrices, orthogonal to each other
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(9, 9)))[0]
    twice = np.stack([q @ np.block([[g, np.zeros((4, 5))], [np.zeros((4, 4)), g, np.zeros((4, 1))],
                                    [np.zeros((1, 8)), np.ones((1, 1))]]) @ q.T for g in rho])
    copies = embeddings(rho, twice, weights, endomorphisms)
    assert copies.shape == (2, 9, 4)
    for copy in copies:
        np.testing.assert_allclose(twice @ copy, copy @ rho, atol=1e-12)
    both = np.concatenate(list(copies), axis=1)
    np.testing.assert_allclose(both.T @ both, np.eye(8), atol=1e-12)


def test_averages_over_continuous_groups_are_exact():
    for G, irrep in ((group.so3_group(3), (3,)), (group.o3_group(2), (1, 2)), (group.o2_group(4), (1, 4))):
        elements, weights = haar_rule(G, 2 * irrep[-1])
        rho = matrices(G.irrep(*irrep), elements)
        size = rho.shape[-1]
        # Schur: the matrix elements of an irrep of real type are orthogonal
        gram = np.einsum("g,gab,gcd->abcd", weights, rho, rho).reshape(size**2, size**2)
        np.testing.assert_allclose(gram, np.eye(size**2) / size, atol=1e-12)
        np.testing.assert_allclose(np.einsum("g,gab->ab", weights, rho), 0, atol=1e-12)

    class Unknown:
        @staticmethod
        def order():
            return -1
        _keys = {}

    with pytest.raises(ValueError, match="group must be finite, SO\\(2\\)"):
        haar_rule(Unknown(), 2)


def test_a_product_needs_all_its_irreps():
    G = group.direct_product(group.so2_group(2), group.cyclic_group(2))
    highest = max(psi.id for psi in G.irreps())
    with pytest.raises(ValueError, match="must have the irreps in the product"):
        tensor_product(G, highest, highest)


@pytest.mark.parametrize("shells,G,action", [
    (lambda: CircularShells(Rings([0.0, 1.0, 2.5], [0.1, 0.6, 0.5]), 4, axis=0.0), group.o2_group(4), (1, 1)),
    (lambda: SphericalShells(Rings([0.0, 1.5], [0.3, 0.6]), 5), group.o3_group(5), None)], ids=["plane", "space"])
def test_harmonics_are_steerable(shells, G, action):
    shells = shells()
    act = G.irrep(*action) if action else G.standard_representation()
    points = np.random.default_rng(1).normal(size=(7, act.size))
    points[0] = 0
    before = shells.sample(points)
    for g in [G.sample() for _ in range(5)]:
        after = shells.sample(points @ act(g).T)
        for j, values in before.items():
            want = np.einsum("ab,mbs->mas", G.irrep(*j)(g), values)
            np.testing.assert_allclose(after[j], want, atol=1e-6 if action is None else 1e-12)


def test_rings_are_those_of_escnn():
    radii, sigmas, r = [0.0, 0.7, 2.0], [0.005, 0.6, 0.4], np.linspace(0, 4, 9)
    theirs = GaussianRadialProfile(radii, sigmas)
    want = theirs.sample(torch.tensor(r, dtype=torch.float32)[:, None])[:, :, 0, 0].T.numpy()
    ours = Rings(radii, sigmas)
    np.testing.assert_allclose(ours.sample(r), want, rtol=1e-5, atol=1e-30)
    assert [(a["radius"], a["sigma"]) for a in theirs] == list(zip(ours.radii, ours.sigmas))


def test_restriction_to_a_polyhedral_group():
    o3, octa = group.o3_group(4), group.octa_group()
    subgroup, inclusion, _ = o3.subgroup((False, "octa"))
    assert subgroup == octa
    parts = restriction(o3, (False, "octa"), (0, 4))
    assert {j: p.shape for j, p in parts.items()} and sum(p.shape[0] * p.shape[2] for p in parts.values()) == 9
    for j, projections in parts.items():
        for g in octa.elements[:6]:
            turned = np.einsum("dxt,xy->dyt", projections, o3.irrep(0, 4)(inclusion(g)))
            np.testing.assert_allclose(np.einsum("ed,dxt->ext", octa.irrep(*j)(g), projections), turned, atol=1e-10)


def dense(sampled):
    return np.concatenate([kernels for _, kernels in sampled.chunks()])


# not c4_k1, whose one ring is too narrow for any point off the grid
CONVOLUTIONS = [case for case in SMALL if case.dimensions and case.name not in ("c4_k1",)
                and not any(word in case.name for word in ("stride", "padding", "transposed", "groups"))]


def assert_constraint(kernels, in_repr, out_repr, action):
    """K(g x) = rho_out(g) K(x) rho_in(g)^-1, at points off the grid."""
    points = np.random.default_rng(2).normal(size=(12, action.size)) * 1.5
    everything = np.ones(len(kernels), dtype=bool)
    before = dense(basis.SampledBasis(kernels, points, everything))
    assert len(before)
    for g in [action.group.sample() for _ in range(3)]:
        after = dense(basis.SampledBasis(kernels, points @ np.asarray(action(g)).T, everything))
        want = np.einsum("xa,nabs,by->nxys", out_repr(g), before, in_repr(~g), optimize=True)
        np.testing.assert_allclose(after, want, atol=2e-6)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
def test_kernels_satisfy_the_constraint(case):
    module = case.build(equiconv.nn)
    representations = {r.name: r for r in (*case.in_type.representations, *case.out_type.representations)}
    for i, o in module.basisexpansion._representations_pairs:
        kernels = module._build_kernel_basis(representations[i], representations[o])
        assert_constraint(kernels, representations[i], representations[o], case.in_type.gspace.basespace_action)


def tilted(angle):
    return group.o3_group().element((0, np.array([0.4, angle, -0.3])), "ZYZ")


@pytest.mark.parametrize("space", [
    lambda: gspaces.flipRot2dOnR2(4, axis=0.3), lambda: gspaces.flipRot2dOnR2(4, axis=0.3001),
    lambda: gspaces.flipRot2dOnR2(-1, axis=0.7), lambda: gspaces.flip2dOnR2(axis=1.1),
    lambda: gspaces.rot2dOnR3(4, adjoint=tilted(0.8)), lambda: gspaces.rot2dOnR3(4, adjoint=tilted(0.8000001)),
    lambda: gspaces.dihedralOnR3(3, adjoint=tilted(0.8)), lambda: gspaces.fullCylindricalOnR3(3),
    lambda: gspaces.conicalOnR3(-1), lambda: gspaces.cylindricalOnR3(-1), lambda: gspaces.dihedralOnR3(-1)],
    ids=["axis", "axis nearby", "O(2)", "flip", "tilted", "tilted nearby", "dihedral", "full cylinder", "cone",
         "infinite cylinder", "infinite dihedral"])
def test_other_axes_and_groups(space):
    space = space()
    vectors = space.basespace_action
    for i, o in ((vectors, vectors), (space.trivial_repr, vectors)):
        kernels = basis.steerable_basis(space, i, o, [0.0, 1.0, 2.0], [1.0, 0.6, 0.6], 3)
        assert len(kernels) >= 3
        assert_constraint(kernels, i, o, vectors)


# ---- the same bases everywhere ----

NAMES = ("d4_k5", "o2_irreps", "so3_irreps_k5", "octahedral_regular", "cylinder_on_r3", "mirror_on_r3", "ico_regular",
         "linear_octahedral", "c4_mixed")
DIGESTS = """
import hashlib, json, sys, warnings
warnings.simplefilter("ignore")
import torch
import equiconv.nn
from tests.cases import CASES
digests = {}
for name in sys.argv[1:]:
    state = CASES[name].build(equiconv.nn).state_dict()
    parts = [(k, v.numpy().tobytes()) for k, v in sorted(state.items()) if "sampled_basis" in k]
    digests[name] = hashlib.sha256(repr(parts).encode()).hexdigest()
print(json.dumps(digests))
"""


def in_another_process(script, *arguments, **environment):
    root = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": root, **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_process_finds_the_same_bits(tmp_path):
    first = in_another_process(DIGESTS, *NAMES, PYTHONHASHSEED="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    # another order, hash seed, number of threads, and older instructions
    reversed_ = in_another_process(DIGESTS, *NAMES[::-1], PYTHONHASHSEED="77", OPENBLAS_NUM_THREADS="2",
                                   OPENBLAS_CORETYPE="Prescott", NPY_DISABLE_CPU_FEATURES="AVX2 FMA3 AVX512F",
                                   EQUICONV_CACHE=str(tmp_path))
    from_disk = in_another_process(DIGESTS, *NAMES, EQUICONV_CACHE=str(tmp_path))
    assert list(tmp_path.glob("embeddings-*.npz"))
    assert first == reversed_ == from_disk


def test_no_numerical_solver(monkeypatch):
    """escnn's solver is slow, and fails where scikit-learn is installed; no layer asks it."""
    def solver(*_, **__):
        raise TypeError("np.matrix is not supported. Please convert to a numpy array with np.asarray.")

    monkeypatch.setattr(_numerical, "randomized_svd", solver)
    for module in (_numerical, _clebsh_gordan):
        for name in ("find_intertwiner_basis_sylvester", "build_sylvester_constraint", "_find_tensor_decomposition",
                     "_clebsh_gordan_tensor"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, solver)
    types = {case.name: (case.in_type, case.out_type) for case in SMALL}  # representations are escnn's own
    basis.forget()
    for case in SMALL:
        assert types[case.name] and case.build(equiconv.nn).plan.weights


# ---- caches ----

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_FOLDER", str(tmp_path / "deep" / "cache"))
    basis.forget()
    yield tmp_path / "deep" / "cache"
    basis.forget()


def counted(value):
    calls = []

    def build():
        calls.append(1)
        return np.full((2, 3), float(value))
    return build, calls


def test_disk_cache(folder):
    build, calls = counted(5)
    first = cache.remember("entry", build)
    assert cache.remember("entry", build) is first and len(calls) == 1
    assert not first.flags.writeable
    basis.forget()
    np.testing.assert_array_equal(cache.remember("entry", build), first)
    assert len(calls) == 1 and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: b"nonsense", lambda whole: whole[:-8], lambda whole: whole[:60],
    lambda whole: whole.replace(np.float64(5).tobytes(), np.float64(6).tobytes()),
    lambda whole: b"\x93NUMPY\x01\x00"], ids=["empty", "other", "cut", "start", "one number", "header"])
def test_damaged_entry_is_built_anew(folder, damage):
    build, calls = counted(5)
    cache.remember("entry", build)
    entry, = folder.iterdir()
    whole = entry.read_bytes()
    assert damage(whole) != whole
    entry.write_bytes(damage(whole))
    for _ in range(2):
        basis.forget()
        assert (cache.remember("entry", build) == 5).all()
    assert len(calls) == 2


def test_unwritable_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(cache, "CACHE_FOLDER", str(tmp_path / "file" / "cache"))
    basis.forget()
    build, calls = counted(5)
    assert (cache.remember("entry", build) == 5).all() and (cache.remember("entry", build) == 5).all()
    assert len(calls) == 1
    basis.forget()


FULL_DISK = """
import json, os, resource, signal
import numpy as np
from equiconv.basis import cache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
assert (cache.remember("entry", lambda: np.full(1000, 5.0)) == 5).all()
print(json.dumps([cache.CACHE_FOLDER, os.listdir(cache.CACHE_FOLDER)]))
"""


def test_full_disk(tmp_path):
    """Nothing of an entry stays, and nothing is said of it; the folder is in the user's own."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FULL_DISK], capture_output=True, text=True, env={
        **os.environ, "EQUICONV_CACHE": "~/cache", "HOME": str(tmp_path)})
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [str(tmp_path / "cache"), []]


def test_memory_is_bounded():
    memory = cache.Memory(3)
    for key in range(10):
        assert memory.get(key, lambda key=key: key) == key
        assert memory.get(0, lambda: "made anew") == 0  # just used: never the one to go
    assert len(memory) == 3 and memory.get(5, lambda: "made anew") == "made anew"


def _write_often(arguments):
    folder, seed = arguments
    cache.CACHE_FOLDER = folder
    value = np.full(20000, 7.0)
    good = True
    for _ in range(100):
        cache.forget()
        good &= bool((cache.remember("shared", lambda: value) == 7).all())
        if seed % 2:
            cache._write("shared", value)
    return good


def test_concurrent_processes(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert all(pool.map(_write_often, [(str(tmp_path), seed) for seed in range(4)]))
    assert [p.suffix for p in tmp_path.iterdir()] == [".npz"]


def test_attributes_of_one_element():
    module = CASES["ico_ico"].build(equiconv.nn)
    expansion = module.basisexpansion
    block = expansion.get_submodule(f"block_expansion_{expansion._escape_pair(expansion._representations_pairs[0])}")
    kernels = block.basis
    assert [kernels[i] for i in range(len(kernels))] == list(kernels) and kernels.dim == len(kernels)
    with pytest.raises(IndexError, match="index must be below"):
        kernels[len(kernels)]
