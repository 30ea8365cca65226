"""The models of this package in a table: what they cost and which checkpoints there are."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg_value, split_model_name_tag
from torch.utils.flop_counter import FlopCounterMode

from timm_weighted_skip.analysis.units import named_merges
from timm_weighted_skip.models.names import model_names

__all__ = ['ModelCost', 'model_cost', 'model_table']


@dataclass(frozen=True)
class ModelCost:
    """What a model costs at its default input size.

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


def model_cost(name: str) -> ModelCost:
    """Count on the meta device: nothing is allocated or computed."""
    with torch.device('meta'), torch.no_grad():
        model = timm.create_model(name).eval()
        input_size: Any = get_pretrained_cfg_value(name, 'input_size')
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.empty(1, *input_size))
    try:
        units = len(named_merges(model))
    except ValueError:
        units = 0
    params = sum(p.numel() for p in model.parameters())
    cfgs = get_arch_pretrained_cfgs(name).items()
    tags = [split_model_name_tag(tagged)[1] for tagged, cfg in cfgs if cfg.has_weights]
    return ModelCost(name, params, counter.get_total_flops() // 2, units, input_size, tags)


def model_table(pattern: str = '*', markdown: bool = False) -> str:
    """A table of the models that match `pattern`, as aligned text or in Markdown.

    Raises:
        ValueError: None matches.
    """
    rows = [('model', 'params (M)', 'MACs (M)', 'units', 'input', 'checkpoints')]
    for cost in map(model_cost, model_names(pattern)):
        size = 'x'.join(map(str, cost.input_size))
        tags = ', '.join(cost.tags[:3]) + (f' and {len(cost.tags) - 3} more' if len(cost.tags) > 3 else '') or '-'
        rows.append((cost.name, f'{cost.params / 1e6:.3f}', f'{cost.macs / 1e6:.1f}', str(cost.units), size, tags))
    if markdown:
        rows.insert(1, ('---', '---:', '---:', '---:', '---', '---'))
        return '\n'.join(f'| {" | ".join(row)} |' for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(c.rjust(w) if 0 < i < 4 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )
