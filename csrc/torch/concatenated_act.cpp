#include "../concatenated_act.h"

#include "../cpu/isa.h"
#include "field_tensor.h"

EQUICONV_DECLARE_CPU(concatenated_act, ConcatenatedActParams)
EQUICONV_DECLARE_CPU(concatenated_act_bwd, ConcatenatedActParams)

namespace equiconv {
namespace {

struct Call {
  ConcatenatedActParams params{};
  std::vector<FieldRun> runs;

  Call(const char* op, const Tensor& x, int64_t function) {
    STD_TORCH_CHECK(function >= 0 && function <= int64_t(Function::tanh), op, ": there is no such function");
    params.x = field_tensor(op, x);
    params.function = Function(function);
    const int64_t most = run_channels(params.x);
    for (int64_t c = 0; c < params.x.channels; c += most)
      runs.push_back({int32_t(c), int32_t(std::min(most, params.x.channels - c)), 0, 0});
    params.work = divide(params.x, runs, dtype_of(x));
  }

  template <class Kernel>
  void run(const char* op, const Tensor& y, Kernel kernel) {
    params.y = field_tensor_like(op, y, params.x, params.work.dtype);
    STD_TORCH_CHECK(params.y.channels == 2 * params.x.channels, op, ": the output has twice the channels of x");
    run_items(params, concatenated_act_scratch(widest(runs), params.work.lanes), kernel);
  }
};

Tensor concatenated_act_glue(const Tensor& x, int64_t function) {
  Call call("concatenated_act", x, function);
  Tensor y = empty_fields(x, 2 * x.size(1));
  call.run("concatenated_act", y, concatenated_act_cpu());
  return y;
}

Tensor concatenated_act_bwd_glue(const Tensor& grad, const Tensor& x, int64_t function) {
  Call call("concatenated_act_bwd", x, function);
  Tensor grad_x = empty_fields(x, x.size(1));
  call.params.grad_x = field_tensor_like("concatenated_act_bwd", grad_x, call.params.x, call.params.work.dtype);
  call.run("concatenated_act_bwd", grad, concatenated_act_bwd_cpu());
  return grad_x;
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("concatenated_act", EQUICONV_BOX(equiconv::concatenated_act_glue));
  m.impl("concatenated_act_bwd", EQUICONV_BOX(equiconv::concatenated_act_bwd_glue));
}
