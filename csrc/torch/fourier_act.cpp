#include "../fourier_act.h"

#include "../cpu/isa.h"
#include "field_tensor.h"

EQUICONV_DECLARE_CPU(fourier_act, FourierActParams)
EQUICONV_DECLARE_CPU(fourier_act_bwd, FourierActParams)

namespace equiconv {
namespace {

using torch::headeronly::ScalarType;

struct Call {
  FourierActParams params{};
  std::vector<FieldRun> runs;

  Call(const char* op, const Tensor& x, const Tensor& a, const Tensor& a_inv, int64_t function) {
    const ScalarType computed = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    for (const Tensor* t : {&a, &a_inv})
      STD_TORCH_CHECK(t->dim() == 2 && t->is_contiguous() && t->scalar_type() == computed,
                      op, ": A and Ainv must be contiguous matrices of float32 (float64 with float64)");
    STD_TORCH_CHECK(a_inv.size(1) == a.size(0), op, ": Ainv must have a column for each row of A");
    params.x = field_tensor(op, x);
    params.a = a.const_data_ptr(), params.a_inv = a_inv.const_data_ptr();
    params.in_size = a.size(1), params.out_size = a_inv.size(0), params.samples = a.size(0);
    STD_TORCH_CHECK(params.in_size > 0 && params.x.channels % params.in_size == 0,
                    op, ": x must have ", params.in_size, " channels for each field, got ", params.x.channels);
    STD_TORCH_CHECK(function >= 0 && function <= int64_t(Function::tanh), op, ": there is no such function");
    params.function = Function(function);
    const int64_t largest = std::max(params.in_size, params.out_size);
    const int64_t together = std::max<int64_t>(1, run_channels(params.x) / largest);
    for (int64_t f = 0; f < fields(); f += together) {
      const int64_t count = std::min(together, fields() - f);
      runs.push_back({int32_t(f * params.in_size), int32_t(count * params.in_size), int32_t(f), int32_t(count)});
    }
    params.work = divide(params.x, runs, dtype_of(x));
    const int64_t lanes = kTileNumbers / std::max<int64_t>({params.samples, together * largest, 1}) / 32 * 32;
    params.work.lanes = std::max<int64_t>(32, lanes);
  }

  int64_t fields() const { return params.x.channels / params.in_size; }

  template <class Kernel>
  void run(Kernel kernel) {
    const int64_t most = runs.empty() ? 0 : runs[0].fields;
    run_items(params, fourier_act_scratch(most, params.in_size, params.out_size, params.samples, params.work.lanes), kernel,
              params.samples);
  }
};

Tensor fourier_act_glue(const Tensor& x, const Tensor& a, const Tensor& a_inv, int64_t function) {
  Call call("fourier_act", x, a, a_inv, function);
  Tensor y = empty_fields(x, call.fields() * call.params.out_size);
  call.params.y = field_tensor_like("fourier_act", y, call.params.x, call.params.work.dtype);
  call.run(fourier_act_cpu());
  return y;
}

Tensor fourier_act_bwd_glue(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& a_inv, int64_t function) {
  Call call("fourier_act_bwd", x, a, a_inv, function);
  call.params.grad = field_tensor_like("fourier_act_bwd", grad, call.params.x, call.params.work.dtype);
  STD_TORCH_CHECK(grad.size(1) == call.fields() * call.params.out_size, "fourier_act_bwd: grad must have the shape of the output");
  Tensor grad_x = empty_fields(x, x.size(1));
  call.params.y = field_tensor_like("fourier_act_bwd", grad_x, call.params.x, call.params.work.dtype);
  call.run(fourier_act_bwd_cpu());
  return grad_x;
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("fourier_act", EQUICONV_BOX(equiconv::fourier_act_glue));
  m.impl("fourier_act_bwd", EQUICONV_BOX(equiconv::fourier_act_bwd_glue));
}
