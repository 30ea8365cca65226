"""The runner of the reproduction: its manifest, its resuming, and what its report computes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import timm

from timm_weighted_skip.cli import build_parser
from timm_weighted_skip.hub.checkpoint import validate_checkpoint
from timm_weighted_skip.train.task import task_of

SCRIPTS = Path(__file__).resolve().parent.parent / 'scripts'

MANIFEST = """
experiments:
  small:
    title: Two small nets on digits
    data: digits
    recipe: awm_cifar_short
    seeds: [0, 1]
    options: {epochs: 2, batch_size: 64, pad_crop: 0, torchcompile: false, lr: 0.02}
    runs:
      plain: {model: resnet14_cifar, options: {alternate_freeze: 0}, paper: 90.5}
      awm: {model: awm_resnet14_cifar, options: {alternate_freeze: 1}, baseline: plain, checkpoint: true}
"""


@pytest.fixture
def modules(monkeypatch):
    """The scripts' modules of manifest and report."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import reproduce_manifest
    import reproduce_report

    return reproduce_manifest, reproduce_report


def start(folder, *args):
    command = [sys.executable, str(SCRIPTS / 'reproduce.py'), '--manifest', str(folder / 'manifest.yaml')]
    command += ['--jobs', '2', *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


def reproduce(folder, *args):
    process = start(folder, *args)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.terminate()  # out of time, its trainings would go on
    return process.returncode, out, err


@pytest.fixture
def called(modules, monkeypatch, capsys):
    """Runs the script in this process, where torch is imported already; gives the status and what it says."""
    import reproduce

    def call(folder, *args):
        command = ['reproduce.py', '--manifest', str(folder / 'manifest.yaml'), '--jobs', '2', *args]
        monkeypatch.setattr('sys.argv', command)
        monkeypatch.chdir(folder)
        return reproduce.main(), ''.join(capsys.readouterr())

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)


def test_a_run_that_another_runner_took_first_is_left_to_it(tmp_path, modules, called, monkeypatch):
    import reproduce

    (tmp_path / 'manifest.yaml').write_text(MANIFEST)
    seen = iter([False])  # its process takes the lock once it has started
    monkeypatch.setattr(reproduce, 'busy', lambda folder: next(seen, True))
    refused = [sys.executable, '-c', 'raise SystemExit(1)']
    monkeypatch.setattr(
        reproduce, 'start', lambda job, runs, *_: reproduce.Process(job, runs / job.name, subprocess.Popen(refused), 0)
    )
    status, said = called(tmp_path, '--only', 'small/awm/seed0')
    assert (status, 'small/awm/seed0 is being trained by another process' in said) == (0, True)
    assert '0 runs finished, 0 failed, 1 left' in said


def test_every_run_of_the_manifest_is_a_command_that_asks_for_it(modules):
    manifest = modules[0].read_manifest(SCRIPTS / 'reproduce' / 'manifest.yaml')
    for job in manifest.jobs():
        args = build_parser().parse_args(['train', *job.run.arguments(), '--seed', str(job.seed)])
        task, seeds, _ = task_of(args)
        assert (task.model, task.data, task.recipe_name, seeds) == (
            job.run.model,
            job.run.data,
            job.run.recipe,
            [job.seed],
        )
        assert task.recipe == job.run.recipe_of(job.seed)


def test_baselines_are_trained_as_long_on_the_same_data(modules):
    manifest = modules[0].read_manifest(SCRIPTS / 'reproduce' / 'manifest.yaml')
    compared = [(plain, run) for run in manifest.runs.values() if (plain := manifest.baseline(run))]
    assert len(compared) > 20
    for plain, run in compared:
        assert (plain.data, plain.recipe, plain.epochs(), plain.seeds) == (
            run.data,
            run.recipe,
            run.epochs(),
            run.seeds,
        )


