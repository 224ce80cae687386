// Tiles of a FieldTensor: some channels of some pixels as rows of vectors over the pixels, in the dtype that is computed
// with. Local to the file that includes it (see isa.h).
#pragma once
#include <type_traits>

#include "../field_tensor.h"
#include "numbers.h"
#include "simd.h"

namespace equiconv::EQUICONV_ISA {
namespace {

struct Pixels {
  int64_t batch, first, count;
};

template <class T>
inline int64_t padded(int64_t lanes) {
  return (lanes + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// The distance between the rows of a tile in scratch: were it a power of two, they would fall on few sets of the cache.
template <class T>
inline int64_t row_stride(int64_t lanes) {
  return padded<T>(lanes) + 16;
}

template <class T>
inline Vector<T>& vector_at(T* row, int64_t lane) {
  return *reinterpret_cast<Vector<T>*>(row + lane);
}

template <class T>
inline const Vector<T>& vector_at(const T* row, int64_t lane) {
  return *reinterpret_cast<const Vector<T>*>(row + lane);
}

// Calls body(item, run, part) for the items that this thread takes.
template <class Body>
inline void each_item(const FieldWork& work, Body body) {
  const int64_t items = work.num_runs * work.parts;
  for (int64_t item; (item = __atomic_fetch_add(work.next_item, 1, __ATOMIC_RELAXED)) < items;)
    body(work.runs[item / work.parts], item % work.parts);
}

// Calls body(Pixels) for the tiles of a part. All but the last of an image consist of whole vectors.
template <class T, class Body>
inline void each_tile(const FieldWork& work, const FieldTensor& x, int64_t part, Body body) {
  const auto [begin, end] = work.part_range(x, part);
  for (int64_t n = begin; n < end;) {
    const int64_t batch = n / x.pixels, first = n - batch * x.pixels;
    int64_t count = x.pixels - first;
    if (count > end - n) count = end - n;
    if (count > work.lanes) count = work.lanes;
    if (count > kWidth<T>) count -= count % kWidth<T>;
    body(Pixels{batch, first, count});
    n += count;
  }
}

// Where element [channel, 0] of the tile lies.
template <class F>
inline F* tile_data(const FieldTensor& x, const Pixels& pixels, int64_t channel) {
  return static_cast<F*>(x.data) + pixels.batch * x.stride_batch + channel * x.stride_channel + pixels.first * x.stride_pixel;
}

// Whether memory has the rows of the tile as they are computed with.
template <class T, class F>
inline bool is_in_place(const FieldTensor& x, const Pixels& pixels) {
  return std::is_same_v<T, F> && x.stride_pixel == 1 && pixels.count % kWidth<T> == 0;
}

// out[column, row] = in[row, column] for rows x columns numbers
template <class T>
inline void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  constexpr int64_t kWide = kWidth<T>;
  if (rows < kWide || columns < kWide) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
    return;
  }
  for (int64_t r = 0; r < rows; r += kWide) {  // the last square of a row or column overlaps the one before it
    const int64_t row = r + kWide <= rows ? r : rows - kWide;
    const T* from[kWide];
    for (int64_t k = 0; k < kWide; ++k) from[k] = in + (row + k) * in_stride;
    for (int64_t c = 0; c < columns; c += kWide) {
      const int64_t column = c + kWide <= columns ? c : columns - kWide;
      transpose_square<Vector<T>>(from, column, out + column * out_stride + row, out_stride);
    }
  }
}

// The rows of a tile: in memory, or else in the scratch, where lanes that make up whole vectors are zero.
template <class T, class F>
inline Rows<const T> load_tile(const FieldTensor& x, const Pixels& pixels, int64_t channel, int64_t channels, T* scratch) {
  F* data = tile_data<F>(x, pixels, channel);
  if constexpr (std::is_same_v<T, F>)
    if (is_in_place<T, F>(x, pixels)) return {data, x.stride_channel};
  const int64_t lanes = pixels.count, stride = row_stride<T>(lanes);
  if constexpr (std::is_same_v<T, F>)
    if (x.stride_pixel != 1) {
      transpose<T>(data, x.stride_pixel, lanes, channels, scratch, stride);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t l = lanes; l < padded<T>(lanes); ++l) scratch[c * stride + l] = 0;
      return {scratch, stride};
    }
  for (int64_t c = 0; c < channels; ++c) {
    const F* from = data + c * x.stride_channel;
    T* to = scratch + c * stride;
    if (x.stride_pixel == 1)
      for (int64_t l = 0; l < lanes; ++l) to[l] = widen(from[l]);
    else
      for (int64_t l = 0; l < lanes; ++l) to[l] = widen(from[l * x.stride_pixel]);
    for (int64_t l = lanes; l < padded<T>(lanes); ++l) to[l] = 0;
  }
  return {scratch, stride};
}

// Where the rows of a tile are to be written: store_tile then brings them where they belong.
template <class T, class F>
inline Rows<T> target_tile(const FieldTensor& y, const Pixels& pixels, int64_t channel, T* scratch) {
  if constexpr (std::is_same_v<T, F>)
    if (is_in_place<T, F>(y, pixels)) return {tile_data<T>(y, pixels, channel), y.stride_channel};
  return {scratch, row_stride<T>(pixels.count)};
}

template <class T, class F>
inline void store_tile(const FieldTensor& y, const Pixels& pixels, int64_t channel, int64_t channels, const Rows<T>& rows) {
  if (is_in_place<T, F>(y, pixels)) return;
  F* data = tile_data<F>(y, pixels, channel);
  if constexpr (std::is_same_v<T, F>)
    if (y.stride_pixel != 1) return transpose<T>(rows.data, rows.stride, channels, pixels.count, data, y.stride_pixel);
  for (int64_t c = 0; c < channels; ++c) {
    F* to = data + c * y.stride_channel;
    if (y.stride_pixel == 1)
      for (int64_t l = 0; l < pixels.count; ++l) narrow(rows[c][l], to + l);
    else
      for (int64_t l = 0; l < pixels.count; ++l) narrow(rows[c][l], to + l * y.stride_pixel);
  }
}

// Asks for memory that is read, or written, soon, where the processor does not look ahead: in another channel.
template <bool kWrites>
inline void prefetch(const void* memory, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(memory) + b, kWrites);
}

// The sum of a row of whole vectors, of f(lane) at each of them.
template <class T, class F>
inline T sum_lanes(int64_t lanes, F f) {
  Vector<T> sums[4] = {};
  int64_t l = 0;
  for (; l + 4 * kWidth<T> <= lanes; l += 4 * kWidth<T>)
    for (int u = 0; u < 4; ++u) sums[u] += f(l + u * kWidth<T>);
  for (; l < lanes; l += kWidth<T>) sums[0] += f(l);
  const Vector<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T total = 0;
  for (int i = 0; i < kWidth<T>; ++i) total += sum[i];
  return total;
}

// Calls f with a value of the type that numbers have in memory; T of f is Computed<F>.
template <class F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::bf16: return f(bf16());
    case DType::f16: return f(f16());
  }
}

}  // namespace
}  // namespace equiconv::EQUICONV_ISA
