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

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.models.listing import model_table

        print(model_table(args.pattern))

    parser.set_defaults(run=run)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verbs that read a trained net and write a checkpoint directory."""
    from timm.utils import ParseKwargs

    parser.add_argument('model', help="timm's name of the net, also as local-dir:FOLDER or hf_hub:OWNER/NAME")
    parser.add_argument('--checkpoint', type=Path, help="weights to load, such as train.py's model_best.pth.tar")
    parser.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='arguments of the net, such as num_classes=10'
    )
    parser.add_argument('--results', type=Path, help='JSON file with what was measured, for the model card')
    parser.add_argument('--output', type=Path, required=True, help='checkpoint directory to make')


def write_net(args: argparse.Namespace, model, model_args: dict) -> None:
    """Write what a verb of `add_source` made."""
    from timm_weighted_skip.hub.config import Results, read_json
    from timm_weighted_skip.hub.save import save_checkpoint

    results = Results.from_dict(read_json(args.results), str(args.results)) if args.results else None
    print(f'wrote {save_checkpoint(model, args.output, results, model_args)}')


def add_save(verbs) -> None:
    """`save`: a trained net as a checkpoint directory."""
    parser = verbs.add_parser('save', help='make a checkpoint directory of a trained net: weights, config, model card')
    add_source(parser)

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.hub.source import load_net

        write_net(args, *load_net(args.model, args.checkpoint, args.model_kwargs))

    parser.set_defaults(run=run)


def add_convert(verbs) -> None:
    """`convert`: between plain, AdaResNet and AWM nets."""
    parser = verbs.add_parser('convert', help='turn a plain net into a weighted one of the same output, or back')
    add_source(parser)
    parser.add_argument('--to', required=True, choices=('awm', 'adaresnet', 'plain'), help='what to make of it')

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip import convert
        from timm_weighted_skip.hub.source import load_net

        model, model_args = load_net(args.model, args.checkpoint, args.model_kwargs)
        make = getattr(convert, f'to_{args.to}')
        write_net(args, make(model), convert.plain_args(model_args))

    parser.set_defaults(run=run)


def add_fold(verbs) -> None:
    """`fold`: an AdaResNet as a plain ResNet."""
    parser = verbs.add_parser('fold', help="fold an AdaResNet's weights into its layers: a plain net, the same output")
    add_source(parser)

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip import convert
        from timm_weighted_skip.hub.source import load_net

        model, model_args = load_net(args.model, args.checkpoint, args.model_kwargs)
        folded, kept = convert.fold(model)
        if kept:
            print(f'still weighted, having w <= 0 on an identity shortcut: {", ".join(kept)}')
        write_net(args, folded, convert.plain_args(model_args))

    parser.set_defaults(run=run)


def add_publish(verbs) -> None:
    """`publish`: checkpoint directories to the Hub."""
    parser = verbs.add_parser('publish', help='publish a checkpoint directory to the Hub, or all of hub_cards')
    parser.add_argument('folder', nargs='?', type=Path, help='the directory')
    parser.add_argument('--all', action='store_true', help='every directory in --root')
    parser.add_argument('--root', type=Path, default=Path('hub_cards'), help='for --all (default: %(default)s)')
    parser.add_argument('--repo-id', metavar='OWNER/NAME', help="repository of one directory (default: this project's)")
    parser.add_argument('--owner', help="owner of the repositories of --all (default: this project's)")
    parser.add_argument('--private', action='store_true', help='make new repositories private')
    parser.add_argument('--dry-run', action='store_true', help='validate, and print what would be sent')
    parser.add_argument('--token-file', type=Path, metavar='F', help='file with a Hub token (default: the login)')

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.hub.publish import publish, publish_all, read_token

        if args.all == bool(args.folder) or (args.all and args.repo_id) or (args.folder and args.owner):
            raise ValueError('give either a directory and perhaps --repo-id, or --all and perhaps --owner')
        token = None if args.dry_run else read_token(args.token_file)
        if args.all:
            for done in publish_all(args.root, args.owner, args.private, args.dry_run, token):
                print(done)
        else:
            print(publish(args.folder, args.repo_id, args.private, args.dry_run, token))

    parser.set_defaults(run=run)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='weighted-skip', description=timm_weighted_skip.__doc__)
    parser.add_argument('--version', action='version', version=f'%(prog)s {timm_weighted_skip.__version__}')
    verbs = parser.add_subparsers(metavar='VERB', required=True)
    for add in (add_list, add_save, add_convert, add_fold, add_publish):
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
