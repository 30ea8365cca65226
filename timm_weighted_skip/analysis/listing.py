"""The models of this package in a table: what they cost and which checkpoints there are."""

from dataclasses import dataclass
from typing import Any, Optional

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg_value, split_model_name_tag

from timm_weighted_skip.analysis.tables import Table
from timm_weighted_skip.analysis.units import named_merges
from timm_weighted_skip.costs import count_costs
from timm_weighted_skip.models.names import model_names

__all__ = ['ModelCost', 'model_cost', 'model_table']


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Attributes:
        params: Trainable parameters.
        macs: Multiply-accumulates of convolutions and linear layers for one image.
        units: Weighted mapping units; 0 for a plain net.
        input_size: (C, H, W).
        tags: Tags of its checkpoints.
    """

    name: str
    params: int
    macs: int
    units: int
    input_size: tuple[int, int, int]
    tags: list[str]


def model_cost(name: str, input_size: Optional[tuple[int, int, int]] = None) -> ModelCost:
    """Count on the meta device: nothing is allocated or computed.

    Args:
        name: Of a registered model.
        input_size: (C, H, W); the model's default if None.
    """
    with torch.device('meta'):
        size: Any = input_size or get_pretrained_cfg_value(name, 'input_size')
        model = timm.create_model(name, in_chans=size[0]).eval()
        costs = count_costs(model, torch.empty(1, *size))
    try:
        units = len(named_merges(model))
    except ValueError:
        units = 0
    cfgs = get_arch_pretrained_cfgs(name).items()
    tags = [split_model_name_tag(tagged)[1] for tagged, cfg in cfgs if cfg.has_weights]
    return ModelCost(name, costs.params, costs.macs, units, size, tags)


def model_table(pattern: str = '*') -> Table:
    """The models that match `pattern`.

    Raises:
        ValueError: None matches.
    """
    rows = []
    for cost in map(model_cost, model_names(pattern)):
        tags = ', '.join(cost.tags[:3]) + (f' and {len(cost.tags) - 3} more' if len(cost.tags) > 3 else '')
        size = 'x'.join(map(str, cost.input_size))
        rows.append([cost.name, cost.params / 1e6, cost.macs / 1e9, cost.units or None, size, tags or '-'])
    return Table(['model', 'params (M)', 'MACs (G)', 'units', 'input', 'checkpoints'], rows)
