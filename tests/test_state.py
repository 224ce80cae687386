"""State: checkpoints, copies, pickles and other processes; no module shares what can change with another."""
import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys

import equiconv  # isort: skip  (before escnn, also in processes that import this file: see tests/cases.py)
import escnn.nn
import numpy as np
import pytest
import torch
from escnn import group, gspaces
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import equiconv.nn
from tests.cases import SPACES
from tests.modules import MODULES, mixed, outputs, pointwise

pytestmark = pytest.mark.usefixtures("one_thread")
each_module = pytest.mark.parametrize("case", MODULES.values(), ids=lambda case: case.name)


def without_overlap(module):
    """The escnn module, its index tables made loadable: some are views, which not even its own files load into."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name.startswith(("in_indices", "out_indices")):
                child._buffers[name] = buffer.contiguous()
    return module


def results(case, module):
    torch.manual_seed(0)
    return outputs(module(*case.inputs(module)))


def assert_equal(got, want):
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# ---- checkpoints ----

@each_module
def test_keys_and_shapes_do_not_depend_on_the_mode(case):
    module = case.build(equiconv.nn)
    shapes = [{k: v.shape for k, v in module.train(mode).state_dict().items()} for mode in (True, False, True)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0] == {k: v.shape for k, v in case.build(equiconv.nn).state_dict().items()}


@each_module
def test_both_key_sets_of_escnn_load(case):
    theirs = case.build(escnn.nn)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.5)
    for mode in (None, True, False):
        ours = case.build(equiconv.nn)
        if mode is not None:
            theirs.train(mode), ours.train(mode)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.eval(), ours.eval()
        for got, want in zip(results(case, ours), results(case, theirs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@each_module
@pytest.mark.parametrize("saved_in", [True, False], ids=["saved while training", "saved in evaluation"])
def test_files_load_in_escnn(case, saved_in):
    ours = case.build(equiconv.nn).train(saved_in)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    new, evaluating, training = (without_overlap(case.build(escnn.nn)) for _ in range(3))
    evaluating.eval(), training.train()
    new.load_state_dict(ours.state_dict(), strict=True)
    evaluating.load_state_dict(ours.state_dict(), strict=True)
    missing, unexpected = training.load_state_dict(ours.state_dict(), strict=False)
    assert not missing and {key.split(".")[-1] for key in unexpected} <= {"filter", "matrix", "expanded_bias"}
    ours.eval(), new.eval(), training.eval()
    for theirs in (new, evaluating, training):
        for got, want in zip(results(case, theirs), results(case, ours), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@each_module
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_state_of_distributed_checkpoints(case, mode):
    """torch.distributed.checkpoint reads each key of the state_dict as an attribute, too."""
    module, other = case.build(equiconv.nn).train(mode), case.build(equiconv.nn).train(mode)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    if not module.state_dict():
        return  # torch takes it for that of another rank
    state = get_model_state_dict(module)
    assert state.keys() == module.state_dict().keys()
    set_model_state_dict(other, state)
    assert_equal(results(case, other), results(case, module))


def test_files_do_not_depend_on_autocast():
    module = MODULES["R2Conv"].build(equiconv.nn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {v.dtype for v in module.state_dict().values()} == {torch.float32, torch.int64}


def assert_same_tables(module, other):
    """What no checkpoint brings back, also of what evaluation does not read."""
    tables = {name: buffer for name, buffer in other.named_buffers() if name not in other.state_dict()}
    own = dict(module.named_buffers())
    assert all(torch.equal(own[name], table) for name, table in tables.items() if "basis_id" not in name)


@each_module
def test_modules_built_without_values(case):
    """On the meta device, then given memory and a checkpoint, as large models are."""
    module = case.build(equiconv.nn).eval()
    with torch.device("meta"):
        other = case.make(equiconv.nn).eval()
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    other.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_same_tables(other, module)
    for got, want in zip(results(case, other), results(case, module), strict=True):
        torch.testing.assert_close(got, want)


@each_module
def test_checkpoints_assigned_to_modules_without_values(case):
    module = case.build(equiconv.nn).eval()
    module.load_state_dict({k: -v if "sampled_basis" in k else v for k, v in module.state_dict().items()})
    with torch.device("meta"):
        other = case.make(equiconv.nn).eval()
    other.load_state_dict(module.state_dict(), assign=True)
    assert_same_tables(other, module)
    for got, want in zip(results(case, other), results(case, module), strict=True):
        torch.testing.assert_close(got, want)


def test_meta_modules():
    module = MODULES["SequentialModule"].build(equiconv.nn)
    shapes = {k: v.shape for k, v in module.state_dict().items()}
    assert {k: v.shape for k, v in module.to("meta").state_dict().items()} == shapes


def test_loading_without_strict_keeps_nothing_stale():
    """escnn's module in eval mode computes with the filter of its old weights."""
    case = MODULES["R2Conv"]
    source = case.build(equiconv.nn)
    with torch.no_grad():
        source.weights.mul_(-2)
    state = {k: v for k, v in source.state_dict().items() if k.split(".")[-1] not in ("filter", "expanded_bias")}
    theirs, ours = (without_overlap(case.build(n)).eval() for n in (escnn.nn, equiconv.nn))
    for module in (theirs, ours):
        module.load_state_dict(state, strict=False)
    torch.testing.assert_close(results(case, ours), results(case, source))
    assert not torch.allclose(results(case, theirs)[0], results(case, source)[0])


