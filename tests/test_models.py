"""The nets: equal to timm's plain ones at identity, complete in timm's ways of use."""

import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import images, randomise
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

from timm_weighted_skip import mapping_units
from timm_weighted_skip.models.resnet_released import CentredConv2d

TO_TIMM = {
    **{f'awm_resnet{depth}': (f'resnet{depth}', {}) for depth in (18, 34, 50, 101, 152)},
    **{f'adaresnet{depth}': (f'resnet{depth}', {'skip_init': 1.0}) for depth in (18, 34, 50, 101, 152)},
    'awm_densenet121': ('densenet121', {}),
}
TO_OURS = {
    **{f'awm_resnet{depth}_cifar': (f'resnet{depth}_cifar', {}) for depth in (14, 20, 110)},
    **{f'adaresnet{depth}_cifar': (f'resnet{depth}_cifar', {'skip_init': 1.0}) for depth in (14, 20, 110)},
    **{f'awm_densenet{depth}_bc_cifar': (f'densenet{depth}_bc_cifar', {}) for depth in (22, 40)},
    'adaresnet18_released': ('resnet18_released', {'skip_init': 1.0}),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(('name', 'plain_name', 'kwargs'), [(k, *v) for k, v in {**TO_TIMM, **TO_OURS}.items()])
def test_equals_the_plain_net_at_identity(name, plain_name, kwargs, dtype):
    plain = randomise(timm.create_model(plain_name)).to(dtype).eval()
    model = timm.create_model(name, **kwargs).to(dtype).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all('merge' in key for key in missing)
    x = images(model).to(dtype)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize('name', [*TO_TIMM, *TO_OURS])
def test_plain_argument_gives_the_plain_net(name):
    with torch.device('meta'):
        plain = timm.create_model({**TO_TIMM, **TO_OURS}[name][0])
        model = timm.create_model(name, plain=True)
        assert type(model) is type(timm.create_model(name))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in plain.state_dict().items()}


@pytest.mark.parametrize(
    'name', ['awm_resnet20_cifar', 'adaresnet20_cifar', 'awm_densenet22_bc_cifar', 'adaresnet18_released']
)
@pytest.mark.parametrize(('in_chans', 'size'), [(1, 28), (4, 40)])
def test_other_channels_sizes_and_classes(name, in_chans, size):
    model = timm.create_model(name, in_chans=in_chans, num_classes=7).eval()
    assert model.num_classes == 7
    assert model(torch.randn(2, in_chans, size, size + 8)).shape == (2, 7)


@pytest.mark.parametrize('stride', [8, 16])
@pytest.mark.parametrize('name', ['awm_resnet50', 'adaresnet18'])
def test_output_stride(name, stride):
    model = timm.create_model(name, output_stride=stride, features_only=True).eval()
    assert model(torch.randn(1, 3, 64, 64))[-1].shape[-1] == 64 // stride


@pytest.mark.parametrize('name', ['awm_resnet20_cifar', 'adaresnet20_cifar', 'awm_densenet22_bc_cifar', 'awm_resnet50'])
def test_gradient_checkpointing_changes_nothing(name):
    model = timm.create_model(name).double().train()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    x = images(model, n=3).double()
    for net in (model, again):
        net(x).square().mean().backward()
    for (key, p), q in zip(model.named_parameters(), again.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=key)


@pytest.mark.parametrize(
    'name', ['awm_resnet20_cifar', 'adaresnet20_cifar', 'awm_densenet22_bc_cifar', 'adaresnet18_released']
)
def test_meta_device_then_load(name):
    model = timm.create_model(name).eval()
    with torch.device('meta'):
        empty = timm.create_model(name)
    empty = empty.to_empty(device='cpu').eval()
    empty.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize('name', ['awm_resnet20_cifar', 'adaresnet18', 'awm_densenet_bc', 'adaresnet18_released'])
