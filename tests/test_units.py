"""Reading the weights of mapping units out of any net."""

import pytest
import timm
import torch
from torch import nn

from timm_weighted_skip import mapping_units
from timm_weighted_skip.analysis.moments import weight_moments
from timm_weighted_skip.layers import Gate

RESNET20 = [(f'layer{s}.{b}', 'projection' if s > 1 and b == 0 else 'identity') for s in (1, 2, 3) for b in range(3)]


def trained_gates(name, **kwargs):
    return with_trained_gates(timm.create_model(name, **kwargs))


def with_trained_gates(model):
    for module in model.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module.fc2.weight)
    return model


@pytest.mark.parametrize('name', ['awm_resnet20_cifar', 'adaresnet20_cifar'])
def test_names_and_kinds_in_forward_order(name):
    units = mapping_units(timm.create_model(name))
    assert [(unit.name, unit.kind) for unit in units] == RESNET20


def test_ada_weights_are_the_parameters():
    model = timm.create_model('adaresnet20_cifar', sharing='kind', skip_init=0.25)
    units = mapping_units(model)
    assert len(units) == 9
    assert all(unit.weight.shape == () and unit.weight == 0.25 for unit in units)


def test_awm_weights_are_per_image_and_normalised():
    model = trained_gates('awm_resnet20_cifar')
    assert all(unit.weight is None for unit in mapping_units(model))
    units = mapping_units(model, torch.randn(5, 3, 32, 32))
    for unit in units:
        assert unit.weight.shape == (5, 2)
        torch.testing.assert_close(unit.weight.sum(1), torch.ones(5))
    assert torch.stack([unit.weight[:, 0] for unit in units]).std(1).max() > 0


def test_moments_over_batches_are_those_over_all_images():
    model, x = trained_gates('awm_resnet20_cifar').eval(), torch.randn(5, 3, 32, 32)
    moments = weight_moments(model, x.split(2))
    for unit in mapping_units(model, x):
        assert moments[unit.name]['mean'] == pytest.approx(unit.weight.mean(0).tolist())
        assert moments[unit.name]['variance'] == pytest.approx(unit.weight.var(0, correction=0).tolist(), rel=1e-4)
    ada = weight_moments(timm.create_model('adaresnet20_cifar', skip_init=0.25), [])
    assert list(ada.values()) == [{'mean': [0.25], 'variance': [0.0]}] * 9


def test_dense_weights_have_one_column_per_incoming_unit():
    units = mapping_units(trained_gates('awm_densenet22_bc_cifar'), torch.randn(4, 3, 32, 32))
    assert [unit.weight.shape[1] for unit in units] == [2, 3, 4] * 3
    assert {unit.kind for unit in units} == {'concat'}
    assert units[2].name == 'features.transition1'


@pytest.mark.parametrize('wrap', [lambda m: torch.compile(m, backend='eager'), nn.DataParallel, lambda m: m.bfloat16()])
@pytest.mark.parametrize('name', ['awm_resnet20_cifar', 'adaresnet20_cifar'])
def test_wrapped_and_low_precision_nets(name, wrap):
    model, x = trained_gates(name), torch.randn(2, 3, 32, 32)
    expected = mapping_units(model, x)
    for unit, plain in zip(mapping_units(wrap(model), x), expected):
        assert unit.name == plain.name
        torch.testing.assert_close(unit.weight.float(), plain.weight, atol=0.05, rtol=0)


def test_reading_leaves_the_net_as_it_was():
    model = trained_gates('awm_resnet20_cifar').train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    mapping_units(model, torch.randn(2, 3, 32, 32))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_plain_nets_and_nan_weights_are_refused():
    with pytest.raises(ValueError, match=r'ResNet has no weighted mapping units; .* adaresnet\* and awm_\*'):
        mapping_units(timm.create_model('resnet18'))
    with pytest.raises(ValueError, match='no weighted mapping units'):
        mapping_units(timm.create_model('resnet20_cifar'))
    model = timm.create_model('adaresnet20_cifar', skip_init=1.0)
    nn.init.constant_(model.layer2[0].merge.weight, float('nan'))
    with pytest.raises(ValueError, match=r'1 of 9 mapping units are NaN: layer2\.0'):
        mapping_units(model)
    model = timm.create_model('awm_resnet20_cifar')
    with pytest.raises(ValueError, match='mapping units are NaN'):
        mapping_units(model, torch.full((1, 3, 32, 32), float('nan')))
