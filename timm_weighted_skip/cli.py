"""`weighted-skip <verb>`: parses the command line and calls the module that does the verb's work.

A verb is a function that adds its parser to the subparsers and sets `run` to what is called with the parsed arguments.
Work is imported inside `run`, so that a verb needs only its own extras.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch

import timm_weighted_skip

__all__ = ['main']

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
MODEL = 'awm_resnet20_cifar'


def _show(text: str) -> None:
    """Print a result, as much of it as its reader takes: `head` has enough before the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the rest is tried, and fails, at exit


def add_list(verbs) -> None:
    """`list`: the models, with what they cost."""
    parser = verbs.add_parser('list', help='the models: parameters, MACs, mapping units, input size, checkpoints')
    parser.add_argument('pattern', nargs='?', default='*', help="only names that match, such as 'awm_*cifar'")
    parser.add_argument('--markdown', action='store_true', help='print a Markdown table')

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.analysis.listing import model_table

        table = model_table(args.pattern)
        _show(table.markdown() if args.markdown else table.text())

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
        '--output', type=Path, default=Path('quickstart'), help="the picture's folder (default: %(default)s)"
    )

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.quickstart import quickstart

        quickstart(args.epochs, args.period, args.seeds, args.output)

    parser.set_defaults(run=run)


def _add_net_arguments(parser: argparse.ArgumentParser, several: Optional[str] = None) -> None:
    from timm_weighted_skip.train.recipe import NamedValues

    parser.add_argument('model', nargs=several,
                        help='name, run, folder with config.json, local-dir:FOLDER or hf-hub:REPOSITORY')  # fmt: skip
    parser.add_argument('--checkpoint', metavar='FILE', nargs=several, help="weights in place of the model's own")
    parser.add_argument('--model-kwargs', nargs='+', default={}, action=NamedValues, metavar='NAME=VALUE',
                        help='arguments of the model, such as num_classes=100')  # fmt: skip


def _add_analysis_data_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group('data')
    group.add_argument('--data', required=required, metavar='NAME',
                       help="'digits'; 'folder': DIR/{train,validation}/CLASS/IMAGE; DIR/NAME_{train,test}.npz or "
                       "torchvision's files in DIR; or a name of timm's, such as hfds/ILSVRC/imagenet-1k")  # fmt: skip
    group.add_argument('--data-dir', metavar='DIR')
    group.add_argument('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'),
                       help="default: the model's for tests")  # fmt: skip
    group.add_argument('--mean', type=float, nargs='+', help="pixel mean per channel; default: the model's")
    group.add_argument('--std', type=float, nargs='+', help="pixel deviation per channel; default: the model's")
    group.add_argument('--batch-size', type=int, default=128, metavar='N', help='default: %(default)s')
    group.add_argument('--workers', type=int, default=0, metavar='N', help='processes that load images')
    group.add_argument('--device', default=DEVICE, help='default: %(default)s')


def _set_analysis(parser: argparse.ArgumentParser, work: str) -> None:
    """Have `analysis.commands.<work>` print its result and, with --output, write it to files."""
    parser.add_argument(
        '--output', metavar='DIR', help='also write the numbers as CSV and JSON, pictures as PNG and SVG'
    )

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.analysis import commands
        from timm_weighted_skip.analysis.tables import require
        from timm_weighted_skip.files import check_folder

        if args.output:
            require('matplotlib')
            check_folder(args.output)
        result = getattr(commands, work)(args)
        _show(result.text())
        if args.output:
            result.save(args.output)

    parser.set_defaults(run=run)


def add_inspect(verbs) -> None:
    """`inspect`: every mapping unit and its weight."""
    parser = verbs.add_parser('inspect', help='the weights of every mapping unit')
    _add_net_arguments(parser, several='+')
    _add_analysis_data_arguments(parser, required=False)
    parser.add_argument('--per-class', action='store_true', help='the weights of the images of each class as well')
    _set_analysis(parser, 'inspect_result')


