// Sixteen field pairs at a time: every number of the kernels below is a vector over them (the lanes).
//
// forward, for a tile of lanes:   w [D] -> X [n, m, h] (sparse) -> V [n, j, h] (Q_in) -> Y [i, j, h] (Q_out)
//                                 -> filter [i, j, s] (H)
// backward:                       the same steps transposed, in the opposite order.
#include "../expand_filter.h"

#include <type_traits>

#include "numbers.h"
#include "simd.h"

namespace equiconv::EQUICONV_ISA {
namespace {

constexpr int kLanes = kExpandFilterLanes;
template <class T> constexpr int kVectors = kLanes / kWidth<T>;  // of the lanes

// ---- rows of lanes <-> vectors over lanes ----------------------------------------------------------------------

// out[c, lane] = rows[lane][at + c], c < count, at least as wide as V. The last square overlaps the one before it.
template <class V, class T>
void transpose_rows(const T* const* rows, int64_t at, int64_t count, T* out) {
  constexpr int64_t kWide = sizeof(V) / sizeof(T);
  for (int first = 0; first < kLanes; first += kWide)
    for (int64_t c = 0; c < count; c += kWide) {
      const int64_t place = c + kWide <= count ? c : count - kWide;
      transpose_square<V>(rows + first, at + place, out + place * kLanes + first, kLanes);
    }
}

template <class T>
void lanes_from_rows(const T* const* rows, int64_t at, int64_t count, T* out) {
  if (count >= kWidth<T>) return transpose_rows<Vector<T>>(rows, at, count, out);
  if (count >= kWidth<T> / 2) return transpose_rows<HalfVector<T>>(rows, at, count, out);
  for (int64_t c = 0; c < count; ++c)
    for (int l = 0; l < kLanes; ++l) out[c * kLanes + l] = rows[l][at + c];
}

// out[lane, c] = in[c, lane], c < count, at least as wide as V
template <class V, class T>
void rows_from_lanes(const T* in, int64_t count, T* out) {
  constexpr int64_t kWide = sizeof(V) / sizeof(T);
  for (int64_t c = 0; c < count; c += kWide) {
    const int64_t place = c + kWide <= count ? c : count - kWide;
    const T* rows[kWide];
    for (int r = 0; r < kWide; ++r) rows[r] = in + (place + r) * kLanes;
    for (int first = 0; first < kLanes; first += kWide)
      transpose_square<V>(rows, first, out + first * count + place, count);
  }
}

// ---- one tile of lanes -----------------------------------------------------------------------------------------

template <class T>
struct Tile {
  const ExpandFilterParams& params;
  const ExpandFilterPair& pair;
  int64_t n, m, r;                  // out_size, in_size, harmonics
  int64_t first, lanes;             // field pairs: output field * in_fields + input field
  int64_t offset[kLanes];           // of element [0, 0, 0] in the filter
  int64_t row, taps_width;          // length of V[n] and Y[i]; of a lane's taps
  T *weights, *x, *v, *y, *taps;    // scratch: [D], [m, h], [n, j, h], [i, j, h], each times lanes; [lanes, taps]

  Tile(const ExpandFilterParams& params, const ExpandFilterPair& pair, int64_t first)
      : params(params), pair(pair), n(pair.out_size), m(pair.in_size), r(pair.harmonics), first(first) {
    const int64_t total = int64_t(pair.out_fields) * pair.in_fields;
    lanes = total - first < kLanes ? total - first : kLanes;
    const int32_t* out_channels = params.index + pair.out_channels_start;
    const int32_t* in_channels = params.index + pair.in_channels_start;
    for (int64_t l = 0; l < kLanes; ++l) {  // idle lanes repeat the last one
      const uint32_t q = uint32_t(first + (l < lanes ? l : lanes - 1));  // 32 bits: a division is several times faster
      const uint32_t out_field = q / uint32_t(pair.in_fields), in_field = q - out_field * uint32_t(pair.in_fields);
      offset[l] = out_channels[out_field] * params.stride_out + in_channels[in_field] * params.stride_in;
    }
    row = expand_filter_row(pair);
    taps_width = expand_filter_taps(params.taps);
    weights = reinterpret_cast<T*>(params.scratch);
    taps = weights + pair.paths * kLanes;
    x = taps + taps_width * kLanes;
    v = x + m * r * kLanes;
    y = pair.out_basis_start < 0 ? v : v + n * row;
  }

