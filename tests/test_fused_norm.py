"""The norm and the merge as one affine map: equal to the plain formula wherever it is taken, compiled and eager."""

import copy

import pytest
import timm
import torch
from conftest import randomise
from test_units import trained_gates, with_trained_gates
from timm.layers import DropPath
from torch import nn

from timm_weighted_skip import AlternateFreezing, fused_norm, mapping_units, set_fused_merge
from timm_weighted_skip.convert import to_awm
from timm_weighted_skip.layers import Gate

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def bottlenecks(monkeypatch):
    """A plain net of four bottlenecks, whose maps of any size count as large enough."""
    monkeypatch.setattr(fused_norm, 'SMALLEST_IMAGE', 1)
    return randomise(timm.create_model('resnet50', layers=(1, 1, 1, 1), num_classes=5)).eval()


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('n', [1, 3])
@torch.no_grad()
def test_a_weight_known_before_the_last_convolution_keeps_identity_to_the_bit(bottlenecks, n, amp, layout, taken):
    model = bottlenecks.to(memory_format=layout)
    x = torch.randn(n, 3, 64, 96).contiguous(memory_format=layout)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        assert torch.equal(to_awm(model)(x), model(x))
    assert taken == ['norm_relu'] * 4


@pytest.mark.parametrize('layout', LAYOUTS)
@torch.no_grad()
def test_a_weight_known_before_the_last_convolution_is_the_plain_formulas(bottlenecks, layout, taken):
    model = with_trained_gates(to_awm(bottlenecks)).double().to(memory_format=layout)
    x = torch.randn(3, 3, 64, 96).double().contiguous(memory_format=layout)
    y, weights = model(x), [unit.weight for unit in mapping_units(model, x)]
    assert taken == ['norm_relu'] * 8
    set_fused_merge(False)
    torch.testing.assert_close(y, model(x), rtol=1e-12, atol=1e-12)
    assert torch.std(weights[1]) > 0.01
    for ours, unit in zip(weights, mapping_units(model, x)):
        torch.testing.assert_close(ours, unit.weight, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_what_stands_in_the_place_of_drop_path_is_asked(bottlenecks, taken):
    block, x = with_trained_gates(to_awm(bottlenecks)).layer1[0], torch.randn(2, 64, 9, 9)
    block.drop_path, seen = DropPath(0.5).eval(), []
    expected = block(x)
    assert taken == ['norm_relu']
    handle = block.drop_path.register_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(block(x), expected)
    assert len(seen) == 1
    handle.remove()
    block.drop_path = nn.Hardtanh(-0.1, 0.1)
    clipped = block(x)
    set_fused_merge(False)
    torch.testing.assert_close(clipped, block(x))
    assert taken == ['norm_relu', 'merge_relu']


def test_the_weight_comes_after_the_last_convolution_where_that_matters(bottlenecks, monkeypatch, taken):
    block, x = with_trained_gates(to_awm(bottlenecks)).layer1[0], torch.randn(2, 64, 9, 9)

    def forward(step, training=False):
        taken.clear()
        block.train(training)
        with torch.no_grad():
            y = block(x)
        assert taken == step
        return y

    expected = forward(['norm_relu'])
    torch.testing.assert_close(block(x), expected)  # with gradients
    assert taken == ['norm_relu', 'merge_relu']
    for module in (block.conv3, block.bn3, block.merge, block.act3):
        seen = []
        handle = module.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y.shape))
        torch.testing.assert_close(forward([]), expected)
        assert seen == [expected.shape]
        handle.remove()
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(forward(['norm_relu']).float(), expected, rtol=0.05, atol=0.05)
    block.se = nn.Identity()
    forward(['merge_relu'])
    block.se = None
    monkeypatch.setattr(fused_norm, 'SMALLEST_IMAGE', 2**15)
    torch.testing.assert_close(forward(['merge_relu']), expected)
    with torch.no_grad():
        assert block(x[:0]).shape == (0, 256, 9, 9)
    forward(['merge_relu'], training=True)


@torch.no_grad()
def test_under_autocast_a_shortcut_may_have_32_bits(taken):
    block = randomise(trained_gates('awm_resnet50', layers=(2, 1, 1, 1))).layer1[1].eval()
    x = torch.randn(2, 256, 12, 12)
    with torch.autocast('cpu', torch.bfloat16):
        y = block(x)
    assert taken == ['norm_relu']
    torch.testing.assert_close(y, block(x), rtol=0.05, atol=0.05)  # and in the same 32 bits


def compiled(model):
    """`model` compiled into one graph, and a list that then holds the graph's calls by the functions' names."""
    calls = []

    def backend(graph, example):
        calls.extend(getattr(node.target, '__name__', '') for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    return torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True), calls


def train_step(model, x):
    """Output, running statistics and every gradient of a step in train mode, by name."""
    y = model(x)
    y.square().mean().backward()
    model = getattr(model, '_orig_mod', model)
    return {'y': y, **dict(model.named_buffers()), **{f'd {n}': p.grad for n, p in model.named_parameters()}}


def nets(name):
    """A small net of each kind of block, with gates and norms away from their start."""
    kwargs = {} if 'cifar' in name else dict(layers=(1, 1, 1, 1), num_classes=5)
    return randomise(trained_gates(name, **kwargs))


