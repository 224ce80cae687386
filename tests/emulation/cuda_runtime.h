// A CPU stand-in for the CUDA that the kernels in csrc/cuda use, to run their unchanged source without a GPU: see fibres.h.
// Shared memory holds NaN when a block starts.
#pragma once
#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fibres.h"

#define __global__
#define __device__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // nothing else is, so that it can be found

using std::max;
using std::min;

template <class T>
T __ldg(const T* p) {
  return *p;
}

namespace emulation {

inline thread_local char some_shared_memory;

inline int poison_shared_memory(dl_phdr_info* library, size_t, void*) {
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    char* const begin = static_cast<char*>(library->dlpi_tls_data);
    const size_t size = library->dlpi_phdr[i].p_memsz;
    if (library->dlpi_phdr[i].p_type == PT_TLS && begin <= &some_shared_memory && &some_shared_memory < begin + size)
      std::memset(begin, 0xff, size);
  }
  return 0;
}

inline void run_block(unsigned threads) {
  some_shared_memory = 0;
  dl_iterate_phdr(poison_shared_memory, nullptr);
  if (some_shared_memory == 0) fail("shared memory was not found");
  run_threads(threads);
}

}  // namespace emulation

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  emulation::kernel = [&] { kernel(arguments...); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) emulation::run_block(blockDim.x);
  return cudaSuccess;
}