  const T* values(int32_t start) const { return static_cast<const T*>(params.values) + start; }
  T* pair_weights() const { return static_cast<T*>(params.weights) + pair.weights_start + first * pair.paths; }
  T* x_of(int64_t i) const { return pair.in_basis_start < 0 ? v + i * row : x; }
  T* y_of(int64_t i, int64_t j) const { return y + i * row + j * r * kLanes; }

  void load_weights() {
    const T* rows[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) rows[l] = pair_weights() + (l < lanes ? l : lanes - 1) * pair.paths;
    lanes_from_rows(rows, 0, pair.paths, weights);
  }

  void store_weights() {
    T* to = pair_weights();
    if (lanes == kLanes && pair.paths >= kWidth<T>) return rows_from_lanes<Vector<T>>(weights, pair.paths, to);
    if (lanes == kLanes && pair.paths >= kWidth<T> / 2) return rows_from_lanes<HalfVector<T>>(weights, pair.paths, to);
    for (int64_t l = 0; l < lanes; ++l)
      for (int64_t p = 0; p < pair.paths; ++p) to[l * pair.paths + p] = weights[p * kLanes + l];
  }

  // X[n, m, h] = sum_p T[p, n, m, h] w[p], for n = i
  void combine_paths(int64_t i) {
    const int64_t rows = m * r;
    const int32_t* start = params.index + pair.row_start + i * rows;
    const int32_t* path = params.index + pair.terms_start;
    const T* coefficient = values(pair.coefficients_start);
    T* out = x_of(i);
    for (int64_t k = 0; k < rows; ++k) {
      Vector<T> sum[kVectors<T>] = {};
      for (int32_t t = start[k]; t < start[k + 1]; ++t)
        for (int u = 0; u < kVectors<T>; ++u)
          sum[u] += coefficient[t] * *reinterpret_cast<const Vector<T>*>(weights + path[t] * kLanes + u * kWidth<T>);
      for (int u = 0; u < kVectors<T>; ++u) *reinterpret_cast<Vector<T>*>(out + k * kLanes + u * kWidth<T>) = sum[u];
    }
  }

  // w[p] += sum_(m,h) T[p, n, m, h] X[n, m, h], for n = i
  void split_paths(int64_t i) {
    const int64_t rows = m * r;
    const int32_t* start = params.index + pair.row_start + i * rows;
    const int32_t* path = params.index + pair.terms_start;
    const T* coefficient = values(pair.coefficients_start);
    const T* from = x_of(i);
    for (int64_t k = 0; k < rows; ++k)
      for (int32_t t = start[k]; t < start[k + 1]; ++t)
        for (int u = 0; u < kVectors<T>; ++u)
          *reinterpret_cast<Vector<T>*>(weights + path[t] * kLanes + u * kWidth<T>) +=
              coefficient[t] * *reinterpret_cast<const Vector<T>*>(from + k * kLanes + u * kWidth<T>);
  }

  template <class F>
  void store_taps(int64_t i, int64_t j) {
    const int64_t at = i * params.stride_out + j * params.stride_in;
    F* filter = static_cast<F*>(params.filter);
    for (int64_t l = 0; l < lanes; ++l) {
      F* to = filter + offset[l] + at;
      const T* from = taps + l * taps_width;
      if constexpr (std::is_same_v<T, F>)
        if (params.stride_tap == 1) {
          copy_row(from, params.taps, to);
          continue;
        }
      for (int64_t s = 0; s < params.taps; ++s) narrow(from[s], to + s * params.stride_tap);
    }
  }

  // Taps of the lanes, ahead of their use: between the lanes the filter is too scattered for the hardware to guess.
  template <int kForWriting, class Row>
  void prefetch_taps(const Row* rows, int64_t at) const {
    for (int64_t l = 0; l < kLanes; ++l)
      for (int64_t s = 0; s < params.taps; s += 64 / sizeof(T)) __builtin_prefetch(rows[l] + at + s, kForWriting);
  }

