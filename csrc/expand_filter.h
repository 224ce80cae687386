// expand_filter: the filter of a steerable convolution from its weights, for all pairs of representations.
//
//   filter[o + i, c + j, s] = sum_p w[p] sum_(n,m,h) Q_out[i, n] T[p, n, m, h] H[h, s] Q_in^-1[m, j]
//
// and expand_filter_bwd, its transpose: grad_filter -> grad_weights. No torch in this file.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace equiconv {

// One (input, output) pair of representations: a row of the table that equiconv/layout/plan.py makes, which says what
// each number is. A pair without paths is a zero block of the filter.
struct ExpandFilterPair {
  int32_t weights_start, paths, out_fields, in_fields, out_size, in_size, harmonics, even_harmonics;
  int32_t out_channels_start, in_channels_start, row_start, terms_start, coefficients_start, path_start, path_terms_start;
  int32_t out_basis_start, in_basis_start, harmonics_start, blocks_start;
};

// The filter is addressed as [out_channel, in_channel, tap], whatever its memory format and whether it is transposed.
struct ExpandFilterParams {
  const ExpandFilterPair* pairs;  // [num_pairs]
  const int32_t* index;
  const void* values;
  void* weights;                  // forward: read; backward: written (the gradient)
  void* filter;                   // forward: written; backward: read (the gradient)
  int64_t num_pairs, taps;
  int64_t stride_out, stride_in, stride_tap;  // of the filter, in elements
  DType dtype;                    // of weights and values: f32 or f64
  DType filter_dtype;             // f64 with f64, else f32, bf16 or f16
  // CPU only
  int64_t* next_tile;             // shared by the threads: counts the tiles that one of them has taken
  char* scratch;                  // of the calling thread, 64-byte aligned: expand_filter_scratch numbers
};

constexpr int kExpandFilterLanes = 16;  // field pairs that a CPU worker treats at a time

// Length of a row of V and Y in a CPU worker's scratch; one line more than needed, or rows may all fall on one cache set.
constexpr int64_t expand_filter_row(const ExpandFilterPair& pair) {
  return (int64_t(pair.in_size) * pair.harmonics + 1) * kExpandFilterLanes;
}

// Length of a lane's taps in a CPU worker's scratch. Their even and odd halves, each of whole vectors, fit as well.
constexpr int64_t expand_filter_taps(int64_t taps) {
  return (taps / kExpandFilterLanes + 2) * kExpandFilterLanes;
}

// Numbers of scratch that a CPU worker needs for a pair: weights, taps, X, V and Y, all times the lanes.
constexpr int64_t expand_filter_scratch(const ExpandFilterPair& pair, int64_t taps) {
  const int64_t vectors = pair.paths + expand_filter_taps(taps) + int64_t(pair.in_size) * pair.harmonics;
  return kExpandFilterLanes * vectors + 2 * pair.out_size * expand_filter_row(pair);
}

}  // namespace equiconv
