"""The in-memory trainer: phases, schedules, stops between any two updates, its files, its refusals."""

import contextlib
import json
import os
import shlex

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from test_freezing import groups
from training import train_args

from timm_weighted_skip.analysis.units import mapping_units
from timm_weighted_skip.cli import build_parser, main
from timm_weighted_skip.data import ImageSet, load_image_set
from timm_weighted_skip.models.pretrained import checkpoint_root
from timm_weighted_skip.train import checkpoint as checkpoints
from timm_weighted_skip.train.evaluate import evaluate
from timm_weighted_skip.train.recipe import Recipe, list_recipes, load_recipe
from timm_weighted_skip.train.runs import run_seeds
from timm_weighted_skip.train.task import Task, command_of, task_of
from timm_weighted_skip.train.trainer import EpochStopped, Trainer, make_net

pytestmark = pytest.mark.usefixtures('one_thread')

BASE = dict(epochs=4, batch_size=8, alternate_freeze=1, lr=0.05, weight_decay=1e-3, pad_crop=1, torchcompile=False)


def image_set(count=32, size=8):
    rng = np.random.default_rng(0)
    labels = torch.arange(count) % 4
    images = rng.integers(100, size=(count, size, size, 3)) + 50 * labels.numpy()[:, None, None, None]
    return ImageSet(torch.from_numpy(images.astype(np.uint8)), labels, tuple('abcd'))


def make_trainer(model='awm_resnet14_cifar', **recipe):
    torch.manual_seed(0)
    data = image_set()
    recipe = Recipe(**{**BASE, **recipe})
    return Trainer(make_net(model, data, **recipe.model_kwargs), recipe, data, data)


def bits(net):
    state = net.state_dict()
    return {name: t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in state.items()}


@pytest.mark.parametrize(
    'recipe',
    [
        dict(),
        dict(opt='adamw', lr=1e-3),
        dict(opt='muon', lr=1e-2),
        dict(amp=True),
        dict(clip_grad=0.5),
        dict(grad_accum_steps=2, epochs=3, batch_size=4),
        dict(model_ema=True, model_ema_decay=0.5),
        dict(grad_checkpointing=True),
        dict(channels_last=False, sched_on_updates=True),
    ],
    ids=str,
)
def test_frozen_group_is_unmoved_by_a_bit_and_the_other_moves(recipe):
    trainer = make_trainer(**recipe)
    gates, backbone = groups(trainer.net)
    for phase in ('backbone', 'gates', 'backbone'):
        before = bits(trainer.net)
        assert trainer.train_epoch()['phase'] == phase
        after = bits(trainer.net)
        moved = {name for name in gates | backbone if after[name] != before[name]}
        assert moved == (gates if phase == 'gates' else backbone)


def test_released_rule_trains_by_the_papers_recipe():
    # It decays everything, so that gates and biases are in one group of the optimizer.
    recipe = {**vars(load_recipe('awm_cifar_short')), 'batch_size': 8, 'torchcompile': False, 'alternate_freeze': 1}
    trainer = make_trainer(**{**recipe, 'alternate_rule': 'released'})
    gates, backbone = groups(trainer.net)
    trainer.train_epoch()
    before = bits(trainer.net)
    assert trainer.train_epoch()['phase'] == 'gates'
    after = bits(trainer.net)
    moved = {name for name in gates | backbone if after[name] != before[name]}
    assert moved == gates | {name for name in backbone if name.endswith('bias')}


def test_learns_what_can_be_learnt():
    trainer = make_trainer(epochs=12, alternate_freeze=3, smoothing=0.0)
    while trainer.position.epoch < trainer.epochs:
        trainer.train_epoch()
    assert trainer.evaluate()['top1'] > 90  # the labels' brightness tells them apart


def test_a_net_trained_in_16_bits_is_measured_in_its_own_32():
    trainer = make_trainer(amp=True)
    trainer.train_epoch()
    own, rounded = (evaluate(trainer.net, trainer.test_batches, amp) for amp in (False, True))
    assert trainer.evaluate() == own
    assert own['loss'] != rounded['loss']


def test_no_gate_shuts_before_its_branch_has_learned():
    digits = load_image_set('digits', train=True)
    recipe = Recipe(epochs=3, alternate_freeze=0, weight_decay=1e-4, smoothing=0.0, no_aug=True)
    torch.manual_seed(0)
    trainer = Trainer(make_net('awm_resnet14_cifar', digits), recipe, digits, digits)
    for _ in range(trainer.epochs):
        trainer.train_epoch()
    images, _ = next(trainer.test_batches.in_order())
    units = mapping_units(trainer.net.eval(), images)
    assert min(unit.weight[:, 0].mean().item() for unit in units) > 0.4


