// 3x3 convolution (padding 1, NHWC, float32) on a CPU by Winograd's F(4x4,3x3), behind a max-pool.
//
//   y = A^T [ sum_c (G w G^T) * (B^T x B) ] A        for every tile of 4x4 outputs, 6x6 inputs
//
// 36 multiplications a tile instead of 144. A thread takes a fixed range of images (so results do
// not depend on timing) and works in blocks of tiles whose transforms stay in its L2 cache:
//   1. max-pool the images that the block touches, into x, while they are needed anyway
//   2. V[36][tile][c]   = B^T x B                            channels are the vector dimension
//   3. M[36][tile][k]   = V U, 36 small products, for every one or two vectors of output channels
//   4. y                = A^T M A, straight to NHWC
// The input's gradient is the same with rotated, transposed weights; its unpooling follows image by
// image. The weight's gradient is the exact adjoint: dU[36][c][k] += V^T (A g A^T), then G^T dU G.
// The interpolation points are 0, 1, -1, 2, -2, infinity. Vectors are GCC's and clang's extension:
// AVX2, AVX-512 and NEON come from this one source.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "pool_conv.h"

namespace pool_conv {
namespace {

#ifdef __AVX512F__
constexpr int64_t W = 16;  // floats in a vector
#define HALF 0, 1, 2, 3, 4, 5, 6, 7
#define WHOLE HALF, 8, 9, 10, 11, 12, 13, 14, 15
#else
constexpr int64_t W = 8;
#define HALF 0, 1, 2, 3
#define WHOLE HALF, 4, 5, 6, 7
#endif
constexpr int64_t GROUP = 2 * W;  // output channels that are worked on together
constexpr int64_t ROWS = 24;      // tiles of a block; 12 and 36 are no faster
typedef float vec __attribute__((vector_size(4 * W)));
typedef float loose __attribute__((vector_size(4 * W), aligned(4), may_alias));  // at any address
typedef float half __attribute__((vector_size(2 * W), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
inline vec load(const float* p, int64_t count) {  // zeros behind `count`
  if (count >= W) return load(p);
  if (count == W / 2)  // in registers, for networks of half width
    return __builtin_shufflevector(*reinterpret_cast<const half*>(p), half{}, WHOLE);
  vec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline void store(float* p, vec v, int64_t count) {
  if (count >= W) return store(p, v);
  if (count == W / 2)
    return (void)(*reinterpret_cast<half*>(p) = __builtin_shufflevector(v, v, HALF));
  std::memcpy(p, &v, count * sizeof(float));
}
typedef int32_t ints __attribute__((vector_size(4 * W)));
typedef uint8_t bytes __attribute__((vector_size(W)));
inline ints load_index(const uint8_t* p, int64_t count) {
  bytes v = {};
  std::memcpy(&v, p, std::min(count, W));
  return __builtin_convertvector(v, ints);
}
inline void store_index(uint8_t* p, ints index, int64_t count) {
  const bytes v = __builtin_convertvector(index, bytes);
  std::memcpy(p, &v, std::min(count, W));
}

#define UNROLL _Pragma("GCC unroll 36")  // else the 36 elements of a tile go through memory
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Zeros on whole cache lines: a vector across two lines costs two accesses.
struct Scratch {
  float* const data;
  explicit Scratch(int64_t count) : data(new (std::align_val_t(64)) float[count]()) {}
  ~Scratch() { ::operator delete[](data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
};

// The one-dimensional transforms; the elements lie `stride` apart.
inline void transform_input(vec* d, int stride) {  // B^T d
  vec d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride],
      d5 = d[5 * stride];
  vec a = d4 - 4 * d2, b = d3 - 4 * d1, c = d4 - d2, e = 2 * (d3 - d1);
  d[0] = 4 * d0 - 5 * d2 + d4;
  d[stride] = a + b;
  d[2 * stride] = a - b;
  d[3 * stride] = c + e;
  d[4 * stride] = c - e;
  d[5 * stride] = 4 * d1 - 5 * d3 + d5;
}
inline void transform_output(vec* m, int stride) {  // A^T m: 6 -> 4
  vec m0 = m[0], m5 = m[5 * stride];
  vec s1 = m[stride] + m[2 * stride], t1 = m[stride] - m[2 * stride];
  vec s2 = m[3 * stride] + m[4 * stride], t2 = m[3 * stride] - m[4 * stride];
  m[0] = m0 + s1 + s2;
  m[stride] = t1 + 2 * t2;
  m[2 * stride] = s1 + 4 * s2;
  m[3 * stride] = t1 + 8 * t2 + m5;
}
inline void transform_gradient(vec* g, int stride) {  // A g: 4 -> 6
  vec g0 = g[0], g1 = g[stride], g2 = g[2 * stride], g3 = g[3 * stride];
  vec s = g0 + g2, t = g1 + g3, u = g0 + 4 * g2, v = 2 * g1 + 8 * g3;
  g[stride] = s + t;
  g[2 * stride] = s - t;
  g[3 * stride] = u + v;
  g[4 * stride] = u - v;
  g[5 * stride] = g3;
}
inline void transform_weight(vec* w, int stride) {  // G w: 3 -> 6
  vec w0 = w[0], w1 = w[stride], w2 = w[2 * stride];
  vec s = (w0 + w2) * (-1.0f / 6), t = w1 * (1.0f / 6);
  vec u = w0 * (1.0f / 24) + w2 * (1.0f / 6), v = w1 * (1.0f / 12);
  w[0] = w0 * 0.25f;
  w[stride] = s - t;
  w[2 * stride] = s + t;
  w[3 * stride] = u + v;
  w[4 * stride] = u - v;
  w[5 * stride] = w2;
}
inline void transform_weight_back(vec* u, int stride) {  // G^T u: 6 -> 3
  vec s = (u[stride] + u[2 * stride]) * (1.0f / 6), t = (u[2 * stride] - u[stride]) * (1.0f / 6);
  vec p = u[3 * stride] + u[4 * stride], q = u[3 * stride] - u[4 * stride], u5 = u[5 * stride];
  u[0] = u[0] * 0.25f - s + p * (1.0f / 24);
  u[stride] = t + q * (1.0f / 12);
  u[2 * stride] = p * (1.0f / 6) - s + u5;
}

// Tiles of 4x4 outputs, numbered through the images.
struct Tiles {
  int64_t height, width, down, across, per_image;
  explicit Tiles(const Shape& s)
      : height(s.height), width(s.width), down((s.height + 3) / 4), across((s.width + 3) / 4),
        per_image(down * across) {}
  struct Place {
    int64_t image, top, left;
  };
  Place at(int64_t tile) const {
    const int64_t within = tile % per_image;
    return {tile / per_image, within / across * 4, within % across * 4};
  }
};

// From V[p] to V[p + 1]: a vector more than the tiles need, or 36 stores at multiples of 4 KiB
// would meet in one cache set (1.1x for the gradient of the weight at 64 channels).
inline int64_t plane(int64_t width) { return ROWS * width + W; }

// V[p][tile][c] = B^T x B for `count` tiles from `first`
template <int C>
void input_block(const Tiles& tiles, const float* x, int64_t c_in, int64_t first, int64_t count,
                 const float* zeros, float* V) {
  const int64_t channels = C ? C : c_in, padded = round_up(channels, W);
  for (int64_t t = 0; t < count; t++) {
    const auto [image, top, left] = tiles.at(first + t);
    const float* at[36];  // the pixels; those beyond the border are zeros
    for (int i = 0; i < 6; i++)
      for (int j = 0; j < 6; j++) {
        const int64_t r = top + i - 1, q = left + j - 1;
        const bool inside = r >= 0 && r < tiles.height && q >= 0 && q < tiles.width;
        at[6 * i + j] =
            inside ? x + ((image * tiles.height + r) * tiles.width + q) * channels : zeros;
      }
    for (int64_t c = 0; c < channels; c += W) {
      vec d[36];
      UNROLL for (int j = 0; j < 6; j++) {
        UNROLL for (int i = 0; i < 6; i++) d[6 * i + j] = load(at[6 * i + j] + c, channels - c);
        transform_input(d + j, 6);
      }
      UNROLL for (int i = 0; i < 6; i++) {
        transform_input(d + 6 * i, 1);
        UNROLL for (int j = 0; j < 6; j++)
          store(V + (6 * i + j) * plane(padded) + t * padded + c, d[6 * i + j]);
      }
    }
  }
}

// M[r][0..N*W) = sum_c V[r][c] U[c][0..N*W) for R rows: R*N accumulators in registers
template <int R, int N>
inline void product(const float* V, int64_t ld_v, const float* U, int64_t channels, float* M) {
  vec sum[R][N] = {};
  for (int64_t c = 0; c < channels; c++) {
    vec u[N];
    for (int n = 0; n < N; n++) u[n] = load(U + (c * N + n) * W);
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) sum[r][n] += V[r * ld_v + c] * u[n];
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) store(M + (r * N + n) * W, sum[r][n]);
}

// y of `count` tiles from `first`, N*W output channels from k0: 36 products, then A^T M A
template <int C, int N>
void output_block(const Tiles& tiles, const Shape& s, int64_t k0, int64_t first, int64_t count,
                  const float* V, const float* U, float* M, float* y) {
  constexpr int R = W == 16 ? 12 : 12 / N;  // as many accumulators as there are registers for
  const int64_t channels = C ? C : s.c_in, padded = round_up(channels, W);
  for (int p = 0; p < 36; p++)
    for (int64_t t = 0; t < count; t += R)
      product<R, N>(V + p * plane(padded) + t * padded, padded, U + p * channels * N * W,
                    channels, M + p * plane(GROUP) + t * N * W);
  for (int64_t t = 0; t < count; t++) {
    const auto [image, top, left] = tiles.at(first + t);
    const int64_t high = std::min<int64_t>(4, tiles.height - top);
    const int64_t wide = std::min<int64_t>(4, tiles.width - left);
    float* out = y + ((image * tiles.height + top) * tiles.width + left) * s.c_out + k0;
    for (int n = 0; n < N && k0 + n * W < s.c_out; n++) {
      const int64_t channels_left = s.c_out - k0 - n * W;
      vec m[36];
      UNROLL for (int j = 0; j < 6; j++) {
        UNROLL for (int i = 0; i < 6; i++)
          m[6 * i + j] = load(M + (6 * i + j) * plane(GROUP) + (t * N + n) * W);
        transform_output(m + j, 6);
      }
      UNROLL for (int i = 0; i < 4; i++) {
        transform_output(m + 6 * i, 1);
        float* line = out + i * tiles.width * s.c_out + n * W;
        if (high == 4 && wide == 4 && channels_left >= W) {
          UNROLL for (int j = 0; j < 4; j++) store(line + j * s.c_out, m[6 * i + j]);
        } else if (i < high) {
          for (int j = 0; j < wide; j++) store(line + j * s.c_out, m[6 * i + j], channels_left);
        }
      }
    }
  }
}

// U[k/GROUP][p][c][GROUP] = G w G^T, the last group W wide where W is enough, zeros behind c_out
void weight_transform(const Shape& s, const float* weight, bool flipped, float* U) {
  at::parallel_for(0, s.c_in, 4, [&](int64_t begin, int64_t end) {
    for (int64_t k0 = 0; k0 < s.c_out; k0 += W) {
      const int64_t group = k0 / GROUP * GROUP, wide = s.c_out - group > W ? GROUP : W;
      for (int64_t c = begin; c < end; c++) {
        float w[36][W] = {};  // w[6 i + j][lane]
        for (int64_t k = k0; k < std::min(k0 + W, s.c_out); k++) {
          const float* from = weight + (flipped ? c * s.c_out + k : k * s.c_in + c) * 9;
          for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++)
              w[6 * i + j][k - k0] = from[flipped ? 8 - 3 * i - j : 3 * i + j];
        }
        vec v[36];
        std::memcpy(v, w, sizeof(v));
        for (int j = 0; j < 3; j++) transform_weight(v + j, 6);
        for (int i = 0; i < 6; i++) transform_weight(v + 6 * i, 1);
        for (int i = 0; i < 36; i++)
          store(U + group * 36 * s.c_in + (i * s.c_in + c) * wide + k0 - group, v[i]);
      }
    }
  });
}

// One image: to[i][j][c] = max of 2x2 (torch: the first of equals, a NaN always), argmax 0..3
void pool_image(const float* from, int64_t from_width, float* to, uint8_t* argmax, int64_t height,
                int64_t width, int64_t channels) {
  for (int64_t i = 0; i < height; i++)
    for (int64_t j = 0; j < width; j++) {
      const float* corner = from + (2 * i * from_width + 2 * j) * channels;
      const float* at[4] = {corner, corner + channels, corner + from_width * channels,
                            corner + (from_width + 1) * channels};
      for (int64_t c = 0; c < channels; c += W) {
        const int64_t left = channels - c;
        vec best = load(at[0] + c, left);
        ints index = {};
        for (int q = 1; q < 4; q++) {
          const vec value = load(at[q] + c, left);
          const ints better = (value > best) | (value != value);
          best = better ? value : best;
          index = better ? ints{} + q : index;
        }
        store(to + c, best, left);
        store_index(argmax + c, index, left);
      }
      to += channels;
      argmax += channels;
    }
}

// One image: the gradient of each pooled element goes to its argmax place, zeros elsewhere
void unpool_image(const float* grad, const float* extra, const uint8_t* argmax, float* to,
                  int64_t to_height, int64_t to_width, int64_t channels) {
  const int64_t height = to_height / 2, width = to_width / 2;
  if (to_height % 2)
    std::memset(to + (to_height - 1) * to_width * channels, 0, to_width * channels * sizeof(float));
  for (int64_t i = 0; i < height; i++) {
    for (int64_t j = 0; j < width; j++)
      for (int64_t c = 0; c < channels; c += W) {
        const int64_t from = (i * width + j) * channels + c, left = channels - c;
        vec g = load(grad + from, left);
        if (extra) g += load(extra + from, left);
        const ints index = load_index(argmax + from, left);
        for (int q = 0; q < 4; q++)
          store(to + ((2 * i + q / 2) * to_width + 2 * j + q % 2) * channels + c,
                index == q ? g : vec{}, left);
      }
    if (to_width % 2)
      for (int r = 0; r < 2; r++)
        std::memset(to + ((2 * i + r + 1) * to_width - 1) * channels, 0, channels * sizeof(float));
  }
}

// work(t, begin, end) for every thread t: its images, the same at the same number of threads
template <typename Work>
void share_images(int64_t batch, const Work& work) {
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t t, int64_t last) {
    for (; t < last; t++) work(t, batch * t / threads, batch * (t + 1) / threads);
  });
}

template <int C>
void winograd_images(const Shape& s, float* x, const float* U, float* y, const PoolFrom& pool,
                     const UnpoolTo& unpool, int64_t begin, int64_t end) {
  const Tiles tiles(s);
  const int64_t channels = C ? C : s.c_in;
  const int64_t pixels = s.height * s.width, total = end * tiles.per_image;
  const int64_t of_v = 36 * plane(round_up(channels, W)), of_m = 36 * plane(GROUP);
  const Scratch scratch(of_v + of_m + channels + W);
  float *V = scratch.data, *M = V + of_v, *zeros = M + of_m;
  int64_t pooled = begin, unpooled = begin;
  for (int64_t first = begin * tiles.per_image; first < total; first += ROWS) {
    const int64_t count = std::min(ROWS, total - first);
    const int64_t last_image = (first + count - 1) / tiles.per_image;
    for (; pool.source && pooled <= last_image; pooled++)
      pool_image(pool.source + pooled * pool.source_height * pool.source_width * channels,
                 pool.source_width, x + pooled * pixels * channels,
                 pool.argmax + pooled * pixels * channels, s.height, s.width, channels);
    input_block<C>(tiles, x, s.c_in, first, count, zeros, V);
    for (int64_t k = 0; k < s.c_out; k += GROUP) {
      const float* group = U + k * 36 * channels;
      if (s.c_out - k > W)
        output_block<C, 2>(tiles, s, k, first, count, V, group, M, y);
      else
        output_block<C, 1>(tiles, s, k, first, count, V, group, M, y);
    }
    const int64_t done = first + count == total ? end : (first + count) / tiles.per_image;
    for (; unpool.target && unpooled < done; unpooled++) {
      const int64_t at = unpooled * pixels * s.c_out;
      unpool_image(y + at, unpool.extra ? unpool.extra + at : nullptr, unpool.argmax + at,
                   unpool.target + unpooled * unpool.target_height * unpool.target_width * s.c_out,
                   unpool.target_height, unpool.target_width, s.c_out);
    }
  }
}

// dU[p][c..c+R)[k..k+N*W) += V[p]^T (A g A^T)[p] over the tiles of a block
template <int R, int N>
inline void accumulate(const float* V, int64_t ld_v, const float* g, int64_t ld_g, int64_t count,
                       float* dU) {
  vec sum[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sum[r][n] = load(dU + r * ld_g + n * W);
  for (int64_t t = 0; t < count; t++) {
    vec u[N];
    for (int n = 0; n < N; n++) u[n] = load(g + t * ld_g + n * W);
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) sum[r][n] += V[t * ld_v + r] * u[n];
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) store(dU + r * ld_g + n * W, sum[r][n]);
}

template <int N>
inline void accumulate_rows(const float* V, int64_t ld_v, const float* g, int64_t ld_g,
                            int64_t count, int64_t channels, float* dU) {
  for (int64_t c = 0; c < channels;) {
    constexpr int R = W == 16 ? 16 / N : N == 2 ? 6 : 8;  // as registers allow
    const int64_t left = channels - c;
    if (left >= R && (left % R == 0 || left >= R + 4)) {
      accumulate<R, N>(V + c, ld_v, g, ld_g, count, dU + c * ld_g), c += R;
    } else if (left >= 4) {
      accumulate<4, N>(V + c, ld_v, g, ld_g, count, dU + c * ld_g), c += 4;
    } else {
      accumulate<1, N>(V + c, ld_v, g, ld_g, count, dU + c * ld_g), c += 1;
    }
  }
}

template <int C>
void grad_weight_images(const Shape& s, const float* x, const float* grad_y, int64_t begin,
                        int64_t end, float* dU) {
  const Tiles tiles(s);
  const int64_t channels = C ? C : s.c_in, ld_v = round_up(channels, W);
  const int64_t ld_g = round_up(s.c_out, W), total = end * tiles.per_image;
  const int64_t plane_v = plane(ld_v), plane_g = plane(ld_g);
  const Scratch scratch(36 * (plane_v + plane_g) + std::max(channels, s.c_out) + W);
  float *V = scratch.data, *G = V + 36 * plane_v, *zeros = G + 36 * plane_g;
  for (int64_t first = begin * tiles.per_image; first < total; first += ROWS) {
    const int64_t count = std::min(ROWS, total - first);
    input_block<C>(tiles, x, s.c_in, first, count, zeros, V);
    for (int64_t t = 0; t < count; t++) {
      const auto [image, top, left] = tiles.at(first + t);
      const float* at[16];
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
          at[4 * i + j] = top + i < s.height && left + j < s.width
              ? grad_y + ((image * s.height + top + i) * s.width + left + j) * s.c_out : zeros;
      for (int64_t k = 0; k < s.c_out; k += W) {
        vec g[36];
        UNROLL for (int i = 0; i < 4; i++) {
          UNROLL for (int j = 0; j < 4; j++) g[6 * i + j] = load(at[4 * i + j] + k, s.c_out - k);
          transform_gradient(g + 6 * i, 1);
        }
        UNROLL for (int j = 0; j < 6; j++) {
          transform_gradient(g + j, 6);
          UNROLL for (int i = 0; i < 6; i++)
            store(G + (6 * i + j) * plane_g + t * ld_g + k, g[6 * i + j]);
        }
      }
    }
    for (int p = 0; p < 36; p++)
      for (int64_t k = 0; k < ld_g;) {
        const float *v = V + p * plane_v, *g = G + p * plane_g + k;
        float* to = dU + p * channels * ld_g + k;
        if (ld_g - k >= 2 * W) {
          accumulate_rows<2>(v, ld_v, g, ld_g, count, channels, to), k += 2 * W;
        } else {
          accumulate_rows<1>(v, ld_v, g, ld_g, count, channels, to), k += W;
        }
      }
  }
}

}  // namespace

void winograd(const Shape& s, float* x, const float* weight, bool flipped, float* y,
              const PoolFrom& pool, const UnpoolTo& unpool) {
  const Scratch U(36 * s.c_in * round_up(s.c_out, W));
  weight_transform(s, weight, flipped, U.data);
  const auto images = s.c_in == 8    ? winograd_images<8>
                      : s.c_in == 16 ? winograd_images<16>
                      : s.c_in == 32 ? winograd_images<32>
                      : s.c_in == 64 ? winograd_images<64>
                                     : winograd_images<0>;
  share_images(s.batch, [&](int64_t, int64_t begin, int64_t end) {
    images(s, x, U.data, y, pool, unpool, begin, end);
  });
}

void winograd_grad_weight(const Shape& s, const float* x, const float* grad_y, float* grad_weight) {
  const int64_t ld = round_up(s.c_out, W), size = 36 * s.c_in * ld, threads = at::get_num_threads();
  const Scratch dU(threads * size);
  const auto images = s.c_in == 8    ? grad_weight_images<8>
                      : s.c_in == 16 ? grad_weight_images<16>
                      : s.c_in == 32 ? grad_weight_images<32>
                      : s.c_in == 64 ? grad_weight_images<64>
                                     : grad_weight_images<0>;
  share_images(s.batch, [&](int64_t t, int64_t begin, int64_t end) {
    images(s, x, grad_y, begin, end, dU.data + t * size);
  });
  at::parallel_for(0, s.c_in, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++)
      for (int64_t k = 0; k < s.c_out; k += W) {
        vec u[36] = {};
        for (int64_t t = 0; t < threads; t++)  // in a fixed order
          for (int p = 0; p < 36; p++) u[p] += load(dU.data + t * size + (p * s.c_in + c) * ld + k);
        for (int j = 0; j < 6; j++) transform_weight_back(u + j, 6);
        for (int i = 0; i < 3; i++) transform_weight_back(u + 6 * i, 1);
        for (int64_t lane = 0; lane < std::min(W, s.c_out - k); lane++)
          for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++)
              grad_weight[((k + lane) * s.c_in + c) * 9 + 3 * i + j] = u[6 * i + j][lane];
      }
  });
}

}  // namespace pool_conv
