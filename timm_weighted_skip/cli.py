"""`weighted-skip <verb>`: parses the command line and calls the module that does the verb's work.

A verb is a function that adds its parser to the subparsers and sets `run` to what is called with the parsed arguments.
Work is imported inside `run`, so that `--help` is quick and a verb needs only its own extras.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import timm_weighted_skip

__all__ = ['main']


def add_list(verbs) -> None:
    """`list`: the models, with what they cost."""
    parser = verbs.add_parser('list', help='the models: parameters, MACs, mapping units, input size, checkpoints')
    parser.add_argument('pattern', nargs='?', default='*', help="only names that match, such as 'awm_*cifar'")
    parser.add_argument('--markdown', action='store_true', help='print a Markdown table')

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.analysis.listing import model_table

        print(model_table(args.pattern, args.markdown))

    parser.set_defaults(run=run)


def add_quickstart(verbs) -> None:
    """`quickstart`: the main job on data that comes with scikit-learn."""
    parser = verbs.add_parser(
        'quickstart', help="train a small AWM net and its plain baseline on scikit-learn's digits"
    )
    parser.add_argument(
        '--epochs', type=int, default=30, help='of either net, both phases counted (default: %(default)s)'
    )
    parser.add_argument('--period', type=int, default=3, help='epochs per phase (default: %(default)s)')
    parser.add_argument('--seeds', type=int, default=3, help='trainings of either net (default: %(default)s)')
    parser.add_argument(
        '--out', type=Path, default=Path('quickstart'), help="the picture's folder (default: %(default)s)"
    )

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.quickstart import quickstart

        quickstart(args.epochs, args.period, args.seeds, args.out)

    parser.set_defaults(run=run)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='weighted-skip', description=timm_weighted_skip.__doc__)
    parser.add_argument('--version', action='version', version=f'%(prog)s {timm_weighted_skip.__version__}')
    verbs = parser.add_subparsers(metavar='VERB', required=True)
    for add in (add_list, add_quickstart):
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
