"""What a net's architecture and arguments are after a conversion."""

from typing import Any

from torch import nn

__all__ = ['plain_args', 'rename']

MERGE_ARGS = ('hidden', 'plain', 'scale', 'sharing', 'skip_fixed', 'skip_init')

SYNONYMS = {'densenet_bc': 'densenet40_bc_cifar'}
"""`awm_densenet_bc` is `awm_densenet40_bc_cifar`; its plain form is registered under the long name only."""


def rename(model: nn.Module, prefix: str, **merge_args: Any) -> None:
    """Note in the net's `pretrained_cfg` that it is now the `prefix` form ('' for plain) of its architecture.

    Whether a net of that name is registered or not: it is not what it was. What timm has noted of the arguments that it
    was made with, which `timm.models.save_for_hf` writes, becomes those of the plain net and `merge_args`.
    """
    cfg = dict(getattr(model, 'pretrained_cfg', None) or {})
    plain = (cfg.get('architecture') or '').removeprefix('awm_').removeprefix('ada')
    cfg['architecture'] = f'{prefix}{SYNONYMS.get(plain, plain)}'
    model.pretrained_cfg = model.default_cfg = cfg
    if hasattr(model, '_model_args'):
        model._model_args = {**plain_args(model._model_args), **merge_args}


def plain_args(model_args: dict[str, Any]) -> dict[str, Any]:
    """Those of a net's arguments that its plain net has too."""
    return {name: value for name, value in model_args.items() if name not in MERGE_ARGS}
