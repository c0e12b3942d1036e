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
// With normalisation, ReLU and add fused, a block moves 21 tensors of its size in a training step,
// 7 forward and 14 backward; operator by operator it is 44 (block.py counts them). Nine blocks,
// counted as identity blocks, three of 16 channels at 32x32, of 32 at 16x16 and of 64 at 8x8, batch
// 128, float32: 3 * 21 * (8.4 + 4.2 + 2.1) MB = 925 MB, on an H100 276 us (operator by operator
// 1.9 GB, 578 us). Their arithmetic is 31 GFLOP: 465 us in float32, 32 us on bf16 tensor cores.
//
// Kernels, from simple to fast:
//   pool_plain, conv_plain   a thread an output element; the reference on the device
//   grad_input_plain         a thread an input element, gathering; used for stride 2
//   conv_tiled               a block: 8x8 outputs x KB channels; input tile (pooled, normalised,
//                            or a gradient taken back through a normalisation, while it is loaded)
//                            and weights in shared memory; a thread: 4 pixels x 4 channels
//                            in registers, each input value used for three taps, each weight for
//                            four pixels. The input's gradient is the same with rotated, transposed
//                            weights. The epilogue adds the shortcut's gradient, unpools or passes
//                            a ReLU back, and sums what the next normalisation needs.
//   grad_weight_partial      a block: all taps of 16 x 16 channels over a fixed share of the tiles;
//                            a thread: one c, four k, nine taps, a 3x3 window sliding along the row
//   grad_weight_sum          adds the shares in a fixed order: no atomics, bit-reproducible
//   elementwise, column_sums a block's end and its way back; a thread an element, or a share of the
//                            pixels of a channel
//   norm_rows, back_rows     a block a channel: joins the sums, in double, in a fixed order
#include "pool_conv.h"

#include <algorithm>

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
constexpr int SUMS = 4;    // rows of a part of sums: pixels, pivot, sum, sum of products

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

__device__ inline float normalised(float v, const float* norm, int c, int channels) {
  return (v - norm[CENTER * channels + c]) * norm[SCALE * channels + c] +
         norm[SHIFT * channels + c];
}
__device__ inline float relu(float v) { return v < 0 ? 0.0f : v; }  // a NaN passes

