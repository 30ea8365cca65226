"""What several tests need."""

import pytest
import torch
from torch import nn

from timm_weighted_skip import set_fused_merge


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fused_merge():
    """On again after a test that has turned it off."""
    yield
    set_fused_merge(True)


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """`model` with batch norms as after training: no zeros, no identity, no two paths alike by chance."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.uniform_(0.3, 1, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
    return model