def test_accuracy_of_an_epoch_is_that_of_the_images_as_they_were_seen():
    trainer = make_trainer(batch_size=32, no_aug=True)  # one batch: no update comes before it
    (x, labels), *_ = trainer.test_batches.in_order()
    expected = (trainer.net.train()(x).argmax(1) == labels).double().mean().item()
    assert trainer.train_epoch()['top1'] == pytest.approx(100 * expected)


def test_gate_epochs_on_top_take_the_schedules_rates_twice():
    trainer = make_trainer(
        epochs=4, alternate_freeze=2, alternate_count='extra', sched='multistep', decay_milestones=[3]
    )
    assert trainer.epochs == 8
    lines = [trainer.train_epoch() for _ in range(8)]
    assert [round(line['lr'], 6) for line in lines] == [0.05] * 4 + [0.005] * 4
    assert [line['phase'][0] for line in lines] == list('bbggbbgg')


def test_recipes_drop_the_rate_where_the_papers_do():
    for name, drops in (('awm_cifar', (150, 250)), ('awm_densenet_cifar', (150, 225)), ('adaresnet_cifar', (150, 250))):
        trainer = make_trainer(**{**vars(load_recipe(name)), 'batch_size': 8, 'torchcompile': False, 'pad_crop': 1})
        rates = []
        for epoch in range(trainer.epochs):
            trainer._set_rate(epoch, 0)
            rates.append(round(trainer.optimizer.param_groups[0]['lr'], 8))
        assert tuple(i for i in range(1, len(rates)) if rates[i] != rates[i - 1]) == drops


def test_weight_decay_of_the_recipes():
    awm = make_trainer(**{**vars(load_recipe('awm_cifar_short')), 'batch_size': 8, 'torchcompile': False})
    assert {group['weight_decay'] for group in awm.optimizer.param_groups} == {1e-4}
    ada = make_trainer(
        'adaresnet14_cifar', **{**vars(load_recipe('adaresnet_cifar')), 'batch_size': 8, 'torchcompile': False}
    )
    scalars = {p for p in ada.net.parameters() if p.ndim == 0}
    assert len(scalars) == 6
    for group in ada.optimizer.param_groups:
        assert group['weight_decay'] == 0 or not scalars & set(group['params'])


@pytest.mark.parametrize('recipe', [dict(), dict(model_ema=True, model_kwargs=dict(drop_path_rate=0.2))], ids=str)
def test_stopped_between_any_two_updates_and_resumed_it_ends_with_the_same_bits(tmp_path, recipe):
    recipe = {**recipe, 'epochs': 2}
    whole = make_trainer(**recipe)
    expected = [whole.train_epoch() for _ in range(2)][-1]
    for stop in range(1, 9):
        first = make_trainer(**recipe)

        with contextlib.suppress(EpochStopped):
            for _ in range(2):
                first.train_epoch(stopped=lambda first=first, stop=stop: first.position.updates == stop)
        assert first.position.updates == stop
        folder = tmp_path / str(stop)
        folder.mkdir()
        weights = {'': first.net.state_dict(), **({'ema': first.ema.module.state_dict()} if first.ema else {})}
        checkpoints.save_checkpoint(folder, weights, first.state_dict(), {})

        torch.manual_seed(stop)  # a new process is anywhere in its random numbers
        resumed = make_trainer(**recipe)
        weights, state = checkpoints.read_checkpoint(folder, list(weights))
        resumed.net.load_state_dict(weights[''])
        if resumed.ema:
            resumed.ema.module.load_state_dict(weights['ema'])
        resumed.load_state_dict(state)
        while resumed.position.epoch < 2:
            line = resumed.train_epoch()
        assert (line['loss'], line['top1']) == (expected['loss'], expected['top1'])
        assert bits(resumed.net) == bits(whole.net)
        assert bits(resumed.eval_net) == bits(whole.eval_net)


def test_a_start_that_was_refused_leaves_its_folder_free(tmp_path, capsys):
    assert main(train_args(tmp_path, '--batch-size', '2000')) == 1
    assert main(train_args(tmp_path, '--epochs', '1')) == 0
    assert main(train_args(tmp_path, '--epochs', '1')) == 1
    assert 'holds a run' in capsys.readouterr().err


