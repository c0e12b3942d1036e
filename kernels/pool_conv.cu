// 3x3 convolution (padding 1, NHWC) behind an optional 2x2 max-pool, on a GPU.
//
//   pooled[n,i,j,c] = max over the 2x2 pixels of x at (2i,2j)        (maxpool; otherwise x itself)
//   y[n,i,j,k]      = sum over a,b in 0..2, c of pooled[n, S i + a - 1, S j + b - 1, c] w[k,c,a,b]
//
// with S = 2 for "stride" and 1 otherwise. float32, float16 and bfloat16, all summed in float32.
// Weights are in memory as (c_out,3,3,c_in), their gradient as (c_out,c_in,3,3).
//
// What a layer costs, batch 128, forward (each gradient costs about the same again):
//   ResNet-20 layer   GFLOP   float32 MB   H100 floor us, float32   bf16 MB  floor us, tensor cores
//   16->16 @ 32x32    0.60      16.8       9.0  (arithmetic)         8.4       2.5 (memory)
//   16->32 @ 16x16    0.30       6.3       4.5  (arithmetic)         3.1       0.9 (memory)
//   32->32 @ 16x16    0.60       8.4       9.0  (arithmetic)         4.2       1.3 (memory)
//   32->64 @  8x8     0.30       3.2       4.5  (arithmetic)         1.6       0.5 (memory)
//   64->64 @  8x8     0.60       4.3       9.0  (arithmetic)         2.2       0.6 (memory)
// GFLOP = 2*9*N*H*W*C*K; bytes: x and y once, weights once; floors from 67 TFLOP/s float32, 990
// TFLOP/s bf16 and 3.35 TB/s. A max-pool of its own would read 4 and write 1 pooled input and read
// it again; here it reads 4 and writes 1 (which the shortcut needs anyway).
//
// What the kernels need, counted from the PTX by a model of an H100 (4 instructions a cycle and
// multiprocessor, 32 banks, 67 TFLOP/s, 3.35 TB/s), not measured; README.md has what an H100 took.
// Microseconds of the dearest of instructions, arithmetic, shared memory and memory; batch 128:
//   float32, in a training step of a block    16->16 @ 32x32   32->32 @ 16x16   64->64 @ 8x8
//     conv_tiled, first convolution                15.5             13.9            13.4
//     conv_tiled, gradient of the second           17.3             14.4            13.7
//     grad_weight_partial, of the second           16.3             16.3            16.3
//     norm_rows, back_rows                          0.3              0.2             0.1
//     column_sums, elementwise (memory)            15.0              7.6             3.8
//     the block, both ways                          115               99              93
//   bfloat16, alone
//     conv_tiled, forward (tensor cores)            4.4                              2.7
//     grad_weight_partial                          15.2                             15.2
//
// With normalisation, ReLU and add fused, a block moves 27 tensors of its size in a training step,
// 7 forward and 20 backward, since the gradients of input and weight each read what they are made
// of; operator by operator it is 44. Nine blocks, counted as identity blocks, three of 16 channels
// at 32x32, of 32 at 16x16 and of 64 at 8x8, batch 128, float32: 3 * 27 * (8.4 + 4.2 + 2.1) MB =
// 1.19 GB, on an H100 355 us (operator by operator 1.9 GB, 578 us). Their arithmetic is 31 GFLOP:
// 465 us in float32, 32 us on bf16 tensor cores.
//
// Kernels, from simple to fast:
//   grad_input_plain         a thread an input element, gathering; used for stride 2
//   elementwise, column_sums a block's end and its way back, float32; a thread four channels of a
//                            pixel, or of a share of the pixels
//   norm_rows, back_rows     a block a channel: adds up the sums, in double, in a fixed order
//   grad_weight_partial      a block: all taps of 16 x 16 channels over a fixed share of the tiles,
//                            of which there are as many as fill the GPU; a thread: one c, four k,
//                            nine taps, a 3x3 window sliding along the row
//   grad_weight_sum          adds the shares in a fixed order: no atomics, bit-reproducible
//   conv_tiled               a block: 8x8 outputs x KB channels; input tile (pooled, normalised,
//                            or a gradient taken back through a normalisation, while it is loaded)
//                            and weights in shared memory, 16 input channels at a time. float32: a
//                            thread has 4 pixels x 4 channels in registers, uses each input value
//                            for three taps, each weight for four pixels. float16, bfloat16: a warp
//                            has 32 pixels x 16 channels, on tensor cores. The input's gradient is
//                            the same with rotated, transposed weights. The epilogue adds the
//                            shortcut's gradient, unpools or passes a ReLU back, and sums what the
//                            next normalisation needs.
#include "pool_conv.h"

#include <algorithm>
#include <type_traits>

#ifndef CUDA_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace pool_conv {
namespace {

constexpr int TILE = 8;              // outputs of a block, in both directions
constexpr int CB = 16;               // input channels in shared memory at a time
constexpr int GROUP = 9 * CB * CB;   // weights whose gradient a block sums
constexpr int BLOCKS = 4 * 132;      // of such blocks: what an H100 holds
constexpr int MOST_PARTS = PARTIAL_ROWS / 4;  // of a tensor's sums

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};
using Part = Four<float>;  // of a channel's sums: pixels, pivot, sum, sum of products

// What a convolution multiplies: float32, or float16 and bfloat16 where tensor cores take both
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <typename T>
using Factor = float;
#else
template <typename T>
using Factor = T;
#endif

// SIDE x SIDE pixels of CB channels in shared memory, PITCH elements from one to the next. With
// this and the 16 bytes at a row's end the threads of a warp, which read 16 bytes each (for tensor
// cores 4), meet every bank once.
template <typename E>
constexpr int PITCH = CB + 16 / int(sizeof(E));
template <typename E, int SIDE>
struct alignas(16) Pixels {
  E v[SIDE][SIDE * PITCH<E> + 16 / sizeof(E)];
};