# ---- copies and pickles ----

@each_module
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_copies_and_pickles(case, mode):
    module = case.build(equiconv.nn).train(mode)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False))
    want = results(case, module)
    for other in copies:
        assert type(other) is type(module) and other.training == mode
        assert other.in_type == module.in_type and other.out_type == module.out_type
        assert_equal(results(case, other), want)
    if mode:
        return
    with torch.no_grad():  # after a call without gradients, which keeps the filter, too
        module.zero_grad()
        assert_equal(results(case, copy.deepcopy(module)), results(case, module))


@pytest.mark.parametrize("name", SPACES)
def test_field_types_of_every_space(name):
    space = SPACES[name]()
    anonymous = group.directsum([space.fibergroup.irreps()[-1], space.trivial_repr], name=f"pair of {name}")
    field_type = escnn.nn.FieldType(space, [space.trivial_repr, *space.fibergroup.irreps()[-2:], anonymous])
    assert copy.deepcopy(field_type) is field_type and copy.copy(space) is space
    loaded = pickle.loads(pickle.dumps(field_type))
    assert loaded == field_type and hash(loaded) == hash(field_type) and repr(loaded) == repr(field_type)
    assert loaded.gspace.fibergroup is space.fibergroup
    again = pickle.loads(pickle.dumps(field_type))
    assert again.gspace is loaded.gspace
    assert all(a is b for a, b in zip(again.representations, loaded.representations))
    for element in list(space.fibergroup.testing_elements())[:3]:
        assert pickle.loads(pickle.dumps(element)) == element
        np.testing.assert_allclose(loaded.fiber_representation(element), field_type.fiber_representation(element))
    if space.dimensionality:
        element = pickle.loads(pickle.dumps(space.fibergroup.identity))
        np.testing.assert_allclose(loaded.gspace.basespace_action(element), np.eye(space.dimensionality), atol=1e-9)


def test_representations_of_one_name():
    """Two of the same name and another basis stay two."""
    space = gspaces.rot2dOnR2(4)
    parts = [space.irrep(1), space.trivial_repr]
    turned = np.eye(3)[[1, 2, 0]]
    first, second = (group.directsum(parts, change_of_basis=q, name="the same name") for q in (np.eye(3), turned))
    assert first != second
    a, b, a2 = (pickle.loads(pickle.dumps(r)) for r in (first, second, first))
    assert a == first and b == second and a is a2 and a is not b
    assert a.name == b.name == "the same name"


def test_own_gspaces_do_not_pickle_silently():
    class Own(gspaces.GSpace2D):
        pass

    with pytest.raises(TypeError, match="gspace must be escnn's .* got Own"):
        pickle.dumps(Own((None, 4)))


