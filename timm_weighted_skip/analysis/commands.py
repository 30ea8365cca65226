"""What the analysis verbs of the command line do with their parsed arguments."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
from torch import nn

from timm_weighted_skip.analysis.collect import Collected, collect
from timm_weighted_skip.analysis.curves import curves, has_log, read_run, sweep
from timm_weighted_skip.analysis.data import LabelledImages, load_images
from timm_weighted_skip.analysis.discriminate import discriminate
from timm_weighted_skip.analysis.extremes import extreme_images
from timm_weighted_skip.analysis.inspection import gate_table, rounds_table, skip_rounds, unit_table
from timm_weighted_skip.analysis.report import html_report
from timm_weighted_skip.analysis.tables import Result, require
from timm_weighted_skip.analysis.units import gates, mapping_units
from timm_weighted_skip.analysis.variance import group_variance
from timm_weighted_skip.checks import check_device
from timm_weighted_skip.files import write_file
from timm_weighted_skip.nets import ARGS, load_net

__all__ = [
    'curve_result',
    'discriminate_result',
    'extremes_result',
    'inspect_result',
    'variance_result',
    'write_report',
]


def _images(args: argparse.Namespace, net: nn.Module, split: str = 'validation') -> LabelledImages:
    overrides = {name: getattr(args, name) for name in ('input_size', 'mean', 'std')}
    return load_images(args.data, net, args.data_dir, split, **overrides)


def _read(
    args: argparse.Namespace, model: str, checkpoint: Optional[str]
) -> tuple[nn.Module, LabelledImages, Collected]:
    """The net, the test images and what the net's gates make of them."""
    net = load_net(model, checkpoint, args.model_kwargs).to(check_device(args.device))
    mapping_units(net)  # says what is wrong with the net before the data is looked at
    images = _images(args, net)
    return net, images, collect(net, images.loader(args.batch_size, args.workers))


def _gate_table(args: argparse.Namespace, collected: Collected, classes: Optional[Sequence[str]]) -> Result:
    result = gate_table(collected, classes)
    return replace(result, about={'data': f'{args.data}, its test images', **result.about})


def _check_no_image_options(args: argparse.Namespace) -> None:
    for name in ('data_dir', 'input_size', 'mean', 'std', 'per_class'):
        if getattr(args, name, None):
            raise ValueError(f'--{name.replace("_", "-")} needs images; give --data')


def _table(nets: Sequence[nn.Module]) -> Result:
    """What is known of the nets' weights without images."""
    return unit_table(nets[0]) if len(nets) == 1 and gates(nets[0]) else rounds_table(nets)


def inspect_result(args: argparse.Namespace) -> Result:
    """The weights of one net's units; of several AdaResNets' side by side."""
    if len(args.model) > 1 and args.checkpoint:
        raise ValueError(f'--checkpoint with {len(args.model)} models; give one model, or no --checkpoint')
    pairs = [(model, checkpoint) for model in args.model for checkpoint in args.checkpoint or [None]]
    if args.data is None:
        _check_no_image_options(args)
        result = _table([load_net(model, checkpoint, args.model_kwargs) for model, checkpoint in pairs])
        if len(pairs) > 1:
            names = (checkpoint or model for model, checkpoint in pairs)
            result.about.update({f'round {number}': name for number, name in enumerate(names, 1)})
        return result
    if len(pairs) > 1:
        raise ValueError(f'{len(pairs)} nets with --data; an AWM net is inspected alone')
    _, images, collected = _read(args, *pairs[0])
    return _gate_table(args, collected, images.classes if args.per_class else None)


def variance_result(args: argparse.Namespace) -> Result:
    """The variance of skip weights within and between groups of checkpoints."""
    groups: dict[str, np.ndarray] = {}
    names: list[str] = []
    every = [Path(member).resolve() for _, *members in args.group for member in members]
    if len({*every}) < len(every):
        raise ValueError('a checkpoint is given twice; give each once')
    for name, *members in args.group:
        if name in groups:
            raise ValueError(f'group {name!r} is given twice; give its checkpoints together')
        if not members:
            raise ValueError(f'group {name!r} has no checkpoints; give --group NAME CHECKPOINT CHECKPOINT ...')
        pairs = [(args.model or member, member if args.model else None) for member in members]
        nets = [load_net(model, checkpoint, args.model_kwargs) for model, checkpoint in pairs]
        units, groups[name] = skip_rounds(nets)
        names = names or [unit.name for unit in units]
    return group_variance(groups, names)