def test_a_checkpoint_directory_has_one_run(modules):
    manifest = modules[0].read_manifest(SCRIPTS / 'reproduce' / 'manifest.yaml')
    runs = [run for run in manifest.runs.values() if run.checkpoint]
    assert len({(run.model, run.data) for run in runs}) == len(runs)


def test_runs_are_worked_off_once_reported_and_made_into_checkpoints(tmp_path, modules, called):
    (tmp_path / 'manifest.yaml').write_text(MANIFEST)
    status, out, err = reproduce(tmp_path, '--only', '*/seed0')
    assert (status, '2 runs finished, 0 failed, 0 left' in out) == (0, True), err
    status, said = called(tmp_path)
    assert (status, '2 runs finished' in said) == (0, True), said  # those of seed 1
    assert 'nothing to do' in called(tmp_path)[1]
    status, said = called(tmp_path, '--only', '*/seed2')
    assert (status, "no run matches --only '*/seed2'" in said) == (1, True)

    read_manifest, report = modules[0].read_manifest, modules[1]
    manifest = read_manifest(tmp_path / 'manifest.yaml')
    results = report.read_results(manifest, manifest.experiments['small'].runs['awm'])
    assert list(results) == [0, 1]
    for seed, result in results.items():
        kept = json.loads((tmp_path / f'runs/small/awm/seed{seed}/result.json').read_text())
        assert {name: result[name] for name in kept} == kept
        assert [(line['epoch'], line['phase']) for line in result['curve']] == [(0, 'backbone'), (1, 'gates')]

    readme, sections = tmp_path / 'README.md', tmp_path / 'REPORT.md'
    sections.write_text(''.join(f'# {n}\n<!-- {n} -->\n<!-- /{n} -->\nkept\n' for n in ('small', 'variance', 'runs')))
    readme.write_text(
        ''.join(f'<!-- {name} -->\nold\n<!-- /{name} -->\nkept\n' for name in ('checkpoints', 'reproduction'))
    )
    # Of another manifest than the repository's the README is left alone.
    assert (called(tmp_path, '--report'), readme.read_text().count('old')) == ((0, ''), 2)
    text = sections.read_text()
    assert text.count('kept') == 3
    assert '<!-- small -->\n## Two small nets on digits\n\n| run |' in text
    assert '| awm | 2 |' in text
    assert all((tmp_path / path).is_file() for path in ('figures/small-curves.svg', 'figures/small-awm-weights.svg'))
    report.write_report(manifest)
    assert sections.read_text() == text  # the same results, the same report

    cards = tmp_path / 'hub_cards'
    assert called(tmp_path, '--checkpoints')[0] == 0
    (folder,) = cards.iterdir()
    assert folder.name == 'awm_resnet14_cifar.digits'
    params = sum(p.numel() for p in validate_checkpoint(folder).parameters())
    measured = json.loads((folder / 'config.json').read_text())['results']
    assert measured['top1'] == [round(result['last']['top1'], 2) for result in results.values()]
    assert list(measured['comparison']) == ['resnet14_cifar']
    report.write_readme(manifest, readme, cards)
    assert (readme.read_text().count('old'), readme.read_text().count('kept')) == (0, 2)
    (line,) = (line for line in readme.read_text().splitlines() if '[awm_resnet14_cifar.digits]' in line)
    assert line.endswith(f'| {params / 1e6:.3f} | 1.7 |')  # of one channel and 8 x 8 pixels
    assert '| Two small nets on digits | awm | ' in readme.read_text()

    weights = (folder / 'model.safetensors').read_bytes()
    (tmp_path / 'results/small/awm.seed1.json').unlink()
    report.write_checkpoints(manifest, tmp_path / 'runs', cards)
    validate_checkpoint(folder)
    assert json.loads((folder / 'config.json').read_text())['results']['top1'] == measured['top1'][:1]
    assert f'{measured["top1"][0]:.2f} (n=1)' in (folder / 'README.md').read_text()
    assert (folder / 'model.safetensors').read_bytes() == weights

    # The same net trained in another way is compared by what it is about.
    together = (
        '      together: {model: awm_resnet14_cifar, options: {alternate_freeze: 0}, baseline: plain, about: at once}\n'
    )
    (tmp_path / 'manifest.yaml').write_text(MANIFEST + together)
    of_awm, of_together = (tmp_path / f'results/small/{name}.seed0.json' for name in ('awm', 'together'))
    of_together.write_text(of_awm.read_text().replace('"alternate_freeze": 1', '"alternate_freeze": 0'))
    report.write_checkpoints(read_manifest(tmp_path / 'manifest.yaml'), tmp_path / 'runs', cards)
    comparison = json.loads((folder / 'config.json').read_text())['results']['comparison']
    assert list(comparison) == ['resnet14_cifar', 'awm_resnet14_cifar (at once)']

    # Another training's accuracies are not put beside these weights, be it of the same command elsewhere.
    measured_here = of_awm.read_text()
    own = json.loads(measured_here)['last']['top1']
    of_awm.write_text(measured_here.replace(f'"top1": {own}', '"top1": 12.34'))
    with pytest.raises(ValueError, match=rf'with {own:.2f} %, not of .* with 12\.34 %; remove it first'):
        report.write_checkpoints(manifest, tmp_path / 'runs', cards)
    of_awm.write_text(measured_here)
    (tmp_path / 'manifest.yaml').write_text(MANIFEST.replace('lr: 0.02', 'lr: 0.03'))
    for file in (tmp_path / 'results').rglob('*.json'):
        file.write_text(file.read_text().replace('"lr": 0.02', '"lr": 0.03'))
    config = (folder / 'config.json').read_bytes()
    with pytest.raises(ValueError, match=r'lr 0\.02.*, not of .*lr 0\.03.*; remove it first'):
        report.write_checkpoints(read_manifest(tmp_path / 'manifest.yaml'), tmp_path / 'runs', cards)
    assert (folder / 'config.json').read_bytes() == config


