"""DenseNet's weighted concatenation, the batch norm and the ReLU that read it, as one pass over the feature maps.

The plain formula copies what a layer reads twice, `cat` and then `l * x`, and the norm goes through the second copy to
take its statistics. Here a dense block keeps its maps in one buffer into which each is written once. At that time each
image's mean `m` and variance `v` of every channel are taken. What a layer reads, `relu(norm(l * x))` with the gate's
weight l[n, c], then needs nothing but these (N, C) moments to become one affine map:

    mu = E_n[l m],  var = E_n[l^2 v] + Var_n[l m]              a batch's statistics of l * x, exactly
    relu(scale * x + shift),  scale = l gamma / sqrt(var + eps),  shift = beta - mu gamma / sqrt(var + eps)

Autograd goes through the small tensors as they stand. For the maps, with G the gradient behind the ReLU,

    dL/dscale = sum_hw(G x),  dL/dshift = sum_nhw(G),  dL/dx += scale G          for every reader
    dL/dx += dL/dm / HW + 2 (x - m) dL/dv / HW                                    once, of all readers' m and v

The sum over the readers is handed on from reader to reader, from the last one to the first: each returns the buffer to
the next as if it had made it. Backward keeps the buffer and each reader's output, and neither of the copies.

The plain formula is used wherever its single operations are wanted or needed: see `can_read` and `fused.is_eager`.
tests/test_fused_concat.py holds both forms equal.

Shapes: N images, C channels of a map or of a buffer's first maps, H x W pixels.
"""

from collections.abc import Iterator
from typing import Any, Optional

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.autograd import Function

from timm_weighted_skip.fused import is_eager, is_hooked, through_relu
from timm_weighted_skip.layers import ActiveWeightedConcat

__all__ = ['DenseFeatures', 'can_read', 'read']

# Numbers of a map that are worked on at a time, so that the steps of a pass find them in the cache of the core.
CHUNK = 2**16


class DenseFeatures(list):
    """The maps of a dense block, for `torch.cat`, and beside them their concatenation with its moments.

    Args:
        channels: Of all maps that will come.
        variance: Whether a norm that reads them takes its statistics from the batch.

    Attributes:
        buffer: (N, C, H, W) the maps so far, or None once a map has come that can't be written there.
    """

    def __init__(self, channels: int, variance: bool) -> None:
        super().__init__()
        self.channels, self.variance = channels, variance
        self.buffer: Optional[torch.Tensor] = None
        self.moments: list[tuple[torch.Tensor, Optional[torch.Tensor]]] = []

    def append(self, x: torch.Tensor) -> None:
        if not self:
            layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
            self.storage = x.new_empty(x.shape[0], self.channels, *x.shape[2:]).contiguous(memory_format=layout)
            self.buffer = self.storage[:, :0]
        if self.buffer is not None and is_eager(self.storage, x):
            x, *moments = _Moments.apply(x, self.variance)
            self.moments.append(moments)
            self.buffer = _Append.apply(self.buffer, x, self.storage)
        else:
            self.buffer = None
        super().append(x)

    def cat(self) -> torch.Tensor:
        """(N, C, H, W) all maps."""
        return torch.cat(self, 1) if self.buffer is None else self.buffer

    def read(self, merge: ActiveWeightedConcat, norm: BatchNormAct2d) -> torch.Tensor:
        """`norm(merge(self.cat()))`, where `can_read`."""
        mean, var = zip(*self.moments)
        y, self.buffer = _read(self.buffer, torch.cat(mean, 1), torch.cat(var, 1) if self.variance else None, merge, norm)
        return y


