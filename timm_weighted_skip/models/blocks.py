"""timm's residual blocks and ResNet, with the merge of residual branch and shortcut handed in as a module."""

from collections.abc import Callable
from typing import Any, ClassVar, Optional, Union

import torch
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from timm_weighted_skip.checks import check_count
from timm_weighted_skip.fused import can_fuse, is_hooked
from timm_weighted_skip.fused_norm import can_fuse_norm
from timm_weighted_skip.layers import Gate, SkipWeight

__all__ = [
    'ChecksInputSize',
    'WeightedBasicBlock',
    'WeightedBlock',
    'WeightedBottleneck',
    'WeightedResNet',
    'insert_before',
]


def insert_before(parent: nn.Module, part: str, name: str, module: nn.Module) -> None:
    """Make `module` a part of `parent`, called `name`, in front of that called `part`."""
    parts = list(parent._modules)
    parent.add_module(name, module)
    for behind in parts[parts.index(part) :]:
        parent._modules[behind] = parent._modules.pop(behind)


class WeightedBlock:
    """What a weighted block adds to timm's: `merge`, in the place of `x += shortcut`.

    Args:
        merge: Called with the unit's output channels, whether its shortcut is a projection, and the device and dtype;
            returns a module of `(residual, shortcut)`.
        args, kwargs: Those of timm's block.
    """

    def __init__(self, *args, merge: Callable[..., nn.Module], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.add_merge(merge)

    def add_merge(self, merge: Callable[..., nn.Module]) -> None:
        last_conv = self.conv3 if isinstance(self, Bottleneck) else self.conv2
        dd = {'device': last_conv.weight.device, 'dtype': last_conv.weight.dtype}
        self.merge = merge(last_conv.out_channels, projection=self.downsample is not None, **dd)

    def zero_init_last(self) -> None:
        """Zero the last norm layer as timm does, but not where output and gradient would then be 0, or nearly."""
        if self.merge.starts_open(projection=self.downsample is not None):
            super().zero_init_last()

    def can_fuse(
        self, conv: nn.Module, norm: nn.Module, act: nn.Module, residual: torch.Tensor, shortcut: torch.Tensor
    ) -> bool:
        """Whether `merge.merge_relu` may stand for the merge and `act`, over a branch that no hook was given."""
        parts = (part for part in (conv, norm, self.se, self.drop_path) if part is not None)
        return can_fuse(self.merge, act, residual, shortcut) and not any(map(is_hooked, parts))

    def can_fuse_norm(self, conv: nn.Module, norm: nn.Module, act: nn.Module, x: torch.Tensor) -> bool:
        """Whether nothing stands between the last norm and the merge, and `merge.norm_relu` may do both."""
        drop = self.drop_path
        passes = drop is None or (type(drop) is DropPath and not (drop.training or is_hooked(drop)))
        return self.se is None and passes and can_fuse_norm(self.merge, conv, norm, act, x)


class WeightedBasicBlock(WeightedBlock, BasicBlock):
    """timm's `BasicBlock` with a weighted merge."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)

        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what this alone guards
            if self.can_fuse_norm(self.conv2, self.bn2, self.act2, x):
                if self.downsample is not None:
                    shortcut = self.downsample(shortcut)
                return self.merge.norm_relu(x, shortcut, self.conv2, self.bn2)

        x = self.conv2(x)
        x = self.bn2(x)

        if self.se is not None:
            x = self.se(x)

        if self.drop_path is not None:
            x = self.drop_path(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what this alone guards
            if self.can_fuse(self.conv2, self.bn2, self.act2, x, shortcut):
                return self.merge.merge_relu(x, shortcut)
        return self.act2(self.merge(x, shortcut))


class WeightedBottleneck(WeightedBlock, Bottleneck):
    """timm's `Bottleneck` with a weighted merge."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)

        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what this alone guards
            if self.can_fuse_norm(self.conv3, self.bn3, self.act3, x):
                if self.downsample is not None:
                    shortcut = self.downsample(shortcut)
                return self.merge.norm_relu(x, shortcut, self.conv3, self.bn3)

        x = self.conv3(x)
        x = self.bn3(x)

        if self.se is not None:
            x = self.se(x)

        if self.drop_path is not None:
            x = self.drop_path(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.can_fuse(self.conv3, self.bn3, self.act3, x, shortcut):
                return self.merge.merge_relu(x, shortcut)
        return self.act3(self.merge(x, shortcut))


class ChecksInputSize:
    """Refuses images that the net's stride would leave without a single whole output pixel."""

    min_input_size: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2], x.shape[-1]
        given = 'input'
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what this alone guards
            if not torch.compiler.is_compiling():  # whose graph would be of the size that it writes into a text
                given = f'input of {height}x{width} pixels'
        # Not a branch, so that tracing, scripting and exporting see no data-dependent control flow.
        torch._assert(
            (height >= self.min_input_size) & (width >= self.min_input_size),
            f'{given} is too small; this net takes {self.min_input_size}x{self.min_input_size} pixels and more',
        )
        x = self.forward_features(x)
        return self.forward_head(x)


class WeightedResNet(ChecksInputSize, ResNet):
    """timm's `ResNet` of weighted blocks.

    Args:
        block: `WeightedBasicBlock` or `WeightedBottleneck`.
        layers: Blocks per stage.
        merge: Maker of the units' merges, see `WeightedBlock`.
        in_chans: Number of input channels.
        zero_init_last: Whether a fresh unit's last norm starts at 0, where `merge` allows it.
        block_args: Further arguments of the blocks.
        kwargs: Those of timm's `ResNet`.

    Raises:
        ValueError: `in_chans` is not 1 or more.
    """

    feature_cfg: ClassVar[dict[str, Any]] = dict(out_indices=(0, 1, 2, 3, 4))
    starts_closed = True  # of a net that timm made

    def __init__(
        self,
        block: type[Union[WeightedBasicBlock, WeightedBottleneck]],
        layers: tuple[int, ...],
        merge: Callable[..., nn.Module],
        in_chans: int = 3,
        zero_init_last: bool = True,
        block_args: Optional[dict[str, Any]] = None,
        **kwargs,
    ) -> None:
        check_count('in_chans', in_chans)
        block_args = {**(block_args or {}), 'merge': merge}
        super().__init__(
            block, layers, in_chans=in_chans, zero_init_last=zero_init_last, block_args=block_args, **kwargs
        )
        self.starts_closed = zero_init_last
        self.min_input_size = self.feature_info[-1]['reduction']

    @torch.jit.ignore
    def init_weights(self, zero_init_last: Optional[bool] = None) -> None:
        """As timm's; by default it draws the start that the net was made with, that of its merges included."""
        if zero_init_last is None:
            zero_init_last = self.starts_closed
            for module in self.modules():
                if isinstance(module, (SkipWeight, Gate)):
                    module.reset_parameters()
        super().init_weights(zero_init_last)
