#!/usr/bin/env python3
"""What a trained AWM net owes to its gates: its test accuracy with other weights in their place, all else unchanged.

    scripts/ablate_gates.py awm_resnet20_cifar.cifar10 --data cifar10 --data-dir DIR

`mean` gives every image the mean of the weights over the training images, `plain` the weights of the plain net. A batch
norm's running statistics fit the weights that they were taken with, so each accuracy comes twice: with the statistics
of the checkpoint and with those of all training images, taken anew under the weights in question.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from timm_weighted_skip.analysis.data import load_images
from timm_weighted_skip.analysis.tables import Table
from timm_weighted_skip.analysis.units import eval_mode, gate_weights, gates
from timm_weighted_skip.nets import load_net

Weights = dict[str, torch.Tensor]  # unit name -> (K,), with a sum of 1


@torch.no_grad()
def mean_weights(model: nn.Module, loader: DataLoader) -> Weights:
    """The weights' means over the images of `loader`."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in gates(model)}
    with eval_mode(model), gate_weights(model) as lam:
        for x, _ in loader:
            model(x)
            for name, weight in lam.items():
                sums[name] = sums[name] + weight.double().sum(0)
    return {name: total / len(loader.dataset) for name, total in sums.items()}  # type: ignore[arg-type]


def plain_weights(model: nn.Module) -> Weights:
    paths = {name: gate.fc2.out_features for name, gate in gates(model).items()}
    return {name: torch.full((count,), 1 / count) for name, count in paths.items()}


@contextmanager
def held(model: nn.Module, weights: Weights) -> Iterator[None]:
    """While active, the gates of the units in `weights` give these to every image."""

    def hold(lam: torch.Tensor):
        return lambda gate, args, output: (gate.scale * lam).to(output).expand_as(output)

    handles = [gates(model)[name].register_forward_hook(hold(lam)) for name, lam in weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """In percent."""
    with eval_mode(model):
        hits = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in loader)
    return 100 * hits / len(loader.dataset)  # type: ignore[arg-type]


def ablate(model: nn.Module, train: DataLoader, test: DataLoader) -> Table:
    """Accuracies on `test` per kind of weights, with the net's own running statistics and with new ones of `train`.

    Raises:
        ValueError: The net has no gates.
    """
    if not gates(model):
        raise ValueError(f"{type(model).__name__}'s weights are not inferred; give an AWM net")
    rows = []
    for kind, weights in (
        ('inferred', Weights()),
        ('mean', mean_weights(model, train)),
        ('plain', plain_weights(model)),
    ):
        net = copy.deepcopy(model)
        with held(net, weights):
            stored = accuracy(net, test)
            update_bn(train, net)
            rows.append([kind, stored, accuracy(net, test)])
    return Table(['weights', 'stored statistics', 'new statistics'], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='NET', help='as of weighted-skip eval: a name, a directory or a run')
    parser.add_argument('--checkpoint', type=Path, metavar='FILE', help="weights in place of the net's own")
    parser.add_argument('--data', required=True, help='as of weighted-skip eval')
    parser.add_argument('--data-dir', type=Path, metavar='DIR', help='where the data lies')
    parser.add_argument('--batch-size', type=int, default=128, metavar='N', help='default: %(default)s')
    args = parser.parse_args()
    try:
        model = load_net(args.model, args.checkpoint, need_weights=True)
        train, test = (
            load_images(args.data, model, args.data_dir, split).loader(args.batch_size)
            for split in ('train', 'validation')
        )
        print(ablate(model, train, test).text())
    except (ValueError, OSError) as error:
        print(f'ablate_gates: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
