// 3x3 convolution (padding 1, NHWC) behind an optional 2x2 max-pool, on a GPU.
//
//   pooled[n,i,j,c] = max over the 2x2 pixels of x at (2i,2j)        (maxpool; otherwise x itself)
//   y[n,i,j,k]      = sum over a,b in 0..2, c of pooled[n, S i + a - 1, S j + b - 1, c] w[k,c,a,b]
//
// with S = 2 for "stride" and 1 otherwise. float32, float16 and bfloat16, all summed in float32.
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
// These floors are arithmetic. No kernel of this file has been timed on a GPU.
//
// Kernels, from simple to fast:
//   pool_plain, conv_plain   a thread an output element; the reference on the device
//   grad_input_plain         a thread an input element, gathering; used for stride 2
//   conv_tiled               a block: 8x8 outputs x KB channels; input tile (pooled while it is
//                            loaded) and weights in shared memory; a thread: 4 pixels x 4 channels
//                            in registers, each input value used for three taps, each weight for
//                            four pixels. The input's gradient is the same with rotated, transposed
//                            weights, and the unpooling is its epilogue.
//   grad_weight_partial      a block: all taps of 16 x 16 channels over a fixed share of the tiles;
//                            a thread: one c, four k, nine taps, a 3x3 window sliding along the row
//   grad_weight_sum          adds the shares in a fixed order: no atomics, bit-reproducible
#include "pool_conv.h"

#ifndef CUDA_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace pool_conv {
namespace {

constexpr int TILE = 8;   // outputs of a block, in both directions
constexpr int CB = 8;     // input channels in shared memory at a time
constexpr int PARTS = 64;  // shares of the weight's gradient that are summed apart

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline __half from_float<__half>(float v) { return __float2half(v); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16(v); }

// Four channels from p, one load where channels are a multiple of four; zeros from `left` on
template <typename T>
__device__ inline void load4(const T* p, int left, bool aligned, float* to) {
  if (aligned && left >= 4) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(p);
    for (int q = 0; q < 4; q++) to[q] = to_float(four.v[q]);
  } else {
    for (int q = 0; q < 4; q++) to[q] = q < left ? to_float(p[q]) : 0.0f;
  }
}

// torch's rule: the first of equals, a NaN always
__device__ inline void take(float value, int place, float& best, int& index) {
  if (value > best || value != value) {
    best = value;
    index = place;
  }
}

template <typename T>
__global__ void pool_plain(Layer g, const T* x, T* pooled, uint8_t* argmax) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= int64_t(g.batch) * g.height * g.width * g.c_in) return;
  const int c = at % g.c_in, j = at / g.c_in % g.width, i = at / g.c_in / g.width % g.height;
  const int64_t n = at / g.c_in / g.width / g.height;
  const T* corner = x + ((n * g.x_height + 2 * i) * g.x_width + 2 * j) * g.c_in + c;
  float best = to_float(corner[0]);
  int index = 0;
  for (int q = 1; q < 4; q++)
    take(to_float(corner[(int64_t(q / 2) * g.x_width + q % 2) * g.c_in]), q, best, index);
  pooled[at] = from_float<T>(best);
  argmax[at] = index;
}

template <typename T>
__global__ void conv_plain(Layer g, const T* x, const T* weight, T* y) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= int64_t(g.batch) * g.y_height * g.y_width * g.c_out) return;
  const int k = at % g.c_out, j = at / g.c_out % g.y_width;
  const int i = at / g.c_out / g.y_width % g.y_height;
  const int64_t n = at / g.c_out / g.y_width / g.y_height;
  float sum = 0;
  for (int a = 0; a < 3; a++)
    for (int b = 0; b < 3; b++) {
      const int row = g.stride * i + a - 1, column = g.stride * j + b - 1;
      if (row < 0 || row >= g.height || column < 0 || column >= g.width) continue;
      const T* pixel = x + ((n * g.height + row) * g.width + column) * g.c_in;
      for (int c = 0; c < g.c_in; c++)
        sum += to_float(pixel[c]) * to_float(weight[(int64_t(k) * g.c_in + c) * 9 + 3 * a + b]);
    }
  y[at] = from_float<T>(sum);
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
        sum += to_float(pixel[k]) * to_float(weight[(int64_t(k) * g.c_in + c) * 9 + 3 * a + b]);
    }
  grad_x[at] = from_float<T>(sum);
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

