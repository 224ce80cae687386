#include "../field_norm.h"

#include <tuple>

#include "../cpu/isa.h"
#include "field_parts.h"
#include "field_tensor.h"

EQUICONV_DECLARE_CPU(field_norm, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_bwd, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_bwd_finish, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_moments, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_moments_finish, FieldNormParams)

EQUICONV_DECLARE_CPU(field_norm_centred_sums, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_through_bwd, FieldNormParams)

namespace equiconv {
namespace {

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
  std::vector<double> sums(Kernel kernel, Finish finish) {
    std::vector<double> sums(3 * params.work.parts * params.x.channels, 0.0), results(2 * params.x.channels);
    params.sums = sums.data(), params.results = results.data();
    run(kernel);
    finish(params, 0, params.x.channels);
    return results;
  }

  // Those of a kernel that makes gradients.
  template <class Kernel>
  std::vector<double> sums(Kernel kernel) { return sums(kernel, field_norm_bwd_finish_cpu()); }

  // Mean and variance of each channel
  std::vector<double> moments() { return sums(field_norm_moments_cpu(), field_norm_moments_finish_cpu()); }

  // [channels] twice, as tensors
  std::tuple<Tensor, Tensor> tensors(const Tensor& like, const std::vector<double>& values) const {
    return {tensor(like, values.data()), tensor(like, values.data() + params.x.channels)};
  }

  Tensor tensor(const Tensor& like, const double* values) const {
    Tensor t = torch::stable::new_empty(like, {params.x.channels}, computed);
    if (computed == ScalarType::Double) std::copy(values, values + params.x.channels, static_cast<double*>(t.mutable_data_ptr()));
    else std::copy(values, values + params.x.channels, static_cast<float*>(t.mutable_data_ptr()));
    return t;
  }

  void set_function(NormFunction function, bool through) {
    STD_TORCH_CHECK(!through || !params.fields, "field_batch_norm: statistics through which gradients flow are of fields without a change of basis");
    STD_TORCH_CHECK(through || function == NormFunction::identity, "field_batch_norm: a function needs statistics through which gradients flow");
    params.function = function;
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
  auto [grad_scale, grad_shift] = call.tensors(x, call.sums(field_norm_bwd_cpu()));
  return {grad_x, grad_scale, grad_shift};
}

std::tuple<Tensor, Tensor> field_norm_moments_glue(const Tensor& x, const Tensor& fields, const Tensor& bases) {
  Call call("field_norm_moments", x, fields, bases);
  return call.tensors(x, call.moments());
}

// ---- field_batch_norm: a few numbers of each part of a field between the passes over its channels ----

template <class T>
const T* numbers(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }

Statistics statistics_of(int64_t statistics) {
  STD_TORCH_CHECK(statistics >= 0 && statistics <= int64_t(Statistics::running), "field_norm_statistics: there are no such statistics");
  return Statistics(statistics);
}

NormFunction function_of(int64_t function) {
  STD_TORCH_CHECK(function >= 0 && function <= int64_t(NormFunction::elu), "field_batch_norm: there is no such function");
  return NormFunction(function);
}

// A call with the table of fields only where one of them has a change of basis.
Call call_on(const char* op, const Tensor& x, const Tensor& fields, const Tensor& bases) {
  return bases.numel() == 0 ? Call(op, x) : Call(op, x, fields, bases);
}

// Counts a batch in each of them.
std::vector<int64_t> count_batches(const std::vector<Tensor>& counters) {
  std::vector<int64_t> batches;
  for (const Tensor& t : counters) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == 1, "field_norm_statistics: counters must be int64, of one number");
    batches.push_back(++*static_cast<int64_t*>(t.data_ptr()));
  }
  return batches;
}

template <class T>
Tensor statistics(Call& call, const Tensor& x, const std::optional<Tensor>& moments, const Tensor& parts_table, const Tensor& matrices,
                  const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<Tensor>& running_means,
                  const std::vector<Tensor>& running_vars, const std::vector<Tensor>& counters, const StatisticsOptions& options) {
  const char* op = "field_norm_statistics";
  const int64_t channels = call.params.x.channels;
  const FieldParts parts(op, parts_table, matrices, channels, call.computed);
  NumberList means(op, running_means), vars(op, running_vars);
  const NumberList weight_list(op, weights), bias_list(op, biases);
  parts.check_parameters(op, weight_list.size(), bias_list.size());
  parts.check_running(op, means.size(), vars.size());
  STD_TORCH_CHECK(options.statistics != Statistics::running || !vars.empty(), op, ": there are no running statistics");
  STD_TORCH_CHECK(options.momentum || !options.batch || vars.empty() || !counters.empty(), op, ": an average needs a counter");
  const std::vector<int64_t> batches = options.batch ? count_batches(counters) : std::vector<int64_t>();
  std::vector<double> moments_of_x;
  const double *mean = nullptr, *var = nullptr;
  double values = double(call.params.x.batch * call.params.x.pixels);
  if (options.batch && moments) {
    STD_TORCH_CHECK(moments->scalar_type() == ScalarType::Double && moments->is_contiguous() && moments->numel() == 2 * channels + 1,
                    op, ": moments must be float64, two numbers for each channel and one");
    mean = numbers<double>(*moments), var = mean + channels, values = var[channels];
  } else if (options.batch) {
    moments_of_x = call.moments();
    mean = moments_of_x.data(), var = mean + channels;
  }
  Tensor result = torch::stable::new_empty(x, {4, channels}, call.computed);
  PartStatistics<T>(parts, options, means, vars, batches)
      .compute(mean, var, values, weight_list, bias_list, static_cast<T*>(result.mutable_data_ptr()), channels);
  if (options.batch && !vars.empty()) means.store(), vars.store();
  return result;
}

