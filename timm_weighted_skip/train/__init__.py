"""Training."""

from timm_weighted_skip.train.freezing import AlternateFreezing

__all__ = ['AlternateFreezing']
