"""Structures of fields and tensors of them, for the tests of the ops on fields."""
import torch

SHAPES = {"plane": (3, 7, 9), "wide_plane": (2, 33, 31), "solid": (2, 3, 4, 5), "points": (11,), "one_pixel": (3, 1, 1),
          "one_point": (1,), "empty": (0, 4, 4)}  # batch and spatial sizes
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensor(shape, channels, dtype=torch.float64, channels_last=False, seed=0):
    """Numbers about 1 of standard deviation 2, [B, channels, *spatial]."""
    batch, *spatial = SHAPES.get(shape, shape)
    x = (2 * random(batch, channels, *spatial, seed=seed) + 1).to(dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last and x.dim() in formats else x


def assert_close(got, want, dtype):
    """Error against float64 of at most twice that of rounding to the dtype, + 1e-5 (float64: 1e-12)."""
    want = want.double()
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    got, want = got.double().nan_to_num(), want.nan_to_num()
    rounding = (want.to(dtype).double() - want).norm()
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert (got - want).norm() <= 2 * rounding + bound * want.norm()


def assert_threads_change_nothing(compute):
    """compute() -> tensors, equal to the last bit whatever the number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compute())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def assert_results_equal(got, want, x):
    """(output, gradient of x, ...) of an op, in x's dtype and memory format, and the same in float64."""
    for g, w in zip(got, want, strict=True):
        assert g.dtype == x.dtype
        assert_close(g, w, x.dtype)
    assert x.numel() == 0 or got[1].stride() == x.stride()


def assert_modules_equal(theirs, ours, x):
    """Outputs and gradients of escnn's module and of ours, in float64."""
    results = []
    for module in (theirs, ours):
        leaf = (x.contiguous() if module is theirs else x).requires_grad_()
        y = module(module.in_type(leaf)).tensor
        results.append((y, *torch.autograd.grad(y, leaf, random(*y.shape, seed=9))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
