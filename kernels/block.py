"""A ResNet's layers with their batch normalisation, ReLU and residual add, fused where that may be.

    from kernels import basic_block, stem

Normalised activations are never stored: a convolution's output pass yields the sums that its
normalisation needs, and the next convolution makes its input from that output, forward and again
backward. With T one pass over a tensor of the block's size, an identity block takes

    forward   conv1 2 T, conv2 2 T, end (normalise, add, ReLU) 3 T
    backward  sums for norm2 3 T, conv2 5 T, conv1 6 T                     21 T in all

where operators one by one take 17 T and 27 T, and torch keeps 6 T for the way back, this 4 T.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn import BatchNorm2d, Conv2d

from . import MODES, check_arguments, load, pool_conv2d

ops = torch.ops.pool_conv
GRAD_AFFINE = slice(4, 6)  # rows of the gradients of gamma and beta (BackRow in pool_conv.h)


def stem(x: torch.Tensor, conv: Conv2d, norm: BatchNorm2d) -> torch.Tensor:
    """relu(norm(conv(x))), for any convolution; norm and ReLU are fused."""
    if not _can_fuse(x, conv.weight, [norm]):
        return F.relu(norm(conv(x)))
    load()
    y = conv(x).contiguous(memory_format=torch.channels_last)
    return _NormReLU.apply(y, norm, norm.weight, norm.bias)


def basic_block(x: torch.Tensor, conv1: Conv2d, norm1: BatchNorm2d, conv2: Conv2d,
                norm2: BatchNorm2d, shortcut: torch.nn.Sequential | None = None,
                downsample: str = "none") -> torch.Tensor:
    """relu(norm2(conv2(relu(norm1(conv1(p))))) + shortcut(p)), where p is x, for "maxpool"
    maxpool2x2(x). "stride": conv1 has stride 2 in this call, and the shortcut starts from every
    second pixel of every second row.

    x: (N,C_in,H,W); conv1, conv2: 3x3, padding 1, no stride, no bias, C_in -> C_out -> C_out;
    shortcut: None or empty for the identity, or a 1x1 convolution without bias and its norm.
    Running statistics are kept as torch keeps them. Raises as `pool_conv2d` does.
    """
    check_arguments(x, conv1.weight, downsample)
    _check_block(x, conv1, conv2, shortcut)
    norms = [norm1, norm2, shortcut[1]] if shortcut else [norm1, norm2]
    if downsample == "stride" or not _can_fuse(x, conv1.weight, norms):
        y, p = pool_conv2d(x, conv1.weight, downsample)
        y, _ = pool_conv2d(F.relu(norm1(y)), conv2.weight)
        if downsample == "stride":
            p = p[:, :, ::2, ::2]
        return F.relu(norm2(y) + (shortcut(p) if shortcut else p))

    load()
    weight_s = shortcut[0].weight if shortcut else None
    affine = []
    for norm in norms:
        affine += [norm.weight, norm.bias]
    return _BasicBlock.apply(x, conv1.weight, conv2.weight, weight_s, MODES[downsample], norms,
                             *affine)


def _can_fuse(x: torch.Tensor, weight: torch.Tensor, norms: list[BatchNorm2d]) -> bool:
    """The one place that decides whether a layer, `weight` its first, is fused."""
    return (not x.is_meta  # torch counts operations there
            and x.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type)
            and len(weight) >= 8  # below, most of a vector is idle
            and not torch.compiler.is_compiling()  # these functions cannot be traced
            # running statistics have no way back here
            and (all(map(_of_batch, norms)) or not torch.is_grad_enabled()))


def _check_block(x: torch.Tensor, conv1: Conv2d, conv2: Conv2d,
                 shortcut: torch.nn.Sequential | None) -> None:
    """ValueError for modules whose weights alone do not say what they compute, and shapes that the
    kernels would not notice."""
    convs = [conv1, conv2]
    channels = conv1.out_channels
    shapes = [(channels, x.shape[1], 3, 3), (channels, channels, 3, 3)]
    if shortcut:
        convs.append(shortcut[0])
        shapes.append((channels, x.shape[1], 1, 1))
    elif x.shape[1] != channels:
        raise ValueError(f"from {x.shape[1]} to {channels} channels it needs a shortcut")

    for conv, shape in zip(convs, shapes):
        padding = (shape[2] // 2, shape[3] // 2)
        if (conv.weight.shape != shape or conv.bias is not None or conv.stride != (1, 1)
                or conv.padding != padding or conv.dilation != (1, 1)):
            raise ValueError(f"{conv}: a weight of shape {shape} is needed, padding {padding}, "
                             "no stride, dilation or bias")


def _of_batch(norm: BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def _rows(norm: BatchNorm2d, batch: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """What normalises y (NormRow in pool_conv.h): the rows of the batch, which also go into the
    running statistics; in evaluation, rows made of the running statistics."""
    if not _of_batch(norm):
        zero = torch.zeros_like(norm.running_mean)
        invstd = (norm.running_var + norm.eps).rsqrt()
        scale = invstd if norm.weight is None else invstd * norm.weight
        shift = zero if norm.bias is None else norm.bias
        return torch.stack([norm.running_mean, zero, scale, shift, invstd, norm.running_var])
    if norm.training and norm.running_mean is not None:
        norm.num_batches_tracked += 1
        share = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        count = y.numel() // y.shape[1]
        norm.running_mean.lerp_(batch[0], share)
        norm.running_var.lerp_(batch[5] * (count / (count - 1)), share)  # unbiased, as torch's
    return batch


def _moments(y: torch.Tensor, norm: BatchNorm2d) -> torch.Tensor:
    batch = ops.moments(y, norm.weight, norm.bias, norm.eps) if _of_batch(norm) else None
    return _rows(norm, batch, y)


def _affine(back: torch.Tensor, gamma: torch.Tensor | None) -> tuple:
    """Gradients of gamma and beta, where the norm has them."""
    return (None, None) if gamma is None else tuple(back[GRAD_AFFINE].clone())


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, norm, gamma, beta):
        rows = _moments(y, norm)
        out = ops.finish(y, rows, None, None)
        ctx.save_for_backward(y, rows, gamma, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, rows, gamma, out = ctx.saved_tensors
        back, _ = ops.finish_backward(grad, out, y, rows, gamma, None, None, None)
        return ops.apply_backward(grad, out, y, back), None, *_affine(back, gamma)


class _BasicBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, weight2, weight_s, mode, norms, *affine):
        def norm_conv(x, norm_x, weight, norm, mode):
            y, batch, pooled, argmax = ops.norm_conv(x, norm_x, weight, norm.weight, norm.bias,
                                                     norm.eps, mode, _of_batch(norm))
            return y, _rows(norm, batch, y), pooled, argmax

        ctx.size = x.shape[2:]
        ctx.mode = mode
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
        gammas = (affine + (None,) * 2)[:6:2]
        ctx.save_for_backward(x, argmax, weight1, weight2, weight_s, y1, y2, r, rows1, rows2,
                              rows_s, out, *gammas)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, argmax, weight1, weight2, weight_s, y1, y2, r, rows1, rows2, rows_s, out, gamma1,
         gamma2, gamma_s) = ctx.saved_tensors
        back2, back_s = ops.finish_backward(grad, out, y2, rows2, gamma2, r, rows_s, gamma_s)
        grad1, grad_weight2, back1 = ops.norm_conv_backward(
            grad, out, y2, back2, y1, rows1, gamma1, weight2, None, None, None, MODES["none"],
            *ctx.size, True, True)

        # by the shortcut: what of grad passed the last ReLU, or that back through a convolution
        extra = grad
        extra_out = out
        grad_weight_s = None
        if weight_s is not None:
            grad_r = _pixels(ops.apply_backward(grad, out, r, back_s))
            grad_weight_s = (grad_r.T @ _pixels(x)).view_as(weight_s)
            extra = (grad_r @ weight_s.flatten(1)).view(*x.permute(0, 2, 3, 1).shape)
            extra = extra.permute(0, 3, 1, 2)
            extra_out = None

        grad_x, grad_weight1, _ = ops.norm_conv_backward(
            grad1, None, y1, back1, x, None, None, weight1, argmax, extra, extra_out, ctx.mode,
            *ctx.size, ctx.needs_input_grad[0], True)
        of_s = () if weight_s is None else _affine(back_s, gamma_s)
        return (grad_x, grad_weight1, grad_weight2, grad_weight_s, None, None,
                *_affine(back1, gamma1), *_affine(back2, gamma2), *of_s)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """(N,C,H,W) in channels_last as a matrix, a row a pixel, a column a channel."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
