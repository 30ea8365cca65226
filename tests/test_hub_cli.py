"""`save`, `convert` and `fold` on the command line, of training runs and of files of weights."""

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from checkpoints import make_checkpoint, results, trained_net
from test_bad_checkpoints import Bomb

from timm_weighted_skip import cli
from timm_weighted_skip.hub import Results
from timm_weighted_skip.nets import Trained, load_net

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_command_line_from_training_checkpoint_to_folded_net(tmp_path, capsys):
    net = timm.create_model('adaresnet14_cifar', num_classes=7, sharing='kind', skip_init=0.7).eval()
    torch.save({'state_dict': net.state_dict(), 'epoch': 3, 'arch': 'adaresnet14_cifar'}, tmp_path / 'best.pth.tar')
    (tmp_path / 'results.json').write_text(json.dumps(results().to_dict()))
    ada, plain, awm = tmp_path / 'ada', tmp_path / 'plain', tmp_path / 'awm'
    source = ['adaresnet14_cifar', '--checkpoint', str(tmp_path / 'best.pth.tar')]
    options = ['--model-kwargs', 'num_classes=7', 'sharing=kind', '--results', str(tmp_path / 'results.json')]
    assert cli.main(['save', *source, *options, '--output', str(ada)]) == 0
    assert cli.main(['fold', f'local-dir:{ada}', '--output', str(plain)]) == 0
    assert cli.main(['convert', f'local-dir:{plain}', '--to', 'awm', '--output', str(awm)]) == 0
    assert capsys.readouterr().out == f'wrote {ada}\nwrote {plain}\nwrote {awm}\n'
    logits = net(IMAGE)
    for folder, architecture in ((ada, net.pretrained_cfg['architecture']), (plain, 'resnet14_cifar')):
        assert json.loads((folder / 'config.json').read_text())['architecture'] == architecture
        torch.testing.assert_close(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(IMAGE), logits)
    assert 'seed 1' in (ada / 'README.md').read_text()

    assert cli.main(['convert', f'local-dir:{ada}', '--to', 'plain', '--output', str(tmp_path / 'no')]) == 1
    assert cli.main(['save', *source, '--output', str(tmp_path / 'no')]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert 'fold' in errors[0]
    assert 'size mismatch for fc.weight' in errors[1]
    assert not (tmp_path / 'no').exists()


def images(path, shape=(40, 8, 8), classes='abcde'):
    """An image set of `classes` in `path`, as arguments of the command line."""
    for part in ('train', 'test'):
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        np.savez(
            path / f'own_{part}.npz', images=pixels, labels=np.arange(len(pixels)) % len(classes), classes=[*classes]
        )
    return ['--data', 'own', '--data-dir', str(path)]


def train(path, *arguments, model='adaresnet14_cifar', data=('--data', 'digits')):
    run = ['--output', str(path), '--experiment', 'run', '--epochs', '1', '--batch-size', '32']
    assert cli.main(['train', '--model', model, *data, *run, *arguments]) == 0
    return path / 'run'


def saved_config(source, folder, *arguments):
    assert cli.main(['save', str(source), '--output', str(folder), *arguments]) == 0
    return json.loads((folder / 'config.json').read_text())


def test_a_run_is_saved_with_what_it_says_of_itself_and_measured(tmp_path, capsys, monkeypatch):
    options = ['--model-kwargs', 'sharing=kind', '--mean', '0.3', '--std', '0.4', '--seeds', '3', '5']
    run, saved = train(tmp_path, *options) / 'seed5', tmp_path / 'saved'
    config = saved_config(run, saved)

    cfg, measured = config['pretrained_cfg'], Results.from_dict(config['results'])
    assert (config['architecture'], config['model_args']) == ('adaresnet14_cifar', {'sharing': 'kind', 'in_chans': 1})
    assert (cfg['input_size'], cfg['mean'], cfg['std'], cfg['crop_pct']) == ([1, 8, 8], [0.3], [0.4], 1.0)
    assert config['label_names'] == [*'0123456789']
    result = json.loads((run / 'result.json').read_text())
    assert (measured.seed, measured.seeds, measured.epochs) == (5, [3, 5], 1)
    assert measured.top1[1] == round(result['last']['top1'], 2)
    assert (measured.split, Results.of_run({**result, 'data': 'folder'}, '').split) == ('test', 'validation')
    capsys.readouterr()
    named = ['adaresnet14_cifar', '--checkpoint', str(run / 'last.safetensors')]
    for source in ([run], [saved], [f'local-dir:{saved}'], named):
        assert cli.main(['eval', *map(str, source), '--data', 'digits']) == 0
        assert json.loads(capsys.readouterr().out)['top1'] == pytest.approx(result['last']['top1'])

    # The card's command trains it again.
    command = shlex.split(measured.recipe)[1:]
    assert cli.main([*command, '--output', str(tmp_path), '--experiment', 'again']) == 0
    assert json.loads((tmp_path / 'again/result.json').read_text())['last'] == result['last']

    monkeypatch.chdir(run)
    assert saved_config('.', tmp_path / 'here')['results'] == config['results']
    assert saved_config(saved, tmp_path / 'copy') == config
    assert saved_config(f'local-dir:{saved}', tmp_path / 'same') == config
    assert saved_config(named[0], tmp_path / 'named', *named[1:])['model_args'] == config['model_args']
    # What was measured is not of the best epoch's weights, nor of a net with other arguments.
    assert 'results' not in saved_config(run / 'model_best.safetensors', tmp_path / 'best')
    assert 'results' not in saved_config(run, tmp_path / 'other', '--model-kwargs', 'skip_init=1.0')
    run.with_name('seed5').rename(run.with_name('mine'))
    assert saved_config(run.with_name('mine'), tmp_path / 'alone')['results']['seeds'] == [5]


def test_a_saved_run_says_nothing_of_other_weights_of_its_model(tmp_path):
    data = images(tmp_path, (40, 64, 64, 3))
    run = train(tmp_path, model='awm_resnet18.fb_swsl_ig1b_ft_in1k', data=data)
    config = saved_config(run, tmp_path / 'saved')
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['num_classes'], config['label_names']) == ([3, 64, 64], 5, [*'abcde'])
    assert cfg['crop_pct'] == 1.0
    assert not {'test_input_size', 'test_crop_pct', 'origin_url', 'tag'} & cfg.keys()
    assert 'license' not in cfg  # it is of the weights that this training did not begin with
    assert 'license:' not in (tmp_path / 'saved/README.md').read_text()
    (run / 'result.json').unlink()
    assert 'results' not in saved_config(run, tmp_path / 'unfinished')


