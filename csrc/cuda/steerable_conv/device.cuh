// What the fused steerable convolution needs from the device. Includes nothing, so that NVRTC compiles it anywhere.
// For a CPU, tests/emulation/instructions.h gives the same names.
#pragma once

#ifdef EQUICONV_EMULATED
#include "instructions.h"
#else
#define EQ_DEVICE __device__ __forceinline__
#define EQ_INLINE __attribute__((always_inline))
#define EQ_TABLE __host__ __device__ constexpr

namespace equiconv {

using u16 = unsigned short;
using u32 = unsigned;

EQ_DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
EQ_DEVICE float number_of(u32 x) { return __uint_as_float(x); }

// Of two 8x8 matrices of 16-bit numbers in shared memory whose rows the lanes point at: thread i gets, of matrix m, rows
// 2 (i % 4) and 2 (i % 4) + 1 of column i / 4.
EQ_DEVICE void load_transposed(u32 (&r)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
}

EQ_DEVICE void load_words(u32 (&r)[4], u32 address) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
EQ_DEVICE void load_words(u32 (&r)[2], u32 address) {
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
}

EQ_DEVICE u32 load_word(u32 address) {
  u32 r;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(r) : "r"(address));
  return r;
}

// A number format: `Stored` in memory, two neighbours along a product's inner dimension in a Pair. `mma` is volatile: it keeps
// the order that is written, which bounds the registers.
//   place     what each lane adds to the address in `load`, given the bytes from 16 bytes of copies to the next 16
//   load      of 16 columns of 16 bytes: b of a product, 16 columns x 8 copies
//   fetch     the lane's numbers of two b, 16 x 8 each, or of one
//   fetch_a   of an a
//   mma       c (16x8, float) += a (16x16) * b (16x8)
//   mma_half  the same with the first 8 columns of a and rows of b only
//   add       by fma, which is exact for a factor of one, and exists from sm_80 on
#define EQUICONV_NUMBER(Name, type, one, minus_one)                                                                 \
  struct Name {                                                                                                     \
    using Stored = u16;                                                                                             \
    using Pair = u32;                                                                                               \
    using Result = Name; /* of the sums that leave a kernel */                                                      \
    static constexpr int bytes = 2, operand_bytes = 512, padding = 64; /* of sheets, against bank conflicts */      \
    EQ_DEVICE static u32 place(int) { return threadIdx.x % 16 * 16; }                                               \
    EQ_DEVICE static void load(u32 (&r)[2], u32 address) { load_transposed(r, address); }                           \
    EQ_DEVICE static void fetch(u32 (&r)[4], u32 operand) { load_words(r, operand + threadIdx.x % 32 * 16); }        \
    EQ_DEVICE static void fetch_a(u32 (&r)[4], u32 operand) { fetch(r, operand); }                                  \
    EQ_DEVICE static void fetch(u32 (&r)[2], u32 half) { load_words(r, half + threadIdx.x % 32 * 8); }              \
    EQ_DEVICE static u32 negate(u32 a) { return a ^ 0x80008000u; }                                                  \
    EQ_DEVICE static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {                                   \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                           \
                   ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                                        \
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                 \
    }                                                                                                               \
    EQ_DEVICE static void mma_half(float (&c)[4], const u32 (&a)[2], u32 b) {                                       \
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." type "." type                                            \
                   ".f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"                                                 \
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(b));                                                                 \
    }                                                                                                               \
    EQ_DEVICE static u32 pack(float low, float high) {                                                              \
      u32 r;                                                                                                        \
      asm("cvt.rn." type "x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));                                       \
      return r;                                                                                                     \
    }                                                                                                               \
    EQ_DEVICE static u32 add(u32 a, u32 b) {                                                                        \
      u32 r;                                                                                                        \
      asm("fma.rn." type "x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(one), "r"(b));                                   \
      return r;                                                                                                     \
    }                                                                                                               \
    EQ_DEVICE static u32 subtract(u32 a, u32 b) {                                                                   \
      u32 r;                                                                                                        \
      asm("fma.rn." type "x2 %0,%1,%2,%3;" : "=r"(r) : "r"(b), "r"(minus_one), "r"(a));                             \
      return r;                                                                                                     \
    }                                                                                                               \
    EQ_DEVICE static u16 round(float x) {                                                                           \
      u16 r;                                                                                                        \
      asm("cvt.rn." type ".f32 %0,%1;" : "=h"(r) : "f"(x));                                                         \
      return r;                                                                                                     \
    }                                                                                                               \
    EQ_DEVICE static float value(u16 x);                                                                            \
  };

EQUICONV_NUMBER(Bfloat16, "bf16", 0x3f803f80u, 0xbf80bf80u)
EQUICONV_NUMBER(Float16, "f16", 0x3c003c00u, 0xbc00bc00u)
#undef EQUICONV_NUMBER

EQ_DEVICE float Bfloat16::value(u16 x) { return number_of(u32(x) << 16); }
EQ_DEVICE float Float16::value(u16 x) {
  float r;
  asm("cvt.f32.f16 %0,%1;" : "=f"(r) : "h"(x));
  return r;
}

EQ_DEVICE u32 round_tf32(float x) {  // to nearest, ties away from zero
  u32 r;
  asm("cvt.rna.tf32.f32 %0,%1;" : "=r"(r) : "f"(x));
  return r;
}
// c (16x8) += a (16x8) * b (8x8)
EQ_DEVICE void multiply_tf32(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Nothing that was read from shared memory before is kept in registers instead of being read again.
EQ_DEVICE void forget() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// 16 bytes, zeros where not valid.
EQ_DEVICE void copy_async(u32 shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0));
}
EQ_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
EQ_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

EQ_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
extern __shared__ __align__(128) unsigned char shared_memory[];

}  // namespace equiconv
#endif

