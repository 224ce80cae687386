// field_gate: y = m x for each field and pixel, where m is f(|x| - bias) / |x|, or the sigmoid of a gate less its bias;
// and field_gate_bwd. No torch in this file.
#pragma once
#include <cstdint>

#include "field_tensor.h"

namespace equiconv {

// A row of the table that equiconv/nn/fields.py makes: a field, or a subfield that has its own norm or gate.
struct FieldGateField {
  int64_t channel, out_channel, size;
  int64_t gate;      // its channel among those of the gates, or -1
  int64_t gate_out;  // where the sigmoid itself goes, or -1
  int64_t bias;      // where its bias lies, if there are any
};

// Of the norm; or the sigmoid of a gate.
enum class GateFunction : int32_t { relu, sigmoid, softplus, squash, gate };  // FUNCTIONS of equiconv/reference/field_gate.py

struct FieldGateParams {
  FieldWork work;
  const FieldGateField* fields;
  int64_t num_fields;
  FieldTensor x, gates, y;  // gates may be x; y: the output
  FieldTensor grad, grad_x, grad_gates;  // backward; grad_gates may be grad_x
  bool gates_are_x;
  const void* bias;         // or null
  double* sums;             // [parts, fields], backward: gradients of the biases
  double eps;               // of the norm: m is zero up to there
  GateFunction function;
};

// Scratch of a thread in numbers: a tile of each tensor.
constexpr int64_t field_gate_scratch(int64_t channels, int64_t gates, int64_t out_channels, int64_t lanes) {
  return 2 * (field_tile_scratch(channels, lanes) + field_tile_scratch(gates, lanes) + field_tile_scratch(out_channels, lanes));
}

}  // namespace equiconv
