"""Conversions between plain, AdaResNet and AWM nets leave the weights and the output as they are, to the bit."""

from functools import partial

import pytest
import timm
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.densenet import DenseLayer, DenseNet, DenseTransition
from timm.models.resnet import ResNet
from torch import nn

import timm_weighted_skip
from timm_weighted_skip.cli import main
from timm_weighted_skip.convert import fold, to_adaresnet, to_awm, to_plain

NETS = ['resnet18', 'resnet14t', 'resnext50_32x4d', 'seresnet50', 'ecaresnet26t', 'resnetblur50', 'resnet50_gn']


@pytest.fixture(scope='module')
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize('convert', [to_awm, to_adaresnet])
@pytest.mark.parametrize('name', NETS)
def test_weighing_and_back_changes_nothing(name, convert, images):
    plain = randomise(timm.create_model(name)).eval()
    weighted = convert(plain)
    assert torch.equal(weighted(images), plain(images))
    assert len(timm_weighted_skip.mapping_units(weighted)) == sum(
        len(getattr(plain, f'layer{i}')) for i in (1, 2, 3, 4)
    )
    back = to_plain(weighted)
    assert type(back) is ResNet
    assert {type(module) for module in back.modules()} == {type(module) for module in plain.modules()}
    assert list(back.state_dict()) == list(plain.state_dict())
    assert torch.equal(back(images), plain(images))


@torch.no_grad()
def test_weighing_a_densenet_and_back_changes_nothing(images):
    plain = randomise(timm.create_model('densenet121')).eval()
    weighted = to_awm(plain)
    assert torch.equal(weighted(images), plain(images))
    assert list(weighted.state_dict()) == list(timm.create_model('awm_densenet121').state_dict())
    assert not any(module.training for module in weighted.modules())
    back = to_plain(weighted)
    assert type(back) is DenseNet
    assert list(back.state_dict()) == list(plain.state_dict())
    assert torch.equal(back(images), plain(images))
    if hasattr(plain, 'forward_intermediates'):  # of newer timm
        pairs = zip(*(net.forward_intermediates(images, intermediates_only=True) for net in (back, plain)))
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ('plain', 'weighted'),
    [
        ('resnet14_cifar', 'awm_resnet14_cifar'),
        ('resnet18', 'adaresnet18'),
        ('resnet18_released', 'adaresnet18_released'),
        ('densenet22_bc_cifar', 'awm_densenet22_bc_cifar'),
    ],
)
@torch.no_grad()
def test_the_result_is_the_registered_net(plain, weighted):
    source = randomise(timm.create_model(plain)).eval()
    convert = to_adaresnet if weighted.startswith('ada') else to_awm
    net = convert(source)
    registered = timm.create_model(net.pretrained_cfg['architecture']).eval()
    registered.load_state_dict(net.state_dict())
    assert net.pretrained_cfg['architecture'] == weighted
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(registered(x), source(x))
    assert to_plain(registered).pretrained_cfg['architecture'] == plain


def test_the_plain_form_of_a_short_name_is_registered():
    plain = to_plain(timm.create_model('awm_densenet_bc', pretrained=False).eval())
    assert plain.pretrained_cfg['architecture'] == 'densenet40_bc_cifar'
    timm.create_model('densenet40_bc_cifar').load_state_dict(plain.state_dict())


@pytest.mark.skipif(not hasattr(timm.create_model('test_resnet'), '_model_args'), reason='this timm notes no arguments')
@pytest.mark.parametrize(
    ('name', 'args', 'convert'),
    [
        ('awm_resnet14_cifar', {'hidden': 8}, to_plain),
        ('awm_resnet14_cifar', {'hidden': 8}, to_adaresnet),
        ('resnet14_cifar', {}, partial(to_awm, hidden=8)),
        ('densenet22_bc_cifar', {}, partial(to_awm, hidden=8)),
        ('awm_densenet22_bc_cifar', {}, to_awm),
        ('resnet14_cifar', {}, partial(to_adaresnet, sharing='kind')),
        ('resnet14_cifar', {}, partial(to_adaresnet, fixed=True)),
        ('adaresnet14_cifar', {'skip_init': 0.8}, fold),
        ('adaresnet14_cifar', {'sharing': 'unified', 'skip_init': -0.5}, fold),
        ('adaresnet14_cifar', {'skip_fixed': True, 'skip_init': -0.5}, fold),
        ('adaresnet14_cifar', {'skip_fixed': True, 'skip_init': 0.5}, fold),
    ],
)
@torch.no_grad()
def test_timms_own_writer_gives_the_converted_net_back(name, args, convert, tmp_path):
    net = convert(timm.create_model(name, num_classes=3, **args).eval())
    net = net[0] if convert is fold else net
    save_for_hf(net, str(tmp_path))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in net.named_parameters()]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), net(x))