Tensor field_norm_statistics_glue(const Tensor& x, const std::optional<Tensor>& moments, const Tensor& fields, const Tensor& bases,
                                  const Tensor& parts, const Tensor& matrices, const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& biases, const std::vector<Tensor>& running_means,
                                  const std::vector<Tensor>& running_vars, const std::vector<Tensor>& counters, double eps,
                                  const std::optional<double>& momentum, bool batch, int64_t by) {
  Call call = call_on("field_norm_statistics", x, fields, bases);
  const StatisticsOptions options{eps, momentum, batch, statistics_of(by)};
  const auto compute = call.computed == ScalarType::Double ? statistics<double> : statistics<float>;
  return compute(call, x, moments, parts, matrices, weights, biases, running_means, running_vars, counters, options);
}

// The rows of `numbers`, as equiconv/reference/field_batch_norm.py names them.
template <class T>
struct Numbers {
  const T *scale, *shift, *mean, *deviation;

  Numbers(const char* op, const Tensor& numbers, const Call& call) {
    const int64_t channels = call.params.x.channels;
    STD_TORCH_CHECK(numbers.is_contiguous() && numbers.scalar_type() == call.computed && numbers.numel() == 4 * channels,
                    op, ": numbers must have four for each channel, in float32 (float64 with float64)");
    scale = static_cast<const T*>(numbers.const_data_ptr());
    shift = scale + channels, mean = shift + channels, deviation = mean + channels;
  }
};

template <class T>
void normalise(const Tensor& numbers, Tensor& y, Call& call) {
  const Numbers<T> of("field_batch_norm", numbers, call);
  call.params.y = field_tensor_like("field_batch_norm", y, call.params.x, call.params.work.dtype);
  call.params.scale = of.scale, call.params.shift = of.shift;
  call.run(field_norm_cpu());
}

Tensor field_batch_norm_glue(const Tensor& x, const Tensor& numbers, const Tensor& fields, const Tensor& bases, const Tensor&,
                             const Tensor&, const std::vector<Tensor>&, const std::vector<Tensor>&, double, bool through,
                             int64_t function) {
  Call call = call_on("field_batch_norm", x, fields, bases);
  call.set_function(function_of(function), through);
  Tensor y = empty_fields(x, x.size(1));
  call.computed == ScalarType::Double ? normalise<double>(numbers, y, call) : normalise<float>(numbers, y, call);
  return y;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> batch_norm_bwd(Call& call, const Tensor& x, const Tensor& numbers, const Tensor& parts_table,
                                                  const Tensor& matrices, int64_t weights, int64_t biases, bool through) {
  const char* op = "field_batch_norm_bwd";
  const int64_t channels = call.params.x.channels;
  const FieldParts parts(op, parts_table, matrices, channels, call.computed);
  parts.check_parameters(op, weights, biases);
  const Numbers<T> of(op, numbers, call);
  Tensor grad_x = empty_fields(x, x.size(1));
  const FieldTensor out = field_tensor_like(op, grad_x, call.params.x, call.params.work.dtype);
  call.params.y = out;
  call.params.scale = of.scale, call.params.mean = of.mean, call.params.offset = of.shift;
  const std::vector<double> sums = call.sums(through ? field_norm_centred_sums_cpu() : field_norm_bwd_cpu());
  const double *products = sums.data(), *totals = products + channels;
  Tensor grad_weights = torch::stable::new_empty(x, {weights}, call.computed);
  Tensor grad_biases = torch::stable::new_empty(x, {biases}, call.computed);
  gradients_of_parts<T>(parts, products, totals, of.deviation, weights ? static_cast<T*>(grad_weights.mutable_data_ptr()) : nullptr,
                        biases ? static_cast<T*>(grad_biases.mutable_data_ptr()) : nullptr);
  if (through) {
    std::vector<T> slope(channels), shift(channels);
    through_parts<T>(parts, products, totals, double(call.params.x.batch * call.params.x.pixels), of.scale, of.deviation, slope.data(), shift.data());
    call.params.slope = slope.data(), call.params.shift = shift.data();
    call.run(field_norm_through_bwd_cpu());
  }
  return {grad_x, grad_weights, grad_biases};
}

std::tuple<Tensor, Tensor, Tensor> field_batch_norm_bwd_glue(const Tensor& grad, const Tensor& x, const Tensor& numbers,
                                                             const Tensor& fields, const Tensor& bases, const Tensor& parts,
                                                             const Tensor& matrices, const std::vector<Tensor>& weights,
                                                             const std::vector<Tensor>& biases, double, bool through, int64_t function) {
  const char* op = "field_batch_norm_bwd";
  Call call = call_on(op, x, fields, bases);
  call.set_function(function_of(function), through);
  call.params.grad = field_tensor_like(op, grad, call.params.x, call.params.work.dtype);
  STD_TORCH_CHECK(grad.size(1) == x.size(1), op, ": grad must have the shape of x");
  const auto compute = call.computed == ScalarType::Double ? batch_norm_bwd<double> : batch_norm_bwd<float>;
  return compute(call, x, numbers, parts, matrices, count_numbers(weights), count_numbers(biases), through);
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("field_norm", EQUICONV_BOX(equiconv::field_norm_glue));
  m.impl("field_norm_bwd", EQUICONV_BOX(equiconv::field_norm_bwd_glue));
  m.impl("field_norm_moments", EQUICONV_BOX(equiconv::field_norm_moments_glue));
  m.impl("field_norm_statistics", EQUICONV_BOX(equiconv::field_norm_statistics_glue));
  m.impl("field_batch_norm", EQUICONV_BOX(equiconv::field_batch_norm_glue));
  m.impl("field_batch_norm_bwd", EQUICONV_BOX(equiconv::field_batch_norm_bwd_glue));
}
