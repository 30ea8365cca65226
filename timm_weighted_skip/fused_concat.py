"""DenseNet's weighted concatenation, the batch norm and the ReLU that read it, as one pass over the feature maps.

The plain formula copies what a layer reads twice, `cat` and then `l * x`, and the norm goes through the second copy to
take its statistics. Here a dense block keeps its maps in one buffer into which each is written once. At that time each
image's mean `m` and variance `v` of every channel are taken. What a layer reads, `relu(norm(l * x))` with the gate's
weight l[n, c], then needs nothing but these (N, C) moments to become one affine map:

    mu = E_n[l m],  var = E_n[l^2 v] + Var_n[l m]              a batch's statistics of l * x, exactly
    relu(scale * x + shift),  scale = l gamma / sqrt(var + eps),  shift = beta - mu gamma / sqrt(var + eps)

The gradients go the same ways back. With G the gradient behind the norm, where the ReLU passes it,

    dL/dscale = sum_hw(G x),  dL/dshift = sum_nhw(G),  dL/dx += scale G          for every reader
    dL/dx += dL/dm / HW + 2 (x - m) dL/dv / HW                                    once, of all readers' m and v

The sum over the readers is handed on from reader to reader, from the last one to the first: each returns the buffer to
the next as if it had made it. Backward keeps the maps, the buffer and each reader's output, and none of the copies.

The plain formula is used wherever its single operations are wanted or needed: see `can_buffer` and `can_read`.
tests/test_fused_concat.py holds both forms equal.

Shapes: N images, C channels of a map or of a buffer's first maps, H x W pixels.
"""

from functools import cache
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torch.autograd import Function

from timm_weighted_skip.fused import chunks, is_composed, is_eager, is_hooked, move_statistics, through_relu
from timm_weighted_skip.layers import ActiveWeightedConcat

__all__ = ['DenseFeatures', 'can_buffer', 'can_read', 'read']

# What is read: maps (N, C, H, W) and their moments (N, C); the variance only where a norm needs it.
Moments = tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]


def can_buffer(x: torch.Tensor) -> bool:
    """Whether a dense block may keep its maps as this file does: on a CPU, whose cache the steps are made for."""
    # A proxy of FX has no device to compare. In bfloat16 the moments would be too coarse for a norm's statistics.
    return is_eager(x) and x.device.type == 'cpu' and x.dtype != torch.bfloat16 and x.ndim == 4


class DenseFeatures(list):
    """The maps of a dense block, for `torch.cat`, and beside them their concatenation with its moments.

    Args:
        channels: Of all maps that will come.
        variance: Whether a norm that reads them takes its statistics from the batch.
    """

    def __init__(self, channels: int, variance: bool) -> None:
        super().__init__()
        self.channels, self.variance = channels, variance
        self.buffer: Any = None  # `Moments`; None again where it can't hold the maps

    def append(self, x: torch.Tensor) -> None:
        if not self:
            last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            layout = torch.channels_last if last else torch.contiguous_format
            shape = x.shape[0], self.channels, *x.shape[2:]
            self.storage = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
            self.buffer = _Write.apply(x, self.variance, self.storage, None, None, None)
        elif self.buffer is not None:
            fits = type(x) is torch.Tensor and x.dtype == self.storage.dtype and x.device == self.storage.device
            self.buffer = _Write.apply(x, self.variance, self.storage, *self.buffer) if fits else None
        super().append(x)

    def can_read(self, merge: nn.Module, norm: nn.Module) -> bool:
        return self.buffer is not None and can_read(self.buffer[0], merge, norm)

    def read(self, merge: ActiveWeightedConcat, norm: BatchNormAct2d) -> torch.Tensor:
        """`norm(merge(self.cat()))`, where `can_read`."""
        y, self.buffer = _read(self.buffer, merge, norm)
        return y

    def cat(self) -> torch.Tensor:
        """(N, C, H, W) all maps."""
        return torch.cat(self, 1) if self.buffer is None else self.buffer[0]


def can_read(x: torch.Tensor, merge: nn.Module, norm: nn.Module) -> bool:
    """Whether `read` may stand for `norm(merge(x))`, given `can_buffer(x)`: a batch norm with a ReLU, no hook."""
    return (
        type(merge) is ActiveWeightedConcat
        and merge.gate is not None
        and type(norm) is BatchNormAct2d
        and type(norm.act) is nn.ReLU
        and type(norm.drop) is nn.Identity
        and norm.weight is not None
        and norm.weight.dtype == x.dtype
        and norm.running_mean is not None
        and norm.track_running_stats
        and norm.momentum is not None
        and not (norm.training and x.shape[1] == x.numel())  # has no variance, which the norm reports
        and not any(is_hooked(module) for module in (merge, norm, norm.act, norm.drop))
    )


