// The operators: schema, checks, and what runs on which device. Autograd, fake kernels and the
// rules for autocast and vmap are in __init__.py.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "pool_conv.h"

#ifdef WITH_CUDA
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

// What the max-pool of x writes; empty where the mode is another
std::tuple<Tensor, Tensor> empty_pooled(const Tensor& x, int64_t mode) {
  if (mode != MAXPOOL) return {at::empty({0}, x.options()), bytes({0}, x)};
  Tensor pooled = empty_nhwc({x.size(0), x.size(1), x.size(2) / 2, x.size(3) / 2}, x);
  return {pooled, bytes(pooled.sizes(), x)};
}
// Rows of NormRow or BackRow, or scratch
Tensor rows(int64_t count, int64_t channels, const Tensor& like) {
  return at::empty({count, channels}, like.options().dtype(at::kFloat));
}

// Null for a tensor that is not there
template <typename T = float>
const T* data(const MaybeTensor& x) { return x ? x->const_data_ptr<T>() : nullptr; }

// The arguments of an operator on the image x. Every tensor, x too, goes through `take`: it is on
// the device of x, has the right type and shape, and lies as the kernels read it, images NHWC,
// weights as `of_weight` says, all else contiguous, from a multiple of 16 bytes on. What autograd
// saved may come back in another memory format, and a view may begin anywhere; but where channels
// are a multiple of four, the CUDA kernels read four at once.
constexpr auto NHWC = at::MemoryFormat::ChannelsLast, OIHW = at::MemoryFormat::Contiguous;
struct Arguments {
  const Tensor& x;
  const at::MemoryFormat of_weight;
  const c10::DeviceGuard guard;  // what is allocated and launched is on x's device

  // least: the smallest height and width of x
  explicit Arguments(const Tensor& x, int64_t mode = NONE, at::MemoryFormat of_weight = OIHW,
                     int64_t least = 1)
      : x(x), of_weight(of_weight), guard(x.device()) {
    TORCH_CHECK_VALUE(mode == NONE || mode == MAXPOOL || mode == STRIDE, "no mode ", mode);
    TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) && x.size(2) >= least && x.size(3) >= least,
                      "an image of shape ", x.sizes(), " is empty, or too small for mode ", mode);
  }
  MaybeTensor image(const char* name, const MaybeTensor& t, at::IntArrayRef sizes) const {
    return take(name, t, sizes, x.scalar_type(), at::MemoryFormat::ChannelsLast);
  }
  MaybeTensor weight(const Tensor& t) const {
    TORCH_CHECK_VALUE(t.dim() == 4 && t.size(0), "weight has shape ", t.sizes());
    return take("weight", t, {t.size(0), x.size(1), 3, 3}, x.scalar_type(), of_weight);
  }
  MaybeTensor floats(const char* name, const MaybeTensor& t, at::IntArrayRef sizes) const {
    return take(name, t, sizes, at::kFloat);
  }
  // argmax, where x is the max-pool of an image of height x width; null where it is that image
  MaybeTensor index(const MaybeTensor& t, int64_t mode, int64_t height, int64_t width) const {
    const int64_t by = mode == MAXPOOL ? 2 : 1;
    TORCH_CHECK_VALUE(x.size(2) == height / by && x.size(3) == width / by, "x of shape ",
                      x.sizes(), " does not come from ", height, "x", width, " by mode ", mode);
    if (mode != MAXPOOL) return {};
    TORCH_CHECK_VALUE(t, "a max-pool needs its argmax");
    return take("argmax", t, x.sizes(), t->scalar_type(), at::MemoryFormat::ChannelsLast);
  }

 private:
  MaybeTensor take(const char* name, const MaybeTensor& t, at::IntArrayRef sizes,
                   at::ScalarType type,
                   at::MemoryFormat format = at::MemoryFormat::Contiguous) const {
    if (!t) return t;
    TORCH_CHECK_VALUE(t->device() == x.device(), name, " is on ", t->device(), ", not on ",
                      x.device());
    TORCH_CHECK_TYPE(t->scalar_type() == type, name, " is ", t->scalar_type(), ", not ", type);
    TORCH_CHECK_VALUE(t->sizes() == sizes, name, " has shape ", t->sizes(), ", not ", sizes);
    TORCH_CHECK_VALUE(!t->numel() || t->const_data_ptr(), name, " has no memory");
    const Tensor laid = t->contiguous(format);
    const bool aligned = reinterpret_cast<uintptr_t>(laid.const_data_ptr()) % 16 == 0;
    return aligned ? laid : laid.clone(format);
  }
};