def test_pixel_means_that_were_left_to_the_images_are_compared_by_their_numbers(tmp_path, modules):
    def check(options):
        (tmp_path / 'manifest.yaml').write_text(MANIFEST.replace('options: {epochs', f'options: {{{options}, epochs'))
        job = next(modules[0].read_manifest(tmp_path / 'manifest.yaml').jobs('small/plain/seed0'))
        recipe = {**asdict(job.run.recipe_of(0)), 'mean': None, 'std': None}
        trained = {'model': job.run.model, 'data': job.run.data, 'recipe': recipe}
        job.check({**trained, 'mean': [0.13066047627384283], 'std': [0.3081078072199759]}, tmp_path)

    check('mean: [0.13066], std: [0.308108]')
    with pytest.raises(ValueError, match=r'mean \[0\.13066\], not \[0\.0\]; remove'):
        check('mean: [0], std: [0.308108]')


def test_what_was_trained_otherwise_is_not_this_run(tmp_path, called):
    (tmp_path / 'manifest.yaml').write_text(MANIFEST)
    assert called(tmp_path, '--only', '*/plain/seed0')[0] == 0
    result = tmp_path / 'results/small/plain.seed0.json'
    (tmp_path / 'manifest.yaml').write_text(MANIFEST.replace('epochs: 2', 'epochs: 3'))
    for option in ('--list', '--report'):
        status, said = called(tmp_path, option)
        assert (status, f'{result} is of another training than small/plain/seed0: epochs 2, not 3' in said) == (1, True)
    result.unlink()
    status, said = called(tmp_path, '--only', '*/plain/seed0')  # nor does its folder become one
    assert (status, '0 runs finished, 1 failed, 0 left' in said) == (1, True)
    assert 'seed0 is of another training than small/plain/seed0: epochs 2, not 3; remove it first' in said
    assert not result.exists()


