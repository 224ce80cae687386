// Pixels are the lanes of the vectors. Each item of work sums in double over the tiles of its part of the pixels, and its
// sums are added up in the order of the parts.
#include "../field_norm.h"

#include "field_tile.h"
#include "functions.h"

namespace equiconv::EQUICONV_ISA {
namespace {

// The tensors of one tile of one run, as its rows.
struct Identity {
  template <class T> static Vector<T> value(Vector<T> x) { return x; }
};

template <class T, class F>
struct Tile {
  const FieldNormParams& params;
  const FieldRun& run;
  const Pixels& pixels;
  int64_t lanes;           // with those that make up whole vectors
  T* scratch[5];

  Tile(const FieldNormParams& params, const FieldRun& run, const Pixels& pixels)
      : params(params), run(run), pixels(pixels), lanes(padded<T>(pixels.count)) {
    for (int i = 0; i < 5; ++i)
      scratch[i] = reinterpret_cast<T*>(params.work.scratch) + i * field_tile_scratch(run.channels, lanes);
  }

  const T* numbers(const void* from) const { return static_cast<const T*>(from) + run.channel; }
  Rows<T> spare(int i) const { return {scratch[i], row_stride<T>(pixels.count)}; }
  Rows<const T> load(const FieldTensor& x, int i) const {
    return load_tile<T, F>(x, pixels, run.channel, run.channels, scratch[i]);
  }

  // out = M in for each field, M being Q or (inverse) Q^-1, which is the identity where a field has no basis
  template <class In, class Out>
  void change_basis(bool inverse, bool transposed, const In& in, const Out& out) const {
    for (int32_t f = 0; f < run.fields; ++f) {
      const FieldNormField& field = params.fields[run.field + f];
      const int64_t n = field.size, first = field.channel - run.channel;
      if (field.basis < 0) {
        for (int64_t c = first; c < first + n; ++c) copy_row(in[c], lanes, out[c]);
        continue;
      }
      const T* matrix = static_cast<const T*>(params.bases) + field.basis + (inverse ? n * n : 0);
      const Matrix<T> a = transposed ? Matrix<T>{matrix, 1, n} : Matrix<T>{matrix, n, 1};
      multiply(a, in.from(first), out.from(first), n, n, lanes);
    }
  }

  bool has_basis() const {
    for (int32_t f = 0; f < run.fields; ++f)
      if (params.fields[run.field + f].basis >= 0) return true;
    return false;
  }

  // M in, or `in` itself where M is the identity
  Rows<const T> in_basis(bool inverse, bool transposed, const Rows<const T>& in, int i) const {
    if (!has_basis()) return in;
    change_basis(inverse, transposed, in, spare(i));
    return {scratch[i], row_stride<T>(pixels.count)};
  }

  template <class Function>
  void forward() const {
    const Rows<const T> x = load(params.x, 0);
    const Rows<T> y = target_tile<T, F>(params.y, pixels, run.channel, scratch[2]);
    const T *scale = numbers(params.scale), *shift = numbers(params.shift);
    const bool changes = has_basis();
    const Rows<const T> z = in_basis(true, false, x, 3);
    const Rows<T> normed = changes ? spare(3) : y;
    for (int64_t c = 0; c < run.channels; ++c)
      for (int64_t l = 0; l < lanes; l += kWidth<T>)
        vector_at(normed[c], l) = Function::template value<T>(vector_at(z[c], l) * scale[c] + shift[c]);
    if (changes) change_basis(false, false, normed, y);
    store_tile<T, F>(params.y, pixels, run.channel, run.channels, y);
  }

  // sums [2, channels] += the gradients of scale and shift
  void backward(double* sums) const {
    const Rows<const T> z = in_basis(true, false, load(params.x, 0), 3), u = in_basis(false, true, load(params.grad, 1), 4);
    const Rows<T> grad_x = target_tile<T, F>(params.y, pixels, run.channel, scratch[2]);
    const T *scale = numbers(params.scale), *mean = params.mean ? numbers(params.mean) : nullptr;
    const bool changes = has_basis();
    const Rows<T> scaled = changes ? spare(4) : grad_x;
    for (int64_t c = 0; c < run.channels; ++c) {
      const T *zc = z[c], *uc = u[c], s = scale[c], m = mean ? mean[c] : T(0);
      T* out = scaled[c];
      sums[params.x.channels + c] += sum_lanes<T>(lanes, [&](int64_t l) { return vector_at(uc, l); });
      sums[c] += sum_lanes<T>(lanes, [&](int64_t l) {
        const Vector<T> gradient = vector_at(uc, l);
        vector_at(out, l) = gradient * s;
        return gradient * (vector_at(zc, l) - m);
      });
    }
    if (changes) change_basis(true, true, scaled, grad_x);
    store_tile<T, F>(params.y, pixels, run.channel, run.channels, grad_x);
  }

  // The gradient of what the function was applied to.
  template <class Function>
  Vector<T> gradient(const Rows<const T>& grad, const Rows<const T>& x, int64_t c, int64_t lane) const {
    const Vector<T> g = vector_at(grad[c], lane);
    if constexpr (std::is_same_v<Function, Identity>) return g;
    else return g * Function::template slope<T>(vector_at(x[c], lane) * numbers(params.scale)[c] + numbers(params.offset)[c]);
  }

  // sums [2, channels] += those of g * (x - mean) and of g
  template <class Function>
  void centred_sums(double* sums) const {
    const Rows<const T> x = load(params.x, 0), grad = load(params.grad, 1);
    const T* mean = numbers(params.mean);
    for (int64_t c = 0; c < run.channels; ++c) {
      const T m = mean[c];
      Vector<T> product = {}, sum = {};
      for (int64_t l = 0; l < lanes; l += kWidth<T>) {
        const Vector<T> g = gradient<Function>(grad, x, c, l);
        sum += g;
        product += g * (vector_at(x[c], l) - m);
      }
      for (int i = 0; i < kWidth<T>; ++i) sums[c] += product[i], sums[params.x.channels + c] += sum[i];
    }
  }