// relu(normalised x), its max-pool or x, convolved: (y, rows of y's normalisation, pooled, argmax),
// empty what was not asked for
using Normalised = std::tuple<Tensor, Tensor, Tensor, Tensor>;
Normalised norm_conv_cpu(
    const Tensor& x, const MaybeTensor& norm, const Tensor& weight, const MaybeTensor& gamma,
    const MaybeTensor& beta, double eps, int64_t mode, bool normalise) {
  TORCH_CHECK_VALUE(mode != STRIDE, "norm_conv: no stride on a CPU");
  const bool pool = mode == MAXPOOL;
  auto [pooled, argmax] = empty_pooled(x, mode);
  Input in{x.const_data_ptr<float>(), data(norm)};
  if (pool) {
    in.pooled = pooled.mutable_data_ptr<float>();
    in.argmax = argmax.mutable_data_ptr<uint8_t>();
    in.x_height = x.size(2), in.x_width = x.size(3);
  }
  const Shape s = shape(pool ? pooled : x, weight);
  Tensor y = empty_nhwc({s.batch, s.c_out, s.height, s.width}, x);
  Tensor norm_y = rows(normalise ? NORM_ROWS : 0, s.c_out, x);
  conv_forward(s, in, weight.const_data_ptr<float>(), y.mutable_data_ptr<float>(),
               {data(gamma), data(beta), eps},
               normalise ? norm_y.mutable_data_ptr<float>() : nullptr);
  return {y, norm_y, pooled, argmax};
}

// (grad_x, grad_weight, rows of the way back through x's normalisation). x: the convolution's input
// or, with `norm`, what it is made of; height, width: before the max-pool, if there is an argmax
Outputs norm_conv_backward_cpu(const Tensor& grad, const MaybeTensor& out, const MaybeTensor& y,
                               const MaybeTensor& back, const Tensor& x, const MaybeTensor& norm,
                               const MaybeTensor& gamma, const Tensor& weight,
                               const MaybeTensor& argmax, const MaybeTensor& extra,
                               const MaybeTensor& extra_out, int64_t mode, int64_t height,
                               int64_t width, bool want_x, bool want_weight) {
  const bool pool = mode == MAXPOOL;
  const Shape s = shape(x, weight);
  Tensor grad_x = at::empty({0}, x.options()), grad_weight = grad_x;
  Tensor back_x = rows(norm && want_x ? BACK_ROWS : 0, s.c_in, x);
  if (want_x)
    grad_x = empty_nhwc({s.batch, s.c_in, pool ? height : s.height, pool ? width : s.width}, x);
  if (want_weight) grad_weight = at::empty(weight.sizes(), weight.options());
  const Input in{x.const_data_ptr<float>(), data(norm), nullptr,
                 pool ? const_cast<uint8_t*>(data<uint8_t>(argmax)) : nullptr, height, width};
  conv_backward(s, {grad.const_data_ptr<float>(), data(out), data(y), data(back)}, in,
           weight.const_data_ptr<float>(), data(extra), data(extra_out),
           want_x ? grad_x.mutable_data_ptr<float>() : nullptr,
           want_weight ? grad_weight.mutable_data_ptr<float>() : nullptr, data(gamma),
           norm && want_x ? back_x.mutable_data_ptr<float>() : nullptr);
  return {grad_x, grad_weight, back_x};
}

