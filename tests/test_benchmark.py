"""The benchmark script: what it counts, and what it refuses. Nothing here depends on time."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / 'scripts' / 'benchmark.py'
SMALL = ['--models', 'awm_resnet14_cifar', 'adaresnet14_cifar', '--batch-size', '2', '--rounds', '2', '--warmup', '1']


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location('benchmark', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'copy_speed', lambda device: 1e7)
    monkeypatch.setattr(module.torch, 'set_num_threads', lambda n: None)

    def run(*args):
        monkeypatch.setattr('sys.argv', ['benchmark.py', *args])
        return module.main()

    run.module = module
    return run


def test_compares_with_the_plain_net(benchmark, tmp_path, capsys):
    assert benchmark(*SMALL, '--mode', 'train', '--json', str(tmp_path / 'rows.json')) == 0
    plain, awm, ada = json.loads((tmp_path / 'rows.json').read_text())['rows']
    assert [row['model'] for row in (plain, awm, ada)] == ['resnet14_cifar', 'awm_resnet14_cifar', 'adaresnet14_cifar']
    assert plain['ratio'] == [1, 1, 1]
    # A weight's gradient needs the shortcut, which is new to what is kept where it is a projection.
    projected = 2 * 4 * (32 * 16 * 16 + 64 * 8 * 8) / 2**20
    assert ada['saved'] - plain['saved'] == pytest.approx(projected, abs=0.001)
    assert awm['saved'] - plain['saved'] == pytest.approx(projected, abs=0.05)
    # In 6 units AWM reads both maps once more forward, and moves 4 maps more backward; Ada 2 more backward.
    maps = 2 * 4 * 2 * (16 * 32 * 32 + 32 * 16 * 16 + 64 * 8 * 8)
    assert (awm['bound'] - 1) * plain['ms'] * 1e7 == pytest.approx(6 * maps)
    assert (ada['bound'] - 1) * plain['ms'] * 1e7 == pytest.approx(2 * maps)
    assert '| awm_resnet14_cifar | 0.183 | 26.7 |' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('name', 'plain'),
    [
        ('awm_resnet56_cifar', 'resnet56_cifar'),
        ('adaresnet18_released', 'resnet18_released'),
        ('awm_densenet_bc', 'densenet40_bc_cifar'),
        ('seresnet50', 'resnet50'),
        ('resnet34', 'resnet34'),
    ],
)
def test_finds_the_plain_net(benchmark, name, plain):
    assert benchmark.module.plain_of(name) == plain


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--models', 'awm_resnet51'], 'unknown awm_resnet51'),
        (['--rounds', '1'], '--rounds 1 has no quartiles; give 2 or more'),
        (['--batch-size', '0'], '0 is not allowed; give 1 or more'),
    ],
)
def test_refuses_what_it_cannot_run(benchmark, args, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        benchmark(*args)
    assert message in capsys.readouterr().err
