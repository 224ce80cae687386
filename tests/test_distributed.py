"""Two ranks on the CPU whose hash seeds differ stay equal, and sharding changes nothing; gradient checkpointing."""
import torch
from torch.utils.checkpoint import checkpoint

import equiconv.nn
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