// The weights from CB to KB channels there: k innermost, for the tensor cores c
template <typename E, int KB>
struct alignas(16) Weights {
  static constexpr bool BY_C = sizeof(E) == 2;
  E v[9 * (BY_C ? KB * PITCH<E> : CB * (KB + 4))];
  static __device__ int at(int c, int tap, int k) {
    return BY_C ? (tap * KB + k) * PITCH<E> + c : (c * 9 + tap) * (KB + 4) + k;
  }
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(uint8_t v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline uint8_t from_float<uint8_t>(float v) { return v; }
template <>
__device__ inline __half from_float<__half>(float v) { return __float2half(v); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16(v); }

// Four channels at p: one access if `wide`, that is where channels are a multiple of four; else
// `left` of them, and zeros
template <typename T>
__device__ inline Four<float> load4(const T* p, int left, bool wide) {
  Four<float> to;
  if (wide) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(p);
    for (int q = 0; q < 4; q++) to.v[q] = to_float(four.v[q]);
  } else {
    for (int q = 0; q < 4; q++) to.v[q] = q < left ? to_float(p[q]) : 0.0f;
  }
  return to;
}

// At several places, one load after the other under way before the first is used
template <typename T, int COUNT>
__device__ inline void load4(const T* p, const int (&at)[COUNT], int left, bool wide,
                             Four<float> (&to)[COUNT]) {
  if (wide)
    for (int r = 0; r < COUNT; r++) to[r] = load4(p + at[r], left, true);
  else
    for (int r = 0; r < COUNT; r++) to[r] = load4(p + at[r], left, false);
}

template <typename T>
__device__ inline void store4(T* p, const Four<float>& values, int left, bool wide) {
  Four<T> four;
  for (int q = 0; q < 4; q++) four.v[q] = from_float<T>(values.v[q]);
  if (wide) *reinterpret_cast<Four<T>*>(p) = four;
  for (int q = 0; !wide && q < 4; q++)
    if (q < left) p[q] = four.v[q];
}

__device__ inline float relu(float v) { return v < 0 ? 0.0f : v; }  // a NaN passes

// (v - center) scale + shift for four channels from c on, by three of `rows`
struct Scaling {
  Four<float> center, scale, shift;
  __device__ Scaling(const float* rows, int by_scale, int by_shift, int c, int channels, bool wide)
      : center(load4(rows + CENTER * channels + c, channels - c, wide)),
        scale(load4(rows + by_scale * channels + c, channels - c, wide)),
        shift(load4(rows + by_shift * channels + c, channels - c, wide)) {}
  __device__ float operator()(float v, int q) const {
    return (v - center.v[q]) * scale.v[q] + shift.v[q];
  }
};

// What `from` describes, four channels from c on of COUNT pixels: to[r], from element
// base + at[r] on
template <typename T, int COUNT>
__device__ inline void fetch4(const Source& from, int64_t base, const int (&at)[COUNT], int c,
                              int channels, bool wide, Four<float> (&to)[COUNT]) {
  const int left = channels - c;
  Four<float> other[COUNT];
  load4(static_cast<const T*>(from.x) + base, at, left, wide, to);
  if (from.norm) {
    const Scaling norm(from.norm, SCALE, SHIFT, c, channels, wide);
    for (int r = 0; r < COUNT; r++)
      for (int q = 0; q < 4; q++) to[r].v[q] = relu(norm(to[r].v[q], q));
  }
  if (from.out) {
    load4(static_cast<const T*>(from.out) + base, at, left, wide, other);
    for (int r = 0; r < COUNT; r++)
      for (int q = 0; q < 4; q++) to[r].v[q] = other[r].v[q] <= 0 ? 0.0f : to[r].v[q];
  }
  if (from.back) {
    const Scaling by_y(from.back, BY_Y, BY_1, c, channels, wide);
    const Four<float> by_g = load4(from.back + BY_G * channels + c, left, wide);
    load4(static_cast<const T*>(from.y) + base, at, left, wide, other);
    for (int r = 0; r < COUNT; r++)
      for (int q = 0; q < 4; q++)
        to[r].v[q] = to[r].v[q] * by_g.v[q] + by_y(other[r].v[q], q);
  }
}

// `mine` summed over the threads of a block that are `rows` rows of `width`, column by column, pair
// by pair in a fixed order: in the first row's threads. found: memory for N of each thread
template <int N, typename F>
__device__ inline void sum_rows(F (&mine)[N], F* found, int rows, int width) {
  const int row = threadIdx.x / width;
  for (int n = 0; n < N; n++) found[n * blockDim.x + threadIdx.x] = mine[n];
  for (int half = (rows + 1) / 2; rows > 1; rows = half, half = (rows + 1) / 2) {
    __syncthreads();
    for (int n = 0; n < N && row + half < rows; n++) {
      mine[n] += found[n * blockDim.x + threadIdx.x + half * width];
      found[n * blockDim.x + threadIdx.x] = mine[n];
    }
  }
}

// The sums of a block, of four channels from c on, as its Part of each
__device__ inline void write_parts(float* partial, int c, int left, float pixels,
                                   const Four<float>& pivot, const float (&sums)[8]) {
  for (int q = 0; q < 4; q++)
    if (q < left)
      reinterpret_cast<Part*>(partial)[int64_t(c + q) * gridDim.x + blockIdx.x] = {
          pixels, pivot.v[q], sums[q], sums[4 + q]};
}

// torch's rule: the first of equals, a NaN always
__device__ inline void take(float value, int place, float& best, float& index) {
  if (value > best || value != value) {
    best = value;
    index = place;
  }
}

template <typename T>
__global__ void grad_input_plain(Layer g, const T* grad_y, const T* weight, T* grad_x) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= int64_t(g.batch) * g.height * g.width * g.c_in) return;
  const int c = at % g.c_in, column = at / g.c_in % g.width, row = at / g.c_in / g.width % g.height;
  const int64_t n = at / g.c_in / g.width / g.height;
  float sum = 0;
  for (int a = 0; a < 3; a++)
    for (int b = 0; b < 3; b++) {
      const int i = row + 1 - a, j = column + 1 - b;  // stride times the output's place
      if (i < 0 || j < 0 || i % g.stride || j % g.stride || i / g.stride >= g.y_height ||
          j / g.stride >= g.y_width) continue;
      const T* pixel =
          grad_y + ((n * g.y_height + i / g.stride) * g.y_width + j / g.stride) * g.c_out;
      for (int k = 0; k < g.c_out; k++)
        sum += to_float(pixel[k]) * to_float(weight[(int64_t(k) * 9 + 3 * a + b) * g.c_in + c]);
    }
  grad_x[at] = from_float<T>(sum);
}

