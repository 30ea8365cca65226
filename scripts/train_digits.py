#!/usr/bin/env python3
"""Train `awm_resnet14_cifar.digits`, the checkpoint that comes with the package, and write its directory.

    scripts/train_digits.py [--output hub_cards/awm_resnet14_cifar.digits]

The quickstart's training (scikit-learn's 8 x 8 digits, 30 epochs) over three seeds of the AWM net and of its plain
baseline; the weights are those of seed 0. A few minutes on a CPU.
"""

import argparse
import subprocess
from pathlib import Path

import timm
import torch

from timm_weighted_skip.hub import Results, save_checkpoint
from timm_weighted_skip.quickstart import MODELS, accuracy, load_digits, train
from timm_weighted_skip.train import AlternateFreezing

EPOCHS, PERIOD, SEEDS = 30, 3, [0, 1, 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('hub_cards/awm_resnet14_cifar.digits'))
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f'{args.output} exists; remove it first')

    train_data, test_data = load_digits()
    freezing = {'plain': AlternateFreezing(0), 'AWM': AlternateFreezing(PERIOD)}
    top1: dict[str, list[float]] = {label: [] for label in MODELS}
    nets = []
    for seed in SEEDS:
        for label, name in MODELS.items():
            torch.manual_seed(seed)
            model = timm.create_model(name, in_chans=1, num_classes=10)
            train(model, train_data, freezing[label], EPOCHS, seed, f'{label:5} seed {seed}')
            top1[label].append(round(accuracy(model, test_data), 2))
            if label == 'AWM':
                nets.append(model)

    # The loader's normalisation, as timm's transforms need it: for pixels that go from 0 to 1.
    darkest, brightest = train_data[0].min().item(), train_data[0].max().item()
    model = nets[0]
    model.pretrained_cfg.update(  # type: ignore[union-attr, operator]
        input_size=(1, 8, 8),
        pool_size=(2, 2),
        mean=(-darkest / (brightest - darkest),),
        std=(1 / (brightest - darkest),),
        label_names=[str(digit) for digit in range(10)],
    )
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()
    results = Results(
        dataset="scikit-learn's digits",
        dataset_id='sklearn-digits',
        split='test',
        recipe='scripts/train_digits.py',
        epochs=EPOCHS,
        seeds=SEEDS,
        top1=top1['AWM'],
        seed=SEEDS[0],
        commit=commit,
        description=(
            'A small net for 8 x 8 images of handwritten digits, to try the package with: it loads without a network. '
            'It was trained in a minute on 1,437 images and is of no other use.'
        ),
        comparison={MODELS['plain']: top1['plain']},
    )
    print(f'wrote {save_checkpoint(model, args.output, results)}: {top1}')


if __name__ == '__main__':
    main()
