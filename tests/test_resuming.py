"""Runs that were stopped, killed or damaged, and go on: with the same bits, or with a clear refusal."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_bad_checkpoints import Bomb
from training import ONE_THREAD, train_args

from timm_weighted_skip.cli import main
from timm_weighted_skip.train import checkpoint as checkpoints
from timm_weighted_skip.train import runs, trainer
from timm_weighted_skip.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures('one_thread')


def trained(folder):
    assert main(train_args(folder)) == 0
    return json.loads((folder / 'run' / 'result.json').read_text())


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(tmp_path):
    whole = trained(tmp_path / 'whole')
    command = [sys.executable, '-m', 'timm_weighted_skip.cli']
    folder = tmp_path / 'killed'
    arguments, kills = train_args(folder), 0
    while kills < 3:
        process = subprocess.Popen([*command, *arguments], env=ONE_THREAD, stdout=subprocess.DEVNULL)
        log, lines = folder / 'run' / 'log.jsonl', 2 * kills + 1
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < lines):
            time.sleep(0.002)
        time.sleep(0.03 * kills)  # in the middle of writing, or of the next epoch
        process.kill()
        process.wait()
        kills += 1
        arguments = ['train', '--resume', str(folder / 'run')]
    assert main(arguments) == 0
    ended = load_file(folder / 'run' / 'last.safetensors')
    expected = load_file(tmp_path / 'whole' / 'run' / 'last.safetensors')
    assert all(torch.equal(ended[name], expected[name]) for name in expected)
    result = json.loads((folder / 'run' / 'result.json').read_text())
    assert result['last'] == whole['last']
    assert [json.loads(line)['epoch'] for line in (folder / 'run' / 'log.jsonl').open()] == list(range(6))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, '-m', 'timm_weighted_skip.cli', *train_args(tmp_path, '--epochs', '10000')]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=ONE_THREAD, **pipes)
    process.stdout.readline()  # the first epoch is over
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f'weighted-skip train --resume {tmp_path / "run"}' in errors
    assert 'Traceback' not in errors
    assert checkpoints.read_checkpoint(tmp_path / 'run', [''])[1]['updates'] >= 22


@pytest.fixture
def stopped_run(tmp_path, monkeypatch):
    """The folder of a run that was interrupted while its first epoch was being tested."""
    evaluate = Trainer.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'evaluate', lambda self: os.kill(os.getpid(), signal.SIGINT) or evaluate(self))
        patch.setattr(runs.platform, 'processor', lambda: 'one machine')
        with pytest.raises(SystemExit):
            main(train_args(tmp_path))
    return tmp_path / 'run'


def test_ctrl_c_while_testing_keeps_the_epoch(capfd, stopped_run):
    assert '\nstopping once this step is done and saved; a second signal stops at once\n' in capfd.readouterr().err
    assert checkpoints.read_checkpoint(stopped_run, [''])[1]['epoch'] == 1
    assert len((stopped_run / 'log.jsonl').read_text().splitlines()) == 1


def test_a_run_that_went_on_elsewhere_tells_what_trained_which_epochs(stopped_run, monkeypatch):
    monkeypatch.setattr(runs.platform, 'processor', lambda: 'another')
    assert main(['train', '--resume', str(stopped_run)]) == 0
    result = json.loads((stopped_run / 'result.json').read_text())
    assert (result['device'], result['from_epoch']) == ('another', 1)
    (earlier,) = result['earlier']
    assert (earlier['device'], earlier['from_epoch']) == ('one machine', 0)
    same = earlier.keys() - {'device', 'from_epoch'}
    assert {name: earlier[name] for name in same} == {name: result[name] for name in same}


def test_a_run_that_went_on_where_it_was_tells_of_one_machine(stopped_run, monkeypatch):
    file = next(stopped_run.glob('checkpoint-*.pth.tar'))
    state = torch.load(file, weights_only=True)
    state['book']['wall_time'] += 3600
    torch.save(state, file)
    monkeypatch.setattr(runs.platform, 'processor', lambda: 'one machine')
    assert main(['train', '--resume', str(stopped_run)]) == 0
    result = json.loads((stopped_run / 'result.json').read_text())
    assert (result['device'], result['from_epoch'], result['earlier']) == ('one machine', 0, [])
    assert 3600 < result['wall_time'] < 7200


@pytest.mark.parametrize(
    ('named', 'change'),
    [
        ('classes', lambda data: replace(data, classes=data.classes[::-1])),
        ('input_size', lambda data: replace(data, images=data.images.repeat(1, 2, 1, 1))),
        ('training and test images', lambda data: replace(data, images=data.images.flip(0))),
        ('training and test images or labels', lambda data: replace(data, labels=data.labels.roll(1))),
    ],
)
def test_a_run_does_not_go_on_with_other_images(stopped_run, monkeypatch, capsys, named, change):
    load = runs.load_image_set
    monkeypatch.setattr(runs, 'load_image_set', lambda *args: change(load(*args)))
    assert main(['train', '--resume', str(stopped_run)]) == 1
    assert f'began with other {named}' in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_pixel_means(stopped_run, monkeypatch, capsys):
    monkeypatch.setattr(trainer, 'normalisation', lambda recipe, net, data: ((0.1,), (0.9,)))
    assert main(['train', '--resume', str(stopped_run)]) == 1
    assert 'began with other mean, std than the images and awm_resnet14_cifar have now' in capsys.readouterr().err


def test_a_run_from_before_images_were_noted_is_gone_on_with(stopped_run):
    (file,) = stopped_run.glob('checkpoint-*.pth.tar')
    state = torch.load(file, weights_only=True)
    del state['book']['images']
    torch.save(state, file)
    assert main(['train', '--resume', str(stopped_run)]) == 0


def test_ctrl_c_while_an_epoch_is_written_down_keeps_it(tmp_path, monkeypatch):
    save = runs._save
    with monkeypatch.context() as patch:
        patch.setattr(runs, '_save', lambda *args: signal.raise_signal(signal.SIGINT) or save(*args))
        with pytest.raises(SystemExit):
            main(train_args(tmp_path))
    assert checkpoints.read_checkpoint(tmp_path / 'run', [''])[1]['epoch'] == 1


def test_ctrl_c_after_the_best_epoch_leaves_its_weights(tmp_path, monkeypatch):
    train_epoch, best, kept = Trainer.train_epoch, tmp_path / 'run' / 'model_best.safetensors', []

    def interrupted(self, progress, stopped):
        def stop(images, loss):
            progress(images, loss)
            if self.position.epoch == 1:
                kept.append(best.read_bytes())
                signal.raise_signal(signal.SIGINT)

        return train_epoch(self, stop, stopped)

    monkeypatch.setattr(Trainer, 'train_epoch', interrupted)
    with pytest.raises(SystemExit):
        main(train_args(tmp_path))
    assert checkpoints.read_checkpoint(tmp_path / 'run', [''])[1]['batch'] == 1
    assert best.read_bytes() == kept[0]


@pytest.mark.parametrize('name', ['last.safetensors', 'model_best.safetensors'])
def test_killed_before_a_checkpoint_has_its_names_it_gets_them_when_resumed(tmp_path, monkeypatch, name):
    link, links = runs.link, []

    def killed(source, as_name):
        links.append(as_name)
        if as_name == name and links.count(name) == 2:  # in the last epoch, which is the best
            raise OSError('killed')
        link(source, as_name)

    monkeypatch.setattr(runs, 'link', killed)
    assert main(train_args(tmp_path, '--epochs', '2', '--alternate-freeze', '0')) == 1
    assert main(['train', '--resume', str(tmp_path / 'run')]) == 0
    (checkpoint,) = (tmp_path / 'run').glob('checkpoint-*.safetensors')
    assert (tmp_path / 'run' / name).read_bytes() == checkpoint.read_bytes()


def test_a_checkpoint_survives_what_befalls_the_next_one(tmp_path, monkeypatch):
    tensors = {'': {'w': torch.arange(3.0)}}
    checkpoints.save_checkpoint(tmp_path, tensors, {'updates': 1}, {})

    fsync = os.fsync
    for failing in (1, 2):  # at the weights, at the state
        left = [failing]

        def full(file, left=left):
            left[0] -= 1
            if not left[0]:
                raise OSError(28, 'No space left on device')
            fsync(file)

        monkeypatch.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left on device'):
            checkpoints.save_checkpoint(tmp_path, {'': {'w': torch.zeros(3)}}, {'updates': 2}, {})
        monkeypatch.undo()
        weights, state = checkpoints.read_checkpoint(tmp_path, [''])
        assert state == {'updates': 1}
        assert torch.equal(weights['']['w'], tensors['']['w'])
    (tmp_path / '.checkpoint-1.safetensors.0.part').touch()  # as a kill would leave it
    (tmp_path / 'checkpoint-0.safetensors').touch()
    checkpoints.save_checkpoint(tmp_path, tensors, {'updates': 2}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ['checkpoint-2.pth.tar', 'checkpoint-2.safetensors']


def test_broken_and_foreign_checkpoints_are_refused(tmp_path, capsys):
    def refused(match):
        assert main(['train', '--resume', str(folder)]) == 1
        error = capsys.readouterr().err
        assert match in error
        assert error.count('\n') == 1
        assert 'weights_only' not in error  # torch's advice to load what may run code

    trained(tmp_path)
    folder = tmp_path / 'run'
    (folder / 'result.json').unlink()
    state, weights = (next(folder.glob(f'checkpoint-*{suffix}')) for suffix in ('.pth.tar', '.safetensors'))
    for path in (state, weights):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refused('is not a whole')
        path.write_bytes(whole)
    whole, mark = state.read_bytes(), tmp_path / 'executed'
    torch.save({'updates': Bomb(mark)}, state)
    refused('is not a whole checkpoint')
    assert not mark.exists()
    state.write_bytes(whole)
    log = folder / 'log.jsonl'
    log.write_text(log.read_text()[:-9])
    refused(f'{log} is damaged')
    log.write_text('null\n')
    refused(f'{log} is damaged')
    for other in (['--epochs', '9'], ['--model', 'awm_resnet20_cifar']):
        assert main(['train', '--resume', str(folder), *other]) == 1
        assert f'give no {other[0]}' in capsys.readouterr().err
    args = (folder / 'args.yaml').read_text()
    (folder / 'args.yaml').write_text(args.replace('awm_resnet14_cifar', 'awm_resnet20_cifar'))
    refused('awm_resnet20_cifar')
    (folder / 'args.yaml').write_text(args)
    folder = tmp_path
    refused('args.yaml')


def test_a_result_that_is_none_is_named(tmp_path, capsys):
    trained(tmp_path)
    result = tmp_path / 'run/result.json'
    result.write_text('{}')
    assert main(['train', '--resume', str(result.parent)]) == 1
    assert f'{result} is not what a run measured; remove it' in capsys.readouterr().err


def test_a_checkpoint_from_before_an_option_existed_is_gone_on_with(tmp_path, capsys):
    trained(tmp_path)
    result, args = tmp_path / 'run/result.json', tmp_path / 'run/args.yaml'
    expected = json.loads(result.read_text())['last']
    result.unlink()
    file = next(result.parent.glob('checkpoint-*.pth.tar'))
    state = torch.load(file, weights_only=True)
    del state['recipe']['smoothing']
    torch.save(state, file)
    task = yaml.safe_load(args.read_text())
    del task['recipe']['smoothing']
    args.write_text(yaml.safe_dump(task))
    assert main(['train', '--resume', str(args.parent)]) == 0
    assert json.loads(result.read_text())['last'] == expected
    result.unlink()
    task['recipe']['lr'] = 0.7
    args.write_text(yaml.safe_dump(task))
    assert main(['train', '--resume', str(args.parent)]) == 1
    assert '(differing: lr); resume a run in its own folder' in capsys.readouterr().err


@pytest.mark.parametrize('interrupted', [False, True])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path, capsys, monkeypatch, interrupted
):
    monkeypatch.setattr(Trainer, 'evaluate', poison_after(Trainer.evaluate, interrupted))
    assert main(train_args(tmp_path)) == 1
    assert 'the loss is nan in epoch 2; give a smaller --lr' in capsys.readouterr().err
    weights, state = checkpoints.read_checkpoint(tmp_path / 'run', [''])
    assert state['epoch'] == 1
    assert all(w.isfinite().all() for w in weights[''].values())


def poison_after(evaluate, interrupted):
    def poisoned(trainer):
        def loss_fn(output, labels):
            if interrupted:
                signal.raise_signal(signal.SIGINT)
            return output.sum() * torch.nan

        trainer.loss_fn = loss_fn
        return evaluate(trainer)

    return poisoned