namespace equiconv {

struct Float32 {
  using Stored = float;
  EQ_DEVICE static float round(float x) { return x; }
  EQ_DEVICE static float value(float x) { return x; }
};

// Numbers of 32 bits, of which products take 19. A product has 8 columns, so it takes two for 16: the numbers of a Pair are in
// columns i and i + 4 of both of its factors.
struct Tf32 {
  struct Pair {
    u32 low, high;
  };
  using Stored = float;
  using Result = Float32;
  static constexpr int bytes = 4, operand_bytes = 1024, padding = 16;
  EQ_DEVICE static u32 place(int sheet) {
    const int lane = threadIdx.x % 32;
    return lane / 16 * sheet + lane % 4 * 32 + lane / 4 % 4 * 4;
  }
  EQ_DEVICE static void load(Pair (&r)[2], u32 address) {
#pragma unroll
    for (int i = 0; i < 2; ++i) r[i] = {load_word(address + i * 128), load_word(address + i * 128 + 16)};
  }
  EQ_DEVICE static void fetch(Pair (&r)[2], u32 half) {
    u32 v[4];
    load_words(v, half + threadIdx.x % 32 * 16);
    r[0] = {v[0], v[1]}, r[1] = {v[2], v[3]};
  }
  EQ_DEVICE static void fetch(Pair (&r)[4], u32 operand) {
    Pair first[2], second[2];
    fetch(first, operand), fetch(second, operand + operand_bytes / 2);
    r[0] = first[0], r[1] = first[1], r[2] = second[0], r[3] = second[1];
  }
  EQ_DEVICE static void fetch_a(Pair (&r)[4], u32 operand) {  // {low, low, high, high}, as a product takes them
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_words(v, operand + i * (operand_bytes / 2) + threadIdx.x % 32 * 16);
      r[2 * i] = {v[0], v[2]}, r[2 * i + 1] = {v[1], v[3]};
    }
  }
  EQ_DEVICE static void mma(float (&c)[4], const Pair (&a)[4], Pair b0, Pair b1) {
    multiply_tf32(c, a[0].low, a[1].low, a[0].high, a[1].high, b0.low, b0.high);
    multiply_tf32(c, a[2].low, a[3].low, a[2].high, a[3].high, b1.low, b1.high);
  }
  EQ_DEVICE static void mma_half(float (&c)[4], const Pair (&a)[2], Pair b) {
    multiply_tf32(c, a[0].low, a[1].low, a[0].high, a[1].high, b.low, b.high);
  }
  EQ_DEVICE static float round(float x) { return number_of(round_tf32(x)); }
  EQ_DEVICE static float value(float x) { return x; }
  EQ_DEVICE static Pair pack(float low, float high) { return {round_tf32(low), round_tf32(high)}; }
  EQ_DEVICE static Pair add(Pair a, Pair b) {
    return pack(number_of(a.low) + number_of(b.low), number_of(a.high) + number_of(b.high));
  }
  EQ_DEVICE static Pair subtract(Pair a, Pair b) { return add(a, negate(b)); }
  EQ_DEVICE static Pair negate(Pair a) { return {a.low ^ 0x80000000u, a.high ^ 0x80000000u}; }
};

// Writes the first COUNT of v to y[at], ..., rounded; `at` is a multiple of ALIGNED.
template <class Number, int ALIGNED, int COUNT = 0, int N>
EQ_DEVICE void write_numbers(void* y, long long at, const float (&v)[N]) {
  using Stored = typename Number::Stored;
  constexpr int count = COUNT ? COUNT : N, in_word = 4 / sizeof(Stored);
  if constexpr (ALIGNED % in_word == 0) {
    constexpr int words = count / in_word;
    u32 w[words];
#pragma unroll
    for (int i = 0; i < words; ++i) {
      if constexpr (in_word == 2) w[i] = Number::pack(v[2 * i], v[2 * i + 1]);
      else w[i] = bits_of(v[i]);
    }
    if constexpr (ALIGNED % 8 == 0 && words % 4 == 0)
#pragma unroll
      for (int i = 0; i < words; i += 4) static_cast<uint4*>(y)[(at / in_word + i) / 4] = make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]);
    else
#pragma unroll
      for (int i = 0; i < words; ++i) static_cast<u32*>(y)[at / in_word + i] = w[i];
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) static_cast<Stored*>(y)[at + i] = Number::round(v[i]);
  }
}

// unroll<A, B>(f): f(A), ..., f(B - 1), each index a type, so that tables can be read in constant expressions.
template <int I>
struct Index {
  static constexpr int value = I;
  EQ_TABLE operator int() const { return I; }
};
template <int... I>
struct Sequence {};
template <class, class>
struct Join;
template <int... I, int... J>
struct Join<Sequence<I...>, Sequence<J...>> {
  using type = Sequence<I..., (int(sizeof...(I)) + J)...>;
};
template <int N>
struct Count : Join<typename Count<N / 2>::type, typename Count<N - N / 2>::type> {};
template <>
struct Count<0> {
  using type = Sequence<>;
};
template <>
struct Count<1> {
  using type = Sequence<0>;
};
template <int A, class F, int... I>
EQ_DEVICE void unroll(F&& f, Sequence<I...>) {
  (f(Index<A + I>{}), ...);
}
template <int A, int END, class F>
EQ_DEVICE void unroll(F&& f) {
  unroll<A>(f, typename Count<(END > A ? END - A : 0)>::type{});
}

}  // namespace equiconv
