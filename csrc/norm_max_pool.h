// norm_max_pool: of each window and field what it is at the pixel where its norm is the largest; and norm_max_pool_bwd. No
// torch in this file.
#pragma once
#include "field_pool.h"
#include "window_pool.h"

namespace equiconv {

struct NormMaxPoolParams {
  WindowPoolTensor x, y;   // y: the output, or its gradient
  WindowPoolTensor grad_x; // backward
  const FieldPoolField* fields;
  int64_t batch, num_fields;
  WindowPoolGrid window;
  int64_t* next_item;      // shared by the threads
  char* scratch;           // of the calling thread, 64-byte aligned
  DType dtype;             // of the tensors in memory
};

// Scratch of a thread in numbers: of each pixel its norm, and a gradient; of each window its pixel, and two norms.
constexpr int64_t norm_max_pool_scratch(int64_t pixels, int64_t windows) { return 2 * pixels + 3 * windows + 128; }

}  // namespace equiconv