def test_a_copy_is_as_fast(monkeypatch):
    """Its types are the same objects: no comparison of representations, which costs an np.allclose per field."""
    field_type = pointwise()
    model = equiconv.nn.SequentialModule(equiconv.nn.R2Conv(mixed(), field_type, 3), equiconv.nn.ReLU(field_type),
                                         equiconv.nn.InnerBatchNorm(field_type))
    copied = copy.deepcopy(model)
    assert copied[0].in_type is model[0].in_type and copied[0].in_type.gspace is model[0].in_type.gspace
    x = model[0].in_type(torch.randn(1, model[0].in_type.size, 6, 6))
    calls = []
    allclose = np.allclose
    monkeypatch.setattr(np, "allclose", lambda *args, **kwargs: calls.append(1) or allclose(*args, **kwargs))
    torch.testing.assert_close(copied(x).tensor, model(x).tensor)
    assert not calls


# ---- other processes ----

class Fields(torch.utils.data.Dataset):
    """GeometricTensors of one image."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return mixed()(torch.full((1, mixed().size, 4, 4), float(index)))


def first_of(batch):
    return batch[0]


def apply_in_child(module, x, queue):
    torch.set_num_threads(1)
    queue.put(pickle.dumps((module(x).tensor.detach().numpy(), module.in_type)))


def test_spawned_process():
    case = MODULES["SequentialModule"]
    module = case.build(equiconv.nn).eval()
    x, = case.inputs(module)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=apply_in_child, args=(module, x, queue))
    process.start()
    y, in_type = pickle.loads(queue.get(timeout=120))
    process.join()
    np.testing.assert_allclose(y, module(x).tensor.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert in_type == module.in_type


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    loader = torch.utils.data.DataLoader(Fields(), batch_size=1, collate_fn=first_of, num_workers=1,
                                         multiprocessing_context=start)
    fields = list(loader)
    assert [float(f.tensor[0, 0, 0, 0]) for f in fields] == [0, 1, 2, 3]
    assert all(f.type == mixed() and f.type.gspace is fields[0].type.gspace for f in fields)
    module = MODULES["R2Conv"].build(equiconv.nn)
    assert module(fields[1]).tensor.shape == (1, module.out_type.size, 4, 4)


# ---- no module shares mutable state ----

@each_module
def test_modules_share_no_memory(case):
    first, second = case.build(equiconv.nn).eval(), case.build(equiconv.nn).eval()
    addresses = [{t.data_ptr() for t in (*m.parameters(), *m.buffers()) if t.numel()} for m in (first, second)]
    assert not addresses[0] & addresses[1]
    want = results(case, second)
    for change in (first.double, first.half, lambda: first.to("meta")):
        change()
        assert_equal(results(case, second), want)
    assert {t.dtype for t in case.build(equiconv.nn).buffers()} <= {torch.float32, torch.int64}


def test_new_layers_after_escnn_cast_its_shared_basis(own_escnn_cache):
    t = mixed()
    escnn.nn.R2Conv(t, t, 3).double()
    fresh = escnn.nn.R2Conv(t, t, 3)
    assert torch.float64 in {b.dtype for b in fresh.buffers()}  # escnn's new layers are broken by it
    ours = equiconv.nn.R2Conv(t, t, 3)
    assert {b.dtype for b in ours.buffers() if b.is_floating_point()} == {torch.float32}
    assert ours(t(torch.randn(1, t.size, 5, 5))).tensor.dtype == torch.float32


def test_the_order_of_buffers_does_not_depend_on_the_hash_seed():
    """DistributedDataParallel broadcasts by order. In escnn's, two seeds give two orders."""
    script = ("import equiconv.nn, escnn.nn\n"
              "from tests.modules import MODULES\n"
              "for nn in (escnn.nn, equiconv.nn):\n"
              "    modules = [MODULES[name].make(nn) for name in\n"
              "        ('R2Conv', 'Linear', 'IIDBatchNorm2d', 'GNormBatchNorm', 'DisentangleModule')]\n"
              "    print([n for m in modules for n, _ in (*m.named_parameters(), *m.named_buffers())])\n")
    theirs, ours = zip(*(subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True,
                                        check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout.split("\n")[:2]
                         for seed in "12"))
    assert ours[0] == ours[1] and theirs[0] != theirs[1]