  template <class Function>
  void through_backward() const {
    const Rows<const T> x = load(params.x, 0), grad = load(params.grad, 1);
    const Rows<T> grad_x = target_tile<T, F>(params.y, pixels, run.channel, scratch[2]);
    const T *scale = numbers(params.scale), *slope = numbers(params.slope), *mean = numbers(params.mean), *shift = numbers(params.shift);
    for (int64_t c = 0; c < run.channels; ++c)
      for (int64_t l = 0; l < lanes; l += kWidth<T>)
        vector_at(grad_x[c], l) =
            gradient<Function>(grad, x, c, l) * scale[c] + ((vector_at(x[c], l) - mean[c]) * slope[c] + shift[c]);
    store_tile<T, F>(params.y, pixels, run.channel, run.channels, grad_x);
  }

  // Adds the tile to the sums [3, channels]: count, mean, sum of squared deviations from it.
  void moments(double* sums) const {
    const Rows<const T> z = in_basis(true, false, load(params.x, 0), 3);
    const int64_t channels = params.x.channels;
    const double count = double(pixels.count);
    for (int64_t c = 0; c < run.channels; ++c) {
      const T* row = z[c];
      const T mean = sum_lanes<T>(lanes, [&](int64_t l) { return vector_at(row, l); }) / T(count);
      const int64_t whole = pixels.count / kWidth<T> * kWidth<T>;
      double squares = sum_lanes<T>(whole, [&](int64_t l) {
        const Vector<T> d = vector_at(row, l) - mean;
        return d * d;
      });
      double rest = sum_lanes<T>(whole, [&](int64_t l) { return vector_at(row, l) - mean; });  // of the rounded mean
      for (int64_t l = whole; l < pixels.count; ++l) squares += (row[l] - mean) * (row[l] - mean), rest += row[l] - mean;
      merge(sums + c, channels, count, mean + rest / count, squares - rest * rest / count);
    }
  }

  // Chan's update, which does not cancel where the mean is large.
  static void merge(double* sums, int64_t stride, double count, double mean, double squares) {
    const double total = sums[0] + count, difference = mean - sums[stride];
    if (count == 0) return;
    sums[2 * stride] += squares + difference * difference * sums[0] * count / total;
    sums[stride] += difference * count / total;
    sums[0] = total;
  }
};

template <class Body>
void each(const FieldNormParams& params, Body body) {
  each_item(params.work, [&](const FieldRun& run, int64_t part) {
    double* sums = params.sums + 3 * part * params.x.channels + run.channel;
    with_dtype(params.work.dtype, [&](auto number) {
      using F = decltype(number);
      using T = typename Computed<F>::type;
      each_tile<T>(params.work, params.x, part, [&](const Pixels& pixels) { body(Tile<T, F>(params, run, pixels), sums); });
    });
  });
}

// Calls body(tile, sums, function).
template <class Body>
void each_with_function(const FieldNormParams& params, Body body) {
  each(params, [&](const auto& tile, double* sums) {
    switch (params.function) {
      case NormFunction::identity: return body(tile, sums, Identity());
      case NormFunction::relu: return body(tile, sums, Relu());
      case NormFunction::elu: return body(tile, sums, Elu());
    }
  });
}

}  // namespace

void field_norm(const FieldNormParams& params, int64_t, int64_t) {
  each_with_function(params, [](const auto& tile, double*, auto f) { tile.template forward<decltype(f)>(); });
}

void field_norm_bwd(const FieldNormParams& params, int64_t, int64_t) {
  each(params, [](const auto& tile, double* sums) { tile.backward(sums); });
}

void field_norm_moments(const FieldNormParams& params, int64_t, int64_t) {
  each(params, [](const auto& tile, double* sums) { tile.moments(sums); });
}

void field_norm_centred_sums(const FieldNormParams& params, int64_t, int64_t) {
  each_with_function(params, [](const auto& tile, double* sums, auto f) { tile.template centred_sums<decltype(f)>(sums); });
}

void field_norm_through_bwd(const FieldNormParams& params, int64_t, int64_t) {
  each_with_function(params, [](const auto& tile, double*, auto f) { tile.template through_backward<decltype(f)>(); });
}

// The sums of all parts, for channels [begin, end).
void field_norm_bwd_finish(const FieldNormParams& params, int64_t begin, int64_t end) {
  const int64_t channels = params.x.channels;
  for (int64_t c = begin; c < end; ++c)
    for (int i = 0; i < 2; ++i) {
      double& sum = params.results[i * channels + c] = 0;
      for (int64_t part = 0; part < params.work.parts; ++part) sum += params.sums[(3 * part + i) * channels + c];
    }
}

void field_norm_moments_finish(const FieldNormParams& params, int64_t begin, int64_t end) {
  const int64_t channels = params.x.channels;
  for (int64_t c = begin; c < end; ++c) {
    double all[3] = {};
    for (int64_t part = 0; part < params.work.parts; ++part) {
      const double* sums = params.sums + 3 * part * channels + c;
      Tile<float, float>::merge(all, 1, sums[0], sums[channels], sums[2 * channels]);
    }
    params.results[c] = all[0] > 0 ? all[1] : __builtin_nan("");
    params.results[channels + c] = all[2] / all[0];  // NaN where there are no pixels
  }
}

}  // namespace equiconv::EQUICONV_ISA
