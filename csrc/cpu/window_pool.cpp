// The channels of a pixel are the lanes of a vector: tiles are [pixels, lanes], whatever the memory format. Windows are
// taken a row at a time, tap by tap, so that their bounds are found once for a row.
#include "../window_pool.h"

#include "field_tile.h"
#include "window_taps.h"

namespace equiconv::EQUICONV_ISA {
namespace {

// The windows without dilation that have a tap at `place`: [begin, end) of `count`.
struct Owners {
  int64_t reach, begin, end;  // reach: the tap of window 0

  Owners(const WindowPoolGrid& grid, int d, int64_t place, int64_t count) : reach(place + grid.padding[d]) {
    begin = reach < grid.taps[d] ? 0 : (reach - grid.taps[d]) / grid.stride[d] + 1;
    end = reach / grid.stride[d] + 1;
    if (end > count) end = count;
  }
};

// Some rows of a plane or volume, as far as a tile holds them; with zeros beyond both ends of the last dimension.
template <class T>
struct Tile {
  T* data;
  WindowRows rows;
  const int64_t* size;
  WindowMargin margin;

  int64_t pitch() const { return margin.left + size[2] + margin.right; }
  int64_t pixels() const { return (rows.last - rows.first) * size[1] * pitch(); }
  T* at(int64_t i, int64_t j, int64_t k) const {
    return data + (((i - rows.first) * size[1] + j) * pitch() + margin.left + k) * kWidth<T>;
  }

  // Calls body(i, j, the row)
  template <class Body>
  void each_row(Body body) const {
    for (int64_t i = rows.first; i < rows.last; ++i)
      for (int64_t j = 0; j < size[1]; ++j) body(i, j, at(i, j, 0));
  }

  void fill(T value) const {
    for (int64_t q = 0; q < pixels(); ++q) vector_at(data, q * kWidth<T>) = value + Vector<T>{};
  }
};

// Calls body(tap, window, vector) for all taps within the grid of the windows in row (i, j), of which there are `count`.
template <class T, class Body>
inline __attribute__((always_inline)) void each_tap(const WindowPoolGrid& grid, const Tile<T>& tile, int64_t i, int64_t j, int64_t count, Body body) {
  each_row_of_taps(grid, tile.size, i, j, [&](int64_t tap, int64_t row, int64_t column) {
    T* const from = tile.at(row, column, 0);
    for (int64_t c = 0; c < grid.taps[2]; ++c) {
      const WindowRows windows = windows_with(grid, 2, c, tile.size[2], count);
      const int64_t step = grid.stride[2], start = c * grid.dilation[2] - grid.padding[2];
      for (int64_t o = windows.first; o < windows.last; ++o) body(tap + c, o, vector_at(from, (o * step + start) * kWidth<T>));
    }
  });
}

// How far the vectors of a sum along a row lie from each other.
struct SumSteps {
  int64_t in, tap, weight, out;
};

// out[u] += sum_c weights[c] in[u, c] for N of them
template <int N, class T>
inline void add_sums(const T* in, const T* weights, int64_t taps, T* out, const SumSteps& steps) {
  Vector<T> sum[N];
#pragma GCC unroll 8
  for (int u = 0; u < N; ++u) sum[u] = vector_at(out, u * steps.out * kWidth<T>);
  for (int64_t c = 0; c < taps; ++c) {
    const Vector<T> weight = vector_at(weights, c * steps.weight * kWidth<T>);
    const T* from = in + c * steps.tap * kWidth<T>;
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) sum[u] += weight * vector_at(from, u * steps.in * kWidth<T>);
  }
#pragma GCC unroll 8
  for (int u = 0; u < N; ++u) vector_at(out, u * steps.out * kWidth<T>) = sum[u];
}

template <class T>
void add_row_of_sums(const T* in, const T* weights, int64_t taps, T* out, const SumSteps& steps, int64_t count) {
  auto at = [&](int64_t u) { return in + u * steps.in * kWidth<T>; };
  auto to = [&](int64_t u) { return out + u * steps.out * kWidth<T>; };
  int64_t u = 0;
  for (; u + 8 <= count; u += 8) add_sums<8>(at(u), weights, taps, to(u), steps);
  for (; u + 4 <= count; u += 4) add_sums<4>(at(u), weights, taps, to(u), steps);
  for (; u < count; ++u) add_sums<1>(at(u), weights, taps, to(u), steps);
}

// What a thread does for some rows of an image: vector after vector of its channels.
template <class T, class F>
struct Strip {
  const WindowPoolParams& p;
  int64_t batch;
  T* scratch = reinterpret_cast<T*>(p.scratch);
  int64_t channel = 0, count = 0;  // of the vector
  const T* weights = nullptr;      // [taps, lanes]

