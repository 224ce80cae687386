// field_norm: y = Q (scale * (Q^-1 x) + shift) for each field and pixel, where Q leads from the irreps' basis to the
// field's; field_norm_bwd; and field_norm_moments, mean and variance of the components of Q^-1 x. And field_norm_inner,
// which normalises by the mean and variance of all components of a field, through which the gradient flows. No torch in
// this file.
#pragma once
#include <cstdint>

#include "field_tensor.h"

namespace equiconv {

// A row of the table that equiconv/nn/fields.py makes.
struct FieldNormField {
  int64_t channel, size;
  int64_t basis;  // where Q and then Q^-1 begin, [size, size] each; -1 where they are the identity
};

// Of the output of field_norm_inner. FUNCTIONS of equiconv/reference/field_norm.py
enum class NormFunction : int32_t { identity, relu, elu };

struct FieldNormParams {
  FieldWork work;
  const FieldNormField* fields;
  const void* bases;
  FieldTensor x, y;      // y: the output, or the gradient of x
  FieldTensor grad;      // backward: of the output
  const void* scale;     // [channels]
  const void* shift;     // [channels]
  const void* mean;      // [channels], field_norm_inner_bwd: grad_x = scale * g + slope * (x - mean) + shift,
  const void* slope;     // [channels]  where g = grad * function'(scale * x + offset)
  const void* offset;    // [channels]
  NormFunction function;
  double* sums;          // [parts, 3, channels]: count, mean, sum of squares about it; or gradients of scale and shift
  void* results[2];      // [channels]: mean, variance; or gradients of scale and shift
};

// Scratch of a thread in numbers: input, gradient and output of a tile in memory's basis, and two in the irreps'.
constexpr int64_t field_norm_scratch(int64_t channels, int64_t lanes) { return 5 * field_tile_scratch(channels, lanes); }

}  // namespace equiconv