def test_bfloat16(name):
    model = timm.create_model(name).bfloat16().eval()
    assert model(images(model).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('name', ['awm_resnet20_cifar', 'adaresnet18', 'awm_densenet_bc', 'adaresnet18_released'])
def test_dtype_argument(name):
    model = timm.create_model(name, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize('name', ['awm_resnet20_cifar', 'adaresnet20_cifar', 'awm_densenet22_bc_cifar'])
def test_autocast(name):
    model = timm.create_model(name)
    x = images(model)
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_drop_path_drops_whole_branches():
    model = timm.create_model('adaresnet20_cifar', skip_init=1.0, drop_path_rate=0.999, zero_init_last=False).train()
    block = model.layer3[2]
    block.eval()
    block.drop_path.train()
    x = torch.rand(64, 64, 8, 8)
    kept = torch.isclose(block(x), x).flatten(1).all(1).float().mean()
    assert kept > 0.9


@torch.no_grad()
def test_parts_of_a_dense_net_may_be_wrapped_and_added():
    model = randomise(timm.create_model('awm_densenet22_bc_cifar')).eval()
    x = images(model)
    expected, features = model(x), model.features

    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, xs):
            return self.layer(xs)

    features.denseblock1.denselayer2 = Wrapped(features.denseblock1.denselayer2)
    torch.testing.assert_close(model(x), expected)
    features.transition1.add_module('shut', nn.Threshold(torch.inf, 0))
    assert not features.transition1(features.denseblock1(features.conv0(x))).any()


def test_a_cifar_dense_net_of_four_blocks_knows_its_stride():
    model = timm.create_model('awm_densenet22_bc_cifar', block_config=(2, 2, 2, 2)).eval()
    assert [info['reduction'] for info in model.feature_info] == [1, 1, 2, 4, 8]
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 10)


def test_weight_decay_spares_skip_weights_and_takes_gates():
    def decayed(name):
        model = timm.create_model(name)
        names = {p: n for n, p in model.named_parameters()}
        return {
            names[p]
            for group in param_groups_weight_decay(model, 0.1)
            if group['weight_decay']
            for p in group['params']
        }

    assert not any('merge' in name for name in decayed('adaresnet20_cifar'))
    assert sum('merge.gate' in name for name in decayed('awm_resnet20_cifar')) == 2 * 9


@pytest.mark.parametrize('name', ['awm_resnet20_cifar', 'adaresnet20_cifar', 'awm_densenet22_bc_cifar'])
def test_layer_decay_groups_take_every_parameter(name):
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, layer_decay=0.9)
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_dense_weights_act_on_what_a_layer_reads_only():
    model = timm.create_model('awm_densenet22_bc_cifar').eval()
    block = model.features.denseblock1
    read = {}
    for name in ('denselayer2', 'denselayer3'):
        block[name].merge.register_forward_hook(lambda m, args, out, name=name: read.__setitem__(name, (args[0], out)))
    torch.nn.init.normal_(block.denselayer2.merge.gate.fc2.weight, std=10.0)
    model(images(model))
    given, weighted = read['denselayer2']
    assert not torch.equal(given, weighted)
    assert torch.equal(read['denselayer3'][0][:, : given.shape[1]], given)


def test_sharing_a_weight_shares_the_parameter():
    for sharing, weights in (('block', 16), ('kind', 2), ('unified', 1)):
        model = timm.create_model('adaresnet50', sharing=sharing)
        assert sum(p.ndim == 0 for p in model.parameters()) == weights
    fixed = timm.create_model('adaresnet50', skip_fixed=True, skip_init=2.0)
    assert not any(p.ndim == 0 for p in fixed.parameters())
    assert {unit.weight.item() for unit in mapping_units(fixed)} == {2.0}