  Strip(const WindowPoolParams& p, int64_t batch) : p(p), batch(batch) {}

  Tile<T> take(WindowRows rows, const int64_t* size, WindowMargin margin = {}) {
    const Tile<T> tile{scratch, rows, size, margin};
    scratch += tile.pixels() * kWidth<T>;
    return tile;
  }

  F* memory(const WindowPoolTensor& t, WindowRows rows) const {
    return static_cast<F*>(t.data) + batch * t.stride_batch + channel * t.stride_channel + rows.first * t.plane() * t.stride_pixel;
  }

  Tile<T> load(const WindowPoolTensor& t, WindowRows rows, WindowMargin margin = {}) {
    const Tile<T> tile = take(rows, t.size, margin);
    if (margin.left + margin.right == 0) {
      load_pixels(t, rows, tile.data, scratch);
      return tile;
    }
    T* pixels = scratch;
    load_pixels(t, rows, pixels, pixels + (rows.last - rows.first) * t.plane() * kWidth<T>);
    tile.fill(0);
    tile.each_row([&](int64_t, int64_t, T* row) {
      copy_row(pixels, t.size[2] * kWidth<T>, row);
      pixels += t.size[2] * kWidth<T>;
    });
    return tile;
  }

  // to [pixels of some rows, lanes]; wide: scratch for as many numbers
  void load_pixels(const WindowPoolTensor& t, WindowRows rows, T* to, T* wide) const {
    const F* from = memory(t, rows);
    const int64_t pixels = (rows.last - rows.first) * t.plane();
    if (t.stride_pixel != 1) {
      for (int64_t q = 0; q < pixels; ++q, to += kWidth<T>) {
        if (count == kWidth<T>)
          for (int64_t c = 0; c < kWidth<T>; ++c) to[c] = widen(from[q * t.stride_pixel + c]);
        else
          for (int64_t c = 0; c < kWidth<T>; ++c) to[c] = c < count ? widen(from[q * t.stride_pixel + c]) : T(0);
      }
    } else if constexpr (std::is_same_v<T, F>) {
      transpose<T>(from, t.stride_channel, count, pixels, to, kWidth<T>);
    } else {
      for (int64_t c = 0; c < count; ++c)
        for (int64_t q = 0; q < pixels; ++q) wide[c * pixels + q] = widen(from[c * t.stride_channel + q]);
      transpose<T>(wide, pixels, count, pixels, to, kWidth<T>);
    }
  }

  // Rows of a tile that may have more of them.
  void store(const WindowPoolTensor& t, const Tile<T>& tile, WindowRows rows) {
    F* to = memory(t, rows);
    const T* from = tile.at(rows.first, 0, 0);
    const int64_t pixels = (rows.last - rows.first) * t.plane();
    if (t.stride_pixel != 1) {
      for (int64_t q = 0; q < pixels; ++q) {
        if (count == kWidth<T>)
          for (int64_t c = 0; c < kWidth<T>; ++c) narrow(from[q * kWidth<T> + c], to + q * t.stride_pixel + c);
        else
          for (int64_t c = 0; c < count; ++c) narrow(from[q * kWidth<T> + c], to + q * t.stride_pixel + c);
      }
    } else if constexpr (std::is_same_v<T, F>) {
      transpose<T>(from, kWidth<T>, pixels, count, to, t.stride_channel);
    } else {
      T* wide = scratch;
      transpose<T>(from, kWidth<T>, pixels, count, wide, pixels);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t q = 0; q < pixels; ++q) narrow(wide[c * pixels + q], to + c * t.stride_channel + q);
    }
  }

