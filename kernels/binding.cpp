// The operators: schema, checks, memory for the results, and which kernels run. Autograd, fake
// kernels and the rules for autocast and vmap are in __init__.py.
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
using MaybeTensor = std::optional<Tensor>;
constexpr int64_t NONE = 0, MAXPOOL = 1, STRIDE = 2;
constexpr auto NHWC = at::MemoryFormat::ChannelsLast, OIHW = at::MemoryFormat::Contiguous;

#ifdef WITH_CUDA
void* stream() { return c10::cuda::getCurrentCUDAStream(); }
#else
void* stream() { return nullptr; }
#endif
void check(const char* message) { TORCH_CHECK(!message, "pool_conv: CUDA says ", message); }
// The function of this name, which has the same arguments on a CPU and for CUDA
#define RUN(function, ...)                              \
  given.check_type();                                   \
  if constexpr (CUDA)                                   \
    check(cuda::function(given.launch(), __VA_ARGS__)); \
  else                                                  \
    cpu::function(__VA_ARGS__)

Tensor nhwc(const Tensor& x) { return x.contiguous(NHWC); }
Tensor empty_nhwc(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.options().memory_format(NHWC));
}
Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }
// Rows of NormRow or BackRow
Tensor rows(int64_t count, int64_t channels, const Tensor& like) {
  return at::empty({count, channels}, like.options().dtype(at::kFloat));
}
// How a weight lies, and its gradient, too: autograd would copy another one
at::MemoryFormat layout(const Tensor& weight) {
  return !weight.is_contiguous() && weight.is_contiguous(NHWC) ? NHWC : OIHW;
}

// Where kernels write; null for an empty tensor. Kernels of other types than float take it as void*
float* fill(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
uint8_t* fill_bytes(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }

// The arguments of an operator on the image x, for the kernels on a CPU or those for CUDA. Every
// tensor, x too, goes through `take`: it is on the device of x, has the right type and shape, and
// lies as the kernels read it. Images are NHWC, weights OIHW (for CUDA NHWC), all else contiguous;
// all begin at a multiple of 16 bytes. What autograd saved may come back in another memory format,
// and a view may begin anywhere; but where channels are a multiple of four, the CUDA kernels read
// four at once. The pointers are valid as long as this, and null for a tensor that is not there.
template <bool CUDA>
class Arguments {
 public:
  static constexpr auto OF_WEIGHT = CUDA ? NHWC : OIHW;

  // least: the smallest height and width of x
  explicit Arguments(const Tensor& x, int64_t mode = NONE, int64_t least = 1, bool tf32 = false)
      : x(x), tf32(tf32), guard(x.device()) {
    TORCH_CHECK_VALUE(mode == NONE || mode == MAXPOOL || mode == STRIDE, "no mode ", mode);
    TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) && x.size(2) >= least && x.size(3) >= least,
                      "an image of shape ", x.sizes(), " is empty, or too small for mode ", mode);
  }
  const float* image(const char* name, const MaybeTensor& t, at::IntArrayRef sizes) {
    return static_cast<const float*>(take(name, t, sizes, x.scalar_type(), NHWC));
  }
  const float* image() { return image("x", x, x.sizes()); }
  const float* weight(const Tensor& t) {
    TORCH_CHECK_VALUE(t.dim() == 4 && t.size(0), "weight has shape ", t.sizes());
    return static_cast<const float*>(
        take("weight", t, {t.size(0), x.size(1), 3, 3}, x.scalar_type(), OF_WEIGHT));
  }
  const float* floats(const char* name, const MaybeTensor& t, at::IntArrayRef sizes) {
    return static_cast<const float*>(take(name, t, sizes, at::kFloat));
  }
  // argmax, where x is the max-pool of an image of height x width; null where it is that image
  const uint8_t* index(const MaybeTensor& t, int64_t mode, int64_t height, int64_t width,
                       at::ScalarType type = at::kByte) {
    const int64_t by = mode == MAXPOOL ? 2 : 1;
    TORCH_CHECK_VALUE(x.size(2) == height / by && x.size(3) == width / by, "x of shape ",
                      x.sizes(), " does not come from ", height, "x", width, " by mode ", mode);
    if (mode != MAXPOOL) return nullptr;
    TORCH_CHECK_VALUE(t, "a max-pool needs its argmax");
    return static_cast<const uint8_t*>(take("argmax", t, x.sizes(), type, NHWC));
  }
  void check_type() const {
    const auto type = x.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || (CUDA && (type == at::kHalf || type == at::kBFloat16)),
                     type, ": the kernels take float32, on CUDA also float16 and bfloat16");
  }
  Launch launch() {
    const auto type = x.scalar_type();
    return {type == at::kHalf ? FLOAT16 : type == at::kBFloat16 ? BFLOAT16 : tf32 ? TF32 : FLOAT32,
            stream(), [this](int64_t floats) {
              kept.push_back(rows(1, floats, x));
              return fill(kept.back());
            }};
  }

 private:
  const void* take(const char* name, const MaybeTensor& t, at::IntArrayRef sizes,
                   at::ScalarType type, at::MemoryFormat format = OIHW) {
    if (!t) return nullptr;
    TORCH_CHECK_VALUE(t->device() == x.device(), name, " is on ", t->device(), ", not on ",
                      x.device());
    TORCH_CHECK_TYPE(t->scalar_type() == type, name, " is ", t->scalar_type(), ", not ", type);
    TORCH_CHECK_VALUE(t->sizes() == sizes, name, " has shape ", t->sizes(), ", not ", sizes);
    TORCH_CHECK_VALUE(!t->numel() || t->const_data_ptr(), name, " has no memory");
    Tensor laid = t->contiguous(format);
    if (reinterpret_cast<uintptr_t>(laid.const_data_ptr()) % 16) laid = laid.clone(format);
    kept.push_back(laid);
    return laid.const_data_ptr();
  }
  const Tensor& x;
  const bool tf32;
  const c10::DeviceGuard guard;  // what is allocated and launched is on x's device
  c10::SmallVector<Tensor, 12> kept;
};

