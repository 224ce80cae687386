#include "../field_norm.h"

#include <tuple>

#include "../cpu/isa.h"
#include "field_tensor.h"

EQUICONV_DECLARE_CPU(field_norm, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_bwd, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_bwd_finish, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_moments, FieldNormParams)
EQUICONV_DECLARE_CPU(field_norm_moments_finish, FieldNormParams)

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

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("field_norm", EQUICONV_BOX(equiconv::field_norm_glue));
  m.impl("field_norm_bwd", EQUICONV_BOX(equiconv::field_norm_bwd_glue));
  m.impl("field_norm_moments", EQUICONV_BOX(equiconv::field_norm_moments_glue));
}
