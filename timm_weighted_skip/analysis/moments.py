"""Mean and variance of a net's mapping units' weights over a set of images."""

from collections.abc import Iterable

import torch
from torch import nn

from timm_weighted_skip.analysis.units import gate_weights, mapping_units

__all__ = ['weight_moments']


@torch.inference_mode()
def weight_moments(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """Unit -> 'mean' and 'variance' (ddof 0) over the images: of `[w]` of AdaResNet, of `[lam1, ..., lamK]` of AWM.

    Args:
        model: The net, in eval mode.
        batches: Images (N, C, H, W), on the device of `model`.

    Raises:
        ValueError: The net has no weighted mapping units.
    """
    weights = {unit.name: unit.weight for unit in mapping_units(model)}
    images = {name: weight.reshape(1, -1) for name, weight in weights.items() if weight is not None}
    if len(images) < len(weights):
        seen: dict[str, list[torch.Tensor]] = {}
        with gate_weights(model) as lam:
            for x in batches:
                model(x)
                for name, weight in lam.items():
                    seen.setdefault(name, []).append(weight.double())
        images.update({name: torch.cat(weight) for name, weight in seen.items()})
    return {
        name: {'mean': weight.mean(0).tolist(), 'variance': weight.var(0, correction=0).tolist()}
        for name, weight in images.items()
    }