@pytest.mark.parametrize('frozen', ['gates', 'backbone', 'nothing'])
@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_resnet50'])
def test_compiled_training_is_the_plain_formulas(name, frozen):
    model = nets(name).double().train()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(frozen == 'nothing' or ('merge' in key) != (frozen == 'gates'))
    x = torch.randn(4, 3, 64, 64).double()
    ours, calls = compiled(model)
    step = train_step(ours, x)
    assert calls.count('var_mean') == sum(isinstance(m, Gate) for m in model.modules())
    set_fused_merge(False)
    expected = train_step(model, x)
    assert step.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(step[key], value, rtol=1e-7, atol=1e-9, msg=key)


@torch.no_grad()
def test_compiled_bottlenecks_know_their_weight_before_the_last_convolution():
    model = nets('awm_resnet50').double().eval()
    x = torch.randn(3, 3, 64, 96).double()
    ours, calls = compiled(model)
    y = ours(x)
    ordinary, others = compiled(model)
    set_fused_merge(False)
    torch.testing.assert_close(y, ordinary(x), rtol=1e-12, atol=1e-12)
    assert calls.count('linear') == others.count('linear') + 4  # of the pooled maps


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Compiled training takes the norm and the merge as one in 16 bits, too."""
    monkeypatch.setattr(fused_norm, '_is_16_bits_on_cpu', lambda x: False)


def test_compiled_training_in_bfloat16_is_as_precise_as_the_plain_formula(as_on_a_gpu):
    model = nets('awm_resnet14_cifar').train()
    x = torch.randn(8, 3, 32, 32)
    exact = train_step(copy.deepcopy(model).double(), x.double())

    def error(enable):
        set_fused_merge(enable)
        with torch.autocast('cpu', torch.bfloat16):
            ours, calls = compiled(model)
            step = train_step(ours, x)
        assert calls.count('var_mean') == 6 * enable
        keys = [key for key, value in exact.items() if value.is_floating_point() and value.any()]
        return torch.stack([(step[key] - exact[key]).norm() / exact[key].norm() for key in keys])

    assert error(True).mean() < 1.1 * error(False).mean()


def test_compiled_training_falls_back_where_single_operations_are_needed():
    block = nets('awm_resnet14_cifar').layer1[0]
    x = torch.randn(2, 16, 8, 8)
    without_bias = nn.BatchNorm2d(16)
    without_bias.bias = None

    def moments(change, undo):
        handle = change()
        _, calls = step = compiled(block.train())
        step[0](x)
        undo(handle)
        return calls.count('var_mean')

    def seen(module):
        return lambda: module.register_forward_hook(lambda module, args, y: None), lambda handle: handle.remove()

    def replaced(name, module):
        return lambda: (getattr(block, name), setattr(block, name, module))[0], lambda old: setattr(block, name, old)

    assert moments(lambda: None, lambda handle: None) == 1
    with torch.autocast('cpu', torch.bfloat16):
        assert moments(lambda: None, lambda handle: None) == 0
    for module in (block.merge, block.bn2, block.act2, block.conv2):
        assert moments(*seen(module)) == 0
        # Another forward than its class's.
        assert (
            moments(lambda m=module: setattr(m, 'forward', m.forward), lambda _, m=module: delattr(m, 'forward')) == 0
        )
    for name, module in (
        ('drop_path', timm.layers.DropPath(0.1)),
        ('se', nn.Identity()),
        ('act2', nn.SiLU()),
        ('bn2', nn.BatchNorm2d(16, affine=False)),
        ('bn2', nn.BatchNorm2d(16, track_running_stats=False)),
        ('bn2', without_bias),
        ('bn2', nn.GroupNorm(4, 16)),
    ):
        assert moments(*replaced(name, module)) == 0


def test_one_value_has_no_variance_and_none_changes_nothing():
    block = nets('awm_resnet14_cifar').layer1[0].train()
    with pytest.raises(Exception, match='more than 1 value'):
        compiled(block)[0](torch.randn(1, 16, 1, 1))
    empty, _ = compiled(block)
    assert empty(torch.randn(0, 16, 8, 8)).shape == (0, 16, 8, 8)
    assert torch.equal(empty.bn2.running_mean, block.bn2.running_mean)


def test_compiled_training_keeps_frozen_statistics():
    model, x = nets('awm_resnet14_cifar').double().train(), torch.randn(4, 3, 32, 32).double()
    AlternateFreezing(period=1, freeze_bn_stats=True)(model, 1)
    step = train_step(compiled(model)[0], x)
    assert all(torch.equal(step[name], buffer) for name, buffer in model.named_buffers())
    set_fused_merge(False)
    for key, value in train_step(model, x).items():
        torch.testing.assert_close(step[key], value, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize('norms', [torch.bfloat16, torch.float32])
def test_a_bfloat16_net_trains_compiled(norms, as_on_a_gpu):
    block = nets('awm_resnet14_cifar').layer1[0].train().bfloat16()
    for norm in (block.bn1, block.bn2):
        norm.to(norms)
    x = torch.randn(8, 16, 8, 8).bfloat16()
    ours, calls = compiled(block)
    y = ours(x)
    assert y.dtype == torch.bfloat16
    assert 'var_mean' in calls
    set_fused_merge(False)
    torch.testing.assert_close(y, block(x), rtol=0.05, atol=0.05)
