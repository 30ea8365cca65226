"""What a net's architecture is called after a conversion."""

from torch import nn

__all__ = ['rename']


def rename(model: nn.Module, prefix: str) -> None:
    """Note in the net's `pretrained_cfg` that it is now the `prefix` form ('' for plain) of its architecture.

    Whether a net of that name is registered or not: it is not what it was.
    """
    cfg = dict(getattr(model, 'pretrained_cfg', None) or {})
    plain = (cfg.get('architecture') or '').removeprefix('awm_').removeprefix('ada')
    cfg['architecture'] = f'{prefix}{plain}'
    model.pretrained_cfg = model.default_cfg = cfg
