"""What the folder of a training run is good for: going on, elsewhere too, and naming its net."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_weighted_skip.cli import main
from timm_weighted_skip.hub import save_checkpoint
from timm_weighted_skip.nets import load_net
from timm_weighted_skip.train.runs import run_seeds
from timm_weighted_skip.train.task import Task, read_task


def train(folder, *more):
    """The exit status of a short run in `folder`/run."""
    base = '--model awm_resnet14_cifar --data digits --epochs 1 --batch-size 256 --lr 0.001'
    return main(['train', *base.split(), '--output', str(folder), '--experiment', 'run', *more])


@pytest.mark.parametrize(
    'arguments',
    [
        ['--opt', 'adamw', '--opt-kwargs', 'betas=(0.9,0.95)'],
        ['--model', 'awm_densenet22_bc_cifar', '--model-kwargs', 'block_config=(1,1,1)'],
    ],
    ids=str,
)
def test_arguments_that_are_tuples_do_not_hinder_going_on(tmp_path, arguments):
    assert train(tmp_path, *arguments) == 0
    (tmp_path / 'run' / 'result.json').unlink()
    assert main(['train', '--resume', str(tmp_path / 'run')]) == 0


@pytest.mark.parametrize('kept', ['result.json', 'last.safetensors'])
def test_a_run_without_its_checkpoints_is_not_trained_over(tmp_path, capsys, kept):
    assert train(tmp_path) == 0
    folder = tmp_path / 'run'
    for path in folder.iterdir():
        if path.name not in (kept, 'args.yaml'):
            path.unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert train(tmp_path, '--lr', '0.1') == 1
    assert 'holds a run' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_it_goes_on_with_its_data_and_on_a_device_of_elsewhere(tmp_path, capsys):
    assert train(tmp_path) == 0
    folder, moved = tmp_path / 'run', tmp_path / 'moved'
    (folder / 'result.json').unlink()
    args = (folder / 'args.yaml').read_text()
    (folder / 'args.yaml').write_text(args.replace('device: cpu', 'device: abacus'))
    assert main(['train', '--resume', str(folder)]) == 1
    assert "device 'abacus' is not to be had" in capsys.readouterr().err
    assert main(['train', '--resume', str(folder), '--device', 'cpu', '--data-dir', str(moved)]) == 0
    task, _ = read_task(folder)
    assert (task.device, task.data_dir) == ('cpu', str(moved))
    for other in (['--seeds', '1', '2'], ['--model', 'resnet14_cifar'], ['--pretrained'], ['--lr', '0.1']):
        assert main(['train', '--resume', str(folder), *other]) == 1
        assert f'give no {other[0]}' in capsys.readouterr().err


def test_a_net_from_weights_of_ones_own_can_be_loaded_again(tmp_path, capsys):
    backbone = tmp_path / 'backbone.safetensors'
    save_file(timm.create_model('awm_resnet14_cifar').state_dict(), backbone)
    overlay = f'pretrained_cfg_overlay={dict(file=str(backbone))}'
    assert train(tmp_path, '--pretrained', '--lr', '0', '--model-kwargs', overlay) == 0
    weights = load_file(tmp_path / 'run' / 'last.safetensors')['layer1.0.conv1.weight']
    assert torch.equal(weights, load_file(backbone)['layer1.0.conv1.weight'])  # it began with them
    accuracy = json.loads((tmp_path / 'run' / 'result.json').read_text())['last']['top1']
    capsys.readouterr()
    assert main(['eval', str(tmp_path / 'run'), '--data', 'digits']) == 0
    assert json.loads(capsys.readouterr().out)['top1'] == pytest.approx(accuracy)
    command = json.loads((tmp_path / 'run' / 'result.json').read_text())['command']
    assert 'backbone.safetensors' in command
    assert str(tmp_path) not in command
    assert 'license' not in load_net(str(tmp_path / 'run')).pretrained_cfg  # the file's is not known


def test_a_run_goes_on_without_the_weights_it_began_with(tmp_path):
    backbone = tmp_path / 'backbone.safetensors'
    save_file(timm.create_model('awm_resnet14_cifar', in_chans=1).state_dict(), backbone)
    assert train(tmp_path, '--model-kwargs', f'checkpoint_path={backbone}') == 0
    backbone.unlink()
    (tmp_path / 'run' / 'result.json').unlink()
    assert main(['train', '--resume', str(tmp_path / 'run')]) == 0


def test_stopped_before_it_began_a_run_names_no_folder_to_go_on_in(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_weighted_skip.train.runs.load_image_set', stop)
    task = Task('awm_resnet14_cifar', 'digits')
    with pytest.raises(KeyboardInterrupt, match='stopped before the training began'):
        run_seeds(task, tmp_path / 'run', [0])
    assert not (tmp_path / 'run').exists()


def test_weights_that_began_as_a_tags_go_by_their_models_name(tmp_path, capsys):
    name = 'awm_resnet14_cifar.digits'
    assert train(tmp_path, '--model', name, '--pretrained') == 0
    weights = ['--checkpoint', str(tmp_path / 'run/last.safetensors'), '--data', 'digits']
    for model in (name, 'awm_resnet14_cifar'):
        assert main(['eval', model, *weights]) == 0
    assert main(['eval', 'resnet14_cifar', *weights]) == 1
    assert 'not of resnet14_cifar' in capsys.readouterr().err


def test_a_net_that_began_as_a_folders_is_known_elsewhere_and_without_it(tmp_path, monkeypatch):
    config = {'license': 'cc-by-nc-4.0'}
    small = timm.create_model('awm_resnet14_cifar', hidden=8, pretrained_cfg_overlay=config)
    save_checkpoint(small, tmp_path / 'from', model_args={'hidden': 8})
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path, '--model', 'local-dir:from', '--pretrained') == 0
    result = tmp_path / 'run' / 'result.json'
    assert '--model local-dir:from --data' in json.loads(result.read_text())['command']  # not where it lay
    result.unlink()
    (tmp_path / 'from/model.safetensors').unlink()  # the run has its own by now
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir('elsewhere')
    assert main(['train', '--resume', str(tmp_path / 'run')]) == 0
    (tmp_path / 'from').rename(tmp_path / 'gone')
    assert main(['eval', str(tmp_path / 'run'), '--data', 'digits']) == 0
    assert load_net(str(tmp_path / 'run')).pretrained_cfg['license'] == 'cc-by-nc-4.0'


def test_a_net_with_a_deep_stem_is_evaluated_and_read_too(tmp_path):
    small = ['output_stride=8', 'layers=(1,1,1,1)', 'channels=(8,8,8,8)']
    stem = ['stem_type=deep', 'stem_width=8']
    assert train(tmp_path, '--model', 'awm_resnet18', '--model-kwargs', *small, *stem) == 0
    for command in ('eval', 'inspect'):
        assert main([command, str(tmp_path / 'run'), '--data', 'digits']) == 0


def test_images_to_test_of_other_classes_are_refused(tmp_path, capsys):
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4)
    for split, classes in (('train', 'abcd'), ('test', 'abdc')):
        np.savez(tmp_path / f'own_{split}.npz', images=images, labels=labels, classes=[*classes])
    assert train(tmp_path, '--data', 'own', '--data-dir', str(tmp_path), '--batch-size', '2') == 1
    assert '4 classes to train and 4 to test, and they are in another order' in capsys.readouterr().err
    np.savez(tmp_path / 'own_test.npz', images=images, labels=labels, classes=[*'abce'])
    assert train(tmp_path, '--data', 'own', '--data-dir', str(tmp_path), '--batch-size', '2') == 1
    assert '4 classes to train and 4 to test, and only one set has d, e' in capsys.readouterr().err


def test_what_is_refused_leaves_all_as_it_was(tmp_path, capsys):
    assert train(tmp_path, '--std', '0', '0', '0') == 1
    assert train(tmp_path, '--seeds', '1', '2', '--data', 'cifar10', '--data-dir', str(tmp_path / 'none')) == 1
    assert not any(tmp_path.iterdir())
    assert train(tmp_path, '--seeds', '1', '2') == 0
    folder = tmp_path / 'run'
    args = (folder / 'args.yaml').read_bytes()
    elsewhere = ['--device', 'abacus', '--data-dir', str(tmp_path)]
    assert main(['train', '--resume', str(folder), *elsewhere]) == 0  # all is done, wherever that was
    assert (folder / 'args.yaml').read_bytes() == args
    (folder / 'seed2' / 'result.json').unlink()
    assert main(['train', '--resume', str(folder), *elsewhere]) == 1
    assert (folder / 'args.yaml').read_bytes() == args
    capsys.readouterr()
    assert main(['train', '--resume', str(folder / 'seed2')]) == 1
    assert f'is a seed of the run {folder}; give that' in capsys.readouterr().err
    assert main(['train', '--resume', str(folder)]) == 0


def test_weights_to_begin_with_that_are_not_there_are_named(tmp_path, capsys):
    assert train(tmp_path, '--model-kwargs', f'checkpoint_path={tmp_path / "none.pth"}') == 1
    assert 'none.pth' in capsys.readouterr().err.splitlines()[-1]


def test_a_bad_seed_is_refused_before_the_training_of_a_good_one(tmp_path, capsys):
    assert train(tmp_path, '--seeds', '1', '-1') == 1
    assert 'seed=-1 is not allowed' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_of_runs_is_not_offered_to_go_on_in(tmp_path, capsys):
    assert train(tmp_path / 'run') == 0
    assert train(tmp_path) == 1
    assert capsys.readouterr().err.endswith('holds a run; give another --experiment\n')
    assert train(tmp_path / 'run') == 1
    assert 'go on with it by --resume' in capsys.readouterr().err


def test_a_test_loss_that_is_not_finite_is_refused(tmp_path, capsys):
    # One update, after which nothing but the test can find that the weights lead nowhere.
    assert train(tmp_path, '--batch-size', '1024', '--lr', '1e30') == 1
    assert 'the test loss is nan' in capsys.readouterr().err
    assert not (tmp_path / 'run' / 'result.json').exists()


def test_a_run_too_short_for_its_gates_says_so(tmp_path, capsys):
    assert train(tmp_path, '--alternate-freeze', '1') == 0
    assert 'no epoch of 1 trains the gates: --alternate-freeze 1' in capsys.readouterr().err
    assert train(tmp_path / 'both', '--alternate-freeze', '1', '--epochs', '2') == 0
    assert 'trains the gates' not in capsys.readouterr().err
