#include "../field_gate.h"

#include <tuple>

#include "../cpu/isa.h"
#include "field_tensor.h"

EQUICONV_DECLARE_CPU(field_gate, FieldGateParams)
EQUICONV_DECLARE_CPU(field_gate_bwd, FieldGateParams)

namespace equiconv {
namespace {

using torch::headeronly::ScalarType;

struct Call {
  FieldGateParams params{};
  std::vector<FieldRun> runs;

  Call(const char* op, const Tensor& x, const std::optional<Tensor>& gates, const std::optional<Tensor>& bias,
       const Tensor& fields, int64_t function, const std::optional<Tensor>& eps, int64_t out_channels) {
    STD_TORCH_CHECK(fields.dim() == 2 && fields.size(1) * sizeof(int64_t) == sizeof(FieldGateField) &&
                        fields.scalar_type() == ScalarType::Long && fields.is_contiguous(),
                    op, ": fields must be the int64 table of a field type");
    const ScalarType computed = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    for (const std::optional<Tensor>* t : {&bias, &eps})
      STD_TORCH_CHECK(!*t || ((*t)->is_contiguous() && (*t)->scalar_type() == computed),
                      op, ": bias and eps must be contiguous, in float32 (float64 with float64)");
    STD_TORCH_CHECK(!eps || eps->numel() == 1, op, ": eps must be one number");
    STD_TORCH_CHECK(function >= 0 && function <= int64_t(GateFunction::gate), op, ": there is no such function");
    params.x = field_tensor(op, x);
    params.work.dtype = dtype_of(x);
    params.gates_are_x = !gates;
    params.gates = gates ? field_tensor_like(op, *gates, params.x, params.work.dtype) : params.x;
    params.fields = static_cast<const FieldGateField*>(fields.const_data_ptr());
    params.num_fields = fields.size(0);
    params.bias = bias ? bias->const_data_ptr() : nullptr;
    params.function = GateFunction(function);
    if (eps) params.eps = computed == ScalarType::Double ? *static_cast<const double*>(eps->const_data_ptr())
                                                         : *static_cast<const float*>(eps->const_data_ptr());
    check_fields(op, bias ? bias->numel() : params.num_fields, out_channels);
    runs.push_back({0, int32_t(std::max(params.x.channels, out_channels)), 0, int32_t(params.num_fields)});
    params.work = divide(params.x, runs, params.work.dtype);
  }

  // Every number of the table is within its tensor.
  void check_fields(const char* op, int64_t biases, int64_t out_channels) const {
    for (int64_t f = 0; f < params.num_fields; ++f) {
      const FieldGateField& field = params.fields[f];
      STD_TORCH_CHECK(field.size > 0 && field.channel >= 0 && field.channel + field.size <= params.x.channels &&
                          field.out_channel >= 0 && field.out_channel + field.size <= out_channels &&
                          field.gate < params.gates.channels && field.gate_out < out_channels && field.bias >= 0 && field.bias < biases &&
                          (field.gate >= 0 || params.function != GateFunction::gate),
                      op, ": fields, gates and biases do not fit the table");
    }
  }

  // Where the pixels of all tensors lie side by side only the last few of an image need scratch, and long rows are faster.
  bool is_in_place() const {
    for (const FieldTensor* t : {&params.x, &params.gates, &params.y, &params.grad, &params.grad_x, &params.grad_gates})
      if (t->data != nullptr && t->stride_pixel != 1) return false;
    return params.work.dtype == DType::f32 || params.work.dtype == DType::f64;
  }

  template <class Kernel>
  void run(int64_t out_channels, Kernel kernel) {
    const bool in_place = is_in_place();
    if (in_place) params.work.lanes = 4096;
    const int64_t lanes = in_place ? 16 : params.work.lanes;
    run_items(params, field_gate_scratch(params.x.channels, params.gates.channels, out_channels, lanes), kernel);
  }
};

// The table of elements is for the derivative of field_gate_bwd.
Tensor field_gate_glue(const Tensor& x, const std::optional<Tensor>& gates, const std::optional<Tensor>& bias,
                       const Tensor& fields, const Tensor&, int64_t function, const std::optional<Tensor>& eps, int64_t out_channels) {
  Call call("field_gate", x, gates, bias, fields, function, eps, out_channels);
  Tensor y = empty_fields(x, out_channels);
  call.params.y = field_tensor_like("field_gate", y, call.params.x, call.params.work.dtype);
  call.run(out_channels, field_gate_cpu());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> field_gate_bwd_glue(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& gates,
                                                       const std::optional<Tensor>& bias, const Tensor& fields,
                                                       const Tensor&, int64_t function, const std::optional<Tensor>& eps) {
  Call call("field_gate_bwd", x, gates, bias, fields, function, eps, grad.size(1));
  call.params.grad = field_tensor_like("field_gate_bwd", grad, call.params.x, call.params.work.dtype);
  Tensor grad_x = empty_fields(x, x.size(1)), grad_gates = empty_fields(x, gates ? gates->size(1) : 0);
  call.params.grad_x = field_tensor_like("field_gate_bwd", grad_x, call.params.x, call.params.work.dtype);
  call.params.grad_gates = gates ? field_tensor_like("field_gate_bwd", grad_gates, call.params.x, call.params.work.dtype) : call.params.grad_x;
  std::vector<double> sums(call.params.work.parts * call.params.num_fields, 0.0);
  call.params.sums = sums.data();
  call.run(grad.size(1), field_gate_bwd_cpu());
  std::vector<double> total(bias ? bias->numel() : 0, 0.0);
  for (size_t i = 0; i < sums.size(); ++i) {
    const int64_t place = call.params.fields[i % call.params.num_fields].bias;
    if (bias) total[place] += sums[i];
  }
  Tensor grad_bias = torch::stable::new_empty(x, {int64_t(total.size())}, bias ? bias->scalar_type() : ScalarType::Float);
  for (size_t i = 0; i < total.size(); ++i) {
    if (grad_bias.scalar_type() == ScalarType::Double) static_cast<double*>(grad_bias.mutable_data_ptr())[i] = total[i];
    else static_cast<float*>(grad_bias.mutable_data_ptr())[i] = float(total[i]);
  }
  return {grad_x, grad_gates, grad_bias};
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("field_gate", EQUICONV_BOX(equiconv::field_gate_glue));
  m.impl("field_gate_bwd", EQUICONV_BOX(equiconv::field_gate_bwd_glue));
}
