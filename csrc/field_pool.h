// field_pool: one invariant channel of each field: its largest number, or the largest norm of its subfields; and
// field_pool_bwd, whose gradient goes to the first of equal ones. No torch in this file.
#pragma once
#include <cstdint>

#include "field_tensor.h"

namespace equiconv {

// A row of the table that equiconv/nn/invariants.py makes. The channel of the output is the number of the row.
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
};

// Scratch of a thread in numbers: tiles of x, of the gradient of x, and of the output.
constexpr int64_t field_pool_scratch(int64_t channels, int64_t fields, int64_t lanes) {
  return 2 * field_tile_scratch(channels, lanes) + field_tile_scratch(fields, lanes);
}

}  // namespace equiconv
