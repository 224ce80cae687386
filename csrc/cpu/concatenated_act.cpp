// Pixels are the lanes of the vectors.
#include "../concatenated_act.h"

#include "field_tile.h"
#include "functions.h"

namespace equiconv::EQUICONV_ISA {
namespace {

template <class Function, class T, class F>
struct Tile {
  const ConcatenatedActParams& p;
  const FieldRun& run;
  const Pixels& pixels;
  int64_t lanes = padded<T>(pixels.count);
  T* x_scratch = reinterpret_cast<T*>(p.work.scratch);
  T* grad_scratch = x_scratch + field_tile_scratch(run.channels, lanes);
  T* y_scratch = grad_scratch + field_tile_scratch(run.channels, lanes);

  Rows<const T> load_x() const { return load_tile<T, F>(p.x, pixels, run.channel, run.channels, x_scratch); }

  void forward() const {
    const Rows<const T> x = load_x();
    const Rows<T> y = target_tile<T, F>(p.y, pixels, 2 * run.channel, y_scratch);
    for (int64_t c = 0; c < run.channels; ++c)
      for (int64_t l = 0; l < lanes; l += kWidth<T>) {
        const Vector<T> v = vector_at(x[c], l);
        vector_at(y[2 * c], l) = Function::template value<T>(v);
        vector_at(y[2 * c + 1], l) = Function::template value<T>(-v);
      }
    store_tile<T, F>(p.y, pixels, 2 * run.channel, 2 * run.channels, y);
  }

  void backward() const {
    const Rows<const T> x = load_x(), g = load_tile<T, F>(p.y, pixels, 2 * run.channel, 2 * run.channels, y_scratch);
    const Rows<T> to = target_tile<T, F>(p.grad_x, pixels, run.channel, grad_scratch);
    for (int64_t c = 0; c < run.channels; ++c)
      for (int64_t l = 0; l < lanes; l += kWidth<T>) {
        const Vector<T> v = vector_at(x[c], l);
        vector_at(to[c], l) = Function::template slope<T>(v) * vector_at(g[2 * c], l) -
                              Function::template slope<T>(-v) * vector_at(g[2 * c + 1], l);
      }
    store_tile<T, F>(p.grad_x, pixels, run.channel, run.channels, to);
  }
};

template <class Function, class Body>
void each_tile_of(const ConcatenatedActParams& p, Body body) {
  with_dtype(p.work.dtype, [&](auto number) {
    using F = decltype(number);
    using T = typename Computed<F>::type;
    each_item(p.work, [&](const FieldRun& run, int64_t part) {
      each_tile<T>(p.work, p.x, part, [&](const Pixels& pixels) { body(Tile<Function, T, F>{p, run, pixels}); });
    });
  });
}

// Calls body with each tile.
template <class Body>
void each(const ConcatenatedActParams& p, Body body) {
  switch (p.function) {
    case Function::relu: return each_tile_of<Relu>(p, body);
    case Function::elu: return each_tile_of<Elu>(p, body);
    case Function::sigmoid: return each_tile_of<Sigmoid>(p, body);
    case Function::tanh: return each_tile_of<Tanh>(p, body);
  }
}

}  // namespace

void concatenated_act(const ConcatenatedActParams& p, int64_t, int64_t) {
  each(p, [](const auto& tile) { tile.forward(); });
}

void concatenated_act_bwd(const ConcatenatedActParams& p, int64_t, int64_t) {
  each(p, [](const auto& tile) { tile.backward(); });
}

}  // namespace equiconv::EQUICONV_ISA