// grid: (tiles, c_out / KB); block: 16 * KB / 4 threads. POOL: x is pooled on the way, and the
// blocks of the first KB channels write `pooled` and `argmax`. FLIP: weight is (c_in,c_out,3,3),
// read transposed and rotated. With `unpool` (the forward's argmax), y is the pooling's input.
template <typename T, int KB, int S, bool POOL, bool FLIP>
__global__ void __launch_bounds__(4 * KB) conv_tiled(
    Layer g, const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y,
    T* __restrict__ pooled, uint8_t* __restrict__ argmax, const uint8_t* __restrict__ unpool,
    const T* __restrict__ extra) {
  constexpr int IN = (TILE - 1) * S + 3, THREADS = 4 * KB;
  __shared__ float xs[IN][IN][CB];
  __shared__ float ws[CB][9][KB];
  const Place at(g, blockIdx.x);
  const int k0 = blockIdx.y * KB, k = threadIdx.x % (KB / 4) * 4;
  const int pixel = threadIdx.x / (KB / 4), row = pixel / 2, column = pixel % 2 * 4;
  const bool aligned = g.c_in % 4 == 0;
  float sum[4][4] = {};  // [pixel][k]

  for (int c0 = 0; c0 < g.c_in; c0 += CB) {
    for (int item = threadIdx.x; item < IN * IN * CB / 4; item += THREADS) {
      const int c = c0 + item % (CB / 4) * 4, j = item / (CB / 4) % IN, i = item / (CB / 4) / IN;
      const int from_row = at.top * S + i - 1, from_column = at.left * S + j - 1;
      float* to = xs[i][j] + item % (CB / 4) * 4;
      const bool inside = from_row >= 0 && from_row < g.height && from_column >= 0 &&
                          from_column < g.width && c < g.c_in;
      if (!inside) {
        to[0] = to[1] = to[2] = to[3] = 0.0f;
      } else if (POOL) {
        const T* corner = x + ((int64_t(at.n) * g.x_height + 2 * from_row) * g.x_width +
                               2 * from_column) * g.c_in + c;
        float value[4];
        int index[4] = {};
        load4(corner, g.c_in - c, aligned, to);
        for (int q = 1; q < 4; q++) {
          load4(corner + (int64_t(q / 2) * g.x_width + q % 2) * g.c_in, g.c_in - c, aligned, value);
          for (int lane = 0; lane < 4; lane++) take(value[lane], q, to[lane], index[lane]);
        }
        const bool mine = i >= 1 && i <= TILE && j >= 1 && j <= TILE;  // not another tile's pixel
        if (blockIdx.y == 0 && mine)
          for (int lane = 0; lane < 4 && c + lane < g.c_in; lane++) {
            const int64_t out =
                ((int64_t(at.n) * g.height + from_row) * g.width + from_column) * g.c_in + c + lane;
            pooled[out] = from_float<T>(to[lane]);
            argmax[out] = index[lane];
          }
      } else {
        load4(x + ((int64_t(at.n) * g.height + from_row) * g.width + from_column) * g.c_in + c,
              g.c_in - c, aligned, to);
      }
    }
    for (int item = threadIdx.x; item < CB * 9 * KB; item += THREADS) {
      const int out = item % KB, tap = item / KB % 9, c = item / KB / 9;
      const bool inside = c0 + c < g.c_in && k0 + out < g.c_out;
      const int64_t from = FLIP ? (int64_t(c0 + c) * g.c_out + k0 + out) * 9 + 8 - tap
                                : (int64_t(k0 + out) * g.c_in + c0 + c) * 9 + tap;
      ws[c][tap][out] = inside ? to_float(weight[from]) : 0.0f;
    }
    __syncthreads();
    for (int c = 0; c < CB; c++)
      for (int a = 0; a < 3; a++) {
        float line[3 * S + 3];
        for (int j = 0; j < 3 * S + 3; j++) line[j] = xs[row * S + a][column * S + j][c];
        for (int b = 0; b < 3; b++) {
          const Four<float> w = *reinterpret_cast<const Four<float>*>(&ws[c][3 * a + b][k]);
          for (int p = 0; p < 4; p++)
            for (int q = 0; q < 4; q++) sum[p][q] += line[p * S + b] * w.v[q];
        }
      }
    __syncthreads();
  }

  const int i = at.top + row;
#pragma unroll  // or sum[][] would not stay in registers
  for (int p = 0; p < 4; p++) {
    const int j = at.left + column + p;
    const int64_t out = ((int64_t(at.n) * g.y_height + i) * g.y_width + j) * g.c_out + k0 + k;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      if (i < g.y_height && j < g.y_width && k0 + k + q < g.c_out) {
        const float value = sum[p][q] + (extra ? to_float(extra[out + q]) : 0.0f);
        if (!unpool) y[out + q] = from_float<T>(value);
        for (int place = 0; unpool && place < 4; place++)
          y[((int64_t(at.n) * g.x_height + 2 * i + place / 2) * g.x_width + 2 * j + place % 2) *
                g.c_out + k0 + k + q] = from_float<T>(unpool[out + q] == place ? value : 0.0f);
      }
    }
  }
}

