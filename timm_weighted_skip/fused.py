"""The two-path merges and the ReLU after them as one step, over the branch's feature map where nothing else needs it.

In eager mode a merge written as `relu(w1 * F + w2 * s)` spends most of its time on the memory of its four
intermediate maps. The step here overwrites `F`, as timm's plain block does with `x += shortcut`, and keeps of the maps
only `y` and `s` for the backward pass. AWM needs no `F` there: where the ReLU passes a gradient g, and only there,

    y = w1 * F + w2 * s,  so  sum(g * F) = (sum(g * y) - w2 * sum(g * s)) / w1

The division loses precision as `w1` goes to 0, and then `F` is kept and `y` is a new map. In 16 bits, which lose much,
it nearly always is, and on a GPU always, as the host would have to wait for `w1`. The kernels of `fused_triton` do the
step there; without Triton it takes the same operations as on a CPU. Where the norm before the merge can be part of the
step, that of `fused_norm` is taken; the plain formula is used wherever its single operations are wanted or needed: see
`can_fuse`.
tests/test_fused.py holds both forms equal.
"""

import warnings
from collections.abc import Iterable
from functools import cache, partial
from types import ModuleType
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function, forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ['set_fused_merge']

_enabled = True

DTYPES = {
    'cpu': (torch.bfloat16, torch.float32, torch.float64),
    'cuda': (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}

# The largest error that recovering `F` may cost, relative to sum(|g * s|). In 32 bits it takes lam1 from about 0.06 up.
TOLERANCE = 2e-6

# Numbers of a map that are worked on at a time on a CPU, so that the steps of a pass find them in a cache.
CHUNK = 2**19

# Bytes that a loop of torch on a CPU works on at a time. A shorter row of numbers it takes one by one.
VECTOR = 64


def set_fused_merge(enable: bool = True) -> None:
    """Whether blocks may weigh and apply norm or ReLU in one step, for every net of this process; on by default.

    A net computes the same either way, up to rounding; in eager mode weights at identity give the plain net's output to
    the last bit (those of a DenseNet in training, to float32's rounding).
    """
    global _enabled
    _enabled = enable


def is_enabled() -> bool:
    """What `set_fused_merge` was told."""
    return _enabled


def can_fuse(merge: nn.Module, act: nn.Module, residual: torch.Tensor, shortcut: torch.Tensor) -> bool:
    """Whether `merge.merge_relu(residual, shortcut)` may stand for `act(merge(residual, shortcut))`.

    It may in eager mode, for a ReLU and feature maps of `DTYPES`. It may not while compiling, exporting or tracing,
    under dispatch modes, `torch.func` and forward-mode transforms, or where a hook waits for the merge or the
    activation.
    """
    return (
        is_eager(residual, shortcut)
        and type(act) is nn.ReLU
        and 'merge_relu' in vars(type(merge))  # a subclass may have another `forward`
        and residual.shape == shortcut.shape
        and not (is_hooked(merge) or is_hooked(act))
    )


def is_eager(*maps: torch.Tensor) -> bool:
    """Whether steps that only plain eager mode knows may work on `maps`, and `set_fused_merge` lets them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not is_enabled():
        return False
    device, dtype = maps[0].device, maps[0].dtype
    return (
        all(type(x) is torch.Tensor for x in maps)  # neither a proxy of FX nor a subclass
        and all((x.device, x.dtype) == (device, dtype) and x.numel() > 0 for x in maps)
        and dtype in DTYPES.get(device.type, ())
        and not is_in_torch_dispatch_mode()
        # These two have no public name. The second is below 0 outside forward-mode differentiation.
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's `forward`: hooks on it or on all, or its own `forward`."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or 'forward' in module.__dict__ or _has_any_global_hook()


def is_composed(grad: torch.Tensor) -> bool:
    """Whether a backward pass from `grad` may only make new tensors: it is differentiated itself, or under vmap."""
    batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor  # neither is public
    return torch.is_grad_enabled() or any(is_batched(grad) for is_batched in batched)


def channel_means(x: torch.Tensor) -> torch.Tensor:
    """GAP of a feature map (N, C, H, W), (N, C)."""
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what this alone guards
        if is_eager(x) and x.dtype == torch.bfloat16 and _is_channels_last_on_cpu(x):
            return F.avg_pool2d(x, x.shape[2:]).flatten(1)  # torch's mean takes several times as long there
    return x.flatten(2).mean(2)


def _add_to_channels(x: torch.Tensor, by: torch.Tensor) -> None:
    """Add (N, C) to every pixel of (N, C, H, W), in place."""
    if x.shape[1] * x.element_size() < VECTOR and _is_channels_last_on_cpu(x):
        n, _, height, width = x.shape
        x.permute(0, 2, 3, 1).view(n, height, -1).add_(by.repeat(1, width)[:, None])  # (N, H, WC) and (N, 1, WC)
    else:
        x.add_(by[..., None, None])


def _is_channels_last_on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == 'cpu' and x.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def move_statistics(norm: Any, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    """Move a batch norm's running statistics to those of a batch, as its own forward does.

    Args:
        norm: It has a momentum.
        mean, var: Of the batch, (C,), the variance without correction.
        count: Values per channel.
    """
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)


def skip_relu(residual: torch.Tensor, shortcut: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`relu(residual + weight * shortcut)` of a scalar `weight`, overwriting `residual`."""
    return _SkipReLU.apply(residual, shortcut, weight.to(residual.dtype), _kernels(residual, shortcut))


def mapping_relu(residual: torch.Tensor, shortcut: torch.Tensor, gate: nn.Module) -> torch.Tensor:
    """`relu(w1 * residual + w2 * shortcut)` with `w = gate(concat(GAP(residual), GAP(shortcut)))`.

    It overwrites `residual` unless that is kept for the backward pass.
    """
    link: dict[str, Any] = {}
    kernels = _kernels(residual, shortcut)
    z, passed = _Means.apply(residual, shortcut, _carried_means(shortcut), link)  # z: (N, 2C)
    weight = gate(z).to(residual.dtype)  # (N, 2)
    keep = torch.is_grad_enabled() and (
        kernels is not None or residual.device.type != 'cpu' or not _recoverable(weight.detach())
    )
    y = _MappingReLU.apply(passed, shortcut, weight, residual if keep else None, link, kernels)
    _carry_means(y, link.pop('means', None))
    return y


def _carry_means(y: torch.Tensor, means: Optional[torch.Tensor]) -> None:
    """Have `y` bring its channel means, (N, C), to the next unit, whose shortcut it may be."""
    if means is not None and not y.is_inference():  # which would not know that it was written to
        y._channel_means = means, y._version  # type: ignore[attr-defined]


def _carried_means(shortcut: torch.Tensor) -> Optional[torch.Tensor]:
    """The channel means that a unit's output brings along, unless it was written to since."""
    means, version = getattr(shortcut, '_channel_means', (None, None))
    return means if means is not None and shortcut._version == version else None


def _kernels(residual: torch.Tensor, shortcut: torch.Tensor) -> Optional[ModuleType]:
    """`fused_triton`, if it can be used for these maps."""
    kernels = _kernels_of(residual.device)
    return kernels if kernels and kernels.can_take(residual, shortcut) else None


@cache
def _kernels_of(device: torch.device) -> Optional[ModuleType]:
    if device.type != 'cuda' or torch.cuda.get_device_capability(device) < (7, 0):  # Triton's oldest
        return None
    try:
        from timm_weighted_skip import fused_triton

        fused_triton.check(device)
    except ImportError:
        return None
    except Exception as error:  # of many types: Triton needs a C compiler and Python's headers, which may be missing
        warnings.warn(f"no Triton kernels on {device}, so torch's operations merge there: {error}", stacklevel=2)
        return None
    return fused_triton


def _recoverable(weight: torch.Tensor) -> bool:
    """Whether `sum(g * F)` follows from `y` and `s` precisely enough, for every image."""
    w1, w2 = weight.abs().unbind(1)
    return bool((torch.finfo(weight.dtype).eps * w2 <= TOLERANCE * w1).all())


def through_relu(grad: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The gradient before a ReLU, from the one after it and its output."""
    return torch.ops.aten.threshold_backward(grad, y, 0)


def chunks(x: torch.Tensor, *others: Optional[torch.Tensor]) -> Iterable[tuple[torch.Tensor, ...]]:
    """The images of tensors by the chunk; what is None is left out."""
    tensors = [tensor for tensor in (x, *others) if tensor is not None]
    step = max(1, CHUNK * torch.get_num_threads() * x.shape[0] // x.numel())
    split = x.device.type == 'cpu' and step < x.shape[0]
    return zip(*(tensor.split(step) for tensor in tensors)) if split else [tuple(tensors)]


def _dots_through_relu(grad: torch.Tensor, y: torch.Tensor, *maps: torch.Tensor) -> list[torch.Tensor]:
    """The gradient `g` before a ReLU, and `sum(g * map)` per image, (N,), for each of `maps`."""
    if is_composed(grad):
        grad = through_relu(grad, y)
        return [grad, *((grad * x).sum((1, 2, 3)) for x in maps)]
    before, dots = torch.empty_like(y), []
    for g, after, own_y, *own in chunks(before, grad, y, *maps):  # a map of all products would cost more than the sums
        torch.ops.aten.threshold_backward.grad_input(after, own_y, 0, grad_input=g)
        dots.append([(g * x).sum((1, 2, 3)) for x in own])
    return [before, *map(torch.cat, zip(*dots))]


class _SkipReLU(Function):
    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, shortcut: torch.Tensor, weight: torch.Tensor, kernels: Optional[ModuleType]
    ) -> torch.Tensor:
        if kernels is None:
            y = residual.detach().addcmul_(weight, shortcut).relu_()
        else:
            y = kernels.skip_relu(residual, shortcut, weight)
        ctx.kernels = kernels
        ctx.save_for_backward(y, shortcut if ctx.needs_input_grad[2] else None, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        y, shortcut, weight = ctx.saved_tensors
        if ctx.kernels is not None and shortcut is not None and not is_composed(grad):
            return *ctx.kernels.skip_gradients(grad, y, shortcut, weight), None
        grad, *dots = _dots_through_relu(grad, y, *(() if shortcut is None else (shortcut,)))
        grad_weight = dots[0].sum() if dots else None
        return grad, grad * weight if ctx.needs_input_grad[1] else None, grad_weight, None


class _Means(Function):
    """The channel means of both maps, and the gradient that `_MappingReLU` passes to them.

    The two share `link`, so that a map's gradient, which has a part from the merge and one from its mean, is written
    once. Forward: the merge comes after the gate, which needs the means. Backward: the means come after the gate, which
    needs dL/dw from the merge; `_MappingReLU` therefore hands on the gradient before its weights, through the residual
    that is passed on here, and leaves in `link` what makes both maps' gradients of it. Where these are to be
    differentiated it makes them itself, and only the means' part comes from here. The maps that it reads do not come
    through here: double backward gives those gradients of their own, which no weight is to multiply. A `mean_shortcut`
    that is given is not taken again; its gradient goes to the shortcut all the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        mean_shortcut: Optional[torch.Tensor],
        link: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.link, ctx.size = link, residual.shape[2:]
        ctx.set_materialize_grads(False)
        if mean_shortcut is None:
            mean_shortcut = channel_means(shortcut)
        return torch.cat([channel_means(residual), mean_shortcut], dim=1), residual

    @staticmethod
    def backward(
        ctx: Any, grad_z: Optional[torch.Tensor], grad: Optional[torch.Tensor]
    ) -> tuple[Optional[torch.Tensor], ...]:
        weight, write = ctx.link.pop('weight', None), ctx.link.pop('write', None)
        share = None if grad_z is None else grad_z / ctx.size.numel()  # (N, 2C), for every pixel
        if write is not None and grad is not None:
            return *write(grad, share=share), None, None
        if grad is None or weight is None:  # of a loss on the weights alone, or `_MappingReLU` has made the maps' own
            if share is None:
                return grad, None, None, None
            of_maps = share.view(len(share), 2, -1, 1, 1).expand(-1, -1, -1, *ctx.size)
            to_residual, to_shortcut = of_maps.unbind(1)  # (N, C, H, W)
            return to_residual if grad is None else grad + to_residual, to_shortcut, None, None
        w1, w2 = weight[..., None, None, None].unbind(1)  # (N, 1, 1, 1)
        # Nobody else holds this gradient and what is made of it.
        grad_shortcut, grad_residual = grad * w2, grad.mul_(w1)
        if share is not None:
            for grad_map, own_share in zip((grad_residual, grad_shortcut), share.chunk(2, dim=1)):
                _add_to_channels(grad_map, own_share)
        return grad_residual, grad_shortcut, None, None


class _MappingReLU(Function):
    @staticmethod
    def forward(
        ctx: Any,
        passed: torch.Tensor,
        shortcut: torch.Tensor,
        weight: torch.Tensor,
        kept: Optional[torch.Tensor],
        link: dict[str, Any],
        kernels: Optional[ModuleType],
    ) -> torch.Tensor:
        if kernels is None:
            w1, w2 = weight[..., None, None, None].unbind(1)  # (N, 1, 1, 1)
            y = passed.detach().mul_(w1) if kept is None else kept * w1
            y = y.addcmul_(w2, shortcut).relu_()
        else:
            y, link['means'] = kernels.mapping_relu(passed, shortcut, weight, overwrite=kept is None)
        ctx.link, ctx.kernels = link, kernels
        ctx.save_for_backward(y, shortcut, weight, kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        y, shortcut, weight, kept = ctx.saved_tensors
        composed = is_composed(grad)
        if ctx.kernels is not None and not composed:
            weight = weight.detach()
            ctx.link['write'] = partial(ctx.kernels.gradients, y=y.detach(), weight=weight)
            return grad, None, ctx.kernels.dots(grad, kept, shortcut, weight), None, None, None
        grad, dot_shortcut, dot_residual = _dots_through_relu(grad, y, shortcut, y if kept is None else kept)
        if kept is None:  # `dot_residual` is y's so far
            dot_residual = (dot_residual - weight[:, 1] * dot_shortcut) / weight[:, 0]
        grad_weight = torch.stack([dot_residual, dot_shortcut], dim=1)  # (N, 2)
        if composed:
            ctx.link.clear()  # the weight left there, with its graph, would hold the graph that holds it
            w1, w2 = weight[..., None, None, None].unbind(1)  # (N, 1, 1, 1)
            return grad * w1, grad * w2, grad_weight, None, None, None
        ctx.link['weight'] = weight.detach()
        return grad, None, grad_weight, None, None, None