def can_read(merge: nn.Module, norm: nn.Module, x: Optional[torch.Tensor]) -> bool:
    """Whether `read` may stand for `norm(merge(x))`: a batch norm with a ReLU, no hook, and `fused.is_eager`."""
    return (
        x is not None
        and is_eager(x)
        and type(merge) is ActiveWeightedConcat
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
    return _read(*_Moments.apply(x, norm.training), merge, norm)[0]


def _read(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: Optional[torch.Tensor],
    merge: ActiveWeightedConcat,
    norm: BatchNormAct2d,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm(merge(x))` from the moments (N, C) of `x`, and `x` for the next reader."""
    weight = merge.channel_weights(mean)  # (N, C)
    if norm.training:
        weighted = weight * mean
        mu = weighted.mean(0)
        var = (weight.square() * var).mean(0) + (weighted - mu).square().mean(0)  # (C,)
        _track(norm, mu.detach(), var.detach(), x.numel() // x.shape[1])
    else:
        mu, var = norm.running_mean, norm.running_var
    factor = norm.weight / (var + norm.eps).sqrt()
    y, after = _Affine.apply(x, weight * factor, norm.bias - mu * factor)
    return y, x if after is None else after


@torch.no_grad()
def _track(norm: BatchNormAct2d, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)


def _chunks(x: torch.Tensor) -> Iterator[slice]:
    """The images of `x` by the chunk."""
    step = max(1, CHUNK * torch.get_num_threads() * len(x) // x.numel())
    return (slice(i, i + step) for i in range(0, len(x), step))


class _Moments(Function):
    """Passes a map on, beside each image's mean and variance of every channel, (N, C)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, variance: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        ctx.set_materialize_grads(False)
        mean = x.mean((2, 3))
        var = (x - mean[..., None, None]).square_().mean((2, 3)) if variance else None
        ctx.save_for_backward(x, mean)
        return x, mean, var

    @staticmethod
    def backward(
        ctx: Any, grad: Optional[torch.Tensor], of_mean: Optional[torch.Tensor], of_var: Optional[torch.Tensor]
    ) -> tuple[Optional[torch.Tensor], None]:
        x, mean = ctx.saved_tensors
        pixels = x.shape[2:].numel()
        constant = None if of_mean is None else of_mean / pixels
        if of_var is not None:
            slope = of_var * (2 / pixels)
            constant = -slope * mean if constant is None else constant - slope * mean
            share = slope[..., None, None] * x
            grad = share if grad is None else grad + share
        if constant is not None:
            grad = constant[..., None, None].expand_as(x) if grad is None else grad + constant[..., None, None]
        return grad, None


class _Append(Function):
    """Writes a map behind those in a buffer; returns what the buffer then holds."""

    @staticmethod
    def forward(ctx: Any, buffer: torch.Tensor, x: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
        ctx.channels = buffer.shape[1], x.shape[1]
        # Readers keep earlier maps, which this does not change. Not so a change to the maps themselves: they have a
        # version of their own, and share it.
        storage.data.narrow(1, *ctx.channels).copy_(x)
        return storage.narrow(1, 0, sum(ctx.channels)).detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        return *grad.split(ctx.channels, 1), None


class _Affine(Function):
    """`relu(scale * x + shift)` of (N, C, H, W), (N, C) and (C,), and `x` for the next to read."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        ctx.set_materialize_grads(False)
        y = torch.empty_like(x)
        scale = scale[..., None, None]
        for part in _chunks(x):
            torch.mul(x[part], scale[part], out=y[part]).add_(shift[:, None, None]).relu_()
        ctx.save_for_backward(x, scale, y)
        return y, x if ctx.needs_input_grad[0] else None

    @staticmethod
    def backward(
        ctx: Any, grad: Optional[torch.Tensor], of_x: Optional[torch.Tensor]
    ) -> tuple[Optional[torch.Tensor], ...]:
        x, scale, y = ctx.saved_tensors
        if grad is None:
            return of_x, None, None
        if torch.is_grad_enabled():
            grad = through_relu(grad, y)
            return _sum(of_x, grad * scale), (grad * x).sum((2, 3)), grad.sum((0, 2, 3))
        total = torch.empty_like(y) if ctx.needs_input_grad[0] else None
        of_scale, of_shift = torch.empty_like(scale[..., 0, 0]), torch.zeros_like(scale[0, :, 0, 0])
        for part in _chunks(x):
            g = through_relu(grad[part], y[part])
            of_scale[part] = (g * x[part]).sum((2, 3))
            of_shift += g.sum((0, 2, 3))
            if total is None:
                continue
            if of_x is None:
                torch.mul(g, scale[part], out=total[part])
            else:
                torch.addcmul(of_x[part], g, scale[part], out=total[part])
        return total, of_scale, of_shift


def _sum(a: Optional[torch.Tensor], b: torch.Tensor) -> torch.Tensor:
    return b if a is None else a + b
