// window_pool: the largest number in a window around each pixel, and then a weighted sum of these with a stride, channel
// by channel; or one of the two alone. And window_pool_bwd, whose gradient goes to the first of equal maxima. No torch.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace equiconv {

// [batch, channels, three spatial dimensions], contiguous or channels_last.
struct WindowPoolTensor {
  void* data;
  int64_t stride_batch, stride_channel, stride_pixel;  // in elements
  int64_t size[3];

  int64_t plane() const { return size[1] * size[2]; }  // pixels of a row, which is a plane of a volume
};

// Windows over a grid: pixel o of the result takes o * stride - padding + tap * dilation, where that is within the grid.
struct WindowPoolGrid {
  int64_t taps[3], stride[3], padding[3], dilation[3];
};

struct WindowPoolParams {
  WindowPoolTensor x, y;      // y: the output, or its gradient
  WindowPoolTensor grad_x;    // backward
  int64_t batch, channels;
  int64_t between[3];         // size of what the sum is taken of
  WindowPoolGrid largest, sum;
  bool has_largest;
  const void* filter;         // [taps, channels], or null
  int64_t strips;             // of the rows of the output (forward) or of x (backward), which are items of work
  int64_t* next_item;         // shared by the threads
  char* scratch;              // of the calling thread, 64-byte aligned
  DType dtype;                // of the tensors in memory
};

struct WindowRows {
  int64_t first, last;  // [first, last)
};

inline WindowRows within(int64_t first, int64_t last, int64_t size) {
  if (first < 0) first = 0;
  if (first > size) first = size;
  if (last > size) last = size;
  return {first, last < first ? first : last};
}

// The rows, of `size`, that windows in some rows have taps in.
inline WindowRows rows_read(const WindowPoolGrid& grid, WindowRows rows, int64_t size) {
  const int64_t first = rows.first * grid.stride[0] - grid.padding[0];
  const int64_t last = (rows.last - 1) * grid.stride[0] - grid.padding[0] + (grid.taps[0] - 1) * grid.dilation[0] + 1;
  return within(first, last, size);
}

// The rows of windows that have a tap in some rows, of `count`.
inline WindowRows rows_reaching(const WindowPoolGrid& grid, WindowRows rows, int64_t count) {
  const int64_t before = rows.first + grid.padding[0] - (grid.taps[0] - 1) * grid.dilation[0];
  const int64_t first = before <= 0 ? 0 : (before + grid.stride[0] - 1) / grid.stride[0];
  return within(first, (rows.last - 1 + grid.padding[0]) / grid.stride[0] + 1, count);
}

// The windows, of `count`, whose tap of this number lies within a grid of `size`, in one dimension.
inline WindowRows windows_with(const WindowPoolGrid& grid, int d, int64_t tap, int64_t size, int64_t count) {
  const int64_t before = grid.padding[d] - tap * grid.dilation[d], last = size - 1 + before;
  return within(before <= 0 ? 0 : (before + grid.stride[d] - 1) / grid.stride[d], last < 0 ? 0 : last / grid.stride[d] + 1, count);
}

// Pixels beyond the ends of the last dimension.
struct WindowMargin {
  int64_t left, right;
};

// As far as `count` windows over a grid of `size` reach.
inline WindowMargin margin_read(const WindowPoolGrid& grid, int64_t count, int64_t size) {
  const int64_t last = (count - 1) * grid.stride[2] - grid.padding[2] + (grid.taps[2] - 1) * grid.dilation[2];
  return {grid.padding[2], last < size ? 0 : last - size + 1};
}

// Windows beyond `count` of them, without dilation, that would have a tap within a grid of `size`.
inline WindowMargin margin_reaching(const WindowPoolGrid& grid, int64_t size, int64_t count) {
  const int64_t last = (size - 1 + grid.padding[2]) / grid.stride[2];
  return {(grid.taps[2] - 1) / grid.stride[2], last < count ? 0 : last - count + 1};
}

}  // namespace equiconv