__host__ __device__ inline int64_t tile_count(int batch, int height, int width) {
  return int64_t(batch) * ((height + TILE - 1) / TILE) * ((width + TILE - 1) / TILE);
}

// Where a block's tile lies: `tile` counts tiles of TILE x TILE outputs through the images.
struct Place {
  int n, top, left;
  __device__ Place(const Layer& g, int64_t tile) {
    const int down = (g.y_height + TILE - 1) / TILE, across = (g.y_width + TILE - 1) / TILE;
    n = tile / (down * across);
    top = tile / across % down * TILE;
    left = tile % across * TILE;
  }
};

// Fills `to` with what `from` describes: CB channels from c0 on of the pixels of image n from
// (top, left) on, zeros outside. A thread whose pixel is outside loads the image's first one.
template <typename T, int THREADS, typename E, int SIDE>
__device__ inline void stage(const Source& from, int n, int top, int left, int height, int width,
                             int channels, int c0, Pixels<E, SIDE>& to) {
  constexpr int ROWS = THREADS / 4 / SIDE;  // at a time
  constexpr int ROUNDS = (SIDE + ROWS - 1) / ROWS, COUNT = ROUNDS < 5 ? ROUNDS : 5;
  const int lane = threadIdx.x % 4 * 4, c = c0 + lane, j = threadIdx.x / 4 % SIDE;
  const bool within = unsigned(left + j) < unsigned(width) && c < channels;
  const int64_t image = int64_t(n) * height * width * channels;
  if (threadIdx.x / 4 >= ROWS * SIDE) return;
  constexpr int ACROSS = sizeof(to.v[0]) / sizeof(Four<E>);
  Four<E>* column = reinterpret_cast<Four<E>*>(&to) + j * PITCH<E> / 4 + threadIdx.x % 4;
#pragma unroll 1
  for (int first = threadIdx.x / 4 / SIDE; first < SIDE; first += COUNT * ROWS) {
    int at[COUNT];
    bool inside[COUNT];
    Four<float> value[COUNT];
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
      const int row = top + first + r * ROWS;
      inside[r] = within && unsigned(row) < unsigned(height);
      at[r] = inside[r] ? (row * width + left + j) * channels + c : 0;
    }
    fetch4<T>(from, image, at, c < channels ? c : 0, channels, channels % 4 == 0, value);
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
      const int i = first + r * ROWS;
      for (int q = 0; q < 4; q++) value[r].v[q] = inside[r] ? value[r].v[q] : 0.0f;
      if (i < SIDE) store4(column[i * ACROSS].v, value[r], 4, true);
    }
  }
}

// Likewise the max-pool of x around the tile `at`; what lies in the tile itself goes to `pooled`
// and `argmax`, if not null.
template <typename T, int THREADS, typename E, int SIDE>
__device__ inline void stage_pooled(const Layer& g, const T* x, const Place& at, int c0, T* pooled,
                                    uint8_t* argmax, Pixels<E, SIDE>& to) {
  const int lane = threadIdx.x % 4 * 4, c = c0 + lane, left = g.c_in - c;
  const bool wide = g.c_in % 4 == 0;
  for (int pixel = threadIdx.x / 4; pixel < SIDE * SIDE; pixel += THREADS / 4) {
    const int i = pixel / SIDE, j = pixel % SIDE, row = at.top + i - 1, column = at.left + j - 1;
    Four<float> best = {}, index = {}, value[4];
    if (row >= 0 && row < g.height && column >= 0 && column < g.width && left > 0) {
      const T* corner =
          x + ((int64_t(at.n) * g.x_height + 2 * row) * g.x_width + 2 * column) * g.c_in + c;
      for (int q = 0; q < 4; q++)
        value[q] = load4(corner + (int64_t(q / 2) * g.x_width + q % 2) * g.c_in, left, wide);
      best = value[0];
      for (int q = 1; q < 4; q++)
        for (int u = 0; u < 4; u++) take(value[q].v[u], q, best.v[u], index.v[u]);
      if (pooled && i >= 1 && i <= TILE && j >= 1 && j <= TILE) {
        const int64_t out = ((int64_t(at.n) * g.height + row) * g.width + column) * g.c_in + c;
        store4(pooled + out, best, left, wide);
        store4(argmax + out, index, left, wide);
      }
    }
    store4(&to.v[i][j * PITCH<E> + lane], best, 4, true);
  }
}

