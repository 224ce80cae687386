// y += w z of complex numbers, whose real and imaginary parts lie in rows of their own: three real products for each, by
// the weights of equiconv/layout/complex_products.py. For kernel files, as simd.h is.
#pragma once
#include "../steerable_conv.h"

#include "simd.h"

namespace equiconv::EQUICONV_ISA {
namespace {

using steerable::kComplexRows;

// Rows of complex numbers: real parts, and imaginary parts `imaginary` further on.
template <class T>
struct ComplexRows {
  T* data;
  int64_t stride, imaginary;
};

// M complex rows of the result, in one vector of columns.
template <int M, class T>
__attribute__((noinline)) void complex_block(const T* weights, int64_t pitch, const T* z, int64_t stride_z, int64_t imaginary_z,
                                             T* y, int64_t stride_y, int64_t imaginary_y, int64_t depth) {
  using V = Vector<T>;
  V both[M] = {}, real[M] = {}, imaginary[M] = {};
  for (int64_t k = 0; k < depth; ++k, z += stride_z, weights += kComplexRows * pitch) {
    const V c = load<V>(z), d = load<V>(z + imaginary_z), sum = c + d;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) both[m] += weights[m] * sum;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) imaginary[m] += weights[pitch + m] * c;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) real[m] += weights[2 * pitch + m] * d;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m, y += stride_y) {
    store_vector(load<V>(y) + (both[m] + real[m]), y);
    store_vector(load<V>(y + imaginary_y) + (both[m] + imaginary[m]), y + imaginary_y);
  }
}

constexpr int kMaxComplexRows = kBlockSums / kComplexRows;

template <class T, int... kRows>
constexpr auto complex_blocks(std::integer_sequence<int, kRows...>) {
  using Block = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, int64_t, int64_t, int64_t);
  struct { Block with_rows[sizeof...(kRows) + 1]; } table = {{nullptr, complex_block<kRows + 1, T>...}};
  return table;
}

// y[m, :] += sum_k w[m, k] z[k, :], for m < rows and a width of whole vectors; weights [kComplexRows * depth, pitch]
template <class T>
void multiply_add_complex(const T* weights, int64_t pitch, const ComplexRows<const T>& z, const ComplexRows<T>& y, int64_t rows,
                          int64_t depth, int64_t width) {
  static constexpr auto kBlocks = complex_blocks<T>(std::make_integer_sequence<int, kMaxComplexRows>());
  for (int64_t n = 0; n < width; n += kWidth<T>)
    for (int64_t first = 0, blocks = (rows + kMaxComplexRows - 1) / kMaxComplexRows; blocks > 0; --blocks) {
      const int64_t m = (rows - first + blocks - 1) / blocks;  // of equal height, as in multiply_columns
      kBlocks.with_rows[m](weights + first, pitch, z.data + n, z.stride, z.imaginary, y.data + first * y.stride + n, y.stride,
                           y.imaginary, depth);
      first += m;
    }
}

// row[i] = c[i] + d[i], for whole vectors
template <class T>
void add_parts(const T* c, const T* d, T* row, int64_t count) {
  using V = Vector<T>;
  for (int64_t i = 0; i < count; i += kWidth<T>) store_vector(load<V>(c + i) + load<V>(d + i), row + i);
}

}  // namespace
}  // namespace equiconv::EQUICONV_ISA