  // The filter of (i, j) from its even and its odd part, each a sum for half of the taps only.
  void sum_mirrored(int64_t i, int64_t j, const ScatteredRows<T>& out) {
    constexpr int kRows = kBlockSums / 3;  // even and odd sums, and registers to spare
    const int64_t half = (params.taps + 1) / 2, width = half < kWidth<T> ? kWidth<T> : half;
    const T *y = y_of(i, j), *harmonics = values(pair.harmonics_start);
    for (int64_t s = 0; s < width; s += kWidth<T>) {
      const int64_t at = s + kWidth<T> <= width ? s : width - kWidth<T>;
      for (int l = 0; l < kLanes; l += kRows) {
        Vector<T> even[kRows] = {}, odd[kRows] = {};
        int64_t h = 0;
        for (; h < pair.even_harmonics; ++h) add_harmonic(y + h * kLanes + l, harmonics + h * params.taps + at, even);
        for (; h < r; ++h) add_harmonic(y + h * kLanes + l, harmonics + h * params.taps + at, odd);
        for (int k = 0; k < kRows; ++k) {
          T* to = out[l + k];
          *reinterpret_cast<Vector<T>*>(to + at) = even[k] + odd[k];
          *reinterpret_cast<Vector<T>*>(to + params.taps - kWidth<T> - at) = reversed(even[k] - odd[k]);
        }
      }
    }
  }

  template <int kRows>
  static void add_harmonic(const T* y, const T* harmonic, Vector<T> (&sum)[kRows]) {
    const auto taps = *reinterpret_cast<const Vector<T>*>(harmonic);
    for (int k = 0; k < kRows; ++k) sum[k] += y[k] * taps;
  }

  template <class F>
  void forward() {
    load_weights();
    for (int64_t i = 0; i < n; ++i) {
      combine_paths(i);
      if (pair.in_basis_start >= 0)
        multiply<T>({values(pair.in_basis_start), m, 1}, Rows<T>{x, r * kLanes}, Rows<T>{v + i * row, r * kLanes}, m, m, r * kLanes);
    }
    if (pair.out_basis_start >= 0) multiply<T>({values(pair.out_basis_start), n, 1}, Rows<T>{v, row}, Rows<T>{y, row}, n, n, m * r * kLanes);
    const T* harmonics = values(pair.harmonics_start);
    T* rows[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) rows[l] = static_cast<T*>(params.filter) + offset[l];
    const bool direct = std::is_same_v<T, F> && params.stride_tap == 1 && params.taps >= kWidth<T>;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        // Lanes are the rows here and taps the vectors: what comes out is in the filter's own order.
        const Matrix<T> lanes_by_harmonics{y_of(i, j), 1, kLanes};
        if (direct) {
          const ScatteredRows<T> out{rows, i * params.stride_out + j * params.stride_in};
          prefetch_taps<1>(rows, out.at + params.stride_out);
          if (pair.even_harmonics >= 0) {
            sum_mirrored(i, j, out);
            continue;
          }
          multiply(lanes_by_harmonics, Rows<const T>{harmonics, params.taps}, out, kLanes, r, params.taps);
        } else {
          multiply(lanes_by_harmonics, Rows<const T>{harmonics, params.taps}, Rows<T>{taps, taps_width}, kLanes, r, taps_width);
          store_taps<F>(i, j);
        }
      }
  }

  // taps[s, lane]: the transpose of what the filter holds
  template <class F>
  void load_taps(const F* const* rows, int64_t i, int64_t j) {
    const int64_t at = i * params.stride_out + j * params.stride_in;
    if constexpr (std::is_same_v<T, F>)
      if (params.stride_tap == 1) {
        prefetch_taps<0>(rows, at + params.stride_out);
        return lanes_from_rows(rows, at, params.taps, taps);
      }
    for (int64_t s = 0; s < params.taps; ++s)
      for (int64_t l = 0; l < kLanes; ++l) taps[s * kLanes + l] = widen(rows[l][at + s * params.stride_tap]);
  }

