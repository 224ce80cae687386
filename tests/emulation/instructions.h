// csrc/cuda/steerable_conv/device.cuh for a CPU: instructions of a warp exchange their operands through memory. Checks
// alignment and bounds. Asynchronous copies land when they are waited for or, if `copies_land_early`, at once: a GPU may do
// either. Shared memory holds NaN when a block starts.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "fibres.h"

#define EQ_DEVICE inline
#define EQ_INLINE
#define EQ_TABLE constexpr
#define __global__
#define __launch_bounds__(...)

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return {a, b, c, d}; }
inline float2 make_float2(float a, float b) { return {a, b}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }

namespace emulation {

inline bool copies_land_early = false;
constexpr unsigned kSharedBytes = 227 * 1024;
inline unsigned shared_bytes;  // that the launch asked for

struct Copy {
  uint32_t to;
  const void* from;  // null: zeros
};
struct Copies {
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
inline std::vector<Copies> copies;

struct Exchange {  // of a warp; two of each, so that a lane may be one instruction ahead
  float a[2][16][16], b[2][16][8];
  uint32_t address[2][kWarp];
};
inline Exchange exchanges[32];
inline Exchange& exchange() { return exchanges[threadIdx.x / kWarp]; }
inline int turn() { return fibres[threadIdx.x].instructions & 1; }

}  // namespace emulation

namespace equiconv {

using u16 = uint16_t;
using u32 = uint32_t;
alignas(128) inline unsigned char shared_memory[emulation::kSharedBytes];

void load_transposed(u32 (&r)[2], u32 address);
inline void must_be_inside(u32 address, unsigned bytes = 16) {
  if (address % bytes || address + bytes > emulation::shared_bytes) emulation::fail("a misaligned or wrong address in shared memory");
}
template <int N>
void load_words(u32 (&r)[N], u32 address) {
  must_be_inside(address, N * 4);
  std::memcpy(r, shared_memory + address, N * 4);
}

template <class Format>
struct Number : Format {
  using Format::round;
  using Format::value;
  using Stored = u16;
  using Pair = u32;
  using Result = Number;
  static constexpr int bytes = 2, operand_bytes = 512, padding = 64;
  static u32 place(int) { return threadIdx.x % 16 * 16; }
  static void load(u32 (&r)[2], u32 address) { load_transposed(r, address); }
  template <int N>
  static void fetch(u32 (&r)[N], u32 operand) { load_words(r, operand + threadIdx.x % 32 * N * 4); }
  static void fetch_a(u32 (&r)[4], u32 operand) { fetch(r, operand); }
  static u32 negate(u32 a) { return a ^ 0x80008000u; }

  static float half(u32 v, int i) { return value(u16(i ? v >> 16 : v)); }
  static u32 pack(float low, float high) { return round(low) | u32(round(high)) << 16; }
  static u32 add(u32 a, u32 b) { return pack(half(a, 0) + half(b, 0), half(a, 1) + half(b, 1)); }
  static u32 subtract(u32 a, u32 b) { return pack(half(a, 0) - half(b, 0), half(a, 1) - half(b, 1)); }

  template <int K>
  static void multiply(float (&c)[4], const u32 (&a)[K / 4], const u32 (&b)[K / 8]) {
    const int lane = threadIdx.x % emulation::kWarp, turn = emulation::turn();
    emulation::Exchange& e = emulation::exchange();
    for (int i = 0; i < K / 4; ++i)
      for (int j = 0; j < 2; ++j) e.a[turn][lane / 4 + 8 * (i % 2)][lane % 4 * 2 + j + 8 * (i / 2)] = half(a[i], j);
    for (int i = 0; i < K / 8; ++i)
      for (int j = 0; j < 2; ++j) e.b[turn][lane % 4 * 2 + j + 8 * i][lane / 4] = half(b[i], j);
    emulation::switch_to_scheduler(emulation::warp_instruction, 1000 + K);
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += e.a[turn][lane / 4 + 8 * (i / 2)][k] * e.b[turn][k][lane % 4 * 2 + i % 2];
      c[i] += sum;
    }
  }
  static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<16>(c, a, {b0, b1}); }
  static void mma_half(float (&c)[4], const u32 (&a)[2], u32 b) { multiply<8>(c, a, {b}); }
};