def test_what_was_measured_is_not_of_weights_that_were_trained_further(tmp_path):
    folder, further = make_checkpoint(tmp_path), tmp_path / 'further'
    assert 'results' in saved_config(folder, tmp_path / 'copy')
    # As transformers saves a net of other classes: the rest of the config as it was.
    config = json.loads((folder / 'config.json').read_text())
    config.update(num_classes=2, label_names=[*'0123456789'])
    further.mkdir()
    (further / 'config.json').write_text(json.dumps(config))
    weights = trained_net(num_classes=2).state_dict()
    safetensors.torch.save_file(weights, further / 'model.safetensors', {'format': 'pt'})
    saved = saved_config(further, tmp_path / 'saved')
    assert not {'results', 'label_names'} & saved.keys()
    assert saved['num_classes'] == 2


def test_of_a_checkpoint_with_a_moving_average_the_average_is_loaded(tmp_path):
    raw, average = (timm.create_model('adaresnet14_cifar').state_dict() for _ in range(2))
    torch.save({'state_dict': raw, 'state_dict_ema': average}, tmp_path / 'model_best.pth.tar')
    net = load_net('adaresnet14_cifar', tmp_path / 'model_best.pth.tar')
    assert torch.equal(net.conv1.weight, average['conv1.weight'])


