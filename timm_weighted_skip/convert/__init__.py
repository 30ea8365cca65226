"""Exact conversions between plain, AdaResNet and AWM nets, and folding AdaResNet's weights away."""

from timm_weighted_skip.convert.fold import fold
from timm_weighted_skip.convert.names import plain_args
from timm_weighted_skip.convert.plain import to_plain
from timm_weighted_skip.convert.weigh import to_adaresnet, to_awm

__all__ = ['fold', 'plain_args', 'to_adaresnet', 'to_awm', 'to_plain']
