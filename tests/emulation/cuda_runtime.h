// A CPU stand-in for the CUDA that the kernels in csrc/cuda use, to run their unchanged source without a GPU.
//
// One fibre for each thread of a block, switched at barriers; blocks run one after the other. All threads must reach the
// same barrier. Between two barriers the threads run in the order that `order` says: a result that depends on it shows a
// missing barrier. Shared memory holds NaN when a block starts.
#pragma once
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // nothing else is, so that it can be found
#define __syncthreads() emulation::barrier(__LINE__)
#define __syncthreads_or(vote) emulation::barrier(__LINE__, vote)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

template <class T>
T __ldg(const T* p) {
  return *p;
}

namespace emulation {

enum Order { first_to_last, last_to_first };
inline Order order = first_to_last;

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int line = 0;  // of the barrier that it waits at; 0: finished
};
constexpr size_t kStack = 1 << 17;
inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline bool vote, any_vote;

inline void switch_to_scheduler(int line) {
  Fibre& fibre = fibres[threadIdx.x];
  fibre.line = line;
  swapcontext(&fibre.context, &scheduler);
}

inline int barrier(int line, bool thread_votes = false) {
  vote |= thread_votes;
  switch_to_scheduler(line);
  return any_vote;
}

inline void run_fibre() {
  kernel();
  switch_to_scheduler(0);
}

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
  if (fibres.size() < threads) fibres.resize(threads);
  some_shared_memory = 0;
  dl_iterate_phdr(poison_shared_memory, nullptr);
  if (some_shared_memory == 0) std::abort();
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    if (!fibre.stack) fibre.stack.reset(new char[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    makecontext(&fibre.context, run_fibre, 0);
  }
  do {
    vote = false;
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = order == first_to_last ? i : threads - 1 - i;
      swapcontext(&scheduler, &fibres[threadIdx.x].context);
    }
    any_vote = vote;
    for (unsigned i = 1; i < threads; ++i)
      if (fibres[i].line != fibres[0].line) {
        std::fprintf(stderr, "thread 0 is at line %d, thread %u at line %d\n", fibres[0].line, i, fibres[i].line);
        std::abort();
      }
  } while (fibres[0].line != 0);
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
