"""Checkpoint directories: writing them, reading them with suspicion, their model cards, publishing them to the Hub."""

from timm_weighted_skip.hub.checkpoint import validate_checkpoint
from timm_weighted_skip.hub.config import Results
from timm_weighted_skip.hub.publish import publish
from timm_weighted_skip.hub.save import save_checkpoint, update_results

__all__ = ['Results', 'publish', 'save_checkpoint', 'update_results', 'validate_checkpoint']