def test_a_start_that_was_refused_starts_anew(tmp_path, called):
    (tmp_path / 'manifest.yaml').write_text(MANIFEST.replace('data: digits', 'data: cifar10'))
    for folder in ('a', 'b'):
        status, said = called(tmp_path, '--only', '*/plain/seed0', '--data-dir', str(tmp_path / folder))
        assert (status, str(tmp_path / folder) in said) == (1, True), said


def test_killed_and_interrupted_it_goes_on(tmp_path):
    (tmp_path / 'manifest.yaml').write_text(MANIFEST.replace('epochs: 2', 'epochs: 6'))
    log = tmp_path / 'runs/small/awm/seed0/log.jsonl'

    def wait_for_lines(count, process):
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b'\n') < count):
            time.sleep(0.01)

    for epochs, stop in ((1, signal.SIGINT), (2, signal.SIGTERM)):
        process = start(tmp_path, '--only', '*/awm/seed0')
        wait_for_lines(epochs, process)
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, '1 left; the same command goes on' in out) == (0, True), err

    settings = log.with_name('args.yaml')
    settings.write_text(settings.read_text().replace('device: cpu', 'device: cuda'))  # it goes on where it is told to
    process = start(tmp_path, '--only', '*/awm/seed0')
    wait_for_lines(3, process)
    process.kill()  # its training lives on
    process.communicate()
    status, out, err = reproduce(tmp_path, '--only', '*/awm/seed0')
    if 'small/awm/seed0 is being trained by another process' in out:
        assert (status, '0 failed, 1 left' in out) == (0, True)
        wait_for_lines(6, subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']))
        time.sleep(2)
        status, _, err = reproduce(tmp_path, '--only', '*/awm/seed0')
    assert status == 0, err
    result = json.loads((tmp_path / 'results/small/awm.seed0.json').read_text())
    assert [line['epoch'] for line in result['curve']] == list(range(6))


def test_a_report_of_some_runs_is_refused(tmp_path, called, capsys):
    with pytest.raises(SystemExit, match='2'):
        called(tmp_path, '--only', '*/seed0', '--report')
    assert '--only does not go with --report' in capsys.readouterr().err


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, called):
    (tmp_path / 'manifest.yaml').write_text(
        MANIFEST.replace('{alternate_freeze: 1}', '{alternate_freeze: 1, lr: 1e30}').replace('baseline: plain, ', '')
    )
    status, said = called(tmp_path, '--only', '*/seed0')
    assert status == 1
    assert '1 runs finished, 1 failed, 0 left' in said
    assert 'small/awm/seed0 failed: weighted-skip: the loss is nan' in said


