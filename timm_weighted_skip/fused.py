"""The two-path merges and the ReLU after them as one step that makes no new feature map.

In eager mode on a CPU a merge written as `relu(w1 * F + w2 * s)` spends most of its time on the memory of its four
intermediate maps. The step here overwrites `F`, as timm's plain block does with `x += shortcut`, and keeps of the maps
only `y` and `s` for the backward pass. It needs no `F` there: where the ReLU passes a gradient g, and only there,

    y = w1 * F + w2 * s,  so  sum(g * F) = (sum(g * y) - w2 * sum(g * s)) / w1

The division loses precision as `w1` goes to 0, and then the plain formula is used. It is used, too, wherever its single
operations are wanted or needed: see `can_fuse`. tests/test_fused.py holds both forms equal.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function, forward_ad

__all__ = ['set_fused_merge']

_enabled = True

# The largest error that recovering `F` may cost, relative to sum(|g * s|). In 32 bits it takes lam1 from about 0.06 up.
TOLERANCE = 2e-6


def set_fused_merge(enable: bool = True) -> None:
    """Whether blocks may weigh and apply norm or ReLU in one step, for every net of this process; on by default.

    A ResNet's outputs are the same to the last bit either way; a DenseNet's, and all gradients, up to rounding.
    """
    global _enabled
    _enabled = enable


def can_fuse(merge: nn.Module, act: nn.Module, residual: torch.Tensor, shortcut: torch.Tensor) -> bool:
    """Whether `merge.merge_relu(residual, shortcut)` may stand for `act(merge(residual, shortcut))`.

    It may in eager mode, for a ReLU and feature maps of 32 or 64 bits in the CPU's memory. It may not while compiling,
    exporting or tracing, under `torch.func` and forward-mode transforms, or where a hook waits for the merge or the
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
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not _enabled:
        return False
    return (
        all(type(x) is torch.Tensor for x in maps)  # neither a proxy of FX nor a subclass
        and len({x.dtype for x in maps}) == 1
        and maps[0].dtype in (torch.float32, torch.float64)
        and all(x.device.type == 'cpu' and x.numel() > 0 for x in maps)
        # These two have no public name. The second is below 0 outside forward-mode differentiation.
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def skip_relu(residual: torch.Tensor, shortcut: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`relu(residual + weight * shortcut)` of a scalar `weight`, overwriting `residual`."""
    return _SkipReLU.apply(residual, shortcut, weight.to(residual.dtype))


def mapping_relu(residual: torch.Tensor, shortcut: torch.Tensor, gate: nn.Module) -> torch.Tensor:
    """`relu(w1 * residual + w2 * shortcut)` with `w = gate(concat(GAP(residual), GAP(shortcut)))`, over `residual`."""
    link: dict[str, torch.Tensor] = {}
    z, residual, shortcut = _Means.apply(residual, shortcut, link)  # (N, 2C)
    weight = gate(z).to(residual.dtype)  # (N, 2)
    if torch.is_grad_enabled() and not _recoverable(weight.detach()):
        of_residual, of_shortcut = weight[..., None, None, None].unbind(1)  # (N, 1, 1, 1)
        return F.relu(torch.addcmul(of_residual * residual, of_shortcut, shortcut))
    return _MappingReLU.apply(residual, shortcut, weight, link)


def _recoverable(weight: torch.Tensor) -> bool:
    """Whether `sum(g * F)` follows from `y` and `s` precisely enough, for every image."""
    of_residual, of_shortcut = weight.abs().unbind(1)
    return bool((torch.finfo(weight.dtype).eps * of_shortcut <= TOLERANCE * of_residual).all())


def through_relu(grad: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The gradient before a ReLU, from the one after it and its output."""
    return torch.ops.aten.threshold_backward(grad, y, 0)


def _sum(own: Optional[torch.Tensor], share: Optional[torch.Tensor], into_own: bool = False) -> Optional[torch.Tensor]:
    """The sum of what there is."""
    if own is None or share is None:
        return own if share is None else share
    return own.add_(share) if into_own else own + share


class _SkipReLU(Function):
    @staticmethod
    def forward(ctx: Any, residual: torch.Tensor, shortcut: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = residual.detach().addcmul_(weight, shortcut).relu_()
        ctx.save_for_backward(y, shortcut if ctx.needs_input_grad[2] else None, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        y, shortcut, weight = ctx.saved_tensors
        grad = through_relu(grad, y)
        of_weight = (grad * shortcut).sum() if ctx.needs_input_grad[2] else None
        return grad, grad * weight if ctx.needs_input_grad[1] else None, of_weight


class _Means(Function):
    """Passes both maps on, beside their channel means, and completes the gradient of `_MappingReLU`.

    The two share `link`, so that a map's gradient, which has a part from the merge and one from its mean, is written
    once. Forward: the merge comes after the gate, which needs the means. Backward: the means come after the gate, which
    needs dL/dw from the merge; `_MappingReLU` therefore hands on the gradient before its weights, and leaves those in
    `link`.
    """

    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, shortcut: torch.Tensor, link: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.link, ctx.size = link, residual.shape[2:]
        ctx.set_materialize_grads(False)
        return torch.cat([residual.flatten(2).mean(2), shortcut.flatten(2).mean(2)], dim=1), residual, shortcut

    @staticmethod
    def backward(
        ctx: Any, of_z: Optional[torch.Tensor], of_residual: Optional[torch.Tensor], of_shortcut: Optional[torch.Tensor]
    ) -> tuple[Optional[torch.Tensor], ...]:
        weight, shares = ctx.link.pop('weight', None), (None, None)
        if of_z is not None:
            shares = (of_z / ctx.size.numel()).unflatten(1, (2, -1))[..., None, None]  # (N, 2, C, 1, 1)
            shares = shares.expand(-1, -1, -1, *ctx.size).unbind(1)  # (N, C, H, W)
        if weight is None or of_residual is None:  # the plain formula's gradients
            paths = zip((of_residual, of_shortcut), shares)
            return *(_sum(direct, share) for direct, share in paths), None
        by_residual, by_shortcut = weight[..., None, None, None].unbind(1)  # (N, 1, 1, 1)
        # Nobody else holds this gradient and what is made of it, unless they are themselves to be differentiated.
        overwrite = not torch.is_grad_enabled()
        # A direct gradient of the shortcut comes with double backward, which differentiates what was saved of it.
        of_shortcut = _sum(_sum(of_residual * by_shortcut, of_shortcut, overwrite), shares[1], overwrite)
        of_residual = of_residual.mul_(by_residual) if overwrite else of_residual * by_residual
        return _sum(of_residual, shares[0], overwrite), of_shortcut, None


class _MappingReLU(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        shortcut: torch.Tensor,
        weight: torch.Tensor,
        link: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        of_residual, of_shortcut = weight[..., None, None, None].unbind(1)  # (N, 1, 1, 1)
        y = residual.detach().mul_(of_residual).addcmul_(of_shortcut, shortcut).relu_()
        ctx.link = link
        ctx.save_for_backward(y, shortcut, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        y, shortcut, weight = ctx.saved_tensors
        # With its graph the weight would hold the graph that holds it.
        ctx.link['weight'] = weight if torch.is_grad_enabled() else weight.detach()
        grad = through_relu(grad, y)
        by_shortcut = (grad * shortcut).sum((1, 2, 3))
        by_residual = ((grad * y).sum((1, 2, 3)) - weight[:, 1] * by_shortcut) / weight[:, 0]
        return grad, None, torch.stack([by_residual, by_shortcut], dim=1), None