def test_a_run_remembers_where_its_data_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = ['--model', 'awm_resnet20_cifar', '--data', 'folder', '--data-dir', 'pictures']
    task, _, _ = task_of(build_parser().parse_args(['train', *source]))
    assert task.data_dir == str(tmp_path / 'pictures')


def test_files_of_a_run_and_its_evaluation(tmp_path, capsys):
    arguments = train_args(tmp_path, '--seeds', '0', '1', '--epochs', '2', '--model-ema', '--model-ema-decay', '0.5')
    assert main(arguments) == 0
    summary = json.loads((tmp_path / 'run' / 'result.json').read_text())
    accuracies = summary['last']['top1']
    assert summary['last']['mean'] == pytest.approx(np.mean(accuracies))
    assert summary['last']['std'] == pytest.approx(np.std(accuracies, ddof=1))
    folder = tmp_path / 'run' / 'seed1'
    result = json.loads((folder / 'result.json').read_text())
    assert result['recipe']['seed'] == 1
    assert len(result['mapping_units']) == 6
    assert all(sum(unit['mean']) == pytest.approx(1) for unit in result['mapping_units'].values())
    capsys.readouterr()
    for target in (folder, folder / 'last.safetensors'):
        assert main(['eval', str(target), '--data', 'digits']) == 0
        assert json.loads(capsys.readouterr().out)['top1'] == pytest.approx(result['last']['top1'])
    assert main(arguments) == 1  # the folder is taken
    assert '--resume' in capsys.readouterr().err
    assert main(['train', '--resume', str(tmp_path / 'run')]) == 0  # finished: nothing to do
    with FileLock(tmp_path / 'run' / '.lock'):  # as another process has it that trains there
        assert main(['train', '--resume', str(tmp_path / 'run')]) == 1
    assert 'another process is training in' in capsys.readouterr().err


def test_a_checkpoint_by_its_tag_has_the_accuracy_of_its_card(capsys):
    assert main(['eval', 'awm_resnet14_cifar.digits', '--data', 'digits']) == 0
    card = json.loads((checkpoint_root() / 'awm_resnet14_cifar.digits' / 'config.json').read_text())
    measured = json.loads(capsys.readouterr().out)['top1']
    assert measured == pytest.approx(card['results']['top1'][0], abs=0.05)
    for target, why in (
        ('awm_resnet14_cifar.none', "has no checkpoint 'none'; it has cifar10, cifar100, digits"),
        ('awm_resnet110_cifar', 'has no published weights'),
        ('nowhere/last.safetensors', 'no file or folder nowhere/last.safetensors'),
    ):
        assert main(['eval', target, '--data', 'digits']) == 1
        assert why in capsys.readouterr().err


@pytest.mark.parametrize(('model', 'units'), [('resnet14_cifar', 0), ('adaresnet14_cifar', 6)])
def test_nets_without_gates_are_trained_too(tmp_path, model, units):
    assert main(train_args(tmp_path, '--model', model, '--alternate-freeze', '0', '--epochs', '1')) == 0
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert len(result['mapping_units'] or ()) == units


def test_torchcompile_without_a_compiler_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PATH', '/nonexistent')
    monkeypatch.delenv('CXX', raising=False)
    assert main(train_args(tmp_path, '--torchcompile')) == 1
    assert 'torchcompile needs a C++ compiler' in capsys.readouterr().err


