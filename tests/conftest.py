"""What several tests need."""

import signal

import pytest
import torch
from torch import nn

from timm_weighted_skip import set_fused_merge
from timm_weighted_skip.layers import ActiveWeightedMapping, SkipWeight

# A job in the background of a shell ignores Ctrl-C, and so would all processes that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fused_merge():
    """On again after a test that has turned it off."""
    yield
    set_fused_merge(True)


@pytest.fixture
def one_thread():
    """As in the processes of `training.py`: small nets gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def taken(monkeypatch):
    """A list that grows by an entry for each merge that the single step makes."""
    calls = []
    for merge, name in (
        (SkipWeight, 'merge_relu'),
        (ActiveWeightedMapping, 'merge_relu'),
        (ActiveWeightedMapping, 'norm_relu'),
    ):
        step = getattr(merge, name)
        monkeypatch.setattr(
            merge, name, lambda *args, step=step, name=name, **kwargs: calls.append(name) or step(*args, **kwargs)
        )
    return calls


def images(model, n=2, size=64):
    channels, height, width = model.default_cfg['input_size']
    return torch.randn(n, channels, min(size, height), min(size, width))


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
