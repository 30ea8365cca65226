"""AdaResNet: ResNets whose shortcuts have a learned weight, `y = relu(F(x) + w * s(x))`.

Paper: `AdaResNet: Enhancing Residual Networks with Dynamic Weight Adjustment for Improved Feature Integration`,
https://arxiv.org/abs/2408.09958. Model arguments beside timm's: `sharing`, `skip_init` and `skip_fixed`
(`sharing`, `init` and `fixed` of `skip_weights`), and `plain=True`, which leaves the weights out and is the baseline.
"""

from timm.models import register_model
from timm.models.resnet import ResNet

from timm_weighted_skip.layers import SkipInit, skip_weights
from timm_weighted_skip.models.blocks import WeightedBasicBlock, WeightedBottleneck, WeightedResNet
from timm_weighted_skip.models.pretrained import build, default_cfgs_of, timm_cfgs
from timm_weighted_skip.models.resnet_cifar import CIFAR_DEPTHS, CifarResNet, cifar_cfg, cifar_layers
from timm_weighted_skip.models.resnet_released import ReleasedResNet, released_cfg

__all__: list[str] = []  # `register_model` adds the names

default_cfgs = default_cfgs_of(
    {
        **timm_cfgs('ada', [f'resnet{depth}' for depth in (18, 34, 50, 101, 152)]),
        **{f'adaresnet{depth}_cifar.untrained': cifar_cfg(paper_ids='arXiv:2408.09958') for depth in CIFAR_DEPTHS},
        'adaresnet18_released.untrained': released_cfg(paper_ids='arXiv:2408.09958'),
    }
)


def _create_adaresnet(
    variant: str,
    pretrained: bool = False,
    model_cls: type[WeightedResNet] = WeightedResNet,
    sharing: str = 'block',
    skip_init: SkipInit = 0.0,
    skip_fixed: bool = False,
    plain: bool = False,
    **kwargs,
) -> ResNet:
    merge = skip_weights(sharing, skip_init, skip_fixed, plain)
    return build(model_cls, variant, pretrained, merge=merge, **kwargs)


@register_model
def adaresnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """AdaResNet-18, 8 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=(2, 2, 2, 2))
    return _create_adaresnet('adaresnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet34(pretrained: bool = False, **kwargs) -> ResNet:
    """AdaResNet-34, 16 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=(3, 4, 6, 3))
    return _create_adaresnet('adaresnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """AdaResNet-50, 16 mapping units."""
    model_args = dict(block=WeightedBottleneck, layers=(3, 4, 6, 3))
    return _create_adaresnet('adaresnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """AdaResNet-101, 33 mapping units."""
    model_args = dict(block=WeightedBottleneck, layers=(3, 4, 23, 3))
    return _create_adaresnet('adaresnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet152(pretrained: bool = False, **kwargs) -> ResNet:
    """AdaResNet-152, 50 mapping units."""
    model_args = dict(block=WeightedBottleneck, layers=(3, 8, 36, 3))
    return _create_adaresnet('adaresnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet14_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AdaResNet-14, 6 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(14))
    return _create_adaresnet('adaresnet14_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def adaresnet20_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AdaResNet-20, 9 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(20))
    return _create_adaresnet('adaresnet20_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def adaresnet32_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AdaResNet-32, 15 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(32))
    return _create_adaresnet('adaresnet32_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def adaresnet44_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AdaResNet-44, 21 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(44))
    return _create_adaresnet('adaresnet44_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def adaresnet56_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AdaResNet-56, 27 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(56))
    return _create_adaresnet('adaresnet56_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def adaresnet110_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR AdaResNet-110, 54 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(110))
    return _create_adaresnet('adaresnet110_cifar', pretrained, CifarResNet, **dict(model_args, **kwargs))


@register_model
def adaresnet18_released(pretrained: bool = False, **kwargs) -> ResNet:
    """The net of AdaResNet's released code, 8 mapping units."""
    model_args = dict(block=WeightedBasicBlock, layers=(2, 2, 2, 2))
    return _create_adaresnet('adaresnet18_released', pretrained, ReleasedResNet, **dict(model_args, **kwargs))