def test_out_of_time_it_saves_and_says_what_is_left(tmp_path):
    (tmp_path / 'manifest.yaml').write_text(MANIFEST.replace('epochs: 2', 'epochs: 999'))
    status, out, err = reproduce(tmp_path, '--only', '*/plain/*', '--budget', '0.2')
    assert (status, '0 runs finished, 0 failed, 2 left' in out) == (0, True), err


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (('lr: 0.02', 'learning_rate: 0.02'), 'learning_rate'),
        (('baseline: plain', 'baseline: plane'), "run awm: baseline 'plane' is no other run; give one of small"),
        (('baseline: plain', 'baseline: awm'), "baseline 'awm' is no other run"),
        (('baseline: plain', 'baseline: small/awm'), "baseline 'small/awm' is no other run"),
        (('baseline: plain', 'baseline: large/plain'), "baseline 'large/plain' is no other run"),
        (('baseline: plain', 'baseline: 1'), 'run awm: baseline 1; give the name of a run'),
        (('alternate_freeze: 1}', 'alternate_freeze: 1, epochs: 3}'), 'baseline plain is not trained on the same data'),
        (
            ('alternate_freeze: 1}', 'alternate_freeze: 1, amp: true}'),
            'baseline plain is .* by a recipe with another amp',
        ),
        (('seeds: [0, 1]', 'seeds: [0, 0]'), r'seeds \[0, 0\]; give one or more, each once'),
        (('seeds: [0, 1]', 'seeds: [0, -1]'), 'seed=-1 is not allowed'),
        (('seeds: [0, 1]', 'seeds: [a]'), "seed='a' is not allowed"),
        (('alternate_freeze: 1}', 'clip_grad: null}'), 'clip_grad=None can not be told on the command line'),
        (('experiments:', 'variance: [a]\nexperiments:'), 'variance is no list of names with values'),
        (('  small:', '  2024:'), 'experiment 2024: its name is no text; put it in quotes'),
        (('paper: 90.5', 'paper: many'), "run plain: paper 'many'; give an accuracy in %"),
        (('paper: 90.5', 'paper_weights: [0.5]'), r'paper_weights \[0.5\]; give a list of two or more rounds'),
        (('paper: 90.5', 'paper_weights: [[1, 2], [3]]'), 'run plain: .*inhomogeneous'),
        (('    seeds:', '    tittle: Nets\n    seeds:'), 'experiment small: unknown tittle'),
        (('    seeds:', '    against: lr\n    seeds:'), "against 'lr'; give depth or recipe.FIELD"),
        (('experiments:', 'variance: {a: small/awn}\nexperiments:'), "variance a: 'small/awn' is no EXPERIMENT/RUN"),
        (('{alternate_freeze: 1}', '{model_kwargs: {hidden: 8}}'), "{'hidden': 8} make another net than awm_"),
        (('model: resnet14_cifar', 'model: resnet15_cifar'), "no model 'resnet15_cifar'"),
        (('recipe: awm_cifar_short', 'recipe: awm'), "no recipe 'awm'"),
        (('seeds: [0, 1]', 'seed: 0'), 'small'),
        (('experiments:', 'trials:'), 'no experiments'),
    ],
    ids=str,
)
def test_a_bad_manifest_is_refused(tmp_path, modules, change, message):
    (tmp_path / 'manifest.yaml').write_text(MANIFEST.replace(*change))
    with pytest.raises(ValueError, match=message):
        modules[0].read_manifest(tmp_path / 'manifest.yaml')


@pytest.mark.filterwarnings('error')
def test_verdicts(modules):
    compare = modules[1].compare
    # Welch's t by hand: means 2 and 12, both variances 1, n = 3: 10 +- 2.776 * sqrt(2/3)
    assert compare([11.0, 12, 13], [1.0, 2, 3]) == ('+10.00 [+7.73, +12.27]', 'better')
    assert compare([1.0, 2, 3], [11.0, 12, 13]) == ('-10.00 [-12.27, -7.73]', 'worse')
    assert compare([1.0, 2, 3], [1.5, 2.5, 3.5])[1] == 'within noise'
    # One side without spread, the other with a variance of 1/2 and n = 2: 1.5 +- 12.706 * sqrt(1/4)
    assert compare([2.0, 2.0], [0.0, 1.0]) == ('+1.50 [-4.85, +7.85]', 'within noise')
    assert compare([1.0], [2.0, 3.0]) == ('-1.50', 'one seed: no verdict')
    assert compare([2.0, 3.0], [1.0]) == ('+1.50', 'one seed of the baseline: no verdict')
    assert compare([2.0, 2.0], [1.0, 1.0]) == ('+1.00', 'no spread: no verdict')
    assert compare([], [1.0]) == ('-', '-')


