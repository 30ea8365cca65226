"""The net that a user names: a registered model, a folder or Hub repository, or a model with a file of weights."""

import os
import sys
from pathlib import Path
from typing import Any, Optional, Union

import timm
from timm.models import load_checkpoint
from torch import nn

__all__ = ['load_net']


def load_net(source: str, checkpoint: Optional[Union[str, Path]] = None, **model_kwargs: Any) -> nn.Module:
    """The net of `source`, with its weights, in eval mode.

    Args:
        source: A folder with `config.json` and `model.safetensors`, or what timm's `create_model` takes: a registered
            name, `local-dir:FOLDER` or `hf-hub:REPOSITORY`. A registered name loads its published weights where it has
            some; else it keeps its initial ones, and a line on stderr says so.
        checkpoint: File of weights to load in their place.
        model_kwargs: Arguments of the model, such as `num_classes=100`.

    Raises:
        ValueError: There is no such model, or the weights are another net's.
        OSError: There is no such file or folder.
    """
    if Path(source).is_dir():
        source = f'local-dir:{source}'
    by_name = ':' not in source
    if by_name and not timm.is_model(source):
        raise ValueError(
            f'{source!r} is neither a folder nor a model; `weighted-skip list` names the models, and '
            'local-dir:FOLDER and hf-hub:REPOSITORY are taken as well'
        )
    if source.startswith('local-dir:') and not Path(source[len('local-dir:') :], 'config.json').is_file():
        raise FileNotFoundError(f'{source[len("local-dir:") :]} has no config.json; give a folder that has')
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f'no file {str(checkpoint)!r} to load weights from')
    published = not by_name or getattr(timm.models.get_pretrained_cfg(source), 'has_weights', False)
    if by_name and not published and checkpoint is None:
        print(f'{source}: no published weights and no --checkpoint given; these are initial weights', file=sys.stderr)
    try:
        net = timm.create_model(source, pretrained=published and checkpoint is None, **model_kwargs)
        if checkpoint is not None:
            load_checkpoint(net, os.fspath(checkpoint), weights_only=True)
    except (RuntimeError, TypeError) as error:
        # torch lists every parameter that does not fit, after a line that names the class.
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(
            f'{checkpoint or source} does not fit {source} with {model_kwargs or "its default arguments"}: '
            f'{" ".join(lines[:2])}; give the arguments it was trained with (--model-kwargs num_classes=100)'
        ) from error
    return net.eval()
