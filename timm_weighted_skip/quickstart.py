"""The quickstart: a small AWM net against its plain baseline on scikit-learn's handwritten digits, in a minute or two.

Both nets see the same images for the same number of epochs; the AWM net trains backbone and gates in turn.
"""

import statistics
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from tqdm import tqdm

from timm_weighted_skip.analysis.units import mapping_units
from timm_weighted_skip.layers import check_count
from timm_weighted_skip.train.freezing import AlternateFreezing

__all__ = ['quickstart']

MODELS = {'plain': 'resnet14_cifar', 'AWM': 'awm_resnet14_cifar'}
Split = tuple[torch.Tensor, torch.Tensor]


def load_digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 digits, normalised, four fifths of them to train on: images (N, 1, 8, 8) and labels (N,)."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the quickstart needs scikit-learn; run pip install 'timm-weighted-skip[analysis]'"
        ) from error
    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, parts)
    mean, std = train_x.mean(), train_x.std()
    return (
        (((train_x - mean) / std).float().unsqueeze(1), train_y),
        (((test_x - mean) / std).float().unsqueeze(1), test_y),
    )


def train(model: nn.Module, data: Split, freezing: AlternateFreezing, epochs: int, seed: int, label: str) -> None:
    """Train `model` with SGD on a cosine schedule; a bar shows the epoch, its phase and the loss."""
    images, labels = data
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=epochs)
    shuffle = torch.Generator().manual_seed(seed)
    model.train()
    with tqdm(total=epochs, desc=label, unit='epoch') as bar:
        for epoch in range(epochs):
            phase = freezing(model, epoch)
            for batch in torch.randperm(len(images), generator=shuffle).split(128):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step(epoch + 1)
            bar.set_postfix(phase=phase, loss=f'{loss.item():.3f}')
            bar.update()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Split) -> float:
    """Share of the images of `data` that `model` puts into their class, in percent."""
    images, labels = data
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def plot_weights(names: list[str], lam1: torch.Tensor, path: Path) -> None:
    """Draw the mean and standard deviation of `lam1`, (N, units), per unit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout='constrained')
    axes = figure.subplots()
    axes.axhline(0.5, color='grey', linewidth=1, linestyle='--', label='identity mapping')
    axes.errorbar(names, lam1.mean(0), yerr=lam1.std(0), fmt='o', capsize=3, label='mean and std over the test images')
    axes.set(xlabel='mapping unit', ylabel=r'weight $\lambda_1$ of the residual branch')
    axes.legend()
    figure.savefig(path, dpi=150)


def quickstart(epochs: int = 30, period: int = 3, seeds: int = 3, out: Path = Path('quickstart')) -> None:
    """Train both nets, print their accuracies and the AWM net's weights, and draw the weights to `out/weights.png`.

    Args:
        epochs: Of either net, both phases counted.
        period: Epochs per phase of the AWM net.
        seeds: How often to train either net, each time with other weights and batches.
        out: Folder of the picture.

    Raises:
        ImportError: scikit-learn or matplotlib is missing.
        ValueError: A number is not allowed.
    """
    check_count('epochs', epochs)
    check_count('seeds', seeds)
    freezing = {'plain': AlternateFreezing(0), 'AWM': AlternateFreezing(period)}
    train_data, test_data = load_digits()
    accuracies: dict[str, list[float]] = {label: [] for label in MODELS}
    for seed in range(seeds):
        for label, name in MODELS.items():
            torch.manual_seed(seed)
            model = timm.create_model(name, in_chans=1, num_classes=10)
            train(model, train_data, freezing[label], epochs, seed, f'{label:5} seed {seed}')
            accuracies[label].append(accuracy(model, test_data))

    print(f'\ntest accuracy after {epochs} epochs on {len(train_data[1])} digits, {len(test_data[1])} to test:')
    for label, values in accuracies.items():
        spread = f' +- {statistics.stdev(values):.2f}' if seeds > 1 else ''
        print(f'  {label:5}  {MODELS[label]:18}  {statistics.mean(values):.2f}{spread} % (n={seeds})')

    units = mapping_units(model, test_data[0])
    lam1 = torch.stack([unit.weight[:, 0] for unit in units if unit.weight is not None], dim=1)
    print(f'\nweight of the residual branch over the test images, AWM seed {seed} (0.5 is the plain unit):')
    print('  unit      kind          mean     std')
    for unit, mean, std in zip(units, lam1.mean(0), lam1.std(0)):
        print(f'  {unit.name:8}  {unit.kind:10}  {mean:.4f}  {std:.4f}')

    out.mkdir(parents=True, exist_ok=True)
    picture = out / 'weights.png'
    plot_weights([unit.name for unit in units], lam1, picture)
    print(f'\npicture of the weights: {picture}')
