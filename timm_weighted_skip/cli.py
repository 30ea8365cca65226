"""`weighted-skip <verb>`: parses the command line and calls the module that does the verb's work.

A verb is a function that adds its parser to the subparsers and sets `run` to what is called with the parsed arguments.
Work is imported inside `run`, so that `--help` is quick and a verb needs only its own extras.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch

import timm_weighted_skip

__all__ = ['main']


def add_list(verbs) -> None:
    """`list`: the models, with what they cost."""
    parser = verbs.add_parser('list', help='the models: parameters, MACs, mapping units, input size, checkpoints')
    parser.add_argument('pattern', nargs='?', default='*', help="only names that match, such as 'awm_*cifar'")

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.models.listing import model_table

        print(model_table(args.pattern))

    parser.set_defaults(run=run)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and where the work is done."""
    parser.add_argument('--data', metavar='SET', help='cifar10, cifar100, mnist, digits, folder, or NAME of NAME_*.npz')
    parser.add_argument('--data-dir', metavar='DIR', help='folder of the data')
    parser.add_argument('--download', action='store_true', help='let torchvision fetch the data into --data-dir')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(%(default)s)')


def add_train(verbs) -> None:
    """`train`: a net on an image set that fits in memory."""
    from timm_weighted_skip.train.recipe import add_recipe_arguments, list_recipes

    parser = verbs.add_parser(
        'train',
        help='train a net on an image set that fits in memory',
        description='Train a net on an image set that fits in memory, on one device. For anything larger, '
        "`python -m timm_weighted_skip.train` runs timm's train.py with the same recipes.",
    )
    parser.add_argument('--resume', metavar='DIR', help='go on with the run in this folder; takes no other arguments')
    parser.add_argument('--model', default='awm_resnet20_cifar', help='timm model name (%(default)s)')
    parser.add_argument('--pretrained', action='store_true', help='start from its checkpoint')
    add_data_arguments(parser)
    parser.add_argument('--recipe', metavar='NAME', help=f'a YAML file, or one of {", ".join(list_recipes())}')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='S', help='a run for each, and their mean')
    parser.add_argument('--output', default='runs', metavar='DIR', help='where the folders of runs are (%(default)s)')
    parser.add_argument('--experiment', metavar='NAME', help="the run's folder in there (<model>-<data>[-<recipe>])")
    add_recipe_arguments(parser)

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.analysis.means import mean_weights
        from timm_weighted_skip.train.runs import describe, read_run, run_seeds, task_of

        if args.resume:
            folder = Path(args.resume)
            task, seeds = read_run(folder)
        else:
            task, seeds, folder = task_of(args)
        try:
            result = run_seeds(task, folder, seeds, resume=bool(args.resume), analysis=mean_weights)
        except KeyboardInterrupt as stop:
            print(f'\n{stop}', file=sys.stderr)
            raise SystemExit(130) from None
        print(describe(result, folder))

    parser.set_defaults(run=run)


def add_eval(verbs) -> None:
    """`eval`: the accuracy of trained weights."""
    parser = verbs.add_parser('eval', help='loss and accuracies of trained weights')
    parser.add_argument('target', help="a run's folder, a .safetensors file of it, or a timm model name with weights")
    add_data_arguments(parser)
    parser.add_argument('--batch-size', type=int, default=256, metavar='N', help='(%(default)s)')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')

    def run(args: argparse.Namespace) -> None:
        import json

        from timm_weighted_skip.train.data import load_image_set
        from timm_weighted_skip.train.runs import evaluate_saved

        if args.data is None:
            raise ValueError('--data is missing: the images to evaluate on, such as cifar10 with --data-dir, or digits')
        data = load_image_set(args.data, False, args.data_dir, args.download)
        print(json.dumps(evaluate_saved(args.target, data, args.batch_size, args.device, args.amp)))

    parser.set_defaults(run=run)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='weighted-skip', description=timm_weighted_skip.__doc__)
    parser.add_argument('--version', action='version', version=f'%(prog)s {timm_weighted_skip.__version__}')
    verbs = parser.add_subparsers(metavar='VERB', required=True)
    for add in (add_list, add_train, add_eval):
        add(verbs)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit status. What the user can mend is one line on stderr, without a trace."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f'weighted-skip: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
