"""The weights of a net's mapping units, read out of the net."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from timm.utils import unwrap_model
from torch import nn

from timm_weighted_skip.layers import ActiveWeightedConcat, ActiveWeightedMapping, Gate, SkipWeight

__all__ = ['MappingUnit', 'check_nan', 'eval_mode', 'gate_weights', 'gates', 'mapping_units', 'named_merges']


@dataclass(frozen=True)
class MappingUnit:
    """One place of a net where paths merge.

    Attributes:
        name: The block's, as timm names it: `layer1.0`, `features.denseblock1.denselayer2`.
        kind: 'identity' or 'projection' after the unit's shortcut, 'concat' in a DenseNet.
        weight: AdaResNet: `w`, shape (). AWM: `lam` per image, (N, K) with rows that sum to 1; `lam[:, 0]` is the
            residual branch's, or the first unit's of a concatenation. None for AWM without images.
    """

    name: str
    kind: str
    weight: Optional[torch.Tensor]


def named_merges(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """Name -> (kind, merge) of the weighted units of `model`, in forward order.

    Raises:
        ValueError: The net has none.
    """
    merges: dict[str, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ActiveWeightedConcat) and module.gate is not None:
            merges[name.removesuffix('.merge')] = ('concat', module)
        merge = getattr(module, 'merge', None)
        if (isinstance(merge, SkipWeight) and merge.weight is not None) or (
            isinstance(merge, ActiveWeightedMapping) and merge.gate is not None
        ):
            merges[name] = ('identity' if module.downsample is None else 'projection', merge)
    if not merges:
        raise ValueError(
            f'{type(model).__name__} has no weighted mapping units; nets that have are called adaresnet* and awm_*, '
            'made without plain=True'
        )
    return merges


def gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of an AWM net by unit name, in forward order; empty for an AdaResNet.

    Raises:
        ValueError: The net has no weighted mapping units.
    """
    merges = {name: merge for name, (_, merge) in named_merges(unwrap_model(model)).items()}
    return {name: merge.gate for name, merge in merges.items() if not isinstance(merge, SkipWeight)}


@contextmanager
def gate_weights(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """While active, every forward of `model` leaves each AWM unit's `lam`, (N, K), in the yielded dict, by unit name.

    A compiled net runs uncompiled meanwhile: what has been compiled before does not see the hooks.

    Raises:
        ValueError: The net has no weighted mapping units.
    """
    weights: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda gate, args, output: weights.__setitem__(name, output.detach() / gate.scale)

    handles = [gate.register_forward_hook(keep(name)) for name, gate in gates(model).items()]
    try:
        with torch.compiler.set_stance('force_eager'):
            yield weights
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module of `model` in eval mode, and afterwards each in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_nan(bad: list[str], total: int) -> None:
    if bad:
        raise ValueError(f'the weights of {len(bad)} of {total} mapping units are NaN: {", ".join(bad[:5])}')


@torch.no_grad()
def mapping_units(model: nn.Module, x: Optional[torch.Tensor] = None) -> list[MappingUnit]:
    """The weighted mapping units of any AdaResNet or AWM net in forward order, with their current weights.

    Args:
        model: The net; compiled, wrapped for data-parallel training and of any dtype as it may be.
        x: Images (N, C, H, W) to infer an AWM net's weights from, in eval mode.

    Raises:
        ValueError: The net has no weighted mapping units, a weight is NaN, or they are on the meta device.
    """
    model = unwrap_model(model)
    merges = named_merges(model)
    weights = {name: unit.weight.detach().clone() for name, (_, unit) in merges.items() if isinstance(unit, SkipWeight)}
    if x is not None and len(weights) < len(merges):
        like = next(model.parameters())
        with eval_mode(model), gate_weights(model) as lam:
            model(x.to(like.device, like.dtype))
        weights.update(lam)
    if any(weight.is_meta for weight in weights.values()):
        raise ValueError('a net on the meta device has no weights to read; load them first')
    check_nan([name for name, weight in weights.items() if weight.isnan().any()], len(merges))
    return [MappingUnit(name, kind, weights.get(name)) for name, (kind, _) in merges.items()]