// x_height, x_width: before a max-pool
template <bool CUDA>
Shape shape(const Tensor& weight, int64_t batch, int64_t x_height, int64_t x_width, int64_t mode) {
  const int64_t by = mode == MAXPOOL ? 2 : 1, height = x_height / by, width = x_width / by;
  const Shape s{batch, height, width, weight.size(1), weight.size(0), x_height, x_width};
  constexpr int64_t LIMIT = int64_t(1) << 30;  // CUDA counts tiles, and places in an image, as int
  TORCH_CHECK_VALUE(!CUDA || batch * ((height + 7) / 8) * ((width + 7) / 8) < LIMIT,
                    "too many images in one call");
  TORCH_CHECK_VALUE(
      !CUDA || (height + 8) * (width + 8) * std::max(s.c_in, s.c_out) < 2 * LIMIT,
      "an image is too large");
  return s;
}
int64_t pixels(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }
int64_t step(int64_t mode) { return mode == STRIDE ? 2 : 1; }
at::DimVector output_sizes(const Tensor& x, const Tensor& weight, int64_t mode) {
  return {x.size(0), weight.size(0), (x.size(2) - 1) / step(mode) + 1,
          (x.size(3) - 1) / step(mode) + 1};
}

template <bool CUDA>
Tensor moments(const Tensor& y, const MaybeTensor& gamma, const MaybeTensor& beta, double eps) {
  TORCH_CHECK_VALUE(y.numel(), "moments: y is empty");
  Arguments<CUDA> given(y);
  const int64_t c = y.size(1);
  const float* from = given.image("y", y, y.sizes());
  const Affine affine{given.floats("gamma", gamma, {c}), given.floats("beta", beta, {c}), eps};
  Tensor norm = rows(NORM_ROWS, c, y);
  RUN(moments, pixels(y), c, from, affine, fill(norm));
  return norm;
}

template <bool CUDA>
Tensor finish(const Tensor& y, const Tensor& norm, const MaybeTensor& r,
              const MaybeTensor& norm_r) {
  TORCH_CHECK_VALUE(r || !norm_r, "finish: norm_r needs r");
  Arguments<CUDA> given(y);
  const int64_t c = y.size(1);
  const float* from = given.image("y", y, y.sizes());
  const float* by = given.floats("norm", norm, {NORM_ROWS, c});
  const float* more = given.image("r", r, y.sizes());
  const float* by_r = given.floats("norm_r", norm_r, {NORM_ROWS, c});
  Tensor out = empty_nhwc(y.sizes(), y);
  RUN(finish, pixels(y), c, from, by, more, by_r, fill(out));
  return out;
}

