"""Whole networks as graphs: torch.compile, torch.export, ONNX; and in mixed precision."""
import io

import escnn.nn
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import equiconv
from tests.modules import MODULES
from tests.networks import NETWORKS, build, images
from tests.synchronisation import NoSynchronisation

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ("p4_cnn", "se3_cnn")  # of networks made of the same layers
each_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NETWORKS])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def step(model, x):
    """(output, gradients of the parameters)."""
    y = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), torch.autograd.grad(y.square().sum(), parameters)


@each_network
def test_one_graph_for_every_batch_size(name):
    model, reference = build(name), build(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (3, 4, 5, 7):
        x = images(name, batch)
        (y, grads), (want, want_grads) = step(compiled, x), step(reference, x)
        torch.testing.assert_close(y, want)
        for g, w in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4 * max(w.abs().max().item(), 1))
    assert counter.frame_count == 2  # for the first size, then for any
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    model.eval(), reference.eval()
    with torch.no_grad():
        for batch in (3, 4, 5, 7):
            torch.testing.assert_close(compiled(images(name, batch)), reference(images(name, batch)))
    assert counter.frame_count <= 4


def test_a_compiled_network_sees_a_new_basis():
    model = MODULES["R2Conv"].build(equiconv.nn)
    x, = MODULES["R2Conv"].inputs(model)
    compiled = torch.compile(lambda t: model(model.in_type(t)).tensor, fullgraph=True, backend="aot_eager")
    before = compiled(x.tensor)
    state = model.state_dict()
    model.load_state_dict({k: 2 * v if "sampled_basis" in k else v for k, v in state.items()})
    bias = model.bias_expansion @ model.bias
    torch.testing.assert_close(compiled(x.tensor), 2 * before - bias[:, None, None])


@pytest.mark.slow
@each_network
def test_inductor(name):
    model, reference = build(name), build(name)
    compiled = torch.compile(model, fullgraph=True)
    for batch in (3, 4):
        (y, grads), (want, want_grads) = step(compiled, images(name, batch)), step(reference, images(name, batch))
        torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-4)
        for g, w in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-3 * max(w.abs().max().item(), 1))


@each_network
def test_torch_export(name):
    model = build(name).eval()
    exported = torch.export.export(model, (images(name),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    saved = io.BytesIO()
    torch.export.save(exported, saved)
    saved.seek(0)
    for program in (exported, torch.export.load(saved)):
        torch.testing.assert_close(program.module()(images(name, 5)), model(images(name, 5)))


@each_network
@pytest.mark.filterwarnings("ignore")
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(name).eval()
    path = str(tmp_path / "network.onnx")
    torch.onnx.export(model, (images(name),), path, dynamo=True, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("batch")},))
    session = onnxruntime.InferenceSession(path)
    for batch in (3, 5):
        x = images(name, batch)
        y, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


@each_network
def test_exported_modules_are_plain(name):
    """Each SequentialModule of a network by its .export(), alone."""
    model = build(name)
    model(images(name))  # running statistics that are not those of a new model
    model.eval()
    for module in model.modules():
        if isinstance(module, escnn.nn.SequentialModule):
            plain = module.export()
            assert not any(isinstance(m, escnn.nn.EquivariantModule) for m in plain.modules())
            x = torch.randn(2, module.in_type.size, *NETWORKS[name][1][1:], generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(plain(x), module(module.in_type(x)).tensor, rtol=1e-4, atol=1e-5)


# ---- synchronisation ----

@each_network
def test_no_step_waits_for_a_value(name):
    model, x = build(name), images(name)
    step(model, x)  # plans are made at the first call
    with NoSynchronisation():
        step(model, x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_network
def test_no_step_waits_on_a_gpu(name):
    model, x = build(name).cuda(), images(name).cuda()
    step(model, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- precision ----

@each_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_in_mixed_precision(name, dtype):
    model, reference = build(name), build(name)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, reference)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
    for i in range(3):
        x = images(name, seed=i)
        with torch.autocast("cpu", dtype=dtype):
            loss = model(x).square().mean()
        optimizers[0].zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        want = reference(x).square().mean()
        optimizers[1].zero_grad()
        want.backward()
        optimizers[1].step()
        torch.testing.assert_close(loss.float(), want, rtol=0.1, atol=0.02)
    assert scaler.get_scale() == 2.0 ** 10  # no step was skipped
    assert all(p.dtype == torch.float32 for p in model.parameters())


@each_network
def test_double_precision_throughout(name):
    model = build(name).double()
    kinds = set()
    for module in model.modules():
        module.register_forward_hook(lambda m, i, y: kinds.add((y.tensor if hasattr(y, "tensor") else y).dtype))
    model(images(name).double()).sum().backward()
    assert kinds == {torch.float64}
    assert all(p.grad.dtype == torch.float64 for p in model.parameters() if p.requires_grad)


@each_network
def test_channels_last_throughout(name):
    model = build(name)
    memory_format = torch.channels_last if len(NETWORKS[name][1]) == 3 else torch.channels_last_3d
    lost = []

    def check(module, inputs, y):
        if hasattr(y, "tensor") and not y.tensor.is_contiguous(memory_format=memory_format):
            lost.append(type(module).__name__)

    x = images(name)
    want = model(x)
    # one channel lies in both formats; the first that can show the format are those of the first convolution
    first = next(m for m in model.modules() if hasattr(m, "filter_and_bias"))
    first.register_forward_hook(lambda m, i, y: y.type(y.tensor.contiguous(memory_format=memory_format)))
    for module in model.modules():
        module.register_forward_hook(check)
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-4)
    assert lost in ([], ["MaskModule"])  # of one channel
