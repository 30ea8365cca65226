"""AWM ResNet: branch and shortcut weighted per image, `y = relu(2 * (lam1 * F(x) + lam2 * s(x)))`.

Paper: `Residual Convolutional Neural Network Revisited with Active Weighted Mapping`,
https://arxiv.org/abs/1811.06878. Model arguments beside timm's: `hidden`, `scale` (see `ActiveWeightedMapping`), and
`plain=True`, which leaves the gates out and is the baseline. Other than in timm, `zero_init_last` is false by
default: the gate of a branch that gives 0 at first can shut it before it has learned anything.
"""

from timm.models import register_model
from timm.models.resnet import ResNet

from timm_weighted_skip.layers import ActiveWeightedMapping
from timm_weighted_skip.models.blocks import WeightedBasicBlock, WeightedBottleneck, WeightedResNet
from timm_weighted_skip.models.pretrained import build, default_cfgs_of, timm_cfgs
from timm_weighted_skip.models.resnet_cifar import CIFAR_DEPTHS, CifarResNet, cifar_cfg, cifar_layers

__all__: list[str] = []  # `register_model` adds the names

default_cfgs = default_cfgs_of(
    {
        **timm_cfgs('awm_', [f'resnet{depth}' for depth in (18, 34, 50, 101, 152)]),
        **{f'awm_resnet{depth}_cifar.untrained': cifar_cfg(paper_ids='arXiv:1811.06878') for depth in CIFAR_DEPTHS},
    }
)


def _create_awm_resnet(
    variant: str,
    pretrained: bool = False,
    model_cls: type[WeightedResNet] = WeightedResNet,
    hidden: int = 16,
    scale: float = 2.0,
    plain: bool = False,
    zero_init_last: bool = False,
    **kwargs,
) -> ResNet:
    def merge(channels: int, projection: bool, **dd) -> ActiveWeightedMapping:
        return ActiveWeightedMapping(channels, hidden, scale, plain, **dd)

    return build(model_cls, variant, pretrained, merge=merge, zero_init_last=zero_init_last, **kwargs)


@register_model
def awm_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """AWM ResNet-18, 8 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=(2, 2, 2, 2))
    return _create_awm_resnet('awm_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet34(pretrained: bool = False, **kwargs) -> ResNet:
    """AWM ResNet-34, 16 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=(3, 4, 6, 3))
    return _create_awm_resnet('awm_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """AWM ResNet-50, 16 mapping units."""
    model_args = dict(block=WeightedBottleneck, layers=(3, 4, 6, 3))
    return _create_awm_resnet('awm_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """AWM ResNet-101, 33 mapping units."""
    model_args = dict(block=WeightedBottleneck, layers=(3, 4, 23, 3))
    return _create_awm_resnet('awm_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet152(pretrained: bool = False, **kwargs) -> ResNet:
    """AWM ResNet-152, 50 mapping units."""
    model_args = dict(block=WeightedBottleneck, layers=(3, 8, 36, 3))
    return _create_awm_resnet('awm_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet14_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AWM ResNet-14, 6 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(14))
    return _create_awm_resnet('awm_resnet14_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def awm_resnet20_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AWM ResNet-20, 9 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(20))
    return _create_awm_resnet('awm_resnet20_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def awm_resnet32_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AWM ResNet-32, 15 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(32))
    return _create_awm_resnet('awm_resnet32_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def awm_resnet44_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AWM ResNet-44, 21 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(44))
    return _create_awm_resnet('awm_resnet44_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def awm_resnet56_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AWM ResNet-56, 27 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(56))
    return _create_awm_resnet('awm_resnet56_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def awm_resnet110_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AWM ResNet-110, 54 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(110))
    return _create_awm_resnet('awm_resnet110_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))
