"""The 8-unit net of AdaResNet's released code (github.com/suguest/AdaResNet), with plain skips.

Its units are the rows of the paper's Tables I and II. It is not a ResNet-50 and not timm's ResNet-18: all four stages
halve the map, the first included, each starts with a projection unit, and every convolution has a bias.
"""

import torch
from timm.layers import get_norm_layer
from timm.models import register_model
from timm.models.resnet import ResNet, downsample_avg, downsample_conv
from torch import nn
from torch.nn.functional import conv2d

from timm_weighted_skip.checks import check_not_given
from timm_weighted_skip.layers import skip_weights
from timm_weighted_skip.models.blocks import WeightedBasicBlock, WeightedResNet
from timm_weighted_skip.models.pretrained import build, default_cfgs_of
from timm_weighted_skip.models.resnet_cifar import cifar_cfg

__all__ = ['ReleasedResNet', 'released_cfg']


class CentredConv2d(nn.Conv2d):
    """A convolution of 3x3, padded by 1, that for maps of one pixel reads its centre alone: the rest meets padding.

    The last stage, with three quarters of the net's weights, has no others, which would cost a CPU a quarter of a step.
    Traced and exported nets keep the whole kernel, since they may be given other sizes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what this alone guards
            if (
                type(x) is torch.Tensor  # not a proxy of FX
                and x.is_cpu
                and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
                and x.shape[2:] == (1, 1)
                and (self.groups, self.padding, self.padding_mode) == (1, (1, 1), 'zeros')
            ):
                return conv2d(x, self.weight[:, :, 1:2, 1:2], self.bias)
        return self._conv_forward(x, self.weight, self.bias)


class ReleasedResNet(WeightedResNet):
    """timm's ResNet-18 changed to the released net: a total stride of 64, biased convolutions.

    Args:
        block, layers, merge, in_chans, kwargs: As `WeightedResNet`.
    """

    def __init__(self, block: type[WeightedBasicBlock], layers: tuple[int, ...], merge, in_chans: int = 3, **kwargs):
        fixed = dict(output_stride=32, aa_layer=None)
        check_not_given(kwargs, fixed, 'a released net')
        super().__init__(block, layers, merge, in_chans, **fixed, **kwargs)
        dd = {name: kwargs[name] for name in ('device', 'dtype') if name in kwargs}
        unit = self.layer1[0]
        width = unit.conv2.out_channels
        unit.stride, unit.conv1.stride = 2, (2, 2)
        downsample = downsample_avg if kwargs.get('avg_down') else downsample_conv
        size, norm = kwargs.get('down_kernel_size', 1), get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d))
        unit.downsample = downsample(unit.conv1.in_channels, width, size, stride=2, norm_layer=norm, **dd)
        nn.init.kaiming_normal_(unit.downsample[-2].weight, mode='fan_out', nonlinearity='relu')
        unit.add_merge(merge)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))
                if (module.kernel_size, module.stride) == ((3, 3), (1, 1)):
                    module.__class__ = CentredConv2d  # in place, so that weights are drawn as in timm's ResNet
        for info in self.feature_info[1:]:
            info['reduction'] *= 2
        self.min_input_size = 28  # MNIST's, which the paper feeds to it, although its stride is 64


def released_cfg(**kwargs) -> dict:
    """The released code's inputs: 32 x 32 pixels in [0, 1], not normalised."""
    return cifar_cfg(pool_size=(1, 1), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **kwargs)


default_cfgs = default_cfgs_of({'resnet18_released.untrained': released_cfg(paper_ids='arXiv:2408.09958')})


@register_model
def resnet18_released(pretrained: bool = False, **kwargs) -> ResNet:
    """The plain net of AdaResNet's released code, 8 residual units."""
    model_args = dict(block=WeightedBasicBlock, layers=(2, 2, 2, 2), merge=skip_weights(plain=True))
    return build(ReleasedResNet, 'resnet18_released', pretrained, **dict(model_args, **kwargs))
