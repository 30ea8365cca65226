"""Mean weights of a net's mapping units over a set of images."""

from collections.abc import Iterable

import torch
from torch import nn

from timm_weighted_skip.analysis.units import gate_weights, mapping_units

__all__ = ['mean_weights']


@torch.inference_mode()
def mean_weights(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, list[float]]:
    """Unit -> its weights, averaged over the images: `[w]` of AdaResNet, `[lam1, ..., lamK]` of AWM.

    Args:
        model: The net, in eval mode.
        batches: Images (N, C, H, W), on the device of `model`.

    Raises:
        ValueError: The net has no weighted mapping units.
    """
    weights = {unit.name: unit.weight for unit in mapping_units(model)}
    if any(weight is None for weight in weights.values()):
        count, sums = 0, dict[str, torch.Tensor]()
        with gate_weights(model) as lam:
            for x in batches:
                model(x)
                count += len(x)
                for name, weight in lam.items():
                    sums[name] = sums.get(name, 0) + weight.double().sum(0)
        weights.update({name: total / count for name, total in sums.items()})
    return {name: weight.reshape(-1).tolist() for name, weight in weights.items() if weight is not None}
