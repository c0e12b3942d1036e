// The CPU and CUDA kernels as the binding sees them: plain pointers, no torch. NHWC throughout.
#pragma once
#include <cmath>
#include <cstdint>
#include <functional>

#ifdef __CUDACC__
#define EVERYWHERE __host__ __device__ inline
#else
#define EVERYWHERE inline
#endif

namespace pool_conv {

// A batch normalisation of y with C channels, as rows of C floats:
//   normalised = (y - center) * scale + shift,  scale = gamma * invstd
// center is the mean rounded to a float, offset what that lacks: a mean of 1e3 beside a standard
// deviation of 1e-2 costs no accuracy.
enum NormRow { CENTER, OFFSET, SCALE, SHIFT, INVSTD, VARIANCE, NORM_ROWS };
// The way back, from g, the gradient of `normalised`, also as rows of C floats:
//   gradient of y = g * by_g + (y - center) * by_y + by_1       (CENTER is the first row here too)
enum BackRow { BY_G = 1, BY_Y, BY_1, GRAD_GAMMA, GRAD_BETA, BACK_ROWS };

struct Affine {  // gamma and beta: null for 1 and 0
  const float *gamma = nullptr, *beta = nullptr;
  double eps = 0;
};

// Of some values: how many, their mean, the sum of the squared distances from it
struct Moment {
  double count, mean, square;
  EVERYWHERE void join(const Moment& other) {  // Chan et al. 1979
    if (other.count == 0) return;
    const double apart = other.mean - mean, all = count + other.count;
    square += other.square + apart * apart * count * other.count / all;
    mean += apart * other.count / all;
    count = all;
  }
};

// Rows of the normalisation of channel c
EVERYWHERE void write_norm(const Moment& m, const Affine& affine, int64_t c, int64_t channels,
                           float* norm) {
  const double variance = m.square < 0 ? 0 : m.square / m.count;  // a NaN stays
  const double invstd = 1 / sqrt(variance + affine.eps);
  const double scale = (affine.gamma ? affine.gamma[c] : 1.0) * invstd;
  const float center = m.mean;
  const double offset = m.mean - center;
  norm[CENTER * channels + c] = center;
  norm[OFFSET * channels + c] = offset;
  norm[SCALE * channels + c] = scale;
  norm[SHIFT * channels + c] = (affine.beta ? affine.beta[c] : 0.0) - offset * scale;
  norm[INVSTD * channels + c] = invstd;
  norm[VARIANCE * channels + c] = variance;
}

// Rows of the way back, from the sums of g and of g (y - center) over all pixels
EVERYWHERE void write_back(double sum, double product, double pixels, const float* norm,
                           const float* gamma, int64_t c, int64_t channels, float* back) {
  const double offset = norm[OFFSET * channels + c], invstd = norm[INVSTD * channels + c];
  product = (product - offset * sum) * invstd;  // of g and the normalised y without gamma, beta
  const double by_g = (gamma ? gamma[c] : 1.0) * invstd, by_y = -by_g * invstd * product / pixels;
  back[CENTER * channels + c] = norm[CENTER * channels + c];
  back[BY_G * channels + c] = by_g;
  back[BY_Y * channels + c] = by_y;
  back[BY_1 * channels + c] = -by_g * sum / pixels - by_y * offset;
  back[GRAD_GAMMA * channels + c] = product;
  back[GRAD_BETA * channels + c] = sum;
}

// height and width: of the convolution's input, that is behind the max-pool; x_*: before it
struct Shape {
  int64_t batch, height, width, c_in, c_out, x_height = 0, x_width = 0;
};

// What a kernel reads, element by element: x, or relu(normalised x) with `norm`. Or the gradient x
// of something, where it passed the ReLU that made `out`, and back through y's normalisation with
// `back`.
struct Source {
  const void* x = nullptr;
  const float* norm = nullptr;
  const void *out = nullptr, *y = nullptr;
  const float* back = nullptr;
};

// A tensor to normalise, and where the rows of its way back go
struct Normed {
  const void* y;
  const float *norm, *gamma;
  float* back;
};

// --- on a CPU, float32 ---

namespace cpu {

// y = conv3x3(x), padding 1, or of x's max-pool if argmax is not null; then pooled receives that,
// argmax 0..3 for each of its elements. weight: (c_out,c_in,3,3). norm_y: null or rows to fill
void conv_forward(const Shape& s, const Source& x, const float* weight, float* y, float* pooled,
                  uint8_t* argmax, const Affine& affine, float* norm_y);

// Gradients of the weight (if nhwc as (c_out,3,3,c_in)) and of the layer's input, each null if not
// wanted. x: the convolution's input. Its gradient contains in addition that of a shortcut from it,
// `extra`, and with x.norm is that of `normalised`, whose rows for the way on go to back_x.
void conv_backward(const Shape& s, const Source& grad_y, const Source& x, const float* weight,
                   const uint8_t* argmax, const Source& extra, float* grad_x, bool nhwc,
                   float* grad_weight, const float* gamma, float* back_x);

// The rows of y's normalisation
void moments(int64_t pixels, int64_t channels, const float* y, const Affine& affine, float* norm);
// out = relu(normalised y + r), r: null, a tensor, or a tensor to normalise
void finish(int64_t pixels, int64_t channels, const float* y, const float* norm, const float* r,
            const float* norm_r, float* out);
// The way back through `finish` to the rows of one or two normalisations
void finish_backward(int64_t pixels, int64_t channels, const Source& grad, const Normed& y,
                     const Normed* r);
// grad_y of what `grad` describes
void apply_backward(int64_t pixels, int64_t channels, const Source& grad, float* grad_y);

}  // namespace cpu

// --- CUDA ---

// TF32: float32 tensors, whose convolutions may round what they multiply to TF32
enum Type { FLOAT32, TF32, FLOAT16, BFLOAT16 };

// Of which type the tensors are, the cudaStream_t to launch on, and whom to ask for memory of so
// many floats, which is free again when the stream has come so far
struct Launch {
  Type type;
  void* stream;
  std::function<float*(int64_t)> scratch;
};

int64_t grad_weight_partial_floats(const Shape& g);  // scratch for the gradient of a weight

// The same functions. Each returns CUDA's message if a launch failed, else null. Weights are NHWC,
// too: (c_out,3,3,c_in). A tensor whose channels are a multiple of four begins at a multiple of 16
// bytes. With an odd x_height or x_width and argmax, grad_x must be zeroed before.
namespace cuda {

const char* conv_forward(const Launch& on, const Shape& g, const Source& x, const void* weight,
                         void* y, void* pooled, uint8_t* argmax, const Affine& affine,
                         float* norm_y);
const char* conv_backward(const Launch& on, const Shape& g, const Source& grad_y, const Source& x,
                          const void* weight, const uint8_t* argmax, const Source& extra,
                          void* grad_x, bool nhwc, void* grad_weight, const float* gamma,
                          float* back_x);
const char* moments(const Launch& on, int64_t pixels, int64_t channels, const void* y,
                    const Affine& affine, float* norm);
const char* finish(const Launch& on, int64_t pixels, int64_t channels, const void* y,
                   const float* norm, const void* r, const float* norm_r, void* out);
const char* finish_backward(const Launch& on, int64_t pixels, int64_t channels, const Source& grad,
                            const Normed& y, const Normed* r);
const char* apply_backward(const Launch& on, int64_t pixels, int64_t channels, const Source& grad,
                           void* grad_y);

}  // namespace cuda
}  // namespace pool_conv
