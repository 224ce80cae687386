#include "../field_norm.h"

#include <cmath>
#include <tuple>

#include "../cpu/isa.h"
#include "field_tensor.h"

EQUICONV_DECLARE_CPU(field_norm, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_bwd, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_bwd_finish, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_moments, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_moments_finish, FieldNormParams)

EQUICONV_DECLARE_CPU(field_norm_centred_sums, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_inner_bwd, FieldNormParams)

namespace equiconv {
namespace {

using torch::headeronly::ScalarType;

struct Call {
  FieldNormParams params{};
  std::vector<FieldRun> runs;
  ScalarType computed;

  Call(const char* op, const Tensor& x, const Tensor& fields, const Tensor& bases) {
    STD_TORCH_CHECK(fields.dim() == 2 && fields.size(1) * sizeof(int64_t) == sizeof(FieldNormField) &&
                        fields.scalar_type() == ScalarType::Long && fields.is_contiguous() && bases.is_contiguous(),
                    op, ": fields must be the int64 table of a field type");
    params.x = field_tensor(op, x);
    params.fields = static_cast<const FieldNormField*>(fields.const_data_ptr());
    params.bases = bases.const_data_ptr();
    int64_t channels = 0;
    for (int64_t f = 0; f < fields.size(0); ++f) {
      STD_TORCH_CHECK(params.fields[f].channel == channels && params.fields[f].size > 0, op, ": the fields do not follow each other");
      channels += params.fields[f].size;
    }
    STD_TORCH_CHECK(channels == params.x.channels, op, ": x must have ", channels, " channels, got ", params.x.channels);
    computed = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(bases.scalar_type() == computed, op, ": bases must be float64 with float64, else float32");
    runs = runs_of(params.fields, fields.size(0), run_channels(params.x));
    params.work = divide(params.x, runs, dtype_of(x));
  }

  // Channels without a change of basis, which need no table.
  Call(const char* op, const Tensor& x) {
    params.x = field_tensor(op, x);
    computed = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const int64_t together = run_channels(params.x);
    for (int64_t c = 0; c < params.x.channels; c += together)
      runs.push_back({int32_t(c), int32_t(std::min(together, params.x.channels - c)), 0, 0});
    params.work = divide(params.x, runs, dtype_of(x));
  }

  void check(const char* op, const Tensor& per_channel) const {
    STD_TORCH_CHECK(per_channel.dim() == 1 && per_channel.size(0) == params.x.channels && per_channel.is_contiguous() &&
                        per_channel.scalar_type() == computed,
                    op, ": scale and shift must have one number for each channel, in float32 (float64 with float64)");
  }

  template <class Kernel>
  void run(Kernel kernel) {
    run_items(params, field_norm_scratch(widest(runs), params.work.lanes), kernel);
  }

