// The operators: schema, and what runs on which device. Checks, autograd, fake kernels and the
// rules for autocast and vmap are in __init__.py.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "pool_conv.h"

#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace pool_conv {
namespace {

using at::Tensor;
constexpr int64_t NONE = 0, MAXPOOL = 1, STRIDE = 2;

Tensor nhwc(const Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }
Tensor empty_nhwc(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
}
Shape shape(const Tensor& x, const Tensor& weight) {
  return {x.size(0), x.size(2), x.size(3), weight.size(1), weight.size(0)};
}

// The one place that decides between Winograd and native ops on a CPU. Below 8 channels most of a
// vector is idle, and a stride of 2 leaves Winograd's tiles nothing to save.
bool by_winograd(const Tensor& x, const Tensor& weight, int64_t mode) {
  return x.scalar_type() == at::kFloat && mode != STRIDE && weight.size(0) >= 8 &&
         weight.size(1) >= 8;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor>;
using MaybeTensor = std::optional<Tensor>;

Tensor bytes(at::IntArrayRef sizes, const Tensor& like) {
  auto options = like.options().dtype(at::kByte);
  return at::empty(sizes, sizes.size() == 4 ? options.memory_format(at::MemoryFormat::ChannelsLast)
                                            : options);
}

// (y, pooled, argmax); pooled and argmax are empty unless mode is MAXPOOL. argmax is 0..3 (uint8)
// for Winograd, else ATen's index (int64).
Outputs forward_cpu(const Tensor& x_, const Tensor& weight, int64_t mode) {
  Tensor x = nhwc(x_), none = at::empty({0}, x.options()), index = bytes({0}, x);
  if (!by_winograd(x, weight, mode)) {
    if (mode == MAXPOOL) {
      auto [pooled, argmax] = at::max_pool2d_with_indices(x, {2, 2});
      return {nhwc(at::conv2d(pooled, weight, {}, 1, 1)), nhwc(pooled), nhwc(argmax)};
    }
    return {nhwc(at::conv2d(x, weight, {}, mode == STRIDE ? 2 : 1, 1)), none, index};
  }
  PoolFrom pool;
  Tensor in = x;
  if (mode == MAXPOOL) {
    in = empty_nhwc({x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2}, x);
    index = bytes(in.sizes(), in);
    pool = {x.const_data_ptr<float>(), x.size(2), x.size(3), index.mutable_data_ptr<uint8_t>()};
  }
  Tensor y = empty_nhwc({x.size(0), weight.size(0), in.size(2), in.size(3)}, x);
  winograd(shape(in, weight), in.data_ptr<float>(), weight.contiguous().const_data_ptr<float>(),
           false, y.mutable_data_ptr<float>(), pool, {});
  return {y, mode == MAXPOOL ? in : none, index};
}

// (grad_x, grad_weight), each empty unless wanted. x: the convolution's input, that is `pooled` for
// MAXPOOL; height and width are those of the layer's input.
Gradients backward_cpu(const Tensor& grad_y_, const MaybeTensor& grad_pooled_, const Tensor& x_,
                       const Tensor& weight, const Tensor& argmax, int64_t mode, int64_t height,
                       int64_t width, bool want_x, bool want_weight) {
  Tensor grad_y = nhwc(grad_y_), x = nhwc(x_), none = at::empty({0}, x.options());
  Tensor grad_x = none, grad_weight = none;
  Tensor grad_pooled = grad_pooled_ ? nhwc(*grad_pooled_) : Tensor();
  if (!by_winograd(x, weight, mode)) {
    const int64_t stride = mode == STRIDE ? 2 : 1;
    auto [grad_in, grad_w, _] = at::convolution_backward(
        grad_y, x, weight, at::OptionalIntArrayRef(), {stride, stride}, {1, 1}, {1, 1}, false,
        {0, 0}, 1, {want_x, want_weight, false});
    if (want_x && mode == MAXPOOL) {
      if (grad_pooled.defined()) grad_in = grad_in + grad_pooled;
      Tensor sizes = empty_nhwc({x.size(0), x.size(1), height, width}, x);
      grad_x = nhwc(at::max_pool2d_with_indices_backward(nhwc(grad_in), sizes, {2, 2}, {2, 2},
                                                         {0, 0}, {1, 1}, false, argmax));
    } else if (want_x) {
      grad_x = nhwc(grad_in);
    }
    return {grad_x, want_weight ? grad_w.contiguous() : none};
  }
  const Shape s = shape(x, weight);
  if (want_x) {
    Tensor grad_in = empty_nhwc(x.sizes(), x);
    UnpoolTo unpool;
    if (mode == MAXPOOL) {
      grad_x = empty_nhwc({x.size(0), x.size(1), height, width}, x);
      unpool = {grad_x.mutable_data_ptr<float>(), height, width, argmax.const_data_ptr<uint8_t>(),
                grad_pooled.defined() ? grad_pooled.const_data_ptr<float>() : nullptr};
    } else {
      grad_x = grad_in;
    }
    winograd({s.batch, s.height, s.width, s.c_out, s.c_in}, grad_y.data_ptr<float>(),
             weight.contiguous().const_data_ptr<float>(), true, grad_in.mutable_data_ptr<float>(),
             {}, unpool);
  }
  if (want_weight) {
    grad_weight = at::empty(weight.sizes(), weight.options());
    winograd_grad_weight(s, x.const_data_ptr<float>(), grad_y.const_data_ptr<float>(),
                         grad_weight.mutable_data_ptr<float>());
  }
  return {grad_x, grad_weight};
}

#ifdef WITH_CUDA
Type type_of(const Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                   "pool_conv2d on CUDA takes float32, float16 or bfloat16, not ", type);
  return type == at::kFloat ? FLOAT32 : type == at::kHalf ? FLOAT16 : BFLOAT16;
}
void check(const char* message) { TORCH_CHECK(!message, "pool_conv2d: CUDA says ", message); }
Layer layer(const Tensor& in, const Tensor& weight, int64_t mode, int64_t x_height,
            int64_t x_width) {
  auto size = [](int64_t n) { return static_cast<int>(n); };
  const int stride = mode == STRIDE ? 2 : 1, height = size(in.size(2)), width = size(in.size(3));
  TORCH_CHECK_VALUE(in.size(0) * ((height + 7) / 8) * ((width + 7) / 8) < (int64_t(1) << 31),
                    "pool_conv2d: too many images in one call");
  return {size(in.size(0)), size(x_height), size(x_width), height, width, (height - 1) / stride + 1,
          (width - 1) / stride + 1, size(in.size(1)), size(weight.size(0)), stride};
}

Outputs forward_cuda(const Tensor& x_, const Tensor& weight_, int64_t mode) {
  const c10::cuda::CUDAGuard guard(x_.device());
  Tensor x = nhwc(x_), weight = weight_.contiguous(), pooled = at::empty({0}, x.options());
  Tensor in = x, argmax = bytes({0}, x);
  if (mode == MAXPOOL) {
    in = pooled = empty_nhwc({x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2}, x);
    argmax = bytes(in.sizes(), in);
  }
  const Layer g = layer(in, weight, mode, x.size(2), x.size(3));
  Tensor y = empty_nhwc({g.batch, g.c_out, g.y_height, g.y_width}, x);
  check(launch_forward(type_of(x), g, false, x.const_data_ptr(), weight.const_data_ptr(),
                       y.mutable_data_ptr(), pooled.mutable_data_ptr(),
                       mode == MAXPOOL ? argmax.mutable_data_ptr<uint8_t>() : nullptr,
                       c10::cuda::getCurrentCUDAStream()));
  return {y, pooled, argmax};
}

Gradients backward_cuda(const Tensor& grad_y_, const MaybeTensor& grad_pooled_, const Tensor& x_,
                       const Tensor& weight_, const Tensor& argmax, int64_t mode, int64_t height,
                       int64_t width, bool want_x, bool want_weight) {
  const c10::cuda::CUDAGuard guard(x_.device());
  Tensor grad_y = nhwc(grad_y_), x = nhwc(x_), weight = weight_.contiguous();
  Tensor none = at::empty({0}, x.options());
  Tensor grad_x = none, grad_weight = none;
  Tensor grad_pooled = grad_pooled_ ? nhwc(*grad_pooled_) : Tensor();
  const Layer g = layer(x, weight, mode, height, width);
  void* stream = c10::cuda::getCurrentCUDAStream();
  if (want_x) {
    grad_x = empty_nhwc({g.batch, g.c_in, height, width}, x);
    if (mode == MAXPOOL && (height % 2 || width % 2)) grad_x.zero_();
    check(launch_grad_input(type_of(x), g, grad_y.const_data_ptr(), weight.const_data_ptr(),
                            mode == MAXPOOL ? argmax.const_data_ptr<uint8_t>() : nullptr,
                            grad_pooled.defined() ? grad_pooled.const_data_ptr() : nullptr,
                            grad_x.mutable_data_ptr(), stream));
  }
  if (want_weight) {
    grad_weight = at::empty(weight.sizes(), weight.options());
    Tensor partial = at::empty({partial_floats(g)}, weight.options().dtype(at::kFloat));
    check(launch_grad_weight(type_of(x), g, x.const_data_ptr(), grad_y.const_data_ptr(),
                             partial.mutable_data_ptr<float>(), grad_weight.mutable_data_ptr(),
                             stream));
  }
  return {grad_x, grad_weight};
}
#endif

}  // namespace

TORCH_LIBRARY(pool_conv, m) {
  m.def("forward(Tensor x, Tensor weight, int mode) -> (Tensor y, Tensor pooled, Tensor argmax)");
  m.def("backward(Tensor grad_y, Tensor? grad_pooled, Tensor x, Tensor weight, Tensor argmax, "
        "int mode, SymInt height, SymInt width, bool want_x, bool want_weight) "
        "-> (Tensor grad_x, Tensor grad_weight)");
}
TORCH_LIBRARY_IMPL(pool_conv, CPU, m) {
  m.impl("forward", forward_cpu);
  m.impl("backward", backward_cpu);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(pool_conv, CUDA, m) {
  m.impl("forward", forward_cuda);
  m.impl("backward", backward_cuda);
}
#endif

}  // namespace pool_conv
