"""The quickstart: a small AWM net against its plain baseline on scikit-learn's handwritten digits.

Both nets start with every norm at 1 and see the same images for the same number of epochs; the AWM net trains backbone
and gates in turn.
"""

import statistics
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from timm_weighted_skip.analysis.collect import collect
from timm_weighted_skip.analysis.inspection import gate_table
from timm_weighted_skip.analysis.tables import require
from timm_weighted_skip.checks import check_count
from timm_weighted_skip.data import load_image_set
from timm_weighted_skip.files import check_folder
from timm_weighted_skip.train.freezing import AlternateFreezing
from timm_weighted_skip.train.recipe import Recipe
from timm_weighted_skip.train.trainer import Trainer, make_net

__all__ = ['MODELS', 'quickstart', 'train_digits']

MODELS = {'plain': 'resnet14_cifar', 'AWM': 'awm_resnet14_cifar'}


def train_digits(label: str, epochs: int, period: int, seed: int) -> Trainer:
    """Train one of `MODELS` with SGD on a cosine schedule; in a terminal a bar shows the epoch, its phase and the loss.

    Args:
        label: Which.
        epochs: Both phases counted.
        period: Epochs per phase of the AWM net.
        seed: Of weights and batches.
    """
    train, test = load_image_set('digits', train=True), load_image_set('digits', train=False)
    recipe = Recipe(
        epochs=epochs,
        seed=seed,
        alternate_freeze=period if label == 'AWM' else 0,
        weight_decay=1e-4,
        smoothing=0.0,
        no_aug=True,
    )
    torch.manual_seed(seed)
    net = make_net(MODELS[label], train, zero_init_last=False)
    trainer = Trainer(net, recipe, train, test)
    with tqdm(total=trainer.epochs, desc=f'{label:5} seed {seed}', unit='epoch', leave=False, disable=None) as bar:
        for _ in range(trainer.epochs):
            done = trainer.train_epoch()
            bar.set_postfix(phase=done['phase'], loss=f'{done["loss"]:.3f}')
            bar.update()
    return trainer


def quickstart(epochs: int = 30, period: int = 3, seeds: int = 3, out: Path = Path('quickstart')) -> None:
    """Train both nets, print their accuracies and the AWM net's weights, and draw the weights to `out/weights.png`.

    Args:
        epochs: Of either net, both phases counted.
        period: Epochs per phase of the AWM net.
        seeds: How often to train either net, each time with other weights and batches.
        out: Folder of the picture and the numbers.

    Raises:
        ImportError: scikit-learn or matplotlib is missing.
        ValueError: A number is not allowed.
    """
    require('sklearn', 'matplotlib')
    check_count('epochs', epochs)
    check_count('seeds', seeds)
    AlternateFreezing(period)  # refuses what is no period
    check_folder(out)
    if epochs <= period:
        begins = f'--period {period} begins with as many epochs of the backbone'
        print(f'no epoch of {epochs} trains the gates: {begins}', file=sys.stderr)
    top1: dict[str, list[float]] = {label: [] for label in MODELS}
    for seed in range(seeds):
        for label in MODELS:
            trainer = train_digits(label, epochs, period, seed)
            top1[label].append(trainer.evaluate()['top1'])
            print(f'{label:5} seed {seed}: {top1[label][-1]:.2f} %', flush=True)

    print(f'\ntest accuracy after {epochs} epochs on {len(trainer.train_batches)} digits:')
    for label, values in top1.items():
        spread = f' +- {statistics.stdev(values):.2f}' if seeds > 1 else ''
        print(f'  {label:5}  {MODELS[label]:18}  {statistics.mean(values):.2f}{spread} % (n={seeds})')

    x, labels = map(torch.cat, zip(*trainer.test_batches.in_order()))
    weights = gate_table(collect(trainer.net, DataLoader(TensorDataset(x, labels), batch_size=128)))
    print(f'\nweights of the residual branches over the test images, AWM seed {seed} (0.5 is the plain net):\n')
    print(weights.text())
    weights.save(out)
    print(f'\npicture of the weights: {out / "weights.png"}')