def add_variance(verbs) -> None:
    """`variance`: of AdaResNet's weights within and between groups of trainings."""
    from timm_weighted_skip.train.recipe import NamedValues

    parser = verbs.add_parser('variance', help="variance of AdaResNets' weights within and between groups")
    parser.add_argument('--group', nargs='+', action='append', required=True, metavar=('NAME', 'CHECKPOINT'),
                        help='a name and trainings of a model: runs, folders with config.json or weights')  # fmt: skip
    parser.add_argument('--model', help='what the checkpoints are of, if they are bare files of weights')
    parser.add_argument('--model-kwargs', nargs='+', default={}, action=NamedValues, metavar='NAME=VALUE',
                        help='arguments of that model')  # fmt: skip
    _set_analysis(parser, 'variance_result')


def add_extremes(verbs) -> None:
    """`extremes`: the images with the lowest and the highest sum of `lam1`."""
    parser = verbs.add_parser('extremes', help='images that use the residual branches least and most')
    _add_net_arguments(parser)
    _add_analysis_data_arguments(parser, required=True)
    parser.add_argument('--count', type=int, default=16, metavar='N', help='images of each end (default: %(default)s)')
    _set_analysis(parser, 'extremes_result')


def add_discriminate(verbs) -> None:
    """`discriminate`: how well an image's weights tell its class."""
    parser = verbs.add_parser(
        'discriminate', help="how well an image's weights tell its class (unit variance, PCA, LDA, class means)"
    )
    _add_net_arguments(parser)
    _add_analysis_data_arguments(parser, required=True)
    parser.add_argument('--dims', type=int, default=30, help='dimensions after LDA (default: %(default)s)')
    parser.add_argument('--pca-variance', type=float, default=0.99, help='variance kept by PCA (default: %(default)s)')
    parser.add_argument('--max-rank', type=int, default=10, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='of random gates and bootstrap')
    _set_analysis(parser, 'discriminate_result')


def add_curves(verbs) -> None:
    """`curves`: accuracy and loss of several runs."""
    parser = verbs.add_parser('curves', help='accuracy and loss of several runs, or what a sweep ends at')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder with log.jsonl or summary.csv, or of its seeds')
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument('--error', action='store_true', help='draw the error instead of the accuracy')
    shown.add_argument('--against', metavar='FIELD',
                       help="last error against a field of result.json, such as recipe.lr, or 'depth'")  # fmt: skip
    _set_analysis(parser, 'curve_result')


