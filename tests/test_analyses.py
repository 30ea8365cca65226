"""The papers' analyses, on numbers whose outcome is known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from timm_weighted_skip.analysis.collect import Collected
from timm_weighted_skip.analysis.curves import curves, read_run, sweep
from timm_weighted_skip.analysis.discriminate import bootstrap_interval, discriminate
from timm_weighted_skip.analysis.extremes import extreme_images
from timm_weighted_skip.analysis.figures import render
from timm_weighted_skip.analysis.inspection import gate_table, rounds_table
from timm_weighted_skip.analysis.report import html_report
from timm_weighted_skip.analysis.tables import Result, Table
from timm_weighted_skip.analysis.variance import group_variance
from timm_weighted_skip.train.recipe import read_yaml

# arXiv 2408.09958, Tables I and II: the learned weights of 8 units in three rounds, as the report has them.
MANIFEST = Path(__file__).resolve().parent.parent / 'scripts/reproduce/manifest.yaml'
CIFAR10, MNIST = (
    np.array(read_yaml(MANIFEST)['experiments'][name]['runs']['separate']['paper_weights'])
    for name in ('ada-released-cifar10', 'ada-released-mnist-01')
)
UNITS = [f'layer{s}.{b}' for s in range(1, 5) for b in range(2)]


def collected(weights, labels, kinds=None, predictions=None, **controls):
    weights = np.asarray(weights, np.float32)
    units = [f'layer1.{u}' for u in range(weights.shape[1])]
    labels = np.asarray(labels)
    kinds = kinds or ['identity'] * len(units)
    predictions = labels if predictions is None else np.asarray(predictions)
    return Collected(units, kinds, np.full(len(units), 0.5), weights, labels, predictions, controls)


def test_variance_of_the_papers_tables():
    result = group_variance({'cifar10': CIFAR10, 'mnist': MNIST}, UNITS)
    value = {(row[0], row[1]): row[3] for row in result.tables['variance'].rows}
    assert value['within', 'cifar10'] == pytest.approx(0.0074349, abs=5e-8)
    assert value['within', 'mnist'] == pytest.approx(0.0112865, abs=5e-8)
    assert value['between', 'cifar10, mnist'] == pytest.approx(0.1204970, abs=5e-8)
    by_unit = result.tables['variance_units'].records()
    for name in ('cifar10', 'mnist'):
        assert np.mean([row[f'{name} variance'] for row in by_unit]) == pytest.approx(value['within', name])


def test_variance_refuses_groups_that_do_not_compare():
    with pytest.raises(ValueError, match="'b' has 7 mapping units where 8"):
        group_variance({'a': CIFAR10, 'b': MNIST[:7]}, UNITS)
    with pytest.raises(ValueError, match="'a' has 1 round;"):
        group_variance({'a': CIFAR10[:, :1]}, UNITS)


def test_rounds_side_by_side_with_their_mean():
    nets = [timm.create_model('adaresnet14_cifar', skip_init=init) for init in (0.25, -1.0)]
    table = rounds_table(nets).tables['weights']
    assert table.columns == ['unit', 'kind', 'round_1', 'round_2', 'mean']
    assert table.rows[2] == ['layer2.0', 'projection', 0.25, -1.0, -0.375]
    with pytest.raises(ValueError, match=r'net 2 has 9 mapping units and net 1 has 6.*one model'):
        rounds_table([nets[0], timm.create_model('adaresnet20_cifar')])
    with pytest.raises(ValueError, match='net 2 is an AWM net'):
        rounds_table([nets[0], timm.create_model('awm_resnet14_cifar')])


def test_statistics_of_gates_over_images_and_classes():
    read = collected([[0.2, 0.5], [0.4, 0.5], [0.9, 0.5]], [0, 0, 2], predictions=[0, 1, 2])
    result = gate_table(read, ['cat', 'dog', 'eel'])
    assert read.accuracy == pytest.approx(200 / 3)
    first, second = (row[3:] for row in result.tables['weights'].rows)
    assert first == pytest.approx([0.5, 0.26 / 3, 0.2, 0.9], abs=1e-6)
    assert second == pytest.approx([0.5, 0, 0.5, 0.5])
    by_class = {(row[0], row[1]): row[2:] for row in result.tables['classes'].rows}
    assert set(by_class) == {(unit, name) for unit in ('layer1.0', 'layer1.1') for name in ('cat', 'eel')}
    assert by_class['layer1.0', 'cat'] == pytest.approx([2, 0.3, 0.01, 0.2, 0.4], abs=1e-6)

    weights = np.float32(0.5) + np.float32(1e-6) * np.random.default_rng(0).normal(size=(50_000, 1))
    mean, variance = gate_table(collected(weights + 3e-4, [0] * 50_000)).tables['weights'].rows[0][3:5]
    assert mean == pytest.approx(0.5003, rel=1e-7)  # numpy adds up float32 in float32
    assert variance == pytest.approx(1e-12, rel=0.1)


def test_extremes_are_the_images_of_the_lowest_and_highest_sums():
    weights = [[0.5, 0.5], [0.1, 0.2], [0.9, 0.9], [0.3, 0.1], [0.8, 0.9]]
    pictures = []
    result = extreme_images(
        collected(weights, [0, 1, 0, 1, 0], predictions=[0, 1, 1, 0, 0]),
        ['cat', 'dog'],
        lambda i: pictures.append(i) or Image.new('L', (4, 4)),
        2,
    )
    rows = [(row[0], *row[2:5]) for row in result.tables['extremes'].rows]
    assert rows == [
        ('lowest', 1, 'dog', 'dog'),
        ('lowest', 3, 'dog', 'cat'),
        ('highest', 2, 'cat', 'dog'),
        ('highest', 4, 'cat', 'cat'),
    ]
    assert pictures == [1, 3, 2, 4]
    with pytest.raises(ValueError, match='DenseNet'):
        extreme_images(collected(weights, [0] * 5, ['concat'] * 2), ['cat'], lambda i: None)


def test_grey_images_are_drawn_as_they_are_and_names_stay_in_legends():
    result = extreme_images(collected([[0.1], [0.9]], [0, 0]), ['cat'], lambda i: Image.new('L', (4, 4), 100 + i), 1)
    drawn = [axes.images[0] for axes in result.figures['extremes']().axes if axes.images]
    assert [image.get_clim() for image in drawn] == [(0, 255)] * 2
    (axes,) = group_variance({'_a': CIFAR10, 'b': MNIST}, UNITS).figures['variance']().axes
    assert [text.get_text().split(':')[0] for text in axes.get_legend().get_texts()] == [r'$\_$a', 'b']


def blobs(rng, images, spread, classes=4, dims=6):
    means = np.random.default_rng(1).normal(size=(classes, dims))
    labels = np.arange(images) % classes
    return means[labels] + spread * rng.normal(size=(images, dims)), labels


def test_separate_classes_are_identified_and_noise_is_at_chance():
    rng = np.random.default_rng(0)
    sets = []
    for images in (400, 400):
        weights, labels = blobs(rng, images, 0.01)
        sets.append(collected(weights, labels, noise=rng.normal(size=(images, 5))))
    result = discriminate(*sets, max_rank=10)
    rate = {(row[0], row[1]): row[2:] for row in result.tables['discriminate'].rows}
    assert rate['weights', 1] == pytest.approx([100, 100, 100])
    assert max(rank for _, rank in rate) == 4  # all classes
    assert rate['noise', 4][0] == 100
    assert result.tables['discriminate_dimensions'].rows[0][3] == 3  # one less than the classes
    kept = discriminate(*sets, dims=2).tables['discriminate_dimensions']
    assert [row[3] for row in kept.rows] == [2, 2]
    for rank in (1, 2, 3):
        _, low, high = rate['noise', rank]
        assert low < 25 * rank < high
        assert high - low < 12
    gain, low, high = result.tables['discriminate_differences'].rows[0][1:]
    assert low <= gain <= high
    assert gain == pytest.approx(np.mean([rate['weights', k][0] - rate['noise', k][0] for k in range(1, 5)]))


def test_units_that_move_little_count_as_much_as_others():
    rng = np.random.default_rng(0)
    sets = []
    for _ in range(2):
        weights, labels = blobs(rng, 200, 0.01)
        loud = rng.normal(size=(200, 1)) * 1e3
        sets.append(collected(np.hstack([weights * 1e-2, loud]), labels))
    assert discriminate(*sets).tables['discriminate'].rows[0][2] == 100


def test_of_random_draws_the_mean_counts():
    rng = np.random.default_rng(0)
    sets = []
    for _ in range(2):
        weights, labels = blobs(rng, 400, 0.01)
        noise = rng.normal(size=(400, 6))
        sets.append(collected(noise, labels, draws=np.stack([weights, noise], axis=1)))
    tables = discriminate(*sets).tables
    rate = {(row[0], row[1]): row[2] for row in tables['discriminate'].rows}
    (_, _, good, good_mean), (_, _, bad, _) = tables['discriminate_draws'].rows
    assert (good, good_mean, bad) == (100, 100, rate['weights', 1])
    assert rate['draws', 1] == pytest.approx((good + bad) / 2)


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, images, tries = 0.3, 200, 300
    covered = 0
    for _ in range(tries):
        low, high = bootstrap_interval(rng.random(images) < truth, rng)
        covered += low <= truth <= high
    assert 0.90 < covered / tries < 0.99


def test_discriminate_refuses_what_tells_nothing():
    weights, labels = blobs(np.random.default_rng(0), 40, 0.1)
    good = collected(weights, labels)
    with pytest.raises(ValueError, match='same weights: the gates have not been trained'):
        discriminate(collected(np.full((40, 3), 0.5), labels), good)
    with pytest.raises(ValueError, match='no training image is of class 9, and a test image is'):
        discriminate(good, collected(weights, np.where(labels == 0, 9, labels)))
    with pytest.raises(ValueError, match='all training images are of one class'):
        discriminate(collected(weights, 0 * labels), good)
    with pytest.raises(ValueError, match='max_rank=0'):
        discriminate(good, good, max_rank=0)


def write_run(folder, top1, phases, **result):
    folder.mkdir(parents=True)
    lines = [
        {'epoch': e, 'phase': phase, 'loss': 1.0, 'lr': 0.1, 'test_loss': 0.5, 'test_top1': value}
        for e, (value, phase) in enumerate(zip(top1, phases))
    ]
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if result:
        (folder / 'result.json').write_text(json.dumps(result))
    return read_run(folder)


def test_a_run_is_read_under_timms_names(tmp_path):
    run = write_run(tmp_path / 'a', [40, 60, 50, 55, 58], ['backbone', 'gates', 'gates', 'backbone', 'gates'])
    assert run.values('eval_top1').tolist() == [40, 60, 50, 55, 58]
    assert run.values('train_loss').tolist() == [1.0] * 5
    assert np.isnan(run.values('train_top1')).all()
    assert run.gate_phases() == [(1, 2), (4, 4)]
    assert curves([run]).tables['runs'].rows == [['a', '-', 5, 58, 60]]
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1\n0,1.5,1.2,40\n1,1.1,,\n')
    run = read_run(tmp_path / 'timm')
    assert run.test_top1() == (40, 40)
    assert run.log[1] == {'epoch': 1, 'train_loss': 1.1}
    with (tmp_path / 'timm' / 'summary.csv').open('a') as file:  # as a resumed run goes on
        file.write('epoch,train_loss,lr,eval_loss,eval_top1\n1,1.0,0.1,0.9,50\n2,0.8,0.1,0.7,60\n')
    run = read_run(tmp_path / 'timm')
    assert run.log[1:] == [
        {'epoch': 1, 'train_loss': 1.0, 'lr': 0.1, 'eval_loss': 0.9, 'eval_top1': 50},
        {'epoch': 2, 'train_loss': 0.8, 'lr': 0.1, 'eval_loss': 0.7, 'eval_top1': 60},
    ]
    with pytest.raises(ValueError, match='a run is given twice'):
        curves([run, run])


def test_of_long_curves_the_steep_start_takes_no_room(tmp_path):
    run = write_run(tmp_path / 'a', [10, 20, *range(80, 98)], ['backbone'] * 20)
    short = write_run(tmp_path / 'b', [30, 85], ['backbone'] * 2)
    top = curves([run]).figures['curves']().axes[0]
    assert 70 < top.get_ylim()[0] < 80 < 97 < top.get_ylim()[1] < 100
    assert curves([run, short]).figures['curves']().axes[0].get_ylim()[0] < 30


def test_a_sweep_averages_over_seeds(tmp_path):
    runs = [
        write_run(tmp_path / f'{model}{t}{seed}', [95, 91 - t + seed], 'ab', model=model, recipe={'t': t})
        for model in ('awm_resnet20', 'awm_resnet8')
        for t in (3, 0)
        for seed in (0, 2)
    ]  # fmt: skip
    rows = sweep(runs, 'recipe.t').tables['sweep'].rows
    assert [row[:3] for row in rows] == [[model, t, 2] for model in ('awm_resnet20', 'awm_resnet8') for t in (0, 3)]
    assert rows[0][3:] == pytest.approx([8, 2**0.5, 5])
    rows = sweep(runs, 'depth').tables['sweep'].rows
    assert [row[:3] for row in rows] == [['awm_resnet', depth, 4] for depth in (8, 20)]
    with pytest.raises(ValueError, match=r"has no 'recipe\.lr'; there is t"):
        sweep(runs, 'recipe.lr')


def test_damaged_and_missing_logs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'neither log\.jsonl nor summary\.csv'):
        read_run(tmp_path)
    (tmp_path / 'log.jsonl').write_text('{"epoch": 0}\n{"epo')
    with pytest.raises(ValueError, match='the log cannot be read'):
        read_run(tmp_path)
    for log, result in (('5', '{}'), ('{"epoch": 0}', '[1]')):
        (tmp_path / 'log.jsonl').write_text(log)
        (tmp_path / 'result.json').write_text(result)
        with pytest.raises(ValueError, match='something else than objects'):
            read_run(tmp_path)
    (tmp_path / 'result.json').unlink()
    logs = {'': '0 epochs', '{"epoch": null}': 'a number "epoch"', '{"epoch": 0, "test_top1": [1]}': r'eval_top1 \[1\]'}
    for log, message in logs.items():
        (tmp_path / 'log.jsonl').write_text(log)
        with pytest.raises(ValueError, match=message):
            read_run(tmp_path)


def test_every_picture_is_drawn_and_labelled(tmp_path):
    rng = np.random.default_rng(0)
    weights, labels = blobs(rng, 40, 0.3)
    read = collected(weights, labels, pixels=rng.normal(size=(40, 9)))
    run = write_run(tmp_path / 'run', [50, 60], ['backbone', 'gates'], model='awm_resnet20', seed=0)
    results = [
        rounds_table([timm.create_model('adaresnet14_cifar')] * 2),
        gate_table(read, list('abcd')),
        group_variance({'cifar10': CIFAR10, 'mnist': MNIST}, UNITS),
        extreme_images(read, list('abcd'), lambda i: Image.new('RGB', (4, 4))),
        discriminate(read, read),
        curves([run], error=True),
        sweep([run], 'depth'),
    ]
    for result in results:
        names = [path.name for path in result.save(tmp_path)]
        assert {name.split('.')[0] for name in names if name.endswith('.png')} == set(result.figures)
        for name in result.figures:
            assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
            assert b'<svg' in (tmp_path / f'{name}.svg').read_bytes()
            if name != 'extremes':
                axes = [a for a in result.figures[name]().axes if a.get_label() != '<colorbar>']
                assert all(a.get_ylabel() for a in axes)
                assert axes[-1].get_xlabel()
        for name, table in result.tables.items():
            rows = json.loads((tmp_path / f'{name}.json').read_text())['rows']
            assert rows == json.loads(json.dumps(table.records()))
            assert len((tmp_path / f'{name}.csv').read_text().splitlines()) == len(table.rows) + 1


def test_many_runs_and_classes_stay_legible(tmp_path):
    def height(runs):
        figure = curves(runs).figures['curves']()
        figure.draw_without_rendering()
        return figure.axes[0].get_window_extent().height

    long = 'a_name_of_more_than_twenty_four_letters'
    runs = [write_run(tmp_path / f'{long}{i}', [50], ['joint'], model='resnet20') for i in range(20)]
    assert height(runs) > 0.9 * height(runs[:2])

    images = 300
    read = collected(np.full((images, 3), 0.5), np.arange(images))
    axes = gate_table(read, [f'class {k}' for k in range(images)]).figures['classes']().axes[0]
    assert axes.get_ylabel() == 'class (number, from 0)'
    assert len(axes.get_yticks()) < 20


def test_the_same_numbers_draw_the_same_file():
    draw = group_variance({'cifar10': CIFAR10}, UNITS).figures['variance']
    assert render(draw(), 'svg') == render(draw(), 'svg')


def test_a_report_refers_to_nothing_outside_itself_and_escapes():
    read = collected(*blobs(np.random.default_rng(0), 40, 0.3))
    page = html_report('<a> & b', {'Weights': gate_table(read), 'Facts': Result({'name': '<script>'}, {})})
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links
    assert all(link.startswith(('data:image/', '#')) for link in links)
    assert not re.search(r'url\(|@import|<script', page)
    assert '&lt;a&gt; &amp; b' in page


def test_of_a_long_table_the_terminal_shows_both_ends():
    table = Table(['epoch', 'loss'], [[epoch, 0.5] for epoch in range(350)])
    lines = table.text().splitlines()
    assert lines[1].split()[0] == '0'
    assert lines[-1].split()[0] == '349'
    (said,) = (line for line in lines if 'more' in line)
    assert len(lines) - 2 + int(said.split()[1]) == 350
    assert len(table.csv().splitlines()) == 351
    whole = Table(['epoch'], [[epoch] for epoch in range(120)]).text().splitlines()
    assert [*map(int, whole[1:])] == [*range(120)]


def test_a_sweep_of_the_period_draws_no_period_apart(tmp_path):
    runs = [
        write_run(tmp_path / f'{t}{seed}', [80 + seed], ['joint'], model='awm', recipe={'alternate_freeze': t})
        for t in (0, 3)
        for seed in (0, 1)
    ]
    (axes,) = sweep(runs, 'recipe.alternate_freeze').figures['sweep']().axes
    assert [*axes.get_xticks()] == [3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['awm, together', 'awm']


def test_a_cell_of_markdown_stays_one():
    assert Table(['a'], [['x | <b>\ny']]).markdown() == '| a |\n| --- |\n| x \\| &lt;b&gt; y |'


def test_json_has_no_numbers_that_are_not_finite():
    assert Table(['a', 'b'], [[float('nan'), 1.0]]).records() == [{'a': None, 'b': 1.0}]
