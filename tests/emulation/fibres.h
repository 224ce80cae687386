// The threads of a CUDA block as fibres, switched at barriers and at instructions of a whole warp; blocks run one after the
// other. All threads must reach the same barrier, all lanes of a warp the same instruction. Between two barriers the warps
// run in the order that `order` says: a result that depends on it shows a missing barrier.
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum Order { first_to_last, last_to_first };
inline Order order = first_to_last;
inline int skipped_line = 0;  // of a barrier or a wait that does nothing: what a test does to see that it is needed

enum Event { finished, block_barrier, warp_instruction };
struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Event event;
  int which;         // line of the barrier, or number of the instruction
  int instructions;  // of the warp, so far
};
constexpr unsigned kWarp = 32;
constexpr size_t kStack = 1 << 18;
inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline bool vote, any_vote;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

inline void switch_to_scheduler(Event event, int which = 0) {
  Fibre& fibre = fibres[threadIdx.x];
  fibre.event = event;
  fibre.which = which;
  fibre.instructions += event == warp_instruction;
  swapcontext(&fibre.context, &scheduler);
}

inline int barrier(int line, bool thread_votes = false) {
  if (line == skipped_line) return thread_votes;
  vote |= thread_votes;
  switch_to_scheduler(block_barrier, line);
  return any_vote;
}

inline void run_fibre() {
  kernel();
  switch_to_scheduler(finished);
}

inline void must_agree(unsigned thread, unsigned other, const char* where) {
  const Fibre &a = fibres[thread], &b = fibres[other];
  if (a.event == b.event && a.which == b.which && (a.event != warp_instruction || a.instructions == b.instructions)) return;
  std::fprintf(stderr, "emulation: %s: thread %u is at %d, thread %u at %d (line of a barrier; 0: at the end)\n", where, thread,
               a.which, other, b.which);
  std::abort();
}

// Runs the lanes of a warp up to the next barrier.
inline void run_warp(unsigned warp) {
  const unsigned first = warp * kWarp;
  do {
    for (unsigned i = 0; i < kWarp; ++i) {
      threadIdx.x = first + (order == first_to_last ? i : kWarp - 1 - i);
      swapcontext(&scheduler, &fibres[threadIdx.x].context);
    }
    for (unsigned i = 1; i < kWarp && fibres[first].event == warp_instruction; ++i) must_agree(first, first + i, "in a warp");
  } while (fibres[first].event == warp_instruction);
}

inline void run_threads(unsigned threads) {
  if (threads % kWarp != 0) fail("a block is made of whole warps");
  if (fibres.size() < threads) fibres.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    if (!fibre.stack) fibre.stack.reset(new char[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.instructions = 0;
    makecontext(&fibre.context, run_fibre, 0);
  }
  do {
    vote = false;
    const unsigned warps = threads / kWarp;
    for (unsigned i = 0; i < warps; ++i) run_warp(order == first_to_last ? i : warps - 1 - i);
    any_vote = vote;
    for (unsigned i = 1; i < threads; ++i) must_agree(0, i, "in a block");
  } while (fibres[0].event != finished);
}

}  // namespace emulation

#define __syncthreads() emulation::barrier(__LINE__)
#define __syncthreads_or(vote) emulation::barrier(__LINE__, vote)
