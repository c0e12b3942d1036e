// Lets g++ compile and run pool_conv.cu on a CPU: every thread of a block is a fiber, __syncthreads
// hands over to the next one. So does whatever a warp does together, for which all warps of a block
// must be there. EMULATION_ORDER (0, 1, 2) runs a block's threads forwards, backwards
// or shuffled, so that a missing barrier changes the result; threads of a block that meet different
// numbers of barriers end the process. A grid that CUDA refuses is an error here, too.
#pragma once
#define CUDA_EMULATION
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 blockIdx, blockDim, gridDim, threadIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline cudaError_t last_error;
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

using __half = _Float16;
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half v) { return v; }
inline __half __float2half(float v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float v) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return {uint16_t(bits >> 16 | 64)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace emulation {
constexpr size_t STACK = 64 << 10;
struct Fiber {
  ucontext_t start;
  jmp_buf resume;  // by which it goes on: swapcontext would ask the system each time
  std::vector<char> stack = std::vector<char>(STACK);
  bool started, done;
  int barriers;
};
inline jmp_buf scheduler;
inline Fiber* current;
inline const std::function<void()>* body;
inline void enter() {
  (*body)();
  current->done = true;
  _longjmp(scheduler, 1);
}
inline void run(Fiber& fiber) {  // until its next barrier
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  static std::vector<Fiber> fibers(1024);
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || block.x > 1024) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const char* set = getenv("EMULATION_ORDER");
  const int order = set ? atoi(set) : 0;
  std::vector<unsigned> turns(block.x);
  for (unsigned t = 0; t < block.x; t++) turns[t] = order == 1 ? block.x - 1 - t : t;
  std::mt19937 random(7);
  body = &kernel;
  blockDim = block, gridDim = grid;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        for (unsigned t = 0; t < block.x; t++) {
          Fiber& fiber = fibers[t];
          fiber.started = fiber.done = false, fiber.barriers = 0;
          getcontext(&fiber.start);
          fiber.start.uc_stack.ss_sp = fiber.stack.data();
          fiber.start.uc_stack.ss_size = STACK;
          makecontext(&fiber.start, enter, 0);
        }
        for (bool more = true; more;) {  // from one barrier to the next
          more = false;
          if (order == 2) std::shuffle(turns.begin(), turns.end(), random);
          for (unsigned t : turns) {
            if (fibers[t].done) continue;
            threadIdx = dim3(t);
            run(fibers[t]);
            more |= !fibers[t].done;
          }
          for (unsigned t = 1; t < block.x; t++)
            if (fibers[t].barriers != fibers[0].barriers || fibers[t].done != fibers[0].done) {
              fprintf(stderr, "threads 0 and %u met different barriers\n", t);
              abort();
            }
        }
      }
}
}  // namespace emulation

inline void __syncthreads() {
  emulation::current->barriers++;
  const dim3 mine = threadIdx;
  if (!_setjmp(emulation::current->resume)) _longjmp(emulation::scheduler, 1);
  threadIdx = mine;
}

inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float to_tf32(float v) {  // to nearest, ties away from zero
  return v - v == 0 ? __uint_as_float((__float_as_uint(v) + 0x1000) & ~0x1fffu) : v;
}

// What each lane of a warp gives, for all of them. Two calls in turn use separate memory.
template <typename V>
inline const V* together(const V& mine) {
  static V all[2][1024];
  V* const now = all[emulation::current->barriers % 2];
  now[threadIdx.x] = mine;
  __syncthreads();
  return now + threadIdx.x / 32 * 32;
}
inline float __shfl_sync(unsigned, float v, int lane) { return together(v)[lane]; }
inline float __shfl_xor_sync(unsigned, float v, int by) {
  return together(v)[threadIdx.x % 32 ^ by];
}

// As pool_conv.cu describes them
template <bool TRANSPOSED>
inline void load_matrices(const void* row, uint32_t (&v)[4]) {
  const void* const* rows = together(row);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int q = 0; q < 4; q++) {
    auto word = [&](int i, int at) { return static_cast<const char*>(rows[8 * q + i]) + at; };
    char* const to = reinterpret_cast<char*>(&v[q]);
    std::memcpy(to, TRANSPOSED ? word(2 * t, 2 * g) : word(g, 4 * t), TRANSPOSED ? 2 : 4);
    if (TRANSPOSED) std::memcpy(to + 2, word(2 * t + 1, 2 * g), 2);
  }
}

template <typename T>
inline void mma(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4]) {
  constexpr int EACH = 4 / sizeof(T);  // numbers in a register
  struct Numbers {
    float a[4][EACH], b[2][EACH];
  } mine;
  auto unpack = [](uint32_t bits, float* to) {
    if (sizeof(T) == 4) bits &= ~0x1fffu;  // all that TF32 has
    T number[EACH];
    std::memcpy(number, &bits, 4);
    for (int e = 0; e < EACH; e++) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>)
        to[e] = __bfloat162float(number[e]);
      else
        to[e] = number[e];
    }
  };
  for (int q = 0; q < 4; q++) unpack(a[q], mine.a[q]);
  for (int q = 0; q < 2; q++) unpack(b[q], mine.b[q]);
  const Numbers* const of = together(mine);
  for (int q = 0; q < 4; q++) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2 + q % 2;
    for (int k = 0; k < 8; k++)
      for (int e = 0; e < EACH; e++)
        d[q] += of[row * 4 + k % 4].a[q / 2 + k / 4 * 2][e] * of[column * 4 + k % 4].b[k / 4][e];
  }
}
#define LAUNCH(kernel, grid, block, stream, ...) \
  emulation::launch(grid, block, [&] { (kernel)(__VA_ARGS__); })
