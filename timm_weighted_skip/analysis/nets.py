"""The net that a user names: a registered model, a folder or Hub repository, a run, or a file of weights."""

import json
import os
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Optional, Union

import timm
from safetensors import SafetensorError, safe_open
from timm.models import load_checkpoint
from torch import nn

from timm_weighted_skip.models.names import check_model_name

__all__ = ['load_net']


def load_net(source: str, checkpoint: Optional[Union[str, Path]] = None, **model_kwargs: Any) -> nn.Module:
    """The net of `source`, with its weights, in eval mode.

    Args:
        source: A folder with `config.json` and `model.safetensors`; the folder of a training run, or one of its files
            of weights; or what timm's `create_model` takes: a registered name, `local-dir:FOLDER` or
            `hf-hub:REPOSITORY`. A registered name loads its published weights where it has some; else it keeps its
            initial ones, and a line on stderr says so.
        checkpoint: File of weights to load in place of the source's.
        model_kwargs: Arguments of the model, such as `num_classes=100`.

    Raises:
        ValueError: There is no such model, or the weights are another net's or not readable.
        OSError: There is no such file or folder.
    """
    path = Path(source)
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f'no file {str(checkpoint)!r} to load weights from')
    if path.is_dir() and not (path / 'config.json').is_file():
        path = path / 'last.safetensors'
        if not path.is_file():
            raise FileNotFoundError(f'{source} has neither config.json nor last.safetensors; give one that has')
    elif path.is_dir():
        source = f'local-dir:{source}'
    if path.is_file():
        model, arguments = _described(path)
        model_kwargs = {**arguments, **model_kwargs}
    else:
        model = source
    weights = checkpoint or (path if path.is_file() else None)
    by_name = ':' not in model
    check_model_name(model)
    published = not by_name or bool(getattr(timm.models.get_pretrained_cfg(model), 'has_weights', False))
    if not published and weights is None:
        print(f'{model}: no published weights and no --checkpoint given; these are initial weights', file=sys.stderr)
    try:
        net = timm.create_model(model, pretrained=published and weights is None, **model_kwargs)
        if weights is not None:
            load_checkpoint(net, os.fspath(weights), weights_only=True)
    except (RuntimeError, TypeError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        # torch lists every parameter that does not fit, after a line that names the class.
        reason = ' '.join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(
            f'the weights of {checkpoint or source} do not fit {model}: {reason}; '
            'give the arguments that it was trained with, such as --model-kwargs num_classes=100'
        ) from error
    return net.eval()


def _described(path: Path) -> tuple[str, dict[str, Any]]:
    """Model and arguments of a file that a training run wrote, from what the file says of itself."""
    try:
        with safe_open(path, 'pt') as file:
            about = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f'{path} is not a whole safetensors file ({error})') from None
    if not {'model', 'model_kwargs', 'classes', 'mean', 'std'} <= set(about):
        raise ValueError(f'{path} does not say which model it is of; give the model, and this file as --checkpoint')
    mean, std = json.loads(about['mean']), json.loads(about['std'])
    # A run trains on its images as they are, of whatever size.
    cfg = {'mean': tuple(mean), 'std': tuple(std), 'input_size': (len(mean), None, None)}
    shape = {'num_classes': len(json.loads(about['classes'])), 'in_chans': len(mean)}
    return about['model'], {**json.loads(about['model_kwargs']), **shape, 'pretrained_cfg_overlay': cfg}
