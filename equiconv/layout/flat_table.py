"""Arrays of any shapes one behind the other, as kernels read them."""
import hashlib

import numpy as np
import torch

PADDING = 64  # elements after the last value that a kernel may read (and must not use)


class FlatTable:
    """Appends arrays to one flat table and says where each starts."""

    def __init__(self, dtype):
        self.parts, self.size, self.dtype, self.known = [], 0, dtype, {}

    def add(self, array):
        array = np.ascontiguousarray(array, dtype=self.dtype).reshape(-1)
        key = (array.size, hashlib.blake2b(array).digest())  # equal tables are stored once
        if key not in self.known:
            self.known[key] = self.size
            self.parts.append(array)
            self.size += array.size
        return self.known[key]

    def reserve(self, size):
        """Leaves room for numbers that are known later."""
        self.parts.append(np.zeros(size, self.dtype))
        self.size += size

    def fill(self, part, array):
        """Fills what was reserved as that part."""
        self.parts[part][:] = array

    def tensor(self, padding=0):
        return torch.from_numpy(np.concatenate([*self.parts, np.zeros(padding, self.dtype)]))
