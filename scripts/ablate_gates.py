#!/usr/bin/env python3
"""What a trained AWM net owes to its gates: its test accuracy with other weights in their place, all else unchanged.

    scripts/ablate_gates.py awm_resnet20_cifar.cifar10 --data cifar10 --data-dir DIR --recipe awm_cifar

`mean` gives every image the mean of the weights over the training images, `plain` the weights of the plain net. A batch
norm's running statistics fit the weights that they were taken with, so each accuracy comes twice: with the statistics
of the checkpoint, and with those of an epoch of training images, augmented as the recipe has it, under the weights in
question.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from timm_weighted_skip.analysis.tables import Table
from timm_weighted_skip.analysis.units import eval_mode, gate_weights, gates
from timm_weighted_skip.data import SETS, ImageSet, load_image_set
from timm_weighted_skip.nets import load_net
from timm_weighted_skip.train.batches import Batches
from timm_weighted_skip.train.evaluate import evaluate_on
from timm_weighted_skip.train.recipe import Recipe, load_recipe

Weights = dict[str, torch.Tensor]  # unit name -> (K,), with a sum of 1


def training_batches(model: nn.Module, data: ImageSet, recipe: Recipe) -> Batches:
    config: Any = model.pretrained_cfg
    return Batches(data, recipe.batch_size, config['mean'], config['std'], 'cpu', *recipe.augmentation)


@torch.no_grad()
def mean_weights(model: nn.Module, batches: Batches) -> Weights:
    """The weights' means over an epoch of training images."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in gates(model)}
    with eval_mode(model), gate_weights(model) as lam:
        for x, _ in batches.shuffled(seed=0, epoch=0):
            model(x)
            for name, weight in lam.items():
                sums[name] = sums[name] + weight.double().sum(0)
    return {name: total / total.sum() for name, total in sums.items()}


def plain_weights(model: nn.Module) -> Weights:
    paths = {name: gate.fc2.out_features for name, gate in gates(model).items()}
    return {name: torch.full((count,), 1 / count) for name, count in paths.items()}


@contextmanager
def held(model: nn.Module, weights: Weights) -> Iterator[None]:
    """While active, the gates of the units in `weights` give these to every image."""

    def hold(lam: torch.Tensor):
        return lambda gate, args, output: (gate.scale * lam).to(output).expand_as(output)

    own = gates(model)
    handles = [own[name].register_forward_hook(hold(lam)) for name, lam in weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ablate(model: nn.Module, batches: Batches, test: ImageSet) -> Table:
    """Accuracies in % per kind of weights, with the net's own running statistics and with new ones of `batches`.

    Raises:
        ValueError: The net has no gates, or does not fit the images.
    """
    if not gates(model):
        raise ValueError(f"{type(model).__name__}'s weights are not inferred; give an AWM net")
    rows = []
    for kind, weights in (
        ('inferred', Weights()),
        ('mean', mean_weights(model, batches)),
        ('plain', plain_weights(model)),
    ):
        net = copy.deepcopy(model)
        with held(net, weights):
            stored = evaluate_on(net, test)['top1']
            update_bn(batches.shuffled(seed=0, epoch=0), net)
            rows.append([kind, stored, evaluate_on(net, test)['top1']])
    return Table(['weights', 'stored statistics', 'new statistics'], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='NET', help='a name, a directory or a run, as of weighted-skip eval')
    parser.add_argument('--checkpoint', type=Path, metavar='FILE', help="weights in place of the net's own")
    parser.add_argument('--data', required=True, choices=SETS)
    parser.add_argument('--data-dir', type=Path, metavar='DIR', help='where the data lies')
    parser.add_argument('--recipe', required=True, help='by which it was trained, of the names of weighted-skip train')
    args = parser.parse_args()
    try:
        model = load_net(args.model, args.checkpoint, need_weights=True)
        train, test = (load_image_set(args.data, train, args.data_dir) for train in (True, False))
        print(ablate(model, training_batches(model, train, load_recipe(args.recipe)), test).text())
    except (ValueError, OSError) as error:
        print(f'ablate_gates: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