def test_anothers_weights_have_no_classes_of_our_checkpoint(tmp_path):
    """The bare name's default is trained on CIFAR-10; what a file of weights was trained on, nobody knows."""
    weights = tmp_path / 'mnist.safetensors'
    safetensors.torch.save_file(timm.create_model('awm_resnet14_cifar', in_chans=1).state_dict(), weights)
    named = ['awm_resnet14_cifar', tmp_path / 'saved', '--checkpoint', str(weights), '--model-kwargs', 'in_chans=1']
    assert 'airplane' in timm.get_pretrained_cfg_value('awm_resnet14_cifar', 'label_names')
    config = saved_config(*named)
    assert not {'label_names', 'license'} & {**config, **config['pretrained_cfg']}.keys()


def test_a_checkpoint_of_timms_train_py_says_what_images_it_was_told_of(tmp_path):
    weights = tmp_path / 'last.pth.tar'
    told = argparse.Namespace(mean=[0.3], std=None, img_size=48, crop_pct=0.9, num_classes=10)
    torch.save({'state_dict': timm.create_model('awm_resnet14_cifar').state_dict(), 'args': told}, weights)
    config = saved_config('awm_resnet14_cifar', tmp_path / 'saved', '--checkpoint', str(weights))['pretrained_cfg']
    assert (config['mean'], config['input_size'], config['crop_pct']) == ([0.3] * 3, [3, 48, 48], 0.9)
    assert config['std'] == [*timm.get_pretrained_cfg_value('awm_resnet14_cifar', 'std')]  # train.py's, untold
    assert 'license' not in config


def test_convert_and_fold_take_a_run(tmp_path):
    run = train(tmp_path, '--model-kwargs', 'skip_init=0.5', data=images(tmp_path))
    assert cli.main(['fold', str(run), '--output', str(tmp_path / 'plain')]) == 0
    assert cli.main(['convert', str(tmp_path / 'plain'), '--to', 'awm', '--output', str(tmp_path / 'awm')]) == 0
    x = torch.randn(2, 1, 8, 8)
    nets = [timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).eval() for name in ('plain', 'awm')]
    torch.testing.assert_close(nets[0](x), load_net(str(run))(x))
    torch.testing.assert_close(nets[1](x), nets[0](x))


def test_the_recipe_of_a_card_has_the_precision_and_all_code_that_trained(tmp_path):
    run = json.loads((train(tmp_path, data=images(tmp_path)) / 'result.json').read_text())
    assert Results.of_run(run, 'run').recipe == run['command'] + ' --no-amp'
    on_gpu = {**run, 'amp': True, 'commit': 'b' * 40, 'earlier': [{'commit': 'a' * 40}, {'commit': 'b' * 40}]}
    results = Results.of_run(on_gpu, 'run')
    assert results.recipe == run['command'] + ' --amp'
    assert results.commit == f'{"a" * 40}, {"b" * 40}'
    asked = {**on_gpu, 'recipe': {**run['recipe'], 'amp': True}}
    assert Results.of_run(asked, 'run').recipe == run['command']


