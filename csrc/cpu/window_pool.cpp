// The channels of a pixel are the lanes of a vector: tiles are [pixels, lanes], whatever the memory format.
#include "../window_pool.h"

#include "field_tile.h"

namespace equiconv::EQUICONV_ISA {
namespace {

// Where the taps of a window begin and end that lie within a grid of `size`, in one dimension.
struct Taps {
  int64_t start, begin, end;

  Taps(const WindowPoolGrid& grid, int d, int64_t place, int64_t size) : start(place * grid.stride[d] - grid.padding[d]) {
    const int64_t step = grid.dilation[d];
    begin = start < 0 ? (-start + step - 1) / step : 0;
    end = start < size ? (size - 1 - start) / step + 1 : 0;
    if (end > grid.taps[d]) end = grid.taps[d];
  }
};

// The windows without dilation that have a tap at `place`: [begin, end) of `count`.
struct Owners {
  int64_t reach, begin, end;  // reach: the tap of window 0

  Owners(const WindowPoolGrid& grid, int d, int64_t place, int64_t count) : reach(place + grid.padding[d]) {
    begin = reach < grid.taps[d] ? 0 : (reach - grid.taps[d]) / grid.stride[d] + 1;
    end = reach / grid.stride[d] + 1;
    if (end > count) end = count;
  }
};

// Some rows of a plane or volume, as far as a tile holds them.
template <class T>
struct Tile {
  T* data;
  WindowRows rows;
  const int64_t* size;

  int64_t pixels() const { return (rows.last - rows.first) * size[1] * size[2]; }
  T* at(int64_t i, int64_t j, int64_t k) const { return data + (((i - rows.first) * size[1] + j) * size[2] + k) * kWidth<T>; }

  template <class Body>
  void each(Body body) const {
    for (int64_t i = rows.first; i < rows.last; ++i)
      for (int64_t j = 0; j < size[1]; ++j)
        for (int64_t k = 0; k < size[2]; ++k) body(i, j, k, *reinterpret_cast<Vector<T>*>(at(i, j, k)));
  }
};

// Calls body(tap, vector) for the taps of a window that lie within the tile's grid.
template <class T>
struct Window {
  const WindowPoolGrid& grid;
  const Tile<T>& tile;
  Taps first, second, third;

  Window(const WindowPoolGrid& grid, const Tile<T>& tile, int64_t i, int64_t j, int64_t k)
      : grid(grid), tile(tile), first(grid, 0, i, tile.size[0]), second(grid, 1, j, tile.size[1]), third(grid, 2, k, tile.size[2]) {}

  template <class Body>
  inline __attribute__((always_inline)) void each(Body body) const {
    for (int64_t a = first.begin; a < first.end; ++a)
      for (int64_t b = second.begin; b < second.end; ++b) {
        T* row = tile.at(first.start + a * grid.dilation[0], second.start + b * grid.dilation[1], third.start);
        const int64_t tap = (a * grid.taps[1] + b) * grid.taps[2];
        for (int64_t c = third.begin; c < third.end; ++c)
          body(tap + c, *reinterpret_cast<Vector<T>*>(row + c * grid.dilation[2] * kWidth<T>));
      }
  }

  // NaN if one is.
  Vector<T> largest() const {
    Vector<T> most = -T(__builtin_inf()) + Vector<T>{};
    each([&](int64_t, const Vector<T>& v) { most = (v > most) | (v != v) ? v : most; });
    return most;
  }
};

// What a thread does for some rows of an image: vector after vector of its channels.
template <class T, class F>
struct Strip {
  const WindowPoolParams& p;
  int64_t batch;
  T* scratch = reinterpret_cast<T*>(p.scratch);
  int64_t channel = 0, count = 0;  // of the vector
  const T* weights = nullptr;      // [taps, lanes]

  Strip(const WindowPoolParams& p, int64_t batch) : p(p), batch(batch) {}

  Tile<T> take(WindowRows rows, const int64_t* size) {
    Tile<T> tile{scratch, rows, size};
    scratch += tile.pixels() * kWidth<T>;
    return tile;
  }

  F* memory(const WindowPoolTensor& t, WindowRows rows) const {
    return static_cast<F*>(t.data) + batch * t.stride_batch + channel * t.stride_channel + rows.first * t.plane() * t.stride_pixel;
  }

