// The CPU and CUDA kernels as the binding sees them: plain pointers, no torch. NHWC throughout.
#pragma once
#include <cstdint>

namespace pool_conv {

// height and width: of the convolution's input, that is behind the max-pool
struct Shape {
  int64_t batch, height, width, c_in, c_out;
};

// An input that is pooled on the way: `source` (N,source_height,source_width,C) is max-pooled into
// the convolution's input x, and argmax receives 0..3 for each element.
struct PoolFrom {
  const float* source = nullptr;
  int64_t source_height = 0, source_width = 0;
  uint8_t* argmax = nullptr;
};

// The way back: x's gradient, with `extra` (or null) added, goes to the argmax places of `target`.
struct UnpoolTo {
  float* target = nullptr;
  int64_t target_height = 0, target_width = 0;
  const uint8_t* argmax = nullptr;
  const float* extra = nullptr;
};

// y = conv3x3(x), padding 1. weight: (c_out,c_in,3,3); for the gradient of the input
// (flipped = true) the weight is (c_in,c_out,3,3), read transposed and rotated.
void winograd(const Shape& s, float* x, const float* weight, bool flipped, float* y,
              const PoolFrom& pool, const UnpoolTo& unpool);

// grad_weight (c_out,c_in,3,3) of y = conv3x3(x)
void winograd_grad_weight(const Shape& s, const float* x, const float* grad_y, float* grad_weight);

// --- CUDA ---

enum Type { FLOAT32, FLOAT16, BFLOAT16 };

// x_*: the layer's input; height, width: the convolution's input (behind the max-pool); y_*: output
struct Layer {
  int batch, x_height, x_width, height, width, y_height, y_width, c_in, c_out, stride;
};

// Each launches on `stream` (a cudaStream_t) and returns CUDA's message if that failed, else null.
// argmax: null unless the layer max-pools. plain: the reference kernels.
const char* launch_forward(Type type, const Layer& g, bool plain, const void* x, const void* weight,
                           void* y, void* pooled, uint8_t* argmax, void* stream);
// grad_x has the layer input's size; extra (or null): the gradient of `pooled`. With an odd
// x_height or x_width and argmax, grad_x must be zeroed before.
const char* launch_grad_input(Type type, const Layer& g, const void* grad_y, const void* weight,
                              const uint8_t* argmax, const void* extra, void* grad_x, void* stream);
// x: the convolution's input; partial: partial_floats(g) floats of scratch
const char* launch_grad_weight(Type type, const Layer& g, const void* x, const void* grad_y,
                               float* partial, void* result, void* stream);
int64_t partial_floats(const Layer& g);

}  // namespace pool_conv
