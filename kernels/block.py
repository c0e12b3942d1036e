"""A ResNet's layers with batch normalisation, ReLU and residual add, fused where that is possible.

    from kernels import basic_block, stem

Normalised activations are never stored. While a convolution writes its output, it also sums what
the normalisation behind it needs; the next convolution normalises that output again as it reads it,
forward and backward. T is one pass over a tensor of the block's size. On a CPU an identity block
takes

    forward   conv1 2 T, conv2 2 T, end (normalise, add, ReLU) 3 T
    backward  sums for norm2 3 T, conv2 5 T, conv1 6 T                     21 T in all

where separate operators take 17 T and 27 T. For the backward pass torch keeps 6 T, this 4 T.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn import BatchNorm2d, Conv2d, Module, Sequential
from torch.nn.modules.module import _has_any_global_hook

from . import MODES, allows_tf32, check_mode, has_kernels, load, pool_conv2d

ops = torch.ops.pool_conv
HALF = (torch.float16, torch.bfloat16)
GRAD_AFFINE = slice(4, 6)  # rows of the gradients of gamma and beta (BackRow in pool_conv.h)


def stem(x: torch.Tensor, conv: Module, norm: Module) -> torch.Tensor:
    """relu(norm(conv(x))), for any modules. A BatchNorm2d is fused with the ReLU."""
    y = conv(x)
    if not _can_fuse(y, [], [norm]):
        return F.relu(norm(y))
    load()
    y = y.contiguous(memory_format=torch.channels_last)
    return _NormReLU.apply(y, norm, norm.weight, norm.bias)


def basic_block(x: torch.Tensor, conv1: Module, norm1: Module, conv2: Module, norm2: Module,
                shortcut: Module | None = None, downsample: str = "none") -> torch.Tensor:
    """relu(norm2(conv2(relu(norm1(conv1(p))))) + shortcut(p)), where p is x, for "maxpool"
    maxpool2x2(x). "stride": conv1 has twice its stride in this call, and the shortcut starts from
    every second pixel of every second row. For any modules; README.md says which are fused.

    x: (N,C_in,H,W); shortcut: None or empty for the identity. Running statistics are kept as torch
    keeps them. Raises as `pool_conv2d` and the modules do.
    """
    check_mode(downsample)
    if not _can_fuse(x, [conv1, conv2], [norm1, norm2], shortcut, downsample):
        y, p = pool_conv(x, conv1, downsample)
        y, _ = pool_conv(F.relu(norm1(y)), conv2)
        if downsample == "stride":
            p = p[:, :, ::2, ::2]
        return F.relu(norm2(y) + (p if shortcut is None else shortcut(p)))

    load()
    norms = [norm1, norm2, shortcut[1]] if shortcut else [norm1, norm2]
    weight_s = _cast(shortcut[0].weight) if shortcut else None
    affine = []
    for norm in norms:
        affine += [norm.weight, norm.bias]
    return _BasicBlock.apply(_cast(x), _cast(conv1.weight), _cast(conv2.weight), weight_s,
                             MODES[downsample], norms, *affine)


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    """Cast the input or the weight of a convolution as autocast does; all else stays float32."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _can_fuse(x: torch.Tensor, convs: list[Module], norms: list[Module],
              shortcut: Module | None = None, downsample: str = "none") -> bool:
    """Whether a block or a stem is fused; this is decided nowhere else. It is fused if the kernels
    compute what its modules compute, and nobody waits for one of these to be called."""
    if torch.compiler.is_compiling() or downsample == "stride":  # not traceable; no such kernel
        return False
    sizes = [3] * len(convs)
    if shortcut is not None:
        if not _is_plain(shortcut, Sequential) or len(shortcut) not in (0, 2):
            return False
        modules = list(shortcut)
        convs = convs + modules[:1]
        norms = norms + modules[1:]
        sizes.append(1)
    return (_is_plain_tensor(x)
            and x.device.type in ("cpu", "cuda")  # on "meta" torch counts operations
            and has_kernels(x.device)
            and _has_type(x)
            and _has_statistics(x, downsample)
            and all(map(_is_plain_conv, convs, sizes))
            and all(_is_plain(norm, BatchNorm2d) and (norm.weight is None) == (norm.bias is None)
                    for norm in norms)
            and min(norm.num_features for norm in norms) >= 8  # below, most of a vector is idle
            # with other channels torch broadcasts the residual add, or raises
            and (shortcut or all(len(conv.weight) == x.shape[1] for conv in convs))
            # the kernels have no derivative for a normalisation by running statistics
            and (all(map(_uses_batch, norms)) or not torch.is_grad_enabled()))


