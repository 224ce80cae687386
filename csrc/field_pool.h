// field_pool: one invariant channel of each field: its largest number, or the largest norm of its subfields; and
// field_pool_bwd, whose gradient goes to the first of equal ones. Or a vector of each field: the direction of its largest
// channel, times that number where it is positive. No torch in this file.
#pragma once
#include <cstdint>

#include "field_tensor.h"

namespace equiconv {

// A row of the table that equiconv/nn/fields.py makes. Its place in the output is the number of the row.
struct FieldPoolField {
  int64_t channel, size;
  int64_t subfield;  // channels of a subfield
};

struct FieldPoolParams {
  FieldWork work;
  const FieldPoolField* fields;
  FieldTensor x, y;     // y: the output, or the gradient of x
  FieldTensor grad;     // backward: of the output
  bool norms;           // of subfields; else they have one channel, and are compared themselves
  const void* directions;  // [channels of a field, numbers], or null
  int64_t numbers;      // of a field in the output: 1 without directions
};

// Scratch of a thread in numbers: tiles of x, of the gradient of x, and of the output.
constexpr int64_t field_pool_scratch(int64_t channels, int64_t out_channels, int64_t lanes) {
  return 2 * field_tile_scratch(channels, lanes) + field_tile_scratch(out_channels, lanes);
}

}  // namespace equiconv
