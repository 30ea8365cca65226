"""The benchmark scripts: what they count, and what they refuse. Nothing here depends on time."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / 'scripts' / 'benchmark.py'
SMALL = ['--models', 'awm_resnet14_cifar', 'adaresnet14_cifar', '--batch-size', '2', '--rounds', '2', '--warmup', '1']


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch):
    module = script(PATH)
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


def test_quartiles_of_two_rounds_lie_between_them(benchmark, monkeypatch, tmp_path):
    times = iter([10.0, 10.0, 11.0, 10.0])  # the order rotates: plain, awm; awm, plain
    monkeypatch.setattr(benchmark.module, 'timed', lambda step, device: next(times))
    assert benchmark('--models', 'awm_resnet14_cifar', *SMALL[3:], '--json', str(tmp_path / 'rows.json')) == 0
    assert json.loads((tmp_path / 'rows.json').read_text())['rows'][1]['ratio'] == pytest.approx([1.025, 1.05, 1.075])


def test_nets_are_compared_once_on_images_of_one_size(benchmark, tmp_path):
    run = ['--models', *2 * ['awm_resnet14_cifar.digits'], '--batch-size', '2', '--rounds', '2', '--warmup', '1']
    assert benchmark(*run, '--json', str(tmp_path / 'rows.json')) == 0
    plain, awm = json.loads((tmp_path / 'rows.json').read_text())['rows']  # digits alone are of 8x8 pixels and grey
    assert awm['macs'] == pytest.approx(plain['macs'], rel=0.01)
    assert awm['bound'] > 1


def test_a_bottleneck_in_eval_pools_a_quarter_of_its_branch(benchmark, tmp_path):
    run = ['--models', 'awm_resnet50', '--img-size', '64', '--batch-size', '1', '--rounds', '2', '--warmup', '1']
    assert benchmark(*run, '--json', str(tmp_path / 'rows.json')) == 0
    plain, awm = json.loads((tmp_path / 'rows.json').read_text())['rows']
    maps = 4 * (3 * 256 * 16 * 16 + 4 * 512 * 8 * 8 + 6 * 1024 * 4 * 4 + 3 * 2048 * 2 * 2)
    assert (awm['bound'] - 1) * plain['ms'] * 1e7 == pytest.approx(1.25 * maps)


def test_readme_table_comes_from_the_files(benchmark, tmp_path, capsys):
    setting = dict(device='cpu', threads='1', rounds='21', batch_size=None, torch='2.9', timm='1.0')
    setting |= dict(compile='False', amp='False')

    def write(name, rows, **kwargs):
        rows = [dict(model=model, ratio=ratio, saved=saved) for model, ratio, saved in rows]
        (tmp_path / name).write_text(json.dumps(dict(setting={**setting, **kwargs}, rows=rows)))
        return str(tmp_path / name)

    train = write(
        'train.json',
        [('resnet18', [1, 1, 1], 200.0), ('awm_resnet18', [1.01, 1.0204, 1.03], 210.0)],
        mode='train',
        channels_last='True',
    )
    infer = write(
        'eval.json',
        [('resnet18', [1, 1, 1], 0.0), ('awm_resnet18', [0.9, 1, 1.1], 0.0), ('adaresnet18', [0.9, 1, 1], 0.0)],
        mode='eval',
        channels_last='False',
    )
    gpu = write(
        'gpu.json',
        [('resnet18', [1, 1, 1], 0.0), ('awm_resnet18', [1, 1.1, 1.2], 0.0)],
        **dict(mode='eval', device='A GPU', batch_size='256', amp='True', channels_last='False'),
    )
    amp = write(
        'amp.json',
        [('resnet18', [1, 1, 1], 0.0), ('awm_resnet18', [1.2, 1.25, 1.3], 0.0)],
        **dict(mode='eval', amp='True', channels_last='False'),
    )
    assert benchmark('--readme', infer, amp, train, gpu) == 0
    assert capsys.readouterr().out.splitlines() == [
        '| model | eval | train, channels last | saved, channels last |',
        '| --- | ---: | ---: | ---: |',
        '| awm_resnet18 | 1.000 [0.900, 1.100] | 1.020 [1.010, 1.030] | 1.050 |',
        '| adaresnet18 | 1.000 [0.900, 1.000] | - | - |',
        '',
        'Measured on: cpu, 1 thread, 21 rounds, torch 2.9, timm 1.0.',
        '',
        '| model | eval, amp |',
        '| --- | ---: |',
        '| awm_resnet18 | 1.250 [1.200, 1.300] |',
        '',
        'Measured on: cpu, 1 thread, 21 rounds, torch 2.9, timm 1.0.',
        '',
        '| model | eval, amp |',
        '| --- | ---: |',
        '| awm_resnet18 | 1.100 [1.000, 1.200] |',
        '',
        'Measured on: A GPU, batches of 256, 21 rounds, torch 2.9, timm 1.0.',
    ]
    again = write('again.json', [('resnet18', [1, 1, 1], 0.0), ('awm_resnet18', [2, 2, 2], 0.0)],
                  mode='eval', channels_last='False', threads='4')  # fmt: skip
    with pytest.raises(SystemExit, match='2'):
        benchmark('--readme', infer, again)
    assert 'awm_resnet18, eval, is measured twice' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('name', 'plain'),
    [
        ('awm_resnet56_cifar', 'resnet56_cifar'),
        ('adaresnet18_released', 'resnet18_released'),
        ('awm_densenet_bc', 'densenet40_bc_cifar'),
        ('seresnet50', 'resnet50'),
        ('seresnet18', 'resnet18'),
        ('awm_resnet14_cifar.digits', 'resnet14_cifar'),
        ('awm_densenet121', 'densenet121'),
        ('resnet34', 'resnet34'),
    ],
)
def test_finds_the_plain_net(benchmark, name, plain):
    assert benchmark.module.plain_of(name) == plain


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--models', 'awm_resnet51'], 'unknown awm_resnet51'),
        (['--rounds', '1'], '--rounds: 1 has no quartiles; give 2 or more'),
        (['--mode', 'import', '--json', 'x'], '--json is of --mode eval and train'),
        (['--batch-size', '0'], '0 is not allowed; give 1 or more'),
        (['--device', 'abacus'], "--device: device 'abacus' is not to be had"),
        (['--readme', str(PATH)], 'benchmark.py is not a file that --json wrote'),
        (['--readme', 'nowhere.json'], 'nowhere.json'),
    ],
)
def test_refuses_what_it_cannot_run(benchmark, args, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        benchmark(*args)
    assert message in capsys.readouterr().err


@pytest.fixture
def deploy(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    module = script(PATH.with_name('benchmark_deploy.py'))
    monkeypatch.setattr(module.torch, 'set_num_threads', lambda n: None)
    return module


@pytest.mark.parametrize(
    'name', ['resnet14_cifar', 'awm_resnet14_cifar', 'adaresnet14_cifar', 'awm_densenet22_bc_cifar']
)
def test_nothing_of_a_deployed_net_is_left_out_by_zeros(deploy, name):
    net = deploy.trained(name, (3, 32, 32))
    zeros = {path for path, parameter in net.named_parameters() if not parameter.any()}
    assert all(path.endswith('.bias') for path in zeros)


def test_deployed_forms_compute_what_the_nets_do(deploy, monkeypatch, capsys):
    args = ['--models', 'awm_resnet14_cifar', '--forms', 'eager', 'onnx', 'int8', '--rounds', '2', '--warmup', '1']
    monkeypatch.setattr('sys.argv', ['benchmark_deploy.py', *args])
    try:
        assert deploy.main() == 0
    finally:
        deploy.logging.disable(deploy.logging.NOTSET)
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [form, name] for form in ('eager', 'onnx', 'int8') for name in ('resnet14_cifar', 'awm_resnet14_cifar')
    ]
    for form, _, _, _, error in rows:
        least, most = {'eager': (0, 0), 'onnx': (0, 1e-4), 'int8': (1e-4, 0.1)}[form]
        assert least <= float(error) <= most


def test_ways_of_training_are_compared_round_by_round(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    train = script(PATH.with_name('benchmark_train.py'))
    speeds = {f'{train.TIMM} -j 0': [90.0, 80.0], f'{train.TIMM} -j 2': [100.0, 200.0], train.OURS: [200.0, 600.0]}
    rows = train.rows_of('resnet18', speeds)
    for row, ratio in zip(rows, ([0.525, 0.65, 0.775], [1, 1, 1], [2.25, 2.5, 2.75])):
        assert row['ratio'] == pytest.approx(ratio)
    assert train.table(rows[2:]).splitlines() == [
        '| model | way | images/s [quartiles] | ratio [quartiles] |',
        '| --- | --- | --- | --- |',
        '| resnet18 | `weighted-skip train` | 400 [300, 500] | 2.50 [2.25, 2.75] |',
    ]
