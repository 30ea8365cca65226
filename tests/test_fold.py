"""Folding AdaResNet's weights away: the same outputs from a plain net."""

import pytest
import timm
import torch
from conftest import randomise
from timm.layers import FilterResponseNormTlu2d
from timm.models.resnet import ResNet
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import timm_weighted_skip
from timm_weighted_skip.convert import fold


def trained(name: str, **kwargs) -> torch.nn.Module:
    """An AdaResNet with norms and positive weights as after training."""
    net = randomise(timm.create_model(name, **kwargs)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter_name, parameter in net.named_parameters():
            if parameter_name.endswith('merge.weight'):
                parameter.uniform_(0.2, 1.8, generator=generator)
    return net


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_resnet50_known_answer(dtype, bound):
    net = trained('adaresnet50').to(dtype)
    folded, kept = fold(net)
    x = torch.randn(2, 3, 96, 96, dtype=dtype)
    assert not kept
    assert type(folded) is ResNet
    assert relative_error(folded(x), net(x)) < bound
    timm.create_model('resnet50').load_state_dict(folded.state_dict())
    # Every stage's output is as it was, not the logits alone.
    stages = zip(folded.forward_intermediates(x)[1][1:], net.forward_intermediates(x)[1][1:])
    assert all(relative_error(f, n) < bound for f, n in stages)


@torch.no_grad()
@pytest.mark.parametrize(
    ('name', 'args'),
    [
        ('adaresnet20_cifar', {}),
        ('adaresnet18', {}),
        ('adaresnet18', {'sharing': 'kind'}),
        ('adaresnet18', {'sharing': 'unified'}),
        ('adaresnet18', {'skip_init': 2.0, 'skip_fixed': True}),
        ('adaresnet18', {'replace_stem_pool': True, 'stem_type': 'deep', 'avg_down': True}),
        ('adaresnet18', {'replace_stem_pool': True, 'norm_layer': 'groupnorm'}),
        # Stages that open with an identity shortcut.
        ('adaresnet18', {'channels': (32, 64, 128, 128), 'output_stride': 16}),
        ('adaresnet18', {'channels': (64, 64, 64, 64), 'output_stride': 8}),
        ('adaresnet14_cifar', {'layers': (1, 1, 1)}),
        ('adaresnet18_released', {'layers': (1, 1, 1, 1)}),
        ('adaresnet18_released', {}),
    ],
)
def test_any_sharing_stem_and_block(name, args):
    net = trained(name, **args).double()
    folded, kept = fold(net)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert not kept
    assert relative_error(folded(x), net(x)) < 1e-12
    plain_args = {k: v for k, v in args.items() if 'skip' not in k and k != 'sharing'}
    timm.create_model(name.removeprefix('ada'), **plain_args).load_state_dict(folded.state_dict())


@torch.no_grad()
def test_units_that_cannot_be_folded_stay_weighted():
    net = trained('adaresnet20_cifar').double()
    net.layer1[1].merge.weight.fill_(-0.7)
    net.layer2[0].merge.weight.fill_(-0.3)  # a projection: its norm takes any sign
    net.layer3[2].merge.weight.fill_(0.0)
    folded, kept = fold(net)
    assert kept == ['layer1.1', 'layer3.2']
    weights = {unit.name: unit.weight.item() for unit in timm_weighted_skip.mapping_units(folded)}
    assert weights == pytest.approx(dict.fromkeys(weights, 1.0) | {'layer1.1': -0.7, 'layer3.2': 0.0})
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(folded(x), net(x)) < 1e-12
    loaded = timm.create_model('adaresnet20_cifar').double().eval()
    loaded.load_state_dict(folded.state_dict())
    assert torch.equal(loaded(x), folded(x))


class Tanh(nn.Module):
    def forward(self, weight):
        return weight.tanh()

    def right_inverse(self, weight):
        return weight.atanh()


@torch.no_grad()
@pytest.mark.parametrize('last', [0.3, -0.3])
def test_weights_may_be_computed_from_others(last):
    net = trained('adaresnet14_cifar').double()
    for block in (*net.layer1, *net.layer2, *net.layer3):
        block.merge.weight.fill_(last if block is net.layer1[1] else 0.5)
        parametrize.register_parametrization(block.merge, 'weight', Tanh())
    folded, kept = fold(net)
    assert kept == ([] if last > 0 else ['layer1.1'])
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(folded(x), net(x)) < 1e-12
    timm.create_model('adaresnet14_cifar' if kept else 'resnet14_cifar').load_state_dict(folded.state_dict())


@torch.no_grad()
def test_the_source_stays_as_it_was():
    net = trained('adaresnet14_cifar')
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fold(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_not_a_number_is_no_weight_to_fold():
    net = trained('adaresnet14_cifar')
    torch.nn.init.constant_(net.layer1[1].merge.weight, float('nan'))
    with pytest.raises(ValueError, match=r'layer1\.1\.merge\.weight is beyond'):
        fold(net)


@torch.no_grad()  # else torch can't copy the net
def prune_first(net):
    prune.l1_unstructured(net.layer1[1].conv1, 'weight', 0.3)


def clamp_branch(net):
    net.layer1[1].bn2.register_forward_hook(lambda module, args, output: output.clamp(max=0.1))


def patch_forward(net):
    net.layer1[1].conv1.forward = torch.zeros_like


def normalise_weight(net):
    parametrizations.weight_norm(net.layer1[1].conv1)


def tie_convolutions(net):
    net.layer1[1].conv1.weight = net.layer1[2].conv1.weight


def share_norm(net):
    net.layer1[1].bn2 = net.layer1[2].bn2


def repeat_block(net):
    net.layer1[2] = net.layer1[1]


def wrap_convolution(net):
    net.layer1[1].conv1 = nn.Sequential(net.layer1[1].conv1)


def append_to_stage(net):
    net.layer2.append(nn.Identity())


def threshold_norm(net):
    net.layer2[0].bn2 = FilterResponseNormTlu2d(32)


def clip_stem(net):
    net.maxpool = nn.Sequential(nn.Hardtanh())


@pytest.mark.parametrize(
    ('change', 'why'),
    [
        (prune_first, 'layer1.1.conv1 has forward hooks, as pruning leaves'),
        (clamp_branch, 'layer1.1.bn2 has forward hooks'),
        (patch_forward, 'layer1.1.conv1 is a Conv2d with a forward of its own'),
        (normalise_weight, 'layer1.1.conv1 is a ParametrizedConv2d'),
        (tie_convolutions, r'layer1\.2\.conv1\.weight is used by more than one layer'),
        (share_norm, r'\.bn2\.weight is used by more than one layer'),
        (repeat_block, 'is used by more than one layer'),
        (wrap_convolution, 'layer1.1.conv1 is a Sequential'),
        (append_to_stage, 'layer2.3 is a Identity, which is no block'),
        (threshold_norm, 'layer2.0.bn2 is a FilterResponseNormTlu2d'),
        (clip_stem, 'maxpool.0 is Hardtanh'),
    ],
)
def test_a_layer_that_cannot_take_a_weight_is_refused(change, why):
    net = trained('adaresnet20_cifar')
    change(net)
    with pytest.raises(ValueError, match=why):
        fold(net)


def test_features_alone_are_not_folded():
    with pytest.raises(ValueError, match='FeatureListNet is a part of a net; fold the whole net'):
        fold(timm.create_model('adaresnet18', features_only=True))


def test_a_net_without_values_is_refused():
    with pytest.raises(ValueError, match='meta device has no values'):
        fold(timm.create_model('adaresnet14_cifar', device='meta'))


def test_a_net_that_is_not_trained_stays_so():
    net = trained('adaresnet14_cifar').requires_grad_(False)
    net.layer1[1].merge.weight.fill_(-0.3)
    folded, kept = fold(net)
    assert kept == ['layer1.1']
    assert not any(module.training for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize(
    ('name', 'args', 'why'),
    [
        ('awm_resnet14_cifar', {}, 'no weights to fold'),
        ('resnet14_cifar', {}, 'no weights to fold'),
        ('adaresnet14_cifar', {'act_layer': 'silu'}, 'not homogeneous'),
        ('adaresnet18', {'block_args': {'attn_layer': 'se'}}, 'SEModule, whose output does not scale'),
    ],
)
def test_what_cannot_be_folded_is_refused(name, args, why):
    net = timm.create_model(name, **args)
    for name, parameter in net.named_parameters():
        if name.endswith('merge.weight'):
            torch.nn.init.constant_(parameter, 0.5)
    with pytest.raises(ValueError, match=why):
        fold(net)
