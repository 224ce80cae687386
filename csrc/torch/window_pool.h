// Torch's tensors and sizes as the ops on windows take them.
#pragma once
#include "../window_pool.h"
#include "field_tensor.h"

namespace equiconv {

using Sizes = std::vector<int64_t>;

inline WindowPoolTensor window_pool_tensor(const char* op, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == x.dim() && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.scalar_type() == x.scalar_type(),
                  op, ": tensors must have one dtype, batch and number of channels");
  const bool channels_last = is_channels_last(t);
  STD_TORCH_CHECK(channels_last || t.is_contiguous(), op, ": tensors must be contiguous or channels_last");
  WindowPoolTensor found{};
  found.data = const_cast<void*>(t.const_data_ptr());
  found.size[0] = t.size(2), found.size[1] = t.dim() == 5 ? t.size(3) : 1, found.size[2] = t.size(t.dim() - 1);
  const int64_t pixels = found.size[0] * found.plane();
  found.stride_batch = t.size(1) * pixels;
  found.stride_channel = channels_last ? 1 : pixels, found.stride_pixel = channels_last ? t.size(1) : 1;
  return found;
}

// Of a plane the rows are the first dimension, its columns the last.
inline void spread(const char* op, const Sizes& given, int64_t dimensions, int64_t least, int64_t neutral, int64_t (&to)[3]) {
  STD_TORCH_CHECK(int64_t(given.size()) == dimensions, op, ": windows must have as many numbers as there are dimensions");
  for (int64_t value : given) STD_TORCH_CHECK(value >= least, op, ": a window must have numbers of at least ", least);
  to[0] = given.front(), to[1] = dimensions == 3 ? given[1] : neutral, to[2] = given.back();
}

// How many windows there are; the last one begins within the grid or its first padding.
inline int64_t count_windows(const WindowPoolGrid& grid, int d, int64_t size, bool ceil_mode) {
  const int64_t places = size + 2 * grid.padding[d] - grid.dilation[d] * (grid.taps[d] - 1) - 1;
  if (places < 0 && !ceil_mode) return 0;
  int64_t found = (places + (ceil_mode ? grid.stride[d] - 1 : 0)) / grid.stride[d] + 1;
  if (ceil_mode && (found - 1) * grid.stride[d] >= size + grid.padding[d]) --found;
  return found;
}

}  // namespace equiconv
