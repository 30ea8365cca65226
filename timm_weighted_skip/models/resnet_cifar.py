"""CIFAR ResNet (He et al., `Deep Residual Learning for Image Recognition`, arXiv 1512.03385, section 4.2).

Depth 6n + 2: a 3x3 stem of 16 channels, three stages of n basic blocks with 16, 32 and 64 channels, a linear head. The
shortcut at the two stage changes is a 1x1 convolution with batch norm, as in the AWM paper's code. Registered here are
the plain nets, which timm lacks; `adaresnet` and `awm_resnet` build their CIFAR nets of the same class.
"""

from typing import Any, ClassVar, Optional, Union

import torch
from timm.models import register_model
from timm.models.resnet import ResNet
from torch import nn

from timm_weighted_skip.checks import check_not_given
from timm_weighted_skip.layers import skip_weights
from timm_weighted_skip.models.blocks import WeightedBasicBlock, WeightedResNet, insert_before
from timm_weighted_skip.models.pretrained import build, default_cfgs_of

__all__ = ['CIFAR_DEPTHS', 'CifarResNet', 'cifar_cfg', 'cifar_layers']

CIFAR_DEPTHS = (14, 20, 32, 44, 56, 110)


class CifarResNet(WeightedResNet):
    """timm's ResNet in its CIFAR form: a total stride of 4, three stages, any input size from 4 x 4 pixels up.

    `layer4` is empty: it lets timm's forward and checkpointing, which name four stages, run as they are.

    Args:
        block, layers, merge: As `WeightedResNet`.
        in_chans: Number of input channels.
        kwargs: Those of timm's `ResNet`, except the ones that shape stem and stages.
    """

    feature_cfg: ClassVar[dict[str, Any]] = dict(out_indices=(0, 1, 2, 3))

    def __init__(self, block: type[WeightedBasicBlock], layers: tuple[int, ...], merge, in_chans: int = 3, **kwargs):
        if len(layers) != 3:
            raise ValueError(f'layers={tuple(layers)} is not allowed; a CIFAR ResNet has three stages')
        # Of timm's stems only the deep one can be 16 channels wide, so it is made and replaced. The last two are named
        # so that they can't be given: there is no stem pool, and timm counts the stride from a stem that divides by 4.
        stem_and_stages = dict(
            stem_type='deep', stem_width=8, channels=(16, 32, 64), replace_stem_pool=False, output_stride=32
        )
        check_not_given(kwargs, stem_and_stages, 'a CIFAR ResNet')
        super().__init__(block, layers, merge, in_chans, **stem_and_stages, **kwargs)
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        self.conv1 = nn.Conv2d(in_chans, 16, kernel_size=3, padding=1, bias=False, **dd)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        insert_before(self, 'global_pool', 'layer4', nn.Sequential())  # the head stays last, where others look for it
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4)):
            info['reduction'] = reduction
        self.min_input_size = 4

    def _feature_indices(self, indices: Optional[Union[int, list[int]]]) -> list[int]:
        """Absolute indices among the stem and three stages, where timm's ResNet counts four stages."""
        levels = range(len(self.feature_info))
        if indices is None:
            return list(levels)
        if isinstance(indices, int):
            assert 0 < indices <= len(levels), f'last-n ({indices}) is out of range (1 to {len(levels)})'
            return list(levels[-indices:])
        assert all(-len(levels) <= i < len(levels) for i in indices), (
            f'feature indices {list(indices)} are out of range (0 to {len(levels) - 1})'
        )
        return [levels[i] for i in indices]

    def forward_intermediates(
        self, x: torch.Tensor, indices: Optional[Union[int, list[int]]] = None, *args, **kwargs
    ) -> Union[list[torch.Tensor], tuple[torch.Tensor, list[torch.Tensor]]]:
        """As timm's, with 4 features: the stem and three stages."""
        return super().forward_intermediates(x, self._feature_indices(indices), *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: Union[int, list[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's, with 4 features: the stem and three stages."""
        indices = self._feature_indices(indices)
        last = len(self.feature_info) - 1
        # Keeping our last stage is, in timm's count, keeping the empty fourth: nothing ends early, the head may stay.
        super().prune_intermediate_layers([i + (i == last) for i in indices], prune_norm, prune_head)
        return indices


def cifar_layers(depth: int) -> tuple[int, ...]:
    """Blocks per stage of the net of `depth` = 6n + 2 layers."""
    return (depth - 2) // 6, (depth - 2) // 6, (depth - 2) // 6


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's default cfg of a 32 x 32 net with the mean and standard deviation of CIFAR-10's training images."""
    return {
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': (8, 8),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': (0.4914, 0.4822, 0.4465),
        'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = default_cfgs_of(
    {f'resnet{depth}_cifar.untrained': cifar_cfg(paper_ids='arXiv:1512.03385') for depth in CIFAR_DEPTHS}
)


def _create_resnet_cifar(variant: str, depth: int, pretrained: bool = False, **kwargs) -> ResNet:
    model_args = dict(block=WeightedBasicBlock, layers=cifar_layers(depth), merge=skip_weights(plain=True))
    return build(CifarResNet, variant, pretrained, **dict(model_args, **kwargs))


@register_model
def resnet14_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR ResNet-14, 6 residual units."""
    return _create_resnet_cifar('resnet14_cifar', 14, pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR ResNet-20, 9 residual units."""
    return _create_resnet_cifar('resnet20_cifar', 20, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR ResNet-32, 15 residual units."""
    return _create_resnet_cifar('resnet32_cifar', 32, pretrained, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR ResNet-44, 21 residual units."""
    return _create_resnet_cifar('resnet44_cifar', 44, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR ResNet-56, 27 residual units."""
    return _create_resnet_cifar('resnet56_cifar', 56, pretrained, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """CIFAR ResNet-110, 54 residual units."""
    return _create_resnet_cifar('resnet110_cifar', 110, pretrained, **kwargs)
