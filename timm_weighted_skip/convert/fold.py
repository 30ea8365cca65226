"""Folding AdaResNet's learned weights into the neighbouring layers: the same outputs from a plain ResNet."""

import copy

import torch
from timm.models.resnet import Bottleneck, ResNet
from timm.utils import unwrap_model
from torch import nn

from timm_weighted_skip.convert.names import rename
from timm_weighted_skip.convert.plain import unweigh
from timm_weighted_skip.layers import SkipWeight

__all__ = ['fold']

HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity)


def fold(model: nn.Module) -> tuple[ResNet, list[str]]:
    """Fold the weights of an AdaResNet into its other layers, for deployment: the plain net with the same outputs.

    A projection shortcut ends in a norm layer, whose affine takes `w` of any sign. An identity shortcut has no layer,
    but relu is positively homogeneous, `relu(a v) = a relu(v)` for `a > 0`, so the plain net may carry the stream of
    a stage in other units: `a_k x_k` for the weighted net's `x_k`. With `x_(k+1) = relu(F_k(x_k) + w_k x_k)` the plain
    unit has to give

        a_(k+1) x_(k+1) = relu(a_(k+1) F_k(x_k) + a_(k+1) w_k x_k),

    whose second term is the plain shortcut's `a_k x_k` if `a_k = a_(k+1) w_k`. So the unit's first convolution is
    divided by `a_k` (it reads the scaled stream) and its last norm multiplied by `a_(k+1)`. `a = 1` at the end of the
    last stage leaves the head as it was; the chain of scales ends at the projection that opens a stage, so that the
    output of the stage before is as it was too, and otherwise goes on through that stage, at last to the stem's norm.
    All of it is computed in float64.

    An identity shortcut with `w <= 0` can't be folded. Take `x > 0` with `F(x) = 0`: the weighted unit gives
    `relu(w x) = 0`, a plain unit in any units `a > 0` gives `relu(a x) = a x > 0`. (Units `a < 0` do not pass through
    relu.) Such a unit stays weighted, with its `w`.

    Args:
        model: An AdaResNet. It stays as it is; the result is a copy.

    Returns:
        The folded net and the names of the units that are still weighted. Without such it is a plain timm net, whose
        state dict is that of the plain architecture; with such it is an AdaResNet whose other units have `w = 1`, and
        whose units share no weight.

    Raises:
        ValueError: `model` is no AdaResNet, an activation or a branch is not homogeneous, or the product of a stage's
            weights leaves the range of the net's precision.
    """
    model = unwrap_model(model)
    merges = [module for module in model.modules() if isinstance(module, SkipWeight)]
    if not isinstance(model, ResNet) or all(merge.weight is None for merge in merges):
        raise ValueError(f'{type(model).__name__} has no weights to fold; nets that have are called adaresnet*')
    net = copy.deepcopy(model)
    blocks = [block for name, stage in net.named_children() if name.startswith('layer') for block in stage]
    names = {block: name for name, block in net.named_modules()}
    weighted = _fold_units(net, blocks, names)
    kept = [names[block] for block in weighted]
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f'{name} is beyond the range of {tensor.dtype} after folding; fold `model.double()`')
    if not kept:
        unweigh(net)
        rename(net, '')
    else:
        fixed = not isinstance(weighted[0].merge.weight, nn.Parameter)
        rename(net, 'ada', **(dict(skip_fixed=True) if fixed else {}))
    return net, sorted(kept, key=list(names.values()).index)


@torch.no_grad()
def _fold_units(net: ResNet, blocks: list[nn.Module], names: dict[nn.Module, str]) -> list[nn.Module]:
    """Fold the weights of all units, from the last to the first; returns the blocks that stay weighted."""
    kept: list[nn.Module] = []
    after = torch.ones((), dtype=torch.float64)  # a_(k+1)
    for block in reversed(blocks):
        weight = torch.ones_like(after) if block.merge.weight is None else block.merge.weight.double().cpu()
        foldable = block.downsample is not None or weight > 0
        if block.downsample is not None:
            _scale_affine(block.downsample[-1], after * weight, names)
            before = torch.ones_like(after)
        else:
            before = after * weight if foldable else after
        # A merge of its own: units that shared a weight need not have the same one any more.
        if not foldable:
            kept.append(block)
            block.merge = copy.deepcopy(block.merge)
        elif block.merge.weight is not None:
            like = dict(device=block.merge.weight.device, dtype=block.merge.weight.dtype)
            block.merge = SkipWeight(1.0, fixed=not isinstance(block.merge.weight, nn.Parameter), **like)
        if before != 1 or after != 1:
            _check_homogeneous(block, names)
            _scale(block.conv1.weight, 1 / before)
            _scale_affine(block.bn3 if isinstance(block, Bottleneck) else block.bn2, after, names)
        after = before
    if after != 1:  # the first stage opened with an identity shortcut
        # A stem pool with a convolution of its own ends in a norm and an activation.
        convolves = any(isinstance(module, nn.Conv2d) for module in net.maxpool.modules())
        norm = list(net.maxpool.children())[-2] if convolves else net.bn1
        if not isinstance(net.act1, HOMOGENEOUS):
            raise ValueError(f'act1 is {type(net.act1).__name__}, which is not homogeneous: its input has one scale')
        _scale_affine(norm, after, names)
    return kept


def _check_homogeneous(block: nn.Module, names: dict[nn.Module, str]) -> None:
    last_act = block.act3 if isinstance(block, Bottleneck) else block.act2
    if not isinstance(last_act, HOMOGENEOUS):
        raise ValueError(f'{names[block]} ends in {type(last_act).__name__}, which is not homogeneous like relu')
    if block.se is not None:
        raise ValueError(f'{names[block]} has a {type(block.se).__name__}, whose output does not scale with its input')


def _scale(tensor: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply in place, rounding once."""
    tensor.copy_(tensor.double() * factor.to(tensor.device))


def _scale_affine(norm: nn.Module, factor: torch.Tensor, names: dict[nn.Module, str]) -> None:
    if getattr(norm, 'weight', None) is None or getattr(norm, 'bias', None) is None or norm.weight.ndim != 1:
        raise ValueError(f'{names[norm]} is {type(norm).__name__} without affine parameters to fold a weight into')
    _scale(norm.weight, factor)
    _scale(norm.bias, factor)
