"""Folding AdaResNet's learned weights into the neighbouring layers: the same outputs from a plain ResNet."""

import copy
from collections.abc import Sequence
from itertools import chain

import torch
from timm.layers import BlurPool2d, GroupNorm, GroupNorm1, LayerNorm2d
from timm.models.resnet import Bottleneck, ResNet
from timm.utils import unwrap_model
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from timm_weighted_skip.convert.names import rename
from timm_weighted_skip.convert.plain import unweigh
from timm_weighted_skip.layers import SkipWeight
from timm_weighted_skip.models.blocks import WeightedBlock
from timm_weighted_skip.models.resnet_released import CentredConv2d

__all__ = ['fold']

HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, BlurPool2d, nn.Sequential)
CONVS = (nn.Conv2d, CentredConv2d)

NORMS = (
    *(nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d),
    *(FrozenBatchNorm2d, GroupNorm, GroupNorm1, LayerNorm2d),
)
"""They end in `weight * z + bias` of a `z` that does not depend on either."""


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
    So a feature in front of an identity shortcut that opens a stage, such as the stem's of a CIFAR net, is in other
    units. All of it is computed in float64.

    An identity shortcut with `w <= 0` can't be folded. Take `x > 0` with `F(x) = 0`: the weighted unit gives
    `relu(w x) = 0`, a plain unit in any units `a > 0` gives `relu(a x) = a x > 0`. (Units `a < 0` do not pass through
    relu.) Such a unit stays weighted, with its `w`.

    Args:
        model: An AdaResNet, in the precision of its deployment, as float16 may lack the range for products of weights.
            It stays as it is; the result is a copy.

    Returns:
        The folded net and the names of the units that are still weighted. Without such it is a plain timm net, whose
        state dict is that of the plain architecture; with such it is an AdaResNet whose other units have `w = 1`, and
        whose units share no weight.

    Raises:
        ValueError: `model` is no AdaResNet or has forward hooks, an activation or a branch is not homogeneous, a layer
            that a weight would go into has no parameters of its own to take it, or the product of a stage's weights
            leaves the range of the net's precision.
    """
    model = unwrap_model(model)
    merges = [module for module in model.modules() if isinstance(module, SkipWeight) and module.weight is not None]
    if not merges:
        raise ValueError(f'{type(model).__name__} has no weights to fold; nets that have are called adaresnet*')
    if not isinstance(model, ResNet):
        raise ValueError(f'{type(model).__name__} is a part of a net; fold the whole net, then take its features')
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError('a net on the meta device has no values to fold; load its weights first')
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f'{name or "the net"} has forward hooks, as pruning leaves, which might change features that are in '
                'other units after folding; remove them first'
            )
    net = copy.deepcopy(model)
    blocks = [block for name, stage in net.named_children() if name.startswith('layer') for block in stage]
    for block in blocks:
        if not isinstance(block, WeightedBlock):
            raise ValueError(f'{_name(net, block)} is a {type(block).__name__}, which is no block of an AdaResNet')
    weighted = _fold_units(net, blocks)
    kept = [_name(net, block) for block in reversed(weighted)]
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f'{name} is beyond the range of {tensor.dtype} after folding; fold `model.double()`')
    if not kept:
        unweigh(net)
        rename(net, '')
    else:
        fixed = not isinstance(weighted[0].merge.weight, nn.Parameter)
        rename(net, 'ada', **(dict(skip_fixed=True) if fixed else {}))
    return net, kept


@torch.no_grad()
def _fold_units(net: ResNet, blocks: list[nn.Module]) -> list[nn.Module]:
    """Fold the weights of all units, from the last to the first; returns the blocks that stay weighted."""
    kept: list[nn.Module] = []
    after = torch.ones((), dtype=torch.float64)  # a_(k+1)
    for block in reversed(blocks):
        weight = torch.ones_like(after) if block.merge.weight is None else block.merge.weight.double().cpu()
        foldable = block.downsample is not None or weight > 0
        if block.downsample is not None:
            _scale_affine(net, block.downsample[-1], after * weight)
            before = torch.ones_like(after)
        else:
            before = after * weight if foldable else after
        if not foldable:
            kept.append(block)
        if block.merge.weight is not None:
            block.merge = _own_merge(block.merge, torch.ones_like(weight) if foldable else weight)
        if before != 1 or after != 1:
            _check_homogeneous(net, block)
            _scale(net, block.conv1, CONVS, ('weight',), 1 / before)
            _scale_affine(net, block.bn3 if isinstance(block, Bottleneck) else block.bn2, after)
        after = before
    if after != 1:  # the first stage opened with an identity shortcut
        # A stem pool with a convolution of its own ends in a norm and an activation.
        convolves = any(isinstance(module, nn.Conv2d) for module in net.maxpool.modules())
        norm, *behind = list(net.maxpool)[-2:] if convolves else (net.bn1, net.act1, *net.maxpool.modules())
        for module in behind:
            if not isinstance(module, (*HOMOGENEOUS, *POOLS)):
                raise ValueError(f'{_name(net, module)} is {type(module).__name__}, whose input has one scale')
        _scale_affine(net, norm, after)
    return kept


def _own_merge(merge: SkipWeight, weight: torch.Tensor) -> SkipWeight:
    """A merge of that weight for one unit: units that shared one need not have the same any more."""
    like, parameters = merge.weight, list(merge.parameters())  # which a weight that is computed is not among
    own = SkipWeight(1.0, fixed=not parameters, device=like.device, dtype=like.dtype)
    own.weight.copy_(weight)
    return own.train(merge.training).requires_grad_(any(each.requires_grad for each in parameters))


def _name(net: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in net.named_modules() if module is part)


def _check_homogeneous(net: nn.Module, block: nn.Module) -> None:
    name = _name(net, block)
    last_act = block.act3 if isinstance(block, Bottleneck) else block.act2
    if not isinstance(last_act, HOMOGENEOUS):
        raise ValueError(f'{name} ends in {type(last_act).__name__}, which is not homogeneous like relu')
    if block.se is not None:
        raise ValueError(f'{name} has a {type(block.se).__name__}, whose output does not scale with its input')


def _scale(
    net: nn.Module, layer: nn.Module, kinds: Sequence[type], tensors: Sequence[str], factor: torch.Tensor
) -> None:
    """Multiply `tensors` of a layer in place, rounding once, where its output is made of them and of nothing else's."""
    name = _name(net, layer)
    # Weight norm and the like change the class; others put a function in the place of `forward`.
    if type(layer) not in kinds or 'forward' in vars(layer):
        patched = ' with a forward of its own' if type(layer) in kinds else ''
        raise ValueError(
            f'{name} is a {type(layer).__name__}{patched}, into which no weight can be folded; kinds that take one are '
            f'{", ".join(dict.fromkeys(kind.__name__ for kind in kinds))}, without parametrizations'
        )
    named = (net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False))
    everything = [tensor for _, tensor in chain(*named)]
    for each in tensors:
        tensor = getattr(layer, each)
        if tensor is None:
            raise ValueError(f'{name} is a {type(layer).__name__} without affine parameters to fold a weight into')
        if sum(other is tensor for other in everything) > 1:
            raise ValueError(f'{name}.{each} is used by more than one layer, which would all take the weight of one')
        tensor.copy_(tensor.double() * factor.to(tensor.device))


def _scale_affine(net: nn.Module, norm: nn.Module, factor: torch.Tensor) -> None:
    _scale(net, norm, NORMS, ('weight', 'bias'), factor)
