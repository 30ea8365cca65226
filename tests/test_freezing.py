"""Alternating training: what a phase freezes does not move by a bit, what it trains does."""

import copy
import os
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import set_reentrant_ckpt
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import timm_weighted_skip  # noqa: F401  registers the models
from timm_weighted_skip import AlternateFreezing
from timm_weighted_skip.layers import Gate

SGD = dict(opt='sgd', lr=0.1, momentum=0.9, weight_decay=1e-3)  # timm's 'sgd' is Nesterov's
STEPS = 3  # W2 starts at zero, so W1 has its first gradient in the second step


def make_net(name='awm_resnet14_cifar', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def batches(epoch, steps=STEPS, size=4):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(steps):
        yield torch.randn(size, 3, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator)


def run_epoch(model, optimizer, epoch, bf16=False, clip=None, accumulate=1, ema=None):
    model.train()
    for step, (x, target) in enumerate(batches(epoch, STEPS * accumulate), 1):
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            loss = cross_entropy(model(x), target) / accumulate
        loss.backward()
        if step % accumulate:
            continue
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update(model, step)


def bits(net):
    """Name -> the bytes of every parameter."""
    return {name: p.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, p in net.named_parameters()}


def groups(net):
    gates = {f'{name}.{n}' for name, m in net.named_modules() if isinstance(m, Gate) for n, _ in m.named_parameters()}
    return gates, {name for name, _ in net.named_parameters()} - gates


def assert_alternates(net, model, optimizer, freezing, epochs, **kwargs):
    """Train `model`, which wraps `net`, and hold every epoch's moved parameters against its phase."""
    gates, backbone = groups(net)
    for epoch in epochs:
        before = bits(net)
        phase = freezing(model, epoch)
        run_epoch(model, optimizer, epoch, **kwargs)
        after = bits(net)
        assert {name for name in after if after[name] != before[name]} == (gates if phase == 'gates' else backbone)


@pytest.mark.parametrize(
    'opt', [SGD, dict(opt='adamw', lr=1e-2, weight_decay=0.1), dict(opt='muon', lr=1e-2, weight_decay=0.1)], ids=str
)
def test_frozen_group_is_unmoved_by_a_bit_and_the_other_moves(opt):
    net = make_net()
    assert_alternates(net, net, create_optimizer_v2(net, **opt), AlternateFreezing(1), range(4))


@pytest.mark.parametrize('kwargs', [dict(bf16=True), dict(clip=0.1), dict(accumulate=2)], ids=str)
def test_under_the_usual_training_options(kwargs):
    net = make_net()
    assert_alternates(net, net, create_optimizer_v2(net, **SGD), AlternateFreezing(1), range(3), **kwargs)


def test_gradients_that_are_kept_as_zeros_do_not_hinder():
    net = make_net()
    optimizer = create_optimizer_v2(net, **SGD)
    zero_grad = optimizer.zero_grad
    optimizer.zero_grad = lambda: zero_grad(set_to_none=False)
    assert_alternates(net, net, optimizer, AlternateFreezing(1), range(3))


def test_under_checkpointing():
    net = make_net()
    net.set_grad_checkpointing()
    assert_alternates(net, net, create_optimizer_v2(net, **SGD), AlternateFreezing(1), range(3))


def test_under_compile():
    net, compiled, aot_eager = make_net(layers=(1, 1, 1)), [], torch._dynamo.lookup_backend('aot_eager')
    model = torch.compile(net, backend=lambda graph, inputs: compiled.append(graph) or aot_eager(graph, inputs))
    assert_alternates(net, model, create_optimizer_v2(net, **SGD), AlternateFreezing(1), range(4))
    assert len(compiled) == 2  # once for each phase


def test_on_a_densenet():
    net = make_net('awm_densenet22_bc_cifar')
    assert_alternates(net, net, create_optimizer_v2(net, **SGD), AlternateFreezing(1), range(2))


def test_average_of_a_frozen_group_stays_where_it_is():
    net = make_net()
    gates, _ = groups(net)
    ema = ModelEmaV3(net, decay=0.9)
    before = bits(ema.module)
    assert_alternates(net, net, create_optimizer_v2(net, **SGD), AlternateFreezing(1), range(1), ema=ema)
    after = bits(ema.module)
    assert {name for name in gates if after[name] != before[name]} == set()


@pytest.mark.parametrize('freeze', ['strict', 'released'])
@pytest.mark.parametrize('stop', range(1, 5))
def test_resuming_at_any_epoch_of_a_cycle_changes_nothing(stop, freeze):
    def start():
        net = make_net()
        return net, create_optimizer_v2(net, **SGD), AlternateFreezing(2, freeze=freeze)

    def train(net, optimizer, freezing, epochs):
        for epoch in epochs:
            freezing(net, epoch)
            run_epoch(net, optimizer, epoch)

    whole, optimizer, freezing = start()
    train(whole, optimizer, freezing, range(stop))
    state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, freezing, range(stop, 5))

    resumed, optimizer, freezing = start()
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(resumed, optimizer, freezing, range(stop, 5))
    assert bits(resumed) == bits(whole)