  // Calls body() for each vector of channels; the last one overlaps the one before it where it can.
  template <class Body>
  void each_vector(Body body) {
    T* const begin = scratch;
    const int64_t taps = p.filter ? p.sum.taps[0] * p.sum.taps[1] * p.sum.taps[2] : 0;
    for (int64_t c = 0; c < p.channels; c += kWidth<T>) {
      count = p.channels < kWidth<T> ? p.channels : kWidth<T>;
      channel = c + count <= p.channels ? c : p.channels - count;
      scratch = begin + taps * kWidth<T>;
      weights = begin;
      for (int64_t k = 0; k < taps; ++k)
        for (int64_t l = 0; l < kWidth<T>; ++l)
          begin[k * kWidth<T> + l] = l < count ? static_cast<const T*>(p.filter)[k * p.channels + channel + l] : T(0);
      body();
    }
  }

  // The largest number of each window in some rows; NaN if one is.
  Tile<T> largest(const Tile<T>& x, WindowRows rows, WindowMargin margin) {
    const Tile<T> tile = take(rows, p.between, margin);
    tile.fill(0);
    tile.each_row([&](int64_t i, int64_t j, T* most) {
      for (int64_t o = 0; o < p.between[2]; ++o) vector_at(most, o * kWidth<T>) = -T(__builtin_inf()) + Vector<T>{};
      each_tap(p.largest, x, i, j, p.between[2], [=](int64_t, int64_t o, const Vector<T>& v) {
        Vector<T>& found = vector_at(most, o * kWidth<T>);
        found = (v > found) | (v != v) ? v : found;
      });
    });
    return tile;
  }

  void forward(WindowRows rows) {
    const WindowRows between = p.filter ? rows_read(p.sum, rows, p.between[0]) : rows;
    const WindowRows read = p.has_largest ? rows_read(p.largest, between, p.x.size[0]) : between;
    const WindowMargin margin = p.filter ? margin_read(p.sum, p.y.size[2], p.between[2]) : WindowMargin{};
    each_vector([&] {
      const Tile<T> from = p.has_largest ? largest(load(p.x, read), between, margin) : load(p.x, read, margin);
      if (!p.filter) return store(p.y, from, rows);
      const Tile<T> tile = take(rows, p.y.size);
      tile.fill(0);
      tile.each_row([&](int64_t i, int64_t j, T* out) {
        each_row_of_taps(p.sum, from.size, i, j, [&](int64_t tap, int64_t row, int64_t column) {
          add_row_of_sums(from.at(row, column, -p.sum.padding[2]), weights + tap * kWidth<T>, p.sum.taps[2], out,
                          {p.sum.stride[2], 1, 1, 1}, p.y.size[2]);
        });
      });
      store(p.y, tile, rows);
    });
  }

