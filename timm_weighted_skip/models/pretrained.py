"""timm's checkpoints of a plain backbone as those of its weighted net, of which it is the case at identity."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from torch import nn

from timm_weighted_skip.layers import Gate, SkipWeight

__all__ = ['checkpoint_filter_fn', 'timm_cfgs']


def timm_cfgs(prefix: str, backbones: Iterable[str]) -> dict[str, PretrainedCfg]:
    """Default cfgs of `prefix + backbone` for every checkpoint that the installed timm has of it, timm's default first.

    They name timm's own Hub repositories; `checkpoint_filter_fn` adds what these lack.
    """
    cfgs = {name: cfg for backbone in backbones for name, cfg in get_arch_pretrained_cfgs(backbone).items()}
    return {f'{prefix}{name}': replace(cfg) for name, cfg in cfgs.items()}


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Complete a plain backbone's state dict with weights at identity: `w = 1`, and gates whose last layer is 0."""
    state_dict = dict(state_dict.get('state_dict', state_dict))
    own = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, SkipWeight) and module.weight is not None:
            state_dict.setdefault(f'{name}.weight', torch.ones_like(own[f'{name}.weight']))
        elif isinstance(module, Gate):
            state_dict.setdefault(f'{name}.fc1.weight', own[f'{name}.fc1.weight'])
            state_dict.setdefault(f'{name}.fc2.weight', torch.zeros_like(own[f'{name}.fc2.weight']))
    return state_dict