@pytest.mark.skipif(not hasattr(DenseNet, 'prune_intermediate_layers'), reason="this timm's DenseNets are not pruned")
def test_a_pruned_densenet_is_converted_too():
    net = timm.create_model('densenet22_bc_cifar').eval()
    net.prune_intermediate_layers(1)
    awm = to_awm(net)
    x = torch.randn(2, 3, 32, 32)
    for model in (awm, to_plain(awm)):
        features = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        torch.testing.assert_close(features, net.forward_intermediates(x, indices=[1], intermediates_only=True))


def test_a_densenet_of_16_bits_may_have_norms_of_32(images):
    plain = randomise(timm.create_model('densenet121', block_config=(2, 2), num_classes=3)).eval().bfloat16()
    for norm in plain.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.float()
    assert torch.equal(to_awm(plain)(images.bfloat16()), plain(images.bfloat16()))


def test_a_converted_net_trains(images):
    net = to_awm(timm.create_model('resnet18', num_classes=3), hidden=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(images).square().sum().backward()
        optimizer.step()
    gate = net.layer2[0].merge.gate
    assert gate.fc1.out_features == 4
    assert gate.fc1.weight.grad.abs().sum() > 0
    assert gate.fc2.weight.abs().sum() > 0


def test_the_source_stays_as_it_was():
    plain = timm.create_model('resnet18')
    net = to_awm(plain)
    with torch.no_grad():
        net.conv1.weight.zero_()
    assert plain.conv1.weight.abs().sum() > 0
    assert not hasattr(plain.layer1[0], 'merge')
    assert plain.pretrained_cfg['architecture'] == 'resnet18'


@pytest.mark.parametrize(
    ('name', 'args', 'why'),
    [
        ('adaresnet14_cifar', {'skip_init': -0.5}, r'w = -0\.5, not 1;'),
        ('adaresnet14_cifar', {'skip_init': 0.5}, r'6 of 6 mapping units.*layer1\.0: w = 0\.5, not 1.*fold'),
        ('awm_resnet14_cifar', {'scale': 1.0}, r'layer1\.0: scale = 1, not 2'),
        ('awm_densenet22_bc_cifar', {'scale': 'paper'}, 'scale = 1, not'),
    ],
)
def test_what_is_not_plain_is_refused(name, args, why):
    with pytest.raises(ValueError, match=why):
        to_plain(timm.create_model(name, **args))


def test_a_trained_gate_is_refused():
    net = timm.create_model('awm_resnet14_cifar')
    torch.nn.init.normal_(net.layer2[1].merge.gate.fc2.weight)
    with pytest.raises(ValueError, match=r"1 of 6 .*layer2\.1: the gate's last layer is not 0"):
        to_plain(net)


def test_fold_is_named_where_it_would_do():
    net = timm.create_model('adaresnet14_cifar', skip_init=1.0)
    net.layer2[0].merge.weight.data.fill_(-0.3)  # of a projection, which takes any sign
    assert not fold(net)[1]
    with pytest.raises(ValueError, match=r'layer2\.0: w = -0\.3, not 1 \(`fold` can absorb it\)'):
        to_plain(net)


@pytest.mark.parametrize(
    ('name', 'convert', 'why'),
    [
        ('skresnet18', to_awm, 'layer1.0 is a SelectiveKernelBasic'),
        ('resnetv2_50', to_awm, "ResNetV2 can't be converted"),
        ('densenet121', to_adaresnet, "DenseNet can't be converted"),
    ],
)
def test_what_has_no_weighted_form_is_refused(name, convert, why):
    with pytest.raises(ValueError, match=why):
        convert(timm.create_model(name))


class OwnLayer(DenseLayer):
    pass


class OwnTransition(DenseTransition):
    pass


@pytest.mark.parametrize(
    ('name', 'cls', 'why'),
    [
        ('denseblock2.denselayer2', OwnLayer, 'is a OwnLayer'),
        ('transition1', OwnTransition, 'is a OwnTransition'),
        ('denseblock1.denselayer1', None, 'denseblock1 has parts other than DenseLayer'),
    ],
)
def test_a_densenet_of_other_parts_is_refused(name, cls, why):
    net = timm.create_model('densenet121', block_config=(2, 2))
    if cls is None:
        net.features.set_submodule(name, nn.Sequential(net.features.get_submodule(name)))
    else:
        net.features.get_submodule(name).__class__ = cls
    with pytest.raises(ValueError, match=why):
        to_awm(net)


@torch.no_grad()
def test_what_was_added_to_a_densenet_stays_where_it_was(images):
    plain = timm.create_model('densenet121', block_config=(2, 2))
    plain.features.transition1.add_module('scale', nn.Hardtanh(0, 0.1))
    plain.features.add_module('last', nn.Hardtanh(0, 0.1))
    plain = randomise(plain).eval()
    called: list[str] = []
    for name, module in plain.named_modules():
        module.register_forward_hook(lambda module, args, y, name=name: called.append(name))
    expected = plain(images)
    names = list(called)
    called.clear()
    weighted = to_awm(plain)
    assert torch.equal(weighted(images), expected)
    assert called == names
    back = to_plain(weighted)
    assert torch.equal(back(images), expected)
    assert list(back.state_dict()) == list(plain.state_dict())


def test_a_net_without_values_is_not_known_to_be_plain():
    weighted = to_awm(timm.create_model('resnet18', device='meta'))
    with pytest.raises(ValueError, match='meta device, where they have no values'):
        to_plain(weighted)


def test_a_subclass_of_a_densenet_is_refused():
    class OwnDenseNet(DenseNet):
        pass

    with pytest.raises(ValueError, match="OwnDenseNet can't be converted"):
        to_awm(OwnDenseNet(growth_rate=8, block_config=(1, 1)))


def test_a_converted_net_refuses_unequal_values_of_a_shared_weight():
    net = to_adaresnet(timm.create_model('seresnet18'), sharing='unified')
    state = net.state_dict()
    state['layer4.1.merge.weight'] = torch.tensor(7.0)
    with pytest.raises(RuntimeError, match='one weight in this net'):
        net.load_state_dict(state)


@torch.no_grad()
@pytest.mark.parametrize(('name', 'size'), [('resnet18', 9), ('densenet121', 31)])
def test_a_converted_net_takes_images_of_the_sizes_that_the_plain_net_takes(name, size, images):
    plain = timm.create_model(name).eval()
    assert torch.equal(to_awm(plain)(images[..., :size, :size]), plain(images[..., :size, :size]))


@torch.no_grad()
def test_command_writes_the_weights_of_a_net_without_a_registered_name(images, tmp_path, capsys):
    plain = randomise(timm.create_model('seresnet18')).eval()
    save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    output = tmp_path / 'weighted.safetensors'
    command = ['convert', 'seresnet18', '--checkpoint', str(tmp_path / 'plain.safetensors'), '--to', 'awm']
    assert main([*command, '--output', str(output)]) == 0
    weighted = to_awm(timm.create_model('seresnet18')).eval()
    weighted.load_state_dict(load_file(output))
    assert torch.equal(weighted(images), plain(images))
    assert main([*command, '--output', str(output)]) == 1  # what is there stays
    assert main([*command, '--output', str(tmp_path / 'folder')]) == 1  # no config could rebuild it
    capsys.readouterr()
    assert main([*command, '--output', str(tmp_path / 'weighted.pth')]) == 1
    assert 'weights are written as safetensors; give a folder or FILE.safetensors' in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ['plain.safetensors', 'weighted.safetensors']
