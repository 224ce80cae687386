// Compiled twice: into _cpu, and with EQUICONV_WITH_CUDA into _cuda.
#include "../expand_filter.h"

#include "glue.h"

#ifdef EQUICONV_WITH_CUDA
#include "../cuda/expand_filter.cuh"
#include "stream.h"
#else
#include "../cpu/isa.h"
#include "thread_scratch.h"
EQUICONV_DECLARE_CPU(expand_filter, ExpandFilterParams)
EQUICONV_DECLARE_CPU(expand_filter_bwd, ExpandFilterParams)
#endif

namespace equiconv {
namespace {

using torch::headeronly::ScalarType;

// [out, in, *kernel] or, transposed, [in, out, *kernel]; strides are in that order too.
Tensor empty_filter(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype, bool channels_last, bool transposed) {
  std::vector<int64_t> shape = size;
  if (transposed) std::swap(shape[0], shape[1]);
  const auto format = !channels_last || size.size() < 4 ? torch::headeronly::MemoryFormat::Contiguous
                      : size.size() == 4                ? torch::headeronly::MemoryFormat::ChannelsLast
                                                        : torch::headeronly::MemoryFormat::ChannelsLast3d;
  return torch::stable::empty(shape, dtype, torch::headeronly::Layout::Strided, like.device(), false, format);
}

// One stride serves all taps if they lie one behind the other.
bool has_tap_stride(const Tensor& filter) {
  for (int64_t d = 2; d + 1 < filter.dim(); ++d)
    if (filter.stride(d) != filter.stride(d + 1) * filter.size(d + 1)) return false;
  return true;
}

ExpandFilterParams make_params(const char* op, const Tensor& filter, const Tensor& weights, const Tensor& pairs,
                               const Tensor& index, const Tensor& values, bool transposed) {
  STD_TORCH_CHECK(pairs.dim() == 2 && pairs.size(1) * sizeof(int32_t) == sizeof(ExpandFilterPair) &&
                      pairs.scalar_type() == ScalarType::Int && index.scalar_type() == ScalarType::Int,
                  op, ": pairs and index must be the int32 tables of a plan");
  for (const Tensor* t : {&weights, &pairs, &index, &values}) {
    STD_TORCH_CHECK(t->is_contiguous(), op, ": weights and tables must be contiguous");
    STD_TORCH_CHECK(t->device() == filter.device(), op, ": all tensors must be on one device");
  }
  STD_TORCH_CHECK(weights.dim() == 1 && weights.scalar_type() == values.scalar_type(),
                  op, ": weights must have one dimension and the dtype of values");
  ExpandFilterParams params{};
  params.pairs = static_cast<const ExpandFilterPair*>(pairs.const_data_ptr());
  params.index = static_cast<const int32_t*>(index.const_data_ptr());
  params.values = values.const_data_ptr();
  params.num_pairs = pairs.size(0);
  params.taps = 1;
  for (int64_t d = 2; d < filter.dim(); ++d) params.taps *= filter.size(d);
  params.stride_out = filter.stride(transposed ? 1 : 0);
  params.stride_in = filter.stride(transposed ? 0 : 1);
  params.stride_tap = filter.dim() > 2 ? filter.stride(filter.dim() - 1) : 1;
  params.dtype = dtype_of(weights);
  params.filter_dtype = dtype_of(filter);
  const bool wide = params.dtype == DType::f64;
  STD_TORCH_CHECK((wide || params.dtype == DType::f32) && wide == (params.filter_dtype == DType::f64),
                  op, ": weights must be float32, or float64 with a float64 filter");
  return params;
}

#ifdef EQUICONV_WITH_CUDA
template <class Launch>
void run(const char* op, ExpandFilterParams& params, const Tensor& filter, const Tensor&, Launch launch) {
  const torch::stable::accelerator::DeviceGuard guard(filter.get_device_index());
  const char* error = launch(params, current_stream(filter));
  STD_TORCH_CHECK(error == nullptr, op, ": ", error);
}
#define EQUICONV_EXPAND_FILTER(op) expand_filter##op##_cuda
#else
template <class Launch>
void run(const char* op, ExpandFilterParams& params, const Tensor& filter, const Tensor& weights, Launch launch) {
  int64_t tiles = 0, numbers = 0, weights_of_pairs = 0, entries = 0;
  for (int64_t p = 0; p < params.num_pairs; ++p) {
    const ExpandFilterPair& pair = params.pairs[p];
    const int64_t field_pairs = int64_t(pair.out_fields) * pair.in_fields;
    tiles += (field_pairs + kExpandFilterLanes - 1) / kExpandFilterLanes;
    const int64_t needed = expand_filter_scratch(pair, params.taps);
    numbers = needed > numbers ? needed : numbers;
    weights_of_pairs += field_pairs * pair.paths;
    entries += field_pairs * pair.out_size * pair.in_size * params.taps;
  }
  STD_TORCH_CHECK(weights_of_pairs == weights.numel() && entries == filter.numel(),
                  op, ": weights and filter do not fit the tables");
  const int64_t threads = torch::stable::get_num_threads();
  int64_t next_tile = 0;
  params.next_tile = &next_tile;
  const int64_t scratch_bytes = numbers * (params.dtype == DType::f64 ? 8 : 4);
  torch::stable::parallel_for(0, tiles < threads ? tiles : threads, 1, [&](int64_t begin, int64_t end) {
    ExpandFilterParams mine = params;
    mine.scratch = thread_scratch(scratch_bytes);
    launch(mine, begin, end);
  });
}
#define EQUICONV_EXPAND_FILTER(op) expand_filter##op##_cpu()
#endif

Tensor expand_filter_glue(const Tensor& weights, const Tensor& pairs, const Tensor& index, const Tensor& values,
                          const std::vector<int64_t>& size, ScalarType dtype, bool channels_last, bool transposed) {
  STD_TORCH_CHECK(size.size() >= 2, "expand_filter: size must be [out_channels, in_channels, *kernel]");
  Tensor filter = empty_filter(weights, size, dtype, channels_last, transposed);
  ExpandFilterParams params = make_params("expand_filter", filter, weights, pairs, index, values, transposed);
  params.weights = const_cast<void*>(weights.const_data_ptr());
  params.filter = filter.mutable_data_ptr();
  run("expand_filter", params, filter, weights, EQUICONV_EXPAND_FILTER());
  return filter;
}

Tensor expand_filter_bwd_glue(const Tensor& grad_filter, const Tensor& pairs, const Tensor& index, const Tensor& values,
                              int64_t weights, bool transposed) {
  STD_TORCH_CHECK(grad_filter.dim() >= 2, "expand_filter_bwd: grad_filter must be [out_channels, in_channels, *kernel]");
  const Tensor filter = has_tap_stride(grad_filter) ? grad_filter : torch::stable::contiguous(grad_filter);
  Tensor grad_weights = torch::stable::new_empty(values, {weights});
  ExpandFilterParams params = make_params("expand_filter_bwd", filter, grad_weights, pairs, index, values, transposed);
  params.weights = grad_weights.mutable_data_ptr();
  params.filter = const_cast<void*>(filter.const_data_ptr());
  run("expand_filter_bwd", params, filter, grad_weights, EQUICONV_EXPAND_FILTER(_bwd));
  return grad_weights;
}

}  // namespace
}  // namespace equiconv

#ifdef EQUICONV_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(equiconv, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
#endif
  m.impl("expand_filter", EQUICONV_BOX(equiconv::expand_filter_glue));
  m.impl("expand_filter_bwd", EQUICONV_BOX(equiconv::expand_filter_bwd_glue));
}