def extremes_result(args: argparse.Namespace) -> Result:
    """The images with the lowest and the highest sum of weights."""
    _, images, collected = _read(args, args.model, args.checkpoint)
    return extreme_images(collected, images.classes, images.picture, args.count)


def discriminate_result(args: argparse.Namespace) -> Result:
    """How well weights tell classes, against pixels, features and random gates."""
    require('sklearn')
    net = load_net(args.model, args.checkpoint, args.model_kwargs).to(check_device(args.device))
    mapping_units(net)
    loaders = [_images(args, net, split).loader(args.batch_size, args.workers) for split in ('train', 'validation')]
    train, test = (collect(net, loader, controls=True, seed=args.seed) for loader in loaders)
    return discriminate(train, test, args.dims, args.pca_variance, args.max_rank, args.seed)


def _of_seeds(folder: Path) -> list[Path]:
    """The runs of a training of several seeds; another folder itself."""
    return sorted(path for path in folder.glob('seed[0-9]*') if path.is_dir()) or [folder]


def curve_result(args: argparse.Namespace) -> Result:
    """Curves of runs or, with `against`, what they end at; of several, those without an epoch are left out."""
    folders = [folder for named in args.runs for folder in _of_seeds(Path(named))]
    begun = [folder for folder in folders if any((of / ARGS).is_file() for of in (folder, folder.parent))]
    early = [folder for folder in begun if not has_log(folder)]
    runs = [read_run(folder) for folder in folders if folder not in early or early == folders]
    result = sweep(runs, args.against) if args.against else curves(runs, args.error)
    if early:
        result.about['left out, before their first epoch'] = ', '.join(map(str, early))
    return result


def write_report(args: argparse.Namespace) -> Path:
    """Write the HTML page; returns its path."""
    require('jinja2', 'matplotlib')
    out = Path(args.output)
    if out.is_dir():
        raise ValueError(f'{out} is a folder; give the name of a file')
    sections: dict[str, Result] = {}
    folder = Path(args.model)
    # What the folder logged is not of other weights, nor of a net with other arguments.
    as_it_is = not args.checkpoint and not args.model_kwargs
    logged = as_it_is and has_log(folder)
    if args.data is None:
        _check_no_image_options(args)
        net = load_net(args.model, args.checkpoint, args.model_kwargs)
        weights = _table([net])
    else:
        net, images, collected = _read(args, args.model, args.checkpoint)
        weights = _gate_table(args, collected, images.classes)
    sections['Model'] = Result(about=_model_facts(net), tables={})
    if logged:
        run = read_run(folder)
        facts = {name: value for name, value in run.result.items() if name not in ('recipe', 'mapping_units')}
        for heading, values in (('Run', facts), ('Recipe', run.result.get('recipe'))):
            if isinstance(values, dict) and values:
                sections[heading] = Result(values, {})
        sections['Curves'] = curves([run])
    sections['Weights'] = weights
    if args.data is not None and 'concat' not in collected.kinds:
        sections['Extremes'] = extreme_images(collected, images.classes, images.picture)
    name = folder.resolve().name if folder.exists() else args.model
    name += f' with the weights of {args.checkpoint}' if args.checkpoint else ''
    write_file(out, html_report(f'{name}: weights of the mapping units', sections))
    return out


def _model_facts(net: nn.Module) -> dict[str, Any]:
    cfg: Any = getattr(net, 'pretrained_cfg', {})
    units = mapping_units(net)
    return {
        'architecture': cfg.get('architecture', type(net).__name__),
        'tag': cfg.get('tag'),
        'parameters': f'{sum(p.numel() for p in net.parameters()):,}',
        'of them in gates': f'{sum(p.numel() for gate in gates(net).values() for p in gate.parameters()):,}',
        'mapping units': f'{len(units)} ({sum(unit.kind == "projection" for unit in units)} with a projection)',
        'classes': str(net.num_classes),
        'input size': ' x '.join(map(str, cfg.get('input_size', ()))),
        'license': cfg.get('license'),
    }
