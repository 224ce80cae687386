// Pixels are the lanes of the vectors.
#include "../field_pool.h"

#include "field_tile.h"
#include "functions.h"

namespace equiconv::EQUICONV_ISA {
namespace {

template <bool kNorms, class T>
Vector<T> value_of(const Rows<const T>& subfield, int64_t size, int64_t lane) {
  if constexpr (!kNorms) return vector_at(subfield[0], lane);
  Vector<T> sum = {};
  for (int64_t i = 0; i < size; ++i) sum += vector_at(subfield[i], lane) * vector_at(subfield[i], lane);
  return square_root<T>(sum);
}

// The largest value of the subfields; NaN if one is.
template <bool kNorms, class T>
Vector<T> largest(const Rows<const T>& x, const FieldPoolField& field, int64_t lane) {
  Vector<T> most = value_of<kNorms>(x, field.subfield, lane);
  for (int64_t i = field.subfield; i < field.size; i += field.subfield) {
    const Vector<T> value = value_of<kNorms>(x.from(i), field.subfield, lane);
    most = (value > most) | (value != value) ? value : most;
  }
  return most;
}

// What of the fields is compared, and what becomes of the largest.
struct Largest { static constexpr bool kNorms = false, kDirections = false; };
struct LargestNorm { static constexpr bool kNorms = true, kDirections = false; };
struct Direction { static constexpr bool kNorms = false, kDirections = true; };

// Calls body(i, share) for the subfields at the channels i of a field: the first of the largest has all of it, others zero.
template <bool kNorms, class T, class Body>
inline __attribute__((always_inline)) void share_out(const Rows<const T>& x, const FieldPoolField& field, int64_t lane,
                                                     Vector<T> most, Vector<T> remaining, Body body) {
  for (int64_t i = 0; i < field.size; i += field.subfield) {
    const Vector<T> value = value_of<kNorms>(x.from(i), field.subfield, lane);
    const auto chosen = (value == most) | (value != value);
    const Vector<T> given = chosen ? remaining : Vector<T>{};
    remaining = chosen ? Vector<T>{} : remaining;
    body(i, !kNorms ? given : value == T(0) ? Vector<T>{} : given / value);
  }
}

// Tiles of some pixels of a run of fields.
template <class Kind, class T, class F>
struct Tile {
  const FieldPoolParams& p;
  const FieldRun& run;
  const Pixels& pixels;
  int64_t lanes = padded<T>(pixels.count);
  T* x_scratch = reinterpret_cast<T*>(p.work.scratch);
  T* to_scratch = x_scratch + field_tile_scratch(run.channels, lanes);
  T* out_scratch = to_scratch + field_tile_scratch(run.channels, lanes);
  const T* directions = static_cast<const T*>(p.directions);

  Rows<const T> load_x() const { return load_tile<T, F>(p.x, pixels, run.channel, run.channels, x_scratch); }

  void forward() const {
    const Rows<const T> x = load_x();
    const Rows<T> y = target_tile<T, F>(p.y, pixels, run.field * p.numbers, out_scratch);
    for (int64_t f = 0; f < run.fields; ++f) {
      const FieldPoolField& field = p.fields[run.field + f];
      const Rows<const T> from = x.from(field.channel - run.channel);
      const Rows<T> to = y.from(f * p.numbers);
      for (int64_t l = 0; l < lanes; l += kWidth<T>) {
        const Vector<T> most = largest<Kind::kNorms>(from, field, l);
        if constexpr (Kind::kDirections) {
          for (int64_t n = 0; n < p.numbers; ++n) vector_at(to[n], l) = Vector<T>{};
          share_out<false, T>(from, field, l, most, Relu::value<T>(most), [&](int64_t i, Vector<T> share) {
            for (int64_t n = 0; n < p.numbers; ++n) vector_at(to[n], l) += share * directions[i * p.numbers + n];
          });
        } else {
          vector_at(to[0], l) = most;
        }
      }
    }
    store_tile<T, F>(p.y, pixels, run.field * p.numbers, run.fields * p.numbers, y);
  }

  void backward() const {
    const Rows<const T> x = load_x();
    const Rows<const T> grad = load_tile<T, F>(p.grad, pixels, run.field * p.numbers, run.fields * p.numbers, out_scratch);
    const Rows<T> grad_x = target_tile<T, F>(p.y, pixels, run.channel, to_scratch);
    for (int64_t f = 0; f < run.fields; ++f) {
      const FieldPoolField& field = p.fields[run.field + f];
      const Rows<const T> from = x.from(field.channel - run.channel), g = grad.from(f * p.numbers);
      const Rows<T> to = grad_x.from(field.channel - run.channel);
      for (int64_t l = 0; l < lanes; l += kWidth<T>) {
        const Vector<T> most = largest<Kind::kNorms>(from, field, l);
        const Vector<T> whole = Kind::kDirections ? Relu::slope<T>(most) : vector_at(g[0], l);
        share_out<Kind::kNorms, T>(from, field, l, most, whole, [&](int64_t i, Vector<T> share) {
          if constexpr (Kind::kDirections) {
            Vector<T> along = {};
            for (int64_t n = 0; n < p.numbers; ++n) along += vector_at(g[n], l) * directions[i * p.numbers + n];
            share *= along;
          }
          for (int64_t c = 0; c < field.subfield; ++c)
            vector_at(to[i + c], l) = Kind::kNorms ? share * vector_at(from[i + c], l) : share;
        });
      }
    }
    store_tile<T, F>(p.y, pixels, run.channel, run.channels, grad_x);
  }
};

template <class Kind, class T, class F, class Body>
void each_tile_of(const FieldPoolParams& p, Body body) {
  each_item(p.work, [&](const FieldRun& run, int64_t part) {
    each_tile<T>(p.work, p.x, part, [&](const Pixels& pixels) { body(Tile<Kind, T, F>{p, run, pixels}); });
  });
}

// Calls body with each tile.
template <class Body>
void each(const FieldPoolParams& p, Body body) {
  with_dtype(p.work.dtype, [&](auto number) {
    using F = decltype(number);
    using T = typename Computed<F>::type;
    if (p.directions) return each_tile_of<Direction, T, F>(p, body);
    if (p.norms) return each_tile_of<LargestNorm, T, F>(p, body);
    each_tile_of<Largest, T, F>(p, body);
  });
}

}  // namespace

void field_pool(const FieldPoolParams& p, int64_t, int64_t) {
  each(p, [](const auto& tile) { tile.forward(); });
}

void field_pool_bwd(const FieldPoolParams& p, int64_t, int64_t) {
  each(p, [](const auto& tile) { tile.backward(); });
}

}  // namespace equiconv::EQUICONV_ISA