// Fills `to` with the weights from channels c0 and k0 on, zeros where there are none. A
// thread: nine taps of four c of a k; with FLIP, which transposes and rotates, of four k of a c.
template <typename T, bool FLIP, typename E, int KB>
__device__ inline void stage_weights(const Layer& g, const T* weight, int c0, int k0,
                                     Weights<E, KB>& to) {
  const int t = threadIdx.x;
  const int c = FLIP ? t / (KB / 4) : t % 2 * 4 + t / (2 * KB) * 8;
  const int k = FLIP ? t % (KB / 4) * 4 : t / 2 % KB;
  const int row = FLIP ? c0 + c : k0 + k, column = FLIP ? k0 + k : c0 + c;
  const int rows = FLIP ? g.c_in : g.c_out, columns = FLIP ? g.c_out : g.c_in;
  const bool inside = row < rows && column < columns;
  E* first = &to.v[to.at(c, 0, k)];
  int at[9];
  Four<float> value[9] = {};
#pragma unroll
  for (int tap = 0; tap < 9; tap++) at[tap] = (FLIP ? 8 - tap : tap) * columns;
  if (inside)
    load4(weight + int64_t(row) * 9 * columns + column, at, columns - column, columns % 4 == 0,
          value);
#pragma unroll
  for (int tap = 0; tap < 9; tap++) {
    if (FLIP != to.BY_C) store4(&first[to.at(0, tap, 0)], value[tap], 4, true);
    for (int q = 0; FLIP == to.BY_C && q < 4; q++)
      first[to.at(FLIP ? 0 : q, tap, FLIP ? q : 0)] = from_float<E>(value[tap].v[q]);
  }
}

// sum[p].v[q] += the convolution of the staged channels, for the outputs (row, column + p) of the
// tile and channels k + q, where row, column and k are by threadIdx.x as in conv_tiled
template <int S, int IN, int KB>
__device__ inline void multiply(const Pixels<float, IN>& xs, Weights<float, KB>& ws, int channels,
                                Four<float> (&sum)[4]) {
  const int k = threadIdx.x % (KB / 4) * 4, pixel = threadIdx.x / (KB / 4);
  const int row = pixel / 2 * S, column = pixel % 2 * 4 * S;
#pragma unroll 1
  for (int c = 0; c < channels; c += 4)
#pragma unroll
    for (int a = 0; a < 3; a++) {
      Four<float> line[3 * S + 3];  // [j].v[c]
      for (int j = 0; j < 3 * S + 3; j++)
        line[j] = load4(&xs.v[row + a][(column + j) * PITCH<float> + c], 4, true);
      for (int q = 0; q < 12; q++) {
        const int b = q / 4, u = q % 4;
        const Four<float> w = load4(&ws.v[ws.at(c + u, 3 * a + b, k)], 4, true);
        for (int p = 0; p < 4; p++)
          for (int r = 0; r < 4; r++) sum[p].v[r] += line[p * S + b].v[u] * w.v[r];
      }
    }
}

#ifndef CUDA_EMULATION
// d += a b for 16 x 16 times 16 x 8, in one instruction of a warp. Each register of a and b holds
// two neighbours. With g = lane / 4 and t = lane % 4:
//   a: {row g, columns 2t, 2t+1}, {row g+8, these}, {row g, columns 2t+8, 2t+9}, {row g+8, these}
//   b: {rows 2t, 2t+1 of column g}, {rows 2t+8, 2t+9}
//   d: row g, columns 2t and 2t+1; row g+8, these
template <typename T>
__device__ inline void mma(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4]) {
#define MMA(type)                                                                     \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32"          \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"               \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>)
    MMA("f16");
  else
    MMA("bf16");
}
#endif

// Likewise on tensor cores: a warp has four rows of the tile and 16 channels, an mma two rows (its
// rows are the pixels), 8 channels and a tap. sum[2 m + n] is what mma of rows m and channels n
// leaves; `collect` makes the above of it.
template <int S, typename T, int IN, int KB>
__device__ inline void multiply(const Pixels<T, IN>& xs, Weights<T, KB>& ws, int,
                                Four<float> (&sum)[4]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
  const int row = warp % 2 * 4, k = warp / 2 * 16 + g;
#pragma unroll
  for (int tap = 0; tap < 9; tap++) {
    uint32_t a[2][4], b[2][2];
    for (int m = 0; m < 2; m++)
      for (int q = 0; q < 4; q++)
        a[m][q] = *reinterpret_cast<const uint32_t*>(
            &xs.v[(row + 2 * m + q % 2) * S + tap / 3]
                 [(g * S + tap % 3) * PITCH<T> + q / 2 * 8 + c]);
    for (int n = 0; n < 2; n++)
      for (int q = 0; q < 2; q++)
        b[n][q] = *reinterpret_cast<const uint32_t*>(&ws.v[ws.at(q * 8 + c, tap, k + 8 * n)]);
    for (int m = 0; m < 2; m++)
      for (int n = 0; n < 2; n++) mma<T>(a[m], b[n], sum[2 * m + n].v);
  }
}

template <int KB>
__device__ inline void collect(float* scratch, Four<float> (&sum)[4]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int q = 0; q < 16; q++) {
    const int row = warp % 2 * 4 + q / 8 * 2 + q % 4 / 2;
    const int k = warp / 2 * 16 + q / 4 % 2 * 8 + 2 * t + q % 2;
    scratch[(row * TILE + g) * (KB + 4) + k] = sum[q / 4].v[q % 4];
  }
  __syncthreads();
  const int k = threadIdx.x % (KB / 4) * 4, pixel = threadIdx.x / (KB / 4) * 4;
  for (int p = 0; p < 4; p++) sum[p] = load4(&scratch[(pixel + p) * (KB + 4) + k], 4, true);
  __syncthreads();
}