  // The gradient of what the sum is taken of, from that of the sum. Places whose distance is the stride have the same taps.
  Tile<T> spread(WindowRows between) {
    const Tile<T> grad = load(p.y, rows_reaching(p.sum, between, p.y.size[0]), margin_reaching(p.sum, p.between[2], p.y.size[2]));
    const Tile<T> tile = take(between, p.between);
    const int64_t taps = p.sum.taps[2], stride = p.sum.stride[2], padding = p.sum.padding[2];
    tile.fill(0);
    tile.each_row([&](int64_t i, int64_t j, T* out) {
      const Owners first(p.sum, 0, i, p.y.size[0]), second(p.sum, 1, j, p.y.size[1]);
      for (int64_t c = 0; c < stride && c < taps; ++c) {  // taps c, c + stride, ... at places o * stride + c - padding
        const WindowRows windows = windows_with(p.sum, 2, c, p.between[2], p.between[2] + padding);
        const int64_t of_place = (taps - c + stride - 1) / stride;
        T* places = out + (windows.first * stride + c - padding) * kWidth<T>;
        for (int64_t a = first.begin; a < first.end; ++a)
          for (int64_t b = second.begin; b < second.end; ++b) {
            const int64_t row = (first.reach - a * p.sum.stride[0]) * p.sum.taps[1] + second.reach - b * p.sum.stride[1];
            add_row_of_sums(grad.at(a, b, windows.first), weights + (row * taps + c) * kWidth<T>, of_place, places,
                            {1, -1, stride, stride}, windows.last - windows.first);
          }
      }
    });
    return tile;
  }

  // The gradient of x, some of whose rows are given, from that of the largest numbers: it goes to the first that is largest.
  Tile<T> to_largest(const Tile<T>& grad, const Tile<T>& x) {
    const Tile<T> tile = take(x.rows, p.x.size);
    tile.fill(0);
    const int64_t count = p.between[2], away = tile.data - x.data;
    T *most = scratch, *at = scratch + count * kWidth<T>;  // its tap
    grad.each_row([&](int64_t i, int64_t j, const T* given) {
      for (int64_t o = 0; o < count * kWidth<T>; ++o) at[o] = -1;
      each_tap(p.largest, x, i, j, count, [=](int64_t tap, int64_t o, const Vector<T>& v) {
        Vector<T> &found = vector_at(most, o * kWidth<T>), &place = vector_at(at, o * kWidth<T>);
        const auto takes = (v > found) | (v != v) | (place < T(0));
        found = takes ? v : found;
        place = takes ? T(tap) + Vector<T>{} : place;
      });
      each_tap(p.largest, x, i, j, count, [=](int64_t tap, int64_t o, Vector<T>& v) {
        Vector<T>& to = vector_at(reinterpret_cast<T*>(&v), away);
        to += vector_at(at, o * kWidth<T>) == T(tap) ? vector_at(given, o * kWidth<T>) : Vector<T>{};
      });
    });
    return tile;
  }

  void backward(WindowRows rows) {
    const WindowRows between = p.has_largest ? rows_reaching(p.largest, rows, p.between[0]) : rows;
    WindowRows read = between.first < between.last ? rows_read(p.largest, between, p.x.size[0]) : rows;
    read = {read.first < rows.first ? read.first : rows.first, read.last > rows.last ? read.last : rows.last};
    each_vector([&] {
      const Tile<T> grad = p.filter ? spread(between) : load(p.y, between);
      store(p.grad_x, p.has_largest ? to_largest(grad, load(p.x, read)) : grad, rows);
    });
  }
};

// Calls body(strip, rows) for the items that this thread takes: strips of `size` rows of the images.
template <class Body>
void each_strip(const WindowPoolParams& p, int64_t size, Body body) {
  with_dtype(p.dtype, [&](auto number) {
    using F = decltype(number);
    using T = typename Computed<F>::type;
    for (int64_t item; (item = __atomic_fetch_add(p.next_item, 1, __ATOMIC_RELAXED)) < p.batch * p.strips;) {
      const int64_t strip = item % p.strips;
      const WindowRows rows{size * strip / p.strips, size * (strip + 1) / p.strips};
      if (rows.first < rows.last) body(Strip<T, F>(p, item / p.strips), rows);
    }
  });
}

}  // namespace

void window_pool(const WindowPoolParams& p, int64_t, int64_t) {
  each_strip(p, p.y.size[0], [](auto strip, const WindowRows& rows) { strip.forward(rows); });
}

void window_pool_bwd(const WindowPoolParams& p, int64_t, int64_t) {
  each_strip(p, p.x.size[0], [](auto strip, const WindowRows& rows) { strip.backward(rows); });
}

}  // namespace equiconv::EQUICONV_ISA