// Four channels (or `left`) of what `from` describes, from element `at` on, channel c of `channels`
template <typename T>
__device__ inline void fetch4(const Source& from, int64_t at, int c, int channels, int left,
                              bool aligned, float* to) {
  load4(static_cast<const T*>(from.x) + at, left, aligned, to);
  for (int q = 0; from.norm && q < 4 && q < left; q++)
    to[q] = relu(normalised(to[q], from.norm, c + q, channels));
  if (from.out) {
    float out[4];
    load4(static_cast<const T*>(from.out) + at, left, aligned, out);
    for (int q = 0; q < 4; q++) to[q] = out[q] <= 0 ? 0.0f : to[q];
  }
  if (from.back) {
    float y[4];
    load4(static_cast<const T*>(from.y) + at, left, aligned, y);
    for (int q = 0; q < 4 && q < left; q++) {
      const float* row = from.back + c + q;
      to[q] = to[q] * row[BY_G * channels] +
              ((y[q] - row[CENTER * channels]) * row[BY_Y * channels] + row[BY_1 * channels]);
    }
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

// grid: (tiles, c_out / KB); block: 16 * KB / 4 threads. POOL: x is pooled on the way, and the
// blocks of the first KB channels write `pooled` and `argmax`. FLIP: weight is (c_in,c_out,3,3),
// read transposed and rotated. With `unpool` (the forward's argmax), y is the pooling's input.
// `partial`, if not null: SUMS rows a tile, of y for its moments; or, where `before` describes
// relu(normalised x), y is the gradient behind that ReLU and the sums are of y and y (x - center).
template <typename T, int KB, int S, bool POOL, bool FLIP>
__global__ void __launch_bounds__(4 * KB) conv_tiled(
    Layer g, Source source, const T* __restrict__ weight, T* __restrict__ y,
    T* __restrict__ pooled, uint8_t* __restrict__ argmax, const uint8_t* __restrict__ unpool,
    Source extra, Source before, float* __restrict__ partial) {
  const T* const x = static_cast<const T*>(source.x);
  constexpr int IN = (TILE - 1) * S + 3, THREADS = 4 * KB;
  __shared__ float xs[IN][IN][CB];
  __shared__ float ws[CB][9][KB];
  __shared__ float sums[2][16][KB], pivot[KB];
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
        const int64_t from =
            ((int64_t(at.n) * g.height + from_row) * g.width + from_column) * g.c_in + c;
        fetch4<T>(source, from, c, g.c_in, g.c_in - c, aligned, to);
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
  const bool wide = g.c_out % 4 == 0;
  const int left = g.c_out - k0 - k;
  float first[4] = {}, second[4] = {};  // sums over this thread's pixels
  if (partial && !before.x) {
    if (pixel == 0)
      for (int q = 0; q < 4; q++) pivot[k + q] = to_float(from_float<T>(sum[0][q]));
    __syncthreads();
  }
#pragma unroll  // or sum[][] would not stay in registers
  for (int p = 0; p < 4; p++) {
    const int j = at.left + column + p;
    if (i >= g.y_height || j >= g.y_width || left <= 0) continue;
    const int64_t out = ((int64_t(at.n) * g.y_height + i) * g.y_width + j) * g.c_out + k0 + k;
    float more[4] = {}, active[4], value[4] = {};
    if (extra.x) fetch4<T>(extra, out, k0 + k, g.c_out, left, wide, more);
    if (before.x) {
      fetch4<T>(before, out, k0 + k, g.c_out, left, wide, active);
      load4(static_cast<const T*>(before.x) + out, left, wide, value);
    }
#pragma unroll
    for (int q = 0; q < 4; q++) {
      if (q >= left) continue;
      const T stored = from_float<T>(before.x && active[q] <= 0 ? 0.0f : sum[p][q] + more[q]);
      if (!unpool) y[out + q] = stored;
      for (int place = 0; unpool && place < 4; place++)
        y[((int64_t(at.n) * g.x_height + 2 * i + place / 2) * g.x_width + 2 * j + place % 2) *
              g.c_out + k0 + k + q] = unpool[out + q] == place ? stored : from_float<T>(0.0f);
      if (partial) {
        const float v = to_float(stored);
        const float d = before.x ? v : v - pivot[k + q];
        first[q] += d;
        second[q] += d * (before.x ? value[q] - before.norm[CENTER * g.c_out + k0 + k + q] : d);
      }
    }
  }
  if (!partial) return;
  for (int q = 0; q < 4; q++) sums[0][pixel][k + q] = first[q], sums[1][pixel][k + q] = second[q];
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= KB || k0 + c >= g.c_out) return;
  float* to = partial + int64_t(blockIdx.x) * SUMS * g.c_out + k0 + c;
  const int high = g.y_height - at.top, across = g.y_width - at.left;
  to[0] = (high < TILE ? high : TILE) * (across < TILE ? across : TILE);
  to[g.c_out] = before.x ? 0.0f : pivot[c];
  for (int which = 0; which < 2; which++) {
    float total = 0;
    for (int from = 0; from < 16; from++) total += sums[which][from][c];
    to[(2 + which) * g.c_out] = total;
  }
}

// grid: (PARTS, c_in / 16, c_out / 16); block: 64 threads. partial: (PARTS, c_out, c_in, 9)
template <typename T, int S>
__global__ void __launch_bounds__(64) grad_weight_partial(
    Layer g, Source x, Source grad_y, float* __restrict__ partial) {
  constexpr int IN = (TILE - 1) * S + 3;
  __shared__ float xs[IN][IN][16];
  __shared__ float gs[TILE][TILE][16];
  const int c0 = blockIdx.y * 16, k0 = blockIdx.z * 16;
  const int c = threadIdx.x / 4, k = threadIdx.x % 4 * 4;
  const int64_t tiles = tile_count(g.batch, g.y_height, g.y_width);
  float sum[9][4] = {};
  for (int64_t tile = tiles * blockIdx.x / PARTS; tile < tiles * (blockIdx.x + 1) / PARTS; tile++) {
    const Place at(g, tile);
    for (int item = threadIdx.x; item < IN * IN * 4; item += 64) {
      const int q = item % 4 * 4, j = item / 4 % IN, i = item / 4 / IN;
      const int row = at.top * S + i - 1, column = at.left * S + j - 1;
      const bool inside = row >= 0 && row < g.height && column >= 0 && column < g.width;
      const int64_t from = ((int64_t(at.n) * g.height + row) * g.width + column) * g.c_in + c0 + q;
      if (inside && c0 + q < g.c_in)
        fetch4<T>(x, from, c0 + q, g.c_in, g.c_in - c0 - q, g.c_in % 4 == 0, xs[i][j] + q);
      else
        for (int lane = 0; lane < 4; lane++) xs[i][j][q + lane] = 0.0f;
    }
    for (int item = threadIdx.x; item < TILE * TILE * 4; item += 64) {
      const int q = item % 4 * 4, j = item / 4 % TILE, i = item / 4 / TILE;
      const int row = at.top + i, column = at.left + j;
      const bool inside = row < g.y_height && column < g.y_width;
      const int64_t from =
          ((int64_t(at.n) * g.y_height + row) * g.y_width + column) * g.c_out + k0 + q;
      if (inside && k0 + q < g.c_out)
        fetch4<T>(grad_y, from, k0 + q, g.c_out, g.c_out - k0 - q, g.c_out % 4 == 0,
                  gs[i][j] + q);
      else
        for (int lane = 0; lane < 4; lane++) gs[i][j][q + lane] = 0.0f;
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

// to = relu(normalised y + r), where r may be normalised, too; or, without norm, to = `from`
template <typename T>
__global__ void elementwise(int64_t count, int channels, Source from, const float* norm, const T* r,
                            const float* norm_r, T* to) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const int c = at % channels;
  float value[4];  // one of them
  if (norm) {
    float v = normalised(to_float(static_cast<const T*>(from.x)[at]), norm, c, channels);
    if (r) v += norm_r ? normalised(to_float(r[at]), norm_r, c, channels) : to_float(r[at]);
    value[0] = relu(v);
  } else {
    fetch4<T>(from, at, c, channels, 1, false, value);
  }
  to[at] = from_float<T>(value[0]);
}

// grid: (parts, channels / 32); block: 32 channels x 8. SUMS rows a part, of y for its moments; or,
// with `grad`, of the gradient and its products with y - center
template <typename T>
__global__ void column_sums(int64_t pixels, int channels, Source grad, const T* y,
                            const float* norm, float* partial) {
  __shared__ float sums[2][8][32];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32, c = blockIdx.y * 32 + lane;
  const int64_t begin = pixels * blockIdx.x / gridDim.x;
  const int64_t end = pixels * (blockIdx.x + 1) / gridDim.x;
  float first = 0, second = 0, pivot = 0, value[4];
  if (c < channels && begin < end) {
    if (!grad.x) pivot = to_float(y[begin * channels + c]);
    for (int64_t p = begin + row; p < end; p += 8) {
      const float v = to_float(y[p * channels + c]);
      if (grad.x) fetch4<T>(grad, p * channels + c, c, channels, 1, false, value);
      const float d = grad.x ? value[0] : v - pivot;
      first += d;
      second += d * (grad.x ? v - norm[CENTER * channels + c] : d);
    }
  }
  sums[0][row][lane] = first, sums[1][row][lane] = second;
  __syncthreads();
  if (row || c >= channels) return;
  for (int from = 1; from < 8; from++)
    first += sums[0][from][lane], second += sums[1][from][lane];
  float* to = partial + int64_t(blockIdx.x) * SUMS * channels + c;
  to[0] = end - begin, to[channels] = pivot, to[2 * channels] = first, to[3 * channels] = second;
}

// A block a channel, 64 threads: moments of the parts, joined pair by pair
__global__ void norm_rows(int64_t parts, int channels, const float* partial, Affine affine,
                          float* norm) {
  __shared__ Moment found[64];
  const int t = threadIdx.x, c = blockIdx.x;
  found[t] = {0, 0, 0};
  for (int64_t part = t; part < parts; part += 64) {
    const float* row = partial + part * SUMS * channels + c;
    const double n = row[0], sum = row[2 * channels];
    if (n > 0) found[t].join({n, row[channels] + sum / n, row[3 * channels] - sum * sum / n});
  }
  for (int half = 32; half; half /= 2) {
    __syncthreads();
    if (t < half) found[t].join(found[t + half]);
  }
  if (!t) write_norm(found[0], affine, c, channels, norm);
}

__global__ void back_rows(int64_t parts, int channels, double pixels, const float* partial,
                          const float* norm, const float* gamma, float* back) {
  __shared__ double sums[64], products[64];
  const int t = threadIdx.x, c = blockIdx.x;
  sums[t] = products[t] = 0;
  for (int64_t part = t; part < parts; part += 64) {
    sums[t] += partial[(part * SUMS + 2) * channels + c];
    products[t] += partial[(part * SUMS + 3) * channels + c];
  }
  for (int half = 32; half; half /= 2) {
    __syncthreads();
    if (t < half) sums[t] += sums[t + half], products[t] += products[t + half];
  }
  if (!t) write_back(sums[0], products[0], pixels, norm, gamma, c, channels, back);
}

const char* failure() {  // of the launches so far, or null
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

unsigned blocks(int64_t threads) { return (threads + 255) / 256; }

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
void forward(const Layer& g, bool plain, const Source& x, const void* weight, void* y, void* pooled,
             uint8_t* argmax, const Affine& affine, float* partial, float* norm_y,
             cudaStream_t stream) {
  const bool pool = argmax != nullptr, wide = g.c_out > 16;
  if (plain) {
    const int64_t pixels = int64_t(g.batch) * g.height * g.width * g.c_in;
    if (pool)
      LAUNCH(pool_plain<T>, dim3(blocks(pixels)), dim3(256), stream, g, static_cast<const T*>(x.x),
             static_cast<T*>(pooled), argmax);
    LAUNCH(conv_plain<T>, dim3(blocks(int64_t(g.batch) * g.y_height * g.y_width * g.c_out)),
           dim3(256), stream, g, static_cast<const T*>(pool ? pooled : x.x),
           static_cast<const T*>(weight), static_cast<T*>(y));
    return;
  }
  const auto run = pool ? (wide ? tiled<T, 32, 1, true, false> : tiled<T, 16, 1, true, false>)
      : g.stride == 2 ? (wide ? tiled<T, 32, 2, false, false> : tiled<T, 16, 2, false, false>)
                      : (wide ? tiled<T, 32, 1, false, false> : tiled<T, 16, 1, false, false>);
  run(g, x, weight, y, pooled, argmax, nullptr, {}, {}, norm_y ? partial : nullptr, stream);
  if (norm_y)
    LAUNCH(norm_rows, dim3(g.c_out), dim3(64), stream, tile_count(g.batch, g.y_height, g.y_width),
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
    LAUNCH(back_rows, dim3(g.c_in), dim3(64), stream, tile_count(g.batch, g.height, g.width),
           g.c_in, double(g.batch) * g.height * g.width, partial, x.norm, gamma, back_x);
}

template <typename T>
void grad_weight(const Layer& g, const Source& x, const Source& grad_y, float* partial,
                 void* result, cudaStream_t stream) {
  const dim3 grid(PARTS, (g.c_in + 15) / 16, (g.c_out + 15) / 16);
  LAUNCH((g.stride == 2 ? grad_weight_partial<T, 2> : grad_weight_partial<T, 1>), grid, dim3(64),
         stream, g, x, grad_y, partial);
  const int64_t count = int64_t(g.c_out) * g.c_in * 9;
  LAUNCH(grad_weight_sum<T>, dim3(blocks(count)), dim3(256), stream, count,
         static_cast<const float*>(partial), static_cast<T*>(result));
}

template <typename T>
void run_elementwise(int64_t pixels, int channels, const Source& from, const float* norm,
                     const void* r, const float* norm_r, void* to, cudaStream_t stream) {
  LAUNCH(elementwise<T>, dim3(blocks(pixels * channels)), dim3(256), stream, pixels * channels,
         channels, from, norm, static_cast<const T*>(r), norm_r, static_cast<T*>(to));
}

constexpr int MOST_PARTS = PARTIAL_ROWS / SUMS;
template <typename T>
void run_column_sums(int64_t pixels, int channels, const Source& grad, const void* y,
                     const float* norm, float* partial, cudaStream_t stream) {
  LAUNCH(column_sums<T>, dim3(MOST_PARTS, (channels + 31) / 32), dim3(256), stream, pixels,
         channels, grad, static_cast<const T*>(y), norm, partial);
}

}  // namespace

int64_t forward_partial_floats(const Layer& g) {
  return SUMS * tile_count(g.batch, g.y_height, g.y_width) * g.c_out;
}

int64_t grad_input_partial_floats(const Layer& g) {
  return SUMS * tile_count(g.batch, g.height, g.width) * g.c_in;
}

int64_t grad_weight_partial_floats(const Layer& g) {
  return int64_t(PARTS) * g.c_out * g.c_in * 9;
}

#define BY_TYPE(function, ...)                                         \
  (type == FLOAT32 ? function<float> : type == FLOAT16 ? function<__half> \
                                                       : function<__nv_bfloat16>)(__VA_ARGS__)

const char* launch_forward(Type type, const Layer& g, bool plain, const Source& x,
                           const void* weight, void* y, void* pooled, uint8_t* argmax,
                           const Affine& affine, float* partial, float* norm_y, void* stream) {
  if (g.batch)
    BY_TYPE(forward, g, plain, x, weight, y, pooled, argmax, affine, partial, norm_y,
            cudaStream_t(stream));
  return failure();
}

const char* launch_grad_input(Type type, const Layer& g, const Source& grad_y, const void* weight,
                              const uint8_t* argmax, const Source& extra, void* grad_x,
                              const Source& x, const float* gamma, float* partial, float* back_x,
                              void* stream) {
  if (g.batch)
    BY_TYPE(grad_input, g, grad_y, weight, argmax, extra, grad_x, x, gamma, partial, back_x,
            cudaStream_t(stream));
  return failure();
}

const char* launch_grad_weight(Type type, const Layer& g, const Source& x, const Source& grad_y,
                               float* partial, void* result, void* stream) {
  BY_TYPE(grad_weight, g, x, grad_y, partial, result, cudaStream_t(stream));
  return failure();
}

const char* launch_moments(Type type, int64_t pixels, int channels, const void* y,
                           const Affine& affine, float* partial, float* norm, void* stream) {
  BY_TYPE(run_column_sums, pixels, channels, {}, y, nullptr, partial, cudaStream_t(stream));
  LAUNCH(norm_rows, dim3(channels), dim3(64), cudaStream_t(stream), int64_t(MOST_PARTS), channels,
         partial, affine, norm);
  return failure();
}

const char* launch_finish(Type type, int64_t pixels, int channels, const void* y, const float* norm,
                          const void* r, const float* norm_r, void* out, void* stream) {
  BY_TYPE(run_elementwise, pixels, channels, {y}, norm, r, norm_r, out, cudaStream_t(stream));
  return failure();
}

const char* launch_finish_backward(Type type, int64_t pixels, int channels, const Source& grad,
                                   const void* y, const float* norm, const float* gamma,
                                   float* partial, float* back, void* stream) {
  BY_TYPE(run_column_sums, pixels, channels, grad, y, norm, partial, cudaStream_t(stream));
  LAUNCH(back_rows, dim3(channels), dim3(64), cudaStream_t(stream), int64_t(MOST_PARTS), channels,
         double(pixels), partial, norm, gamma, back);
  return failure();
}

const char* launch_apply_backward(Type type, int64_t pixels, int channels, const Source& grad,
                                  void* grad_y, void* stream) {
  BY_TYPE(run_elementwise, pixels, channels, grad, nullptr, nullptr, nullptr, grad_y,
          cudaStream_t(stream));
  return failure();
}

}  // namespace pool_conv
