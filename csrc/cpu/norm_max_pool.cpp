// A plane of a field at a time: its norms, the pixels of its windows, tap by tap, and then its channels one after the other.
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
  int64_t pixels = p.x.size[0] * p.x.plane(), windows = p.y.size[0] * p.y.plane();
  T* norms = reinterpret_cast<T*>(p.scratch);
  T* sums = norms + padded<T>(pixels);
  Place<T>* chosen = reinterpret_cast<Place<T>*>(sums + padded<T>(pixels));  // of each window its pixel
  T* most = reinterpret_cast<T*>(chosen + padded<T>(windows));               // of each window the largest norm so far
  T* values = most + padded<T>(windows);                                     // of each window the norm at one tap

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

  // A part of the memory that is used next, a few fields from here. In parts, or the computation would wait for it.
  template <bool kWrites>
  void ask_for(const WindowPoolTensor& t, int64_t fields, int64_t part, int64_t parts) const {
    if (t.stride_pixel != 1) return;
    const int64_t bytes = field.size * pixels * int64_t(sizeof(F)), first = bytes * part / parts;
    prefetch<kWrites>(reinterpret_cast<const char*>(memory(t, fields * field.size)) + first, bytes * (part + 1) / parts - first);
  }

  // Calls body(window, the pixel of its first tap) for the first window in each of these rows.
  template <class Body>
  void each_row(WindowRows planes, WindowRows rows, Body body) const {
    const auto& [taps, stride, padding, dilation] = p.window;
    for (int64_t i = planes.first; i < planes.last; ++i)
      for (int64_t j = rows.first; j < rows.last; ++j)
        body((i * p.y.size[1] + j) * p.y.size[2],
             ((i * stride[0] - padding[0]) * p.x.size[1] + j * stride[1] - padding[1]) * p.x.size[2] - padding[2]);
  }

  // The first of equal norms; the last that is no number.
  void choose() const {
    find_norms();
    for (int64_t w = 0; w < padded<T>(windows); ++w) most[w] = values[w] = -1, chosen[w] = 0;  // less than a norm
    const int64_t taps = p.window.taps[0] * p.window.taps[1] * p.window.taps[2];
    for (int64_t tap = 0; tap < taps; ++tap) {
      ask_for<false>(p.x, 1, tap, taps);
      if (p.grad_x.data != nullptr) ask_for<true>(p.grad_x, 0, tap, taps);
      choose_among(tap);
    }
    each_row({0, p.y.size[0]}, {0, p.y.size[1]}, [&](int64_t w, int64_t pixel) {
      for (int64_t o = 0; o < p.y.size[2]; ++o) chosen[w + o] += Place<T>(pixel + o * p.window.stride[2]);
    });
  }

  // The norms at that tap of all windows; chosen: how far the pixel lies from that of the first tap.
  void choose_among(int64_t tap) const {
    const WindowPoolGrid& grid = p.window;
    const int64_t c = tap % grid.taps[2], b = tap / grid.taps[2] % grid.taps[1], a = tap / grid.taps[2] / grid.taps[1];
    const WindowRows planes = windows_with(grid, 0, a, p.x.size[0], p.y.size[0]);
    const WindowRows rows = windows_with(grid, 1, b, p.x.size[1], p.y.size[1]);
    const WindowRows columns = windows_with(grid, 2, c, p.x.size[2], p.y.size[2]);
    const int64_t step = grid.stride[2];
    const int64_t away = (a * grid.dilation[0] * p.x.size[1] + b * grid.dilation[1]) * p.x.size[2] + c * grid.dilation[2];
    if ((planes.last - planes.first) * (rows.last - rows.first) * (columns.last - columns.first) < windows)
      for (int64_t w = 0; w < windows; ++w) values[w] = -1;
    each_row(planes, rows, [&](int64_t w, int64_t pixel) {
      for (int64_t o = columns.first; o < columns.last; ++o) values[w + o] = norms[pixel + away + o * step];
    });
    for (int64_t w = 0; w < windows; w += kWidth<T>) {
      const Vector<T> value = vector_at(values, w), found = vector_at(most, w);
      const auto takes = (value > found) | (value != value);
      vector_at(most, w) = takes ? value : found;
      vector_at(chosen, w) = takes ? Place<T>(away) + Vector<Place<T>>{} : vector_at(chosen, w);
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

constexpr int64_t kRun = 8;  // fields that a thread takes one after the other, as they lie in memory

// Calls body(plane) for the planes that this thread takes.
template <class Body>
void each_plane(const NormMaxPoolParams& p, Body body) {
  with_dtype(p.dtype, [&](auto number) {
    using F = decltype(number);
    using T = typename Computed<F>::type;
    const int64_t runs = (p.num_fields + kRun - 1) / kRun;
    for (int64_t item; (item = __atomic_fetch_add(p.next_item, 1, __ATOMIC_RELAXED)) < p.batch * runs;) {
      const int64_t first = item % runs * kRun, last = first + kRun < p.num_fields ? first + kRun : p.num_fields;
      for (int64_t f = first; f < last; ++f) body(Plane<T, F>{p, item / runs, p.fields[f]});
    }
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