struct Bfloat16Format {
  static float value(u16 x) {
    const u32 bits = u32(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static u16 round(float x) {  // to nearest, ties to even
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? 0x7fff : u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};
struct Float16Format {
  static float value(u16 x) {
    _Float16 f;
    std::memcpy(&f, &x, 2);
    return f;
  }
  static u16 round(float x) {
    const _Float16 f = x;
    u16 bits;
    std::memcpy(&bits, &f, 2);
    return bits;
  }
};
inline u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float number_of(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline u32 round_tf32(float x) { return (bits_of(x) + 0x1000) & ~0x1fffu; }
inline void forget() {}
inline void multiply_tf32(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {  // of the first 19 bits of each
  const int lane = threadIdx.x % emulation::kWarp, turn = emulation::turn();
  emulation::Exchange& e = emulation::exchange();
  const auto seen = [](u32 bits) { return number_of(bits & ~0x1fffu); };
  const u32 a[4] = {a0, a1, a2, a3};
  for (int i = 0; i < 4; ++i) e.a[turn][lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = seen(a[i]);
  e.b[turn][lane % 4][lane / 4] = seen(b0);
  e.b[turn][lane % 4 + 4][lane / 4] = seen(b1);
  emulation::switch_to_scheduler(emulation::warp_instruction, 3000);
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k) c[i] += e.a[turn][lane / 4 + 8 * (i / 2)][k] * e.b[turn][k][lane % 4 * 2 + i % 2];
}
inline u32 load_word(u32 address) {
  must_be_inside(address, 4);
  u32 word;
  std::memcpy(&word, shared_memory + address, 4);
  return word;
}

using Bfloat16 = Number<Bfloat16Format>;
using Float16 = Number<Float16Format>;

inline void load_transposed(u32 (&r)[2], u32 address) {
  const int lane = threadIdx.x % emulation::kWarp, turn = emulation::turn();
  emulation::Exchange& e = emulation::exchange();
  e.address[turn][lane] = address;
  emulation::switch_to_scheduler(emulation::warp_instruction, 2000);
  for (int m = 0; m < 2; ++m) {
    u16 v[2];
    for (int i = 0; i < 2; ++i) {
      const u32 from = e.address[turn][m * 8 + lane % 4 * 2 + i];
      must_be_inside(from);
      std::memcpy(&v[i], shared_memory + from + lane / 4 * 2, 2);
    }
    r[m] = v[0] | u32(v[1]) << 16;
  }
}

inline void land(const emulation::Copy& copy) {
  if (copy.from) std::memcpy(shared_memory + copy.to, copy.from, 16);
  else std::memset(shared_memory + copy.to, 0, 16);
}
inline void copy_async(u32 to, const void* from, bool valid) {
  must_be_inside(to);
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("a misaligned address in global memory");
  const emulation::Copy copy{to, valid ? from : nullptr};
  if (emulation::copies_land_early) land(copy);
  else emulation::copies[threadIdx.x].open.push_back(copy);
}
inline void commit_copies() {
  emulation::Copies& mine = emulation::copies[threadIdx.x];
  mine.groups.push_back(std::exchange(mine.open, {}));
}
template <int PENDING>
inline void wait_copies(int line = __builtin_LINE()) {
  if (line == emulation::skipped_line) return;
  auto& groups = emulation::copies[threadIdx.x].groups;
  for (; int(groups.size()) > PENDING; groups.erase(groups.begin()))
    for (const emulation::Copy& copy : groups.front()) land(copy);
}
inline u32 shared_address(const void* p) { return u32(static_cast<const unsigned char*>(p) - shared_memory); }

}  // namespace equiconv

// A kernel behind a C interface. Returns whether asynchronous copies were left that nobody waited for.
#define EMULATED(name, Params)                                                                                             \
  extern "C" bool run_##name(const equiconv::Params* params, unsigned grid_x, unsigned grid_y, unsigned threads,              \
                                    unsigned shared_bytes, bool last_to_first, bool copies_land_early, int skipped_line) { \
    using namespace emulation;                                                                                             \
    if (shared_bytes > kSharedBytes) fail("too much shared memory");                                                       \
    emulation::order = last_to_first ? emulation::last_to_first : emulation::first_to_last;                                \
    emulation::copies_land_early = copies_land_early;                                                                      \
    emulation::skipped_line = skipped_line;                                                                                \
    emulation::shared_bytes = shared_bytes;                                                                                \
    emulation::kernel = [=] { equiconv::name(*params); };                                                                    \
    gridDim = dim3(grid_x, grid_y);                                                                                        \
    blockDim = dim3(threads);                                                                                              \
    bool left = false;                                                                                                     \
    for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y)                                                                \
      for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x) {                                                            \
        copies.assign(threads, {});                                                                                        \
        std::memset(equiconv::shared_memory, 0xff, shared_bytes);                                                          \
        run_threads(threads);                                                                                              \
        for (const Copies& of_thread : copies) left |= !of_thread.groups.empty() || !of_thread.open.empty();               \
      }                                                                                                                    \
    return left;                                                                                                           \
  }
