// CUDA on a CPU, for tests: the threads of a block are fibers that take turns. One runs until it waits for the others,
// in the order of their numbers or the other way round: what depends on that order has no barrier where it needs one.
// Shared memory holds NaN when a block begins. Waiting in different lines is an error, as is an end without the others.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __syncthreads() shim::wait(shim::BLOCK, __LINE__)
#define __syncwarp() shim::wait(shim::WARP, __LINE__)
#define __shfl_xor_sync(mask, value, lanes, width) shim::exchanged(value, lanes, __LINE__)

typedef unsigned int uint;
struct shim_index { int x, y, z; };
static shim_index threadIdx, blockIdx;
extern "C" { unsigned char shared[1 << 18] __attribute__((aligned(128))); }

namespace shim {
enum State { READY, WARP, BLOCK, DONE };
struct Fiber { ucontext_t context; State state; int line; std::vector<char> stack; };
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static double slots[2048];
static void (*body)(void**);
static void** arguments;

inline void wait(State what, int line) {
  Fiber& f = fibers[current];
  f.state = what, f.line = line;
  swapcontext(&f.context, &scheduler);
}

inline void begin() {
  body(arguments);
  fibers[current].state = DONE;
  swapcontext(&fibers[current].context, &scheduler);
}

template <class T> T exchanged(T value, int lanes, int line) {
  int me = current;
  slots[me] = value;
  wait(WARP, line);
  T other = slots[me ^ lanes];
  wait(WARP, -line);
  return other;
}

// Everyone from `first` on waits for the same thing in the same line: let them go on.
inline bool release(int first, int count, State what) {
  for (int i = first; i < first + count; ++i)
    if (fibers[i].state != what || fibers[i].line != fibers[first].line) return false;
  for (int i = first; i < first + count; ++i) fibers[i].state = READY;
  return true;
}

inline int block(int threads, bool reversed) {
  for (Fiber& f : fibers) {
    f.state = READY;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size(), f.context.uc_link = nullptr;
    makecontext(&f.context, begin, 0);
  }
  for (;;) {
    bool ran = false;
    for (int i = 0; i < threads; ++i) {
      current = reversed ? threads - 1 - i : i;
      if (fibers[current].state != READY) continue;
      ran = true;
      threadIdx = {current, 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
    }
    for (int w = 0; w < threads; w += 32) ran |= release(w, 32, WARP);
    if (ran) continue;
    if (release(0, threads, BLOCK)) continue;
    for (Fiber& f : fibers)
      if (f.state != DONE) return f.line;  // the others are elsewhere, or gone
    return 0;
  }
}

inline int run(void (*kernel)(void**), void** given, int blocks, int threads, int bytes, bool reversed) {
  body = kernel, arguments = given;
  fibers.resize(threads);
  for (Fiber& f : fibers) f.stack.resize(1 << 17);
  for (int b = 0; b < blocks; ++b) {
    blockIdx = {reversed ? blocks - 1 - b : b, 0, 0};
    std::memset(shared, 0xff, sizeof shared);
    if (int line = block(threads, reversed)) return line;
    for (size_t i = bytes; i < sizeof shared; ++i)
      if (shared[i] != 0xff) return -1;  // written beyond what was asked for
  }
  return 0;
}
}  // namespace shim

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

typedef _Float16 half;
inline half __float2half_rn(float x) { return (half)x; }
inline float __half2float(half x) { return (float)x; }

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() {}
  explicit nv_bfloat16(float x) {
    uint32_t i;
    std::memcpy(&i, &x, 4);
    bits = x != x ? 0x7fff : (i + 0x7fff + (i >> 16 & 1)) >> 16;  // to the nearest, to the even one halfway
  }
  operator float() const {
    uint32_t i = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &i, 4);
    return x;
  }
};
inline nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }
inline float __bfloat162float(nv_bfloat16 x) { return x; }

// A fragment is one matrix, which the first thread of the warp holds and works on.
namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment { float x[16][16]; };
inline bool first() { return shim::current % 32 == 0; }
template <class L> struct turned { static const bool value = false; };
template <> struct turned<col_major> { static const bool value = true; };

template <class F> void fill_fragment(F& f, float x) {
  if (!first()) return;
  for (int i = 0; i < 256; ++i) f.x[i / 16][i % 16] = x;
}
template <class U, class T, class L> void load_matrix_sync(fragment<U, 16, 16, 16, T, L>& f, const T* p, unsigned stride) {
  if (!first()) return;
  if ((uintptr_t)p % 32 || stride * sizeof(T) % 16) { std::fprintf(stderr, "a fragment is misaligned\n"); std::abort(); }
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) f.x[i][j] = (float)(turned<L>::value ? p[j * stride + i] : p[i * stride + j]);
}
template <class D, class A, class B, class C> void mma_sync(D& d, const A& a, const B& b, const C& c) {
  if (!first()) return;
  D r = c;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) r.x[i][j] += a.x[i][k] * b.x[k][j];
  d = r;
}
template <class F> void store_matrix_sync(float* p, const F& f, unsigned stride, layout_t) {
  if (!first()) return;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) p[i * stride + j] = f.x[i][j];
}
}  // namespace nvcuda::wmma