// grid: (PARTS, c_in / 16, c_out / 16); block: 64 threads. partial: (PARTS, c_out, c_in, 9)
template <typename T, int S>
__global__ void __launch_bounds__(64) grad_weight_partial(
    Layer g, const T* __restrict__ x, const T* __restrict__ grad_y, float* __restrict__ partial) {
  constexpr int IN = (TILE - 1) * S + 3;
  __shared__ float xs[IN][IN][16];
  __shared__ float gs[TILE][TILE][16];
  const int c0 = blockIdx.y * 16, k0 = blockIdx.z * 16;
  const int c = threadIdx.x / 4, k = threadIdx.x % 4 * 4;
  const int64_t tiles = int64_t(g.batch) * ((g.y_height + TILE - 1) / TILE) *
                        ((g.y_width + TILE - 1) / TILE);
  float sum[9][4] = {};
  for (int64_t tile = tiles * blockIdx.x / PARTS; tile < tiles * (blockIdx.x + 1) / PARTS; tile++) {
    const Place at(g, tile);
    for (int item = threadIdx.x; item < IN * IN * 4; item += 64) {
      const int q = item % 4 * 4, j = item / 4 % IN, i = item / 4 / IN;
      const int row = at.top * S + i - 1, column = at.left * S + j - 1;
      const bool inside = row >= 0 && row < g.height && column >= 0 && column < g.width;
      const int64_t from = ((int64_t(at.n) * g.height + row) * g.width + column) * g.c_in + c0 + q;
      load4(x + (inside ? from : 0), inside ? g.c_in - c0 - q : 0, g.c_in % 4 == 0, xs[i][j] + q);
    }
    for (int item = threadIdx.x; item < TILE * TILE * 4; item += 64) {
      const int q = item % 4 * 4, j = item / 4 % TILE, i = item / 4 / TILE;
      const int row = at.top + i, column = at.left + j;
      const bool inside = row < g.y_height && column < g.y_width;
      const int64_t from =
          ((int64_t(at.n) * g.y_height + row) * g.y_width + column) * g.c_out + k0 + q;
      load4(grad_y + (inside ? from : 0), inside ? g.c_out - k0 - q : 0, g.c_out % 4 == 0,
            gs[i][j] + q);
    }
    __syncthreads();
    for (int i = 0; i < TILE; i++) {
      float window[3][3];  // [b][a]; column b of output column j is slot (S j + b) % 3
      for (int b = 0; b < 3 - S; b++)
        for (int a = 0; a < 3; a++) window[b][a] = xs[i * S + a][b][c];
#pragma unroll
      for (int j = 0; j < TILE; j++) {
        for (int b = 3 - S; b < 3; b++)
          for (int a = 0; a < 3; a++) window[(S * j + b) % 3][a] = xs[i * S + a][S * j + b][c];
        const Four<float> gradient = *reinterpret_cast<const Four<float>*>(&gs[i][j][k]);
        for (int a = 0; a < 3; a++)
          for (int b = 0; b < 3; b++)
            for (int q = 0; q < 4; q++)
              sum[3 * a + b][q] += window[(S * j + b) % 3][a] * gradient.v[q];
      }
    }
    __syncthreads();
  }
  for (int q = 0; q < 4; q++)
    if (c0 + c < g.c_in && k0 + k + q < g.c_out)
      for (int tap = 0; tap < 9; tap++)
        partial[((int64_t(blockIdx.x) * g.c_out + k0 + k + q) * g.c_in + c0 + c) * 9 + tap] =
            sum[tap][q];
}

template <typename T>
__global__ void grad_weight_sum(int64_t count, const float* partial, T* grad_weight) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  float sum = 0;
  for (int part = 0; part < PARTS; part++) sum += partial[part * count + at];
  grad_weight[at] = from_float<T>(sum);
}

const char* failure() {  // of the launches so far, or null
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

unsigned blocks(int64_t threads) { return (threads + 255) / 256; }

template <typename T, int KB, int S, bool POOL, bool FLIP>
void tiled(const Layer& g, const void* x, const void* weight, void* y, void* pooled,
           uint8_t* argmax, const uint8_t* unpool, const void* extra, cudaStream_t stream) {
  const int64_t tiles = int64_t(g.batch) * ((g.y_height + TILE - 1) / TILE) *
                        ((g.y_width + TILE - 1) / TILE);
  LAUNCH((conv_tiled<T, KB, S, POOL, FLIP>), dim3(tiles, (g.c_out + KB - 1) / KB), dim3(4 * KB),
         stream, g, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y),
         static_cast<T*>(pooled), argmax, unpool, static_cast<const T*>(extra));
}

