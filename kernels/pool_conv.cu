// 3x3 convolution (padding 1, NHWC) behind an optional 2x2 max-pool, on a GPU of sm_80 or newer.
//
//   pooled[n,i,j,c] = max over the 2x2 pixels of x at (2i,2j)        (maxpool; otherwise x itself)
//   y[n,i,j,k]      = sum over a,b in 0..2, c of pooled[n, i + a - 1, j + b - 1, c] w[k,c,a,b]
//
// float32, float16 and bfloat16, all multiplied by tensor cores and summed in float32. Tensor cores
// know no float32, but TF32, which has 10 bits behind the point. Where torch allows its own
// convolutions to round to TF32, so do these. Elsewhere ("exact") a float32 is the sum of a TF32
// number and of what that lacks, and a product takes three: error about 1e-6.
//
// What a layer costs at least, batch 128, float32 (each gradient costs about the same again):
//   ResNet-20 layer   GFLOP     MB   microseconds on an H100: memory   TF32   exact
//   16->16 @ 32x32    0.60    16.8                              5.0    1.2    3.7
//   16->32 @ 16x16    0.30     6.3                              1.9    0.6    1.8
//   32->32 @ 16x16    0.60     8.4                              2.5    1.2    3.7
//   32->64 @  8x8     0.30     3.2                              0.9    0.6    1.8
//   64->64 @  8x8     0.60     4.3                              1.3    1.2    3.7
// GFLOP = 2*9*N*H*W*C*K; MB: x and y once, weights once; from 3.35 TB/s and 495 TFLOP/s, of which
// mma is said to reach 60 %. A max-pool of its own would read 4 and write 1 pooled input and read
// it again; here it reads 4 and writes 1 (which the shortcut needs anyway). In a training step an
// identity block moves 27 tensors of its size, operator by operator 44.
//
// What the kernels need, counted from the PTX by a model of an H100 (4 instructions a cycle and
// multiprocessor, 32 banks, the above), not measured; README.md has what an H100 took.
// Microseconds of the dearest of instructions, tensor cores, shared memory and memory, in a
// training step of a block, batch 128, float32, TF32 and exact:
//                                        16->16 @ 32x32   32->32 @ 16x16    64->64 @ 8x8
//   conv_tiled, first convolution           5.2,  7.4        3.1,  5.8        2.5,  5.2
//     second, of a normalised input         5.6,  8.1        3.4,  6.1        2.8,  5.5
//     gradient of the second               12.7, 12.7        6.4,  6.6        3.2,  5.9
//   grad_weight_partial, of the second     10.7, 10.7        7.8,  7.8        5.3,  5.3
//   column_sums, elementwise               15.0, 15.0        7.6,  7.6        3.8,  3.8
//   the block, both ways                   72.2, 76.9       47.4, 53.0       31.8, 42.2
//
// Kernels:
//   conv_tiled               a warp: a tile of 8x8 outputs x 16 channels; a block: four tiles x 16
//                            channels, or two x 32. 16 input channels at a time are in shared
//                            memory, and the weights for them: pooled, normalised, or a gradient
//                            taken back through a normalisation, while they are loaded. The
//                            input's gradient is the same with rotated, transposed weights. The
//                            epilogue adds the shortcut's gradient, unpools or passes a ReLU back,
//                            and sums what the next normalisation needs.
//   grad_weight_partial      a block: all taps of 16 x 16 or 32 x 32 channels over a fixed share of
//                            the tiles, of which there are as many as fill the GPU; a window of
//                            three rows and three shifts slides down the tile in registers
//   grad_weight_sum          adds the shares in a fixed order: no atomics, bit-reproducible
//   elementwise, column_sums a block's end and its way back; a thread: four channels of a pixel, or
//                            of a share of the pixels
//   norm_rows, back_rows     a block a channel: adds up the sums, in double, in a fixed order
#include "pool_conv.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#ifndef CUDA_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, cudaStream_t(stream)>>>(__VA_ARGS__)
#endif

