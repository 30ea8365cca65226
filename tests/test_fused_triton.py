"""The Triton kernels: equal to the plain formulas. On a GPU as compiled; elsewhere in Triton's interpreter, on the CPU.

The interpreter has to be chosen before Triton is imported, so one test here runs the others in a process of their own.
"""

import copy
import math
import os
import subprocess
import sys

import pytest
import timm
import torch
from conftest import randomise
from test_fused import LAYOUTS, MERGES, gradients, mapping, plain
from test_units import trained_gates
from torch import nn

from timm_weighted_skip import fused, set_fused_merge

triton = pytest.importorskip('triton', reason='Triton is not installed')

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cuda' if torch.cuda.is_available() and not INTERPRETED else 'cpu'
runs_kernels = pytest.mark.skipif(
    DEVICE == 'cpu' and not INTERPRETED, reason='no GPU; test_in_the_interpreter runs this one'
)
needs_gpu = pytest.mark.skipif(DEVICE == 'cpu', reason='no GPU')


@pytest.mark.skipif(INTERPRETED, reason='is the interpreter')
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert ' passed' in run.stdout


@pytest.mark.skipif(INTERPRETED, reason='nothing is compiled')
@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize(('dtype', 'sum_dtype'), [('bf16', 'fp32'), ('fp32', 'fp32'), ('fp64', 'fp64')])
def test_every_kernel_compiles_to_a_gpus_machine_code(capability, dtype, sum_dtype):
    """Triton brings the assembler along, so this takes no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timm_weighted_skip import fused_triton

    pointers = {'partial': f'*{sum_dtype}'}
    constants = {
        'ACC': getattr(triton.language, f'float{sum_dtype[2:]}'),
        'BLOCK': fused_triton.BLOCK,
        'SIDE': fused_triton.SIDE,
    }
    cases = [
        (fused_triton._skip_relu, {}),
        (fused_triton._mapping_relu, {'CHANNELS_LAST': True}),
        (fused_triton._mapping_relu, {'CHANNELS_LAST': False}),
        (fused_triton._dots, {}),
        (fused_triton._gradients, {'CHANNELS_LAST': True}),
        (fused_triton._gradients, {'CHANNELS_LAST': False}),
        (fused_triton._skip_gradients, {}),
    ]
    for kernel, choice in cases:
        fixed = {name: value for name, value in {**constants, **choice}.items() if name in kernel.arg_names}
        numbers = dict.fromkeys(('size', 'channels', 'pixels'), 'i32')
        types = {name: {**pointers, **numbers}.get(name, f'*{dtype}') for name in kernel.arg_names}
        source = ASTSource(kernel, {**types, **dict.fromkeys(fixed, 'constexpr')}, fixed)
        made = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=fused_triton.OPTIONS)
        assert made.asm['cubin']


@pytest.fixture
def kernels(monkeypatch):
    """The module of the kernels, in use for the CPU, too."""
    from timm_weighted_skip import fused_triton

    monkeypatch.setattr(fused, '_kernels_of', lambda device: fused_triton)
    monkeypatch.setattr(fused_triton, 'BLOCK', 64)  # so that the small maps here take several programs each
    monkeypatch.setattr(fused_triton, 'SIDE', 4)
    return fused_triton


@pytest.fixture
def launched(kernels, monkeypatch):
    """Names of the steps that the kernels take, as they come."""
    names = []
    for name in ('mapping_relu', 'dots', 'gradients', 'skip_relu', 'skip_gradients'):
        step = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *args, step=step, name=name, **kwargs: names.append(name) or step(*args, **kwargs)
        )
    return names


def single(merge, residual, shortcut):
    return merge.merge_relu(residual.clone(), shortcut)


def maps(layouts, dtype=torch.float64):
    return [
        torch.randn(3, 4, 5, 6, dtype=dtype, device=DEVICE).contiguous(memory_format=layout).requires_grad_()
        for layout in layouts
    ]


@runs_kernels
@pytest.mark.parametrize('layouts', [(a, b) for a in LAYOUTS for b in LAYOUTS], ids=str)
@pytest.mark.parametrize('name', [name for name in MERGES if name != 'plain'])
def test_output_and_all_gradients_are_the_plain_formulas(name, layouts, launched):
    merge, inputs = MERGES[name]().to(DEVICE), maps(layouts)
    for g in (torch.randn(3, 4, 5, 6, device=DEVICE).double(), torch.randn(3, 4, 1, 1, device=DEVICE).double()):
        g = g.expand(3, 4, 5, 6)
        for ours, theirs in zip(gradients(single, merge, inputs, g), gradients(plain, merge, inputs, g)):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    steps = {'skip': 2, 'closed': 2, 'fixed': 1}.get(name, 3)
    assert len(launched) == (2 * steps if layouts[0] == layouts[1] else 0)


@runs_kernels
@pytest.mark.parametrize('lam1', [0.5, 0.1, 0.002])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_only_what_it_stores(lam1, dtype, kernels):
    residual, shortcut, g = (torch.randn(2, 8, 7, 9, device=DEVICE).to(dtype) for _ in range(3))
    weight = torch.tensor([[2 * lam1, 2 - 2 * lam1], [1.0, 1.0]], device=DEVICE).to(dtype)
    share = torch.randn(2, 16, device=DEVICE).to(dtype)
    exact = [x.double().requires_grad_() for x in (residual, shortcut, weight)]
    w1, w2 = exact[2][..., None, None, None].unbind(1)
    y = torch.relu(w1 * exact[0] + w2 * exact[1])
    y_exact = y.detach()
    grad_residual, grad_shortcut, grad_weight = torch.autograd.grad(y, exact, g.double())
    shares = share.double().unflatten(1, (2, 8))[..., None, None].unbind(1)

    y, means = kernels.mapping_relu(residual, shortcut, weight, overwrite=False)
    torch.testing.assert_close(y, y_exact.to(dtype))
    torch.testing.assert_close(means, y_exact.mean((2, 3)).to(dtype))
    if DEVICE == 'cuda' or dtype != torch.bfloat16:  # to which the interpreter does not round but truncates
        assert torch.equal(y[1], torch.relu(residual + shortcut)[1])  # identity, to the bit
    torch.testing.assert_close(kernels.dots(g, residual, shortcut, weight), grad_weight.to(dtype))
    ours = kernels.gradients(g, y, weight, share)
    for got, expected in zip(ours, (grad_residual + shares[0], grad_shortcut + shares[1])):
        torch.testing.assert_close(got, expected.to(dtype), atol=1e-2 if dtype != torch.float32 else 1e-5, rtol=2e-2)


@runs_kernels
@pytest.mark.parametrize('merge', [mapping(c=2), MERGES['skip']()], ids=['mapping', 'skip'])
def test_first_and_second_derivatives(merge, launched):
    merge.to(DEVICE)
    inputs = [torch.randn(2, 2, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2)]
    args = (*inputs, *merge.parameters())
    assert torch.autograd.gradcheck(lambda residual, shortcut, *_: single(merge, residual, shortcut), args)
    assert torch.autograd.gradgradcheck(lambda residual, shortcut, *_: single(merge, residual, shortcut), args)
    assert launched


@runs_kernels
def test_gradients_of_the_weights_alone_and_of_one_map_alone(launched):
    merge, inputs = MERGES['mapping']().to(DEVICE), maps(LAYOUTS[:1] * 2)
    merge.gate.register_forward_hook(lambda gate, args, lam: lam.detach())  # the means get no gradient
    expected = torch.autograd.grad(plain(merge, *inputs).square().sum(), inputs)
    y = single(merge, *inputs)
    for _ in range(2):
        got = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
        for ours, theirs in zip(got, expected):
            torch.testing.assert_close(ours, theirs)
    residual = inputs[0].detach()
    (alone,) = torch.autograd.grad(single(merge, residual, inputs[1]).square().sum(), inputs[1:])
    torch.testing.assert_close(alone, expected[1])


@runs_kernels
def test_nan_and_infinity_pass_as_through_torch(kernels):
    residual = torch.tensor([float('nan'), float('inf'), -float('inf'), -1.0], device=DEVICE).view(1, 1, 2, 2)
    weight = torch.ones(1, 2, device=DEVICE)
    y, _ = kernels.mapping_relu(residual.clone(), torch.zeros_like(residual), weight)
    assert y.flatten().tolist()[1:] == [float('inf'), 0, 0]
    assert y.flatten()[0].isnan()


@runs_kernels
@pytest.mark.parametrize('layout', LAYOUTS)
def test_means_go_to_the_next_unit(layout, launched, monkeypatch):
    first, second = (mapping(c=6).to(DEVICE) for _ in range(2))
    inputs = [torch.randn(2, 6, 5, 5, device=DEVICE).double().contiguous(memory_format=layout) for _ in range(3)]
    inputs = [x.requires_grad_() for x in inputs]
    taken = []
    carried = fused._carried_means
    monkeypatch.setattr(fused, '_carried_means', lambda x: taken.append(carried(x)) or taken[-1])

    def gradients_through_both(step):
        y = step(second, inputs[2], step(first, *inputs[:2]))
        return torch.autograd.grad(y.square().sum(), [*inputs, *first.parameters(), *second.parameters()])

    for ours, theirs in zip(gradients_through_both(single), gradients_through_both(plain)):
        torch.testing.assert_close(ours, theirs)
    assert taken[0] is None
    torch.testing.assert_close(taken[1], single(first, *inputs[:2]).mean((2, 3)))


@runs_kernels
def test_means_of_a_map_that_was_written_to_are_not_used(kernels):
    residual, shortcut = (x.detach() for x in maps(LAYOUTS[:1] * 2))
    y = single(mapping().to(DEVICE), residual, shortcut)
    assert fused._carried_means(y) is not None
    y.add_(1)
    assert fused._carried_means(y) is None
    with torch.inference_mode():  # which does not tell
        assert fused._carried_means(single(mapping().to(DEVICE), residual, shortcut)) is None


@runs_kernels
def test_autograd_knows_of_the_kernels_writes(kernels):
    x, shortcut = maps(LAYOUTS[:1] * 2)
    y = MERGES['skip']().to(DEVICE).merge_relu(torch.sigmoid(x), shortcut)  # sigmoid's backward needs what it wrote
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()
    residual = x.detach().clone()
    with torch.no_grad():
        MERGES['mapping']().to(DEVICE).merge_relu(residual, shortcut)
    assert residual._version == 1


def test_large_images_fit_the_grid_that_cuda_takes(monkeypatch):
    from timm_weighted_skip import fused_triton as kernels

    grids = []
    monkeypatch.setattr(kernels, '_launch', lambda kernel, grid, *args: grids.append(grid))
    y = torch.empty(2, 64, 2048, 4096, device='meta')
    weight = torch.empty(2, 2, device='meta')
    kernels.skip_relu(y, y, weight[0, 0])
    kernels.skip_gradients(y, y, y, weight[0, 0])
    kernels.mapping_relu(y, y, weight)
    kernels.dots(y, y, y, weight)
    kernels.gradients(y, y, weight, None)
    assert len(grids) == 5
    for grid in grids:
        assert math.prod(grid) == y.numel() // kernels.BLOCK
        assert max(grid[1:], default=1) <= 65535
    assert kernels.can_take(y, y)
    assert not kernels.can_take(y.transpose(2, 3), y)
    assert not kernels.can_take(torch.empty(1, 64, 4096, 8192, device='meta'))


def test_torch_merges_where_triton_does_not_run(monkeypatch):
    from timm_weighted_skip import fused_triton

    def fail(*args):
        raise RuntimeError('Failed to find C compiler')

    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(fused_triton, 'check', fail)
    with pytest.warns(UserWarning, match='no Triton kernels on cuda, .*: Failed to find C compiler'):
        assert fused._kernels_of.__wrapped__(torch.device('cuda')) is None


@runs_kernels
def test_a_check_runs_a_kernel(launched, kernels):
    kernels.check(torch.device(DEVICE))
    assert launched == ['skip_relu']


@runs_kernels
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'adaresnet14_cifar'])
def test_whole_nets_train_alike(name, layout, launched, monkeypatch, kernels):
    monkeypatch.setattr(kernels, 'BLOCK', 4096)
    monkeypatch.setattr(kernels, 'SIDE', 64)
    model = randomise(trained_gates(name)).double().to(DEVICE, memory_format=layout).train()
    x = torch.randn(2, 3, 16, 16, device=DEVICE).double().contiguous(memory_format=layout)
    results = []
    for enable in (True, False):
        set_fused_merge(enable)
        net = copy.deepcopy(model)
        net(x).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    set_fused_merge(True)
    assert len(launched) == 6 * (3 if name.startswith('awm') else 2)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * theirs.abs().max().item())


@needs_gpu
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['awm_resnet50', 'adaresnet50'])
def test_a_gpu_trains_and_infers_under_autocast(name, dtype, layout):
    """The fused step's gradients are no further from those in 64 bits than the plain formula's."""
    model = trained_gates(name, layers=(1, 1, 1, 1), num_classes=10).cuda().to(memory_format=layout).train()
    x = torch.randn(8, 3, 96, 96, device='cuda').contiguous(memory_format=layout)

    def step(enable):
        set_fused_merge(enable)
        net = copy.deepcopy(model)
        with torch.autocast('cuda', dtype):
            loss = net(x).float().square().mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for n, p in net.named_parameters() if 'merge' in n]).double()

    exact = copy.deepcopy(model).double()
    exact(x.double()).square().mean().backward()
    exact = torch.cat([p.grad.flatten() for n, p in exact.named_parameters() if 'merge' in n])
    fused_error, plain_error = ((step(enable) - exact).norm() for enable in (True, False))
    set_fused_merge(True)
    assert fused_error <= 1.5 * plain_error + 1e-3 * exact.norm()
    with torch.inference_mode(), torch.autocast('cuda', dtype):
        assert model.eval()(x).isfinite().all()


@needs_gpu
@pytest.mark.parametrize('name', ['awm_resnet50', 'adaresnet50'])
def test_a_gpu_trains_alike_when_compiled(name):
    """As above: the compiled net's gradients are no further from those in 64 bits than the plain formula's, eager."""
    model = trained_gates(name, layers=(1, 1, 1, 1), num_classes=10).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 160, 160, device='cuda').contiguous(memory_format=torch.channels_last)

    def gradients_of(model, x, forward):
        forward(x).float().square().mean().backward()
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if 'merge' in n]).double()

    exact = copy.deepcopy(model.train()).double()
    exact = gradients_of(exact, x.double(), exact)
    errors = []
    for compiled in (True, False):
        set_fused_merge(compiled)
        net = copy.deepcopy(model)
        with torch.autocast('cuda', torch.bfloat16):
            errors.append((gradients_of(net, x, torch.compile(net) if compiled else net) - exact).norm())
    assert errors[0] <= 1.5 * errors[1] + 1e-3 * exact.norm()


@needs_gpu
@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_gpu_keeps_identity_to_the_bit_and_compiles(layout):
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    gated = timm.create_model('awm_resnet50').cuda().eval().to(memory_format=layout)
    model = timm.create_model('awm_resnet50', plain=True).cuda().eval().to(memory_format=layout)
    model.load_state_dict(gated.state_dict(), strict=False)
    x = torch.randn(2, 3, 128, 128, device='cuda').contiguous(memory_format=layout)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(gated(x), expected)
        torch.testing.assert_close(torch.compile(gated)(x), expected, rtol=1e-3, atol=1e-3)


@needs_gpu
def test_a_gpu_without_triton_does_the_same_in_torch(monkeypatch):
    monkeypatch.setattr(fused, '_kernels_of', lambda device: None)
    for name in ('mapping', 'skip', 'fixed'):
        merge, inputs, g = MERGES[name]().cuda(), maps(LAYOUTS[:1] * 2), torch.randn(3, 4, 5, 6, device='cuda').double()
        assert fused.can_fuse(merge, nn.ReLU(), *inputs)
        for ours, theirs in zip(gradients(single, merge, inputs, g), gradients(plain, merge, inputs, g)):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