// grid: (tiles, c_out / KB); block: 16 * KB / 4 threads. POOL: x is pooled on the way, and the
// blocks of the first KB channels write `pooled` and `argmax`. FLIP: weight is (c_in,3,3,c_out),
// read transposed and rotated. With `unpool` (the forward's argmax), y is the pooling's input.
// `partial`, if not null: a Part a channel and tile, of y for its moments; or, where `before`
// describes relu(normalised x), y is the gradient behind that ReLU and the sums are of y and
// y (x - center).
template <typename T, int KB, int S, bool POOL, bool FLIP>
__global__ void __launch_bounds__(4 * KB, 128 / KB) conv_tiled(
    Layer g, Source source, const T* __restrict__ weight, T* __restrict__ y,
    T* __restrict__ pooled, uint8_t* __restrict__ argmax, const uint8_t* __restrict__ unpool,
    Source extra, Source before, float* __restrict__ partial) {
  constexpr int IN = (TILE - 1) * S + 3, THREADS = 4 * KB;
  __shared__ struct {
    Pixels<Factor<T>, IN> xs;
    Weights<Factor<T>, KB> ws;
  } staged;
  const Place at(g, blockIdx.x);
  const int k0 = blockIdx.y * KB, k = threadIdx.x % (KB / 4) * 4;
  const int pixel = threadIdx.x / (KB / 4), row = pixel / 2, column = pixel % 2 * 4;
  const bool wide_out = g.c_out % 4 == 0;
  Four<float> sum[4] = {};  // [pixel].v[k]

  for (int c0 = 0; c0 < g.c_in; c0 += CB) {
    const int top = at.top * S - 1, left = at.left * S - 1;
    if (POOL)
      stage_pooled<T, THREADS>(g, static_cast<const T*>(source.x), at, c0,
                               blockIdx.y ? nullptr : pooled, argmax, staged.xs);
    else
      stage<T, THREADS>(source, at.n, top, left, g.height, g.width, g.c_in, c0, staged.xs);
    stage_weights<T, FLIP>(g, weight, c0, k0, staged.ws);
    __syncthreads();
    multiply<S>(staged.xs, staged.ws, g.c_in - c0 < CB ? g.c_in - c0 : CB, sum);
    __syncthreads();
  }
  float* scratch = reinterpret_cast<float*>(&staged);  // which is free now
  if (sizeof(Factor<T>) == 2) collect<KB>(scratch, sum);

  const int i = at.top + row, j = at.left + column, left = g.c_out - k0 - k;
  const int64_t image = int64_t(at.n) * g.y_height * g.y_width * g.c_out;
  int out[4];  // of this thread's pixels, in the image; the first one's for those outside
  bool inside[4];
  for (int p = 0; p < 4; p++) {
    inside[p] = i < g.y_height && j + p < g.y_width && left > 0;
    out[p] = inside[p] ? (i * g.y_width + j + p) * g.c_out + k0 + k : 0;
  }
  const int c = left > 0 ? k0 + k : 0;
  Four<float> value[4], center = {};
  if (extra.x) {
    fetch4<T>(extra, image, out, c, g.c_out, wide_out, value);
    for (int p = 0; p < 4; p++)
      for (int q = 0; q < 4; q++) sum[p].v[q] += value[p].v[q];
  }
  if (before.x) {
    const Scaling norm(before.norm, SCALE, SHIFT, c, g.c_out, wide_out);
    center = norm.center;
    load4(static_cast<const T*>(before.x) + image, out, left, wide_out, value);
    for (int p = 0; p < 4; p++)
      for (int q = 0; q < 4; q++)
        sum[p].v[q] = norm(value[p].v[q], q) <= 0 ? 0.0f : sum[p].v[q];
  }
#pragma unroll  // or sum[] would not stay in registers
  for (int p = 0; p < 4; p++) {
    for (int q = 0; q < 4; q++) sum[p].v[q] = to_float(from_float<T>(sum[p].v[q]));  // as stored
    if (!inside[p]) continue;
    if (!unpool) {
      store4(y + image + out[p], sum[p], left, wide_out);
      continue;
    }
    const Four<float> place = load4(unpool + image + out[p], left, wide_out);
#pragma unroll
    for (int q = 0; q < 4; q++) {
      Four<float> here;
      for (int u = 0; u < 4; u++) here.v[u] = place.v[u] == q ? sum[p].v[u] : 0.0f;
      const int64_t line = int64_t(at.n) * g.x_height + 2 * i + q / 2;
      store4(y + (line * g.x_width + 2 * (j + p) + q % 2) * g.c_out + c, here, left, wide_out);
    }
  }
  if (!partial) return;

  // Sums about the first pixel's y
  if (pixel == 0) store4(&scratch[k], before.x ? Four<float>{} : sum[0], 4, true);
  __syncthreads();
  const Four<float> pivot = load4(&scratch[k], 4, true);
  __syncthreads();
  float mine[8] = {};  // of four channels, then of their products
#pragma unroll
  for (int p = 0; p < 4; p++)
    for (int q = 0; q < 4; q++) {
      const float d = inside[p] ? sum[p].v[q] - pivot.v[q] : 0.0f;
      mine[q] += d;
      mine[4 + q] += d * (before.x ? value[p].v[q] - center.v[q] : d);
    }
  sum_rows(mine, scratch, 16, KB / 4);
  const int high = g.y_height - at.top, across = g.y_width - at.left;
  const int pixels = (high < TILE ? high : TILE) * (across < TILE ? across : TILE);
  if (pixel == 0) write_parts(partial, c, left, pixels, pivot, mine);
}

