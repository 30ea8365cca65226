"""AWM DenseNet: every incoming connection of a layer weighted per image (arXiv 1811.06878, section 4.3, Fig. 8).

Paper: `Residual Convolutional Neural Network Revisited with Active Weighted Mapping`,
https://arxiv.org/abs/1811.06878. Model arguments beside timm's: `hidden`, `scale` (see `ActiveWeightedConcat`), and
`plain=True`, which leaves the gates out and is the baseline.
"""

from timm.models import register_model
from timm.models.densenet import DenseNet

from timm_weighted_skip.models.dense import WeightedDenseNet
from timm_weighted_skip.models.densenet_cifar import CifarDenseNet, cifar_densenet_args, cifar_densenet_cfg
from timm_weighted_skip.models.pretrained import build, default_cfgs_of, timm_cfgs

__all__: list[str] = []  # `register_model` adds the names

_CIFAR_NAMES = ('awm_densenet_bc', *(f'awm_densenet{depth}_bc_cifar' for depth in (22, 28, 34, 40)))

default_cfgs = default_cfgs_of(
    {
        **timm_cfgs('awm_', ['densenet121']),
        **{f'{name}.untrained': cifar_densenet_cfg(paper_ids='arXiv:1811.06878') for name in _CIFAR_NAMES},
    }
)


def _create_awm_densenet_cifar(variant: str, depth: int, pretrained: bool = False, **kwargs) -> DenseNet:
    return build(CifarDenseNet, variant, pretrained, **dict(cifar_densenet_args(depth), **kwargs))


@register_model
def awm_densenet121(pretrained: bool = False, **kwargs) -> DenseNet:
    """AWM DenseNet-121, 58 gated reads in 4 blocks."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16))
    return build(WeightedDenseNet, 'awm_densenet121', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_densenet22_bc_cifar(pretrained: bool = False, **kwargs) -> DenseNet:
    """CIFAR AWM DenseNet-BC-22, growth 12, 9 gated reads."""
    return _create_awm_densenet_cifar('awm_densenet22_bc_cifar', 22, pretrained, **kwargs)


@register_model
def awm_densenet28_bc_cifar(pretrained: bool = False, **kwargs) -> DenseNet:
    """CIFAR AWM DenseNet-BC-28, growth 12, 12 gated reads."""
    return _create_awm_densenet_cifar('awm_densenet28_bc_cifar', 28, pretrained, **kwargs)


@register_model
def awm_densenet34_bc_cifar(pretrained: bool = False, **kwargs) -> DenseNet:
    """CIFAR AWM DenseNet-BC-34, growth 12, 15 gated reads."""
    return _create_awm_densenet_cifar('awm_densenet34_bc_cifar', 34, pretrained, **kwargs)


@register_model
def awm_densenet40_bc_cifar(pretrained: bool = False, **kwargs) -> DenseNet:
    """CIFAR AWM DenseNet-BC-40, growth 12, 18 gated reads."""
    return _create_awm_densenet_cifar('awm_densenet40_bc_cifar', 40, pretrained, **kwargs)


@register_model
def awm_densenet_bc(pretrained: bool = False, **kwargs) -> DenseNet:
    """The same net as `awm_densenet40_bc_cifar`, under a name that need not know its depth."""
    return _create_awm_densenet_cifar('awm_densenet_bc', 40, pretrained, **kwargs)