def test_weights_beside_the_papers(modules):
    units, paper = [f'layer{s}.{b}' for s in (1, 2, 3) for b in (0, 1)], [[-0.5, 0.7]] * 6
    rounds = [{'mapping_units': {unit: {'mean': [w]} for unit in units}} for w in (-1.0, 1.2)]
    # Welch's t by hand: sizes of mean 1.1 and 0.6, both variances 0.02, n = 2: 0.5 +- 4.303 * sqrt(0.02)
    line = '| layer1.0 | 1.10 ± 0.14 (2) | 0.60 ± 0.14 (2) | +0.50 [-0.11, +1.11] |'
    assert line in modules[1].sizes_table(dict(enumerate(rounds)), paper)
    with pytest.raises(ValueError, match='shorter'):
        modules[1].sizes_table(dict(enumerate(rounds)), paper[1:])


def test_a_missing_marker_is_named_and_nothing_is_written(tmp_path, modules):
    path = tmp_path / 'REPORT.md'
    path.write_text('<!-- a -->\n<!-- /a -->\n')
    with pytest.raises(ValueError, match='<!-- b -->'):
        modules[1].fill(path, {'a': 'text', 'b': 'text'})
    assert path.read_text() == '<!-- a -->\n<!-- /a -->\n'


def test_the_report_is_that_of_the_results(modules, monkeypatch):
    """What the repository shows was made from the results that it has, and of no other."""
    manifest = modules[0].read_manifest(SCRIPTS / 'reproduce' / 'manifest.yaml')
    report, text = modules[1].Report(manifest), (SCRIPTS / 'reproduce' / 'REPORT.md').read_text()
    # The figures are drawn from the same numbers, which takes longer.
    monkeypatch.setattr(report, 'picture', lambda result, figure, name, text: f'![{text}](figures/{name}.svg)')
    for section in (*map(report.experiment, manifest.experiments.values()), report.variance(), report.runs()):
        assert section in text
    readme = (SCRIPTS.parent / 'README.md').read_text()
    assert report.summary() in readme
    assert modules[1].checkpoint_table(SCRIPTS.parent / 'hub_cards') in readme


def test_the_checkpoints_tell_what_was_measured(modules, tmp_path):
    staged = SCRIPTS.parent / 'hub_cards'
    cards = shutil.copytree(staged, tmp_path / 'hub_cards')
    manifest = modules[0].read_manifest(SCRIPTS / 'reproduce' / 'manifest.yaml')
    modules[1].write_checkpoints(manifest, tmp_path, cards)
    for file in (*cards.glob('*/config.json'), *cards.glob('*/README.md')):
        assert file.read_text() == (staged / file.relative_to(cards)).read_text()


def test_the_report_tells_what_a_run_was_trained_on_in_turn(modules, monkeypatch):
    manifest = modules[0].read_manifest(SCRIPTS / 'reproduce' / 'manifest.yaml')
    first = next(manifest.jobs())
    result = manifest.result(first)
    on_gpu = {'device': 'a GPU', 'threads': 16, 'amp': True, 'versions': {'torch': '2'}, 'commit': 'a' * 40}
    updated = {**on_gpu, 'commit': 'b' * 40 + '+'}
    on_cpu = {**updated, 'device': 'a CPU', 'threads': 1, 'amp': False}
    result = {**result, **on_cpu, 'earlier': [on_gpu, updated]}
    monkeypatch.setattr(modules[0].Manifest, 'jobs', lambda self: [first])
    monkeypatch.setattr(modules[0].Manifest, 'result', lambda self, job: result)
    where = 'a GPU, 16 threads, bfloat16, torch 2; then a CPU, 1 thread, float32, torch 2'
    assert f'| {where} | {"a" * 9} then {"b" * 9}+ |' in modules[1].Report(manifest).runs()


def test_checkpoints_of_the_manifest_are_registered(modules):
    manifest = modules[0].read_manifest(SCRIPTS / 'reproduce' / 'manifest.yaml')
    for experiment in manifest.experiments.values():
        for run in experiment.runs.values():
            if run.checkpoint and run.seeds[0] in modules[1].read_results(manifest, run):
                assert f'{run.model}.{run.data}' in timm.list_pretrained(f'{run.model}.*')
