// The taps of a window within a grid, in one dimension. Local to the file that includes it (see isa.h).
#pragma once
#include "../window_pool.h"

namespace equiconv::EQUICONV_ISA {
namespace {

// Where the taps of a window begin and end that lie within a grid of `size`.
struct Taps {
  int64_t start, begin, end;

  Taps(const WindowPoolGrid& grid, int d, int64_t place, int64_t size) : start(place * grid.stride[d] - grid.padding[d]) {
    const int64_t step = grid.dilation[d];
    begin = start < 0 ? (-start + step - 1) / step : 0;
    end = start < size ? (size - 1 - start) / step + 1 : 0;
    if (end > grid.taps[d]) end = grid.taps[d];
  }
};

// Calls body(first of these taps, i', j') for the rows (i', j') of a grid of `size` with taps of the windows in row (i, j).
template <class Body>
inline __attribute__((always_inline)) void each_row_of_taps(const WindowPoolGrid& grid, const int64_t* size, int64_t i, int64_t j, Body body) {
  const Taps first(grid, 0, i, size[0]), second(grid, 1, j, size[1]);
  for (int64_t a = first.begin; a < first.end; ++a)
    for (int64_t b = second.begin; b < second.end; ++b)
      body((a * grid.taps[1] + b) * grid.taps[2], first.start + a * grid.dilation[0], second.start + b * grid.dilation[1]);
}

}  // namespace
}  // namespace equiconv::EQUICONV_ISA
