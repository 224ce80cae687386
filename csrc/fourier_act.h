// fourier_act: y = Ainv f(A x) for each field and pixel, with A [samples, in_size] and Ainv [out_size, samples]; and
// fourier_act_bwd, grad_x = A^T (f'(A x) * (Ainv^T grad)). The samples exist for a tile at a time. No torch in this file.
#pragma once
#include <cstdint>

#include "field_tensor.h"

namespace equiconv {

enum class Function : int32_t { relu, elu, sigmoid, tanh };  // FUNCTIONS of equiconv/reference/fourier_act.py

struct FourierActParams {
  FieldWork work;
  FieldTensor x, grad, y;  // y: the output, or the gradient of x; grad: of the output
  const void *a, *a_inv;
  int64_t in_size, out_size, samples;
  Function function;
};

// Scratch of a thread in numbers: the tiles of x, grad and y, and two of the samples of a field.
constexpr int64_t fourier_act_scratch(int64_t fields, int64_t in_size, int64_t out_size, int64_t samples, int64_t lanes) {
  return 2 * field_tile_scratch(fields * in_size, lanes) + field_tile_scratch(fields * out_size, lanes) +
         2 * field_tile_scratch(samples, lanes);
}

}  // namespace equiconv
