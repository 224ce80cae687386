// concatenated_act: y[2c] = f(x[c]) and y[2c + 1] = f(-x[c]) for each channel; and concatenated_act_bwd. No torch in this
// file.
#pragma once
#include <cstdint>

#include "field_tensor.h"
#include "fourier_act.h"

namespace equiconv {

struct ConcatenatedActParams {
  FieldWork work;
  FieldTensor x, y;       // y: the output, or its gradient
  FieldTensor grad_x;     // backward
  Function function;
};

// Scratch of a thread in numbers: tiles of x, of its gradient, and of the output.
constexpr int64_t concatenated_act_scratch(int64_t channels, int64_t lanes) {
  return 2 * field_tile_scratch(channels, lanes) + field_tile_scratch(2 * channels, lanes);
}

}  // namespace equiconv