def test_a_shared_weight_takes_one_value():
    own = timm.create_model('adaresnet14_cifar', skip_init=0.5)
    for sharing in ('kind', 'unified'):
        shared = timm.create_model('adaresnet14_cifar', sharing=sharing)
        shared.load_state_dict(own.state_dict())
        assert {unit.weight.item() for unit in mapping_units(shared)} == {0.5}
    with torch.no_grad():
        own.layer2[0].merge.weight.fill_(0.25)  # the projections' weights are 0.25 and 0.5
    for sharing in ('kind', 'unified'):
        with pytest.raises(
            RuntimeError, match=r'layer2\.0\.merge\.weight.*one weight in this net, and their values differ'
        ):
            timm.create_model('adaresnet14_cifar', sharing=sharing).load_state_dict(own.state_dict())
        within = nn.Sequential(timm.create_model('adaresnet14_cifar', sharing=sharing))
        with pytest.raises(RuntimeError, match=r'0\.layer2\.0\.merge\.weight.*one weight in this net'):
            within.load_state_dict(nn.Sequential(own).state_dict())
        features = timm.create_model('adaresnet14_cifar', sharing=sharing, features_only=True)
        with pytest.raises(RuntimeError, match=r'"?layer2\.0\.merge\.weight.*one weight in this net'):
            features.load_state_dict(own.state_dict(), strict=False)
        part = timm.create_model('adaresnet14_cifar', sharing=sharing).layer2
        values = {'0.merge.weight': torch.tensor(0.25), '1.merge.weight': torch.tensor(0.5)}
        if sharing == 'kind':
            part.load_state_dict(values, strict=False)  # a projection and an identity shortcut
        else:
            for assign in (False, True):
                with pytest.raises(RuntimeError, match=r'\b0\.merge\.weight and 1\.merge\.weight are one weight'):
                    part.load_state_dict(values, strict=False, assign=assign)
        part.load_state_dict({'0.merge.weight': torch.tensor(0.75)}, strict=False)  # another call, another value
        part.load_state_dict({'1.merge.weight': torch.tensor(0.5)}, strict=False)
        assert part[1].merge.weight == 0.5
    timm.create_model('adaresnet14_cifar').load_state_dict(own.state_dict())


@pytest.mark.parametrize(
    ('name', 'kwargs', 'error', 'message'),
    [
        ('awm_resnet20_cifar', {'hidden': -1}, ValueError, 'hidden=-1 is not allowed'),
        ('awm_resnet20_cifar', {'scale': 0}, ValueError, 'scale=0 is not allowed'),
        ('awm_densenet_bc', {'hidden': 0}, ValueError, 'hidden=0 is not allowed'),
        ('adaresnet50', {'sharing': 'all'}, ValueError, "sharing='all' is not allowed; choose one of 'block'"),
        ('adaresnet50', {'skip_init': 'zeros'}, ValueError, "skip_init='zeros' is not allowed"),
        ('awm_resnet20_cifar', {'plain': 'false'}, ValueError, "plain='false' is not allowed"),
        ('awm_densenet_bc', {'plain': 'false'}, ValueError, "plain='false' is not allowed"),
        ('adaresnet18', {'skip_fixed': 'false'}, ValueError, "skip_fixed='false' is not allowed"),
        ('awm_resnet20_cifar', {'in_chans': 0}, ValueError, 'in_chans=0 is not allowed'),
        ('awm_densenet_bc', {'in_chans': 0}, ValueError, 'in_chans=0 is not allowed'),
        ('awm_resnet50', {'sharing': 'kind'}, TypeError, "unexpected keyword argument 'sharing'"),
        ('adaresnet18', {'hidden': 16}, TypeError, "unexpected keyword argument 'hidden'"),
        ('awm_resnet20_cifar', {'output_stride': 8}, TypeError, 'output_stride'),
        ('awm_resnet20_cifar', {'layers': (2, 2, 2, 2)}, ValueError, 'a CIFAR ResNet has three stages'),
        ('awm_resnet20_cifar', {'replace_stem_pool': True}, TypeError, 'replace_stem_pool'),
        ('awm_densenet22_bc_cifar', {'stem_type': 'deep'}, TypeError, 'stem_type'),
        ('awm_densenet_bc', {'skip_init': 1.0}, TypeError, "unexpected keyword argument 'skip_init'"),
    ],
)
def test_bad_arguments_are_named(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    'kwargs',
    [
        {'channels': (32, 64, 64, 64)},
        {'stem_type': 'deep', 'stem_width': 64},
        {'avg_down': True},
        {'norm_layer': partial(nn.BatchNorm2d, eps=1e-3)},
    ],
    ids=str,
)
def test_the_released_nets_first_projection_is_as_the_others(kwargs):
    model = timm.create_model('adaresnet18_released', **kwargs).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    first, second = model.layer1[0].downsample, model.layer2[0].downsample
    assert [type(module) for module in first] == [type(module) for module in second]
    assert first[-1].eps == second[-1].eps