int64_t pixels(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

Tensor moments_cpu(const Tensor& y, const MaybeTensor& gamma, const MaybeTensor& beta, double eps) {
  Tensor norm = rows(NORM_ROWS, y.size(1), y);
  moments(pixels(y), y.size(1), y.const_data_ptr<float>(), {data(gamma), data(beta), eps},
          norm.mutable_data_ptr<float>());
  return norm;
}

Tensor finish_cpu(const Tensor& y, const Tensor& norm, const MaybeTensor& r,
                  const MaybeTensor& norm_r) {
  Tensor out = empty_nhwc(y.sizes(), y);
  finish(pixels(y), y.size(1), y.const_data_ptr<float>(), norm.const_data_ptr<float>(), data(r),
         data(norm_r), out.mutable_data_ptr<float>());
  return out;
}

Gradients finish_backward_cpu(const Tensor& grad, const Tensor& out, const Tensor& y,
                              const Tensor& norm, const MaybeTensor& gamma, const MaybeTensor& r,
                              const MaybeTensor& norm_r, const MaybeTensor& gamma_r) {
  Tensor back = rows(BACK_ROWS, y.size(1), y);
  Tensor back_r = rows(norm_r ? BACK_ROWS : 0, y.size(1), y);
  const Normed of_r{data(r), data(norm_r), data(gamma_r), back_r.mutable_data_ptr<float>()};
  finish_backward(pixels(y), y.size(1), grad.const_data_ptr<float>(), out.const_data_ptr<float>(),
                  {y.const_data_ptr<float>(), norm.const_data_ptr<float>(), data(gamma),
                   back.mutable_data_ptr<float>()}, norm_r ? &of_r : nullptr);
  return {back, back_r};
}

Tensor apply_backward_cpu(const Tensor& grad, const MaybeTensor& out, const Tensor& y,
                          const Tensor& back) {
  Tensor grad_y = empty_nhwc(y.sizes(), y);
  apply_backward(pixels(y), y.size(1),
                 {grad.const_data_ptr<float>(), data(out), y.const_data_ptr<float>(),
                  back.const_data_ptr<float>()}, grad_y.mutable_data_ptr<float>());
  return grad_y;
}

// (y, pooled, argmax); pooled and argmax are empty unless mode is MAXPOOL. argmax is 0..3 (uint8)
// for Winograd, else ATen's index (int64).
Outputs forward_cpu(const Tensor& x, const Tensor& weight, int64_t mode) {
  Tensor none = at::empty({0}, x.options()), index = bytes({0}, x);
  if (!by_winograd(x, weight, mode)) {
    if (mode == MAXPOOL) {
      auto [pooled, argmax] = at::max_pool2d_with_indices(x, {2, 2});
      return {nhwc(at::conv2d(pooled, weight, {}, 1, 1)), nhwc(pooled), nhwc(argmax)};
    }
    return {nhwc(at::conv2d(x, weight, {}, mode == STRIDE ? 2 : 1, 1)), none, index};
  }
  auto [y, norm_y, pooled, argmax] = norm_conv_cpu(x, {}, weight, {}, {}, 0, mode, false);
  return {y, pooled, argmax};
}

// (grad_x, grad_weight), each empty unless wanted. x: the convolution's input, that is `pooled` for
// MAXPOOL; height and width are those of the layer's input.
Gradients backward_cpu(const Tensor& grad_y, const MaybeTensor& grad_pooled, const Tensor& x,
                       const Tensor& weight, const MaybeTensor& argmax, int64_t mode,
                       int64_t height, int64_t width, bool want_x, bool want_weight) {
  Tensor none = at::empty({0}, x.options()), grad_x = none;
  if (!by_winograd(x, weight, mode)) {
    const int64_t stride = mode == STRIDE ? 2 : 1;
    auto [grad_in, grad_w, _] = at::convolution_backward(
        grad_y, x, weight, at::OptionalIntArrayRef(), {stride, stride}, {1, 1}, {1, 1}, false,
        {0, 0}, 1, {want_x, want_weight, false});
    if (want_x && mode == MAXPOOL) {
      // ATen writes wherever an index says
      const int64_t *index = data<int64_t>(argmax), places = height * width;
      TORCH_CHECK_VALUE(std::all_of(index, index + argmax->numel(),
                                    [&](int64_t i) { return i >= 0 && i < places; }),
                        "argmax has an index outside of ", height, "x", width);
      if (grad_pooled) grad_in = grad_in + *grad_pooled;
      Tensor sizes = empty_nhwc({x.size(0), x.size(1), height, width}, x);
      grad_x = nhwc(at::max_pool2d_with_indices_backward(nhwc(grad_in), sizes, {2, 2}, {2, 2},
                                                         {0, 0}, {1, 1}, false, *argmax));
    } else if (want_x) {
      grad_x = nhwc(grad_in);
    }
    return {grad_x, want_weight ? grad_w.contiguous() : none};
  }
  auto [by_x, by_weight, _] = norm_conv_backward_cpu(
      grad_y, {}, {}, {}, x, {}, {}, weight, argmax, grad_pooled, {}, mode, height, width, want_x,
      want_weight);
  return {by_x, by_weight};
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
  const int64_t height = in.size(2), width = in.size(3), stride = mode == STRIDE ? 2 : 1;
  constexpr int64_t LIMIT = int64_t(1) << 31;  // tiles, and places in an image, are counted as int
  TORCH_CHECK_VALUE(in.size(0) * ((height + 7) / 8) * ((width + 7) / 8) < LIMIT,
                    "pool_conv2d: too many images in one call");
  TORCH_CHECK_VALUE((height + 8) * (width + 8) * std::max(in.size(1), weight.size(0)) < LIMIT,
                    "pool_conv2d: an image is too large");
  return {size(in.size(0)), size(x_height), size(x_width), size(height), size(width),
          size((height - 1) / stride + 1), size((width - 1) / stride + 1), size(in.size(1)),
          size(weight.size(0)), size(stride)};
}

const void* data_of(const MaybeTensor& x) { return x ? x->const_data_ptr() : nullptr; }

Normalised norm_conv_cuda(const Tensor& x, const MaybeTensor& norm, const Tensor& weight,
                          const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                          int64_t mode, bool normalise) {
  auto [pooled, argmax] = empty_pooled(x, mode);
  const Tensor in = mode == MAXPOOL ? pooled : x;
  const Layer g = layer(in, weight, mode, x.size(2), x.size(3));
  Tensor y = empty_nhwc({g.batch, g.c_out, g.y_height, g.y_width}, x);
  Tensor norm_y = rows(normalise ? NORM_ROWS : 0, g.c_out, x);
  Tensor partial = rows(1, normalise ? forward_partial_floats(g) : 0, x);
  check(launch_forward(type_of(x), g, {x.const_data_ptr(), data(norm)},
                       weight.const_data_ptr(), y.mutable_data_ptr(), pooled.mutable_data_ptr(),
                       mode == MAXPOOL ? argmax.mutable_data_ptr<uint8_t>() : nullptr,
                       {data(gamma), data(beta), eps}, partial.mutable_data_ptr<float>(),
                       normalise ? norm_y.mutable_data_ptr<float>() : nullptr,
                       c10::cuda::getCurrentCUDAStream()));
  return {y, norm_y, pooled, argmax};
}

Outputs norm_conv_backward_cuda(const Tensor& grad, const MaybeTensor& out, const MaybeTensor& y,
                                const MaybeTensor& back, const Tensor& x, const MaybeTensor& norm,
                                const MaybeTensor& gamma, const Tensor& weight,
                                const MaybeTensor& argmax, const MaybeTensor& extra,
                                const MaybeTensor& extra_out, int64_t mode, int64_t height,
                                int64_t width, bool want_x, bool want_weight) {
  const bool pool = mode == MAXPOOL;
  const Layer g = layer(x, weight, mode, pool ? height : x.size(2), pool ? width : x.size(3));
  Tensor grad_x = at::empty({0}, x.options()), grad_weight = grad_x;
  Tensor back_x = rows(norm && want_x ? BACK_ROWS : 0, g.c_in, x);
  const Source of_x{x.const_data_ptr(), data(norm)};
  const Source of_grad{grad.const_data_ptr(), nullptr, data_of(out), data_of(y), data(back)};
  void* stream = c10::cuda::getCurrentCUDAStream();
  if (want_x) {
    grad_x = empty_nhwc({g.batch, g.c_in, g.x_height, g.x_width}, x);
    if (pool && (height % 2 || width % 2)) grad_x.zero_();
    Tensor partial = rows(1, norm ? grad_input_partial_floats(g) : 0, x);
    check(launch_grad_input(type_of(x), g, of_grad, weight.const_data_ptr(),
                            pool ? data<uint8_t>(argmax) : nullptr,
                            {data_of(extra), nullptr, data_of(extra_out)},
                            grad_x.mutable_data_ptr(), of_x, data(gamma),
                            partial.mutable_data_ptr<float>(),
                            norm ? back_x.mutable_data_ptr<float>() : nullptr, stream));
  }
  if (want_weight) {
    grad_weight = at::empty(weight.sizes(), weight.options());
    Tensor partial = rows(1, grad_weight_partial_floats(g), x);
    check(launch_grad_weight(type_of(x), g, of_x, of_grad, partial.mutable_data_ptr<float>(),
                             grad_weight.mutable_data_ptr(), stream));
  }
  return {grad_x, grad_weight, back_x};
}

Outputs forward_cuda(const Tensor& x, const Tensor& weight, int64_t mode) {
  auto [y, norm_y, pooled, argmax] = norm_conv_cuda(x, {}, weight, {}, {}, 0, mode, false);
  return {y, pooled, argmax};
}

Gradients backward_cuda(const Tensor& grad_y, const MaybeTensor& grad_pooled, const Tensor& x,
                        const Tensor& weight, const MaybeTensor& argmax, int64_t mode,
                        int64_t height, int64_t width, bool want_x, bool want_weight) {
  auto [by_x, by_weight, _] =
      norm_conv_backward_cuda(grad_y, {}, {}, {}, x, {}, {}, weight, argmax, grad_pooled, {}, mode,
                              height, width, want_x, want_weight);
  return {by_x, by_weight};
}

Tensor moments_cuda(const Tensor& y, const MaybeTensor& gamma, const MaybeTensor& beta,
                    double eps) {
  Tensor norm = rows(NORM_ROWS, y.size(1), y), partial = rows(PARTIAL_ROWS, y.size(1), y);
  check(launch_moments(pixels(y), y.size(1), y.const_data_ptr<float>(),
                       {data(gamma), data(beta), eps}, partial.mutable_data_ptr<float>(),
                       norm.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return norm;
}

Tensor finish_cuda(const Tensor& y, const Tensor& norm, const MaybeTensor& r,
                   const MaybeTensor& norm_r) {
  Tensor out = empty_nhwc(y.sizes(), y);
  check(launch_finish(pixels(y), y.size(1), y.const_data_ptr<float>(),
                      norm.const_data_ptr<float>(), data(r), data(norm_r),
                      out.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

Gradients finish_backward_cuda(const Tensor& grad, const Tensor& out, const Tensor& y,
                               const Tensor& norm, const MaybeTensor& gamma, const MaybeTensor& r,
                               const MaybeTensor& norm_r, const MaybeTensor& gamma_r) {
  Tensor partial = rows(PARTIAL_ROWS, y.size(1), y);
  auto sums = [&](const Tensor& y, const Tensor& norm, const MaybeTensor& gamma) {
    Tensor back = rows(BACK_ROWS, y.size(1), y);
    check(launch_finish_backward(
        pixels(y), y.size(1), {grad.const_data_ptr(), nullptr, out.const_data_ptr()},
        y.const_data_ptr<float>(), norm.const_data_ptr<float>(), data(gamma),
        partial.mutable_data_ptr<float>(), back.mutable_data_ptr<float>(),
        c10::cuda::getCurrentCUDAStream()));
    return back;
  };
  return {sums(y, norm, gamma), norm_r ? sums(*r, *norm_r, gamma_r) : rows(0, y.size(1), y)};
}

Tensor apply_backward_cuda(const Tensor& grad, const MaybeTensor& out, const Tensor& y,
                           const Tensor& back) {
  Tensor grad_y = empty_nhwc(y.sizes(), y);
  check(launch_apply_backward(
      pixels(y), y.size(1),
      {grad.const_data_ptr(), nullptr, data_of(out), y.const_data_ptr(),
       back.const_data_ptr<float>()},
      grad_y.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return grad_y;
}
#endif

// The operators: their arguments, checked and laid out, go to `run`, the device's function above.

at::DimVector output_sizes(const Tensor& x, const Tensor& weight, int64_t mode) {
  const int64_t stride = mode == STRIDE ? 2 : 1;
  return {x.size(0), weight.size(0), (x.size(2) - 1) / stride + 1, (x.size(3) - 1) / stride + 1};
}

template <auto run, at::MemoryFormat of_weight>
Outputs forward(const Tensor& x, const Tensor& weight, int64_t mode) {
  const Arguments given{x, mode, of_weight, mode == MAXPOOL ? 2 : 1};
  return run(*given.image("x", x, x.sizes()), *given.weight(weight), mode);
}

template <auto run, at::MemoryFormat of_weight>
Gradients backward(const Tensor& grad_y, const MaybeTensor& grad_pooled, const Tensor& x,
                   const Tensor& weight, const Tensor& argmax, int64_t mode, int64_t height,
                   int64_t width, bool want_x, bool want_weight) {
  TORCH_CHECK_VALUE(mode == MAXPOOL || !grad_pooled, "backward: grad_pooled without a max-pool");
  const Arguments given{x, mode, of_weight};
  return run(*given.image("grad_y", grad_y, output_sizes(x, weight, mode)),
             given.image("grad_pooled", grad_pooled, x.sizes()), *given.image("x", x, x.sizes()),
             *given.weight(weight), given.index(argmax, mode, height, width), mode, height, width,
             want_x, want_weight);
}

template <auto run, at::MemoryFormat of_weight>
Normalised norm_conv(const Tensor& x, const MaybeTensor& norm, const Tensor& weight,
                     const MaybeTensor& gamma, const MaybeTensor& beta, double eps, int64_t mode,
                     bool normalise) {
  TORCH_CHECK_VALUE(mode != MAXPOOL || !norm, "norm_conv: a max-pool or a norm, not both");
  const Arguments given{x, mode, of_weight, mode == MAXPOOL ? 2 : 1};
  const int64_t c_in = x.size(1), c_out = weight.size(0);
  return run(*given.image("x", x, x.sizes()), given.floats("norm", norm, {NORM_ROWS, c_in}),
             *given.weight(weight), given.floats("gamma", gamma, {c_out}),
             given.floats("beta", beta, {c_out}), eps, mode, normalise);
}

template <auto run, at::MemoryFormat of_weight>
Outputs norm_conv_backward(const Tensor& grad, const MaybeTensor& out, const MaybeTensor& y,
                           const MaybeTensor& back, const Tensor& x, const MaybeTensor& norm,
                           const MaybeTensor& gamma, const Tensor& weight,
                           const MaybeTensor& argmax, const MaybeTensor& extra,
                           const MaybeTensor& extra_out, int64_t mode, int64_t height,
                           int64_t width, bool want_x, bool want_weight) {
  TORCH_CHECK_VALUE(mode == NONE || (mode == MAXPOOL && !norm),
                    "norm_conv_backward: a max-pool or a norm, not both, and no stride");
  TORCH_CHECK_VALUE(y.has_value() == back.has_value() && (extra || !extra_out),
                    "norm_conv_backward: y and back go together, extra_out needs extra");
  const Arguments given{x, mode, of_weight};
  const int64_t c_in = x.size(1), c_out = weight.size(0);
  const at::DimVector y_sizes = output_sizes(x, weight, mode);
  return run(*given.image("grad", grad, y_sizes), given.image("out", out, y_sizes),
             given.image("y", y, y_sizes), given.floats("back", back, {BACK_ROWS, c_out}),
             *given.image("x", x, x.sizes()), given.floats("norm", norm, {NORM_ROWS, c_in}),
             given.floats("gamma", gamma, {c_in}), *given.weight(weight),
             given.index(argmax, mode, height, width), given.image("extra", extra, x.sizes()),
             given.image("extra_out", extra_out, x.sizes()), mode, height, width, want_x,
             want_weight);
}

template <auto run>
Tensor moments(const Tensor& y, const MaybeTensor& gamma, const MaybeTensor& beta, double eps) {
  TORCH_CHECK_VALUE(y.numel(), "moments: y is empty");
  const Arguments given{y};
  return run(*given.image("y", y, y.sizes()), given.floats("gamma", gamma, {y.size(1)}),
             given.floats("beta", beta, {y.size(1)}), eps);
}

template <auto run>
Tensor finish(const Tensor& y, const Tensor& norm, const MaybeTensor& r,
              const MaybeTensor& norm_r) {
  TORCH_CHECK_VALUE(r || !norm_r, "finish: norm_r needs r");
  const Arguments given{y};
  return run(*given.image("y", y, y.sizes()), *given.floats("norm", norm, {NORM_ROWS, y.size(1)}),
             given.image("r", r, y.sizes()), given.floats("norm_r", norm_r, norm.sizes()));
}

template <auto run>
Gradients finish_backward(const Tensor& grad, const Tensor& out, const Tensor& y,
                          const Tensor& norm, const MaybeTensor& gamma, const MaybeTensor& r,
                          const MaybeTensor& norm_r, const MaybeTensor& gamma_r) {
  TORCH_CHECK_VALUE(r || !norm_r, "finish_backward: norm_r needs r");
  const Arguments given{y};
  return run(*given.image("grad", grad, y.sizes()), *given.image("out", out, y.sizes()),
             *given.image("y", y, y.sizes()), *given.floats("norm", norm, {NORM_ROWS, y.size(1)}),
             given.floats("gamma", gamma, {y.size(1)}), given.image("r", r, y.sizes()),
             given.floats("norm_r", norm_r, norm.sizes()),
             given.floats("gamma_r", gamma_r, {y.size(1)}));
}

template <auto run>
Tensor apply_backward(const Tensor& grad, const MaybeTensor& out, const Tensor& y,
                      const Tensor& back) {
  const Arguments given{y};
  return run(*given.image("grad", grad, y.sizes()), given.image("out", out, y.sizes()),
             *given.image("y", y, y.sizes()), *given.floats("back", back, {BACK_ROWS, y.size(1)}));
}

// No operator has a derivative in forward mode: without this, torch would take it for zero
void refuse_tangents(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                     torch::jit::Stack* stack) {
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size()))
    TORCH_CHECK_NOT_IMPLEMENTED(!value.isTensor() || !value.toTensor()._fw_grad(0).defined(),
                                op.schema().name(), " has no derivative in forward mode");
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

}  // namespace

TORCH_LIBRARY(pool_conv, m) {
  m.def("forward(Tensor x, Tensor weight, int mode) -> (Tensor y, Tensor pooled, Tensor argmax)");
  m.def("backward(Tensor grad_y, Tensor? grad_pooled, Tensor x, Tensor weight, Tensor argmax, "
        "int mode, SymInt height, SymInt width, bool want_x, bool want_weight) "
        "-> (Tensor grad_x, Tensor grad_weight)");
  m.def("norm_conv(Tensor x, Tensor? norm, Tensor weight, Tensor? gamma, Tensor? beta, float eps, "
        "int mode, bool normalise) -> (Tensor y, Tensor norm_y, Tensor pooled, Tensor argmax)");
  m.def("norm_conv_backward(Tensor grad, Tensor? out, Tensor? y, Tensor? back, Tensor x, "
        "Tensor? norm, Tensor? gamma, Tensor weight, Tensor? argmax, Tensor? extra, "
        "Tensor? extra_out, int mode, int height, int width, bool want_x, bool want_weight) "
        "-> (Tensor grad_x, Tensor grad_weight, Tensor back_x)");
  m.def("moments(Tensor y, Tensor? gamma, Tensor? beta, float eps) -> Tensor norm");
  m.def("finish(Tensor y, Tensor norm, Tensor? r, Tensor? norm_r) -> Tensor out");
  m.def("finish_backward(Tensor grad, Tensor out, Tensor y, Tensor norm, Tensor? gamma, Tensor? r, "
        "Tensor? norm_r, Tensor? gamma_r) -> (Tensor back, Tensor back_r)");
  m.def("apply_backward(Tensor grad, Tensor? out, Tensor y, Tensor back) -> Tensor grad_y");
  for (const char* name : {"forward", "backward", "norm_conv", "norm_conv_backward", "moments",
                           "finish", "finish_backward", "apply_backward"})
    m.impl(name, torch::dispatch(c10::DispatchKey::ADInplaceOrView,
                                 torch::CppFunction::makeFromBoxedFunction<&refuse_tangents>()));
}
TORCH_LIBRARY_IMPL(pool_conv, CPU, m) {
  m.impl("forward", forward<forward_cpu, OIHW>);
  m.impl("backward", backward<backward_cpu, OIHW>);
  m.impl("norm_conv", norm_conv<norm_conv_cpu, OIHW>);
  m.impl("norm_conv_backward", norm_conv_backward<norm_conv_backward_cpu, OIHW>);
  m.impl("moments", moments<moments_cpu>);
  m.impl("finish", finish<finish_cpu>);
  m.impl("finish_backward", finish_backward<finish_backward_cpu>);
  m.impl("apply_backward", apply_backward<apply_backward_cpu>);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(pool_conv, CUDA, m) {
  m.impl("forward", forward<forward_cuda, NHWC>);
  m.impl("backward", backward<backward_cuda, NHWC>);
  m.impl("norm_conv", norm_conv<norm_conv_cuda, NHWC>);
  m.impl("norm_conv_backward", norm_conv_backward<norm_conv_backward_cuda, NHWC>);
  m.impl("moments", moments<moments_cuda>);
  m.impl("finish", finish<finish_cuda>);
  m.impl("finish_backward", finish_backward<finish_backward_cuda>);
  m.impl("apply_backward", apply_backward<apply_backward_cuda>);
}
#endif

}  // namespace pool_conv
