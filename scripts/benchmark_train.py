#!/usr/bin/env python3
"""Images per second of this package's trainer and of timm's train.py, on the same net, images and recipe.

    scripts/benchmark_train.py [--model awm_resnet20_cifar resnet20_cifar] [--compile] [--device cuda]

All ways train in this process in turn, each for one epoch of a backbone phase to warm up and one to measure; a round
is one turn of each. The table gives the median over rounds, its spread and the ratio to train.py as its user first
calls it. train.py reads PNG files with worker processes, the trainer holds the images in memory; that difference is
part of what is measured. timm's script is found as `python -m timm_weighted_skip.train` finds it.
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from timm_weighted_skip.data import ImageSet
from timm_weighted_skip.train import launcher
from timm_weighted_skip.train.recipe import load_recipe, recipe_path
from timm_weighted_skip.train.trainer import Trainer, make_net

RECIPE = 'awm_cifar_short'


def make_images(count: int, folder: Path) -> ImageSet:
    """Random images of CIFAR's size, in memory and as timm's image folder."""
    images = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    labels = torch.arange(count) % 10
    for split, part in (('train', count), ('validation', 10)):
        for i in range(part):
            path = folder / split / str(int(labels[i])) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path)
    return ImageSet(torch.from_numpy(images), labels, tuple(map(str, range(10))))


class TimmScript:
    """timm's train.py, called as from a shell; tells how long its second epoch took."""

    def __init__(self, script: Any, folder: Path, count: int, arguments: list[str]) -> None:
        self.script, self.folder, self.count, self.arguments = script, folder, count, arguments

    def images_per_second(self) -> float:
        seconds = []
        train_one_epoch = self.script.train_one_epoch

        def timed(*args, **kwargs):
            started = time.perf_counter()
            metrics = train_one_epoch(*args, **kwargs)  # reads the loss of every step, so the device is done
            seconds.append(time.perf_counter() - started)
            return metrics

        output = ['--output', str(self.folder / 'output'), '--experiment', str(time.time_ns())]
        sys.argv = [self.script.__file__, *self.arguments, *output]
        self.script.train_one_epoch = timed
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.script.main()
        finally:
            self.script.train_one_epoch = train_one_epoch
        return self.count / seconds[1]


class InMemory:
    """This package's trainer."""

    def __init__(self, model: str, data: ImageSet, device: str, **recipe: Any) -> None:
        recipe = {'alternate_freeze': 0, 'torchcompile': False, **recipe}
        net = make_net(model, data)
        self.trainer = Trainer(net, load_recipe(RECIPE, **recipe), data, data, device)
        self.trainer.train_epoch()

    def images_per_second(self) -> float:
        result = self.trainer.train_epoch()
        return result['images'] / result['seconds']


def measure(model: str, script: Any, data: ImageSet, folder: Path, args: argparse.Namespace) -> list[str]:
    """The table's lines of one net."""
    common = ['-c', str(recipe_path(RECIPE)), '--model', model, '--data-dir', str(folder), '--device', args.device]
    common += ['--epochs', '2', '--sched', 'step', '-j', str(args.workers), '--log-interval', '1000000']
    count = len(data.labels) // 128 * 128
    ways: dict[str, Any] = {
        "timm's train.py": TimmScript(script, folder, count, common),
        "timm's train.py --channels-last": TimmScript(script, folder, count, [*common, '--channels-last']),
        'weighted-skip train --no-torchcompile': InMemory(model, data, args.device),
    }
    if args.compile:
        compiled = [*common, '--channels-last', '--torchcompile']
        ways["timm's train.py --channels-last --torchcompile"] = TimmScript(script, folder, count, compiled)
        ways['weighted-skip train --torchcompile'] = InMemory(model, data, args.device, torchcompile=True)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            speeds[name].append(way.images_per_second())
    base = statistics.median(speeds["timm's train.py"])
    return [
        f'| {model} | {name} | {statistics.median(values):.0f} | {min(values):.0f} to {max(values):.0f} '
        f'| {statistics.median(values) / base:.2f} |'
        for name, values in speeds.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', nargs='+', default=['awm_resnet20_cifar', 'resnet20_cifar'])
    parser.add_argument('--train-script', help="timm's train.py")
    parser.add_argument('--images', type=int, default=2560, metavar='N')
    parser.add_argument('--rounds', type=int, default=3, metavar='N')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), metavar='N', help='of train.py')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--compile', action='store_true', help='measure torch.compile too (minutes on a CPU)')
    args = parser.parse_args()
    script = launcher.load_script(launcher.find_script('train', args.train_script))
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        data = make_images(args.images, Path(name))
        lines = [line for model in args.model for line in measure(model, script, data, Path(name), args)]
    print(f'{args.images} images, batch 128, {args.rounds} rounds, {args.device}, {torch.get_num_threads()} threads,')
    print(f'torch {torch.__version__}')
    print('| model | way | images/s (median) | spread | ratio |\n|---|---|---|---|---|')
    print('\n'.join(lines))
    return 0


if __name__ == '__main__':
    sys.exit(main())
