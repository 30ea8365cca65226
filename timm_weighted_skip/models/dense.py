"""timm's DenseNet with the concatenation that a layer, a transition or the final norm reads weighted unit by unit."""

from typing import Any, ClassVar, List  # noqa: UP035  TorchScript reads List

import torch
from timm.models.densenet import DenseBlock, DenseLayer, DenseNet, DenseTransition

from timm_weighted_skip.checks import check_count
from timm_weighted_skip.fused import is_hooked
from timm_weighted_skip.fused_concat import DenseFeatures, can_buffer, can_read, read
from timm_weighted_skip.layers import ActiveWeightedConcat
from timm_weighted_skip.models.blocks import ChecksInputSize, insert_before

__all__ = ['WeightedDenseLayer', 'WeightedDenseNet', 'weigh_connections']


class WeightedDenseLayer(DenseLayer):
    """timm's `DenseLayer` that weighs what it reads. The weighted maps are its own; later layers read the originals."""

    def bottleneck_fn(self, xs: List[torch.Tensor]) -> torch.Tensor:  # noqa: UP006
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what this alone guards
            if isinstance(xs, DenseFeatures) and xs.can_read(self.merge, self.norm1):
                return self.conv1(xs.read(self.merge, self.norm1))
        return self.conv1(self.norm1(self.merge(torch.cat(xs, 1))))


class WeightedDenseBlock(DenseBlock):
    """timm's `DenseBlock` that takes the moments of each map once, for all of its layers."""

    def forward(self, init_features: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what this alone guards
            # A hook on a layer is given the list of maps, and may change them.
            if can_buffer(init_features) and all(
                isinstance(layer, DenseLayer) and not (layer.grad_checkpointing or is_hooked(layer))
                for layer in self.values()
            ):
                return self.forward_buffered(init_features)
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    def forward_buffered(self, init_features: torch.Tensor) -> torch.Tensor:
        layers = list(self.values())
        features = DenseFeatures(self.out_channels, variance=any(layer.norm1.training for layer in layers))
        features.append(init_features)
        for layer in layers:
            features.append(layer(features))
        return features.cat()


class WeightedTransition(DenseTransition):
    """The parts of timm's `DenseTransition` behind the weights of what it reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what this alone guards
            if can_buffer(x) and can_read(x, self[0], self[1]):
                return self.forward_read(x)
        for part in self:
            x = part(x)
        return x

    def forward_read(self, x: torch.Tensor) -> torch.Tensor:
        x = read(x, self[0], self[1])
        for part in list(self)[2:]:
            x = part(x)
        return x


def weigh_connections(model: DenseNet, hidden: int = 24, scale: str = 'units', plain: bool = False) -> None:
    """Put an `ActiveWeightedConcat` before every norm of timm's `model` that reads more than one unit, in place.

    A unit is a dense block's input or the output of one of its layers. What reads a single unit, the first layer of a
    block, has nothing to weigh. timm's parameters keep their names.

    Args:
        model: Net to change.
        hidden, scale, plain: As `ActiveWeightedConcat`.

    Raises:
        ValueError: A layer, block or transition is not timm's own.
    """
    kinds = DenseLayer, DenseBlock, DenseTransition
    for name, module in model.features.named_modules():
        if isinstance(module, DenseBlock) and not all(isinstance(layer, DenseLayer) for layer in module.children()):
            what = 'has parts other than DenseLayer'
        elif isinstance(module, kinds) and type(module) not in kinds:
            what = f'is a {type(module).__name__}'
        else:
            continue
        raise ValueError(f"features.{name} {what}; timm's own layers, blocks and transitions have a weighted form")

    def merge(widths: list[int], like: torch.Tensor) -> ActiveWeightedConcat:
        made = ActiveWeightedConcat(widths, hidden, scale, plain, device=like.device, dtype=like.dtype)
        return made.train(model.training)

    widths = []
    for name, module in list(model.features.named_children()):
        if isinstance(module, DenseBlock):
            if not plain:
                module.__class__ = WeightedDenseBlock
            layers = list(module.children())
            widths = [layers[0].conv1.in_channels]
            for layer in layers:
                if len(widths) > 1:
                    # timm's DenseBlock names its layer class, so the class is changed after the fact.
                    layer.__class__ = WeightedDenseLayer
                    layer.merge = merge(widths, layer.conv1.weight)
                widths.append(layer.conv2.out_channels)
            module.out_channels = sum(widths)  # noted here, as what wraps or shards a layer may hide its shape
        elif isinstance(module, DenseTransition):
            module.__class__ = WeightedTransition
            insert_before(module, 'norm', 'merge', merge(widths, module.conv.weight))
        elif name == 'norm5':
            # Like a convolution: norms may be of 32 bits in a net of 16.
            insert_before(model.features, name, 'merge5', merge(widths, layers[-1].conv2.weight))


class WeightedDenseNet(ChecksInputSize, DenseNet):
    """timm's `DenseNet` with weighted connections.

    Args:
        hidden, scale, plain: As `ActiveWeightedConcat`.
        in_chans: Number of input channels.
        kwargs: Those of timm's `DenseNet`.

    Raises:
        ValueError: `in_chans` is not 1 or more, or as `ActiveWeightedConcat`.
    """

    feature_cfg: ClassVar[dict[str, Any]] = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3, 4))

    def __init__(
        self, hidden: int = 24, scale: str = 'units', plain: bool = False, in_chans: int = 3, **kwargs
    ) -> None:
        check_count('in_chans', in_chans)
        super().__init__(in_chans=in_chans, **kwargs)
        weigh_connections(self, hidden, scale, plain)
        self.layout_changed()
        self.min_input_size = self.feature_info[-1]['reduction']

    def layout_changed(self) -> None:
        """Recompute what depends on `features` and `feature_info`."""
        names = [name for name, _ in self.features.named_children()]
        taps = [info['module'].split('.', 1)[1] for info in self.feature_info]
        # timm's forward_intermediates finds its features by their positions. Pruning leaves `feature_info` as it was.
        self.feature_ends = [names.index(tap) for tap in taps if tap in names]
