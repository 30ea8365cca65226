#!/usr/bin/env python3
"""Images per second of this package's trainer and of timm's train.py: same net, images, recipe, cores and precision.

    taskset -c 0,1 scripts/benchmark_train.py [--model awm_resnet20_cifar resnet20_cifar] [--json FILE]
    scripts/benchmark_train.py --device cuda --batches 400 --workers 8

Every way of training runs in a process of its own, one way after the other; a round is one turn of each. A process
trains all parameters for an epoch to warm up (and to compile), then for one that is timed, from the first image read to
the last update. Both programs pad, crop and flip alike, compute in float32 on a CPU and in bfloat16 on CUDA, and have
the cores that this process may use: for as many threads and, besides, for train.py's `--workers`, which read PNG files
where the trainer holds the images in memory. train.py is run as its user first calls it and with what makes it fastest.
The table has medians, quartiles and, round by round, the ratio to the fastest way of train.py.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import quartiles, several, with_quartiles
from PIL import Image

from timm_weighted_skip.analysis.tables import Table
from timm_weighted_skip.data import load_image_set
from timm_weighted_skip.files import write_file
from timm_weighted_skip.train import hook, launcher
from timm_weighted_skip.train.recipe import load_recipe, recipe_path
from timm_weighted_skip.train.trainer import Trainer, make_net

RECIPE = 'awm_cifar_short'
FASTEST = '--channels-last --opt-kwargs fused=True filter_bias_and_bn=False'
TIMM, OURS = "timm's train.py", 'weighted-skip train'


def make_images(count: int, folder: Path) -> None:
    """Random images of CIFAR's size as an image folder."""
    images = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    for split, part in (('train', count), ('validation', 10)):
        for i in range(part):
            path = folder / split / str(i % 10) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path)


def ways(compiled: bool, workers: Sequence[int]) -> list[str]:
    """The ways of training, each as a command line without what they have in common."""
    options = ['', FASTEST, *([f'{FASTEST} --torchcompile inductor'] if compiled else [])]
    found = [f'{TIMM} -j {count} {more}'.strip() for count in workers for more in options]
    return [*found, f'{OURS} --no-torchcompile', *([f'{OURS} --torchcompile'] if compiled else [])]


def time_timm(options: list[str], model: str, folder: Path, args: argparse.Namespace) -> float:
    """Seconds of the second epoch of timm's train.py."""
    script: Any = launcher.load_script(launcher.find_script('train', args.train_script))
    common = ['-c', str(recipe_path(RECIPE)), '--model', model, '--data-dir', str(folder), '--device', args.device]
    common += ['--epochs', '2', '--sched', 'step', '--batch-size', str(args.batch_size), '--alternate-freeze', '0']
    precision = ['--amp', '--amp-dtype', 'bfloat16'] if args.device == 'cuda' else []
    output = ['--output', str(folder / 'output'), '--experiment', str(time.time_ns())]
    sys.argv = [script.__file__, *common, *precision, *output, *options]
    hook.add_arguments(script.parser)
    hook.install(script, script._parse_args()[0])
    train_one_epoch, seconds = script.train_one_epoch, []

    def timed(*positional, **named):
        started = time.perf_counter()
        metrics = train_one_epoch(*positional, **named)
        if args.device == 'cuda':
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        return metrics

    script.train_one_epoch = timed
    logging.disable(logging.INFO)
    with contextlib.redirect_stdout(io.StringIO()):
        script.main()
    return seconds[1]


def time_ours(options: list[str], model: str, folder: Path, args: argparse.Namespace) -> float:
    """Seconds of the trainer's second epoch, which ends by reading the loss from the device."""
    data = load_image_set('folder', True, str(folder))
    recipe = load_recipe(
        RECIPE, alternate_freeze=0, batch_size=args.batch_size, torchcompile='--torchcompile' in options
    )
    trainer = Trainer(make_net(model, data), recipe, data, data, args.device)
    trainer.train_epoch()
    return trainer.train_epoch()['seconds']


def measure(way: str, model: str, folder: Path) -> float:
    """Images per second of one way, in a new process."""
    command = [sys.executable, __file__, *sys.argv[1:], '--measure', way, model, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{way} with {model} failed:\n{done.stderr}')
    return float(done.stdout.split()[-1])


def rows_of(model: str, speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """What the table tells of the images per second of every way, round by round."""
    fastest = max((way for way in speeds if way.startswith(TIMM)), key=lambda way: statistics.median(speeds[way]))
    return [
        {
            'model': model,
            'way': way,
            'images_per_second': quartiles(values),
            'ratio': quartiles([value / base for value, base in zip(values, speeds[fastest])]),
            'rounds': values,
        }
        for way, values in speeds.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        [row['model'], f'`{row["way"]}`', with_quartiles(row['images_per_second'], 0), with_quartiles(row['ratio'], 2)]
        for row in rows
    ]
    return Table(['model', 'way', 'images/s [quartiles]', 'ratio [quartiles]'], lines).markdown()


def main() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', nargs='+', default=['awm_resnet20_cifar', 'resnet20_cifar'], metavar='NAME')
    parser.add_argument(
        '--train-script', help="timm's train.py; else found as `python -m timm_weighted_skip.train` does"
    )
    parser.add_argument('--batch-size', type=int, default=128, metavar='N')
    parser.add_argument('--batches', type=int, default=40, metavar='N', help='of an epoch')
    parser.add_argument('--rounds', type=several, default=5, metavar='N')
    parser.add_argument(
        '--workers', type=int, nargs='+', default=[0, cores], metavar='N', help='of train.py, each tried'
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--no-torchcompile', action='store_true', help='leave out the compiled ways')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers of every round')
    parser.add_argument('--measure', nargs=3, help=argparse.SUPPRESS)  # way, model, folder
    args = parser.parse_args()
    torch.set_num_threads(cores)
    if args.measure:
        way, model, folder = args.measure
        time_way, options = (time_timm, way[len(TIMM) :]) if way.startswith(TIMM) else (time_ours, way[len(OURS) :])
        print(args.batches * args.batch_size / time_way(options.split(), model, Path(folder), args))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_images(args.batches * args.batch_size, Path(folder))
        for model in args.model:
            speeds: dict[str, list[float]] = {way: [] for way in ways(not args.no_torchcompile, args.workers)}
            for _ in range(args.rounds):
                for way, values in speeds.items():
                    values.append(measure(way, model, Path(folder)))
            rows += rows_of(model, speeds)
    setting = {
        'device': torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu',
        'cores': cores,
        'batch_size': args.batch_size,
        'images': args.batches * args.batch_size,
        'rounds': args.rounds,
        'torch': torch.__version__,
    }
    print(', '.join(f'{name} {value}' for name, value in setting.items()), table(rows), sep='\n\n')
    if args.json:
        write_file(args.json, json.dumps({'setting': setting, 'rows': rows}, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
