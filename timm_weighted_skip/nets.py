"""The net that a user names, with its weights: a registered model, a folder, a Hub repository or a training run."""

import argparse
import json
import sys
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any, Optional, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import resolve_data_config
from timm.models import (
    get_pretrained_cfg,
    get_pretrained_cfg_value,
    load_model_config_from_hf,
    load_state_dict,
    parse_model_name,
    split_model_name_tag,
)
from torch import nn

from timm_weighted_skip.files import first_sentence, read_json
from timm_weighted_skip.models.names import check_model_name

__all__ = [
    'ARGS',
    'DAMAGED',
    'FOREIGN',
    'LAST',
    'LOG',
    'MISFITS',
    'RESULT',
    'NamedNet',
    'Trained',
    'architecture',
    'find_net',
    'load_net',
]

ARGS, LOG, RESULT, LAST = 'args.yaml', 'log.jsonl', 'result.json', 'last.safetensors'
"""In the folder of a training run: what it was asked for, a line per epoch, what it measured, its last weights."""

FOREIGN = {'cache_dir', 'checkpoint_path', 'features_only', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay'}
"""Arguments of `timm.create_model` that are not the net's; a file from somewhere has no business with them."""

DAMAGED = SafetensorError, UnpicklingError, EOFError
"""What reading a damaged file of weights raises."""

MISFITS = RuntimeError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError
"""What timm and torch raise over arguments, weights and images that no net takes; ours raise a `ValueError`."""

OF_WEIGHTS = 'tag', 'description', 'license', 'origin_url', 'paper_ids', 'label_names', 'label_descriptions'
UNKNOWN = dict.fromkeys((*OF_WEIGHTS, 'test_input_size', 'test_crop_pct'))
"""What the default cfg of a registered model says of its own weights, and not of others."""


@dataclass(frozen=True)
class Trained:
    """What weights that `weighted-skip train` wrote say of their net, in the metadata of their file.

    Attributes:
        model: timm's name of the net.
        model_kwargs: Its arguments, beside number of classes and input channels.
        classes: Names of the classes.
        input_size: (C, H, W) of the images, which are trained on as they are.
        mean, std: Per channel, of pixels in [0, 1].
        license: Of the weights that the training began with, if it began with some.
    """

    model: str
    model_kwargs: dict[str, Any]
    classes: list[str]
    input_size: list[int]
    mean: list[float]
    std: list[float]
    license: Optional[str] = None

    @classmethod
    def read(cls, file: Path) -> 'Trained':
        """What the weights in `file` say.

        Raises:
            ValueError: They are not of `weighted-skip train`, or not whole.
        """
        try:
            with safe_open(file, 'pt') as opened:
                about = opened.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f'{file} is not a whole safetensors file ({error}); one of another kind is given as --checkpoint, with '
                'its model'
            ) from None
        names = {field.name for field in fields(cls)}
        if missing := names - about.keys() - {'license'}:
            raise ValueError(
                f'{file} does not say which model it is of (it lacks {", ".join(sorted(missing))}); give a folder that '
                'has config.json, or the model and this file as --checkpoint'
            )
        try:
            told = {name: json.loads(about[name]) for name in names & about.keys() if name != 'model'}
            trained = cls(about['model'], **told)
            channels, _, _ = trained.input_size
            fits = (
                channels == len(trained.mean) == len(trained.std)
                and isinstance(trained.classes, list)
                and not FOREIGN & trained.model_kwargs.keys()
            )
        except (ValueError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(f'{file} says things of its net that make no sense; it is damaged or not of this trainer')
        return trained

    def metadata(self) -> dict[str, str]:
        """The strings that `read` makes sense of."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value if name == 'model' else json.dumps(value) for name, value in values.items()}

    def arguments(self) -> dict[str, Any]:
        """Those of `timm.create_model`."""
        shape = {'num_classes': len(self.classes), 'in_chans': self.input_size[0]}
        config = {
            **UNKNOWN,
            'license': self.license,
            'num_classes': len(self.classes),
            'input_size': tuple(self.input_size),
            'pool_size': self._pool_size(),
            'crop_pct': 1.0,
            'mean': tuple(self.mean),
            'std': tuple(self.std),
            'label_names': self.classes,
        }
        return {**self.model_kwargs, **shape, 'pretrained_cfg_overlay': config}

    def _pool_size(self) -> Optional[tuple[int, ...]]:
        """That of the registered net, which is for images of another size, scaled; a part of a pixel counts as one."""
        registered = get_pretrained_cfg(self.model)
        if registered is None or registered.pool_size is None:
            return None
        sizes = zip(registered.pool_size, self.input_size[1:], registered.input_size[1:])
        return tuple(ceil(pool * size / whole) for pool, size, whole in sizes)


@dataclass(frozen=True)
class NamedNet:
    """What a user's name of a net stands for.

    Attributes:
        name: What `timm.create_model` takes.
        arguments: Of `timm.create_model`, beside the name.
        weights: File of the weights; None for those that timm has of `name`.
    """

    name: str
    arguments: dict[str, Any]
    weights: Optional[Path] = None

    def load(self, model_kwargs: Optional[dict[str, Any]] = None, need_weights: bool = False) -> nn.Module:
        """The net, see `load_net`."""
        model_kwargs = model_kwargs or {}
        if foreign := FOREIGN & model_kwargs.keys():
            foreign_names = ', '.join(sorted(foreign))
            raise ValueError(f'{foreign_names} is no argument of a net; name the net and its weights instead')
        state = None if self.weights is None else _read_state(self.weights)
        published = state is None and (':' in self.name or bool(get_pretrained_cfg_value(self.name, 'has_weights')))
        if state is None and not published:
            if need_weights:
                raise ValueError(f'{self.name} has no published weights; give --checkpoint FILE or the folder of a run')
            print(
                f'{self.name}: no published weights and no --checkpoint given; these are initial weights',
                file=sys.stderr,
            )
        net = None
        try:
            net = timm.create_model(self.name, pretrained=published, **{**self.arguments, **model_kwargs})
            if state is not None:
                net.load_state_dict(state)
        except (*DAMAGED, *MISFITS) as error:
            # torch lists every parameter that does not fit, after a line that names the class.
            reason = shorten(' '.join(str(error).splitlines()[:2]), 300) or type(error).__name__
            loading = net is not None or (published and isinstance(error, (*DAMAGED, RuntimeError)))
            if not loading:
                raise ValueError(f'{self.name} can not be made with these arguments: {reason}') from error
            raise ValueError(
                f'the weights of {self.weights or self.name} do not fit {self.name}: {reason}; '
                'give the arguments that it was trained with, such as --model-kwargs num_classes=100'
            ) from error
        if published:
            _check_head(net, self.name)
        return net.eval()


def _check_head(net: Any, name: str) -> None:
    """Refuse the fresh head that timm gives a net of another number of classes than its published weights'."""
    wanted, classes = net.num_classes, net.pretrained_cfg['num_classes']
    if wanted != classes:
        raise ValueError(
            f'the weights of {name} are of {classes} classes, not of {wanted}; leave num_classes out, or give weights '
            f'of {wanted} classes as --checkpoint'
        )


def find_net(source: str, checkpoint: Optional[Union[str, Path]] = None) -> NamedNet:
    """What is meant by `source`, with the weights in `checkpoint` if that is given; see `load_net`.

    Raises:
        ValueError: There is no such model, or the weights say not what they are of.
        OSError: There is no such file or folder.
    """
    if checkpoint is None:
        return _find(source)
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise FileNotFoundError(f'no file {str(checkpoint)!r} to load weights from')
    found = _find(source)
    try:
        trained = Trained.read(checkpoint)
    except ValueError:  # another trainer's say nothing of their net, nor of their classes' names
        overlay = {**UNKNOWN, **_images_of(checkpoint)}
        return replace(found, weights=checkpoint, arguments={'pretrained_cfg_overlay': overlay, **found.arguments})
    if architecture(found.name)[0] != split_model_name_tag(trained.model)[0]:
        raise ValueError(f'{checkpoint} is of {trained.model}, not of {source}; name {trained.model} with it')
    return _trained_net(trained, checkpoint)


def _images_of(checkpoint: Path) -> dict[str, Any]:
    """What timm's `train.py` was told of its images, where that is written in its checkpoint, by timm's names."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            told = vars(torch.load(checkpoint, map_location='cpu', weights_only=True, mmap=True)['args'])
        config = resolve_data_config(told)
    except Exception:  # whatever it is: no checkpoint of that script; `_read_state` says what is wrong with a file
        return {}
    given = [name for name in ('mean', 'std', 'interpolation', 'crop_pct') if told.get(name) is not None]
    if told.get('input_size') is not None or told.get('img_size') is not None:
        given.append('input_size')
    return {name: config[name] for name in given}


def _trained_net(trained: Trained, file: Path) -> NamedNet:
    try:
        check_model_name(trained.model)
    except ValueError as error:
        raise ValueError(f'{file} is of a net that is not registered here: {error}') from None
    return NamedNet(trained.model, trained.arguments(), file)


def architecture(name: str) -> tuple[str, dict[str, Any]]:
    """The registered model that a net's name stands for, without a tag, and the arguments that its config gives it.

    Args:
        name: What timm's `create_model` takes.

    Raises:
        ValueError: The config of a folder names no model.
        OSError: There is no such folder or repository.
    """
    where, model_id = parse_model_name(name)
    if not where:
        return split_model_name_tag(model_id)[0], {}
    if where != 'local-dir':
        _, model, arguments = load_model_config_from_hf(model_id)
        return model, arguments
    file = Path(model_id) / 'config.json'
    config = read_json(file)
    if 'architecture' not in config:
        raise ValueError(f'{file} names no architecture; give the folder of a checkpoint')
    return config['architecture'], config.get('model_args', {})


def _find(source: str) -> NamedNet:
    path = Path(source)
    if (path / 'config.json').is_file():
        return NamedNet(f'local-dir:{source}', {})
    if (path / LAST).is_file():
        path = path / LAST
    if path.is_file():
        return _trained_net(Trained.read(path), path)
    if source and path.is_dir() and not timm.is_model(source):
        runs = sorted(run.parent.name for run in path.glob(f'*/{LAST}'))
        instead = f'one of its runs, {", ".join(runs)}' if runs else 'one that has'
        raise FileNotFoundError(f'{source} has neither config.json nor {LAST}; give {instead}')
    if ':' not in source and (len(path.parts) > 1 or path.suffix == '.safetensors'):
        raise FileNotFoundError(f'there is no file or folder {source}')
    check_model_name(source)
    return NamedNet(source, {})


def load_net(
    source: str,
    checkpoint: Optional[Union[str, Path]] = None,
    model_kwargs: Optional[dict[str, Any]] = None,
    need_weights: bool = False,
) -> nn.Module:
    """The net of `source`, with its weights, in eval mode.

    Args:
        source: A folder with `config.json` and `model.safetensors`; the folder of a training run, or one of its files
            of weights; or what timm's `create_model` takes: a registered name, `local-dir:FOLDER` or
            `hf-hub:REPOSITORY`. A registered name loads its published weights where it has some; else it keeps its
            initial ones, and a line on stderr says so.
        checkpoint: File of weights to load in place of the source's, such as timm's `model_best.pth.tar`; of one that
            also has an exponential moving average, the average. Pickles are read with `weights_only=True`.
        model_kwargs: Arguments of the model, such as `num_classes=100`.
        need_weights: Refuse a net that would keep its initial weights.

    Raises:
        ValueError: There is no such model, or the weights are another net's or not readable.
        OSError: There is no such file or folder.
    """
    return find_net(source, checkpoint).load(model_kwargs, need_weights)


def _read_state(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of weights."""
    try:
        state = load_state_dict(str(file), weights_only=True)
        if all(isinstance(name, str) for name in state):
            return state
        reason = 'it holds no weights with names'
    except (*DAMAGED, RuntimeError) as error:
        reason = first_sentence(error)
    except MISFITS:  # of bytes that happen to begin like a pickle
        reason = 'it is neither a safetensors file nor one that torch wrote'
    weights = file.with_name(file.name.replace('.pth.tar', '.safetensors'))  # of a state that our trainer wrote
    instead = f'; give {weights}' if weights != file and weights.is_file() else ''
    raise ValueError(f'{file} is not a checkpoint that can be read: {reason}{instead}')
