"""field_dropout by its definition: random bits by Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", in int64."""
import math

import torch

from ..formats import compute_dtype, like

FIELD = ("channel", "size")  # of a row of `fields`
WORDS = 4                    # of 32 random bits in a block, those of four fields that follow each other
BITS = (1 << 32) - 1
MULTIPLIERS, STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(words, key):
    """Four tensors of 32 bits, a counter, become random; key: two of 32 bits."""
    for _ in range(10):
        a, b = (multiplier * word for multiplier, word in zip(MULTIPLIERS, words[::2]))
        words = [(b >> 32 & BITS) ^ words[1] ^ key[0], b & BITS, (a >> 32 & BITS) ^ words[3] ^ key[1], a & BITS]
        key = [k + step & BITS for k, step in zip(key, STEPS)]
    return words


def threshold_and_scale(p):
    """(what random bits are compared with: a field stays where they are at least that, what it is multiplied by)"""
    return min(int(p * 2 ** 32), BITS), 1 / (1 - p) if p < 1 else 0.0


def random_bits(seed, fields, batch, pixels):
    """int64 [batch, fields, pixels]: a function of the seed, the pixel as counted through the batch, and the field."""
    pixel = torch.arange(batch * pixels, device=seed.device)
    block = torch.arange(-(-fields // WORDS), device=seed.device)[:, None]
    zero = torch.zeros_like(block * pixel)
    words = philox([zero + (pixel & BITS), zero + (pixel >> 32), block + zero, zero], [seed & BITS, seed >> 32 & BITS])
    return torch.stack(words, 1).flatten(0, 1)[:fields].unflatten(1, (batch, pixels)).movedim(1, 0)


def field_dropout(x, seed, fields, p):
    threshold, scale = threshold_and_scale(p)
    size = fields[:, FIELD.index("size")]
    bits = random_bits(seed, len(fields), len(x), math.prod(x.shape[2:]))
    factors = torch.where(bits >= threshold, scale, 0.0).to(compute_dtype(x.dtype))
    factors = factors.reshape(len(x), len(fields), *x.shape[2:]).repeat_interleave(size, 1, output_size=x.shape[1])
    return like((x.to(factors.dtype) * factors).to(x.dtype), x)
