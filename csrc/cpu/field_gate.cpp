// Pixels are the lanes of the vectors. A tile holds all channels, since a gate may lie far from what it gates.
#include "../field_gate.h"

#include "field_tile.h"
#include "functions.h"

namespace equiconv::EQUICONV_ISA {
namespace {

struct Gate {};  // the sigmoid of another channel, in the place of a function of the norm

// The tiles of all tensors for some pixels.
template <class T, class F>
struct Tile {
  const FieldGateParams& p;
  const Pixels& pixels;
  int64_t lanes;
  T* scratch;

  Tile(const FieldGateParams& p, const Pixels& pixels)
      : p(p), pixels(pixels), lanes(padded<T>(pixels.count)), scratch(reinterpret_cast<T*>(p.work.scratch)) {}

  T* take(const FieldTensor& x) {
    T* taken = scratch;
    if (!is_in_place<T, F>(x, pixels)) scratch += field_tile_scratch(x.channels, lanes);
    return taken;
  }
  Rows<const T> load(const FieldTensor& x) { return load_tile<T, F>(x, pixels, 0, x.channels, take(x)); }
  Rows<T> target(const FieldTensor& y) { return target_tile<T, F>(y, pixels, 0, take(y)); }
  void store(const FieldTensor& y, const Rows<T>& rows) const { store_tile<T, F>(y, pixels, 0, y.channels, rows); }
  T bias(const FieldGateField& field) const { return p.bias ? static_cast<const T*>(p.bias)[field.bias] : T(0); }

  // sum_i a[i] b[i] over the channels of a field
  static Vector<T> dot(const Rows<const T>& a, const Rows<const T>& b, int64_t size, int64_t lane) {
    Vector<T> sum = {};
    for (int64_t i = 0; i < size; ++i) sum += vector_at(a[i], lane) * vector_at(b[i], lane);
    return sum;
  }

  template <class Function>
  void forward() {
    const Rows<const T> x = load(p.x), gates = p.gates_are_x ? x : load(p.gates);
    const Rows<T> y = target(p.y);
    for (int64_t f = 0; f < p.num_fields; ++f) {
      const FieldGateField& field = p.fields[f];
      const Rows<const T> from = x.from(field.channel);
      const Rows<T> to = y.from(field.out_channel);
      const T b = bias(field), eps = T(p.eps);
      for (int64_t l = 0; l < lanes; l += kWidth<T>) {
        Vector<T> m;
        if constexpr (std::is_same_v<Function, Gate>) {
          m = Sigmoid::value<T>(vector_at(gates[field.gate], l) - b);
          if (field.gate_out >= 0) vector_at(y[field.gate_out], l) = m;
        } else {
          const Vector<T> norm = square_root<T>(dot(from, from, field.size, l));
          m = norm <= eps ? Vector<T>{} : Function::template value<T>(norm - b) / norm;
        }
        for (int64_t i = 0; i < field.size; ++i) vector_at(to[i], l) = m * vector_at(from[i], l);
      }
    }
    store(p.y, y);
  }

  // sums [fields] += the gradients of the biases
  template <class Function>
  void backward(double* sums) {
    const Rows<const T> x = load(p.x), grad = load(p.grad), gates = p.gates_are_x ? x : load(p.gates);
    const Rows<T> grad_x = target(p.grad_x), grad_gates = p.gates_are_x ? grad_x : target(p.grad_gates);
    for (int64_t f = 0; f < p.num_fields; ++f) {
      const FieldGateField& field = p.fields[f];
      const Rows<const T> from = x.from(field.channel), g = grad.from(field.out_channel);
      const Rows<T> to = grad_x.from(field.channel);
      const T b = bias(field), eps = T(p.eps);
      sums[f] -= sum_lanes<T>(lanes, [&](int64_t l) {
        const Vector<T> product = dot(g, from, field.size, l);
        if constexpr (std::is_same_v<Function, Gate>) {
          const Vector<T> m = Sigmoid::value<T>(vector_at(gates[field.gate], l) - b);
          const Vector<T> all = field.gate_out < 0 ? product : product + vector_at(grad[field.gate_out], l);
          const Vector<T> slope = all * m * (T(1) - m);
          for (int64_t i = 0; i < field.size; ++i) vector_at(to[i], l) = m * vector_at(g[i], l);
          vector_at(grad_gates[field.gate], l) = slope;
          return real_lanes(slope, l);
        } else {
          const Vector<T> norm = square_root<T>(dot(from, from, field.size, l));
          const auto is_small = norm <= eps;
          const Vector<T> inverse = is_small ? Vector<T>{} : T(1) / norm;
          const Vector<T> m = is_small ? Vector<T>{} : Function::template value<T>(norm - b) * inverse;
          const Vector<T> slope = is_small ? Vector<T>{} : Function::template slope<T>(norm - b) * inverse;
          const Vector<T> radial = product * (slope - m * inverse) * inverse;
          for (int64_t i = 0; i < field.size; ++i)
            vector_at(to[i], l) = m * vector_at(g[i], l) + radial * vector_at(from[i], l);
          return real_lanes(product * slope, l);
        }
      });
    }
    store(p.grad_x, grad_x);
    if (!p.gates_are_x && p.grad_gates.channels > 0) store(p.grad_gates, grad_gates);
  }

  // Without the lanes that only make up a whole vector.
  Vector<T> real_lanes(Vector<T> v, int64_t lane) const {
    for (int64_t i = 0; i < kWidth<T> && lane + kWidth<T> > pixels.count; ++i)
      if (lane + i >= pixels.count) v[i] = 0;
    return v;
  }
};

template <class Body>
void each(const FieldGateParams& p, Body body) {
  with_dtype(p.work.dtype, [&](auto number) {
    using F = decltype(number);
    using T = typename Computed<F>::type;
    each_item(p.work, [&](const FieldRun&, int64_t part) {
      double* sums = p.sums + part * p.num_fields;
      each_tile<T>(p.work, p.x, part, [&](const Pixels& pixels) {
        Tile<T, F> tile(p, pixels);
        switch (p.function) {
          case GateFunction::relu: return body(Relu(), tile, sums);
          case GateFunction::sigmoid: return body(Sigmoid(), tile, sums);
          case GateFunction::softplus: return body(Softplus(), tile, sums);
          case GateFunction::squash: return body(Squash(), tile, sums);
          case GateFunction::gate: return body(Gate(), tile, sums);
        }
      });
    });
  });
}

}  // namespace

void field_gate(const FieldGateParams& p, int64_t, int64_t) {
  each(p, [](auto function, auto& tile, double*) { tile.template forward<decltype(function)>(); });
}

void field_gate_bwd(const FieldGateParams& p, int64_t, int64_t) {
  each(p, [](auto function, auto& tile, double* sums) { tile.template backward<decltype(function)>(sums); });
}

}  // namespace equiconv::EQUICONV_ISA
