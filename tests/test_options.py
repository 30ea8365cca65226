"""The options of a recipe reach what they are for."""

import copy

import pytest
import torch
from test_trainer import make_trainer
from torch.nn.functional import cross_entropy

from timm_weighted_skip.train.batches import mix_seed

pytestmark = pytest.mark.usefixtures('one_thread')


def steps(trainer):
    """A list that grows by the gradients and the rate of each update."""
    taken = []

    def before(optimizer, *_):
        gradients = {name: p.grad.clone() for name, p in trainer.net.named_parameters() if p.grad is not None}
        taken.append((gradients, optimizer.param_groups[0]['lr']))

    trainer.optimizer.register_step_pre_hook(before)
    return taken


def test_an_updates_gradient_and_the_loss_are_means_over_its_batches():
    trainer = make_trainer(alternate_freeze=0, lr=0.0, batch_size=4, grad_accum_steps=3, smoothing=0.2)
    taken, net, recipe = steps(trainer), copy.deepcopy(trainer.net).train(), trainer.recipe
    batches = [*trainer.train_batches.shuffled(recipe.seed, 0)][:6]  # the last two of eight fill no update
    losses = [cross_entropy(net(x), labels, label_smoothing=0.2) for x, labels in batches]
    assert trainer.train_epoch()['loss'] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert all(p.grad is None for p in trainer.net.parameters())
    assert len(taken) == 2
    for (gradients, _), start in zip(taken, (0, 3)):
        expected = torch.autograd.grad(sum(losses[start : start + 3]) / 3, [*net.parameters()])
        for ours, theirs in zip(gradients.values(), expected):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('mode', ['norm', 'value'])
def test_gradients_are_clipped(mode):
    trainer = make_trainer(epochs=2, clip_grad=1e-3, clip_mode=mode)
    taken = steps(trainer)
    for _ in range(2):  # a phase of the backbone and one of the gates
        trainer.train_epoch()
    for gradients, _ in taken:
        values = torch.cat([g.flatten() for g in gradients.values()])
        assert (values.norm() if mode == 'norm' else values.abs().max()).item() == pytest.approx(1e-3, rel=1e-3)


def test_the_rate_moves_at_every_update_where_that_is_asked_for():
    for on_updates, count in ((True, 4), (False, 1)):
        trainer = make_trainer(epochs=2, alternate_freeze=0, sched='cosine', sched_on_updates=on_updates)
        taken = steps(trainer)
        trainer.train_epoch()
        rates = [rate for _, rate in taken]
        assert (len(rates), len(set(rates))) == (4, count)
        assert rates == sorted(rates, reverse=True)


def test_images_are_augmented_for_training_alone():
    for recipe, expected in ((dict(pad_crop=2, hflip=0.3), (2, 0.3)), (dict(pad_crop=2, no_aug=True), (0, 0.0))):
        trainer = make_trainer(**recipe)
        assert (trainer.train_batches.pad_crop, trainer.train_batches.hflip) == expected
        assert (trainer.test_batches.pad_crop, trainer.test_batches.hflip) == (0, 0.0)


def test_the_optimizer_and_the_average_are_as_asked_for():
    assert make_trainer(momentum=0.5).optimizer.param_groups[0]['momentum'] == 0.5
    group = make_trainer(opt='adamw', opt_eps=1e-5, opt_betas=[0.8, 0.95]).optimizer.param_groups[0]
    assert (group['eps'], *group['betas']) == (1e-5, 0.8, 0.95)
    assert make_trainer(model_ema=True, model_ema_decay=0.5).ema.decay == 0.5


@pytest.mark.parametrize('kept', [True, False])
def test_running_statistics_are_kept_in_gate_phases_where_that_is_asked_for(kept):
    trainer = make_trainer(epochs=2, alternate_bn_stats=kept)
    for phase in ('backbone', 'gates'):
        before = trainer.net.bn1.running_mean.clone()
        assert trainer.train_epoch()['phase'] == phase
        assert torch.equal(trainer.net.bn1.running_mean, before) == (kept and phase == 'gates')


def test_no_two_epochs_of_seeds_draw_the_same():
    seeds = {mix_seed(seed, epoch) for seed in range(10) for epoch in range(400)}
    assert len(seeds) == 4000