template <typename T>
void forward(const Layer& g, bool plain, const void* x, const void* weight, void* y, void* pooled,
             uint8_t* argmax, cudaStream_t stream) {
  const bool pool = argmax != nullptr, wide = g.c_out > 16;
  if (plain) {
    const int64_t pixels = int64_t(g.batch) * g.height * g.width * g.c_in;
    if (pool)
      LAUNCH(pool_plain<T>, dim3(blocks(pixels)), dim3(256), stream, g, static_cast<const T*>(x),
             static_cast<T*>(pooled), argmax);
    LAUNCH(conv_plain<T>, dim3(blocks(int64_t(g.batch) * g.y_height * g.y_width * g.c_out)),
           dim3(256), stream, g, static_cast<const T*>(pool ? pooled : x),
           static_cast<const T*>(weight), static_cast<T*>(y));
    return;
  }
  const auto run = pool ? (wide ? tiled<T, 32, 1, true, false> : tiled<T, 16, 1, true, false>)
      : g.stride == 2 ? (wide ? tiled<T, 32, 2, false, false> : tiled<T, 16, 2, false, false>)
                      : (wide ? tiled<T, 32, 1, false, false> : tiled<T, 16, 1, false, false>);
  run(g, x, weight, y, pooled, argmax, nullptr, nullptr, stream);
}

template <typename T>
void grad_input(const Layer& g, const void* grad_y, const void* weight, const uint8_t* argmax,
                const void* extra, void* grad_x, cudaStream_t stream) {
  if (g.stride == 2) {
    LAUNCH(grad_input_plain<T>, dim3(blocks(int64_t(g.batch) * g.height * g.width * g.c_in)),
           dim3(256), stream, g, static_cast<const T*>(grad_y), static_cast<const T*>(weight),
           static_cast<T*>(grad_x));
    return;
  }
  Layer back = g;  // from grad_y to the gradient of the convolution's input
  back.c_in = g.c_out, back.c_out = g.c_in;
  (g.c_in > 16 ? tiled<T, 32, 1, false, true> : tiled<T, 16, 1, false, true>)(
      back, grad_y, weight, grad_x, nullptr, nullptr, argmax, extra, stream);
}

template <typename T>
void grad_weight(const Layer& g, const void* x, const void* grad_y, float* partial, void* result,
                 cudaStream_t stream) {
  const dim3 grid(PARTS, (g.c_in + 15) / 16, (g.c_out + 15) / 16);
  LAUNCH((g.stride == 2 ? grad_weight_partial<T, 2> : grad_weight_partial<T, 1>), grid, dim3(64),
         stream, g, static_cast<const T*>(x), static_cast<const T*>(grad_y), partial);
  const int64_t count = int64_t(g.c_out) * g.c_in * 9;
  LAUNCH(grad_weight_sum<T>, dim3(blocks(count)), dim3(256), stream, count,
         static_cast<const float*>(partial), static_cast<T*>(result));
}

}  // namespace

int64_t partial_floats(const Layer& g) { return int64_t(PARTS) * g.c_out * g.c_in * 9; }

#define BY_TYPE(function, ...)                                         \
  (type == FLOAT32 ? function<float> : type == FLOAT16 ? function<__half> \
                                                       : function<__nv_bfloat16>)(__VA_ARGS__)

const char* launch_forward(Type type, const Layer& g, bool plain, const void* x, const void* weight,
                           void* y, void* pooled, uint8_t* argmax, void* stream) {
  if (g.batch) BY_TYPE(forward, g, plain, x, weight, y, pooled, argmax, cudaStream_t(stream));
  return failure();
}

const char* launch_grad_input(Type type, const Layer& g, const void* grad_y, const void* weight,
                              const uint8_t* argmax, const void* extra, void* grad_x,
                              void* stream) {
  if (g.batch) BY_TYPE(grad_input, g, grad_y, weight, argmax, extra, grad_x, cudaStream_t(stream));
  return failure();
}

const char* launch_grad_weight(Type type, const Layer& g, const void* x, const void* grad_y,
                               float* partial, void* result, void* stream) {
  BY_TYPE(grad_weight, g, x, grad_y, partial, result, cudaStream_t(stream));
  return failure();
}

}  // namespace pool_conv