template <bool CUDA>
std::tuple<Tensor, Tensor> finish_backward(
    const Tensor& grad, const Tensor& out, const Tensor& y, const Tensor& norm,
    const MaybeTensor& gamma, const MaybeTensor& r, const MaybeTensor& norm_r,
    const MaybeTensor& gamma_r) {
  TORCH_CHECK_VALUE(r || !norm_r, "finish_backward: norm_r needs r");
  Arguments<CUDA> given(y);
  const int64_t c = y.size(1);
  const Source of_grad{given.image("grad", grad, y.sizes()), nullptr,
                       given.image("out", out, y.sizes())};
  Tensor back = rows(BACK_ROWS, c, y), back_r = rows(norm_r ? BACK_ROWS : 0, c, y);
  const Normed of_y{given.image("y", y, y.sizes()), given.floats("norm", norm, {NORM_ROWS, c}),
                    given.floats("gamma", gamma, {c}), fill(back)};
  const Normed of_r{given.image("r", r, y.sizes()), given.floats("norm_r", norm_r, {NORM_ROWS, c}),
                    given.floats("gamma_r", gamma_r, {c}), fill(back_r)};
  RUN(finish_backward, pixels(y), c, of_grad, of_y, norm_r ? &of_r : nullptr);
  return {back, back_r};
}

template <bool CUDA>
Tensor apply_backward(const Tensor& grad, const MaybeTensor& out, const Tensor& y,
                      const Tensor& back) {
  Arguments<CUDA> given(y);
  const int64_t c = y.size(1);
  const Source of_grad{given.image("grad", grad, y.sizes()), nullptr,
                       given.image("out", out, y.sizes()), given.image("y", y, y.sizes()),
                       given.floats("back", back, {BACK_ROWS, c})};
  Tensor grad_y = empty_nhwc(y.sizes(), y);
  RUN(apply_backward, pixels(y), c, of_grad, fill(grad_y));
  return grad_y;
}

// relu(normalised x), its max-pool or x, convolved: (y, rows of y's normalisation, pooled, argmax),
// empty what was not asked for
template <bool CUDA>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_conv(
    const Tensor& x, const MaybeTensor& norm, const Tensor& weight, const MaybeTensor& gamma,
    const MaybeTensor& beta, double eps, int64_t mode, bool normalise, bool tf32) {
  const bool pool = mode == MAXPOOL;
  TORCH_CHECK_VALUE(!pool || !norm, "norm_conv: a max-pool or a norm, not both");
  Arguments<CUDA> given(x, mode, pool ? 2 : 1, tf32);
  const Source of_x{given.image(), given.floats("norm", norm, {NORM_ROWS, x.size(1)})};
  const float* by = given.weight(weight);
  const int64_t c_out = weight.size(0);
  const Affine affine{given.floats("gamma", gamma, {c_out}), given.floats("beta", beta, {c_out}),
                      eps};
  Tensor pooled = nothing(x), argmax = nothing(x).to(at::kByte);
  if (mode == STRIDE) {  // by torch's convolution
    const Tensor in = norm ? finish<CUDA>(x, *norm, {}, {}) : nhwc(x);
    Tensor y = nhwc(at::conv2d(in, weight, {}, 2, 1));
    return {y, normalise ? moments<CUDA>(y, gamma, beta, eps) : rows(0, c_out, x), pooled, argmax};
  }

  const Shape s = shape<CUDA>(weight, x.size(0), x.size(2), x.size(3), mode);
  if (pool) {
    pooled = empty_nhwc({s.batch, s.c_in, s.height, s.width}, x);
    argmax = at::empty_like(pooled, at::kByte);
  }
  Tensor y = empty_nhwc({s.batch, s.c_out, s.height, s.width}, x);
  Tensor norm_y = rows(normalise ? NORM_ROWS : 0, s.c_out, x);
  RUN(conv_forward, s, of_x, by, fill(y), fill(pooled), fill_bytes(argmax), affine, fill(norm_y));
  return {y, norm_y, pooled, argmax};
}

