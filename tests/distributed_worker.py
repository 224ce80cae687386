"""One rank of a distributed training on the CPU: python -m tests.distributed_worker RANK WORLD FOLDER

Trains a small network of mixed field types with DistributedDataParallel (escnn's and equiconv's) and with fully_shard,
and writes losses and states to FOLDER/RANK.pt.
"""
import sys
from datetime import timedelta

import equiconv  # isort: skip  (before escnn, which it gives Wigner matrices where lie_learn is missing)
import escnn.nn
import torch
import torch.distributed as dist
from escnn import gspaces
from escnn.nn import GeometricTensor
from escnn.nn.modules.basismanager import SingleBlockBasisExpansion
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import equiconv.nn
from tests.modules import MODULES

STEPS = 20


class Network(torch.nn.Module):
    """SO(2) irreps up to frequency 3: one buffer per pair of irreps, so that their order matters."""

    def __init__(self, nn):
        super().__init__()
        plane = gspaces.rot2dOnR2(-1)
        image = nn.FieldType(plane, [plane.trivial_repr])
        fields = nn.FieldType(plane, [plane.irrep(k) for k in range(4)])
        self.layers = nn.SequentialModule(
            nn.R2Conv(image, fields, 5, recompute=True), nn.IIDBatchNorm2d(fields), nn.NormNonLinearity(fields),
            nn.R2Conv(fields, fields, 5, recompute=True), nn.NormPool(fields))

    def forward(self, images):
        return self.layers(self.layers.in_type(images)).tensor.mean((2, 3))


def build(nn):
    torch.manual_seed(0)
    model = Network(equiconv.nn)  # the weights of both libraries from one
    if nn is equiconv.nn:
        return model
    theirs = Network(escnn.nn)
    theirs.load_state_dict(model.state_dict())
    return theirs


def train(model, rank):
    """The losses of STEPS steps on this rank's images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    random, losses = torch.Generator().manual_seed(rank), []
    for _ in range(STEPS):
        images = torch.randn(2, 1, 12, 12, generator=random)
        loss = (model(images) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()(torch.zeros(1, 1, 12, 12))  # rank 0's running statistics go to all
    return losses


def blocks(model):
    """The modules that hold the basis of one pair of representations."""
    return [m for m in model.modules() if isinstance(m, SingleBlockBasisExpansion)]


def outputs_with_other_bases(rank):
    """Of an accelerated model whose bases are those of rank 0, however they were before."""
    model = equiconv.accelerate(build(escnn.nn))
    for block in blocks(model):
        block.sampled_basis.mul_(1 + rank)
    images = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    model(images)
    return DistributedDataParallel(model.to("cpu"))(images).detach()


def sharded(mesh):
    model = build(equiconv.nn)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def error_of_a_checkpoint_on_one_rank(rank):
    """What a forward pass raises if rank 0 alone loaded a checkpoint that has a basis of its own."""
    model = build(equiconv.nn)
    if rank == 0:
        model.load_state_dict({k: -v if "sampled_basis" in k else v for k, v in model.state_dict().items()})
    model = DistributedDataParallel(model)
    try:
        model(torch.zeros(1, 1, 12, 12))
    except RuntimeError as error:
        return str(error)


SPLIT = (3, 5)  # images of each rank
NORMS = ("InnerBatchNorm", "IIDBatchNorm2d", "IIDBatchNorm3d", "GNormBatchNorm", "NormBatchNorm",
         "InducedNormBatchNorm", "InnerBatchNorm, in irreps", "IIDBatchNorm2d, in irreps")


def norm_and_batch(name):
    """(a batch norm of fields, images and gradients of all ranks), in float64; or one between two convolutions."""
    name, _, in_irreps = name.partition(", ")
    module = MODULES[name].build(equiconv.nn)
    if in_irreps:
        first, last = (equiconv.nn.R2Conv(module.in_type, module.in_type, 3, padding=1) for _ in range(2))
        module = equiconv.accelerate(equiconv.nn.SequentialModule(first, module, last), irrep_domain=True)
    module, random = module.double(), torch.Generator().manual_seed(0)
    images = [torch.randn(sum(SPLIT), module.in_type.size, *MODULES[name].size, generator=random, dtype=torch.float64)
              for _ in range(2)]
    return module, 2 * images[0] + torch.arange(sum(SPLIT)).view(-1, *[1] * (images[0].dim() - 1)), images[1]


def steps_of(model, x, grad):
    """What two training steps and an evaluation compute: outputs, gradients, and the state after them."""
    results = {"outputs": [], "gradients": [], "parameters": []}
    for mode in (True, True, False):
        leaf, field_type = x.clone().requires_grad_(), getattr(model, "module", model).in_type
        model.train(mode).zero_grad()
        y = model(GeometricTensor(leaf, field_type)).tensor
        y.backward(grad)
        results["outputs"].append(y.detach())
        results["gradients"].append(leaf.grad)
        results["parameters"].append([p.grad.clone() for _, p in sorted(model.named_parameters())])
    results["state"] = dict(getattr(model, "module", model).named_buffers())
    return results


def synchronised(rank):
    """{name: steps of a synchronised batch norm on this rank's images}"""
    results = {}
    for name in NORMS:
        module, x, grad = norm_and_batch(name)
        model = DistributedDataParallel(equiconv.convert_sync_batchnorm(module))
        results[name] = steps_of(model, x.split(SPLIT)[rank], grad.split(SPLIT)[rank])
    return results


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    results = {"seed": hash("a string")}
    for name, nn in (("escnn", escnn.nn), ("equiconv", equiconv.nn)):
        model = build(nn)
        if nn is equiconv.nn and rank == 0:  # a rank that looks at its bases has the same buffers as others
            for block in blocks(model):
                assert block.sampled_basis.numel()
        before = {k: v.clone() for k, v in model.state_dict().items() if "sampled_basis" in k}
        losses = train(DistributedDataParallel(model), rank)
        state = model.state_dict()
        results[name] = {"losses": losses, "state": state,
                         "overwritten": sum(not torch.equal(before[k], state[k]) for k in before)}
    results["accelerated"] = outputs_with_other_bases(rank)
    results["synchronised"] = synchronised(rank)
    results["error of one checkpoint"] = error_of_a_checkpoint_on_one_rank(rank)
    mesh = init_device_mesh("cpu", (world,))
    model, restored = (sharded(mesh) for _ in range(2))
    losses = train(model, rank)
    set_model_state_dict(restored, get_model_state_dict(model.train()))
    images = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    results["restored"], results["sharded"] = (m.eval()(images).detach() for m in (restored, model))
    results["fully_shard"] = {"losses": losses, "state": {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
