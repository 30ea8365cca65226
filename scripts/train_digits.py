#!/usr/bin/env python3
"""Train `awm_resnet14_cifar.digits`, a checkpoint that comes with the package, and write its directory.

    scripts/train_digits.py [--output hub_cards/awm_resnet14_cifar.digits]

The quickstart's training (scikit-learn's 8 x 8 digits, 30 epochs) over three seeds of the AWM net and of its plain
baseline; the weights are those of seed 0. A few minutes on a CPU.
"""

import argparse
from pathlib import Path
from typing import Any

from timm_weighted_skip.commit import package_commit
from timm_weighted_skip.hub import Results, save_checkpoint
from timm_weighted_skip.nets import Trained
from timm_weighted_skip.quickstart import MODELS, train_digits

EPOCHS, PERIOD, SEEDS = 30, 3, [0, 1, 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('hub_cards/awm_resnet14_cifar.digits'))
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f'{args.output} exists; remove it first')
    commit = package_commit()
    if not commit:
        parser.error('a checkpoint says which commit made it; run this in a git checkout')

    top1: dict[str, list[float]] = {label: [] for label in MODELS}
    trainers = []
    for seed in SEEDS:
        for label in MODELS:
            trainer = train_digits(label, EPOCHS, PERIOD, seed)
            top1[label].append(round(trainer.evaluate()['top1'], 2))
            if label == 'AWM':
                trainers.append(trainer)

    model: Any = trainers[0].net.eval()
    mean, std = list(trainers[0].mean), list(trainers[0].std)
    trained = Trained(MODELS['AWM'], {}, list(trainers[0].test_batches.classes), [1, 8, 8], mean, std)
    model.pretrained_cfg.update(trained.arguments()['pretrained_cfg_overlay'])
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
        license='apache-2.0',
        description=(
            'A small net for 8 x 8 images of handwritten digits, to try the package with: it loads without a network. '
            'It was trained in a minute on 1,437 images and is of no other use.'
        ),
        comparison={MODELS['plain']: top1['plain']},
    )
    print(f'wrote {save_checkpoint(model, args.output, results)}: {top1}')


if __name__ == '__main__':
    main()
