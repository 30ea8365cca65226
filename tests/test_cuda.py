"""Training on a GPU: frozen to the bit, resumed to the bit, and compiled, with CUDA graphs too, the same as eager."""

import copy

import pytest
import torch
from test_freezing import groups
from test_trainer import bits, image_set
from torch.profiler import ProfilerActivity, profile

from timm_weighted_skip.train.recipe import Recipe
from timm_weighted_skip.train.trainer import Trainer, make_net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')

COMPILED = [
    dict(torchcompile=False),
    dict(torchcompile=True, torchcompile_mode='default'),
    dict(torchcompile=True),  # by CUDA graphs
]


def make_trainer(**recipe):
    torch.manual_seed(0)
    data = image_set(256, size=16)
    options = dict(epochs=4, batch_size=32, alternate_freeze=1, lr=0.05, weight_decay=1e-3, pad_crop=1)
    return Trainer(make_net('awm_resnet14_cifar', data), Recipe(**{**options, **recipe}), data, data, 'cuda')


@pytest.mark.parametrize('recipe', COMPILED, ids=str)
def test_frozen_group_is_unmoved_by_a_bit_and_the_other_moves(recipe):
    trainer = make_trainer(**recipe)
    assert trainer.amp
    gates, backbone = groups(trainer.net)
    for phase in ('backbone', 'gates', 'backbone', 'gates'):
        before = bits(trainer.net)
        assert trainer.train_epoch()['phase'] == phase
        after = bits(trainer.net)
        moved = {name for name in gates | backbone if after[name] != before[name]}
        assert moved == (gates if phase == 'gates' else backbone)
        assert trainer.evaluate()['loss'] < 10


@pytest.mark.parametrize('recipe', COMPILED, ids=str)
def test_resumed_it_ends_with_the_same_bits(recipe):
    whole = make_trainer(**recipe)
    for _ in range(2):
        whole.train_epoch()
    weights, state = copy.deepcopy((whole.net.state_dict(), whole.state_dict()))
    expected = [whole.train_epoch() for _ in range(2)][-1]

    resumed = make_trainer(**recipe)
    resumed.net.load_state_dict(weights)
    resumed.load_state_dict(state)
    line = [resumed.train_epoch() for _ in range(2)][-1]
    assert (line['loss'], line['top1']) == (expected['loss'], expected['top1'])
    assert bits(resumed.net) == bits(whole.net)


@pytest.mark.parametrize('alternate_freeze', [0, 1])
@pytest.mark.parametrize('recipe', COMPILED[1:], ids=str)
def test_compiled_it_takes_the_steps_of_eager_training(recipe, alternate_freeze):
    trained = []
    for how in (COMPILED[0], recipe):
        trainer = make_trainer(**how, alternate_freeze=alternate_freeze, amp=False, lr=1e-3)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        start = copy.deepcopy(trainer.net.state_dict())
        lines = [trainer.train_epoch() for _ in range(2)]
        moves = {name: p.detach() - start[name] for name, p in trainer.net.named_parameters()}
        trained.append((torch.tensor([line['loss'] for line in lines]), moves))
    (eager_loss, eager), (compiled_loss, compiled) = trained
    torch.testing.assert_close(compiled_loss, eager_loss, rtol=1e-3, atol=0)
    for name, move in eager.items():
        assert (compiled[name] - move).norm() <= 0.05 * move.norm() + 1e-6, name


def test_a_compiled_step_is_two_cuda_graphs():
    trainer = make_trainer(torchcompile=True, alternate_freeze=0)
    trainer.train_epoch()  # which records them
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        trainer.train_epoch()
    launches = {event.key: event.count for event in profiler.key_averages()}['cudaGraphLaunch']
    assert launches == 2 * trainer.updates_per_epoch  # forward and backward