namespace pool_conv {
namespace {

constexpr int TILE = 8;              // outputs of a tile, in both directions
constexpr int CB = 16;               // input channels in shared memory at a time
constexpr int THREADS = 128;         // of a block of the convolution's kernels: four warps
constexpr int GROUP = 9 * 16 * 16;   // weights whose gradient a warp sums
constexpr int BLOCKS = 2 * 132;      // that do so: two for each multiprocessor of an H100
constexpr int MOST_PARTS = 256;      // of a tensor's sums

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};
using Part = Four<float>;  // of a channel's sums: pixels, pivot, sum, sum of products

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

#ifndef CUDA_EMULATION
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define TENSOR_CORES(...)  // there are none that could do this, and __init__.py asks for sm_80
#else
#define TENSOR_CORES(...) asm volatile(__VA_ARGS__)
#endif

// The nearest TF32 number. What is not rounded mma cuts off, which doubles the error.
__device__ inline float to_tf32(float v) {
  uint32_t bits = 0;
  TENSOR_CORES("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}

// Four matrices of eight rows of 16 bytes in shared memory: lane 8 q + i has the address of row i
// of matrix q. v[q] receives bytes 4 t to 4 t + 3 of row g, where g = lane / 4 and t = lane % 4;
// TRANSPOSED, of 16-bit values: those of rows 2 t and 2 t + 1 in column g.
template <bool TRANSPOSED>
__device__ inline void load_matrices(const void* row, uint32_t (&v)[4]) {
  const uint32_t at = __cvta_generic_to_shared(row);
#define LOAD(transposed)                                                                  \
  TENSOR_CORES("ldmatrix.sync.aligned.m8n8.x4" transposed ".shared.b16 {%0,%1,%2,%3}, [%4];" \
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory")
  if constexpr (TRANSPOSED)
    LOAD(".trans");
  else
    LOAD("");
}

// d += a b, for 16 x K times K x 8 numbers, by one instruction of a warp. A register holds one
// float32 (TF32), K = 8, or two neighbours of 16 bits, K = 16. In units of registers:
//   a: (row g, column t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b: (row t, column g), (t + 4, g)
//   d: (row g, columns 2 t and 2 t + 1), (row g + 8, the same)
template <typename T>
__device__ inline void mma(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4]) {
#define MMA(k, type)                                                                     \
  TENSOR_CORES("mma.sync.aligned.m16n8k" k ".row.col.f32." type "." type ".f32"          \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                  \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, float>)
    MMA("8", "tf32");
  else if constexpr (std::is_same_v<T, __half>)
    MMA("16", "f16");
  else
    MMA("16", "bf16");
}
#endif

// What a warp multiplies. EXACT, of float32: TF32 numbers and what these lack, of which mma takes
// all but the last bit or two.
template <int N>
struct Operand {
  uint32_t v[N], rest[N];
};

template <bool EXACT>
__device__ inline void split(Operand<4>& of) {
  for (int q = 0; EXACT && q < 4; q++) {
    const float all = __uint_as_float(of.v[q]), most = to_tf32(all);
    of.v[q] = __float_as_uint(most);
    of.rest[q] = __float_as_uint(all - most);
  }
}

template <typename T, bool EXACT>
__device__ inline void multiply(const Operand<4>& a, const Operand<2>& b, float (&sum)[4]) {
  if constexpr (EXACT) {  // the product of the rests is too small to matter
    mma<T>(a.rest, b.v, sum);
    mma<T>(a.v, b.rest, sum);
  }
  mma<T>(a.v, b.v, sum);
}

// What of v goes into shared memory, before it becomes a T
template <typename T, bool EXACT>
__device__ inline float narrow(float v) {
  return std::is_same_v<T, float> && !EXACT ? to_tf32(v) : v;
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

// Sums of four channels from c on, as number `part` of the `parts` of each
__device__ inline void write_parts(float* partial, int64_t parts, int64_t part, int c, int left,
                                   float pixels, const Four<float>& pivot,
                                   const float (&sums)[8]) {
  for (int q = 0; q < 4; q++)
    if (q < left)
      reinterpret_cast<Part*>(partial)[(c + q) * parts + part] = {pixels, pivot.v[q], sums[q],
                                                                  sums[4 + q]};
}

// torch's rule: the first of equals, a NaN always
__device__ inline void take(float value, int place, float& best, float& index) {
  if (value > best || value != value) {
    best = value;
    index = place;
  }
}

__host__ __device__ inline int tile_count(const Shape& g) {
  return g.batch * ((g.height + TILE - 1) / TILE) * ((g.width + TILE - 1) / TILE);
}

// Where a tile lies, which `tile` counts through the images. One behind the last lies where no
// image has a pixel.
struct Place {
  int n, top, left;
  __device__ Place(const Shape& g, unsigned tile) {
    const unsigned down = (int(g.height) + TILE - 1) / TILE;
    const unsigned across = (int(g.width) + TILE - 1) / TILE;
    n = tile / (down * across);
    top = tile / across % down * TILE;
    left = tile % across * TILE;
    if (n >= g.batch) n = 0, top = 1 << 30;
  }
};

// SIDE x SIDE pixels of CHANNELS channels in shared memory. Such PADs let a warp's loads meet every
// bank equally often.
template <typename T, int SIDE, int CHANNELS, int PAD>
struct alignas(16) Pixels {
  T v[SIDE][SIDE][CHANNELS + PAD];
};

// Fills `to` with what `from` describes: channels from c0 on of the pixels of a tile and, if SIDE
// is larger, around it, zeros outside of the image. A thread whose pixel is outside loads the
// image's first one.
template <bool EXACT, typename T, int SIDE, int CHANNELS, int PAD>
__device__ inline void stage(const Source& from, const Place& tile, int height, int width,
                             int channels, int c0, Pixels<T, SIDE, CHANNELS, PAD>& to) {
  const int top = tile.top - (SIDE - TILE) / 2, left = tile.left - (SIDE - TILE) / 2;
  constexpr int QUADS = CHANNELS / 4, ROWS = THREADS / QUADS / SIDE;  // at a time
  constexpr int ROUNDS = (SIDE + ROWS - 1) / ROWS, COUNT = ROUNDS < 5 ? ROUNDS : 5;
  const int lane = threadIdx.x % QUADS * 4, c = c0 + lane, j = threadIdx.x / QUADS % SIDE;
  const bool within = unsigned(left + j) < unsigned(width) && c < channels;
  const int64_t image = int64_t(tile.n) * height * width * channels;
  if (threadIdx.x / QUADS >= ROWS * SIDE) return;
#pragma unroll 1
  for (int first = threadIdx.x / QUADS / SIDE; first < SIDE; first += COUNT * ROWS) {
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
      for (int q = 0; q < 4; q++)
        value[r].v[q] = inside[r] ? narrow<T, EXACT>(value[r].v[q]) : 0.0f;
      if (i < SIDE) store4(&to.v[i][j][lane], value[r], 4, true);
    }
  }
}

// Likewise the max-pool of x around the tile `at`; what lies in the tile itself goes to `pooled`
// and `argmax`, if not null.
template <bool EXACT, typename T, int SIDE, int CHANNELS, int PAD>
__device__ inline void stage_pooled(const Shape& g, const T* x, const Place& at, int c0, T* pooled,
                                    uint8_t* argmax, Pixels<T, SIDE, CHANNELS, PAD>& to) {
  constexpr int QUADS = CHANNELS / 4;
  const int height = g.height, width = g.width, channels = g.c_in, x_width = g.x_width;
  const int lane = threadIdx.x % QUADS * 4, c = c0 + lane, left = channels - c;
  const bool wide = channels % 4 == 0;
  for (int pixel = threadIdx.x / QUADS; pixel < SIDE * SIDE; pixel += THREADS / QUADS) {
    const int i = pixel / SIDE, j = pixel % SIDE, row = at.top + i - 1, column = at.left + j - 1;
    Four<float> best = {}, index = {}, value[4];
    if (unsigned(row) < unsigned(height) && unsigned(column) < unsigned(width) && left > 0) {
      const T* corner = x + ((at.n * g.x_height + 2 * row) * x_width + 2 * column) * channels + c;
      const int places[4] = {0, channels, x_width * channels, (x_width + 1) * channels};
      load4(corner, places, left, wide, value);
      best = value[0];
      for (int q = 1; q < 4; q++)
        for (int u = 0; u < 4; u++) take(value[q].v[u], q, best.v[u], index.v[u]);
      if (pooled && i >= 1 && i <= TILE && j >= 1 && j <= TILE) {
        const int64_t out = ((at.n * g.height + row) * width + column) * channels + c;
        store4(pooled + out, best, left, wide);
        store4(argmax + out, index, left, wide);
      }
    }
    for (int q = 0; q < 4; q++) best.v[q] = narrow<T, EXACT>(best.v[q]);
    store4(&to.v[i][j][lane], best, 4, true);
  }
}

// What a tile is made of, and the weights from CB to KB channels
template <typename T>
using Input = Pixels<T, TILE + 2, CB, 16 / int(sizeof(T))>;
template <typename T, int KB>
struct alignas(16) Weights {
  T v[9][KB][CB + 16 / sizeof(T)];
};

// Fills `to` with the weights from channels c0 and k0 on, zeros where there are none. A thread has
// four c of a k; with FLIP, which transposes and rotates, four k of a c.
template <bool EXACT, bool FLIP, typename T, int KB>
__device__ inline void stage_weights(const Shape& g, const T* __restrict__ weight, int c0, int k0,
                                     Weights<T, KB>& to) {
  constexpr int OF_TAP = KB * CB / 4, TAPS = THREADS / OF_TAP;  // of threads; at a time
  constexpr int ROUNDS = (9 + TAPS - 1) / TAPS;
  const int rows = FLIP ? g.c_in : g.c_out, columns = FLIP ? g.c_out : g.c_in;
  const int first = threadIdx.x / OF_TAP, quad = threadIdx.x % OF_TAP;
  const int c = FLIP ? quad % CB : quad % (CB / 4) * 4;
  const int k = FLIP ? quad / CB * 4 : quad / (CB / 4);
  const int row = FLIP ? c0 + c : k0 + k, column = FLIP ? k0 + k : c0 + c;
  const bool inside = row < rows && column < columns;
  int at[ROUNDS];
  Four<float> value[ROUNDS];
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int tap = first + r * TAPS < 9 ? first + r * TAPS : 8;
    at[r] = (FLIP ? 8 - tap : tap) * columns;
  }
  load4(weight + (inside ? int64_t(row) * 9 * columns + column : 0), at,
        inside ? columns - column : 0, inside && columns % 4 == 0, value);
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int tap = first + r * TAPS;
    if (tap >= 9) continue;
    for (int q = 0; q < 4; q++) value[r].v[q] = narrow<T, EXACT>(value[r].v[q]);
    if (!FLIP) store4(&to.v[tap][k][c], value[r], 4, true);
    for (int q = 0; FLIP && q < 4; q++) to.v[tap][k + q][c] = from_float<T>(value[r].v[q]);
  }
}

// sum[n][m] += what mma leaves of the staged channels' convolution, for rows 2 m and 2 m + 1 of the
// tile, whose pixels are mma's rows, and eight channels from k + 8 n on. A `step` takes 32 bytes of
// the channels; the registers of an input row serve three taps.
template <typename T, bool EXACT, int KB>
__device__ inline void convolve(const Input<T>& xs, const Weights<T, KB>& ws, int k,
                                float (&sum)[2][4][4]) {
  constexpr int MATRIX = 16 / sizeof(T);  // channels
  const int lane = threadIdx.x % 32, q = lane / 8;
#pragma unroll 1
  for (int step = 0; step < CB / (2 * MATRIX); step++)
#pragma unroll
    for (int b = 0; b < 3; b++) {
      Operand<4> lines[TILE / 2 + 1];  // two rows each: the first half of the channels, the second
#pragma unroll
      for (int r = 0; r <= TILE / 2; r++) {
        load_matrices<false>(&xs.v[2 * r + q % 2][lane % 8 + b][(2 * step + q / 2) * MATRIX],
                             lines[r].v);
        split<EXACT>(lines[r]);
      }
#pragma unroll
      for (int a = 0; a < 3; a++) {
        Operand<4> w;
        load_matrices<false>(
            &ws.v[3 * a + b][k + q / 2 * 8 + lane % 8][(2 * step + q % 2) * MATRIX], w.v);
        split<EXACT>(w);
#pragma unroll
        for (int m = 0; m < TILE / 2; m++)
#pragma unroll
          for (int n = 0; n < 2; n++) {
            const int odd = a % 2;  // then a row of one pair and one of the next
            const Operand<4>&up = lines[m + a / 2], &down = lines[m + (a + 1) / 2];
            multiply<T, EXACT>(
                {{up.v[odd], down.v[1 - odd], up.v[2 + odd], down.v[3 - odd]},
                 {up.rest[odd], down.rest[1 - odd], up.rest[2 + odd], down.rest[3 - odd]}},
                {{w.v[2 * n], w.v[2 * n + 1]}, {w.rest[2 * n], w.rest[2 * n + 1]}}, sum[n][m]);
          }
      }
    }
}

// grid: (tiles / TILES, c_out / KB); a warp: a tile and 16 channels. POOL: x is pooled on the way,
// and the blocks of the first KB channels write `pooled` and `argmax`. FLIP: weight is
// (c_in,3,3,c_out), read transposed and rotated. With `unpool` (the forward's argmax), y is the
// pooling's input. `partial`, if not null: a Part a channel and tile, of y for its moments; or,
// where `before` describes relu(normalised x), y is the gradient behind that ReLU and the sums are
// of y and y (x - center).
template <typename T, bool EXACT, int KB, bool POOL, bool FLIP>
__global__ void __launch_bounds__(THREADS, EXACT ? 3 : 4) conv_tiled(
    Shape g, Source source, const T* __restrict__ weight, T* __restrict__ y,
    T* __restrict__ pooled, uint8_t* __restrict__ argmax, const uint8_t* __restrict__ unpool,
    Source extra, Source before, float* __restrict__ partial) {
  constexpr int TILES = 64 / KB;
  __shared__ struct {
    Input<T> xs[TILES];
    Weights<T, KB> ws;
  } staged;
  const int height = g.height, width = g.width, c_in = g.c_in, c_out = g.c_out;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int k0 = blockIdx.y * KB, k = warp / TILES * 16;
  float sum[2][4][4] = {};

  for (int c0 = 0; c0 < c_in; c0 += CB) {
#pragma unroll 1
    for (int t = 0; t < TILES; t++) {
      const Place at(g, blockIdx.x * TILES + t);
      if (POOL)
        stage_pooled<EXACT>(g, static_cast<const T*>(source.x), at, c0,
                            blockIdx.y ? nullptr : pooled, argmax, staged.xs[t]);
      else
        stage<EXACT>(source, at, height, width, c_in, c0, staged.xs[t]);
    }
    stage_weights<EXACT, FLIP>(g, weight, c0, k0, staged.ws);
    __syncthreads();
    // mma cuts bits off when it adds: long sums are made of short ones
    float part[2][4][4] = {};
    convolve<T, EXACT>(staged.xs[warp % TILES], staged.ws, k, EXACT ? part : sum);
    for (int e = 0; EXACT && e < 32; e++)
      sum[e / 16][e / 4 % 4][e % 4] += part[e / 16][e / 4 % 4][e % 4];
    __syncthreads();
  }

  const unsigned tile = blockIdx.x * TILES + warp % TILES;
  const Place at(g, tile);
  const int odd = lane % 2, column = at.left + lane / 4;
  const int64_t image = int64_t(at.n) * height * width * c_out;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    // Of two rows' two channels each, neighbouring lanes make one row's four
    const int c = k0 + k + 8 * n + lane % 4 / 2 * 4, left = c_out - c, some = left > 0 ? c : 0;
    const bool wide = c_out % 4 == 0;
    Four<float> value[4], other[4], center = {};
    int out[4];  // of this thread's pixels, in the image; the first one's for those outside
    bool inside[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
      const float(&d)[4] = sum[n][m];
      const float first = __shfl_xor_sync(~0u, odd ? d[0] : d[2], 1);
      const float second = __shfl_xor_sync(~0u, odd ? d[1] : d[3], 1);
      value[m] = odd ? Four<float>{first, second, d[2], d[3]}
                     : Four<float>{d[0], d[1], first, second};
      const int row = at.top + 2 * m + odd;
      inside[m] = row < height && column < width && left > 0;
      out[m] = inside[m] ? (row * width + column) * c_out + c : 0;
    }
    if (extra.x) {
      fetch4<T>(extra, image, out, some, c_out, wide, other);
      for (int m = 0; m < 4; m++)
        for (int q = 0; q < 4; q++) value[m].v[q] += other[m].v[q];
    }
    if (before.x) {
      const Scaling norm(before.norm, SCALE, SHIFT, some, c_out, wide);
      center = norm.center;
      load4(static_cast<const T*>(before.x) + image, out, left, wide, other);
      for (int m = 0; m < 4; m++)
        for (int q = 0; q < 4; q++)
          value[m].v[q] = norm(other[m].v[q], q) <= 0 ? 0.0f : value[m].v[q];
    }
#pragma unroll
    for (int m = 0; m < 4; m++) {
      for (int q = 0; q < 4; q++)  // as stored
        value[m].v[q] = to_float(from_float<T>(value[m].v[q]));
      if (!inside[m]) continue;
      if (!unpool) {
        store4(y + image + out[m], value[m], left, wide);
        continue;
      }
      const Four<float> place = load4(unpool + image + out[m], left, wide);
#pragma unroll
      for (int q = 0; q < 4; q++) {
        Four<float> here;
        for (int u = 0; u < 4; u++) here.v[u] = place.v[u] == q ? value[m].v[u] : 0.0f;
        const int64_t line = at.n * g.x_height + 2 * (at.top + 2 * m + odd) + q / 2;
        store4(y + (line * g.x_width + 2 * column + q % 2) * c_out + c, here, left, wide);
      }
    }
    if (!partial) continue;

    // Sums about the first pixel's y
    Four<float> pivot = {};
    float mine[8] = {};  // of four channels, then of their products
#pragma unroll
    for (int q = 0; q < 4; q++) {
      if (!before.x) pivot.v[q] = __shfl_sync(~0u, value[0].v[q], lane & 2);
      for (int m = 0; m < 4; m++) {
        const float d = inside[m] ? value[m].v[q] - pivot.v[q] : 0.0f;
        mine[q] += d;
        mine[4 + q] += d * (before.x ? other[m].v[q] - center.v[q] : d);
      }
      for (int of = q; of < 8; of += 4)  // all lanes of the same channels
        for (int by : {1, 4, 8, 16}) mine[of] += __shfl_xor_sync(~0u, mine[of], by);
    }
    const int tiles = tile_count(g), high = height - at.top, across = width - at.left;
    const int pixels = (high < TILE ? high : TILE) * (across < TILE ? across : TILE);
    if ((lane & ~2) == 0 && tile < tiles)
      write_parts(partial, tiles, tile, c, left, pixels, pivot, mine);
  }
}