def test_what_the_user_froze_stays_frozen():
    net = make_net()
    net.conv1.requires_grad_(False)
    net.layer1[0].merge.gate.requires_grad_(False)
    freezing = AlternateFreezing(1)
    for epoch in range(3):
        freezing(net, epoch)
        assert not net.conv1.weight.requires_grad
        assert not net.layer1[0].merge.gate.fc1.weight.requires_grad
        assert net.layer1[1].merge.gate.fc1.weight.requires_grad == (epoch == 1)


def test_what_the_user_freezes_and_thaws_between_epochs_is_heeded():
    net, freezing = make_net(), AlternateFreezing(1)
    freezing(net, 0)
    net.conv1.requires_grad_(False)
    gates = net.layer1[0].merge.gate.requires_grad_(False)  # as it is in this phase anyway
    for epoch in range(1, 3):
        freezing(net, epoch)
        assert not net.conv1.weight.requires_grad
        assert gates.fc1.weight.requires_grad == (epoch == 1)
    freezing(net, 3)
    gates.requires_grad_(False)
    freezing(net, 4)
    net.conv1.requires_grad_(True)
    freezing(net, 5)
    assert not net.conv1.weight.requires_grad  # which rests like the rest of the backbone
    assert not gates.fc1.weight.requires_grad
    freezing.release(net)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == [
        f'layer1.0.merge.gate.{name}' for name, _ in gates.named_parameters()
    ]


@pytest.mark.parametrize('restore', [lambda f, m: f.release(m), lambda _, m: AlternateFreezing(0)(m, 0)])
def test_a_net_is_released_as_it_was(restore):
    model = make_net()
    model.conv1.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    freezing = AlternateFreezing(1, freeze_bn_stats=True)
    assert freezing(model, 1) == 'gates'
    restore(freezing, model)
    assert [p.requires_grad for p in model.parameters()] == before
    mean = model.bn1.running_mean.clone()
    run_epoch(model, create_optimizer_v2(model, **SGD), 0)
    assert not torch.equal(model.bn1.running_mean, mean)
    model.fc.weight.requires_grad_(False)  # what is frozen from now on is noted anew
    freezing(model, 0)
    assert not model.fc.weight.requires_grad


