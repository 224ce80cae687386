// field_norm: y = Q (scale * (Q^-1 x) + shift) for each field and pixel, where Q leads from the irreps' basis to the
// field's; field_norm_bwd; and field_norm_moments, mean and variance of the components of Q^-1 x. field_batch_norm is made
// of them: it normalises by statistics of parts of fields, through which the gradient may flow. No torch in this file.
#pragma once
#include <cstdint>

#include "field_tensor.h"

namespace equiconv {

// A row of the table that equiconv/nn/fields.py makes.
struct FieldNormField {
  int64_t channel, size;
  int64_t basis;  // where Q and then Q^-1 begin, [size, size] each; -1 where they are the identity
};

// MEANS of equiconv/reference/field_batch_norm.py
enum class Mean : int64_t { zero, own, average, projected };

// Channels of a field that share a variance: a row of `parts`. PART of the same
struct FieldNormPart {
  int64_t channel, size;
  int64_t kind;                   // of its mean: Mean
  int64_t samples;                // its variance is that of so many values of each pixel of the batch
  int64_t group, variance;        // of its variance and weight: which tensor of a list, and the place in all of them
  int64_t mean_group, mean;       // of its running mean; -1 where it has none
  int64_t projection;             // where the matrix [size, size] of a projected mean begins in `matrices`
  int64_t bias_group, bias, biases;
  int64_t spread;                 // where the matrix [size, biases] begins; -1: one bias for all channels
};

// STATISTICS and FUNCTIONS of the same
enum class Statistics : int64_t { values, estimate, running };
enum class NormFunction : int32_t { identity, relu, elu };

struct FieldNormParams {
  FieldWork work;
  const FieldNormField* fields;
  const void* bases;
  FieldTensor x, y;      // y: the output, or the gradient of x
  FieldTensor grad;      // backward: of the output
  const void* scale;     // [channels]
  const void* shift;     // [channels]
  const void* mean;      // [channels] or none: the gradient of scale is of (z - mean). field_norm_through_bwd:
  const void* slope;     // [channels]  grad_x = scale * g + slope * (x - mean) + shift,
  const void* offset;    // [channels]  where g = grad * function'(scale * x + offset)
  NormFunction function;
  double* sums;          // [parts, 3, channels]: count, mean, sum of squares about it; or gradients of scale and shift
  double* results;       // [2, channels]: mean, variance; or gradients of scale and shift
};

// Scratch of a thread in numbers: input, gradient and output of a tile in memory's basis, and two in the irreps'.
constexpr int64_t field_norm_scratch(int64_t channels, int64_t lanes) { return 5 * field_tile_scratch(channels, lanes); }

}  // namespace equiconv