// What mma makes of 8 neighbouring pixels of a row, of half types in each of two rows, and 16
// channels, from `first` on: as a, whose rows are channels, or as b for two times eight channels.
template <bool EXACT, bool AS_A, typename T, int SIDE, int CHANNELS, int PAD>
__device__ inline void load_pixels(const Pixels<T, SIDE, CHANNELS, PAD>& from, int row, int column,
                                   int c, Operand<4>& to) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const int q = lane / 8, down = AS_A ? q / 2 : q % 2, right = AS_A ? q % 2 : q / 2;
    load_matrices<true>(&from.v[row + down][column + lane % 8][c + 8 * right], to.v);
  } else {
    for (int q = 0; q < 4; q++) {
      const int pixel = lane % 4 + 4 * (AS_A ? q / 2 : q % 2);
      const int right = lane / 4 + 8 * (AS_A ? q % 2 : q / 2);
      to.v[q] = __float_as_uint(from.v[row][column + pixel][c + right]);
    }
    split<EXACT>(to);
  }
}

// grid: (shares, c_in / (16 Q), c_out / (16 Q)). A warp: nine taps of 16 c x 16 k, for Q = 2 a
// quadrant of 32 x 32, for Q = 1 of half a tile. A block: `share` tiles. partial: (shares,
// c_in / 16, c_out / 16, 9 taps, 16 c, 16 k)
template <typename T, bool EXACT, int Q>
__global__ void __launch_bounds__(THREADS, 2) grad_weight_partial(
    Shape g, Source x, Source grad_y, int share, float* __restrict__ partial) {
  constexpr int TILES = Q == 1 ? 2 : 1, ROWS = Q == 1 ? TILE / 2 : TILE;
  constexpr int LINES = 4 / sizeof(T);  // rows of the image in an mma
  __shared__ union {
    struct {
      Pixels<T, TILE + 2, 16 * Q, 8> xs[TILES];
      Pixels<T, TILE, 16 * Q, 8> gs[TILES];
    } staged;
    float found[Q == 1 ? 2 * GROUP : 1];
  } shared;
  const int height = g.height, width = g.width, c_in = g.c_in, c_out = g.c_out;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int top = Q == 1 ? warp % 2 * ROWS : 0;
  const int c = Q == 1 ? 0 : warp / 2 * 16, k = Q == 1 ? 0 : warp % 2 * 16;
  const auto& xs = shared.staged.xs[Q == 1 ? warp / 2 : 0];
  const auto& gs = shared.staged.gs[Q == 1 ? warp / 2 : 0];
  const int64_t group = (int64_t(blockIdx.x) * gridDim.y * Q + blockIdx.y * Q + c / 16) *
                        gridDim.z * Q + blockIdx.z * Q + k / 16;
  float* to = partial + group * GROUP;
  const int tiles = tile_count(g), begin = blockIdx.x * share;
  const int end = tiles - begin < share ? tiles : begin + share;
  // mma cuts bits off when it adds: long sums are made of short ones
  const int at_once = EXACT ? 8 / Q : share;
  for (int first = begin; first < end; first += at_once) {
    float sum[9][2][4] = {};
    for (int tile = first; tile < end && tile < first + at_once; tile += TILES) {
#pragma unroll 1
      for (int t = 0; t < TILES; t++) {
        const Place at(g, tile + t < end ? tile + t : tiles);
        stage<EXACT>(x, at, height, width, c_in, blockIdx.y * 16 * Q, shared.staged.xs[t]);
        stage<EXACT>(grad_y, at, height, width, c_out, blockIdx.z * 16 * Q, shared.staged.gs[t]);
      }
      __syncthreads();
      Operand<4> window[3][TILE + 2];  // by shift; LINES rows each
#pragma unroll
      for (int b = 0; b < 3; b++)
        for (int line = 0; line < 2; line += LINES)
          load_pixels<EXACT, true>(xs, top + line, b, c, window[b][line / LINES]);
#pragma unroll
      for (int row = 0; row < ROWS; row += LINES) {
        Operand<4> gradient;
        load_pixels<EXACT, false>(gs, top + row, 0, k, gradient);
#pragma unroll
        for (int b = 0; b < 3; b++)
          load_pixels<EXACT, true>(xs, top + row + 2, b, c, window[b][(row + 2) / LINES]);
#pragma unroll
        for (int tap = 0; tap < 9; tap++) {
          Operand<4> pixels;
          for (int q = 0; q < 4; q++) {
            const int at = (row + tap / 3) * 4 / LINES + q;
            pixels.v[q] = window[tap % 3][at / 4].v[at % 4];
            pixels.rest[q] = window[tap % 3][at / 4].rest[at % 4];
          }
#pragma unroll
          for (int n = 0; n < 2; n++)
            multiply<T, EXACT>(pixels,
                               {{gradient.v[2 * n], gradient.v[2 * n + 1]},
                                {gradient.rest[2 * n], gradient.rest[2 * n + 1]}}, sum[tap][n]);
        }
      }
      __syncthreads();
    }
    // Q = 1: the four warps' sums, in a fixed order
    for (int half = 2; Q == 1 && half; half /= 2) {
#pragma unroll
      for (int e = 0; e < 72 && warp / half == 1; e++)
        shared.found[((warp - half) * 72 + e) * 32 + lane] = sum[e / 8][e / 4 % 2][e % 4];
      __syncthreads();
#pragma unroll
      for (int e = 0; e < 72 && warp < half; e++)
        sum[e / 8][e / 4 % 2][e % 4] += shared.found[(warp * 72 + e) * 32 + lane];
      __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < 72 && (Q == 2 || warp == 0); e += 2) {
      const int row = lane / 4 + e % 4 / 2 * 8, column = e / 4 % 2 * 8 + lane % 4 * 2;
      float* const at = to + (e / 8 * 16 + row) * 16 + column;
      const float* of = &sum[e / 8][e / 4 % 2][e % 4];
      for (int q = 0; q < 2; q++) at[q] = first == begin ? of[q] : at[q] + of[q];
    }
  }
}