@pytest.mark.parametrize(
    ('arguments', 'why'),
    [
        (['save', 'run', '--output', 'x'], "result.json is not of a run of this trainer ('command')"),
        (['eval', 'run', '--data', 'digits'], 'the data has 10 classes and the net 5'),
        (
            ['eval', 'run', '--data', 'colour', '--data-dir', '.'],
            'takes images of 1 channels, with 1 pixel means; those',
        ),
        (['eval', 'run', '--data', 'own', '--data-dir', '.', '--batch-size', '0'], 'batch_size=0'),
        (['inspect', 'run', '--model-kwargs', 'checkpoint_path=x'], 'checkpoint_path is no argument of a net'),
        (['inspect', 'nowhere.safetensors'], 'there is no file or folder nowhere.safetensors'),
        (['inspect', 'seeds'], 'has neither config.json nor last.safetensors; give one of its runs, seed0, seed1'),
        (['inspect', 'own_test.npz'], 'own_test.npz is not a whole safetensors file'),
        (['inspect', 'evil.safetensors'], 'says things of its net that make no sense'),
        (['inspect', 'count.safetensors'], 'says things of its net that make no sense'),
        (['inspect', 'list.safetensors'], 'says things of its net that make no sense'),
        (['inspect', 'foreign.safetensors'], 'is of a net that is not registered here: no model is called'),
        (['inspect', 'list.pth'], 'one of another kind is given as --checkpoint, with its model'),
        (
            ['inspect', 'adaresnet14_cifar', '--checkpoint', 'run/checkpoint-2.pth.tar'],
            'give run/checkpoint-2.safetensors',
        ),
        (['save', 'adaresnet14_cifar', '--checkpoint', 'evil.pth', '--output', 'x'], 'evil.pth is not a checkpoint'),
        (['save', 'adaresnet14_cifar', '--checkpoint', 'list.pth', '--output', 'x'], 'list.pth is not a checkpoint'),
        (['save', 'adaresnet14_cifar', '--checkpoint', 'empty.pth', '--output', 'x'], 'empty.pth is not a checkpoint'),
    ],
)
def test_what_a_run_can_not_give_is_one_clear_line(tmp_path, capsys, monkeypatch, arguments, why):
    monkeypatch.chdir(tmp_path)
    images(Path())
    np.savez('colour_test.npz', images=np.zeros((5, 8, 8, 3), np.uint8), labels=np.arange(5))
    about = Trained('adaresnet14_cifar', {}, [*'abcde'], [1, 8, 8], [0.3], [0.4])
    net = timm.create_model('adaresnet14_cifar', **about.arguments())
    for folder in ('run', 'seeds/seed0', 'seeds/seed1'):
        Path(folder).mkdir(parents=True)
        safetensors.torch.save_file(net.state_dict(), Path(folder, 'last.safetensors'), about.metadata())
    Path('run/result.json').write_text('{"data": "own", "recipe": {"seed": 0}, "last": {"top1": 1.0}}')
    for name, change in {
        'evil': {'model_kwargs': '{"checkpoint_path": "list.pth"}'},
        'count': {'classes': '5'},
        'list': {'model_kwargs': '[]'},
        'foreign': {'model': 'adaresnet15_cifar'},
    }.items():
        safetensors.torch.save_file(net.state_dict(), f'{name}.safetensors', {**about.metadata(), **change})
    torch.save([1, 2], 'list.pth')
    torch.save({'state_dict': Bomb(Path('executed'))}, 'evil.pth')
    Path('empty.pth').touch()
    safetensors.torch.save_file(net.state_dict(), 'run/checkpoint-2.safetensors', about.metadata())
    torch.save({'model': about.model, 'updates': 2}, 'run/checkpoint-2.pth.tar')
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert why in error
    assert error.count('\n') == 1
    assert not Path('x').exists()
    assert not Path('executed').exists()


@pytest.mark.parametrize(
    ('name', 'size'),
    [('resnet20_cifar', 28), ('awm_densenet22_bc_cifar', 64), ('adaresnet18_released', 28), ('awm_resnet50', 32)],
)
def test_the_pool_size_of_a_runs_net_is_that_of_its_images(name, size):
    about = Trained(name, {}, [*'abcde'], [1, size, size], [0.3], [0.4])
    net = timm.create_model(name, **about.arguments(), device='meta').eval()
    last = net.forward_features(torch.empty(1, 1, size, size, device='meta'))
    assert net.pretrained_cfg['pool_size'] == last.shape[2:]


def test_fold_reports_what_stays_weighted(tmp_path, capsys):
    net = timm.create_model('adaresnet14_cifar', skip_init=-1.0)
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    source = ['adaresnet14_cifar', '--checkpoint', str(tmp_path / 'net.pth')]
    assert cli.main(['fold', *source, '--output', str(tmp_path / 'folded')]) == 0
    assert 'identity shortcut: layer1.0, layer1.1, layer2.1, layer3.1\n' in capsys.readouterr().out
    assert json.loads((tmp_path / 'folded/config.json').read_text())['architecture'] == 'adaresnet14_cifar'

    constant = [*source, '--model-kwargs', 'skip_fixed=True', '--output', str(tmp_path / 'constant')]
    assert cli.main(['fold', *constant]) == 0
    assert not any(name.endswith('merge.weight') for name, _ in load_net(str(tmp_path / 'constant')).named_parameters())
