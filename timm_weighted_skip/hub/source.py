"""What a checkpoint directory is made of: a net that a user names, the arguments it was made with, and its results."""

from pathlib import Path
from typing import Any, Optional

from timm.models import load_model_config_from_hf, parse_model_name
from torch import nn

from timm_weighted_skip.hub.config import Results, read_json
from timm_weighted_skip.nets import LAST, find_net, load_net

__all__ = ['load_source', 'results_of_run']


def load_source(
    source: str, checkpoint: Optional[Path] = None, model_kwargs: Optional[dict[str, Any]] = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained net in eval mode, and the arguments it was made with beside number of classes and input channels.

    Args:
        source: See `timm_weighted_skip.nets.load_net`.
        checkpoint: Weights instead of the source's own.
        model_kwargs: timm's arguments of the net.

    Raises:
        ValueError, OSError: There is no such net, it has no weights, or `checkpoint` isn't a checkpoint of it.
    """
    model_kwargs = model_kwargs or {}
    model = load_net(source, checkpoint, need_weights=True, **model_kwargs)
    found = find_net(source)
    where, model_id = parse_model_name(found.name)
    if where == 'local-dir':
        stored = read_json(Path(model_id) / 'config.json').get('model_args', {})
    else:
        stored = load_model_config_from_hf(model_id)[2] if where else {}
    args = {**stored, **found.arguments, **model_kwargs}
    return model, {k: v for k, v in args.items() if k not in ('num_classes', 'in_chans', 'pretrained_cfg_overlay')}


def results_of_run(source: str) -> Optional[Results]:
    """What `weighted-skip train` has measured of the net of `source` and its other seeds.

    None if `source` isn't a run's folder or its `last.safetensors`, or the run isn't finished.
    """
    path = Path(source)
    folder = path.parent if path.name == LAST else path
    if not (folder / LAST).is_file() or not (folder / 'result.json').is_file():
        return None
    own, siblings = read_json(folder / 'result.json'), folder.parent / 'result.json'
    # A run of several seeds has a folder for each, and beside them the results of all.
    all_seeds = read_json(siblings) if siblings.is_file() else {}
    return Results.of_run(own, all_seeds if 'seeds' in all_seeds else None)