// grid: (GROUP / 32, groups of c_in, of c_out); block: 32 weights x 8 rows of shares. nhwc: whether
// grad_weight is (c_out,3,3,c_in), or (c_out,c_in,3,3)
template <typename T>
__global__ void grad_weight_sum(Shape g, int shares, const float* partial, bool nhwc,
                                T* grad_weight) {
  __shared__ float found[256];
  const int row = threadIdx.x / 32, at = blockIdx.x * 32 + threadIdx.x % 32;
  const int64_t group = int64_t(blockIdx.y) * gridDim.z + blockIdx.z;
  const int64_t groups = int64_t(gridDim.y) * gridDim.z;
  float sum[1] = {};
#pragma unroll 8
  for (int share = row; share < shares; share += 8)
    sum[0] += partial[(share * groups + group) * GROUP + at];
  sum_rows(sum, found, 8, 32);
  const int k = blockIdx.z * 16 + at % 16, c = blockIdx.y * 16 + at / 16 % 16, tap = at / 256;
  if (row == 0 && k < g.c_out && c < g.c_in)
    grad_weight[k * g.c_in * 9 + (nhwc ? tap * g.c_in + c : c * 9 + tap)] = from_float<T>(sum[0]);
}

// Shares pixels among blocks of 256 threads: a thread takes four channels, `quads` of them (of all,
// or as many as a block has) one pixel, a block `rows` pixels at a time.
struct Quads {
  int quads, rows;
  __host__ __device__ explicit Quads(int channels)
      : quads(channels > 1024 ? 256 : (channels + 3) / 4), rows(256 / quads) {}
};

