// field_dropout: each field at each pixel is zero with probability p, else x / (1 - p), by numbers that depend on the seed
// and on their place alone. Its own derivative: the same numbers from the same seed. No torch in this file.
#pragma once
#include <cstdint>

#include "field_tensor.h"

namespace equiconv {

// A row of the table that equiconv/nn/dropout.py makes.
struct FieldDropoutField {
  int64_t channel, size;
};

struct FieldDropoutParams {
  FieldWork work;
  const FieldDropoutField* fields;
  FieldTensor x, y;
  uint32_t key[2];     // of the generator: the seed
  uint32_t threshold;  // a field stays where its 32 random bits are at least that
  double scale;        // of what stays
};

// Scratch of a thread in numbers: tiles of x and y.
constexpr int64_t field_dropout_scratch(int64_t channels, int64_t lanes) { return 2 * field_tile_scratch(channels, lanes); }

}  // namespace equiconv
