"""The net that a command starts from: a name or a directory, perhaps with the checkpoint of a training."""

import pickle
from pathlib import Path
from typing import Any, Optional

import timm
from safetensors import SafetensorError
from timm.models import load_model_config_from_hf, load_state_dict, parse_model_name
from torch import nn

from timm_weighted_skip.hub.config import one_line, read_json
from timm_weighted_skip.models.names import check_model_name

__all__ = ['load_net']


def load_net(
    name: str, checkpoint: Optional[Path] = None, model_kwargs: Optional[dict[str, Any]] = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained net in eval mode, and the arguments it was made with beside number of classes and input channels.

    Args:
        name: Whatever `timm.create_model` takes: 'awm_resnet50.a1_in1k', 'local-dir:...', 'hf_hub:...'.
        checkpoint: Weights instead of the name's own, such as timm's `model_best.pth.tar`; of one that also has an
            exponential moving average, the average. Pickles are read with `weights_only=True`.
        model_kwargs: timm's arguments of the net.

    Raises:
        ValueError: There is no such net, it has no weights, or `checkpoint` isn't a checkpoint of it.
    """
    check_model_name(name)
    model_kwargs = dict(model_kwargs or {})
    source, model_id = parse_model_name(name)
    if source == 'local-dir':
        stored = read_json(Path(model_id) / 'config.json').get('model_args', {})
    else:
        stored = load_model_config_from_hf(model_id)[2] if source else {}
    try:
        model = timm.create_model(name, pretrained=checkpoint is None, **model_kwargs)
        if checkpoint is not None:
            if not checkpoint.is_file():
                raise FileNotFoundError(f'{checkpoint} is not a file')
            model.load_state_dict(load_state_dict(str(checkpoint), weights_only=True))
    except (RuntimeError, TypeError, EOFError, LookupError, pickle.UnpicklingError, SafetensorError) as error:
        what = f'{checkpoint} is not a checkpoint of {name}' if checkpoint else f'{name} could not be loaded'
        raise ValueError(f'{what}: {one_line(error)}') from None
    args = {**stored, **model_kwargs}
    return model.eval(), {k: v for k, v in args.items() if k not in ('num_classes', 'in_chans')}