def _has_statistics(x: torch.Tensor, downsample: str) -> bool:
    """Batch norm needs two values or more a channel; empty batches are left to torch."""
    by = 2 if downsample == "maxpool" else 1
    return x.dim() == 4 and len(x) * (x.shape[2] // by) * (x.shape[3] // by) > 1


def _has_type(x: torch.Tensor) -> bool:
    """float32; on a GPU, under autocast, also the types that it casts to."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype == torch.float32
    return (x.is_cuda and x.dtype in (torch.float32, *HALF)
            and torch.get_autocast_dtype("cuda") in HALF)


def _is_plain_tensor(x: torch.Tensor) -> bool:
    """Whether x is no subclass, such as a fake tensor, and nothing is active that has to look into
    the operators: a transform of torch.func, forward-mode differentiation, torch.jit.trace."""
    return (type(x) in (torch.Tensor, torch.nn.Parameter)
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0 and not torch.jit.is_tracing())


def _is_plain(module: Module, kind: type) -> bool:
    """Whether the module is torch's own and a call of it runs its `forward` and nothing else. A
    module that is pruned, parametrised or watched has hooks or another type."""
    own = vars(module)  # not its keys(): torch.compile of 2.11 cannot trace them
    return (type(module) is kind and "forward" not in own and "_conv_forward" not in own
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                     or module._backward_pre_hooks or _has_any_global_hook()))


def _is_plain_conv(conv: Module, size: int) -> bool:
    """Whether it is a convolution by size x size, without a bias, that keeps the image's size."""
    return (_is_plain(conv, Conv2d) and conv.weight.shape[2:] == (size, size)
            and conv.padding == (size // 2, size // 2) and conv.padding_mode == "zeros"
            and conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.bias is None)


def pool_conv(x: torch.Tensor, conv: Module,
              downsample: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """(conv(p), p). p is maxpool2x2(x) for "maxpool", else x. For "stride", conv has twice its
    stride in this call. `pool_conv2d` does it where it computes what the module would, else the
    module is called."""
    has_type = x.device.type == "cpu" or x.is_cuda and x.dtype != torch.float64
    looks_plain = torch.compiler.is_compiling() or _is_plain_tensor(x)  # pool_conv2d can be traced
    if has_type and looks_plain and _is_plain_conv(conv, 3):
        return pool_conv2d(x, conv.weight, downsample)
    p = F.max_pool2d(x, 2) if downsample == "maxpool" else x
    if downsample != "stride":
        return conv(p), p
    stride = conv.stride
    conv.stride = tuple(2 * step for step in stride)
    try:
        return conv(p), p
    finally:
        conv.stride = stride


def _uses_batch(norm: BatchNorm2d) -> bool:
    """Whether it normalises by the batch's statistics, rather than by running ones."""
    return norm.training or norm.running_mean is None


def _rows(norm: BatchNorm2d, batch: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """The rows that normalise y (NormRow in pool_conv.h): those of the batch, which also update the
    running statistics; in evaluation, rows that are made of the running statistics."""
    if not _uses_batch(norm):
        zero = torch.zeros_like(norm.running_mean)
        invstd = (norm.running_var + norm.eps).rsqrt()
        scale = invstd if norm.weight is None else invstd * norm.weight
        shift = zero if norm.bias is None else norm.bias
        return torch.stack([norm.running_mean, zero, scale, shift, invstd, norm.running_var])
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        norm.num_batches_tracked += 1
        share = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        count = y.numel() // y.shape[1]
        norm.running_mean.lerp_(batch[0], share)
        norm.running_var.lerp_(batch[5] * (count / (count - 1)), share)  # unbiased, as torch's
    return batch


def _moments(y: torch.Tensor, norm: BatchNorm2d) -> torch.Tensor:
    batch = ops.moments(y, norm.weight, norm.bias, norm.eps) if _uses_batch(norm) else None
    return _rows(norm, batch, y)


def _once(backward: Callable) -> Callable:
    """Raise on a second derivative. torch's once_differentiable misses the case where autograd.grad
    is called for tensors that are no leaves, and would return a wrong one silently."""
    @functools.wraps(backward)
    def checked(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError("a fused block has no second derivative: use native ops")
        return backward(ctx, grad)
    return checked


def _affine_gradients(back: torch.Tensor, gamma: torch.Tensor | None) -> tuple:
    """The gradients of gamma and beta; None where the norm has no such parameters."""
    return (None, None) if gamma is None else tuple(back[GRAD_AFFINE].clone())


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, norm, gamma, beta):
        rows = _moments(y, norm)
        out = ops.finish(y, rows, None, None)
        ctx.save_for_backward(y, rows, gamma, out)
        return out

    @staticmethod
    @_once
    def backward(ctx, grad):
        y, rows, gamma, out = ctx.saved_tensors
        back, _ = ops.finish_backward(grad, out, y, rows, gamma, None, None, None)
        return ops.apply_backward(grad, out, y, back), None, *_affine_gradients(back, gamma)


class _BasicBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, weight2, weight_s, mode, norms, *affine):
        def norm_conv(x, norm_x, weight, norm, mode):
            y, batch, pooled, argmax = ops.norm_conv(x, norm_x, weight, norm.weight, norm.bias,
                                                     norm.eps, mode, _uses_batch(norm), ctx.tf32)
            return y, _rows(norm, batch, y), pooled, argmax

        ctx.size = x.shape[2:]
        ctx.mode = mode
        ctx.tf32 = allows_tf32()
        x = x.contiguous(memory_format=torch.channels_last)
        y1, rows1, pooled, argmax = norm_conv(x, None, weight1, norms[0], mode)
        y2, rows2, _, _ = norm_conv(y1, rows1, weight2, norms[1], MODES["none"])
        if mode == MODES["maxpool"]:
            x = pooled
        r = x
        rows_s = None
        if weight_s is not None:
            r = F.conv2d(x, weight_s).contiguous(memory_format=torch.channels_last)
            rows_s = _moments(r, norms[2])
        out = ops.finish(y2, rows2, r, rows_s)
        gammas = affine[::2]  # of two or three norms
        if weight_s is None:
            gammas += (None,)
        ctx.save_for_backward(x, argmax, weight1, weight2, weight_s, y1, y2, r, rows1, rows2,
                              rows_s, out, *gammas)
        return out

    @staticmethod
    @_once
    def backward(ctx, grad):
        (x, argmax, weight1, weight2, weight_s, y1, y2, r, rows1, rows2, rows_s, out, gamma1,
         gamma2, gamma_s) = ctx.saved_tensors
        back2, back_s = ops.finish_backward(grad, out, y2, rows2, gamma2, r, rows_s, gamma_s)
        grad1, grad_weight2, back1 = ops.norm_conv_backward(
            grad, out, y2, back2, y1, rows1, gamma1, weight2, None, None, None, MODES["none"],
            *y1.shape[2:], True, True, ctx.tf32)

        # the shortcut's gradient: what passes the last ReLU, then back through its convolution
        extra = grad
        extra_out = out
        grad_weight_s = None
        if weight_s is not None:
            grad_r = _as_matrix(ops.apply_backward(grad, out, r, back_s))
            grad_weight_s = (grad_r.T @ _as_matrix(x)).view_as(weight_s)
            extra = (grad_r @ weight_s.flatten(1)).view(*x.permute(0, 2, 3, 1).shape)
            extra = extra.permute(0, 3, 1, 2)
            extra_out = None

        grad_x, grad_weight1, _ = ops.norm_conv_backward(
            grad1, None, y1, back1, x, None, None, weight1, argmax, extra, extra_out, ctx.mode,
            *ctx.size, ctx.needs_input_grad[0], True, ctx.tf32)
        of_s = () if weight_s is None else _affine_gradients(back_s, gamma_s)
        return (grad_x, grad_weight1, grad_weight2, grad_weight_s, None, None,
                *_affine_gradients(back1, gamma1), *_affine_gradients(back2, gamma2), *of_s)


def _as_matrix(x: torch.Tensor) -> torch.Tensor:
    """(N,C,H,W) in channels_last as (N H W, C): a row for each pixel, a column for each channel."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
