// Memory that a thread keeps from call to call: fresh pages would cost as much as many a kernel.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace equiconv {

// At least that many bytes, 64-byte aligned, with any contents. One block for all ops of the thread.
inline char* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64))));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

}  // namespace equiconv
