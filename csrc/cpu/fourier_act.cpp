// Pixels are the lanes of the vectors; the products with A and Ainv are small matrix products over them.
#include "../fourier_act.h"

#include "field_tile.h"
#include "functions.h"

namespace equiconv::EQUICONV_ISA {
namespace {

template <class T>
struct Matrices {
  Matrix<T> a, a_inv, a_transposed, a_inv_transposed;

  explicit Matrices(const FourierActParams& p)
      : a{static_cast<const T*>(p.a), p.in_size, 1}, a_inv{static_cast<const T*>(p.a_inv), p.samples, 1},
        a_transposed{a.data, 1, p.in_size}, a_inv_transposed{a_inv.data, 1, p.samples} {}
};

// Scratch for the tiles, one after the other.
template <class T>
struct Scratch {
  T* next;

  T* take(int64_t channels, int64_t lanes) {
    T* taken = next;
    next += field_tile_scratch(channels, padded<T>(lanes));
    return taken;
  }
  Rows<T> rows(int64_t channels, int64_t lanes) { return {take(channels, lanes), row_stride<T>(lanes)}; }
};

template <class Function, class T, class F>
void forward_tile(const FourierActParams& p, const FieldRun& run, const Pixels& pixels) {
  const Matrices<T> m(p);
  const int64_t lanes = padded<T>(pixels.count), out_channel = run.field * p.out_size, out_channels = run.fields * p.out_size;
  Scratch<T> scratch{reinterpret_cast<T*>(p.work.scratch)};
  const Rows<T> samples = scratch.rows(p.samples, pixels.count);
  const Rows<const T> x = load_tile<T, F>(p.x, pixels, run.channel, run.channels, scratch.take(run.channels, pixels.count));
  const Rows<T> y = target_tile<T, F>(p.y, pixels, out_channel, scratch.take(out_channels, pixels.count));
  for (int64_t f = 0; f < run.fields; ++f) {
    multiply(m.a, x.from(f * p.in_size), samples, p.samples, p.in_size, lanes);
    for (int64_t g = 0; g < p.samples; ++g)
      for (int64_t l = 0; l < lanes; l += kWidth<T>)
        vector_at(samples[g], l) = Function::template value<T>(vector_at(samples[g], l));
    multiply(m.a_inv, samples, y.from(f * p.out_size), p.out_size, p.samples, lanes);
  }
  store_tile<T, F>(p.y, pixels, out_channel, out_channels, y);
}

template <class Function, class T, class F>
void backward_tile(const FourierActParams& p, const FieldRun& run, const Pixels& pixels) {
  const Matrices<T> m(p);
  const int64_t lanes = padded<T>(pixels.count), out_channel = run.field * p.out_size, out_channels = run.fields * p.out_size;
  Scratch<T> scratch{reinterpret_cast<T*>(p.work.scratch)};
  const Rows<T> samples = scratch.rows(p.samples, pixels.count), slopes = scratch.rows(p.samples, pixels.count);
  const Rows<const T> x = load_tile<T, F>(p.x, pixels, run.channel, run.channels, scratch.take(run.channels, pixels.count));
  const Rows<const T> grad = load_tile<T, F>(p.grad, pixels, out_channel, out_channels, scratch.take(out_channels, pixels.count));
  const Rows<T> grad_x = target_tile<T, F>(p.y, pixels, run.channel, scratch.take(run.channels, pixels.count));
  for (int64_t f = 0; f < run.fields; ++f) {
    multiply(m.a, x.from(f * p.in_size), samples, p.samples, p.in_size, lanes);
    multiply(m.a_inv_transposed, grad.from(f * p.out_size), slopes, p.samples, p.out_size, lanes);
    for (int64_t g = 0; g < p.samples; ++g)
      for (int64_t l = 0; l < lanes; l += kWidth<T>)
        vector_at(slopes[g], l) *= Function::template slope<T>(vector_at(samples[g], l));
    multiply(m.a_transposed, slopes, grad_x.from(f * p.in_size), p.in_size, p.samples, lanes);
  }
  store_tile<T, F>(p.y, pixels, run.channel, run.channels, grad_x);
}

// Calls body(function, number) with the types of both.
template <class Body>
void with_types(const FourierActParams& p, Body body) {
  with_dtype(p.work.dtype, [&](auto number) {
    switch (p.function) {
      case Function::relu: return body(Relu(), number);
      case Function::elu: return body(Elu(), number);
      case Function::sigmoid: return body(Sigmoid(), number);
      case Function::tanh: return body(Tanh(), number);
    }
  });
}

}  // namespace

void fourier_act(const FourierActParams& p, int64_t, int64_t) {
  with_types(p, [&](auto function, auto number) {
    using F = decltype(number);
    using T = typename Computed<F>::type;
    each_item(p.work, [&](const FieldRun& run, int64_t part) {
      each_tile<T>(p.work, p.x, part, [&](const Pixels& pixels) { forward_tile<decltype(function), T, F>(p, run, pixels); });
    });
  });
}

void fourier_act_bwd(const FourierActParams& p, int64_t, int64_t) {
  with_types(p, [&](auto function, auto number) {
    using F = decltype(number);
    using T = typename Computed<F>::type;
    each_item(p.work, [&](const FieldRun& run, int64_t part) {
      each_tile<T>(p.work, p.x, part, [&](const Pixels& pixels) { backward_tile<decltype(function), T, F>(p, run, pixels); });
    });
  });
}

}  // namespace equiconv::EQUICONV_ISA
