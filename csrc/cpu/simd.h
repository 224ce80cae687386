// Vectors as wide as the instruction set has them, a small matrix product and a transpose on them. For kernel files:
// everything is local to the file that includes it (see isa.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace equiconv::EQUICONV_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kBlockSums = 24;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kBlockSums = 12;  // of 16 registers
#else
constexpr int kVectorBytes = 16, kBlockSums = 12;
#endif

template <class T> using Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias)) = T;
template <class T> using HalfVector __attribute__((vector_size(kVectorBytes / 2), aligned(sizeof(T)), may_alias)) = T;
template <class T> constexpr int kWidth = kVectorBytes / int(sizeof(T));

template <class V, class T>
inline __attribute__((always_inline)) V load(const T* from) {
  return *reinterpret_cast<const V*>(from);
}

template <class V, class T>
inline __attribute__((always_inline)) void store_vector(const V& vector, T* to) {
  *reinterpret_cast<V*>(to) = vector;
}

// ---- out[m, :] = sum_k a[m, k] b[k, :] -------------------------------------------------------------------------

template <class T>
struct Matrix {  // the scalars a[m, k]
  const T* data;
  int64_t stride_m, stride_k;
};

// Where the rows of b or of the result lie.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t m) const { return data + m * stride; }
  Rows from(int64_t m) const { return {data + m * stride, stride}; }
};

template <class T>
struct ScatteredRows {
  T* const* rows;
  int64_t at;
  T* operator[](int64_t m) const { return rows[m] + at; }
  ScatteredRows from(int64_t m) const { return {rows + m, at}; }
};

// What becomes of a row of the product.
struct Assign {
  Assign from(int64_t) const { return {}; }
  template <class V> void operator()(V& out, const V& sum, int64_t) const { out = sum; }
};

struct Add {
  Add from(int64_t) const { return {}; }
  template <class V> void operator()(V& out, const V& sum, int64_t) const { out += sum; }
};

template <class T>
struct AssignWithBias {
  const T* bias;  // [rows]
  AssignWithBias from(int64_t m) const { return {bias + m}; }
  template <class V> void operator()(V& out, const V& sum, int64_t m) const { out = sum + bias[m]; }
};

// How far apart the vectors of a block lie.
struct Steps {
  int64_t in, out;
};

// M rows, and N vectors of columns that lie `steps` apart. Unrolled by order: else g++ keeps the sums in memory.
template <int M, int N, class T, class In, class Out, class Finish>
__attribute__((noinline)) void multiply_block(const Matrix<T>& a, const In& b, const Steps& steps, const Out& out,
                                              const Finish& finish, int64_t column, int64_t depth) {
  Vector<T> sum[M][N] = {};
  const T* third[(M + 2) / 3];  // every third row: with three offsets they address all rows from few registers
#pragma GCC unroll 5
  for (int m = 0; m < M; m += 3) third[m / 3] = a.data + m * a.stride_m;
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at[3] = {k * a.stride_k, k * a.stride_k + a.stride_m, k * a.stride_k + 2 * a.stride_m};
    Vector<T> row[N];
    for (int n = 0; n < N; ++n) row[n] = *reinterpret_cast<const Vector<T>*>(b[k] + column + n * steps.in);
#pragma GCC unroll 15
    for (int m = 0; m < M; ++m) {
      const T scalar = third[m / 3][at[m % 3]];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] += scalar * row[n];
    }
  }
#pragma GCC unroll 15
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) finish(*reinterpret_cast<Vector<T>*>(out[m] + column + n * steps.out), sum[m][n], m);
}

// Of a block of N vectors; more than 15 rows would not find registers for their addresses.
template <int N> constexpr int kMaxRows = kBlockSums / N < 15 ? kBlockSums / N : 15;

// multiply_block for each number of rows. Apart, not inlined in one function: there they would share, and spill, the
// addresses of all rows, which costs short products half of their time.
template <int N, class T, class In, class Out, class Finish, int... kRows>
constexpr auto multiply_blocks(std::integer_sequence<int, kRows...>) {
  using Block = void (*)(const Matrix<T>&, const In&, const Steps&, const Out&, const Finish&, int64_t, int64_t);
  struct { Block with_rows[sizeof...(kRows) + 1]; } table = {{nullptr, multiply_block<kRows + 1, N, T, In, Out, Finish>...}};
  return table;
}