def add_report(verbs) -> None:
    """`report`: one HTML page about a run or a checkpoint."""
    parser = verbs.add_parser('report', help="one self-contained HTML page about a weighted net's run or checkpoint")
    _add_net_arguments(parser)
    _add_analysis_data_arguments(parser, required=False)
    parser.add_argument('--output', default='report.html', metavar='FILE', help='default: %(default)s')

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.analysis.commands import write_report

        _show(str(write_report(args)))

    parser.set_defaults(run=run)


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the verbs that read a trained net and write a checkpoint directory."""
    _add_net_arguments(parser)
    parser.add_argument(
        '--results', type=Path, help="JSON file with what was measured, for the model card (of `save`: the run's)"
    )
    parser.add_argument(
        '--output',
        type=Path,
        required=True,
        help='checkpoint directory to make, or FILE.safetensors for the weights alone',
    )


def _write_net(args: argparse.Namespace, model, model_args: dict, as_it_is: bool = False) -> None:
    """Write what a verb of `_add_source_arguments` made; what is known of a net `as_it_is` goes into the model card."""
    from timm_weighted_skip.files import read_json
    from timm_weighted_skip.hub.config import Results
    from timm_weighted_skip.hub.save import save_checkpoint, save_weights
    from timm_weighted_skip.hub.source import known_results

    if args.output.suffix == '.safetensors':
        if args.results:
            raise ValueError(f'--results goes into a model card; with it, give a folder, not {args.output}')
        _show(f'wrote {save_weights(model, args.output)}')
        return
    if args.output.suffix in ('.pth', '.pt', '.bin', '.tar', '.ckpt'):
        raise ValueError(f'weights are written as safetensors; give a folder or FILE.safetensors, not {args.output}')
    results = None
    if args.results:
        results = Results.from_dict(read_json(args.results), str(args.results))
    elif as_it_is:
        results = known_results(args.model)
    _show(f'wrote {save_checkpoint(model, args.output, results, model_args)}')


def add_save(verbs) -> None:
    """`save`: a trained net as a checkpoint directory."""
    parser = verbs.add_parser('save', help='make a checkpoint directory of a trained net: weights, config, model card')
    _add_source_arguments(parser)

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.hub.source import load_net_and_args

        # What was measured of a run is not of its net with other weights or arguments.
        as_it_is = not args.checkpoint and not args.model_kwargs
        _write_net(args, *load_net_and_args(args.model, args.checkpoint, args.model_kwargs), as_it_is)

    parser.set_defaults(run=run)


def add_convert(verbs) -> None:
    """`convert`: between plain, AdaResNet and AWM nets."""
    parser = verbs.add_parser('convert', help='turn a plain net into a weighted one of the same output, or back')
    _add_source_arguments(parser)
    parser.add_argument('--to', required=True, choices=('awm', 'adaresnet', 'plain'), help='what to make of it')

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip import convert
        from timm_weighted_skip.hub.source import load_net_and_args

        model, model_args = load_net_and_args(args.model, args.checkpoint, args.model_kwargs)
        make = getattr(convert, f'to_{args.to}')
        _write_net(args, make(model), convert.plain_args(model_args))

    parser.set_defaults(run=run)


def add_fold(verbs) -> None:
    """`fold`: an AdaResNet as a plain ResNet."""
    parser = verbs.add_parser(
        'fold', help="fold an AdaResNet's weights into its layers: the same output of a plain net, but where w <= 0"
    )
    _add_source_arguments(parser)

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip import convert
        from timm_weighted_skip.hub.source import load_net_and_args

        model, model_args = load_net_and_args(args.model, args.checkpoint, args.model_kwargs)
        folded, kept = convert.fold(model)
        if kept:
            _show(f'still weighted, having w <= 0 on an identity shortcut: {", ".join(kept)}')
        fixed = {'skip_fixed': True} if kept and model_args.get('skip_fixed') else {}
        _write_net(args, folded, {**convert.plain_args(model_args), **fixed})

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
                _show(done)
        else:
            _show(publish(args.folder, args.repo_id, args.private, args.dry_run, token))

    parser.set_defaults(run=run)


def _add_image_set_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and where the work is done."""
    parser.add_argument('--data', metavar='SET', help='cifar10, cifar100, mnist, digits, folder, or NAME of NAME_*.npz')
    parser.add_argument('--data-dir', metavar='DIR', help='folder of the data')
    parser.add_argument('--download', action='store_true', help='let torchvision fetch the data into --data-dir')
    parser.add_argument('--device', default=DEVICE, help=f'({DEVICE})')


