"""What a net costs for one batch."""

from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['Costs', 'count_costs']


class Costs(NamedTuple):
    """What timm's tables tell of a net.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates of convolutions and linear layers.
        activations: Numbers that those layers put out.
    """

    params: int
    macs: int
    activations: int


@torch.no_grad()
def count_costs(model: nn.Module, x: torch.Tensor) -> Costs:
    """Costs of `model`, in the mode it is in, for `x`; on the meta device nothing is allocated or computed."""
    activations = 0
    # Of views of parameters that require gradients torch's counter looks for a graph, which there is none of.
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def count(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal activations
        activations += output.numel()

    with ExitStack() as hooks, FlopCounterMode(display=False) as counter:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                hooks.enter_context(module.register_forward_hook(count))
        functional_call(model, weights, x)
    return Costs(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, activations)
