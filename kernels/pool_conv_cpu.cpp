// 3x3 convolution (padding 1, NHWC, float32) on a CPU by Winograd's F(4x4,3x3), and the layers
// around it: 2x2 max-pool, batch normalisation, ReLU, residual add.
//
//   y = A^T [ sum_c (G w G^T) * (B^T x B) ] A        for every tile of 4x4 outputs, 6x6 inputs
//
// This takes 36 multiplications a tile instead of 144. A thread works on a fixed range of images,
// so that results do not depend on timing, and on a few images at a time, so that everything it
// computes from them stays in its L2 cache. Forward it computes
//   1. the convolution's input: x itself, its max-pool, or relu(normalised x)
//   2. for each block of tiles: V[36][tile][c] = B^T x B, with the channels as vectors,
//      M[36][tile][k] = V U, 36 small products for every one or two vectors of output channels,
//      y = A^T M A, written as NHWC
//   3. the sums of y that y's normalisation needs, while y is still in the cache
// and backward
//   1. the gradient of y, through the normalisation behind y, and once more the convolution's input
//   2. the weight's gradient, the exact adjoint: dU[36][c][k] += V^T (A g A^T), then G^T dU G
//   3. the input's gradient: the forward algorithm with rotated and transposed weights
//   4. the layer's: back through the ReLU, the shortcut or the pooling before the convolution
// The interpolation points are 0, 1, -1, 2, -2, infinity. The vectors are an extension of GCC and
// clang, which makes code for AVX2, AVX-512 and NEON from this one source.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

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
constexpr int64_t ROWS = W == 16 ? 16 : 24;  // tiles of a block; more do not stay in the cache
typedef float vec __attribute__((vector_size(4 * W)));
typedef float loose __attribute__((vector_size(4 * W), aligned(4), may_alias));  // at any address
typedef float half __attribute__((vector_size(2 * W), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
inline vec load(const float* p, int64_t count) {  // zeros behind `count`
  if (count >= W) return load(p);
  if (count == W / 2)  // stays in registers; for networks of half width
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

#define UNROLL _Pragma("GCC unroll 36")  // otherwise a tile's 36 elements go through memory
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that is not initialised. It begins with a cache line, so that no vector lies across two.
struct Scratch {
  float* const data;
  explicit Scratch(int64_t count) : data(new (std::align_val_t(64)) float[count]) {}
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

// Tiles of 4x4 outputs, numbered from the first image to the last. Their inputs lie in images that
// have a border of zeros, 4 * down + 2 rows of 4 * across + 2 pixels, so no tile is a special case.
struct Tiles {
  int64_t height, width, down, across, per_image, row, padded;
  explicit Tiles(const Shape& s)
      : height(s.height), width(s.width), down((s.height + 3) / 4), across((s.width + 3) / 4),
        per_image(down * across), row(4 * across + 2), padded((4 * down + 2) * row) {}
  struct Place {
    int64_t image, top, left;
  };
  Place at(int64_t tile) const {
    const int64_t within = tile % per_image;
    return {tile / per_image, within / across * 4, within % across * 4};
  }
  int64_t corner(int64_t tile) const {  // where its 6x6 inputs begin, in padded pixels
    const auto [image, top, left] = at(tile);
    return image * padded + top * row + left;
  }
};

// The distance from V[p] to V[p + 1]. It is one vector longer than the tiles need; otherwise the 36
// stores of a tile would be multiples of 4 KiB apart and share one cache set (1.1x for the gradient
// of the weight at 64 channels).
inline int64_t plane(int64_t width) { return ROWS * width + W; }

// V[p][tile][c] = B^T x B for `count` tiles from `first`; x is padded
template <int C>
void input_block(const Tiles& tiles, const float* x, int64_t c_in, int64_t first, int64_t count,
                 float* V) {
  const int64_t channels = C ? C : c_in, ld = round_up(channels, W);
  for (int64_t t = 0; t < count; t++) {
    const float* corner = x + tiles.corner(first + t) * channels;
    for (int64_t c = 0; c < channels; c += W) {
      vec d[36];
      UNROLL for (int j = 0; j < 6; j++) {
        UNROLL for (int i = 0; i < 6; i++)
          d[6 * i + j] = load(corner + (i * tiles.row + j) * channels + c, channels - c);
        transform_input(d + j, 6);
      }
      UNROLL for (int i = 0; i < 6; i++) {
        transform_input(d + 6 * i, 1);
        UNROLL for (int j = 0; j < 6; j++)
          store(V + (6 * i + j) * plane(ld) + t * ld + c, d[6 * i + j]);
      }
    }
  }
}

// M[r][0..N*W) = sum_c V[r][c] U[c][0..N*W) for R rows, with R*N accumulators in registers
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

struct Work {  // a thread's scratch memory, and the memory that it will read or write soon
  const int64_t of_block;
  const Scratch scratch;
  float *const V, *const M;
  explicit Work(const Shape& s)
      : of_block(36 * plane(std::max(GROUP, round_up(std::max(s.c_in, s.c_out), W)))),
        scratch(2 * of_block), V(scratch.data), M(V + of_block) {}

  // Before each product a little of that memory is fetched into the cache: 1.1x for a whole
  // training step. Fetching all at once, or before each block of tiles, gains nothing.
  struct Stream {
    const char *next, *end;
    int64_t step;
  };
  std::vector<Stream> streams;
  int64_t fetches = 1;
  void plan(const Tiles& tiles, int64_t images, int64_t passes) {
    fetches = 36 * std::max<int64_t>(1, passes) *
              std::max<int64_t>(1, images * tiles.per_image / ROWS);
    streams.clear();
  }
  void soon(const float* p, int64_t from, int64_t floats) {
    if (!p || floats <= 0) return;
    const char* at = reinterpret_cast<const char*>(p + from);
    streams.push_back({at, at + 4 * floats, round_up(4 * floats / fetches, 64)});
  }
  void fetch() {
    for (Stream& s : streams)
      for (const char* end = std::min(s.end, s.next + s.step); s.next < end; s.next += 64)
        __builtin_prefetch(s.next, 0, 2);
  }
};

// Computes N*W channels of y, from k0, for `count` tiles from `first`: 36 products, then A^T M A
template <int C, int N>
void output_block(const Tiles& tiles, const Shape& s, int64_t k0, int64_t first, int64_t count,
                  const float* U, float* y, Work& work) {
  constexpr int R = (W == 16 ? 16 : 12) / N;  // as many accumulators as registers
  const int64_t channels = C ? C : s.c_in, padded = round_up(channels, W);
  for (int p = 0; p < 36; p++) {
    work.fetch();
    for (int64_t t = 0; t < count; t += R)
      product<R, N>(work.V + p * plane(padded) + t * padded, padded, U + p * channels * N * W,
                    channels, work.M + p * plane(GROUP) + t * N * W);
  }
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
          m[6 * i + j] = load(work.M + (6 * i + j) * plane(GROUP) + (t * N + n) * W);
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

// U[k/GROUP][p][c][GROUP] = G w G^T with zeros behind c_out. The last group may be W wide
void weight_transform(const Shape& s, const float* weight, bool flipped, float* U) {
  at::parallel_for(0, s.c_in, 4, [&](int64_t begin, int64_t end) {
    for (int64_t k0 = 0; k0 < s.c_out; k0 += W) {
      const int64_t group = k0 / GROUP * GROUP, wide = s.c_out - group > W ? GROUP : W;
      for (int64_t c = begin; c < end; c++) {
        vec v[36] = {};  // v[6 i + j][lane]
        for (int64_t k = k0; k < std::min(k0 + W, s.c_out); k++) {
          const float* from = weight + (flipped ? c * s.c_out + k : k * s.c_in + c) * 9;
          for (int i = 0; i < 9; i++) v[i / 3 * 6 + i % 3][k - k0] = from[flipped ? 8 - i : i];
        }
        UNROLL for (int j = 0; j < 3; j++) transform_weight(v + j, 6);
        UNROLL for (int i = 0; i < 6; i++) transform_weight(v + 6 * i, 1);
        UNROLL for (int i = 0; i < 36; i++)
          store(U + group * 36 * s.c_in + (i * s.c_in + c) * wide + k0 - group, v[i]);
      }
    }
  });
}

// One image: to[i][j][c] = max of 2x2, argmax 0..3. As in torch the first of equals, or a NaN, wins
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

// One image: the gradient of each pooled element goes where argmax says; all else is zero
void unpool_image(const float* grad, const uint8_t* argmax, float* to, int64_t to_height,
                  int64_t to_width, int64_t channels) {
  const int64_t height = to_height / 2, width = to_width / 2;
  if (to_height % 2)
    std::memset(to + (to_height - 1) * to_width * channels, 0, to_width * channels * sizeof(float));
  for (int64_t i = 0; i < height; i++) {
    for (int64_t j = 0; j < width; j++)
      for (int64_t c = 0; c < channels; c += W) {
        const int64_t from = (i * width + j) * channels + c, left = channels - c;
        const vec g = load(grad + from, left);
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
    constexpr int R = W == 16 ? 16 / N : N == 2 ? 6 : 8;  // as many accumulators as registers
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

// Calls work(t, begin, end) for every thread t with its part of 0..count-1, which depends only on
// the number of threads
template <typename Part>
void share(int64_t count, const Part& work) {
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t t, int64_t last) {
    for (; t < last; t++) work(t, count * t / threads, count * (t + 1) / threads);
  });
}

// ---- loops over pixels, a vector of channels at a time

constexpr int64_t PIXELS = 128;  // which stay in the L1 cache for all their channels

// Calls body(c, left, loop) for some pixels and a vector of channels from c, of which `left` exist.
// loop(pixel) calls pixel(at) for each of these pixels; `at` is its place in memory
template <typename Body>
void each(int64_t pixels, int64_t channels, const Body& body) {
  for (int64_t p = 0; p < pixels; p += PIXELS)
    for (int64_t c = 0; c < channels; c += W)
      body(c, channels - c, [&](const auto& pixel) {
        const int64_t end = std::min(p + PIXELS, pixels) * channels;
        for (int64_t at = p * channels + c; at < end; at += channels) pixel(at);
      });
}

// The same for images; pixel(at, padded_at) also gets the place among padded images
template <typename Body>
void each_padded(const Tiles& tiles, int64_t images, int64_t channels, const Body& body) {
  const int64_t step = std::max<int64_t>(1, PIXELS / tiles.width);
  for (int64_t n = 0; n < images; n++)
    for (int64_t top = 0; top < tiles.height; top += step)
      for (int64_t c = 0; c < channels; c += W)
        body(c, channels - c, [&](const auto& pixel) {
          for (int64_t i = top; i < std::min(top + step, tiles.height); i++) {
            int64_t at = (n * tiles.height + i) * tiles.width * channels + c;
            int64_t padded = (n * tiles.padded + (i + 1) * tiles.row + 1) * channels + c;
            for (int64_t j = 0; j < tiles.width; j++, at += channels, padded += channels)
              pixel(at, padded);
          }
        });
}

struct Normalise {  // does nothing if there are no rows
  const bool wanted;
  vec center = {}, scale = {}, shift = {};
  Normalise(const float* norm, int64_t channels, int64_t c, int64_t left) : wanted(norm) {
    const auto row = [&](int r) { return load(norm + r * channels + c, left); };
    if (norm) center = row(CENTER), scale = row(SCALE), shift = row(SHIFT);
  }
  vec operator()(vec y) const { return wanted ? (y - center) * scale + shift : y; }
};
// As in torch a NaN passes, and so does its gradient
inline vec relu(vec v) { return v < 0 ? vec{} : v; }
inline vec relu_backward(vec grad, vec out) { return out <= 0 ? vec{} : grad; }

const float* floats(const void* data) { return static_cast<const float*>(data); }

// The gradient of y from that of what is behind it, a vector of channels at a time
struct Gradient {
  const float *grad, *out, *y;
  int64_t left;
  vec center = {}, by_g = {}, by_y = {}, by_1 = {};
  Gradient(const Source& g, int64_t from, int64_t channels, int64_t c, int64_t left)
      : grad(floats(g.x) + from), out(g.out ? floats(g.out) + from : nullptr),
        y(g.back ? floats(g.y) + from : nullptr), left(left) {
    const auto row = [&](int r) { return load(g.back + r * channels + c, left); };
    if (y) center = row(CENTER), by_g = row(BY_G), by_y = row(BY_Y), by_1 = row(BY_1);
  }
  vec operator()(int64_t at) const {
    vec g = load(grad + at, left);
    if (out) g = relu_backward(g, load(out + at, left));
    return y ? g * by_g + ((load(y + at, left) - center) * by_y + by_1) : g;
  }
};

// Writes x, or relu(normalised x), into padded images
void make_input(const Tiles& tiles, int64_t images, int64_t channels, const float* x,
                const float* norm, float* to) {
  each_padded(tiles, images, channels, [&](int64_t c, int64_t left, auto loop) {
    const Normalise normalised(norm, channels, c, left);
    loop([&](int64_t at, int64_t padded) {
      const vec v = normalised(load(x + at, left));
      store(to + padded, norm ? relu(v) : v, left);
    });
  });
}

// Two sums for each thread and channel: in float over the pixels of `each`, then in double
struct Sums {
  const int64_t channels, padded = round_up(channels, W), threads = at::get_num_threads();
  std::vector<double> data = std::vector<double>(threads * 2 * padded);
  explicit Sums(int64_t channels) : channels(channels) {}
  double* of(int64_t t, int which) { return data.data() + (2 * t + which) * padded; }
  void add(int64_t t, int64_t c, vec first, vec second) {
    typedef double wide __attribute__((vector_size(8 * W), aligned(8), may_alias));
    *reinterpret_cast<wide*>(of(t, 0) + c) += __builtin_convertvector(first, wide);
    *reinterpret_cast<wide*>(of(t, 1) + c) += __builtin_convertvector(second, wide);
  }
};

// Mean and variance of y. A thread sums y - m and (y - m)^2; m is the mean of the first pixels that
// it meets. That is close enough to the mean of all pixels that no digits cancel.
struct Moments : Sums {
  const Scratch around;
  std::vector<int64_t> pixels = std::vector<int64_t>(threads);
  explicit Moments(int64_t channels) : Sums(channels), around(threads * padded) {}

  void operator()(int64_t t, int64_t count, const float* y) {
    float* m = around.data + t * padded;
    if (!pixels[t])
      for (int64_t c = 0; c < channels; c++) {
        double sum = 0;
        for (int64_t p = 0; p < std::min<int64_t>(count, 64); p++) sum += y[p * channels + c];
        m[c] = sum / std::min<int64_t>(count, 64);
      }
    pixels[t] += count;
    each(count, channels, [&](int64_t c, int64_t left, auto loop) {
      const vec middle = load(m + c);
      vec sum = {}, square = {};
      loop([&](int64_t at) {
        const vec d = load(y + at, left) - middle;
        sum += d;
        square += d * d;
      });
      add(t, c, sum, square);
    });
  }

  void rows(const Affine& affine, float* norm) {
    for (int64_t c = 0; c < channels; c++) {
      Moment all{};
      for (int64_t t = 0; t < threads; t++) {
        if (!pixels[t]) continue;
        const double n = pixels[t], sum = of(t, 0)[c];
        all.join({n, around.data[t * padded + c] + sum / n, of(t, 1)[c] - sum * sum / n});
      }
      write_norm(all, affine, c, channels, norm);
    }
  }
};

// Makes the rows of the way back through y's normalisation from sums of g and of g (y - center)
void back_rows(Sums& sums, double pixels, const float* norm, const float* gamma, float* back) {
  for (int64_t c = 0; c < sums.channels; c++) {
    double sum = 0, product = 0;
    for (int64_t t = 0; t < sums.threads; t++) sum += sums.of(t, 0)[c], product += sums.of(t, 1)[c];
    write_back(sum, product, pixels, norm, gamma, c, sums.channels, back);
  }
}

// ---- Winograd for a few images

int64_t images_at_once(const Shape& s) {  // with a multiple of ROWS tiles, or in the cache
  const int64_t tiles = Tiles(s).per_image;
  const int64_t bytes = 4 * s.height * s.width * std::max(s.c_in, s.c_out);
  int64_t images = 1;
  while (images * tiles % ROWS && (images + 1) * bytes <= 256 << 10) images++;
  return images;
}

struct Zeros : Scratch {  // for padded images, whose borders stay zero
  explicit Zeros(int64_t count) : Scratch(count) { std::fill(data, data + count, 0.0f); }
};

template <int C>
void convolve(const Shape& s, const float* x, const float* U, float* y, int64_t images,
              Work& work) {
  const Tiles tiles(s);
  const int64_t total = images * tiles.per_image;
  for (int64_t first = 0; first < total; first += ROWS) {
    const int64_t count = std::min(ROWS, total - first);
    input_block<C>(tiles, x, s.c_in, first, count, work.V);
    for (int64_t k = 0; k < s.c_out; k += GROUP) {
      const float* group = U + k * 36 * s.c_in;
      if (s.c_out - k > W)
        output_block<C, 2>(tiles, s, k, first, count, group, y, work);
      else
        output_block<C, 1>(tiles, s, k, first, count, group, y, work);
    }
  }
}

template <int C>
void weight_gradient(const Shape& s, const float* x, const float* grad_y, int64_t images, float* dU,
                     Work& work) {
  const Tiles tiles(s);
  const int64_t channels = C ? C : s.c_in, ld_v = round_up(channels, W);
  const int64_t ld_g = round_up(s.c_out, W), total = images * tiles.per_image;
  float* const G = work.M;
  for (int64_t first = 0; first < total; first += ROWS) {
    const int64_t count = std::min(ROWS, total - first);
    input_block<C>(tiles, x, s.c_in, first, count, work.V);
    for (int64_t t = 0; t < count; t++) {
      const float* corner = grad_y + (tiles.corner(first + t) + tiles.row + 1) * s.c_out;
      for (int64_t k = 0; k < s.c_out; k += W) {
        vec g[36];
        UNROLL for (int i = 0; i < 4; i++) {
          UNROLL for (int j = 0; j < 4; j++)
            g[6 * i + j] = load(corner + (i * tiles.row + j) * s.c_out + k, s.c_out - k);
          transform_gradient(g + 6 * i, 1);
        }
        UNROLL for (int j = 0; j < 6; j++) {
          transform_gradient(g + j, 6);
          UNROLL for (int i = 0; i < 6; i++)
            store(G + (6 * i + j) * plane(ld_g) + t * ld_g + k, g[6 * i + j]);
        }
      }
    }
    for (int p = 0; p < 36; p++) {
      work.fetch();
      for (int64_t k = 0; k < ld_g;) {
        const float *v = work.V + p * plane(ld_v), *g = G + p * plane(ld_g) + k;
        float* to = dU + p * channels * ld_g + k;
        if (ld_g - k >= 2 * W) {
          accumulate_rows<2>(v, ld_v, g, ld_g, count, channels, to), k += 2 * W;
        } else {
          accumulate_rows<1>(v, ld_v, g, ld_g, count, channels, to), k += W;
        }
      }
    }
  }
}

// grad_weight = G^T dU G, where dU is the sum of the threads' sums in a fixed order
void weight_transform_back(const Shape& s, const float* dU, bool nhwc, float* grad_weight) {
  const int64_t by_c = nhwc ? 1 : 9, by_tap = nhwc ? s.c_in : 1;
  const int64_t ld = round_up(s.c_out, W), size = 36 * s.c_in * ld, threads = at::get_num_threads();
  at::parallel_for(0, s.c_in, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++)
      for (int64_t k = 0; k < s.c_out; k += W) {
        vec u[36] = {};
        for (int64_t t = 0; t < threads; t++)
          for (int p = 0; p < 36; p++) u[p] += load(dU + t * size + (p * s.c_in + c) * ld + k);
        for (int j = 0; j < 6; j++) transform_weight_back(u + j, 6);
        for (int i = 0; i < 3; i++) transform_weight_back(u + 6 * i, 1);
        for (int64_t lane = 0; lane < std::min(W, s.c_out - k); lane++)
          for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++)
              grad_weight[(k + lane) * s.c_in * 9 + c * by_c + (3 * i + j) * by_tap] =
                  u[6 * i + j][lane];
      }
  });
}

// The compiler makes code for the usual numbers of channels, and one function for all others.
#define BY_CHANNELS(function, c)                                               \
  ((c) == 8    ? function<8>                                                   \
   : (c) == 16 ? function<16>                                                  \
   : (c) == 32 ? function<32>                                                  \
   : (c) == 64 ? function<64>                                                  \
               : function<0>)

}  // namespace

namespace cpu {

void conv_forward(const Shape& s, const Source& in, const float* weight, float* y, float* pooled,
                  uint8_t* argmax, const Affine& affine, float* norm_y) {
  const Scratch U(36 * s.c_in * round_up(s.c_out, W));
  weight_transform(s, weight, false, U.data);
  const Tiles tiles(s);
  const int64_t pixels = s.height * s.width, step = images_at_once(s);
  Moments sums(s.c_out);
  share(s.batch, [&](int64_t t, int64_t begin, int64_t end) {
    Work work(s);
    const Zeros input(step * tiles.padded * s.c_in);
    for (int64_t first = begin; first < end; first += step) {
      const int64_t images = std::min(step, end - first), from = first * pixels * s.c_in;
      for (int64_t i = 0; argmax && i < images; i++)
        pool_image(floats(in.x) + (first + i) * s.x_height * s.x_width * s.c_in, s.x_width,
                   pooled + from + i * pixels * s.c_in, argmax + from + i * pixels * s.c_in,
                   s.height, s.width, s.c_in);
      const float* x = argmax ? pooled : floats(in.x);
      make_input(tiles, images, s.c_in, x + from, in.norm, input.data);
      const int64_t after = first + images, next = std::min(step, end - after);
      const int64_t of_x = (argmax ? s.x_height * s.x_width : pixels) * s.c_in;
      const int64_t of_y = pixels * s.c_out;
      work.plan(tiles, images, (s.c_out + GROUP - 1) / GROUP);
      work.soon(floats(in.x), after * of_x, next * of_x);
      work.soon(y, first * of_y, images * of_y);
      float* const here = y + first * of_y;
      BY_CHANNELS(convolve, s.c_in)(s, input.data, U.data, here, images, work);
      if (norm_y) sums(t, images * pixels, here);
    }
  });
  if (norm_y) sums.rows(affine, norm_y);
}

void conv_backward(const Shape& s, const Source& g, const Source& in, const float* weight,
                   const uint8_t* argmax, const Source& extra, float* grad_x, bool nhwc,
                   float* grad_weight, const float* gamma, float* back_x) {
  const Shape back{s.batch, s.height, s.width, s.c_out, s.c_in};
  const float* const x = floats(in.x);
  const Tiles tiles(s);
  const int64_t pixels = s.height * s.width, step = images_at_once(s);
  const int64_t size = 36 * s.c_in * round_up(s.c_out, W);
  const Scratch U(grad_x ? 36 * s.c_out * round_up(s.c_in, W) : 0);
  const Scratch dU(grad_weight ? at::get_num_threads() * size : 0);
  if (grad_x) weight_transform(back, weight, true, U.data);
  Sums sums(s.c_in);
  share(s.batch, [&](int64_t t, int64_t begin, int64_t end) {
    Work work(s);
    float* const dU_here = dU.data + t * size;
    if (grad_weight) std::fill(dU_here, dU_here + size, 0.0f);
    const Zeros grad_y(step * tiles.padded * s.c_out), input(step * tiles.padded * s.c_in);
    const Scratch pooled(grad_x && argmax ? step * pixels * s.c_in : 0);
    for (int64_t first = begin; first < end; first += step) {
      const int64_t images = std::min(step, end - first), from = first * pixels * s.c_in;
      each_padded(tiles, images, s.c_out, [&](int64_t c, int64_t left, auto loop) {
        const Gradient gradient(g, first * pixels * s.c_out, s.c_out, c, left);
        loop([&](int64_t at, int64_t to) { store(grad_y.data + to, gradient(at), left); });
      });
      work.plan(tiles, images, (grad_weight ? 1 : 0) + (grad_x ? (s.c_in + GROUP - 1) / GROUP : 0));
      const int64_t after = first + images, next = std::min(step, end - after);
      const int64_t of_x = pixels * s.c_in, of_y = pixels * s.c_out;
      for (const void* p : {g.x, g.out, g.y}) work.soon(floats(p), after * of_y, next * of_y);
      for (const void* p : {in.x, extra.x, extra.out})
        work.soon(floats(p), after * of_x, next * of_x);
      const int64_t of_grad_x = argmax ? s.x_height * s.x_width * s.c_in : of_x;
      work.soon(grad_x, first * of_grad_x, images * of_grad_x);
      if (grad_weight || in.norm)
        make_input(tiles, images, s.c_in, x + from, in.norm, input.data);
      if (grad_weight)
        BY_CHANNELS(weight_gradient, s.c_in)(s, input.data, grad_y.data, images, dU_here, work);
      if (!grad_x) continue;
      float* const here = argmax ? pooled.data : grad_x + from;
      BY_CHANNELS(convolve, s.c_out)(back, grad_y.data, U.data, here, images, work);
      if (in.norm)
        each_padded(tiles, images, s.c_in, [&](int64_t c, int64_t left, auto loop) {
          const vec center = load(in.norm + CENTER * s.c_in + c, left);
          vec sum = {}, product = {};
          loop([&](int64_t at, int64_t padded) {
            const vec v = relu_backward(load(here + at, left), load(input.data + padded, left));
            sum += v;
            product += v * (load(x + from + at, left) - center);
            store(here + at, v, left);
          });
          sums.add(t, c, sum, product);
        });
      if (extra.x)
        each(images * pixels, s.c_in, [&](int64_t c, int64_t left, auto loop) {
          const Gradient more(extra, from, s.c_in, c, left);
          loop([&](int64_t at) { store(here + at, load(here + at, left) + more(at), left); });
        });
      for (int64_t i = 0; argmax && i < images; i++)
        unpool_image(here + i * pixels * s.c_in, argmax + from + i * pixels * s.c_in,
                     grad_x + (first + i) * s.x_height * s.x_width * s.c_in, s.x_height, s.x_width,
                     s.c_in);
    }
  });
  if (grad_weight) weight_transform_back(s, dU.data, nhwc, grad_weight);
  if (grad_x && in.norm) back_rows(sums, s.batch * pixels, in.norm, gamma, back_x);
}

void moments(int64_t pixels, int64_t channels, const float* y, const Affine& affine, float* norm) {
  Moments sums(channels);
  share(pixels, [&](int64_t t, int64_t begin, int64_t end) {
    if (begin < end) sums(t, end - begin, y + begin * channels);
  });
  sums.rows(affine, norm);
}

void finish(int64_t pixels, int64_t channels, const float* y, const float* norm, const float* r,
            const float* norm_r, float* out) {
  share(pixels, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t from = begin * channels;
    each(end - begin, channels, [&](int64_t c, int64_t left, auto loop) {
      const Normalise of_y(norm, channels, c, left), of_r(norm_r, channels, c, left);
      loop([&](int64_t at) {
        at += from;
        vec v = of_y(load(y + at, left));
        if (r) v += of_r(load(r + at, left));
        store(out + at, relu(v), left);
      });
    });
  });
}

void finish_backward(int64_t pixels, int64_t channels, const Source& grad, const Normed& y,
                     const Normed* r) {
  Sums sums(channels), sums_r(channels);
  share(pixels, [&](int64_t t, int64_t begin, int64_t end) {
    const int64_t from = begin * channels;
    each(end - begin, channels, [&](int64_t c, int64_t left, auto loop) {
      const Gradient gradient(grad, from, channels, c, left);
      const vec center = load(y.norm + CENTER * channels + c, left);
      const vec center_r = r ? load(r->norm + CENTER * channels + c, left) : vec{};
      vec sum = {}, product = {}, product_r = {};
      loop([&](int64_t at) {
        const vec v = gradient(at);
        sum += v;
        product += v * (load(floats(y.y) + from + at, left) - center);
        if (r) product_r += v * (load(floats(r->y) + from + at, left) - center_r);
      });
      sums.add(t, c, sum, product);
      sums_r.add(t, c, sum, product_r);
    });
  });
  back_rows(sums, pixels, y.norm, y.gamma, y.back);
  if (r) back_rows(sums_r, pixels, r->norm, r->gamma, r->back);
}

void apply_backward(int64_t pixels, int64_t channels, const Source& g, float* grad_y) {
  share(pixels, [&](int64_t, int64_t begin, int64_t end) {
    each(end - begin, channels, [&](int64_t c, int64_t left, auto loop) {
      const Gradient gradient(g, begin * channels, channels, c, left);
      loop([&](int64_t at) { store(grad_y + begin * channels + at, gradient(at), left); });
    });
  });
}

}  // namespace cpu
}  // namespace pool_conv