def read(x: torch.Tensor, merge: ActiveWeightedConcat, norm: BatchNormAct2d) -> torch.Tensor:
    """`norm(merge(x))` of a map by itself, where `can_read`."""
    return _read(_Write.apply(x, norm.training, None, None, None, None), merge, norm)[0]


def _read(x: Moments, merge: Any, norm: BatchNormAct2d) -> tuple[torch.Tensor, Moments]:
    """`norm(merge(x))`, and `x` for the next reader."""
    weight = merge.gate(x[1]).to(x[1].dtype)  # (N, K)
    y, *after = _Read.apply(*x, weight, norm.weight, norm.bias, norm, _units(tuple(merge.widths)))
    after = [own if new is None else new for own, new in zip(x, after)]
    return y, (after[0], after[1], after[2])


@cache
def _units(widths: tuple[int, ...]) -> torch.Tensor:
    """Each channel's unit, (C,)."""
    with torch.inference_mode(False):
        return torch.arange(len(widths), device='cpu').repeat_interleave(torch.tensor(widths, device='cpu'))


def _split(grad: Optional[torch.Tensor], at: int) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """The gradients of the first `at` channels and of the others."""
    if grad is None:
        return None, None
    return grad.narrow(1, 0, at) if at else None, grad.narrow(1, at, grad.shape[1] - at)


def _sum(a: Optional[torch.Tensor], b: torch.Tensor) -> torch.Tensor:
    return b if a is None else a + b