// grid: (shares, c_in / 16, c_out / 16); block: 128 threads, each nine taps of one c and four k in
// half the rows of `share` tiles. partial: (shares, c_in / 16, c_out / 16, 9 taps, 16 c, 16 k)
template <typename T, int S>
__global__ void __launch_bounds__(128, S == 1 ? 4 : 3) grad_weight_partial(
    Layer g, Source x, Source grad_y, int64_t share, float* __restrict__ partial) {
  constexpr int IN = (TILE - 1) * S + 3;
  __shared__ union {
    struct {
      Pixels<float, IN> xs;
      Pixels<float, TILE> gs;
    } staged;
    float found[36 * 128];
  } shared;
  auto& xs = shared.staged.xs;
  auto& gs = shared.staged.gs;
  const int c0 = blockIdx.y * CB, k0 = blockIdx.z * CB;
  const int half = threadIdx.x / 64, c = threadIdx.x % 64 / 4, k = threadIdx.x % 4 * 4;
  const int64_t tiles = tile_count(g.batch, g.y_height, g.y_width), begin = blockIdx.x * share;
  float sum[36] = {};  // [4 tap + k]
  for (int64_t tile = begin; tile < tiles && tile < begin + share; tile++) {
    const Place at(g, tile);
    const int top = at.top * S - 1, left = at.left * S - 1;
    stage<T, 128>(x, at.n, top, left, g.height, g.width, g.c_in, c0, xs);
    stage<T, 128>(grad_y, at.n, at.top, at.left, g.y_height, g.y_width, g.c_out, k0, gs);
    __syncthreads();
#pragma unroll 1
    for (int i = half * TILE / 2; i < (half + 1) * TILE / 2; i++) {
      float window[3][3];  // [b][a]; column b of output column j is slot (S j + b) % 3
      for (int b = 0; b < 3 - S; b++)
        for (int a = 0; a < 3; a++) window[b][a] = xs.v[i * S + a][b * PITCH<float> + c];
#pragma unroll
      for (int j = 0; j < TILE; j++) {
        for (int b = 3 - S; b < 3; b++)
          for (int a = 0; a < 3; a++)
            window[(S * j + b) % 3][a] = xs.v[i * S + a][(S * j + b) * PITCH<float> + c];
        const Four<float> gradient = load4(&gs.v[i][j * PITCH<float> + k], 4, true);
        for (int tap = 0; tap < 9; tap++)
          for (int q = 0; q < 4; q++)
            sum[4 * tap + q] += window[(S * j + tap % 3) % 3][tap / 3] * gradient.v[q];
      }
    }
    __syncthreads();
  }
  sum_rows(sum, shared.found, 2, 64);
  const int64_t group = (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * gridDim.z + blockIdx.z;
  for (int tap = 0; tap < 9 && half == 0; tap++)
    store4(&partial[group * GROUP + (tap * CB + c) * CB + k],
           {sum[4 * tap], sum[4 * tap + 1], sum[4 * tap + 2], sum[4 * tap + 3]}, 4, true);
}

// grid: (GROUP / 32, c_in / 16, c_out / 16); block: 32 weights x 8 rows of shares
template <typename T>
__global__ void grad_weight_sum(Layer g, int shares, const float* partial, T* grad_weight) {
  __shared__ float found[256];
  const int row = threadIdx.x / 32, at = blockIdx.x * 32 + threadIdx.x % 32;
  const int64_t group = int64_t(blockIdx.y) * gridDim.z + blockIdx.z;
  const int64_t groups = int64_t(gridDim.y) * gridDim.z;
  float sum[1] = {};
#pragma unroll 8
  for (int share = row; share < shares; share += 8)
    sum[0] += partial[(share * groups + group) * GROUP + at];
  sum_rows(sum, found, 8, 32);
  const int k = blockIdx.z * CB + at % CB, c = blockIdx.y * CB + at / CB % CB, tap = at / CB / CB;
  if (row == 0 && k < g.c_out && c < g.c_in)
    grad_weight[(int64_t(k) * g.c_in + c) * 9 + tap] = from_float<T>(sum[0]);
}

// Shares pixels among blocks of 256 threads: a thread takes four channels, `quads` of them (of all,
// or as many as a block has) one pixel, a block `rows` pixels at a time.
struct Quads {
  int quads, rows;
  __host__ __device__ explicit Quads(int channels)
      : quads(channels > 1024 ? 256 : (channels + 3) / 4), rows(256 / quads) {}
};

// to = relu(normalised y + r), where r may be normalised, too; or, without norm, to = `from`
__global__ void elementwise(int64_t pixels, int channels, Source from, const float* norm,
                            const float* __restrict__ r, const float* norm_r,
                            float* __restrict__ to) {
  const Quads by(channels);
  const int row = threadIdx.x / by.quads;
  const int c = (blockIdx.y * by.quads + threadIdx.x % by.quads) * 4, left = channels - c;
  const int64_t pixel = int64_t(blockIdx.x) * by.rows + row, at = pixel * channels + c;
  const bool wide = channels % 4 == 0;
  if (row >= by.rows || pixel >= pixels || left <= 0) return;
  Four<float> value[1];
  fetch4<float>(from, at, {0}, c, channels, wide, value);
  if (norm) {
    const Scaling of_y(norm, SCALE, SHIFT, c, channels, wide);
    for (int q = 0; q < 4; q++) value[0].v[q] = of_y(value[0].v[q], q);
    if (r) {
      Four<float> more = load4(r + at, left, wide);
      if (norm_r) {
        const Scaling of_r(norm_r, SCALE, SHIFT, c, channels, wide);
        for (int q = 0; q < 4; q++) more.v[q] = of_r(more.v[q], q);
      }
      for (int q = 0; q < 4; q++) value[0].v[q] += more.v[q];
    }
    for (int q = 0; q < 4; q++) value[0].v[q] = relu(value[0].v[q]);
  }
  store4(to + at, value[0], left, wide);
}

// grid: (parts, channels / 1024); a block: `share` pixels. A Part a channel and block, of y for its
// moments; or, with `grad`, of the gradient and its products with y - center
__global__ void column_sums(int64_t pixels, int64_t share, int channels, Source grad,
                            const float* y, const float* norm, float* partial) {
  __shared__ float found[8 * 256];
  const Quads by(channels);
  const int row = threadIdx.x / by.quads;
  const int c = (blockIdx.y * by.quads + threadIdx.x % by.quads) * 4, left = channels - c;
  const bool wide = channels % 4 == 0;
  const int64_t begin = blockIdx.x * share, end = begin + share < pixels ? begin + share : pixels;
  Four<float> pivot = {}, center = {};
  if (left > 0 && grad.x) center = load4(norm + CENTER * channels + c, left, wide);
  if (left > 0 && !grad.x) pivot = load4(y + begin * channels + c, left, wide);
  float mine[8] = {};
#pragma unroll 2
  for (int64_t p = begin + row; p < end && row < by.rows && left > 0; p += by.rows) {
    const Four<float> v = load4(y + p * channels + c, left, wide);
    Four<float> value[1] = {v};
    if (grad.x) fetch4<float>(grad, p * channels + c, {0}, c, channels, wide, value);
    for (int q = 0; q < 4; q++) {
      const float d = value[0].v[q] - pivot.v[q];
      mine[q] += d;
      mine[4 + q] += d * (grad.x ? v.v[q] - center.v[q] : d);
    }
  }
  sum_rows(mine, found, by.rows, by.quads);
  if (row == 0) write_parts(partial, c, left, end - begin, pivot, mine);
}

// A block of 256 threads a channel: pixels, sum and sum of products of all parts about the first
// part's pivot, in the first thread's `mine`; returns the pivot
__device__ inline double sum_parts(int64_t parts, const float* partial, double (&mine)[3]) {
  __shared__ double found[3 * 256];
  const Part* of_channel = reinterpret_cast<const Part*>(partial) + blockIdx.x * parts;
  const double pivot = of_channel[0].v[1];
#pragma unroll 4
  for (int64_t at = threadIdx.x; at < parts; at += 256) {
    const Part part = of_channel[at];
    const double pixels = part.v[0], apart = part.v[1] - pivot, sum = part.v[2];
    mine[0] += pixels;
    mine[1] += sum + pixels * apart;
    mine[2] += part.v[3] + apart * (2 * sum + pixels * apart);
  }
  sum_rows(mine, found, 256, 1);
  return pivot;
}

__global__ void norm_rows(int64_t parts, int channels, const float* partial, Affine affine,
                          float* norm) {
  double sums[3] = {};
  const double pivot = sum_parts(parts, partial, sums), apart = sums[1] / sums[0];
  const Moment moment{sums[0], pivot + apart, sums[2] - apart * sums[1]};
  if (threadIdx.x == 0) write_norm(moment, affine, blockIdx.x, channels, norm);
}

__global__ void back_rows(int64_t parts, int channels, const float* partial, const float* norm,
                          const float* gamma, float* back) {
  double sums[3] = {};
  sum_parts(parts, partial, sums);
  if (threadIdx.x == 0)
    write_back(sums[1], sums[2], sums[0], norm, gamma, blockIdx.x, channels, back);
}

const char* failure() {  // of the launches so far, or null
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

unsigned blocks(int64_t threads) { return (threads + 255) / 256; }

int64_t groups(const Layer& g) {
  return int64_t((g.c_in + CB - 1) / CB) * ((g.c_out + CB - 1) / CB);
}
// So many that grad_weight_partial has BLOCKS blocks, or one for each group of weights if these are
// more: what it leaves in memory is 5 MB, or as large as the weights.
int64_t tiles_a_share(const Layer& g) {
  const int64_t shares = std::max<int64_t>(1, BLOCKS / std::max<int64_t>(1, groups(g)));
  return (tile_count(g.batch, g.y_height, g.y_width) + shares - 1) / shares;
}
int64_t shares(const Layer& g) {
  const int64_t share = tiles_a_share(g);
  return share ? (tile_count(g.batch, g.y_height, g.y_width) + share - 1) / share : 0;
}

template <typename T, int KB, int S, bool POOL, bool FLIP>
void tiled(const Layer& g, const Source& x, const void* weight, void* y, void* pooled,
           uint8_t* argmax, const uint8_t* unpool, const Source& extra, const Source& before,
           float* partial, cudaStream_t stream) {
  LAUNCH((conv_tiled<T, KB, S, POOL, FLIP>),
         dim3(tile_count(g.batch, g.y_height, g.y_width), (g.c_out + KB - 1) / KB), dim3(4 * KB),
         stream, g, x, static_cast<const T*>(weight), static_cast<T*>(y), static_cast<T*>(pooled),
         argmax, unpool, extra, before, partial);
}

template <typename T>
void forward(const Layer& g, const Source& x, const void* weight, void* y, void* pooled,
             uint8_t* argmax, const Affine& affine, float* partial, float* norm_y,
             cudaStream_t stream) {
  const bool pool = argmax != nullptr, wide = g.c_out > 16;
  const auto run = pool ? (wide ? tiled<T, 32, 1, true, false> : tiled<T, 16, 1, true, false>)
      : g.stride == 2 ? tiled<T, 32, 2, false, false>
                      : (wide ? tiled<T, 32, 1, false, false> : tiled<T, 16, 1, false, false>);
  run(g, x, weight, y, pooled, argmax, nullptr, {}, {}, norm_y ? partial : nullptr, stream);
  if (norm_y)
    LAUNCH(norm_rows, dim3(g.c_out), dim3(256), stream, tile_count(g.batch, g.y_height, g.y_width),
           g.c_out, partial, affine, norm_y);
}

template <typename T>
void grad_input(const Layer& g, const Source& grad_y, const void* weight, const uint8_t* argmax,
                const Source& extra, void* grad_x, const Source& x, const float* gamma,
                float* partial, float* back_x, cudaStream_t stream) {
  if (g.stride == 2) {
    LAUNCH(grad_input_plain<T>, dim3(blocks(int64_t(g.batch) * g.height * g.width * g.c_in)),
           dim3(256), stream, g, static_cast<const T*>(grad_y.x), static_cast<const T*>(weight),
           static_cast<T*>(grad_x));
    return;
  }
  Layer back = g;  // from grad_y to the gradient of the convolution's input
  back.c_in = g.c_out, back.c_out = g.c_in;
  (g.c_in > 16 ? tiled<T, 32, 1, false, true> : tiled<T, 16, 1, false, true>)(
      back, grad_y, weight, grad_x, nullptr, nullptr, argmax, extra, back_x ? x : Source{},
      back_x ? partial : nullptr, stream);
  if (back_x)
    LAUNCH(back_rows, dim3(g.c_in), dim3(256), stream, tile_count(g.batch, g.height, g.width),
           g.c_in, static_cast<const float*>(partial), x.norm, gamma, back_x);
}

template <typename T>
void grad_weight(const Layer& g, const Source& x, const Source& grad_y, float* partial,
                 void* result, cudaStream_t stream) {
  const unsigned across = (g.c_in + CB - 1) / CB, down = (g.c_out + CB - 1) / CB;
  const unsigned count = shares(g);
  if (count)
    LAUNCH((g.stride == 2 ? grad_weight_partial<T, 2> : grad_weight_partial<T, 1>),
           dim3(count, across, down), dim3(128), stream, g, x, grad_y, tiles_a_share(g), partial);
  LAUNCH(grad_weight_sum<T>, dim3(GROUP / 32, across, down), dim3(256), stream, g, int(count),
         static_cast<const float*>(partial), static_cast<T*>(result));
}

void run_elementwise(int64_t pixels, int channels, const Source& from, const float* norm,
                     const float* r, const float* norm_r, float* to, cudaStream_t stream) {
  const Quads by(channels);
  LAUNCH(elementwise, dim3((pixels + by.rows - 1) / by.rows, (channels + 1023) / 1024), dim3(256),
         stream, pixels, channels, from, norm, r, norm_r, to);
}

// Returns the number of parts
int64_t run_column_sums(int64_t pixels, int channels, const Source& grad, const float* y,
                        const float* norm, float* partial, cudaStream_t stream) {
  const int64_t share = (pixels + MOST_PARTS - 1) / MOST_PARTS;
  const int64_t parts = (pixels + share - 1) / share;
  LAUNCH(column_sums, dim3(parts, (channels + 1023) / 1024), dim3(256), stream, pixels, share,
         channels, grad, y, norm, partial);
  return parts;
}

}  // namespace

int64_t forward_partial_floats(const Layer& g) {
  return 4 * tile_count(g.batch, g.y_height, g.y_width) * g.c_out;
}
int64_t grad_input_partial_floats(const Layer& g) {
  return 4 * tile_count(g.batch, g.height, g.width) * g.c_in;
}
int64_t grad_weight_partial_floats(const Layer& g) { return shares(g) * groups(g) * GROUP; }

#define BY_TYPE(function, ...)                                         \
  (type == FLOAT32 ? function<float> : type == FLOAT16 ? function<__half> \
                                                       : function<__nv_bfloat16>)(__VA_ARGS__)

const char* launch_forward(Type type, const Layer& g, const Source& x, const void* weight, void* y,
                           void* pooled, uint8_t* argmax, const Affine& affine, float* partial,
                           float* norm_y, void* stream) {
  if (g.batch && g.c_out)
    BY_TYPE(forward, g, x, weight, y, pooled, argmax, affine, partial, norm_y,
            cudaStream_t(stream));
  return failure();
}

const char* launch_grad_input(Type type, const Layer& g, const Source& grad_y, const void* weight,
                              const uint8_t* argmax, const Source& extra, void* grad_x,
                              const Source& x, const float* gamma, float* partial, float* back_x,
                              void* stream) {
  if (g.batch && g.c_in)
    BY_TYPE(grad_input, g, grad_y, weight, argmax, extra, grad_x, x, gamma, partial, back_x,
            cudaStream_t(stream));
  return failure();
}

const char* launch_grad_weight(Type type, const Layer& g, const Source& x, const Source& grad_y,
                               float* partial, void* result, void* stream) {
  if (g.c_in && g.c_out)
    BY_TYPE(grad_weight, g, x, grad_y, partial, result, cudaStream_t(stream));
  return failure();
}

const char* launch_moments(int64_t pixels, int channels, const float* y, const Affine& affine,
                           float* partial, float* norm, void* stream) {
  if (!pixels || !channels) return nullptr;
  const int64_t parts =
      run_column_sums(pixels, channels, {}, y, nullptr, partial, cudaStream_t(stream));
  LAUNCH(norm_rows, dim3(channels), dim3(256), cudaStream_t(stream), parts, channels, partial,
         affine, norm);
  return failure();
}

const char* launch_finish(int64_t pixels, int channels, const float* y, const float* norm,
                          const float* r, const float* norm_r, float* out, void* stream) {
  if (!pixels || !channels) return nullptr;
  run_elementwise(pixels, channels, {y}, norm, r, norm_r, out, cudaStream_t(stream));
  return failure();
}

const char* launch_finish_backward(int64_t pixels, int channels, const Source& grad,
                                   const float* y, const float* norm, const float* gamma,
                                   float* partial, float* back, void* stream) {
  if (!pixels || !channels) return nullptr;
  const int64_t parts =
      run_column_sums(pixels, channels, grad, y, norm, partial, cudaStream_t(stream));
  LAUNCH(back_rows, dim3(channels), dim3(256), cudaStream_t(stream), parts, channels, partial,
         norm, gamma, back);
  return failure();
}

const char* launch_apply_backward(int64_t pixels, int channels, const Source& grad, float* grad_y,
                                  void* stream) {
  if (!pixels || !channels) return nullptr;
  run_elementwise(pixels, channels, grad, nullptr, nullptr, nullptr, grad_y, cudaStream_t(stream));
  return failure();
}

}  // namespace pool_conv