template <int N, class T, class In, class Out, class Finish>
void multiply_columns(const Matrix<T>& a, const In& b, const Steps& steps, const Out& out, const Finish& finish,
                      int64_t column, int64_t rows, int64_t depth) {
  static constexpr auto kBlocks = multiply_blocks<N, T, In, Out, Finish>(std::make_integer_sequence<int, kMaxRows<N>>());
  if (rows > 0 && rows <= kMaxRows<N>) return kBlocks.with_rows[rows](a, b, steps, out, finish, column, depth);
  int64_t first = 0;
  for (int64_t blocks = (rows + kMaxRows<N> - 1) / kMaxRows<N>; blocks > 0; --blocks) {
    const int64_t m = (rows - first + blocks - 1) / blocks;  // blocks of equal height: low ones wait for their sums
    const Matrix<T> part{a.data + first * a.stride_m, a.stride_m, a.stride_k};
    kBlocks.with_rows[m](part, b, steps, out.from(first), finish.from(first), column, depth);
    first += m;
  }
}

// rows x width numbers, at least a vector wide. The last vector of a row overlaps the one before it.
template <class T, class In, class Out, class Finish = Assign>
void multiply(const Matrix<T>& a, const In& b, const Out& out, int64_t rows, int64_t depth, int64_t width,
              const Finish& finish = {}) {
  constexpr int64_t kWide = kWidth<T>;
  int64_t n = 0;
  for (; n + kWide < width; n += 2 * kWide) {
    const int64_t next = n + 2 * kWide <= width ? n + kWide : width - kWide;
    multiply_columns<2>(a, b, {next - n, next - n}, out, finish, n, rows, depth);
  }
  if (n < width) multiply_columns<1>(a, b, {}, out, finish, width - kWide, rows, depth);
}

// out += a b, for a width of whole vectors
template <class T, class In, class Out>
void multiply_add(const Matrix<T>& a, const In& b, const Out& out, int64_t rows, int64_t depth, int64_t width) {
  multiply(a, b, out, rows, depth, width, Add{});
}

template <class V, int... kColumns>
inline __attribute__((always_inline)) V reversed(const V& v, std::integer_sequence<int, kColumns...>) {
  return __builtin_shufflevector(v, v, (int(sizeof...(kColumns)) - 1 - kColumns)...);
}

template <class V>
inline __attribute__((always_inline)) V reversed(const V& v) {
  return reversed(v, std::make_integer_sequence<int, int(sizeof(V) / sizeof(v[0]))>());
}

// ---- transpose -------------------------------------------------------------------------------------------------

// One step of a transpose: exchanges the bit `kBit` of row and column numbers between two rows that differ in it.
template <int kBit, class V, int... kColumns>
inline __attribute__((always_inline)) void exchange_bit(V& low, V& high, std::integer_sequence<int, kColumns...>) {
  constexpr int kWide = sizeof...(kColumns);
  const V even = __builtin_shufflevector(low, high, (kColumns & kBit ? kWide + kColumns - kBit : kColumns)...);
  high = __builtin_shufflevector(low, high, (kColumns & kBit ? kWide + kColumns : kColumns + kBit)...);
  low = even;
}

template <int kBit, class V, int kWide>
inline __attribute__((always_inline)) void exchange_bits(V (&rows)[kWide]) {
  if constexpr (kBit < kWide) {
    for (int r = 0; r < kWide; ++r)
      if (!(r & kBit)) exchange_bit<kBit>(rows[r], rows[r + kBit], std::make_integer_sequence<int, kWide>());
    exchange_bits<2 * kBit>(rows);
  }
}

// out[c][r] = in[r][at + c] for a square as wide as a vector V
template <class V, class T>
inline __attribute__((always_inline)) void transpose_square(const T* const* in, int64_t at, T* out, int64_t ldo) {
  V rows[sizeof(V) / sizeof(T)];
  for (size_t r = 0; r < sizeof(V) / sizeof(T); ++r) rows[r] = *reinterpret_cast<const V*>(in[r] + at);
  exchange_bits<1>(rows);
  for (size_t c = 0; c < sizeof(V) / sizeof(T); ++c) *reinterpret_cast<V*>(out + c * ldo) = rows[c];
}

// to[c] = f(from[c]), c < count, in vectors as wide as fit. The last of them overlaps the one before it.
template <class V, class F, class T>
inline __attribute__((always_inline)) void map_vectors(F f, const T* from, int64_t count, T* to) {
  constexpr int64_t kWide = sizeof(V) / sizeof(T);
  for (int64_t c = 0; c < count; c += kWide) {
    const int64_t place = c + kWide <= count ? c : count - kWide;
    *reinterpret_cast<V*>(to + place) = f(*reinterpret_cast<const V*>(from + place));
  }
}

template <class F, class T>
inline void map_row(F f, const T* from, int64_t count, T* to) {
  if (count >= kWidth<T>) return map_vectors<Vector<T>>(f, from, count, to);
  if (count >= kWidth<T> / 2) return map_vectors<HalfVector<T>>(f, from, count, to);
  for (int64_t c = 0; c < count; ++c) to[c] = f(from[c]);
}

template <class T>
inline void copy_row(const T* from, int64_t count, T* to) {
  map_row([](auto v) { return v; }, from, count, to);
}

}  // namespace
}  // namespace equiconv::EQUICONV_ISA