def test_a_frozen_net_can_be_scripted():
    model = make_net().eval()
    x = torch.randn(2, 3, 8, 8)
    AlternateFreezing(1)(model, 1)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize('copied', [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_another_schedule_goes_on_with_a_frozen_net(copied):
    model = make_net()
    assert AlternateFreezing(1, freeze_bn_stats=True)(model, 1) == 'gates'
    model = copied(model)
    other = AlternateFreezing(1)
    for epoch in (0, 1):
        other(model, epoch)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == groups(model)[1 - epoch]
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    'replace',
    [
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
        lambda m: m.reset_classifier(7),
    ],
    ids=['weights', 'head'],
)
def test_parameters_that_take_the_place_of_others_are_frozen_like_them(replace):
    model, freezing = make_net(), AlternateFreezing(1)
    freezing(model, 0)
    replace(model)
    for epoch in (1, 2):
        freezing(model, epoch)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == groups(model)[1 - epoch % 2]


def test_released_rule_trains_biases_in_both_phases():
    net = make_net()
    gates, backbone = groups(net)
    optimizer, freezing = create_optimizer_v2(net, **SGD), AlternateFreezing(1, freeze='released')
    for epoch, moving in enumerate((backbone, gates | {name for name in backbone if name.endswith('bias')})):
        before = bits(net)
        freezing(net, epoch)
        run_epoch(net, optimizer, epoch)
        after = bits(net)
        assert {name for name in after if after[name] != before[name]} == moving


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_bc_cifar'])
@pytest.mark.parametrize('frozen', [False, True])
def test_running_statistics_of_a_gate_phase(frozen, name):
    net = make_net(name)
    optimizer, freezing = create_optimizer_v2(net, **SGD), AlternateFreezing(1, freeze_bn_stats=frozen)
    for epoch in range(3):
        before = {name: b.clone() for name, b in net.named_buffers()}
        phase = freezing(net, epoch)
        run_epoch(net, optimizer, epoch)
        unmoved = {name for name, b in net.named_buffers() if torch.equal(b, before[name])}
        assert unmoved == (set(before) if frozen and phase == 'gates' else set())


def test_a_gate_phase_normalises_by_batch_whether_or_not_it_keeps_the_statistics():
    x, _ = next(batches(0))
    outputs = []
    for frozen in (False, True):
        net = make_net()
        AlternateFreezing(1, freeze_bn_stats=frozen)(net, 1)
        outputs.append(net.train()(x))
    assert torch.equal(*outputs)


def test_period_0_trains_both_together_on_any_net():
    freezing = AlternateFreezing(0)
    for name in ('awm_resnet14_cifar', 'resnet14_cifar'):
        net = make_net(name)
        before = bits(net)
        assert freezing(net, 5) == 'joint'
        run_epoch(net, create_optimizer_v2(net, **SGD), 0)
        assert all(value != before[name] for name, value in bits(net).items())


def test_phases_and_epochs_of_a_schedule():
    total, extra = AlternateFreezing(3), AlternateFreezing(3, count='extra')
    assert [total.phase(e)[0] for e in range(8)] == list('bbbgggbb')
    assert (total.total_epochs(350), total.schedule_epoch(100)) == (350, 100)
    phases = [extra.phase(e) for e in range(extra.total_epochs(350))]
    assert (phases.count('backbone'), phases.count('gates')) == (350, 348)  # the released code's
    for phase in ('backbone', 'gates'):
        epochs = [extra.schedule_epoch(e) for e, p in enumerate(phases) if p == phase]
        assert epochs == list(range(len(epochs)))


def test_gates_at_their_start_are_half_to_the_bit_in_the_first_backbone_phase():
    net, plain = make_net(), make_net(plain=True)
    plain.load_state_dict({name: v for name, v in net.state_dict().items() if '.gate.' not in name})
    freezing = AlternateFreezing(1)
    freezing(net, 0)
    for model in (net, plain):
        run_epoch(model, create_optimizer_v2(model, **SGD), 0)
    assert all(bits(net)[name] == value for name, value in bits(plain).items())


@pytest.mark.parametrize('by_stage', [False, True])
def test_fully_sharded_nets_train_what_a_phase_says(tmp_path, by_stage):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        net = make_net(layers=(1, 1, 1))
        mesh = dist.device_mesh.init_device_mesh('cpu', (1,))
        for part in [net.layer1, net.layer2, net.layer3] * by_stage + [net]:
            fully_shard(part, mesh=mesh)
        optimizer, freezing = create_optimizer_v2(net, **SGD), AlternateFreezing(1)

        def values():
            return {name: parameter.full_tensor().clone() for name, parameter in net.named_parameters()}

        for epoch in range(3):
            phase, before = freezing(net, epoch), values()
            run_epoch(net, optimizer, epoch)
            moved = {name for name, value in values().items() if not torch.equal(value, before[name])}
            assert moved == groups(net)[phase == 'backbone']
            with torch.no_grad():
                net.eval()(torch.randn(2, 3, 8, 8))  # after which FSDP2 shows what it gathered
        freezing.release(net)
        assert all(parameter.requires_grad for parameter in net.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('period', [-1, 1.5, True, '3', None])
def test_period_is_a_number_of_epochs(period):
    with pytest.raises(ValueError, match=r'period=.* is not allowed; give a whole number of 0 or more'):
        AlternateFreezing(period)


def test_a_scripted_net_is_refused_for_what_it_is():
    with pytest.raises(ValueError, match='a scripted net can not be trained in phases; leave out --torchscript'):
        AlternateFreezing(1)(torch.jit.script(make_net()), 0)


@pytest.mark.parametrize('kwargs', [dict(count='both'), dict(freeze='all')])
def test_unknown_choices_are_refused(kwargs):
    with pytest.raises(ValueError, match='choose one of'):
        AlternateFreezing(3, **kwargs)


@pytest.mark.parametrize('name', ['resnet14_cifar', 'adaresnet14_cifar', 'awm_resnet14_cifar'])
def test_a_net_without_gates_is_refused(name):
    net = make_net(name, **(dict(plain=True) if name.startswith('awm') else {}))
    with pytest.raises(ValueError, match=r'no gates .* awm_'):
        AlternateFreezing(3)(net, 0)


def test_reentrant_checkpointing_is_refused():
    net = make_net()
    set_reentrant_ckpt(True)
    try:
        AlternateFreezing(3)(net, 0)  # nothing is checkpointed yet
        net = make_net()
        net.set_grad_checkpointing()
        with pytest.raises(ValueError, match='TIMM_REENTRANT_CKPT'):
            AlternateFreezing(3)(net, 0)
    finally:
        set_reentrant_ckpt(False)


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    net = make_net()
    waiting = nn.parallel.DistributedDataParallel(net)
    static = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True, static_graph=True)
    for model in (waiting, static, torch.compile(waiting)):
        with pytest.raises(ValueError, match='find_unused_parameters=True and without static_graph'):
            AlternateFreezing(1)(model, 0)
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer, freezing = create_optimizer_v2(net, **SGD), AlternateFreezing(1)
    for epoch in range(3):
        before = bits(net)
        phase = freezing(model, epoch)
        run_epoch(model, optimizer, 2 * epoch + rank)  # each rank has its own images
        torch.save((phase, before, bits(net)), os.path.join(folder, f'{rank}-{epoch}.pt'))
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can keep a finished process waiting


def test_two_processes_stay_equal_to_the_bit(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    gates, backbone = groups(make_net())
    for epoch in range(3):
        (phase, before, after), other = (torch.load(tmp_path / f'{r}-{epoch}.pt', weights_only=True) for r in (0, 1))
        assert other == (phase, before, after)
        moved = {name for name in after if after[name] != before[name]}
        assert moved == (gates if phase == 'gates' else backbone)