  // The kernel, then the sums of its parts: [channels] twice.
  template <class Kernel, class Finish>
  std::tuple<Tensor, Tensor> sums(const Tensor& like, Kernel kernel, Finish finish) {
    std::vector<double> sums(3 * params.work.parts * params.x.channels, 0.0);
    params.sums = sums.data();
    run(kernel);
    Tensor first = torch::stable::new_empty(like, {params.x.channels}, computed);
    Tensor second = torch::stable::new_empty(like, {params.x.channels}, computed);
    params.results[0] = first.mutable_data_ptr(), params.results[1] = second.mutable_data_ptr();
    finish(params, 0, params.x.channels);
    return {first, second};
  }
};

Tensor field_norm_glue(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& fields, const Tensor& bases) {
  Call call("field_norm", x, fields, bases);
  call.check("field_norm", scale);
  call.check("field_norm", shift);
  Tensor y = empty_fields(x, x.size(1));
  call.params.y = field_tensor_like("field_norm", y, call.params.x, call.params.work.dtype);
  call.params.scale = scale.const_data_ptr();
  call.params.shift = shift.const_data_ptr();
  call.run(field_norm_cpu());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> field_norm_bwd_glue(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                       const Tensor& fields, const Tensor& bases) {
  Call call("field_norm_bwd", x, fields, bases);
  call.check("field_norm_bwd", scale);
  Tensor grad_x = empty_fields(x, x.size(1));
  call.params.y = field_tensor_like("field_norm_bwd", grad_x, call.params.x, call.params.work.dtype);
  call.params.grad = field_tensor_like("field_norm_bwd", grad, call.params.x, call.params.work.dtype);
  STD_TORCH_CHECK(grad.size(1) == x.size(1), "field_norm_bwd: grad must have the shape of x");
  call.params.scale = scale.const_data_ptr();
  auto [grad_scale, grad_shift] = call.sums(x, field_norm_bwd_cpu(), field_norm_bwd_finish_cpu());
  return {grad_x, grad_scale, grad_shift};
}

std::tuple<Tensor, Tensor> field_norm_moments_glue(const Tensor& x, const Tensor& fields, const Tensor& bases) {
  Call call("field_norm_moments", x, fields, bases);
  return call.sums(x, field_norm_moments_cpu(), field_norm_moments_finish_cpu());
}

// ---- field_norm_inner: a few numbers of each field between the passes over its channels ----

// What the channels of a field have in common. Numbers are those of the computation, T.
template <class T>
struct InnerFields {
  const int64_t* of_channel;
  int64_t channels, fields;
  std::vector<double> count;  // of numbers in each field

  InnerFields(const FieldTensor& x, const Tensor& of_channel, int64_t fields)
      : of_channel(static_cast<const int64_t*>(of_channel.const_data_ptr())), channels(x.channels), fields(fields), count(fields, 0.0) {
    STD_TORCH_CHECK(of_channel.scalar_type() == ScalarType::Long && of_channel.is_contiguous() && of_channel.numel() == channels,
                    "field_norm_inner: field_of_channel must be int64, one number for each channel");
    for (int64_t c = 0; c < channels; ++c) {
      STD_TORCH_CHECK(this->of_channel[c] >= 0 && this->of_channel[c] < fields, "field_norm_inner: there is no such field");
      count[this->of_channel[c]] += double(x.batch * x.pixels);
    }
  }

  // The sum over the channels of each field
  template <class Term>
  std::vector<double> sum(Term term) const {
    std::vector<double> sums(fields, 0.0);
    for (int64_t c = 0; c < channels; ++c) sums[of_channel[c]] += term(c);
    return sums;
  }

  template <class Value>
  std::vector<T> spread(Value value) const {
    std::vector<T> values(channels);
    for (int64_t c = 0; c < channels; ++c) values[c] = T(value(of_channel[c]));
    return values;
  }
};

template <class T>
const T* numbers(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }

template <class T>
Tensor per_field(const Tensor& like, const std::vector<double>& values, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, {int64_t(values.size())}, dtype);
  std::copy(values.begin(), values.end(), static_cast<T*>(t.mutable_data_ptr()));
  return t;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> inner(Call& call, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                         const Tensor& field_of_channel, double eps) {
  const InnerFields<T> fields(call.params.x, field_of_channel, weight.numel());
  auto [channel_mean, channel_var] = call.sums(x, field_norm_moments_cpu(), field_norm_moments_finish_cpu());
  const double values = double(call.params.x.batch * call.params.x.pixels);
  const T *means = numbers<T>(channel_mean), *vars = numbers<T>(channel_var);
  std::vector<double> mean = fields.sum([&](int64_t c) { return means[c] * values; });
  for (size_t f = 0; f < mean.size(); ++f) mean[f] /= fields.count[f];
  std::vector<double> var = fields.sum([&](int64_t c) {
    const double apart = means[c] - mean[fields.of_channel[c]];
    return (vars[c] + apart * apart) * values;
  });
  for (size_t f = 0; f < var.size(); ++f) var[f] /= fields.count[f];
  const auto scale_of = [&](int64_t f) { return numbers<T>(weight)[f] / std::sqrt(var[f] + eps); };
  const std::vector<T> scale = fields.spread(scale_of);
  const std::vector<T> shift = fields.spread([&](int64_t f) { return numbers<T>(bias)[f] - mean[f] * scale_of(f); });
  Tensor y = empty_fields(x, x.size(1));
  call.params.y = field_tensor_like("field_norm_inner", y, call.params.x, call.params.work.dtype);
  call.params.scale = scale.data(), call.params.shift = shift.data();
  call.run(field_norm_cpu());
  return {y, per_field<T>(x, mean, call.computed), per_field<T>(x, var, call.computed)};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> inner_bwd(Call& call, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                             const Tensor& var, const Tensor& field_of_channel, double eps,
                                             const std::optional<Tensor>& bias) {
  const InnerFields<T> fields(call.params.x, field_of_channel, weight.numel());
  const auto rstd = [&](int64_t f) { return 1 / std::sqrt(double(numbers<T>(var)[f]) + eps); };
  const auto scale_of = [&](int64_t f) { return numbers<T>(weight)[f] * rstd(f); };
  const auto offset_of = [&](int64_t f) { return (bias ? double(numbers<T>(*bias)[f]) : 0.0) - numbers<T>(mean)[f] * scale_of(f); };
  const std::vector<T> means = fields.spread([&](int64_t f) { return numbers<T>(mean)[f]; });
  const std::vector<T> scale = fields.spread(scale_of), offset = fields.spread(offset_of);
  call.params.mean = means.data(), call.params.scale = scale.data(), call.params.offset = offset.data();
  auto [products, sums] = call.sums(x, field_norm_centred_sums_cpu(), field_norm_bwd_finish_cpu());
  const T *product = numbers<T>(products), *sum = numbers<T>(sums);
  std::vector<double> grad_weight = fields.sum([&](int64_t c) { return double(product[c]); });
  for (int64_t f = 0; f < fields.fields; ++f) grad_weight[f] *= rstd(f);
  const std::vector<double> grad_bias = fields.sum([&](int64_t c) { return double(sum[c]); });
  const std::vector<T> slope = fields.spread([&](int64_t f) { return -scale_of(f) * rstd(f) * grad_weight[f] / fields.count[f]; });
  const std::vector<T> shift = fields.spread([&](int64_t f) { return -scale_of(f) * grad_bias[f] / fields.count[f]; });
  Tensor grad_x = empty_fields(x, x.size(1));
  call.params.y = field_tensor_like("field_norm_inner_bwd", grad_x, call.params.x, call.params.work.dtype);
  call.params.slope = slope.data(), call.params.shift = shift.data();
  call.run(field_norm_inner_bwd_cpu());
  return {grad_x, per_field<T>(x, grad_weight, call.computed), per_field<T>(x, grad_bias, call.computed)};
}

NormFunction function_of(int64_t function) {
  STD_TORCH_CHECK(function >= 0 && function <= int64_t(NormFunction::elu), "field_norm_inner: there is no such function");
  return NormFunction(function);
}

void check_per_field(const char* op, const Call& call, const Tensor& weight, const Tensor& other) {
  for (const Tensor* t : {&weight, &other})
    STD_TORCH_CHECK(t->dim() == 1 && t->is_contiguous() && t->scalar_type() == call.computed && t->numel() == weight.numel(),
                    op, ": there must be one number for each field, in float32 (float64 with float64)");
}

std::tuple<Tensor, Tensor, Tensor> field_norm_inner_glue(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                         const Tensor& field_of_channel, double eps, int64_t function) {
  Call call("field_norm_inner", x);
  call.params.function = function_of(function);
  check_per_field("field_norm_inner", call, weight, bias);
  return call.computed == ScalarType::Double ? inner<double>(call, x, weight, bias, field_of_channel, eps)
                                             : inner<float>(call, x, weight, bias, field_of_channel, eps);
}

std::tuple<Tensor, Tensor, Tensor> field_norm_inner_bwd_glue(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                             const Tensor& mean, const Tensor& var,
                                                             const Tensor& field_of_channel, double eps,
                                                             const std::optional<Tensor>& bias, int64_t function) {
  Call call("field_norm_inner_bwd", x);
  call.params.function = function_of(function);
  if (bias) check_per_field("field_norm_inner_bwd", call, weight, *bias);
  STD_TORCH_CHECK(bias || function == 0, "field_norm_inner_bwd: a function needs the bias");
  check_per_field("field_norm_inner_bwd", call, weight, mean);
  check_per_field("field_norm_inner_bwd", call, weight, var);
  call.params.grad = field_tensor_like("field_norm_inner_bwd", grad, call.params.x, call.params.work.dtype);
  STD_TORCH_CHECK(grad.size(1) == x.size(1), "field_norm_inner_bwd: grad must have the shape of x");
  return call.computed == ScalarType::Double ? inner_bwd<double>(call, x, weight, mean, var, field_of_channel, eps, bias)
                                             : inner_bwd<float>(call, x, weight, mean, var, field_of_channel, eps, bias);
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("field_norm", EQUICONV_BOX(equiconv::field_norm_glue));
  m.impl("field_norm_bwd", EQUICONV_BOX(equiconv::field_norm_bwd_glue));
  m.impl("field_norm_moments", EQUICONV_BOX(equiconv::field_norm_moments_glue));
  m.impl("field_norm_inner", EQUICONV_BOX(equiconv::field_norm_inner_glue));
  m.impl("field_norm_inner_bwd", EQUICONV_BOX(equiconv::field_norm_inner_bwd_glue));
}
