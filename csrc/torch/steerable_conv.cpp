#include "../cpu/isa.h"
#include "glue.h"
#include "steerable_conv_layout.h"
#include "thread_scratch.h"

#include <tuple>

EQUICONV_DECLARE_CPU(steerable_conv, steerable::Params)
EQUICONV_DECLARE_CPU(steerable_conv_pack, steerable::Params)
EQUICONV_DECLARE_CPU(steerable_conv_unpack, steerable::Params)

namespace equiconv {
namespace {

using steerable::kAxes;
using steerable::Params;

// (outer, middle, inner): in the plane there is no middle.
void set_axes(const std::vector<int64_t>& from, int64_t missing, int64_t (&axes)[kAxes]) {
  STD_TORCH_CHECK(from.size() == 2 || from.size() == 3, "steerable_conv: two or three spatial dimensions, got ", from.size());
  axes[0] = from[0], axes[1] = from.size() == 3 ? from[1] : missing, axes[2] = from.back();
}

std::vector<int64_t> spatial(const Tensor& t) {
  std::vector<int64_t> size;
  for (int64_t d = 2; d < t.dim(); ++d) size.push_back(t.size(d));
  return size;
}

template <class Kernel>
void parallel(const Params& params, int64_t work, Kernel kernel_function) {
  torch::stable::parallel_for(0, work, std::max<int64_t>(1, work / torch::stable::get_num_threads()),
                              [&](int64_t begin, int64_t end) { kernel_function(params, begin, end); });
}

void check_tables(const Tensor& like, const Tensor& weights, const Tensor& index, const Tensor& values) {
  for (const Tensor* t : {&like, &weights, &index, &values}) {
    STD_TORCH_CHECK(t->is_contiguous(), "steerable_conv: tensors and tables must be contiguous");
    STD_TORCH_CHECK(t->numel() == 0 || t->const_data_ptr() != nullptr, "steerable_conv: the memory of a tensor was freed");
  }
  STD_TORCH_CHECK(index.scalar_type() == torch::headeronly::ScalarType::Int, "steerable_conv: index must be an int32 table");
  for (const Tensor* t : {&weights, &values})
    STD_TORCH_CHECK(t->scalar_type() == like.scalar_type(), "steerable_conv: all floating-point tensors must have one dtype");
  const DType dtype = dtype_of(like);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "steerable_conv: float32 or float64 only");
}

// The matrices W of weights; params have the matrices' places.
Tensor packed_weights(Params& params, const steerable::Matrices& matrices, const Tensor& weights) {
  Tensor packed = torch::stable::new_zeros(weights, {params.conv_groups * params.packed_size});
  params.weights = weights.const_data_ptr(), params.packed = packed.mutable_data_ptr();
  parallel(params, matrices.block_fields(), steerable_conv_pack_cpu());
  return packed;
}

// Runs the stages from the source to the target or, with a companion, to the gradient of the weights, or both.
struct Call {
  Params params{};
  int64_t kernel[kAxes], dilation[kAxes];

  // weights: the layer's, or packed ones
  Call(const Tensor& source, const Tensor& weights, const Tensor& index, const Tensor& values,
       const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
       const std::vector<int64_t>& dilations, int64_t groups, bool up, const std::vector<int64_t>& target_size) {
    check_tables(source, weights, index, values);
    params.dtype = dtype_of(source);
    STD_TORCH_CHECK(source.dim() == int64_t(target_size.size()) + 1 && source.dim() == int64_t(kernel_size.size()) + 2,
                    "steerable_conv: source must be [batch, channels, *size], target_size [channels, *size]");
    params.index = static_cast<const int32_t*>(index.const_data_ptr());
    params.values = values.const_data_ptr();
    params.source = source.const_data_ptr();
    params.batch = source.size(0), params.conv_groups = groups, params.up = up;
    params.source_channels = source.size(1), params.target_channels = target_size[0];
    set_axes(spatial(source), 1, params.source_size);
    set_axes({target_size.begin() + 1, target_size.end()}, 1, params.target_size);
    set_axes(stride, 1, params.stride);
    set_axes(padding, 0, params.padding);
    set_axes(kernel_size, 1, kernel);
    set_axes(dilations, 1, dilation);
  }