// (grad_x, grad_weight, rows of the way back through x's normalisation). x: the convolution's input
// or, with `norm`, what it is made of; height, width: before the max-pool, if there is one
template <bool CUDA>
std::tuple<Tensor, Tensor, Tensor> norm_conv_backward(
    const Tensor& grad, const MaybeTensor& out, const MaybeTensor& y, const MaybeTensor& back,
    const Tensor& x, const MaybeTensor& norm, const MaybeTensor& gamma, const Tensor& weight,
    const MaybeTensor& argmax, const MaybeTensor& extra, const MaybeTensor& extra_out, int64_t mode,
    int64_t height, int64_t width, bool want_x, bool want_weight, bool tf32) {
  TORCH_CHECK_VALUE(mode != STRIDE && (mode != MAXPOOL || !norm),
                    "norm_conv_backward: a max-pool or a norm, not both, and no stride");
  TORCH_CHECK_VALUE(y.has_value() == back.has_value() && (extra || !extra_out),
                    "norm_conv_backward: y and back go together, extra_out needs extra");
  Arguments<CUDA> given(x, mode, 1, tf32);
  const float* by = given.weight(weight);
  const int64_t c_in = x.size(1), c_out = weight.size(0);
  const at::DimVector y_sizes = output_sizes(x, weight, mode);
  const Source of_grad{given.image("grad", grad, y_sizes), nullptr,
                       given.image("out", out, y_sizes), given.image("y", y, y_sizes),
                       given.floats("back", back, {BACK_ROWS, c_out})};
  const Source of_x{given.image(), given.floats("norm", norm, {NORM_ROWS, c_in})};
  const Source more{given.image("extra", extra, x.sizes()), nullptr,
                    given.image("extra_out", extra_out, x.sizes())};
  const float* by_gamma = given.floats("gamma", gamma, {c_in});
  const uint8_t* index = given.index(argmax, mode, height, width);

  const Shape s = shape<CUDA>(weight, x.size(0), height, width, mode);
  Tensor grad_x = nothing(x), grad_weight = nothing(x);
  if (want_x) grad_x = empty_nhwc({s.batch, c_in, height, width}, x);
  if (want_weight)
    grad_weight = at::empty(weight.sizes(), x.options().memory_format(layout(weight)));
  Tensor back_x = rows(norm && want_x ? BACK_ROWS : 0, c_in, x);
  if (CUDA && want_x && index && (height % 2 || width % 2)) grad_x.zero_();
  RUN(conv_backward, s, of_grad, of_x, by, index, more, fill(grad_x), layout(weight) == NHWC,
      fill(grad_weight), by_gamma, fill(back_x));
  return {grad_x, grad_weight, back_x};
}

// The one place that decides between our kernels and torch's. On a CPU ours is Winograd: below 8
// channels most of a vector is idle. A stride of 2 leaves Winograd's tiles nothing to save, and
// there is nothing to fuse.
template <bool CUDA>
bool is_ours(const Tensor& x, const Tensor& weight, int64_t mode) {
  return mode != STRIDE && (CUDA || (x.scalar_type() == at::kFloat && weight.size(0) >= 8 &&
                                     weight.size(1) >= 8));
}

// (y, pooled, argmax); pooled and argmax are empty unless mode is MAXPOOL. argmax is 0..3 (uint8)
// for our kernels, else ATen's index (int64).
template <bool CUDA>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, int64_t mode,
                                           bool tf32) {
  Arguments<CUDA> given(x, mode, mode == MAXPOOL ? 2 : 1);
  given.weight(weight);
  if (is_ours<CUDA>(x, weight, mode)) {
    auto [y, norm_y, pooled, argmax] =
        norm_conv<CUDA>(x, {}, weight, {}, {}, 0, mode, false, tf32);
    return {y, pooled, argmax};
  }
  Tensor pooled = nothing(x), argmax = nothing(x).to(at::kByte), in = nhwc(x);
  if (mode == MAXPOOL) {
    std::tie(in, argmax) = at::max_pool2d_with_indices(in, {2, 2});
    pooled = nhwc(in), argmax = nhwc(argmax);
  }
  const Tensor by = weight.contiguous(given.OF_WEIGHT);
  return {nhwc(at::conv2d(in, by, {}, step(mode), 1)), pooled, argmax};
}

