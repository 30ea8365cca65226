"""How fresh nets start: closed or open, trainable in any case, and so again when their weights are drawn anew."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import images
from torch import nn

from timm_weighted_skip import mapping_units
from timm_weighted_skip.layers import Gate
from timm_weighted_skip.models.names import model_names


def learns_one_batch(model):
    """A dead net (closed shortcuts over zeroed branches) knows only the class frequencies: no loss below log(4).

    Nothing more is asked: nets of 110 layers that start as plain chains have learnt a little after 20 steps.
    """
    x, y = images(model, n=8, size=32), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(20):
        loss = F.cross_entropy(model(x), y)
        if loss < math.log(4) - 0.02:
            return True
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return False


@pytest.mark.parametrize('name', model_names())
def test_a_fresh_net_learns_one_batch(name):
    assert learns_one_batch(timm.create_model(name, num_classes=4))


@pytest.mark.parametrize('sharing', ['block', 'kind', 'unified'])
@pytest.mark.parametrize('skip_init', ['normal', -0.5, 0.01])
def test_a_fresh_net_learns_from_any_weights(sharing, skip_init):
    for seed in range(3):
        torch.manual_seed(seed)
        net = timm.create_model('adaresnet20_cifar', num_classes=4, sharing=sharing, skip_init=skip_init)
        assert learns_one_batch(net)


def test_a_deep_net_learns_from_shortcuts_of_a_half():
    torch.manual_seed(0)
    assert learns_one_batch(timm.create_model('awm_resnet110_cifar', num_classes=4, scale=1.0))


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        *(('adaresnet50', {'skip_init': init}) for init in (0.0, 'normal', -1.0, 0.5)),
        *(('awm_resnet50', {'scale': scale, 'zero_init_last': True}) for scale in (1.0, -2.0)),
        ('awm_resnet50', {}),
    ],
)
def test_units_that_would_not_pass_their_shortcut_keep_their_last_norm(name, options):
    model = timm.create_model(name, **options)
    identities = [unit for unit in mapping_units(model) if unit.kind == 'identity']
    assert all(model.get_submodule(unit.name).bn3.weight.all() for unit in identities)


@pytest.mark.parametrize(
    ('name', 'options'), [('adaresnet50', {'skip_init': 1.0}), ('awm_resnet50', {'zero_init_last': True})]
)
def test_units_that_pass_their_shortcut_start_without_their_branch(name, options):
    model = timm.create_model(name, **options)
    assert not any(model.get_submodule(unit.name).bn3.weight.any() for unit in mapping_units(model))


def test_a_projection_starts_without_its_branch_at_a_smaller_weight_too():
    model = timm.create_model('adaresnet50', skip_init=0.5)
    projections = [unit for unit in mapping_units(model) if unit.kind == 'projection']
    assert not any(model.get_submodule(unit.name).bn3.weight.any() for unit in projections)


def test_the_released_start_keeps_every_norm():
    model = timm.create_model('adaresnet18_released', skip_init='normal')
    assert all(model.get_submodule(unit.name).bn2.weight.all() for unit in mapping_units(model))


def test_skips_of_adaresnets_start_closed():
    for name in ('adaresnet14_cifar', 'adaresnet18', 'adaresnet18_released', 'adaresnet50'):
        assert {unit.weight.item() for unit in mapping_units(timm.create_model(name))} == {0.0}


@pytest.mark.parametrize(
    ('name', 'kwargs', 'closed'),
    [
        ('awm_resnet14_cifar', {}, False),
        ('awm_resnet14_cifar', {'zero_init_last': True}, True),
        ('adaresnet14_cifar', {'skip_init': 1.0}, True),
        ('resnet14_cifar', {'zero_init_last': False}, False),
    ],
)
def test_weights_drawn_anew_start_as_the_net_did(name, kwargs, closed):
    model = timm.create_model(name, **kwargs)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.3)
    model.init_weights()
    assert (model.layer2[1].bn2.weight == 0).all() == closed
    for key, value in model.state_dict().items():
        if key.endswith(('merge.weight', 'fc2.weight')):
            assert torch.equal(value, fresh[key])
    assert all(gate.fc1.weight.std() > 0 for gate in model.modules() if isinstance(gate, Gate))
    model.init_weights(zero_init_last=True)
    assert not model.layer2[1].bn2.weight.any()