  // target, grad_weights: written where they are defined; are_packed: whether the weights are
  void run(const Tensor& weights, bool are_packed, Tensor* target, Tensor* grad_weights) {
    const int64_t threads = torch::stable::get_num_threads();
    const steerable::Layout layout(params, kernel, dilation, threads);
    const int64_t packed_size = params.conv_groups * params.packed_size;
    const Tensor grad_packed = torch::stable::new_zeros(weights, {grad_weights ? params.slots * packed_size : 0});
    params.grad_packed = grad_packed.mutable_data_ptr();
    Tensor packed = weights;
    if (target) {
      if (!are_packed) packed = packed_weights(params, layout, weights);
      STD_TORCH_CHECK(packed.numel() == packed_size, "steerable_conv: ", packed_size, " packed weights are needed, got ", packed.numel());
      params.packed = const_cast<void*>(packed.const_data_ptr()), params.target = target->mutable_data_ptr();
    }
    const int64_t bytes = params.scratch_size * (params.dtype == DType::f64 ? 8 : 4);
    int64_t next_slot = 0;
    params.next_slot = &next_slot;
    torch::stable::parallel_for(0, std::min(threads, params.slots), 1, [&](int64_t begin, int64_t end) {
      Params mine = params;
      mine.scratch = thread_scratch(bytes);
      steerable_conv_cpu()(mine, begin, end);
    });
    if (grad_weights) {
      params.grad_weights = grad_weights->mutable_data_ptr();
      parallel(params, layout.block_fields(), steerable_conv_unpack_cpu());
    }
  }
};

std::vector<int64_t> full_size(const Tensor& source, const std::vector<int64_t>& target_size) {
  std::vector<int64_t> size{source.size(0)};
  size.insert(size.end(), target_size.begin(), target_size.end());
  return size;
}

Tensor steerable_conv_pack_glue(const Tensor& weights, const Tensor& index, const Tensor& values, int64_t groups) {
  check_tables(weights, weights, index, values);
  Params params{};
  params.index = static_cast<const int32_t*>(index.const_data_ptr()), params.values = values.const_data_ptr();
  params.conv_groups = groups, params.dtype = dtype_of(weights);
  return packed_weights(params, steerable::Matrices(params), weights);
}

Tensor forward(const Tensor& source, const Tensor& weights, bool are_packed, const std::optional<Tensor>& bias, int64_t activation,
               double alpha, const Tensor& index, const Tensor& values, const std::vector<int64_t>& kernel,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
               int64_t groups, bool up, const std::vector<int64_t>& target_size) {
  Call call(source, weights, index, values, kernel, stride, padding, dilation, groups, up, target_size);
  Tensor target = torch::stable::new_empty(source, full_size(source, target_size));
  if (bias) {
    STD_TORCH_CHECK(bias->is_contiguous() && bias->numel() == target_size[0] && bias->scalar_type() == source.scalar_type(),
                    "steerable_conv: bias must have one number for each channel of the target");
    call.params.bias = bias->const_data_ptr();
  }
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(steerable::Activation::tanh), "steerable_conv: there is no such activation");
  call.params.activation = steerable::Activation(activation), call.params.alpha = alpha;
  if (target.numel() > 0) call.run(weights, are_packed, &target, nullptr);
  return target;
}

Tensor steerable_conv_packed_glue(
    const Tensor& source, const Tensor& packed, const std::optional<Tensor>& bias, int64_t activation, double alpha,
    const Tensor& index, const Tensor& values, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups, bool up,
    const std::vector<int64_t>& target_size) {
  return forward(source, packed, true, bias, activation, alpha, index, values, kernel, stride, padding, dilation, groups, up, target_size);
}

// The tables of the adjoint, which come after a call's own, are for the backward formula.
Tensor steerable_conv_activated_glue(
    const Tensor& source, const Tensor& weights, const std::optional<Tensor>& bias, int64_t activation, double alpha,
    const Tensor& index, const Tensor& values, const Tensor&, const Tensor&, const std::vector<int64_t>& kernel,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    bool up, const std::vector<int64_t>& target_size) {
  return forward(source, weights, false, bias, activation, alpha, index, values, kernel, stride, padding, dilation, groups, up, target_size);
}

Tensor steerable_conv_glue(const Tensor& source, const Tensor& weights, const std::optional<Tensor>& bias, const Tensor& index,
                           const Tensor& values, const Tensor& adjoint_index, const Tensor& adjoint_values,
                           const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups, bool up, const std::vector<int64_t>& target_size) {
  return steerable_conv_activated_glue(source, weights, bias, 0, 0, index, values, adjoint_index, adjoint_values, kernel, stride,
                                       padding, dilation, groups, up, target_size);
}

std::tuple<Tensor, Tensor> steerable_conv_bwd_glue(
    const Tensor& source, const Tensor& weights, const Tensor& companion, const Tensor& index, const Tensor& values,
    const Tensor&, const Tensor&, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool up, const std::vector<int64_t>& target_size, bool wants_target,
    bool wants_weights) {
  Call call(source, weights, index, values, kernel, stride, padding, dilation, groups, up, target_size);
  const std::vector<int64_t> size = full_size(source, target_size);
  STD_TORCH_CHECK(companion.is_contiguous() && companion.scalar_type() == source.scalar_type() && companion.dim() == int64_t(size.size()),
                  "steerable_conv_bwd: companion must be contiguous, of the target's size");
  for (size_t d = 0; d < size.size(); ++d) STD_TORCH_CHECK(companion.size(d) == size[d], "steerable_conv_bwd: companion must have the target's size");
  Tensor target = torch::stable::new_empty(source, wants_target ? size : std::vector<int64_t>{0});
  Tensor grad_weights = torch::stable::new_zeros(weights, {wants_weights ? weights.numel() : 0});
  if (wants_weights) call.params.companion = companion.const_data_ptr();
  if (companion.numel() > 0 && (wants_target || wants_weights))
    call.run(weights, false, wants_target ? &target : nullptr, wants_weights ? &grad_weights : nullptr);
  return {target, grad_weights};
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("steerable_conv", EQUICONV_BOX(equiconv::steerable_conv_glue));
  m.impl("steerable_conv_activated", EQUICONV_BOX(equiconv::steerable_conv_activated_glue));
  m.impl("steerable_conv_pack", EQUICONV_BOX(equiconv::steerable_conv_pack_glue));
  m.impl("steerable_conv_packed", EQUICONV_BOX(equiconv::steerable_conv_packed_glue));
  m.impl("steerable_conv_bwd", EQUICONV_BOX(equiconv::steerable_conv_bwd_glue));
}
