// What z is made of: harmonics of a component, and sums of them. For kernel files, as simd.h is.
#pragma once
#include "../steerable_conv.h"

#include "simd.h"

namespace equiconv::EQUICONV_ISA {
namespace {

using namespace equiconv::steerable;

template <class T>
struct HarmonicsCall {
  const ResolvedPosition* positions;
  const int64_t* counts;
  const T* coefficients;
  const T* planes;             // of the component
  const int64_t* at;           // [vectors]: where the vectors of pixels begin in them
  int64_t vectors;
  T* const* out;               // even harmonics, then odd ones
  int64_t even, odd;
};

// N vectors of pixels, from number `first` on, of E even and O odd harmonics
template <int E, int O, bool kMiddleOdd, int N, class T>
inline __attribute__((always_inline)) void harmonics_block(const HarmonicsCall<T>& call, int64_t first) {
  using V = Vector<T>;
  const T* from[N];
  for (int n = 0; n < N; ++n) from[n] = call.planes + call.at[first + n];
  V even[E > 0 ? E : 1][N] = {}, odd[O > 0 ? O : 1][N] = {};
  const ResolvedPosition* position = call.positions;
  const T* coefficient = call.coefficients;
  const auto middle = [&](int64_t here, int64_t mirrored, int n) {
    const V a = load<V>(from[n] + here), b = load<V>(from[n] + mirrored);
    return kMiddleOdd ? a - b : a + b;
  };
  const auto add_even = [&](const V (&taps)[N]) {
    for (int e = 0; e < E; ++e)
      for (int n = 0; n < N; ++n) even[e][n] += coefficient[e] * taps[n];
  };
  const auto add_odd = [&](const V (&taps)[N]) {
    for (int o = 0; o < O; ++o)
      for (int n = 0; n < N; ++n) odd[o][n] += coefficient[E + o] * taps[n];
  };
  V taps[N], mirrored[N];
  for (int64_t i = 0; i < call.counts[0]; ++i, ++position, coefficient += E) {
    for (int n = 0; n < N; ++n) taps[n] = load<V>(from[n] + position->at[0]);
    add_even(taps);
  }
  for (int64_t i = 0; i < call.counts[1]; ++i, ++position, coefficient += E) {
    for (int n = 0; n < N; ++n) taps[n] = middle(position->at[0], position->at[1], n);
    add_even(taps);
  }
  const auto add_both = [&] {
    V sum[N], difference[N];
    for (int n = 0; n < N; ++n) sum[n] = taps[n] + mirrored[n], difference[n] = taps[n] - mirrored[n];
    add_even(sum);
    add_odd(difference);
    coefficient += E + O;
  };
  for (int64_t i = 0; i < call.counts[2]; ++i, ++position) {
    for (int n = 0; n < N; ++n) {
      taps[n] = load<V>(from[n] + position->at[0]);
      mirrored[n] = load<V>(from[n] + position->at[2]);
    }
    add_both();
  }
  for (int64_t i = 0; i < call.counts[3]; ++i, ++position) {
    for (int n = 0; n < N; ++n) {
      taps[n] = middle(position->at[0], position->at[1], n);
      mirrored[n] = middle(position->at[2], position->at[3], n);
    }
    add_both();
  }
  for (int e = 0; e < E; ++e)
    for (int n = 0; n < N; ++n) store_vector(even[e][n], call.out[e] + (first + n) * kWidth<T>);
  for (int o = 0; o < O; ++o)
    for (int n = 0; n < N; ++n) store_vector(odd[o][n], call.out[E + o] + (first + n) * kWidth<T>);
}

// N vectors at a time while there are so many, then half as many.
template <int E, int O, bool kMiddleOdd, int N, class T>
void harmonics_of(const HarmonicsCall<T>& call, int64_t first = 0) {
  for (; first + N <= call.vectors; first += N) harmonics_block<E, O, kMiddleOdd, N>(call, first);
  if constexpr (N > 1)
    if (first < call.vectors) harmonics_of<E, O, kMiddleOdd, N / 2>(call, first);
}

// From numbers that are known at run time to those that the compiler needs.
template <int E, int O, bool kMiddleOdd, class T>
inline void select_odd(const HarmonicsCall<T>& call) {
  if constexpr (O >= 0) {
    constexpr int kSums = E + O, kVectors = 4 * kSums <= kBlockSums * 2 / 3 ? 4 : 2 * kSums <= kBlockSums - 4 ? 2 : 1;
    if (call.odd == O) return harmonics_of<E, O, kMiddleOdd, kVectors>(call);
    select_odd<E, O - 1, kMiddleOdd>(call);
  }
}

template <int E, bool kMiddleOdd, class T>
inline void select_even(const HarmonicsCall<T>& call) {
  if constexpr (E >= 0) {
    if (call.even == E) return select_odd<E, kMaxOdd, kMiddleOdd>(call);
    select_even<E - 1, kMiddleOdd>(call);
  }
}

// ---- sums ------------------------------------------------------------------------------------------------------

// out[i] = sum_t coefficient[t] in[t][i], i < count, whole vectors; kTerms of 0: any number of terms
template <int kTerms, class T>
void combine_terms(const T* const* in, const T* coefficients, int64_t terms, T* out, int64_t count) {
  using V = Vector<T>;
  const T* rows[kTerms > 0 ? kTerms : 1];
  for (int t = 0; t < kTerms; ++t) rows[t] = in[t];
  for (int64_t i = 0; i < count; i += kWidth<T>) {
    V sum = {};
    for (int t = 0; t < kTerms; ++t) sum += coefficients[t] * load<V>(rows[t] + i);
    for (int64_t t = kTerms; t < terms; ++t) sum += coefficients[t] * load<V>(in[t] + i);
    store_vector(sum, out + i);
  }
}

template <class T>
void combine(const T* const* in, const T* coefficients, int64_t terms, T* out, int64_t count) {
  switch (terms) {
    case 1: return combine_terms<1>(in, coefficients, 1, out, count);
    case 2: return combine_terms<2>(in, coefficients, 2, out, count);
    case 3: return combine_terms<3>(in, coefficients, 3, out, count);
    case 4: return combine_terms<4>(in, coefficients, 4, out, count);
    default: return combine_terms<0>(in, coefficients, terms, out, count);
  }
}

}  // namespace
}  // namespace equiconv::EQUICONV_ISA
