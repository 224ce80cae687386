#pragma once
#include "../expand_filter.h"

namespace equiconv {

// Both launch on `stream` (a cudaStream_t) of the current device and return null, or the error in words. Neither waits
// for the device nor copies from it, so they can be captured in a CUDA graph.
const char* expand_filter_cuda(const ExpandFilterParams& params, void* stream);
const char* expand_filter_bwd_cuda(const ExpandFilterParams& params, void* stream);

}  // namespace equiconv
