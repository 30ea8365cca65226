"""Reading and analysing the weights of mapping units."""

from timm_weighted_skip.analysis.units import MappingUnit, gate_weights, mapping_units

__all__ = ['MappingUnit', 'gate_weights', 'mapping_units']