  // From taps to the harmonics' products with them; with known parities, from the sums and differences of mirrored taps.
  void apply_harmonics(T* out) {
    const T* harmonics = values(pair.harmonics_start);
    const int64_t evens = pair.even_harmonics, all = params.taps, half = (all + 1) / 2;
    const Rows<T> at{taps, kLanes}, to{out, kLanes};
    if (evens < 0) return multiply<T>({harmonics, all, 1}, at, to, r, all, kLanes);
    for (int64_t s = 0; s < all / 2; ++s)
      for (int u = 0; u < kLanes; u += kWidth<T>) {
        auto &low = *reinterpret_cast<Vector<T>*>(at[s] + u), &high = *reinterpret_cast<Vector<T>*>(at[all - 1 - s] + u);
        const auto difference = high - low;
        low += high;
        high = difference;
      }
    multiply<T>({harmonics, all, 1}, at, to, evens, half, kLanes);
    multiply<T>({harmonics + evens * all + half, all, 1}, at.from(half), to.from(evens), r - evens, all - half, kLanes);
  }

  template <class F>
  void backward() {
    const F* rows[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) rows[l] = static_cast<const F*>(params.filter) + offset[l];
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        load_taps(rows, i, j);
        apply_harmonics(y_of(i, j));
      }
    if (pair.out_basis_start >= 0) multiply<T>({values(pair.out_basis_start), 1, n}, Rows<T>{y, row}, Rows<T>{v, row}, n, n, m * r * kLanes);
    for (int64_t k = 0; k < pair.paths * kLanes; ++k) weights[k] = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (pair.in_basis_start >= 0)
        multiply<T>({values(pair.in_basis_start), 1, m}, Rows<T>{v + i * row, r * kLanes}, Rows<T>{x, r * kLanes}, m, m, r * kLanes);
      split_paths(i);
    }
    store_weights();
  }

  template <class F>
  void zero() {  // a pair without paths
    for (int64_t k = 0; k < kLanes * taps_width; ++k) taps[k] = 0;
    for (int64_t i = 0; i < pair.out_size; ++i)
      for (int64_t j = 0; j < pair.in_size; ++j) store_taps<F>(i, j);
  }
};

// Threads take tiles as they go: tiles of different pairs of representations cost differently.
template <class Body>
void each_tile(const ExpandFilterParams& params, Body body) {
  const auto take = [&] { return __atomic_fetch_add(params.next_tile, 1, __ATOMIC_RELAXED); };
  int64_t tile = 0, mine = take();
  for (int64_t p = 0; p < params.num_pairs; ++p) {
    const ExpandFilterPair& pair = params.pairs[p];
    const int64_t total = int64_t(pair.out_fields) * pair.in_fields;
    for (int64_t first = 0; first < total; first += kLanes, ++tile)
      if (tile == mine) {
        body(pair, first);
        mine = take();
      }
  }
}

template <class T, class F>
void forward(const ExpandFilterParams& params) {
  each_tile(params, [&](const ExpandFilterPair& pair, int64_t first) {
    Tile<T> tile(params, pair, first);
    pair.paths == 0 ? tile.template zero<F>() : tile.template forward<F>();
  });
}

template <class T, class F>
void backward(const ExpandFilterParams& params) {
  each_tile(params, [&](const ExpandFilterPair& pair, int64_t first) {
    if (pair.paths > 0) Tile<T>(params, pair, first).template backward<F>();
  });
}

}  // namespace

// One thread's part. How many threads there are does not matter: they share the tiles.
void expand_filter(const ExpandFilterParams& params, int64_t, int64_t) {
  switch (params.filter_dtype) {
    case DType::f32: return forward<float, float>(params);
    case DType::bf16: return forward<float, bf16>(params);
    case DType::f16: return forward<float, f16>(params);
    case DType::f64: return forward<double, double>(params);
  }
}

void expand_filter_bwd(const ExpandFilterParams& params, int64_t, int64_t) {
  switch (params.filter_dtype) {
    case DType::f32: return backward<float, float>(params);
    case DType::bf16: return backward<float, bf16>(params);
    case DType::f16: return backward<float, f16>(params);
    case DType::f64: return backward<double, double>(params);
  }
}

}  // namespace equiconv::EQUICONV_ISA
