// Lets g++ compile and run pool_conv.cu on a CPU: every thread of a block is a fiber, __syncthreads
// hands over to the next one. EMULATION_ORDER (0, 1, 2) runs a block's threads forwards, backwards
// or shuffled, so that a missing barrier changes the result; threads of a block that meet different
// numbers of barriers end the process. A grid that CUDA refuses is an error here, too.
#pragma once
#define CUDA_EMULATION
#include <ucontext.h>

#include <algorithm>
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
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  bool done = false;
  int barriers = 0;
};
inline ucontext_t scheduler;
inline Fiber* current;
inline const std::function<void()>* body;
inline void enter() {
  (*body)();
  current->done = true;
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
          fiber.done = false, fiber.barriers = 0;
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.data();
          fiber.context.uc_stack.ss_size = STACK;
          fiber.context.uc_link = &scheduler;
          makecontext(&fiber.context, enter, 0);
        }
        for (bool more = true; more;) {  // from one barrier to the next
          more = false;
          if (order == 2) std::shuffle(turns.begin(), turns.end(), random);
          for (unsigned t : turns) {
            current = &fibers[t];
            if (current->done) continue;
            threadIdx = dim3(t);
            swapcontext(&scheduler, &current->context);
            more |= !current->done;
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
  swapcontext(&emulation::current->context, &emulation::scheduler);
  threadIdx = mine;
}
// As pool_conv.cu describes it, from the fragments of all lanes. Every thread of the block takes
// part; two calls in turn use separate memory.
inline float number(__half v) { return v; }
inline float number(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
inline void mma(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4]) {
  static uint32_t all_a[2][1024][4], all_b[2][1024][2];
  const int turn = emulation::current->barriers % 2, warp = threadIdx.x / 32 * 32;
  std::memcpy(all_a[turn][threadIdx.x], a, sizeof(a));
  std::memcpy(all_b[turn][threadIdx.x], b, sizeof(b));
  __syncthreads();
  auto half = [](uint32_t pair, int which) {
    T two[2];
    std::memcpy(two, &pair, 4);
    return number(two[which]);
  };
  for (int q = 0; q < 4; q++) {
    const int row = threadIdx.x % 32 / 4 + q / 2 * 8, column = threadIdx.x % 4 * 2 + q % 2;
    for (int k = 0; k < 16; k++)
      d[q] += half(all_a[turn][warp + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
              half(all_b[turn][warp + column * 4 + k % 8 / 2][k / 8], k % 2);
  }
}
#define LAUNCH(kernel, grid, block, stream, ...) \
  emulation::launch(grid, block, [&] { (kernel)(__VA_ARGS__); })
