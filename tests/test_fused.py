"""The merge and its ReLU in one step: equal to the plain formula wherever it is taken, and not taken elsewhere."""

import copy
import gc
import weakref

import pytest
import timm
import torch
from conftest import randomise
from test_units import trained_gates
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from timm_weighted_skip import fused, set_fused_merge
from timm_weighted_skip.convert import to_adaresnet, to_awm
from timm_weighted_skip.layers import ActiveWeightedMapping, SkipWeight
from timm_weighted_skip.models.blocks import WeightedBasicBlock

LAYOUTS = [torch.contiguous_format, torch.channels_last]
NETS = {'awm_resnet14_cifar': {}, 'adaresnet14_cifar': {'skip_init': 0.7}, 'adaresnet18_released': {'skip_init': -0.5}}


def mapping(c=4, **kwargs) -> ActiveWeightedMapping:
    """A gate away from its start."""
    merge = ActiveWeightedMapping(c, hidden=3, dtype=torch.float64, **kwargs)
    nn.init.normal_(merge.gate.fc2.weight)
    return merge


def maps(n=3, c=4, layout=torch.contiguous_format, requires_grad=True):
    """A residual branch's and a shortcut's output, (N, C, 5, 6)."""
    both = [torch.randn(n, c, 5, 6, dtype=torch.float64).contiguous(memory_format=layout) for _ in range(2)]
    return [x.requires_grad_(requires_grad) for x in both]


def plain(merge, residual, shortcut):
    return torch.relu(merge(residual, shortcut))


def single(merge, residual, shortcut):
    assert fused.can_fuse(merge, nn.ReLU(), residual, shortcut)
    return merge.merge_relu(residual.clone(), shortcut)


def gradients(step, merge, inputs, g):
    """Output, and the gradients of both maps and every parameter."""
    y = step(merge, *inputs)
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *merge.parameters()], g)]


MERGES = {
    'mapping': mapping,
    'paper scale': lambda: mapping(scale=1.0),
    'negative scale': lambda: mapping(scale=-1.5),
    'fresh': lambda: ActiveWeightedMapping(4, dtype=torch.float64),
    'skip': lambda: SkipWeight(0.3, dtype=torch.float64),
    'closed': lambda: SkipWeight(0.0, dtype=torch.float64),
    'fixed': lambda: SkipWeight(2.0, fixed=True, dtype=torch.float64),
    'plain': lambda: ActiveWeightedMapping(4, plain=True),
}


@pytest.mark.parametrize('chunk', [1, 240, 2**19], ids='chunks of {}'.format)
@pytest.mark.parametrize('layouts', [(a, b) for a in LAYOUTS for b in LAYOUTS], ids=str)
@pytest.mark.parametrize('name', MERGES)
def test_output_and_all_gradients_are_the_plain_formulas(name, layouts, chunk, monkeypatch):
    monkeypatch.setattr(fused, 'CHUNK', chunk)
    merge = MERGES[name]()
    inputs = [maps(layout=layouts[0])[0], maps(layout=layouts[1])[1]]
    for g in (torch.randn(3, 4, 5, 6).double(), torch.randn(3, 4, 1, 1).double().expand(3, 4, 5, 6)):
        expected = gradients(plain, merge, inputs, g)
        for ours, theirs in zip(gradients(single, merge, inputs, g), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def leaning(log_lam1, dtype) -> ActiveWeightedMapping:
    """A gate that gives the branch of maps around one a weight of about `exp(log_lam1)` beside the shortcut's."""
    merge = mapping()
    nn.init.constant_(merge.gate.fc1.weight, 1 / 8)  # of maps around one it makes hidden features around one
    merge.gate.fc2.weight.data = torch.tensor([[log_lam1], [30.0]]).double().expand(2, 3) / 3
    return merge.to(dtype)


@pytest.mark.parametrize('log_lam1', [-1.0, -2.5, -4.0, -14.0, -21.0, -32.0, -1e4])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_weights_near_zero_lose_no_gradient(log_lam1, dtype):
    merge = leaning(log_lam1, dtype)
    inputs = [(1 + 0.1 * torch.randn(2, 4, 5, 6, dtype=dtype)).requires_grad_() for _ in range(2)]
    g = torch.randn(2, 4, 5, 6, dtype=dtype)
    exact = gradients(plain, copy.deepcopy(merge).double(), [x.double() for x in inputs], g.double())
    for ours, theirs in zip(gradients(single, merge, inputs, g), exact):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=5e-5 * theirs.abs().max().item())


