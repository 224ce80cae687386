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

template <bool kNorms, class T, class F>
void forward_tile(const FieldPoolParams& p, const FieldRun& run, const Pixels& pixels) {
  const int64_t lanes = padded<T>(pixels.count);
  T *x_scratch = reinterpret_cast<T*>(p.work.scratch), *y_scratch = x_scratch + field_tile_scratch(run.channels, lanes);
  const Rows<const T> x = load_tile<T, F>(p.x, pixels, run.channel, run.channels, x_scratch);
  const Rows<T> y = target_tile<T, F>(p.y, pixels, run.field, y_scratch);
  for (int64_t f = 0; f < run.fields; ++f) {
    const FieldPoolField& field = p.fields[run.field + f];
    const Rows<const T> from = x.from(field.channel - run.channel);
    for (int64_t l = 0; l < lanes; l += kWidth<T>) vector_at(y[f], l) = largest<kNorms>(from, field, l);
  }
  store_tile<T, F>(p.y, pixels, run.field, run.fields, y);
}

template <bool kNorms, class T, class F>
void backward_tile(const FieldPoolParams& p, const FieldRun& run, const Pixels& pixels) {
  const int64_t lanes = padded<T>(pixels.count);
  T *x_scratch = reinterpret_cast<T*>(p.work.scratch), *to_scratch = x_scratch + field_tile_scratch(run.channels, lanes);
  T* grad_scratch = to_scratch + field_tile_scratch(run.channels, lanes);
  const Rows<const T> x = load_tile<T, F>(p.x, pixels, run.channel, run.channels, x_scratch);
  const Rows<const T> grad = load_tile<T, F>(p.grad, pixels, run.field, run.fields, grad_scratch);
  const Rows<T> grad_x = target_tile<T, F>(p.y, pixels, run.channel, to_scratch);
  for (int64_t f = 0; f < run.fields; ++f) {
    const FieldPoolField& field = p.fields[run.field + f];
    const Rows<const T> from = x.from(field.channel - run.channel);
    const Rows<T> to = grad_x.from(field.channel - run.channel);
    for (int64_t l = 0; l < lanes; l += kWidth<T>) {
      const Vector<T> most = largest<kNorms>(from, field, l);
      Vector<T> remaining = vector_at(grad[f], l);  // zero once it is given to a subfield
      for (int64_t i = 0; i < field.size; i += field.subfield) {
        const Vector<T> value = value_of<kNorms>(from.from(i), field.subfield, l);
        const auto chosen = (value == most) | (value != value);
        const Vector<T> given = chosen ? remaining : Vector<T>{};
        remaining = chosen ? Vector<T>{} : remaining;
        const Vector<T> share = !kNorms ? given : value == T(0) ? Vector<T>{} : given / value;
        for (int64_t c = 0; c < field.subfield; ++c)
          vector_at(to[i + c], l) = kNorms ? share * vector_at(from[i + c], l) : share;
      }
    }
  }
  store_tile<T, F>(p.y, pixels, run.channel, run.channels, grad_x);
}

// Calls body(norms, number) with the types of both, for each tile.
template <class Body>
void each(const FieldPoolParams& p, Body body) {
  with_dtype(p.work.dtype, [&](auto number) {
    using T = typename Computed<decltype(number)>::type;
    each_item(p.work, [&](const FieldRun& run, int64_t part) {
      each_tile<T>(p.work, p.x, part, [&](const Pixels& pixels) {
        p.norms ? body(std::true_type(), number, run, pixels) : body(std::false_type(), number, run, pixels);
      });
    });
  });
}

}  // namespace

void field_pool(const FieldPoolParams& p, int64_t, int64_t) {
  each(p, [&](auto norms, auto number, const FieldRun& run, const Pixels& pixels) {
    using F = decltype(number);
    forward_tile<norms.value, typename Computed<F>::type, F>(p, run, pixels);
  });
}

void field_pool_bwd(const FieldPoolParams& p, int64_t, int64_t) {
  each(p, [&](auto norms, auto number, const FieldRun& run, const Pixels& pixels) {
    using F = decltype(number);
    backward_tile<norms.value, typename Computed<F>::type, F>(p, run, pixels);
  });
}

}  // namespace equiconv::EQUICONV_ISA
