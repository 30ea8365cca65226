"""Weights at identity for any ResNet or DenseNet of timm: the same weights, the same output, ready to train."""

import copy
from collections.abc import Callable
from typing import Optional, TypeVar, Union

from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.utils import unwrap_model
from torch import nn

from timm_weighted_skip.convert.names import rename
from timm_weighted_skip.convert.plain import unweigh
from timm_weighted_skip.layers import ActiveWeightedMapping, skip_weights
from timm_weighted_skip.models.blocks import WeightedBasicBlock, WeightedBottleneck, WeightedResNet
from timm_weighted_skip.models.dense import WeightedDenseNet, weigh_connections

__all__ = ['to_adaresnet', 'to_awm']

Net = TypeVar('Net', bound=Union[ResNet, DenseNet])

WEIGHTED = {BasicBlock: WeightedBasicBlock, Bottleneck: WeightedBottleneck}


def _weigh_blocks(model: ResNet, merge: Callable[..., nn.Module]) -> None:
    """Give every block of `model` a merge made by `merge`, in place; see `WeightedBlock`.

    Raises:
        ValueError: A block is not one of timm's `BasicBlock` and `Bottleneck`.
    """
    blocks = {name: block for name, block in model.named_modules() if hasattr(block, 'downsample')}
    for name, block in blocks.items():
        if type(block) not in WEIGHTED:
            raise ValueError(
                f'{name} is a {type(block).__name__}, which has no weighted form; blocks that have are '
                f'{" and ".join(kind.__name__ for kind in WEIGHTED)}'
            )
    if type(model) is ResNet:
        model.__class__ = WeightedResNet
        model.min_input_size = 1  # it takes what the plain net takes
    for block in blocks.values():
        block.__class__ = WEIGHTED[type(block)]
        block.add_merge(merge)
        block.merge.train(block.training)


def _plain_copy(model: Net) -> Net:
    """A copy of `model` without merges.

    Raises:
        ValueError: `model` is neither a ResNet nor a DenseNet of timm, or has weights already.
    """
    model = unwrap_model(model)
    if not isinstance(model, (ResNet, DenseNet)):
        raise ValueError(f"{type(model).__name__} can't be converted; timm's ResNet and DenseNet classes can")
    net = copy.deepcopy(model)
    unweigh(net)
    return net


def to_awm(model: Net, hidden: Optional[int] = None) -> Net:
    """An AWM net with the weights and the output of the plain net `model`: its gates' last layers are 0.

    Make a ResNet that isn't trained yet with `zero_init_last=False`, as the registered AWM nets are: a gate can shut
    out a branch that gives 0.

    Args:
        model: Any net of timm's ResNet class with its two standard blocks (resnet, resnext, wide, seresnet, ecaresnet,
            the c, d, s and t stems, ...) or of its DenseNet class. It stays as it is; the result is a copy.
        hidden: The gates' hidden width; by default 16 in a ResNet and 24 in a DenseNet, as in the registered nets.

    Raises:
        ValueError: `model` is of another class or block, or has trained weights already, or `hidden` is no width.
    """
    net = _plain_copy(model)
    width = hidden if hidden is not None else 16 if isinstance(net, ResNet) else 24
    if isinstance(net, ResNet):
        _weigh_blocks(net, lambda channels, projection, **dd: ActiveWeightedMapping(channels, width, **dd))
    else:
        if type(net) is DenseNet:
            net.__class__ = WeightedDenseNet
            net.min_input_size = 1  # it takes what the plain net takes
        if not isinstance(net, WeightedDenseNet):
            raise ValueError(f"{type(net).__name__} can't be converted; of DenseNets, timm's own class and ours can")
        weigh_connections(net, width)
        net.layout_changed()
    rename(net, 'awm_', hidden=width)
    return net


def to_adaresnet(model: ResNet, sharing: str = 'block', fixed: bool = False) -> ResNet:
    """An AdaResNet with the weights and the output of the plain net `model`: its `w` are 1.

    Args:
        model: As for `to_awm`, but a ResNet. It stays as it is; the result is a copy.
        sharing, fixed: As for `skip_weights`.

    Raises:
        ValueError: `model` is of another class or block, or has trained weights already, or `sharing` is unknown.
    """
    net = _plain_copy(model)
    if not isinstance(net, ResNet):
        raise ValueError(
            f"{type(net).__name__} can't be converted; AdaResNet weighs the shortcuts of timm's ResNet class"
        )
    _weigh_blocks(net, skip_weights(sharing, init=1.0, fixed=fixed))
    rename(net, 'ada', sharing=sharing, **(dict(skip_fixed=True, skip_init=1.0) if fixed else {}))
    return net
