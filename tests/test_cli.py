"""The command line: what a person sees, and one line for what they can mend."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from timm_weighted_skip import cli


def test_list_shows_costs_and_units(capsys):
    assert cli.main(['list', 'awm_resnet20*']) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[0] == 'model'
    assert row.split() == ['awm_resnet20_cifar', '0.2835', '0.0408', '9', '3x32x32', 'cifar10,', 'cifar100']


def test_unknown_name_lists_near_ones(capsys):
    assert cli.main(['list', 'awm_resnet33_cifar']) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert "'awm_resnet33_cifar'" in error
    assert 'awm_resnet32_cifar' in error


def test_an_argument_without_a_value_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(['eval', 'awm_resnet14_cifar.digits', '--model-kwargs', 'plain'])
    assert "'plain' is not NAME=VALUE" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_weighted_skip.quickstart.quickstart', lambda *args, **kwargs: interrupted(args))
    assert cli.main(['quickstart']) == 130
    assert capsys.readouterr().err == ''


def test_ctrl_c_in_the_quickstarts_training_is_no_traceback(monkeypatch, capsys, tmp_path):
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, 'step', lambda *args: os.kill(os.getpid(), signal.SIGINT) or step(*args))
    assert cli.main(['quickstart', '--epochs', '2', '--seeds', '1', '--output', str(tmp_path)]) == 130
    assert 'Traceback' not in capsys.readouterr().err


def test_quickstart_trains_both_nets_and_draws(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    assert cli.main(['quickstart', '--epochs', '4', '--period', '2', '--seeds', '1', '--output', str(tmp_path)]) == 0
    printed = capsys.readouterr()
    accuracies = [float(line.split()[2]) for line in printed.out.splitlines() if line.endswith('% (n=1)')]
    assert len(accuracies) == 2
    assert min(accuracies) > 50  # chance is 10
    assert 'layer3.1' in printed.out
    assert 'phase=gates' in printed.err
    assert (tmp_path / 'weights.png').stat().st_size > 1000


def test_quickstart_in_a_log_is_a_line_per_training(capsys, tmp_path):
    assert cli.main(['quickstart', '--epochs', '1', '--seeds', '2', '--output', str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == 'no epoch of 1 trains the gates: --period 3 begins with as many epochs of the backbone\n'
    for line, start in zip(printed.out.splitlines(), ('plain seed 0', 'AWM   seed 0', 'plain seed 1', 'AWM   seed 1')):
        assert re.fullmatch(rf'{start}: [0-9.]+ %', line)


@pytest.mark.parametrize(('argument', 'value'), [('--epochs', '0'), ('--seeds', '0'), ('--period', '-1')])
def test_quickstart_refuses_bad_numbers(argument, value, capsys):
    assert cli.main(['quickstart', argument, value]) == 1
    assert f'{argument[2:]}={value} is not' in capsys.readouterr().err


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    assert cli.main(['quickstart']) == 1
    assert "pip install 'timm-weighted-skip[analysis]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('verb', 'options', 'made'),
    [('inspect', ['--output'], 'units.csv'), ('save', ['--output'], 'config.json'), ('eval', ['--data', 'digits'], '')],
)
def test_a_reader_that_stops_early_loses_no_files(tmp_path, verb, options, made):
    folder = tmp_path / 'made'
    command = [sys.executable, '-m', 'timm_weighted_skip.cli', verb, 'awm_resnet14_cifar.digits', *options]
    command += [str(folder)] if made else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `head` does, here at once
    assert (process.stderr.read(), process.wait()) == (b'', 0)
    assert not made or (folder / made).is_file()


def test_importing_loads_nothing_heavy():
    code = 'import timm, sys; before = set(sys.modules); import timm_weighted_skip; print(*set(sys.modules) - before)'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert 'timm_weighted_skip.models.awm_resnet' in loaded
    assert [name for name in loaded if not name.startswith('timm_weighted_skip')] == []