def add_train(verbs) -> None:
    """`train`: a net on an image set that fits in memory."""
    from timm_weighted_skip.train.recipe import add_recipe_arguments, list_recipes

    parser = verbs.add_parser(
        'train',
        help='train a net on an image set that fits in memory',
        description='Train a net on an image set that fits in memory, on one device. For anything larger, '
        "`python -m timm_weighted_skip.train` runs timm's train.py with the same recipes.",
    )
    parser.add_argument(
        '--resume', metavar='DIR', help='go on with the run in this folder; takes --device and --data-dir beside it'
    )
    parser.add_argument('--model', help=f'timm model name ({MODEL})')
    parser.add_argument('--pretrained', action='store_true', help='start from its checkpoint')
    _add_image_set_arguments(parser)
    recipes = ', '.join(list_recipes())
    parser.add_argument(
        '--recipe', metavar='NAME', help=f"a YAML file, or one of {recipes} (awm_imagenet is for timm's script)"
    )
    parser.add_argument('--seeds', type=int, nargs='+', metavar='S', help='a run for each, and their mean')
    parser.add_argument('--output', default='runs', metavar='DIR', help='where the folders of runs are (%(default)s)')
    parser.add_argument('--experiment', metavar='NAME', help="the run's folder in there (<model>-<data>[-<recipe>])")
    add_recipe_arguments(parser)
    parser.set_defaults(device=None)  # a run that goes on does so where it was, if nothing is said

    def run(args: argparse.Namespace) -> None:
        from timm_weighted_skip.analysis.moments import weight_moments
        from timm_weighted_skip.train.runs import describe, run_seeds
        from timm_weighted_skip.train.task import read_task, task_of

        if args.resume is not None:
            others = vars(args).keys() - {'resume', 'device', 'data_dir'}
            given = [name for name in vars(args) if name in others and getattr(args, name) != parser.get_default(name)]
            if given:
                raise ValueError(f'--resume goes on as the run was started; give no --{given[0].replace("_", "-")}')
            folder = Path(args.resume)
            task, seeds = read_task(folder)
            task.device = args.device or task.device
            task.data_dir = str(Path(args.data_dir).absolute()) if args.data_dir else task.data_dir
        else:
            args.model, args.device = args.model or MODEL, args.device or DEVICE
            task, seeds, folder = task_of(args)
        try:
            result = run_seeds(task, folder, seeds, resume=args.resume is not None, analysis=weight_moments)
        except KeyboardInterrupt as stop:
            print(f'\n{stop}', file=sys.stderr)
            raise SystemExit(130) from None
        _show(describe(result, folder))

    parser.set_defaults(run=run)


def add_eval(verbs) -> None:
    """`eval`: the accuracy of trained weights."""
    parser = verbs.add_parser('eval', help='loss and accuracies of trained weights')
    _add_net_arguments(parser)
    _add_image_set_arguments(parser)
    parser.add_argument('--batch-size', type=int, default=256, metavar='N', help='(%(default)s)')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')

    def run(args: argparse.Namespace) -> None:
        import json

        from timm_weighted_skip.data import load_image_set
        from timm_weighted_skip.nets import find_net
        from timm_weighted_skip.train.evaluate import evaluate_on

        if args.data is None:
            raise ValueError('--data is missing: the images to evaluate on, such as cifar10 with --data-dir, or digits')
        named = find_net(args.model, args.checkpoint)
        net = named.load(args.model_kwargs, need_weights=True)
        data = load_image_set(args.data, False, args.data_dir, args.download)
        measured = evaluate_on(net, data, args.batch_size, args.device, args.amp)
        _show(json.dumps({'model': named.name, **measured}))

    parser.set_defaults(run=run)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='weighted-skip', description=timm_weighted_skip.__doc__)
    parser.add_argument('--version', action='version', version=f'%(prog)s {timm_weighted_skip.__version__}')
    verbs = parser.add_subparsers(metavar='VERB', required=True)
    training = (add_train, add_eval)
    checkpoints = (add_save, add_convert, add_fold, add_publish)
    analyses = (add_inspect, add_variance, add_extremes, add_discriminate, add_curves, add_report)
    for add in (add_list, add_quickstart, *training, *checkpoints, *analyses):
        add(verbs)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit status. What the user can mend is one line on stderr, without a trace."""
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        text = str(error) or type(error).__name__
        if text.startswith('Caught '):  # by torch in a process that loads images: the message is behind a traceback
            text = text.rstrip().rpartition('\n')[2].partition(': ')[2]
        print(f'weighted-skip: {text}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