  Tile<T> load(const WindowPoolTensor& t, WindowRows rows) {
    const Tile<T> tile = take(rows, t.size);
    const F* from = memory(t, rows);
    const int64_t pixels = tile.pixels();
    if (t.stride_pixel != 1) {
      for (int64_t q = 0; q < pixels; ++q) {
        T* to = tile.data + q * kWidth<T>;
        if (count == kWidth<T>)
          for (int64_t c = 0; c < kWidth<T>; ++c) to[c] = widen(from[q * t.stride_pixel + c]);
        else
          for (int64_t c = 0; c < kWidth<T>; ++c) to[c] = c < count ? widen(from[q * t.stride_pixel + c]) : T(0);
      }
    } else if constexpr (std::is_same_v<T, F>) {
      transpose<T>(from, t.stride_channel, count, pixels, tile.data, kWidth<T>);
    } else {
      T* wide = scratch;
      for (int64_t c = 0; c < count; ++c)
        for (int64_t q = 0; q < pixels; ++q) wide[c * pixels + q] = widen(from[c * t.stride_channel + q]);
      transpose<T>(wide, pixels, count, pixels, tile.data, kWidth<T>);
    }
    return tile;
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

  const Vector<T>& weight(int64_t tap) const { return vector_at(weights, tap * kWidth<T>); }

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

  void forward(WindowRows rows) {
    const WindowRows between = p.filter ? rows_read(p.sum, rows, p.between[0]) : rows;
    const WindowRows read = p.has_largest ? rows_read(p.largest, between, p.x.size[0]) : between;
    each_vector([&] {
      Tile<T> tile = load(p.x, read);
      if (p.has_largest) {
        const Tile<T> x = tile;
        tile = take(between, p.between);
        tile.each([&](int64_t i, int64_t j, int64_t k, Vector<T>& out) { out = Window<T>(p.largest, x, i, j, k).largest(); });
      }
      if (p.filter) {
        const Tile<T> from = tile;
        tile = take(rows, p.y.size);
        tile.each([&](int64_t i, int64_t j, int64_t k, Vector<T>& out) {
          Vector<T> sum = {};
          Window<T>(p.sum, from, i, j, k).each([&](int64_t tap, const Vector<T>& v) { sum += weight(tap) * v; });
          out = sum;
        });
      }
      store(p.y, tile, rows);
    });
  }

  // The gradient of what the sum is taken of, from that of the sum.
  Tile<T> spread(WindowRows between) {
    const Tile<T> grad = load(p.y, rows_reaching(p.sum, between, p.y.size[0]));
    const Tile<T> tile = take(between, p.between);
    tile.each([&](int64_t i, int64_t j, int64_t k, Vector<T>& out) {
      const Owners first(p.sum, 0, i, p.y.size[0]), second(p.sum, 1, j, p.y.size[1]), third(p.sum, 2, k, p.y.size[2]);
      Vector<T> sum = {};
      for (int64_t a = first.begin; a < first.end; ++a)
        for (int64_t b = second.begin; b < second.end; ++b) {
          const int64_t row = (first.reach - a * p.sum.stride[0]) * p.sum.taps[1] + second.reach - b * p.sum.stride[1];
          for (int64_t c = third.begin; c < third.end; ++c)
            sum += weight(row * p.sum.taps[2] + third.reach - c * p.sum.stride[2]) * vector_at(grad.at(a, b, c), 0);
        }
      out = sum;
    });
    return tile;
  }

  void backward(WindowRows rows) {
    const WindowRows between = p.has_largest ? rows_reaching(p.largest, rows, p.between[0]) : rows;
    each_vector([&] {
      Tile<T> tile = p.filter ? spread(between) : load(p.y, between);
      if (p.has_largest) {
        WindowRows read = between.first < between.last ? rows_read(p.largest, between, p.x.size[0]) : rows;
        read = {read.first < rows.first ? read.first : rows.first, read.last > rows.last ? read.last : rows.last};
        const Tile<T> grad = tile, x = load(p.x, read);
        tile = take(read, p.x.size);
        tile.each([](int64_t, int64_t, int64_t, Vector<T>& out) { out = Vector<T>{}; });
        const int64_t away = tile.data - x.data;
        grad.each([&](int64_t i, int64_t j, int64_t k, const Vector<T>& given) {
          const Window<T> window(p.largest, x, i, j, k);
          const Vector<T> most = window.largest();
          Vector<T> remaining = given;
          window.each([&](int64_t, Vector<T>& v) {
            const auto chosen = (v == most) | (v != v);
            vector_at(reinterpret_cast<T*>(&v) + away, 0) += chosen ? remaining : Vector<T>{};
            remaining = chosen ? Vector<T>{} : remaining;
          });
        });
      }
      store(p.grad_x, tile, rows);
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
