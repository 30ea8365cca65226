"""Weights inside the norm's affine: equal to the plain formula wherever that is done, and not done elsewhere."""

import copy

import pytest
import timm
import torch
from conftest import randomise
from test_fused import LAYOUTS, saved_bytes
from test_units import trained_gates
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_weighted_skip import fused, fused_concat, mapping_units, set_fused_merge
from timm_weighted_skip.layers import Gate
from timm_weighted_skip.models.dense import WeightedDenseBlock, WeightedDenseNet

READS = 4  # of `small_net`: two layers and the transition of the first block, a layer of the second


@pytest.fixture
def taken(monkeypatch):
    """A list that grows by an entry for each reader that takes the single pass."""
    calls, step = [], fused_concat._read
    monkeypatch.setattr(fused_concat, '_read', lambda *args: calls.append(1) or step(*args))
    return calls


def small_net(train=True, **kwargs):
    """Two dense blocks, of 8 and 8 channels on images of 4 x 4 and 2 x 2 pixels, in float64, with gates in use."""
    net = WeightedDenseNet(growth_rate=4, block_config=(3, 2), bn_size=2, num_classes=3, hidden=5, **kwargs)
    for module in net.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module.fc2.weight)
    return randomise(net).double().train(train)


def images(n=3, size=16):
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def step_of(model, x):
    """Output, gradients of the image and the parameters, and buffers after a step of a copy of `model`."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad), *model.buffers()]


def assert_both_forms_equal(model, x):
    ours = step_of(model, x)
    set_fused_merge(False)
    for a, b in zip(ours, step_of(model, x)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * b.double().abs().max().item())
    set_fused_merge(True)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize(
    ('kwargs', 'reads'),
    [({}, READS), ({'scale': 'paper'}, READS), ({'plain': True}, 0)],
)
def test_step_is_the_plain_formulas(kwargs, reads, train, layout, taken):
    model = small_net(train, **kwargs).to(memory_format=layout)
    assert_both_forms_equal(model, images().contiguous(memory_format=layout))
    assert len(taken) == reads


@pytest.mark.parametrize(('name', 'size', 'reads'), [('awm_densenet_bc', 8, 17), ('awm_densenet121', 64, 57)])
def test_step_of_registered_nets(name, size, reads, taken):
    assert_both_forms_equal(randomise(trained_gates(name)).double().train(), images(3, size))
    assert len(taken) == reads


@pytest.mark.parametrize('size', [1, 40, 2**19])
def test_chunks_are_all_worked_on(size, monkeypatch):
    monkeypatch.setattr(fused, 'CHUNK', size)
    assert_both_forms_equal(small_net(), images(5))


@pytest.mark.parametrize('frozen', ['gates', 'backbone', 'statistics', 'stem', 'some statistics'])
def test_frozen_parts(frozen, taken):
    model = small_net()
    for key, parameter in model.named_parameters():
        of_gate, of_stem = 'merge' in key, '0' in key.split('.')[1]
        parameter.requires_grad_({'gates': not of_gate, 'backbone': of_gate, 'stem': not of_stem}.get(frozen, True))
    norms = [module for module in model.modules() if isinstance(module, BatchNormAct2d)]
    for norm in {'statistics': norms, 'some statistics': norms[::2]}.get(frozen, []):
        norm.eval()
    assert_both_forms_equal(model, images())
    model(images()).sum().backward()  # of an image without a gradient
    assert len(taken) == 2 * READS


@pytest.mark.parametrize('train', [True, False])
def test_first_and_second_derivatives(train, taken):
    model = small_net(train)
    block, transition = model.features.denseblock1, model.features.transition1

    def output(x, *_):
        return transition(block(x))

    x = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    chosen = [*block.denselayer3.merge.parameters(), *block.denselayer3.norm1.parameters()]
    args = (x, *chosen, *transition.merge.parameters(), transition.norm.weight)
    assert torch.autograd.gradcheck(output, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, args, fast_mode=True)
    assert taken


def test_backward_twice_through_a_kept_graph():
    model, x = small_net(), images().requires_grad_()
    y, targets = model(x), [x, *model.parameters()]
    first = torch.autograd.grad(y.square().sum(), targets, retain_graph=True)
    gate = model.features.transition1.merge.gate.fc2.weight
    (alone,) = torch.autograd.grad(y.square().sum(), gate, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), targets)
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    assert torch.equal(alone, first[[t is gate for t in targets].index(True)])


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing(reentrant, taken):
    model, x = small_net(), images()
    expected = step_of(model, x)[1]
    x.requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    taken.clear()
    model.set_grad_checkpointing()
    torch.testing.assert_close(step_of(model, x.detach())[1], expected)
    assert len(taken) == 1  # the transition, which timm's checkpoints leave out


def test_a_loss_on_what_gates_and_blocks_return():
    model, x = small_net(), images()
    kept = {}
    for name, module in model.named_modules():
        if isinstance(module, (Gate, WeightedDenseBlock)):
            module.register_forward_hook(lambda module, args, y, name=name: kept.update({name: y}))

    def gradients():
        model(x)
        loss = sum(y.square().sum() * i for i, y in enumerate(kept.values(), 1))
        parameters = [
            p for key, p in model.named_parameters() if key.startswith('features.dense') and 'block2' not in key
        ]
        return [*kept.values(), *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)]

    ours = gradients()
    set_fused_merge(False)
    for a, b in zip(ours, gradients()):
        torch.testing.assert_close(a, b)


def test_gates_are_read_as_ever():
    model, x = small_net(), images()
    ours = mapping_units(model, x)
    set_fused_merge(False)
    for a, b in zip(ours, mapping_units(model, x)):
        torch.testing.assert_close(a.weight, b.weight)


def test_training_keeps_less_than_the_plain_net():
    x = torch.randn(4, 3, 32, 32)
    kept = saved_bytes(timm.create_model('densenet40_bc_cifar'), x)
    assert saved_bytes(timm.create_model('awm_densenet_bc'), x) < 0.9 * kept
    set_fused_merge(False)
    assert saved_bytes(timm.create_model('awm_densenet_bc'), x) > 1.2 * kept


def test_a_change_to_the_blocks_output_is_noticed():
    block = small_net().features.denseblock1
    y = block(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


def test_a_single_value_per_channel_is_refused_as_ever():
    block = small_net().features.denseblock1
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        block(torch.randn(1, 8, 1, 1, dtype=torch.float64))


def change_norm(layer, **kwargs):
    layer.norm1 = BatchNormAct2d(layer.norm1.num_features, **kwargs).double()


@pytest.mark.parametrize(
    'change',
    [
        lambda layer: layer.merge.register_forward_hook(lambda module, args, y: y * 2),
        lambda layer: layer.norm1.register_forward_hook(lambda module, args, y: y * 2),
        lambda layer: layer.norm1.act.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda layer: setattr(layer.norm1, 'act', nn.SiLU()),
        lambda layer: setattr(layer.norm1.act, 'forward', torch.sigmoid),
        lambda layer: change_norm(layer, momentum=None),
        lambda layer: change_norm(layer, affine=False),
        lambda layer: change_norm(layer, track_running_stats=False),
    ],
)
def test_a_layer_that_needs_single_operations_has_them(change, taken):
    model = small_net()
    change(model.features.denseblock1.denselayer2)
    assert_both_forms_equal(model, images())
    assert len(taken) == READS - 1


def write_to_a_map(layer, args):
    args[0][1].zero_()


def replace_a_map(layer, args):
    args[0][1] = torch.zeros_like(args[0][1])


def give_other_maps(layer, args):
    return ([x * 2 for x in args[0]],)


@pytest.mark.parametrize('ablate', [write_to_a_map, replace_a_map, give_other_maps])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_what_a_hook_does_to_the_list_of_maps_is_read(mode, ablate, taken):
    block, x = small_net(train=False).features.denseblock1, torch.randn(2, 8, 4, 4, dtype=torch.float64)
    with mode():
        whole = block(x)
        assert len(taken) == 2
        block.denselayer3.register_forward_pre_hook(ablate)
        ours = block(x)
        assert len(taken) == 2
        assert not torch.allclose(ours, whole)
        set_fused_merge(False)
        torch.testing.assert_close(ours, block(x))


class Adapter(nn.Module):
    """A convolution with a low-rank one beside it, which has of the first's attributes its weight alone."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        options = dict(bias=False, dtype=conv.weight.dtype)
        self.down = nn.Conv2d(conv.in_channels, 1, conv.kernel_size, conv.stride, conv.padding, **options)
        self.up = nn.Conv2d(1, conv.out_channels, 1, **options)

    @property
    def weight(self):
        return self.conv.weight

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


def test_convolutions_may_be_wrapped(taken):
    net = small_net()
    for name, conv in [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]:
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child, Adapter(conv))
    assert_both_forms_equal(net, images())
    assert len(taken) == READS


def test_other_modes_fall_back(taken):
    model, x = small_net(train=False), images()
    expected = model(x)
    assert len(taken) == READS
    torch.testing.assert_close(torch.vmap(lambda one: model(one[None])[0])(x), expected)
    slope = torch.func.grad(lambda x: model(x).square().sum())(x)
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, tangent))
        along = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close((slope * tangent).sum(), (2 * expected * along).sum())
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), expected)
    assert model(x[:0]).shape == (0, 3)
    copy.deepcopy(model).bfloat16()(x.bfloat16())
    with torch.autocast('cpu', torch.bfloat16):
        copy.deepcopy(model).float()(x.float())
    assert len(taken) == READS
    with timm.layers.set_scriptable(True):
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
