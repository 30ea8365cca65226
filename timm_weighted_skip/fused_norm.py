"""The batch norm before a two-path merge, the merge and its ReLU as one affine map of what the convolution wrote.

Of z = conv(x) with F = norm(z), the merge is affine in z and s, with factors per image and channel:

    relu(w1 * F + w2 * s) = relu(scale * z + w2 * s + shift)
    scale = w1 gamma / sigma,  shift = w1 (beta - mu gamma / sigma)

The mean of F, which the gate asks for, needs no pass over F: it is what the norm makes of z's mean. A pointwise
convolution's mean is the convolution of its input's, which in a bottleneck has a quarter of the channels.

What is made of this depends on who runs it. For training, a compiler gets single operations that it can fuse into the
plain net's passes and one more over s, for its mean: one over z for each image's mean m and variance v, of which follow
the gate's features as well as the batch's statistics,

    mu = E_n[m],  sigma^2 = E_n[v] + Var_n[m] + eps

and one over z and s for the output; backward one for the gradients of scale, shift and w2, all of them sums over an
image's channel, and one for those of z and s. In eval mode it gets the plain formula, with a bottleneck's gate before
its last convolution. In eager mode on a CPU, without gradients, the norm's own kernel then multiplies by w1, image by
image, so that what a pass writes is still in the cache when the next one reads it.

tests/test_fused_norm.py holds both equal to the plain formula.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_weighted_skip.fused import channel_means, is_eager, is_enabled, is_hooked, move_statistics

__all__ = ['can_fuse_norm', 'norm_relu']

# Elements of one image's map from which going image by image is faster than `fused.mapping_relu`.
SMALLEST_IMAGE = 2**15


def can_fuse_norm(merge: Any, conv: Any, norm: Any, act: nn.Module, x: torch.Tensor) -> bool:
    """Whether `merge.norm_relu(x, shortcut, conv, norm)` may stand for `act(merge(norm(conv(x)), shortcut))`.

    It may for a merge with a gate, a plain batch norm, a ReLU and no hooks: while compiling or exporting, if the norm
    takes its statistics from a batch of more than one value per channel, not of 16 bits on a CPU, and has a momentum,
    or is in eval mode behind a pointwise `conv`; in eager mode on a CPU, without gradients, in eval mode, for a
    pointwise `conv` whose maps are large enough to be handled image by image.
    """
    if not (
        is_enabled()
        and type(norm) is nn.BatchNorm2d
        and type(act) is nn.ReLU
        and 'norm_relu' in type(merge).__dict__  # a subclass may have another `forward`; torch 2.8 can't trace `vars`
        and merge.gate is not None
    ):
        return False
    if not torch.compiler.is_compiling():
        possible = (
            not (norm.training or torch.is_grad_enabled())
            and is_eager(x)
            and x.device.type == 'cpu'
            and _is_pointwise(conv)
            and conv.out_channels * x.shape[2:].numel() >= SMALLEST_IMAGE
        )
    elif norm.training:
        possible = norm.momentum is not None and x.numel() > x.shape[1] and not _is_16_bits_on_cpu(x)
    else:
        possible = _is_pointwise(conv)
    return (
        possible
        and not (norm.weight is None or norm.bias is None or norm.running_mean is None)
        and not any(map(is_hooked, (merge, conv, norm, act)))
    )


def _is_16_bits_on_cpu(x: torch.Tensor) -> bool:
    """Where the code that a compiler makes of the plain formula is faster (measured with AMX, in bfloat16)."""
    return x.device.type == 'cpu' and x.dtype in (torch.bfloat16, torch.float16)


def _is_pointwise(conv: nn.Module) -> bool:
    return type(conv) is nn.Conv2d and (
        (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
    )


def norm_relu(
    x: torch.Tensor, shortcut: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, gate: nn.Module
) -> torch.Tensor:
    """`relu(w1 * F + w2 * shortcut)` of `F = norm(conv(x))` with `w = gate(concat(GAP(F), GAP(shortcut)))`."""
    if norm.training:
        return _with_batch_statistics(conv(x), shortcut, norm, gate)
    mean = F.linear(channel_means(x), conv.weight.flatten(1), conv.bias)  # (N, C) of conv(x)
    mean = F.batch_norm(mean, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    weight = gate(torch.cat([mean, channel_means(shortcut)], dim=1))  # (N, 2)
    z = conv(x)  # (N, C, H, W)
    weight = weight.to(z.dtype)
    if not torch.compiler.is_compiling() and z.dtype == shortcut.dtype:  # which may have 32 bits under autocast
        return _image_by_image(z, shortcut, norm, weight)
    w1, w2 = weight[..., None, None, None].unbind(1)  # (N, 1, 1, 1)
    return torch.addcmul(w1 * norm(z), w2, shortcut).relu()


def _image_by_image(
    z: torch.Tensor, shortcut: torch.Tensor, norm: nn.BatchNorm2d, weight: torch.Tensor
) -> torch.Tensor:
    """`relu(w1 * norm(z) + w2 * shortcut)`, over `z`.

    At `w1 = 1` the norm's weight and bias are its own to the last bit, and the kernel is the plain net's.
    """
    scaled = weight[:, :1] * norm.weight, weight[:, :1] * norm.bias  # (N, C)
    for image, s, gamma, beta, w2 in zip(z.split(1), shortcut.split(1), *scaled, weight[:, 1], strict=True):
        residual = F.batch_norm(image, norm.running_mean, norm.running_var, gamma, beta, eps=norm.eps)
        torch.addcmul(residual, w2, s, out=image)
    return z.relu_()


def _with_batch_statistics(z: torch.Tensor, shortcut: torch.Tensor, norm: Any, gate: nn.Module) -> torch.Tensor:
    """`relu(w1 * norm(z) + w2 * shortcut)` of a norm in training; moves its running statistics as it does."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))  # (N, C, H, W)
    v, m = torch.var_mean(wide, (2, 3), correction=0)  # (N, C)
    mu, var = m.mean(0), v.mean(0) + m.var(0, correction=0)  # (C,)
    if norm.track_running_stats:
        move_statistics(norm, mu, var, z.numel() // z.shape[1])
    scale = norm.weight * (var + norm.eps).rsqrt()  # (C,)
    shift = norm.bias - mu * scale
    features = torch.cat([(m * scale + shift).to(z.dtype), channel_means(shortcut)], dim=1)  # (N, 2C)
    weight = gate(features).to(wide.dtype)  # (N, 2)
    # Expanded to (N, C), so that the gradient of w2 is summed over the same pixels as those of scale and shift.
    w1, w2 = weight[:, :, None].expand(-1, -1, z.shape[1]).unbind(1)
    scale, shift, w2 = (by[..., None, None] for by in (w1 * scale, w1 * shift, w2))  # (N, C, 1, 1)
    return (scale * wide + w2 * shortcut + shift).relu().to(z.dtype)
