// Lets g++ compile and run pool_conv.cu on a CPU. Every thread of a block is a fiber, which runs
// until __syncthreads, or whatever a warp does together, for which all warps of a block must be
// there. From one of these barriers to the next a block's threads run in another order, so that a
// missing barrier changes the result. If only some threads meet a barrier, the process ends. A grid
// that CUDA refuses is an error here, too.
#pragma once
#define CUDA_EMULATION
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/bit_cast.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
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

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half v) { return v; }
inline __half __float2half(float v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat16 __float2bfloat16(float v) { return v; }
inline float __uint_as_float(uint32_t bits) { return c10::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float v) { return c10::bit_cast<uint32_t>(v); }

namespace emulation {
struct Fiber {
  ucontext_t start;
  jmp_buf resume;  // by which it goes on: swapcontext would ask the system each time
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool started, done;
};
inline jmp_buf scheduler;
inline Fiber* current;
inline const std::function<void()>* body;
inline int barriers;  // that the block has met
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

inline void run_block(std::vector<Fiber>& fibers, std::mt19937& random) {
  for (Fiber& fiber : fibers) {
    fiber.started = fiber.done = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.start, enter, 0);
  }
  const unsigned count = fibers.size();  // a power of two: an odd step reaches every thread
  unsigned done = 0;
  for (barriers = 0; !done; barriers++) {
    const unsigned first = random(), step = random() | 1;
    for (unsigned i = 0; i < count; i++) {
      threadIdx = dim3((first + i * step) % count);
      run(fibers[threadIdx.x]);
      done += fibers[threadIdx.x].done;
    }
    if (done % count) {
      fprintf(stderr, "%u of %u threads met a barrier\n", count - done, count);
      abort();
    }
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  std::vector<Fiber> fibers(block.x);
  std::mt19937 random(7);
  body = &kernel;
  blockDim = block, gridDim = grid;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        run_block(fibers, random);
      }
}
}  // namespace emulation

inline void __syncthreads() {
  if (!_setjmp(emulation::current->resume)) _longjmp(emulation::scheduler, 1);
}

// What each lane of a warp gives, for all of them. Two calls in turn use separate memory.
template <typename V>
inline const V* together(const V& mine) {
  static V all[2][1024];
  V* const now = all[emulation::barriers % 2];
  now[threadIdx.x] = mine;
  __syncthreads();
  return now + threadIdx.x / 32 * 32;
}
inline float __shfl_sync(unsigned, float v, int lane) { return together(v)[lane]; }
inline float __shfl_xor_sync(unsigned, float v, int by) {
  return together(v)[threadIdx.x % 32 ^ by];
}

// The rest is as pool_conv.cu describes it
inline float to_tf32(float v) {  // to nearest, ties away from zero
  return v - v == 0 ? __uint_as_float((__float_as_uint(v) + 0x1000) & ~0x1fffu) : v;
}

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
    for (int e = 0; e < EACH; e++) to[e] = number[e];
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