@pytest.mark.parametrize('log_lam1', [-1.0, -2.5, -4.0, -14.0])
def test_weights_near_zero_lose_no_more_in_bfloat16_than_by_the_plain_formula(log_lam1):
    merge = leaning(log_lam1, torch.bfloat16)
    inputs = [(1 + 0.1 * torch.randn(2, 4, 5, 6)).bfloat16().requires_grad_() for _ in range(2)]
    g = torch.randn(2, 4, 5, 6).bfloat16()
    for ours, theirs in zip(gradients(single, merge, inputs, g), gradients(plain, merge, inputs, g)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * theirs.abs().max().item())


def test_weights_near_zero_of_one_image_lose_no_gradient():
    merge = leaning(-200.0, torch.float32)  # lam1 is 0
    size = torch.tensor([1e-3, 1.0])[:, None, None, None]  # of the first image both weigh about the same
    inputs = [(size * (1 + 0.1 * torch.randn(2, 4, 5, 6))).requires_grad_() for _ in range(2)]
    g = torch.randn(2, 4, 5, 6)
    exact = gradients(plain, copy.deepcopy(merge).double(), [x.double() for x in inputs], g.double())
    for ours, theirs in zip(gradients(single, merge, inputs, g), exact):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=5e-5 * theirs.abs().max().item())


@pytest.mark.parametrize('name', ['mapping', 'skip', 'kept'])
def test_first_and_second_derivatives(name, monkeypatch):
    if name == 'kept':
        monkeypatch.setattr(fused, '_recoverable', lambda weight: False)
    merge = MERGES['mapping' if name == 'kept' else name]()
    inputs = [torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    args = (*inputs, *merge.parameters())
    assert torch.autograd.gradcheck(lambda residual, shortcut, *_: single(merge, residual, shortcut), args)
    assert torch.autograd.gradgradcheck(lambda residual, shortcut, *_: single(merge, residual, shortcut), args)


def test_a_loss_on_the_weights_reaches_both_maps():
    merge, inputs, g = mapping(), maps(), torch.randn(3, 4, 5, 6).double()
    kept = {}
    merge.gate.register_forward_hook(lambda gate, args, lam: kept.update(lam=lam))

    def gradients_of(step, y_counts):
        loss = (step(merge, *inputs) * g).sum() * y_counts + kept['lam'].square().sum()
        return torch.autograd.grad(loss, [*inputs, *merge.parameters()])

    for y_counts in (0.0, 1.0):
        for ours, theirs in zip(gradients_of(single, y_counts), gradients_of(plain, y_counts)):
            torch.testing.assert_close(ours, theirs)
    single(merge, *inputs)
    only_lam = torch.autograd.grad(kept['lam'].square().sum(), inputs, retain_graph=True)
    plain(merge, *inputs)
    for ours, theirs in zip(only_lam, torch.autograd.grad(kept['lam'].square().sum(), inputs)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('name', ['mapping', 'skip'])
def test_backward_twice_through_a_kept_graph(name):
    merge, inputs = MERGES[name](), maps()
    y = single(merge, *inputs)
    targets = [*inputs, *merge.parameters()]
    first = torch.autograd.grad(y.square().sum(), targets, retain_graph=True)
    only_parameters = torch.autograd.grad(y.square().sum(), list(merge.parameters()), retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), targets)
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    for a, b in zip(first[2:], only_parameters):
        assert torch.equal(a, b)


@pytest.mark.parametrize('create_graph', [False, True])
def test_gradients_of_the_gate_alone_leave_nothing_behind(create_graph):
    merge, (residual, shortcut) = mapping(), maps()
    y = single(merge, residual, shortcut)
    gradients = torch.autograd.grad(y.square().sum(), list(merge.parameters()), create_graph=create_graph)
    held = weakref.ref(shortcut)  # by the graph
    del residual, shortcut, y, gradients
    gc.collect()
    assert held() is None


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing(reentrant):
    merge, inputs = mapping(), maps()
    expected = torch.autograd.grad(plain(merge, *inputs).square().sum(), inputs)
    again = checkpoint(lambda residual, shortcut: single(merge, residual, shortcut), *inputs, use_reentrant=reentrant)
    again.square().sum().backward()
    for x, theirs in zip(inputs, expected):
        torch.testing.assert_close(x.grad, theirs)


@pytest.mark.parametrize('frozen', ['gates', 'backbone', 'nothing'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', NETS)
def test_whole_nets_train_alike(name, layout, frozen, taken):
    model = randomise(trained_gates(name, **NETS[name])).double().to(memory_format=layout).train()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(frozen == 'nothing' or ('merge' in key) != (frozen == 'gates'))
    x = torch.randn(4, 3, 32, 32).double().contiguous(memory_format=layout)
    outputs = []
    for enable in (True, False):
        set_fused_merge(enable)
        net = copy.deepcopy(model)
        y = net(x)
        y.square().sum().backward()
        outputs.append([y.detach(), *(p.grad for p in net.parameters() if p.requires_grad)])
    assert len(taken) == sum(isinstance(m, WeightedBasicBlock) for m in model.modules())
    for ours, theirs in zip(*outputs):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * theirs.abs().max().item())


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', NETS)
def test_outputs_are_the_same_to_the_bit(name, layout, taken):
    model = randomise(trained_gates(name, **NETS[name])).eval().to(memory_format=layout)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=layout)
    with torch.no_grad():
        y = model(x)
    assert taken
    assert torch.equal(model(x), y)
    set_fused_merge(False)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize('shape', [(3, 20, 5, 6), (2, 1, 5, 6), (2, 20, 1, 1)], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_channel_means(dtype, layout, shape):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
    means = fused.channel_means(x)
    torch.testing.assert_close(means, x.double().mean((2, 3)).to(dtype))
    g = torch.randn_like(means)
    (grad,) = torch.autograd.grad(means, x, g)
    torch.testing.assert_close(grad, (g / x[0, 0].numel())[..., None, None].expand_as(x))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'adaresnet14_cifar'])