// to = relu(normalised y + r), where r may be normalised, too; or, without norm, to = `from`
template <typename T>
__global__ void elementwise(int64_t pixels, int channels, Source from, const float* norm,
                            const T* __restrict__ r, const float* norm_r, T* __restrict__ to) {
  const Quads by(channels);
  const int row = threadIdx.x / by.quads;
  const int c = (blockIdx.y * by.quads + threadIdx.x % by.quads) * 4, left = channels - c;
  const int64_t pixel = int64_t(blockIdx.x) * by.rows + row, at = pixel * channels + c;
  const bool wide = channels % 4 == 0;
  if (row >= by.rows || pixel >= pixels || left <= 0) return;
  Four<float> value[1];
  fetch4<T>(from, at, {0}, c, channels, wide, value);
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
template <typename T>
__global__ void column_sums(int64_t pixels, int64_t share, int channels, Source grad, const T* y,
                            const float* norm, float* partial) {
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
    if (grad.x) fetch4<T>(grad, p * channels + c, {0}, c, channels, wide, value);
    for (int q = 0; q < 4; q++) {
      const float d = value[0].v[q] - pivot.v[q];
      mine[q] += d;
      mine[4 + q] += d * (grad.x ? v.v[q] - center.v[q] : d);
    }
  }
  sum_rows(mine, found, by.rows, by.quads);
  if (row == 0) write_parts(partial, gridDim.x, blockIdx.x, c, left, end - begin, pivot, mine);
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

// Of grad_weight_partial: quadrants of a block, in both directions; its blocks for all weights
int quadrants(const Shape& g) { return g.c_in > 16 && g.c_out > 16 ? 2 : 1; }
dim3 weight_blocks(const Shape& g, int64_t shares) {
  const int64_t by = 16 * quadrants(g);
  return dim3(shares, (g.c_in + by - 1) / by, (g.c_out + by - 1) / by);
}
// So many that there are BLOCKS blocks, or one for each group of weights if these are more: what
// they leave in memory is 10 MB at most, or as large as the weights.
int64_t tiles_a_share(const Shape& g) {
  const dim3 blocks = weight_blocks(g, 1);
  const int64_t shares = std::max(1u, BLOCKS / (blocks.y * blocks.z));
  const int64_t share = (tile_count(g) + shares - 1) / shares;
  return quadrants(g) == 1 ? share + share % 2 : share;  // a block takes two at once
}
int64_t shares(const Shape& g) {
  const int64_t share = tiles_a_share(g);
  return share ? (tile_count(g) + share - 1) / share : 0;
}

// function(what the kernels are made for)
template <typename Element, bool IS_EXACT>
struct Kind {
  using T = Element;
  static constexpr bool EXACT = IS_EXACT;
};
template <typename F>
const char* by_type(Type type, F function) {
  if (type == FLOAT32)
    function(Kind<float, true>{});
  else if (type == TF32)
    function(Kind<float, false>{});
  else if (type == FLOAT16)
    function(Kind<__half, false>{});
  else
    function(Kind<__nv_bfloat16, false>{});
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <bool POOL, bool FLIP>
const char* convolution(const Launch& on, const Shape& g, const Source& x, const void* weight,
                        void* y, void* pooled, uint8_t* argmax, const uint8_t* unpool,
                        const Source& extra, const Source& before, float* partial) {
  return by_type(on.type, [&](auto kind) {
    using T = typename decltype(kind)::T;
    constexpr bool EXACT = decltype(kind)::EXACT;
    const unsigned kb = g.c_out > 16 ? 32 : 16, tiles = 64 / kb;
    const auto kernel =
        kb == 32 ? conv_tiled<T, EXACT, 32, POOL, FLIP> : conv_tiled<T, EXACT, 16, POOL, FLIP>;
    LAUNCH(kernel, dim3((tile_count(g) + tiles - 1) / tiles, (g.c_out + kb - 1) / kb),
           dim3(THREADS), on.stream, g, x, static_cast<const T*>(weight), static_cast<T*>(y),
           static_cast<T*>(pooled), argmax, unpool, extra, before, partial);
  });
}

const char* run_elementwise(const Launch& on, int64_t pixels, int channels, const Source& from,
                            const float* norm, const void* r, const float* norm_r, void* to) {
  if (!pixels) return nullptr;
  const Quads by(channels);
  return by_type(on.type, [&](auto kind) {
    using T = typename decltype(kind)::T;
    LAUNCH(elementwise<T>, dim3((pixels + by.rows - 1) / by.rows, (channels + 1023) / 1024),
           dim3(256), on.stream, pixels, channels, from, norm, static_cast<const T*>(r), norm_r,
           static_cast<T*>(to));
  });
}

// finish(parts, their memory) turns what column_sums leaves into rows
template <typename F>
const char* run_column_sums(const Launch& on, int64_t pixels, int channels, const Source& grad,
                            const void* y, const float* norm, F finish) {
  if (!pixels) return nullptr;
  const int64_t share = (pixels + MOST_PARTS - 1) / MOST_PARTS;
  const int64_t parts = (pixels + share - 1) / share;
  float* partial = on.scratch(4 * parts * channels);
  return by_type(on.type, [&](auto kind) {
    using T = typename decltype(kind)::T;
    LAUNCH(column_sums<T>, dim3(parts, (channels + 1023) / 1024), dim3(256), on.stream, pixels,
           share, channels, grad, static_cast<const T*>(y), norm, partial);
    finish(parts, partial);
  });
}

}  // namespace

int64_t grad_weight_partial_floats(const Shape& g) {
  const dim3 blocks = weight_blocks(g, shares(g));
  const int64_t groups = quadrants(g) * quadrants(g);
  return groups * blocks.x * blocks.y * blocks.z * GROUP;
}

namespace cuda {

const char* conv_forward(const Launch& on, const Shape& g, const Source& x, const void* weight,
                         void* y, void* pooled, uint8_t* argmax, const Affine& affine,
                         float* norm_y) {
  if (!g.batch) return nullptr;
  const int64_t parts = tile_count(g);
  float* partial = norm_y ? on.scratch(4 * parts * g.c_out) : nullptr;
  const char* failure = (argmax ? convolution<true, false> : convolution<false, false>)(
      on, g, x, weight, y, pooled, argmax, nullptr, {}, {}, partial);
  if (norm_y)
    LAUNCH(norm_rows, dim3(g.c_out), dim3(256), on.stream, parts, g.c_out, partial, affine, norm_y);
  return failure;
}

const char* conv_backward(const Launch& on, const Shape& g, const Source& grad_y, const Source& x,
                          const void* weight, const uint8_t* argmax, const Source& extra,
                          void* grad_x, bool nhwc, void* grad_weight, const float* gamma,
                          float* back_x) {
  const char* failure = nullptr;
  if (grad_x) {
    Shape back = g;  // from grad_y to the gradient of the convolution's input
    std::swap(back.c_in, back.c_out);
    const int64_t parts = tile_count(g);
    float* partial = back_x ? on.scratch(4 * parts * g.c_in) : nullptr;
    failure = convolution<false, true>(on, back, grad_y, weight, grad_x, nullptr, nullptr, argmax,
                                       extra, back_x ? x : Source{}, partial);
    if (back_x)
      LAUNCH(back_rows, dim3(g.c_in), dim3(256), on.stream, parts, g.c_in, partial, x.norm, gamma,
             back_x);
  }
  if (failure || !grad_weight) return failure;
  const dim3 blocks = weight_blocks(g, shares(g));
  const unsigned by = quadrants(g);
  float* partial = on.scratch(grad_weight_partial_floats(g));
  return by_type(on.type, [&](auto kind) {
    using T = typename decltype(kind)::T;
    constexpr bool EXACT = decltype(kind)::EXACT;
    const auto kernel =
        by == 2 ? grad_weight_partial<T, EXACT, 2> : grad_weight_partial<T, EXACT, 1>;
    if (blocks.x)
      LAUNCH(kernel, blocks, dim3(THREADS), on.stream, g, x, grad_y, tiles_a_share(g), partial);
    LAUNCH(grad_weight_sum<T>, dim3(GROUP / 32, blocks.y * by, blocks.z * by), dim3(256),
           on.stream, g, blocks.x, partial, nhwc, static_cast<T*>(grad_weight));
  });
}

const char* moments(const Launch& on, int64_t pixels, int64_t channels, const void* y,
                    const Affine& affine, float* norm) {
  return run_column_sums(on, pixels, channels, {}, y, nullptr, [&](int64_t parts, float* partial) {
    LAUNCH(norm_rows, dim3(channels), dim3(256), on.stream, parts, channels, partial, affine, norm);
  });
}

const char* finish(const Launch& on, int64_t pixels, int64_t channels, const void* y,
                   const float* norm, const void* r, const float* norm_r, void* out) {
  return run_elementwise(on, pixels, channels, {y}, norm, r, norm_r, out);
}

const char* finish_backward(const Launch& on, int64_t pixels, int64_t channels, const Source& grad,
                            const Normed& y, const Normed* r) {
  const auto sums = [&](const Normed& of) {
    return run_column_sums(
        on, pixels, channels, grad, of.y, of.norm, [&](int64_t parts, float* partial) {
          LAUNCH(back_rows, dim3(channels), dim3(256), on.stream, parts, channels, partial, of.norm,
                 of.gamma, of.back);
        });
  };
  const char* failure = sums(y);
  return failure || !r ? failure : sums(*r);
}

const char* apply_backward(const Launch& on, int64_t pixels, int64_t channels, const Source& grad,
                           void* grad_y) {
  return run_elementwise(on, pixels, channels, grad, nullptr, nullptr, nullptr, grad_y);
}

}  // namespace cuda
}  // namespace pool_conv
