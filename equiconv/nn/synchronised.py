"""Batch norms of fields whose statistics are those of all processes of a group, as torch.nn.SyncBatchNorm's are."""
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..formats import compute_dtype
from ..ops import field_norm, field_norm_moments


def is_synchronised(norm):
    """Whether statistics are to be exchanged: other processes are there, and the module was converted."""
    return norm.synchronised and dist.is_available() and dist.is_initialized() and dist.get_world_size(
        norm.process_group) > 1


def gather_moments(mean, var, count, group):
    """(mean, variance, count) of the numbers of all processes; count is a tensor of one number.

    mean, var  [C] of the numbers of this process; not read where it has none
    count      of them, int
    """
    local = torch.cat([mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)])
    each = local.new_empty(dist.get_world_size(group), local.numel())
    dist.all_gather(list(each.unbind()), local, group)
    counts, total = each[:, -1:], each[:, -1].sum()
    means, variances = torch.where(counts > 0, each[:, :-1], 0).chunk(2, 1)
    shares = counts / total
    whole = (shares * means).sum(0)
    variance = (shares * (variances + (means - whole).square())).sum(0)  # does not cancel where the mean is large
    return whole.to(mean.dtype), variance.to(var.dtype), total


class Moments(torch.autograd.Function):
    """(mean [C], variance [C]) of each channel of x [B, C, *spatial], through which gradients flow."""

    @staticmethod
    def forward(ctx, x, fields):
        mean, var = field_norm_moments(x, fields, x.new_empty(0, dtype=compute_dtype(x.dtype)))
        ctx.save_for_backward(x, mean, fields)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        x, mean, fields = ctx.saved_tensors
        return _grad_of_moments(x, mean, fields, grad_mean, grad_var, x.numel() // x.shape[1]), None


class SynchronisedMoments(torch.autograd.Function):
    """(mean [C], variance [C], count) of each channel over all processes, through which gradients flow to each."""

    @staticmethod
    def forward(ctx, x, fields, group):
        mean, var = field_norm_moments(x, fields, x.new_empty(0, dtype=compute_dtype(x.dtype)))
        mean, var, count = gather_moments(mean, var, x.numel() // x.shape[1], group)
        ctx.group = group
        ctx.save_for_backward(x, mean, count, fields)
        ctx.mark_non_differentiable(count)
        return mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean, grad_var, _):
        x, mean, count, fields = ctx.saved_tensors
        both = torch.stack([grad_mean, grad_var])
        dist.all_reduce(both, group=ctx.group)  # the statistics serve in all processes
        return _grad_of_moments(x, mean, fields, *both, count.to(both.dtype)), None, None


def _grad_of_moments(x, mean, fields, grad_mean, grad_var, count):
    slope = 2 * grad_var / count
    return field_norm(x, slope, grad_mean / count - slope * mean, fields, mean.new_empty(0))
