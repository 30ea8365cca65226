"""Plain nets out of weighted ones, where that is exact."""

import copy

import torch
from timm.models.densenet import DenseBlock, DenseLayer, DenseNet, DenseTransition
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.utils import unwrap_model
from torch import nn

from timm_weighted_skip.convert.names import rename
from timm_weighted_skip.layers import ActiveWeightedConcat, ActiveWeightedMapping, SkipWeight
from timm_weighted_skip.models.blocks import WeightedBasicBlock, WeightedBottleneck, WeightedResNet
from timm_weighted_skip.models.dense import WeightedDenseBlock, WeightedDenseLayer, WeightedDenseNet, WeightedTransition

__all__ = ['to_plain', 'unweigh']

PLAIN = {
    WeightedBasicBlock: BasicBlock,
    WeightedBottleneck: Bottleneck,
    WeightedDenseBlock: DenseBlock,
    WeightedDenseLayer: DenseLayer,
    WeightedTransition: DenseTransition,
}


@torch.no_grad()
def _why_not_plain(merge: nn.Module, projection: bool) -> str:
    """Why `merge`, of a unit with a `projection` or without, is not the plain sum or concatenation; '' if it is."""
    if any(tensor.is_meta for tensor in merge.state_dict().values()):
        return 'its weights are on the meta device, where they have no values'
    if isinstance(merge, SkipWeight):
        if merge.weight is None or merge.weight == 1:
            return ''
        hint = ' (`fold` can absorb it)' if projection or merge.weight > 0 else ''
        return f'w = {merge.weight.item():.4g}, not 1{hint}'
    if merge.gate is None:
        return ''
    if merge.gate.fc2.weight.any() and merge.gate.fc1.weight.any():
        return "the gate's last layer is not 0, so its weights depend on the image"
    paths = merge.gate.fc2.out_features
    return '' if merge.gate.scale == paths else f'scale = {merge.gate.scale:g}, not {paths}'


def unweigh(model: nn.Module) -> None:
    """Remove the merges of `model`, in place.

    Raises:
        ValueError: A merge is not the plain sum or concatenation; the message names the units.
    """
    merges = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (SkipWeight, ActiveWeightedMapping, ActiveWeightedConcat))
    }
    reasons: dict[str, str] = {}
    for name, merge in merges.items():
        unit = name.removesuffix('.merge')
        projection = getattr(model.get_submodule(unit), 'downsample', None) is not None
        if why := _why_not_plain(merge, projection):
            reasons[unit] = why
    if reasons:
        first = '; '.join(f'{name}: {why}' for name, why in list(reasons.items())[:3])
        raise ValueError(
            f'{len(reasons)} of {len(merges)} mapping units differ from the plain net, which has no place for their '
            f'weights ({first})'
        )
    for module in list(model.modules()):
        if type(module) in PLAIN:
            if hasattr(module, 'merge'):
                del module.merge
            module.__class__ = PLAIN[type(module)]
    if isinstance(model, DenseNet) and merges:
        for name, child in list(model.features.named_children()):
            if isinstance(child, ActiveWeightedConcat):
                delattr(model.features, name)
        model.layout_changed()
    # Plain nets of timm's own layout need nothing of this package.
    for weighted, plain in ((WeightedResNet, ResNet), (WeightedDenseNet, DenseNet)):
        if type(model) is weighted:
            del model.min_input_size
            model.__class__ = plain


def to_plain(model: nn.Module) -> nn.Module:
    """The plain timm net with the weights and the output of `model`, whose weights must be at identity.

    That is `w = 1` in an AdaResNet; in an AWM net gates whose last layer is 0 at the default `scale`.

    Args:
        model: An AdaResNet or an AWM net. It stays as it is; the result is a copy.

    Raises:
        ValueError: A mapping unit differs from the plain one, and why.
    """
    net = copy.deepcopy(unwrap_model(model))
    unweigh(net)
    rename(net, '')
    return net