// (grad_x, grad_weight), each empty unless wanted. x: the convolution's input, that is `pooled` for
// MAXPOOL; height and width are those of the layer's input.
template <bool CUDA>
std::tuple<Tensor, Tensor> backward(
    const Tensor& grad_y, const MaybeTensor& grad_pooled, const Tensor& x, const Tensor& weight,
    const Tensor& argmax, int64_t mode, int64_t height, int64_t width, bool want_x,
    bool want_weight, bool tf32) {
  TORCH_CHECK_VALUE(mode == MAXPOOL || !grad_pooled, "backward: grad_pooled without a max-pool");
  Arguments<CUDA> given(x, mode);
  given.weight(weight);
  if (is_ours<CUDA>(x, weight, mode)) {
    auto [by_x, by_weight, back_x] = norm_conv_backward<CUDA>(
        grad_y, {}, {}, {}, x, {}, {}, weight, argmax, grad_pooled, {}, mode, height, width,
        want_x, want_weight, tf32);
    return {by_x, by_weight};
  }
  given.image("grad_y", grad_y, output_sizes(x, weight, mode));
  given.image("grad_pooled", grad_pooled, x.sizes());
  given.index(argmax, mode, height, width, at::kLong);
  auto [grad_x, grad_weight, grad_bias] = at::convolution_backward(
      nhwc(grad_y), nhwc(x), weight.contiguous(given.OF_WEIGHT), at::OptionalIntArrayRef(),
      {step(mode), step(mode)}, {1, 1}, {1, 1}, false, {0, 0}, 1, {want_x, want_weight, false});
  if (want_x && mode == MAXPOOL) {
    // ATen writes wherever an index says
    const Tensor index = nhwc(argmax);
    const int64_t *at = index.const_data_ptr<int64_t>(), places = height * width;
    TORCH_CHECK_VALUE(std::all_of(at, at + index.numel(),
                                  [&](int64_t i) { return i >= 0 && i < places; }),
                      "argmax has an index outside of ", height, "x", width);
    if (grad_pooled) grad_x = grad_x + nhwc(*grad_pooled);
    Tensor sizes = empty_nhwc({x.size(0), x.size(1), height, width}, x);
    grad_x = at::max_pool2d_with_indices_backward(nhwc(grad_x), sizes, {2, 2}, {2, 2}, {0, 0},
                                                  {1, 1}, false, index);
  }
  return {want_x ? nhwc(grad_x) : nothing(x),
          want_weight ? grad_weight.contiguous(layout(weight)) : nothing(x)};
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
  m.def("forward(Tensor x, Tensor weight, int mode, bool tf32=False) "
        "-> (Tensor y, Tensor pooled, Tensor argmax)");
  m.def("backward(Tensor grad_y, Tensor? grad_pooled, Tensor x, Tensor weight, Tensor argmax, "
        "int mode, SymInt height, SymInt width, bool want_x, bool want_weight, bool tf32=False) "
        "-> (Tensor grad_x, Tensor grad_weight)");
  m.def("norm_conv(Tensor x, Tensor? norm, Tensor weight, Tensor? gamma, Tensor? beta, float eps, "
        "int mode, bool normalise, bool tf32=False) "
        "-> (Tensor y, Tensor norm_y, Tensor pooled, Tensor argmax)");
  m.def("norm_conv_backward(Tensor grad, Tensor? out, Tensor? y, Tensor? back, Tensor x, "
        "Tensor? norm, Tensor? gamma, Tensor weight, Tensor? argmax, Tensor? extra, "
        "Tensor? extra_out, int mode, int height, int width, bool want_x, bool want_weight, "
        "bool tf32=False) -> (Tensor grad_x, Tensor grad_weight, Tensor back_x)");
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
  m.impl("forward", forward<false>);
  m.impl("backward", backward<false>);
  m.impl("norm_conv", norm_conv<false>);
  m.impl("norm_conv_backward", norm_conv_backward<false>);
  m.impl("moments", moments<false>);
  m.impl("finish", finish<false>);
  m.impl("finish_backward", finish_backward<false>);
  m.impl("apply_backward", apply_backward<false>);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(pool_conv, CUDA, m) {
  m.impl("forward", forward<true>);
  m.impl("backward", backward<true>);
  m.impl("norm_conv", norm_conv<true>);
  m.impl("norm_conv_backward", norm_conv_backward<true>);
  m.impl("moments", moments<true>);
  m.impl("finish", finish<true>);
  m.impl("finish_backward", finish_backward<true>);
  m.impl("apply_backward", apply_backward<true>);
}
#endif

}  // namespace pool_conv
