"""Two ranks on the CPU whose hash seeds differ stay equal, and sharding changes nothing; gradient checkpointing."""
import copy

import escnn.nn
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import equiconv.nn
from tests.distributed_worker import NORMS, SPLIT, norm_and_batch, steps_of
from tests.modules import mixed, pointwise


def differing(first, second):
    return [k for k in first if not torch.equal(first[k], second[k])]


def test_ranks_stay_bitwise_equal(ranks):
    first, second = (r["equiconv"] for r in ranks)
    assert first["overwritten"] == second["overwritten"] == 0
    assert first["state"].keys() == second["state"].keys() and not differing(first["state"], second["state"])
    assert first["losses"] != second["losses"]  # other images


def test_all_ranks_compute_with_the_bases_of_the_first(ranks):
    assert torch.equal(ranks[0]["accelerated"], ranks[1]["accelerated"]) and ranks[0]["accelerated"].any()


def test_a_checkpoint_on_one_rank_alone_raises_on_the_others(ranks):
    assert ranks[0]["error of one checkpoint"] is None
    assert "every rank must load the checkpoint" in ranks[1]["error of one checkpoint"]


def test_escnn_corrupts_the_other_ranks(ranks):
    assert ranks[0]["escnn"]["overwritten"] == 0 and ranks[1]["escnn"]["overwritten"] > 0
    assert differing(ranks[0]["escnn"]["state"], ranks[1]["escnn"]["state"])


def test_fully_shard_gives_the_same_losses(ranks):
    for rank in ranks:
        sharded, whole = (torch.tensor(rank[name]["losses"]) for name in ("fully_shard", "equiconv"))
        torch.testing.assert_close(sharded, whole)
    sharded, whole = ranks[0]["fully_shard"]["state"], ranks[0]["equiconv"]["state"]
    assert sharded.keys() == whole.keys()
    for name in whole:
        if "running" not in name:  # each rank's own under fully_shard
            torch.testing.assert_close(sharded[name], whole[name], rtol=1e-4, atol=1e-5)


def test_distributed_checkpoint_of_a_sharded_model(ranks):
    for rank in ranks:
        assert torch.equal(rank["restored"], rank["sharded"])


@pytest.mark.parametrize("name", NORMS)
def test_synchronised_batch_norms_equal_one_process_with_the_whole_batch(ranks, name):
    module, x, grad = norm_and_batch(name)
    want, found = steps_of(module, x, grad), [rank["synchronised"][name] for rank in ranks]
    for key in ("outputs", "gradients"):
        assert_equal([torch.cat(both) for both in zip(*[f[key] for f in found])], want[key])
    for f in found:
        assert_equal([[len(SPLIT) * p for p in step] for step in f["parameters"]], want["parameters"])  # DDP's mean
        assert_equal(f["state"], want["state"])


def assert_equal(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_one_process_alone_is_synchronised():
    module, x, grad = norm_and_batch("InnerBatchNorm")
    want = steps_of(copy.deepcopy(module), x, grad)
    got = steps_of(equiconv.convert_sync_batchnorm(module), x, grad)
    assert all(torch.equal(*pair) for key in ("outputs", "gradients") for pair in zip(got[key], want[key]))
    converted = equiconv.convert_sync_batchnorm(escnn.nn.SequentialModule(escnn.nn.InnerBatchNorm(pointwise())))
    assert type(converted[0]) is equiconv.nn.InnerBatchNorm and converted[0].synchronised
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        equiconv.convert_sync_batchnorm("model")


def test_gradient_checkpointing():
    t = pointwise()
    block = equiconv.nn.SequentialModule(equiconv.nn.R2Conv(mixed(), t, 3), equiconv.nn.ReLU(t),
                                         equiconv.nn.R2Conv(t, t, 3))
    x = torch.randn(2, mixed().size, 8, 8, requires_grad=True)
    leaves = [x, *block.parameters()]
    want = torch.autograd.grad(block(mixed()(x)).tensor.square().sum(), leaves)
    y = checkpoint(block, mixed()(x), use_reentrant=False).tensor
    for got, w in zip(torch.autograd.grad(y.square().sum(), leaves), want, strict=True):
        torch.testing.assert_close(got, w)