def test_a_mode_asks_for_compiling():
    with pytest.raises(ValueError, match="torchcompile_mode='none'"):
        make_trainer(torchcompile=None, torchcompile_mode='none')


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--alternate-freeze', '-1'], 'alternate_freeze=-1'),
        (['--model', 'resnet14_cifar'], 'no gates'),
        (['--model', 'resnet14_cifar', '--epochs', '1', '--alternate-freeze', '1'], 'no gates'),
        (['--model', os.path.dirname(__file__)], 'is a folder; give local-dir:'),
        (['--model', 'awm_resnet15_cifar'], 'awm_resnet15_cifar'),
        (['--model', 'awm_resnet18'], "model 'awm_resnet18': input of 8x8 pixels is too small"),
        (['--model', 'vit_tiny_patch16_224'], "doesn't match model (224)"),
        (['--model-kwargs', 'num_classes=3'], 'num_classes of the data is 10'),
        (['--opt', 'sdg'], "optimizer 'sdg'"),
        (['--opt', 'adahessian'], "optimizer 'adahessian': it takes second derivatives"),
        (['--sched', 'sawtooth'], 'sawtooth'),
        (['--recipe', 'awm_cifra'], 'awm_cifar'),
        (['--recipe', 'awm_imagenet'], 'timm_weighted_skip.train -c'),
        (['--recipe', 'awm_imagenet'], 'is no argument of this trainer; a recipe for'),
        (['--batch-size', '2000'], 'smaller --batch-size'),
        (['--data', 'cifar10'], '--data-dir'),
        (['--lr', 'nan'], 'lr=nan'),
        (['--device', 'abacus'], "device 'abacus'"),
        (['--seeds', '1', '0', '--seed', '3'], '--seed 3 with --seeds'),
        (['--seeds', '1', '0', '1'], '--seeds has 1 more than once'),
        (['--seeds', '1', '4294967296'], 'seed=4294967296 is not allowed'),
        (['--grad-accum-steps', '99'], 'more than an epoch of 22 batches'),
        (['--batch-size', '2000', '--sched-on-updates'], 'a batch of 2000 from 1437 images; give a smaller'),
        (['--opt', 'adamw', '--opt-betas', '0.9'], 'opt_betas=[0.9] is not allowed; give two or more'),
        (['--clip-grad', '-1'], 'clip_grad=-1.0 is not allowed; give a number above 0'),
        (['--sched', 'step', '--decay-epochs', '0'], 'decay_epochs=0.0 is not allowed'),
        (['--model-ema-decay', '2'], 'model_ema_decay=2.0 is not allowed; give a number from 0 to 1'),
        (['--smoothing', '1'], 'smoothing=1.0 is not allowed; give a number of 0 or more, below 1'),
        (['--std', '0'], 'the pixel deviations are [0.0]; give --std with numbers above 0'),
        (['--model-kwargs', 'pretrained=True'], 'give --pretrained instead'),
        (['--model-kwargs', 'hidden=1j'], 'an argument is of a kind that args.yaml can not hold'),
        (['--experiment', __file__], 'test_trainer.py is a file; give the name of a folder'),
        (['--resume', ''], '--resume goes on as the run was started; give no --'),
        (['--opt-kwargs', 'foreach=True', 'fused=True'], "optimizer 'sgd'"),
        (['--model-kwargs', 'features_only=True'], 'does not give one number per class; train the whole net'),
        (['--model-kwargs', 'layers=(1,1)'], 'a CIFAR ResNet has three stages'),
        (['--model', 'awm_resnet18', '--model-kwargs', 'layers=(1,)'], "model 'awm_resnet18'"),
        (['--torchcompile', '--torchcompile-mode', 'none'], "torchcompile_mode='none'"),
        (
            ['--model', 'selecsls42', '--alternate-freeze', '0', '--grad-checkpointing'],
            'grad_checkpointing: gradient checkpointing not supported; leave it out',
        ),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_bad_input_is_one_line_and_an_exit_status(tmp_path, capsys, more, message):
    assert main(train_args(tmp_path, *more)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


def test_two_seeds_differ_and_one_seed_repeats(tmp_path):
    task = Task('awm_resnet14_cifar', 'digits', recipe=Recipe(**{**BASE, 'epochs': 1, 'batch_size': 64}))
    nets = [
        (run_seeds(task, tmp_path / f'{i}', [seed]), load_file(tmp_path / f'{i}' / 'last.safetensors'))[1]
        for i, seed in enumerate((3, 3, 4))
    ]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert not torch.equal(nets[0]['conv1.weight'], nets[2]['conv1.weight'])


@pytest.mark.parametrize('name', [*sorted(set(list_recipes()) - {'awm_imagenet'}), None])
def test_the_command_of_a_run_asks_for_it(tmp_path, name):
    given = ['--epochs', '7', '--no-amp', '--no-aug', '--mean', '0.5', '--model-kwargs', 'hidden=8', 'sharing=kind']
    if name is None:  # a file of one's own is told field by field, whatever it is called
        path = tmp_path / 'awm_cifar.yaml'
        path.write_text(yaml.safe_dump({'lr': 0.3, 'opt_betas': [0.8, 0.9], 'decay_milestones': [3, 5]}))
    source = ['--model', 'awm_resnet14_cifar', '--data', 'digits', '--pretrained', '--recipe', name or str(path)]
    task, seeds, _ = task_of(build_parser().parse_args(['train', *source, *given, '--seed', '3']))
    command = shlex.split(command_of(task))
    again, same_seeds, _ = task_of(build_parser().parse_args(command[1:]))
    assert (again.model, again.data, again.recipe, same_seeds) == (task.model, task.data, task.recipe, seeds)
    assert (again.recipe_name, again.pretrained) == (name, True)
