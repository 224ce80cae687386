// A plane of a field at a time: its norms, the pixels of its windows, and then its channels one after the other.
#pragma GCC optimize("fp-contract=off")  // x * x + y * y is y * y + x * x then: norms that are equal stay equal
#include "../norm_max_pool.h"

#include "field_tile.h"
#include "functions.h"
#include "window_taps.h"

namespace equiconv::EQUICONV_ISA {
namespace {

template <class T> using Place = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as the numbers

template <class T, class F>
struct Plane {
  const NormMaxPoolParams& p;
  int64_t batch;
  const FieldPoolField& field;
  int64_t pixels = p.x.size[0] * p.x.plane(), windows = p.y.size[0] * p.y.plane(), lanes = padded<T>(p.y.size[2]);
  T* norms = reinterpret_cast<T*>(p.scratch);
  T* sums = norms + padded<T>(pixels);
  Place<T>* chosen = reinterpret_cast<Place<T>*>(sums + padded<T>(pixels));  // of each window its pixel
  T* most = reinterpret_cast<T*>(chosen + padded<T>(windows));               // of each window in a row
  T* values = most + lanes;
  Place<T>* at = reinterpret_cast<Place<T>*>(values + lanes);

  F* memory(const WindowPoolTensor& t, int64_t c) const {
    return static_cast<F*>(t.data) + batch * t.stride_batch + (field.channel + c) * t.stride_channel;
  }

  // Calls body(pixel, number) for a channel: with a loop of its own where pixels lie side by side.
  template <class Body>
  void each(const WindowPoolTensor& t, int64_t c, int64_t count, Body body) const {
    F* at = memory(t, c);
    if (t.stride_pixel == 1)
      for (int64_t q = 0; q < count; ++q) body(q, at[q]);
    else
      for (int64_t q = 0; q < count; ++q) body(q, at[q * t.stride_pixel]);
  }

  void find_norms() const {
    T* const squares = norms;
    for (int64_t q = 0; q < padded<T>(pixels); ++q) squares[q] = 0;
    for (int64_t c = 0; c < field.size; ++c)
      each(p.x, c, pixels, [=](int64_t q, const F& v) { squares[q] += widen(v) * widen(v); });
    for (int64_t q = 0; q < pixels; q += kWidth<T>) vector_at(norms, q) = square_root<T>(vector_at(squares, q));
  }

  // The first of equal norms; the last that is no number.
  void choose() const {
    find_norms();
    Vector<Place<T>> apart;  // of windows that follow each other
    for (int l = 0; l < kWidth<T>; ++l) apart[l] = Place<T>(l * p.window.stride[2]);
    for (int64_t i = 0; i < p.y.size[0]; ++i)
      for (int64_t j = 0; j < p.y.size[1]; ++j) {
        for (int64_t l = 0; l < lanes; ++l) most[l] = -1, at[l] = 0;  // less than a norm
        each_row_of_taps(p.window, p.x.size, i, j, [&](int64_t, int64_t row, int64_t column) {
          for (int64_t c = 0; c < p.window.taps[2]; ++c) choose_among((row * p.x.size[1] + column) * p.x.size[2], c, apart);
        });
        Place<T>* const to = chosen + (i * p.y.size[1] + j) * p.y.size[2];
        for (int64_t o = 0; o < p.y.size[2]; ++o) to[o] = at[o];
      }
  }

  // The tap c of each window, in the row of pixels from `start` on
  void choose_among(int64_t start, int64_t c, const Vector<Place<T>>& apart) const {
    const WindowRows range = windows_with(p.window, 2, c, p.x.size[2], p.y.size[2]);
    const int64_t step = p.window.stride[2], begin = start + c * p.window.dilation[2] - p.window.padding[2];
    for (int64_t l = 0; l < range.first; ++l) values[l] = -1;
    for (int64_t o = range.first; o < range.last; ++o) values[o] = norms[begin + o * step];
    for (int64_t l = range.last; l < lanes; ++l) values[l] = -1;
    Vector<Place<T>> pixel = apart + Place<T>(begin);
    for (int64_t l = 0; l < lanes; l += kWidth<T>, pixel += Place<T>(step * kWidth<T>)) {
      const Vector<T> value = vector_at(values, l), found = vector_at(most, l);
      const auto takes = (value > found) | (value != value);
      vector_at(most, l) = takes ? value : found;
      vector_at(at, l) = takes ? pixel : vector_at(at, l);
    }
  }

  void forward() const {
    choose();
    for (int64_t c = 0; c < field.size; ++c) {
      const F* x = memory(p.x, c);
      each(p.y, c, windows, [=, this](int64_t o, F& y) { y = x[chosen[o] * p.x.stride_pixel]; });
    }
  }

  void backward() const {
    choose();
    T* const to = sums;
    for (int64_t c = 0; c < field.size; ++c) {
      for (int64_t q = 0; q < pixels; ++q) to[q] = 0;
      each(p.y, c, windows, [=, this](int64_t o, const F& grad) { to[chosen[o]] += widen(grad); });
      each(p.grad_x, c, pixels, [=](int64_t q, F& grad_x) { narrow(to[q], &grad_x); });
    }
  }
};

// Calls body(plane) for the planes that this thread takes.
template <class Body>
void each_plane(const NormMaxPoolParams& p, Body body) {
  with_dtype(p.dtype, [&](auto number) {
    using F = decltype(number);
    using T = typename Computed<F>::type;
    for (int64_t item; (item = __atomic_fetch_add(p.next_item, 1, __ATOMIC_RELAXED)) < p.batch * p.num_fields;)
      body(Plane<T, F>{p, item / p.num_fields, p.fields[item % p.num_fields]});
  });
}

}  // namespace

void norm_max_pool(const NormMaxPoolParams& p, int64_t, int64_t) {
  each_plane(p, [](const auto& plane) { plane.forward(); });
}

void norm_max_pool_bwd(const NormMaxPoolParams& p, int64_t, int64_t) {
  each_plane(p, [](const auto& plane) { plane.backward(); });
}

}  // namespace equiconv::EQUICONV_ISA