def test_bfloat16_on_a_cpu_is_as_precise_as_the_plain_formula(name, layout, taken):
    model = randomise(trained_gates(name, **NETS[name])).to(memory_format=layout).train()
    x = torch.randn(8, 3, 32, 32).contiguous(memory_format=layout)

    def step(net, x):
        y = net(x)
        y.square().mean().backward()
        return {'y': y.detach(), **{key: p.grad for key, p in net.named_parameters()}}

    set_fused_merge(False)
    exact = step(copy.deepcopy(model).double(), x.double())

    def error(enable):
        set_fused_merge(enable)
        taken.clear()
        with torch.autocast('cpu', torch.bfloat16):
            ours = step(copy.deepcopy(model), x)
        assert len(taken) == enable * 6
        return torch.stack([(ours[key] - exact[key]).norm() / exact[key].norm() for key in exact])

    assert error(True).mean() < 1.1 * error(False).mean()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_bfloat16_keeps_identity_to_the_bit(layout, training, taken):
    model = randomise(timm.create_model('resnet18', num_classes=3)).to(memory_format=layout).train(training)
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=layout)
    for convert in (to_awm, to_adaresnet):
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(convert(model)(x), copy.deepcopy(model)(x))
    assert len(taken) == 16


def saved_bytes(model, x) -> int:
    """Bytes kept for backward, each storage once, parameters aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is t or t, lambda t: t
    ):
        y = model(x)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


@pytest.mark.parametrize('name', ['awm_resnet50', 'adaresnet50'])
def test_training_keeps_little_more_than_the_plain_net(name):
    x = torch.randn(2, 3, 96, 96)
    kept = saved_bytes(timm.create_model('resnet50'), x)
    assert saved_bytes(timm.create_model(name), x) <= 1.08 * kept
    set_fused_merge(False)
    assert name.startswith('ada') or saved_bytes(timm.create_model(name), x) > 1.2 * kept


def test_blocks_fall_back_where_single_operations_are_needed(taken):
    block = trained_gates('awm_resnet14_cifar').layer1[0].eval()
    x = torch.randn(2, 16, 8, 8)
    expected = block(x)
    assert len(taken) == 1

    merged, activated = [], []
    handles = [
        block.merge.register_forward_hook(lambda module, args, y: merged.append(y.clone())),
        block.act2.register_forward_hook(lambda module, args, y: activated.append(y)),
    ]
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(torch.relu(merged[0]), activated[0])
    for handle in handles:
        handle.remove()

    torch.testing.assert_close(torch.vmap(lambda one: block(one[None])[0])(x), expected)
    grad = torch.func.grad(lambda x: block(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    assert len(taken) == 1
    torch.testing.assert_close(grad, torch.autograd.grad(block(leaf).square().sum(), leaf)[0])
    assert len(taken) == 2

    tangent = torch.randn_like(x)
    _, slope = torch.func.jvp(block, (x,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = block(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)
    torch.testing.assert_close((grad * tangent).sum(), (2 * expected * slope).sum(), rtol=1e-4, atol=1e-4)

    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), expected)
    torch.testing.assert_close(make_fx(block)(x)(x), expected)
    torch.testing.assert_close(torch.jit.trace(block, x, check_trace=False)(x), expected)
    assert block(x[:0]).shape == (0, 16, 8, 8)
    copy.deepcopy(block).half()(x.half())
    with torch.autocast('cpu', torch.bfloat16):
        assert block(x).dtype == torch.float32  # of a branch of 16 bits and a shortcut of 32
    assert len(taken) == 2

    block.act2 = nn.SiLU()
    torch.testing.assert_close(block(x), nn.functional.silu(merged[0]))
    assert len(taken) == 2


def test_what_a_user_puts_around_a_call_is_called(taken):
    block = timm.create_model('adaresnet14_cifar').layer1[0].eval()
    x = torch.randn(1, 16, 4, 4)
    expected = block(x)
    for module, forward in (
        (block.merge, lambda residual, shortcut: SkipWeight.forward(block.merge, residual, shortcut)),
        (block.act2, lambda merged: nn.ReLU.forward(block.act2, merged)),
    ):
        called = []
        module.forward = lambda *args, forward=forward, called=called: called.append(args) or forward(*args)
        torch.testing.assert_close(block(x), expected)
        assert len(called) == 1
        del module.forward
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module)):
        torch.testing.assert_close(block(x), expected)
    assert {block.merge, block.act2} <= set(seen)
    assert len(taken) == 1


@pytest.mark.parametrize('part', ['conv2', 'bn2', 'se', 'drop_path'])
@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'adaresnet14_cifar'])
def test_a_branch_that_a_hook_was_given_is_not_overwritten(name, part, taken):
    block = trained_gates(name).double().layer1[0].eval()
    block.se, block.drop_path = nn.Identity(), nn.Identity()
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    kept = []
    getattr(block, part).register_forward_hook(lambda module, args, y: kept.append((y, y.detach().clone())))
    y = block(x)
    branch, before = kept[0]
    torch.testing.assert_close(branch, before)
    assert y is not branch
    assert not taken


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'adaresnet14_cifar', 'awm_densenet22_bc_cifar'])
def test_gradients_of_several_outputs_at_once(name, training):
    model = randomise(trained_gates(name, num_classes=3)).double().train(training)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *model.parameters()]
    outputs = model(x).sum(0)
    at_once = torch.autograd.grad(outputs, inputs, torch.eye(3).double(), is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, inputs, retain_graph=True) for output in outputs]
    for ours, theirs in zip(at_once, map(torch.stack, zip(*each))):
        torch.testing.assert_close(ours, theirs)


def test_a_changed_merge_is_asked(taken):
    class Halved(SkipWeight):
        def forward(self, residual, shortcut):
            return super().forward(residual, shortcut) / 2

    block = timm.create_model('adaresnet14_cifar').layer1[0].eval()
    x = torch.randn(1, 16, 4, 4)
    expected = block(x) / 2
    block.merge = Halved(0.0)
    torch.testing.assert_close(block(x), expected)
    assert len(taken) == 1
