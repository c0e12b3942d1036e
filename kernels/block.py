"""A ResNet's layers with their batch normalisation, ReLU and residual add, fused.

    from kernels import basic_block, can_fuse, stem

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
from torch.nn import BatchNorm2d

from . import MODES, load

ops = torch.ops.pool_conv
GRAD_AFFINE = slice(4, 6)  # rows of the gradients of gamma and beta (BackRow in pool_conv.h)


def can_fuse(x: torch.Tensor, weight: torch.Tensor, norm: BatchNorm2d) -> bool:
    """Whether `stem` and `basic_block` take a layer with this (first) weight and norm: float32, 8
    channels or more, no autocast, no torch.compile; statistics of the batch, or no gradients."""
    return (x.dtype == weight.dtype == torch.float32 and len(weight) >= 8
            and not torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling()
            and (_of_batch(norm) or not torch.is_grad_enabled()))


def stem(x: torch.Tensor, weight: torch.Tensor, norm: BatchNorm2d) -> torch.Tensor:
    """relu(norm(conv(x))). x: (N,C_in,H,W); weight: (C_out,C_in,3,3), padding 1, no bias."""
    load()
    y = F.conv2d(x, weight, padding=1).contiguous(memory_format=torch.channels_last)
    return _NormReLU.apply(y, norm, norm.weight, norm.bias)


def basic_block(x: torch.Tensor, weight1: torch.Tensor, norm1: BatchNorm2d, weight2: torch.Tensor,
                norm2: BatchNorm2d, shortcut: torch.nn.Conv2d | None = None,
                norm_s: BatchNorm2d | None = None, downsample: str = "none") -> torch.Tensor:
    """With p = maxpool2x2(x) for "maxpool", x for "none",

        relu(norm2(conv2(relu(norm1(conv1(p))))) + shortcut(p))

    x: (N,C_in,H,W); weight1: (C_out,C_in,3,3); weight2: (C_out,C_out,3,3); shortcut: None for the
    identity, or a 1x1 convolution without bias, and norm_s behind it. Running statistics are kept
    as torch keeps them. `can_fuse` says what is possible.
    """
    load()
    weight_s = None if shortcut is None else shortcut.weight
    norms = [norm for norm in (norm1, norm2, norm_s) if norm is not None]
    return _BasicBlock.apply(x, weight1, weight2, weight_s, MODES[downsample], norms,
                             *(p for norm in norms for p in (norm.weight, norm.bias)))


def _of_batch(norm: BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def _rows(norm: BatchNorm2d, batch: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """What normalises y (NormRow in pool_conv.h): the rows of the batch, which also go into the
    running statistics; in evaluation, rows made of the running statistics."""
    if not _of_batch(norm):
        mean, variance = norm.running_mean, norm.running_var
        invstd, zero = (variance + norm.eps).rsqrt(), torch.zeros_like(mean)
        scale = invstd if norm.weight is None else invstd * norm.weight
        return torch.stack([mean, zero, scale, zero if norm.bias is None else norm.bias, invstd,
                            variance])
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

        ctx.size, ctx.mode = x.shape[2:], mode
        x = x.contiguous(memory_format=torch.channels_last)
        y1, rows1, pooled, argmax = norm_conv(x, None, weight1, norms[0], mode)
        y2, rows2, _, _ = norm_conv(y1, rows1, weight2, norms[1], MODES["none"])
        r = x = pooled if mode == MODES["maxpool"] else x
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
        extra, extra_out, grad_weight_s = grad, out, None
        if weight_s is not None:
            grad_r = _pixels(ops.apply_backward(grad, out, r, back_s))
            grad_weight_s = (grad_r.T @ _pixels(x)).view_as(weight_s)
            extra = (grad_r @ weight_s.flatten(1)).view(*x.permute(0, 2, 3, 1).shape)
            extra, extra_out = extra.permute(0, 3, 1, 2), None
        grad_x, grad_weight1, _ = ops.norm_conv_backward(
            grad1, None, y1, back1, x, None, None, weight1, argmax, extra, extra_out, ctx.mode,
            *ctx.size, ctx.needs_input_grad[0], True)
        of_s = () if weight_s is None else _affine(back_s, gamma_s)
        return (grad_x, grad_weight1, grad_weight2, grad_weight_s, None, None,
                *_affine(back1, gamma1), *_affine(back2, gamma2), *of_s)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """(N,C,H,W) in channels_last as a matrix, a row a pixel, a column a channel."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