def test_a_cifar_nets_head_is_its_last_part():
    model = timm.create_model('awm_resnet14_cifar')
    assert nn.Sequential(*list(model.children())[:-1])(torch.randn(2, 3, 32, 32)).shape == (2, 64)


def test_a_cifar_nets_intermediates_take_their_arguments_by_position():
    x, model = torch.randn(1, 3, 32, 32), timm.create_model('awm_resnet14_cifar').eval()
    (by_position,) = model.forward_intermediates(x, [-1], False, True, 'NCHW', True)
    (by_name,) = model.forward_intermediates(x, indices=[-1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(by_position, by_name)


@pytest.mark.parametrize(('name', 'channels'), [('awm_resnet18', [64, 256]), ('awm_densenet22_bc_cifar', [60, 69])])
def test_features_are_chosen_by_feature_cfg_too(name, channels):
    model = timm.create_model(name, features_only=True, feature_cfg={'out_indices': (1, 3)})
    assert model.feature_info.channels() == channels


@pytest.mark.parametrize(
    ('name', 'size', 'smallest'),
    [
        ('awm_resnet20_cifar', 3, 4),
        ('awm_resnet50', 31, 32),
        ('awm_densenet_bc', 2, 4),
        ('adaresnet18_released', 20, 28),
    ],
)
def test_too_small_an_input_is_refused(name, size, smallest):
    model = timm.create_model(name).eval()
    with pytest.raises(
        AssertionError, match=f'{size}x{size} pixels is too small; this net takes {smallest}x{smallest}'
    ):
        model(torch.randn(1, 3, size, size))
    model(torch.randn(1, 3, smallest, smallest))


@pytest.mark.parametrize('size', [(1, 1), (1, 2), (3, 3)])
def test_released_convolution_equals_the_plain_one(size):
    conv = timm.create_model('adaresnet18_released').double().layer4[1].conv2
    x = torch.randn(2, 512, *size, dtype=torch.float64, requires_grad=True)
    results = []
    for y in (conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1)):
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('changed', [{'padding_mode': 'circular'}, {'groups': 2}])
def test_released_convolution_of_another_kind_reads_all(changed):
    plain = torch.nn.Conv2d(8, 8, 3, padding=1, **changed)
    conv = copy.deepcopy(plain)
    conv.__class__ = CentredConv2d
    x = torch.randn(2, 8, 1, 1)
    torch.testing.assert_close(conv(x), plain(x))


@pytest.mark.parametrize(
    ('name', 'argument'),
    [
        ('awm_resnet14_cifar', 'stem_type'),
        ('awm_densenet22_bc_cifar', 'stem_type'),
        ('resnet18_released', 'output_stride'),
        ('resnet18_released', 'aa_layer'),
    ],
)
def test_what_shapes_a_net_of_its_own_is_no_argument(name, argument):
    with pytest.raises(TypeError, match=f'^{argument} can not be given: a .* has its own; leave it out'):
        timm.create_model(name, **{argument: 16})


def test_numbers_of_numpy_are_numbers():
    model = timm.create_model('awm_resnet14_cifar', in_chans=np.int64(1), hidden=np.int64(8), scale=np.float32(1))
    assert model(torch.randn(1, 1, 8, 8)).shape == (1, 10)


def test_images_without_a_batch_dimension_are_refused_in_words():
    with pytest.raises(AssertionError, match='expected 4D input'):
        timm.create_model('awm_densenet22_bc_cifar')(torch.randn(3, 32, 32))


def test_released_convolution_of_one_pixel_reads_its_centre_alone():
    conv = timm.create_model('adaresnet18_released').layer4[1].conv2
    border = torch.ones(3, 3, dtype=torch.bool)
    border[1, 1] = False
    with torch.no_grad():
        conv.weight[..., border] = torch.nan
    assert conv(torch.randn(1, 512, 1, 1)).isfinite().all()
