// The launchers of csrc/cuda/expand_filter.cu behind a C interface, for ctypes.
#include "csrc/cuda/expand_filter.cu"

extern "C" const char* run(bool backward, bool last_to_first, const void* pairs, int64_t num_pairs, const void* index,
                           const void* values, void* weights, void* filter, int64_t taps, int64_t stride_out,
                           int64_t stride_in, int64_t stride_tap, int dtype, int filter_dtype) {
  equiconv::ExpandFilterParams p{};
  p.pairs = static_cast<const equiconv::ExpandFilterPair*>(pairs);
  p.index = static_cast<const int32_t*>(index);
  p.values = values;
  p.weights = weights;
  p.filter = filter;
  p.num_pairs = num_pairs;
  p.taps = taps;
  p.stride_out = stride_out;
  p.stride_in = stride_in;
  p.stride_tap = stride_tap;
  p.dtype = static_cast<equiconv::DType>(dtype);
  p.filter_dtype = static_cast<equiconv::DType>(filter_dtype);
  emulation::order = last_to_first ? emulation::last_to_first : emulation::first_to_last;
  return backward ? equiconv::expand_filter_bwd_cuda(p, nullptr) : equiconv::expand_filter_cuda(p, nullptr);
}
