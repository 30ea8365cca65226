"""Residual nets with weighted skips for timm: AdaResNet and AWM. Importing this registers them in timm."""

from timm_weighted_skip import models  # noqa: F401
from timm_weighted_skip.analysis.units import MappingUnit, mapping_units
from timm_weighted_skip.fused import set_fused_merge
from timm_weighted_skip.train.freezing import AlternateFreezing

__all__ = ['AlternateFreezing', 'MappingUnit', 'mapping_units', 'set_fused_merge']
__version__ = '0.1.0'
