"""CIFAR DenseNet-BC (Huang et al., `Densely Connected Convolutional Networks`, arXiv 1608.06993, section 3).

Depth 3 * 2n + 4: a 3x3 stem, three dense blocks of n bottleneck layers with growth 12, transitions that halve the
channels, a linear head. Registered here are the plain nets, which timm lacks; `awm_densenet` weighs the same class.
"""

from typing import Any, ClassVar

from timm.models import register_model
from timm.models.densenet import DenseNet
from torch import nn

from timm_weighted_skip.checks import check_not_given
from timm_weighted_skip.models.dense import WeightedDenseNet
from timm_weighted_skip.models.pretrained import build, default_cfgs_of
from timm_weighted_skip.models.resnet_cifar import cifar_cfg

__all__ = ['CifarDenseNet', 'cifar_densenet_args', 'cifar_densenet_cfg']


class CifarDenseNet(WeightedDenseNet):
    """timm's DenseNet in its CIFAR form: with three blocks a total stride of 4, any input size from 4 x 4 pixels up.

    Args:
        in_chans: Number of input channels.
        kwargs: As `WeightedDenseNet`.
    """

    feature_cfg: ClassVar[dict[str, Any]] = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3))

    def __init__(self, in_chans: int = 3, **kwargs) -> None:
        stem = dict(stem_type='')
        check_not_given(kwargs, stem, 'a CIFAR DenseNet')
        super().__init__(in_chans=in_chans, **stem, **kwargs)
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        width = self.features.conv0.out_channels
        self.features.conv0 = nn.Conv2d(in_chans, width, kernel_size=3, padding=1, bias=False, **dd)
        nn.init.kaiming_normal_(self.features.conv0.weight)
        del self.features.norm0, self.features.pool0
        self.feature_info[0]['module'] = 'features.conv0'
        for info in self.feature_info:
            info['reduction'] = max(1, info['reduction'] // 4)  # timm's stem divides by 2 and then by 2
        self.layout_changed()
        self.min_input_size = self.feature_info[-1]['reduction']


def cifar_densenet_args(depth: int) -> dict[str, Any]:
    """Arguments of the DenseNet-BC of `depth` = 6n + 4 layers with growth 12."""
    return dict(growth_rate=12, block_config=((depth - 4) // 6,) * 3)


def cifar_densenet_cfg(**kwargs) -> dict[str, Any]:
    """`cifar_cfg` with DenseNet's names of the first and the last layer."""
    return cifar_cfg(first_conv='features.conv0', classifier='classifier', **kwargs)


default_cfgs = default_cfgs_of(
    {f'densenet{n}_bc_cifar.untrained': cifar_densenet_cfg(paper_ids='arXiv:1608.06993') for n in (22, 28, 34, 40)}
)


def _create_densenet_cifar(variant: str, depth: int, pretrained: bool = False, **kwargs) -> DenseNet:
    model_args = dict(cifar_densenet_args(depth), plain=True)
    return build(CifarDenseNet, variant, pretrained, **dict(model_args, **kwargs))


@register_model
def densenet22_bc_cifar(pretrained: bool = False, **kwargs) -> DenseNet:
    """CIFAR DenseNet-BC-22, growth 12."""
    return _create_densenet_cifar('densenet22_bc_cifar', 22, pretrained, **kwargs)


@register_model
def densenet28_bc_cifar(pretrained: bool = False, **kwargs) -> DenseNet:
    """CIFAR DenseNet-BC-28, growth 12."""
    return _create_densenet_cifar('densenet28_bc_cifar', 28, pretrained, **kwargs)


@register_model
def densenet34_bc_cifar(pretrained: bool = False, **kwargs) -> DenseNet:
    """CIFAR DenseNet-BC-34, growth 12."""
    return _create_densenet_cifar('densenet34_bc_cifar', 34, pretrained, **kwargs)


@register_model
def densenet40_bc_cifar(pretrained: bool = False, **kwargs) -> DenseNet:
    """CIFAR DenseNet-BC-40, growth 12."""
    return _create_densenet_cifar('densenet40_bc_cifar', 40, pretrained, **kwargs)