class _Write(Function):
    """Writes a map behind those in a buffer, and its moments behind theirs; returns what is then there.

    Without a buffer it returns the map itself and its moments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        variance: bool,
        storage: Optional[torch.Tensor],
        buffer: Any,
        means: Any,
        variances: Any,
    ) -> Moments:
        ctx.set_materialize_grads(False)
        mean = x.mean((2, 3))
        var = (x - mean[..., None, None]).square_().mean((2, 3)) if variance else None
        ctx.save_for_backward(x, mean)
        ctx.start = 0 if buffer is None else buffer.shape[1]
        if storage is None:
            return x, mean, var
        # What is kept of the buffer for backward does not change here, and has a version of its own.
        storage.data.narrow(1, ctx.start, x.shape[1]).copy_(x)
        if buffer is not None:
            mean = torch.cat([means, mean], 1)
            var = None if var is None else torch.cat([variances, var], 1)
        return storage.narrow(1, 0, mean.shape[1]).detach(), mean, var

    @staticmethod
    def backward(
        ctx: Any, grad: Optional[torch.Tensor], grad_mean: Optional[torch.Tensor], grad_var: Optional[torch.Tensor]
    ) -> tuple[Optional[torch.Tensor], ...]:
        x, mean = ctx.saved_tensors
        before, (grad, grad_mean, grad_var) = zip(*(_split(g, ctx.start) for g in (grad, grad_mean, grad_var)))
        pixels = x.shape[2:].numel()
        constant = None if grad_mean is None else grad_mean / pixels
        if grad_var is not None:
            slope = grad_var * (2 / pixels)
            constant = _sum(constant, -slope * (x.mean((2, 3)) if torch.is_grad_enabled() else mean))
        if constant is not None:
            constant = constant[..., None, None]
            grad = constant.expand_as(x) if grad is None else grad + constant
        if grad_var is not None:
            grad = torch.addcmul(grad, x, slope[..., None, None])
        return grad, None, None, *before


class _Read(Function):
    """`norm(weight * x)`, and `x` and its moments for the next to read."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mean: torch.Tensor,
        var: Any,
        weight: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        norm: Any,
        units: torch.Tensor,
    ) -> tuple[Optional[torch.Tensor], ...]:
        ctx.set_materialize_grads(False)
        ctx.units, ctx.eps, ctx.training = units, norm.eps, norm.training
        weight_c = weight.index_select(1, units)  # (N, C)
        if norm.training:
            mu, sigma2 = _statistics(weight_c, mean, var)
            move_statistics(norm, mu, sigma2, x.numel() // x.shape[1])
        else:
            mu, sigma2 = norm.running_mean, norm.running_var
        inverse = (sigma2 + norm.eps).sqrt_().reciprocal_()
        if norm.training:
            factor = gamma * inverse
            shift = beta - mu * factor
        else:  # by torch's own kernel, so that weights of 1 give the plain net's output to the last bit
            zero, one = torch.zeros_like(mean[:1]), torch.ones_like(mean[:1])
            shift = F.batch_norm(zero, mu, sigma2, gamma, beta, eps=norm.eps)[0]
            factor = F.batch_norm(one, zero[0], sigma2, gamma, eps=norm.eps)[0]
        scale, shift = (weight_c * factor)[..., None, None], shift[:, None, None]
        y = torch.empty_like(x)
        for own_x, own_scale, own_y in chunks(x, scale, y):
            own_y.copy_(shift).addcmul_(own_x, own_scale).relu_()  # with each broadcast by itself it is vectorised
        ctx.save_for_backward(x, mean, var, weight, gamma, beta, y, scale, mu, inverse)
        return y, *(t if needed else None for t, needed in zip((x, mean, var), ctx.needs_input_grad))

    @staticmethod
    def backward(ctx: Any, grad: Optional[torch.Tensor], *next_grads: Any) -> tuple[Optional[torch.Tensor], ...]:
        if grad is None:
            return *next_grads, None, None, None, None, None
        x, mean, var, weight, gamma, beta, y, scale, mu, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated: by autograd, of what was saved as it is here
            inputs: Any = [t if t is None else t.view_as(t) for t in (x, mean, var, weight, gamma, beta)]
            with_grad = [t for t, needed in zip(inputs, ctx.needs_input_grad) if needed]
            again = _formula(ctx, (mu, inverse), *inputs)
            grads = iter(torch.autograd.grad(again, with_grad, grad, create_graph=True, allow_unused=True))
            direct = [next(grads) if needed else None for needed in ctx.needs_input_grad[:6]]
            return *(a if b is None else _sum(a, b) for a, b in zip(next_grads, direct)), *direct[3:], None, None
        next_grad_x, grad_mean, grad_var = next_grads
        grad_x, grad_scale, grad_shift = _through_affine(grad, x, y, scale, next_grad_x, ctx.needs_input_grad[0])
        # Through scale and shift.
        weight_c, factor, grad_shift = weight.index_select(1, ctx.units), gamma * inverse, grad_shift.sum(0)
        grad_factor = (grad_scale * weight_c).sum(0).addcmul_(grad_shift, mu, value=-1)
        grad_gamma, grad_beta = grad_factor * inverse, grad_shift  # (C,)
        grad_weight_c = grad_scale.mul_(factor)  # (N, C)
        if ctx.training:  # through the batch's statistics, which are means over N
            slope = grad_gamma * inverse * factor / -len(x)  # 2 / N times the variance's gradient
            grad_weighted = torch.addcmul(grad_shift * factor / -len(x), slope, (weight_c * mean).sub_(mu))
            slope = slope * weight_c
            grad_weight_c.addcmul_(grad_weighted, mean).addcmul_(slope, var)
            grad_mean = _sum(grad_mean, grad_weighted.mul_(weight_c))
            grad_var = _sum(grad_var, slope.mul_(weight_c).div_(2))
        grad_weight = torch.zeros_like(weight).index_add(1, ctx.units, grad_weight_c)  # (N, K)
        return grad_x, grad_mean, grad_var, grad_weight, grad_gamma, grad_beta, None, None


def _through_affine(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    next_grad_x: Optional[torch.Tensor],
    needs_x: bool,
) -> tuple[Optional[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The gradients through `y = relu(scale * x + shift)` of x, scale and shift.

    The gradient of x includes `next_grad_x`; it is None unless `needs_x`.
    """
    if is_composed(grad):
        g = through_relu(grad, y)
        return _sum(next_grad_x, g * scale) if needs_x else None, (g * x).sum((2, 3)), g.sum((2, 3))
    grad_x = torch.empty_like(y) if needs_x else None
    grad_scale, grad_shift = y.new_empty(y.shape[:2]), y.new_empty(y.shape[:2])
    for part in chunks(grad, y, x, scale, grad_scale, grad_shift, grad_x, next_grad_x):
        own_y, own_x, own_scale, to_scale, to_shift, *grads_x = part[1:]
        g = through_relu(part[0], own_y)
        torch.sum(g * own_x, (2, 3), out=to_scale)
        torch.sum(g, (2, 3), out=to_shift)
        if needs_x and next_grad_x is not None:
            torch.addcmul(grads_x[1], g, own_scale, out=grads_x[0])
        elif needs_x:
            torch.mul(g, own_scale, out=grads_x[0])
    return grad_x, grad_scale, grad_shift


def _statistics(weight: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's mean and variance (C,) of `weight * x`, all (N, C)."""
    weighted = weight * mean
    mu = weighted.mean(0)
    return mu, torch.addcmul((weighted - mu).square(), weight.square(), var).mean(0)


def _formula(
    ctx: Any,
    fixed: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """What `_Read` computes, for autograd; `fixed` are the `mu` and `1 / sqrt(var + eps)` of a norm in eval mode."""
    weight, (mu, inverse) = weight.index_select(1, ctx.units), fixed
    if ctx.training:
        mu, sigma2 = _statistics(weight, mean, var)
        inverse = (sigma2 + ctx.eps).rsqrt()
    factor = gamma * inverse
    return torch.relu(x * (weight * factor)[..., None, None] + (beta - mu * factor)[:, None, None])
