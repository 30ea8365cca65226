"""The analysis verbs of the command line, from a checkpoint on disk to files, on scikit-learn's digits."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from timm_weighted_skip.analysis import tables
from timm_weighted_skip.cli import main
from timm_weighted_skip.layers import Gate
from timm_weighted_skip.nets import Trained


def make_net(name='awm_resnet14_cifar', seed=0, **kwargs):
    torch.manual_seed(seed)
    net = timm.create_model(name, in_chans=1, **kwargs)
    for module in net.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module.fc2.weight)
    return net


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A checkpoint folder as timm saves it."""
    path = tmp_path_factory.mktemp('checkpoint')
    cfg = {'input_size': (1, 8, 8), 'mean': (0.3,), 'std': (0.4,)}
    save_for_hf(make_net(pretrained_cfg_overlay=cfg), str(path), model_args={'in_chans': 1}, safe_serialization=True)
    return path


def run_folder(path, net, name):
    """A run's weights, which say what they are of."""
    path.mkdir()
    about = Trained(name, {}, [*'0123456789'], [1, 8, 8], [0.3], [0.4])
    save_file(net.state_dict(), path / 'last.safetensors', about.metadata())
    (path / 'log.jsonl').write_text('{"epoch": 0, "phase": "gates", "loss": 1, "test_loss": 1, "test_top1": 9}\n')
    (path / 'result.json').write_text(json.dumps({'model': name, 'recipe': {'lr': 0.1}}))
    return path


def rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_inspect_writes_what_it_prints(folder, tmp_path, capsys):
    assert main(['inspect', str(folder), '--data', 'digits', '--per-class', '--output', str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    table = rows(tmp_path / 'weights.csv')
    assert [row['unit'] for row in table] == [f'layer{s}.{b}' for s in (1, 2, 3) for b in (0, 1)]
    assert all(f'{float(row["mean"]):.4f}' in printed for row in table)
    about = json.loads((tmp_path / 'weights.json').read_text())['about']
    assert about['images'] == 360
    by_class = rows(tmp_path / 'classes.csv')
    of_unit = [row for row in by_class if row['unit'] == 'layer3.1']
    mean = sum(float(row['mean']) * int(row['images']) for row in of_unit) / 360
    assert mean == pytest.approx(float(table[5]['mean']), abs=1e-5)


def test_a_run_gives_the_weights_of_the_same_net_in_a_checkpoint_folder(folder, tmp_path):
    run = run_folder(tmp_path / 'run', make_net(), 'awm_resnet14_cifar')
    for source, out in ((folder, 'a'), (run, 'b'), (run / 'last.safetensors', 'c')):
        assert main(['inspect', str(source), '--data', 'digits', '--output', str(tmp_path / out)]) == 0
    assert rows(tmp_path / 'a' / 'weights.csv') == rows(tmp_path / 'b' / 'weights.csv')
    assert rows(tmp_path / 'a' / 'weights.csv') == rows(tmp_path / 'c' / 'weights.csv')


def test_rounds_and_variance_from_files_and_runs(tmp_path, capsys):
    files, weights, layers = [], [], [(s, b) for s in (1, 2, 3) for b in (0, 1)]
    for seed in range(4):
        net = make_net('adaresnet14_cifar', seed, skip_init='normal')
        files.append(str(tmp_path / f'{seed}.safetensors'))
        save_file(net.state_dict(), files[-1])
        weights.append([float(net.get_submodule(f'layer{s}.{b}').merge.weight.detach()) for s, b in layers])
    net_of = ['adaresnet14_cifar', '--model-kwargs', 'in_chans=1']
    assert main(['inspect', *net_of, '--checkpoint', *files, '--output', str(tmp_path)]) == 0
    table = rows(tmp_path / 'weights.csv')
    np.testing.assert_allclose([[float(row[f'round_{r}']) for row in table] for r in range(1, 5)], weights)
    groups = ['--group', 'a', *files[:2], '--group', 'b', *files[2:]]
    assert main(['variance', *groups, '--model', *net_of, '--output', str(tmp_path)]) == 0
    w = np.abs(np.array(weights).reshape(2, 2, 6))
    value = {row['of']: float(row['value']) for row in rows(tmp_path / 'variance.csv')}
    assert value['a'] == pytest.approx(w[0].var(0).mean())
    assert value['a, b'] == pytest.approx(w.mean(1).var(0).mean())
    runs = [run_folder(tmp_path / f'run{i}', make_net('adaresnet14_cifar', i), 'adaresnet14_cifar') for i in range(2)]
    capsys.readouterr()
    assert main(['inspect', *map(str, runs)]) == 0
    assert f'round 2: {runs[1]}' in capsys.readouterr().out.splitlines()


def test_extremes_and_discriminate(folder, tmp_path):
    for verb in ('extremes', 'discriminate'):
        assert main([verb, str(folder), '--data', 'digits', '--output', str(tmp_path)]) == 0
    sums = [float(row['lam1 sum']) for row in rows(tmp_path / 'extremes.csv')]
    assert len(sums) == 32
    assert sums[:16] == sorted(sums[:16])
    assert sums[16:] == sorted(sums[16:], reverse=True)
    assert sums[15] < sums[31]
    rate = {(row['vector'], int(row['rank'])): float(row['rate (%)']) for row in rows(tmp_path / 'discriminate.csv')}
    about = json.loads((tmp_path / 'discriminate.json').read_text())['about']
    assert (about['training images'], about['test images']) == (1437, 360)
    assert rate['pixels', 1] > 80  # the digits are easy
    assert {name for name, _ in rate} == {'weights', 'random gates', 'features', 'pixels'}
    assert all(rate[name, k] <= rate[name, k + 1] for name, k in rate if k < 10)
    drawn = [float(row['rank 1 (%)']) for row in rows(tmp_path / 'discriminate_draws.csv')]
    assert len({*drawn}) > 1
    assert rate['random gates', 1] == pytest.approx(np.mean(drawn))


def test_report_of_a_run(tmp_path):
    run = run_folder(tmp_path / 'run', make_net(), 'awm_resnet14_cifar')
    out = tmp_path / 'report.html'
    assert main(['report', str(run), '--data', 'digits', '--output', str(out)]) == 0
    page = out.read_text()
    assert all(f'>{heading}</h2>' in page for heading in ('Model', 'Run', 'Curves', 'Weights', 'Extremes'))
    assert page.count('src="data:image/') == 4
    assert main(['report', 'adaresnet14_cifar', '--output', str(out)]) == 0
    other = run_folder(tmp_path / 'other', make_net(seed=1), 'awm_resnet14_cifar') / 'last.safetensors'
    assert main(['report', str(run), '--checkpoint', str(other), '--output', str(out)]) == 0
    page = out.read_text()
    assert not any(f'>{heading}</h2>' in page for heading in ('Run', 'Recipe', 'Curves'))
    assert f'with the weights of {other}' in page


def test_weights_say_of_themselves_what_they_are_of(folder, tmp_path, capsys):
    run = run_folder(tmp_path / 'run', make_net(seed=1), 'awm_resnet14_cifar')
    assert main(['eval', str(run), '--data', 'digits']) == 0
    measured = json.loads(capsys.readouterr().out)
    weights = str(run / 'last.safetensors')
    for named in ('awm_resnet14_cifar', 'awm_resnet14_cifar.cifar10', str(folder)):
        assert main(['eval', named, '--checkpoint', weights, '--data', 'digits']) == 0
        assert json.loads(capsys.readouterr().out) == measured
    assert main(['eval', 'awm_resnet20_cifar', '--checkpoint', weights, '--data', 'digits']) == 1
    assert 'last.safetensors is of awm_resnet14_cifar, not of awm_resnet20_cifar' in capsys.readouterr().err


def test_curves_of_a_training_of_several_seeds(tmp_path, capsys):
    for seed in (0, 1):
        (tmp_path / 'all').mkdir(exist_ok=True)
        run_folder(tmp_path / 'all' / f'seed{seed}', make_net(), 'awm_resnet14_cifar')
    assert main(['curves', str(tmp_path / 'all')]) == 0
    assert capsys.readouterr().out.count('awm_resnet14_cifar') == 2
    assert main(['curves', str(tmp_path / 'all'), '--against', 'recipe.lr']) == 0
    assert 'differ' not in capsys.readouterr().out
    changed = {'model': 'awm_resnet14_cifar', 'recipe': {'lr': 0.1, 'epochs': 7}}
    (tmp_path / 'all' / 'seed1' / 'result.json').write_text(json.dumps(changed))
    assert main(['curves', str(tmp_path / 'all'), '--against', 'recipe.lr']) == 0
    assert 'beside the seed, in: epochs' in capsys.readouterr().out
    (tmp_path / 'all' / 'args.yaml').write_text('model: awm_resnet14_cifar')
    (tmp_path / 'all' / 'seed2').mkdir()
    assert main(['curves', str(tmp_path / 'all')]) == 0
    assert f'before their first epoch: {tmp_path / "all" / "seed2"}' in capsys.readouterr().out


def test_curves_leave_out_runs_without_an_epoch(tmp_path, capsys):
    run = run_folder(tmp_path / 'run', make_net(), 'awm_resnet14_cifar')
    begun = tmp_path / 'begun'
    begun.mkdir()
    (begun / 'args.yaml').write_text('model: awm_resnet14_cifar')
    assert main(['curves', str(run), str(begun)]) == 0
    output = capsys.readouterr().out
    assert f'before their first epoch: {begun}' in output
    assert output.count('awm_resnet14_cifar') == 1
    assert main(['curves', str(begun)]) == 1
    assert f'{begun} has neither log.jsonl nor summary.csv' in capsys.readouterr().err


def test_a_class_may_be_called_anything(folder, tmp_path):
    arguments = npz(tmp_path, np.zeros((20, 8, 8), np.uint8))
    images = np.load(tmp_path / 'own_test.npz')
    names = ['$a_{$', *'123456789']
    np.savez(tmp_path / 'own_test.npz', images=images['images'], labels=images['labels'], classes=names)
    out = str(tmp_path / 'out')
    assert main(['inspect', str(folder), *arguments, '--per-class', '--output', out]) == 0
    assert main(['extremes', str(folder), *arguments, '--count', '2', '--output', out]) == 0


def test_images_from_npz_and_folders(folder, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    labels = np.arange(20) % 10
    np.savez(tmp_path / 'own_test.npz', images=images, labels=labels)
    (tmp_path / 'train').mkdir()
    Image.fromarray(images[0]).save(tmp_path / 'train' / 'not of the test.png')
    for label, image in zip(labels, images):
        path = tmp_path / 'test' / str(label)
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / f'{len(list(path.iterdir()))}.png')
    means = []
    for data in ('own', 'folder'):
        out = tmp_path / data
        assert main(['inspect', str(folder), '--data', data, '--data-dir', str(tmp_path), '--output', str(out)]) == 0
        means.append([float(row['mean']) for row in rows(out / 'weights.csv')])
    np.testing.assert_allclose(*means, rtol=1e-5)
    path.joinpath('0.png').write_bytes(b'cut off')
    for command in ('inspect', 'extremes', 'eval'):  # no other image takes its place
        assert main([command, str(folder), '--data', 'folder', '--data-dir', str(tmp_path)]) == 1
        assert 'test/9/0.png is not a readable image' in capsys.readouterr().err
    options = ['--data', 'folder', '--data-dir', str(tmp_path), '--workers', '1']
    assert main(['inspect', str(folder), *options]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f'weighted-skip: {path}')


def npz(path, images, classes=10, first=0):
    labels = first + np.arange(len(images)) % classes
    np.savez(path / 'own_test.npz', images=images, labels=labels, classes=[*range(classes)])
    return ['--data', 'own', '--data-dir', str(path)]


def halve(file) -> None:
    os.truncate(file, file.stat().st_size // 2)


def half_an_npz(path):
    arguments = npz(path, np.zeros((9, 8, 8), np.uint8))
    halve(path / 'own_test.npz')
    return arguments


def half_a_checkpoint(path, folder: str) -> str:
    copy = shutil.copytree(folder, path / 'half')
    halve(copy / 'model.safetensors')
    return str(copy)


def no_weights(path) -> str:
    (path / 'text').write_text('root:x:0:0:root:/root:/bin/bash')  # whose first letter is a pickle's
    return str(path / 'text')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (lambda f, t: ['inspect', 'resnet14_cifar'], 'no weighted mapping units; nets that have are called adaresnet'),
        (lambda f, t: ['extremes', f, *npz(t, np.zeros((9, 8, 8), np.uint8), 3)], '3 classes and the net 10'),
        (lambda f, t: ['extremes', f, *npz(t, np.zeros((0, 8, 8), np.uint8))], 'the data set is empty'),
        (lambda f, t: ['extremes', f, *npz(t, np.zeros((9, 8, 8)))], 'images are float64 of shape (9, 8, 8, 1)'),
        (lambda f, t: ['extremes', f, *npz(t, np.zeros((20, 8, 8), np.uint8), first=1)], 'labels 1 to 10 with 10'),
        (lambda f, t: ['extremes', f, *half_an_npz(t)], 'is not a readable image set'),
        (lambda f, t: ['extremes', f, '--data', 'cifar10'], '--data cifar10 needs --data-dir'),
        (lambda f, t: ['extremes', f, '--data', 'own/set'], '--data own/set needs --data-dir'),
        (lambda f, t: ['extremes', f, '--data', 'cifar10', '--data-dir', str(t)], 'neither cifar10_test.npz nor'),
        (lambda f, t: ['extremes', f, '--data', 'digits', '--count', '0'], 'count=0'),
        (lambda f, t: ['extremes', 'awm_resnet14_cifar', '--data', 'digits', '--model-kwargs', 'in_chans=1'], '--mean'),
        (lambda f, t: ['inspect', 'awm_resnet15'], "no model is called 'awm_resnet15'; near names are"),
        (lambda f, t: ['inspect', 'awm_resnet20'], 'near names are awm_resnet20_cifar, awm_'),
        (lambda f, t: ['inspect', f, '--output', f + '/config.json'], 'is a file; give the name of a folder'),
        (lambda f, t: ['inspect', ''], "no model is called ''"),
        (lambda f, t: ['inspect', str(t)], 'neither config.json nor last.safetensors'),
        (lambda f, t: ['inspect', 'awm_resnet14_cifar', '--checkpoint', str(t / 'x')], "no file '"),
        (lambda f, t: ['inspect', f, '--model-kwargs', 'features_only=True'], 'features_only is no argument of a net'),
        (lambda f, t: ['inspect', f, '--model-kwargs', 'num_classes=7'], 'are of 10 classes, not of 7; leave'),
        (lambda f, t: ['inspect', 'awm_resnet20_cifar', '--checkpoint', f + '/model.safetensors'], 'do not fit awm'),
        (lambda f, t: ['inspect', 'awm_resnet20_cifar', '--model-kwargs', 'act_layer=x'], 'with these arguments'),
        (lambda f, t: ['inspect', 'awm_resnet110_cifar', '--model-kwargs', 'global_pool=x'], 'Invalid pool type: x'),
        (lambda f, t: ['inspect', half_a_checkpoint(t, f)], 'half do not fit'),
        (lambda f, t: ['inspect', f + '/model.safetensors'], 'does not say which model it is of'),
        (lambda f, t: ['inspect', f, f, '--data', 'digits'], '2 nets with --data'),
        (lambda f, t: ['inspect', f, '--per-class'], '--per-class needs images'),
        (lambda f, t: ['inspect', f, '--data-dir', str(t)], '--data-dir needs images; give --data'),
        (lambda f, t: ['report', f, '--mean', '0', '--output', str(t / 'page')], '--mean needs images; give --data'),
        (lambda f, t: ['inspect', f, '--data', 'mnist', '--data-dir', str(t)], 'train and eval fetch with --download'),
        (lambda f, t: ['inspect', 'awm_resnet14_cifar', '--checkpoint', f + '/config.json'], 'is not a checkpoint'),
        (lambda f, t: ['inspect', 'awm_resnet14_cifar', '--checkpoint', no_weights(t)], 'neither a safetensors file'),
        (lambda f, t: ['inspect', 'adaresnet18_released', *npz(t, np.zeros((9, 8, 8), np.uint8))], 'do not depend on'),
        (lambda f, t: ['variance', '--group', 'a', f, 'awm_resnet14_cifar.digits'], 'an AWM net'),
        (lambda f, t: ['variance', '--group', 'a', f, f + '/'], 'a checkpoint is given twice'),
        (lambda f, t: ['report', f, '--output', str(t)], 'is a folder; give the name of a file'),
        (lambda f, t: ['quickstart', '--output', f + '/config.json'], 'is a file; give the name of a folder'),
        (lambda f, t: ['variance', '--group', 'a'], "group 'a' has no checkpoints"),
        (lambda f, t: ['curves', f], 'neither log.jsonl nor summary.csv'),
        (lambda f, t: ['inspect', f, '--data', 'digits', '--input-size', '1', '2', '8'], '2x8 pixels are too small'),
        (lambda f, t: ['inspect', f, '--data', 'digits', '--input-size', '3', '8', '8'], 'has 3; give 1 H W'),
        (lambda f, t: ['extremes', f, '--data', 'digits', '--device', 'meta'], "device 'meta' is not to be had"),
        (lambda f, t: ['extremes', f, '--data', 'digits', '--device', 'abacus'], "device 'abacus' is not to be had"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(folder, tmp_path, capsys, arguments, message):
    assert main(arguments(str(folder), tmp_path)) == 1
    errors = capsys.readouterr().err.splitlines()
    assert message in errors[-1]
    assert errors[-1].startswith('weighted-skip: ')


def test_nan_weights_are_named(tmp_path, capsys):
    net = make_net()
    nn.init.constant_(net.layer2[1].merge.gate.fc1.weight, float('nan'))
    run = run_folder(tmp_path / 'run', net, 'awm_resnet14_cifar')
    assert main(['extremes', str(run), '--data', 'digits']) == 1
    assert 'mapping units are NaN: layer2.1' in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, 'find_spec', lambda name: None)
    for command in (
        ['inspect', str(folder), '--output', str(tmp_path / 'out')],
        ['discriminate', str(folder), '--data', 'digits'],
        ['report', str(folder)],
    ):
        assert main(command) == 1
        assert "pip install 'timm-weighted-skip[analysis]'" in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
    assert main(['inspect', str(folder)]) == 0
