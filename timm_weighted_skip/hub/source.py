"""What a checkpoint directory is made of: a net that a user names, the arguments it was made with, and its results."""

from pathlib import Path
from typing import Any, Optional, Union

from torch import nn

from timm_weighted_skip.files import read_json
from timm_weighted_skip.hub.checkpoint import validate_checkpoint
from timm_weighted_skip.hub.config import Results
from timm_weighted_skip.nets import FOREIGN, LAST, RESULT, architecture, find_net

__all__ = ['known_results', 'load_net_and_args']


def load_net_and_args(
    source: str, checkpoint: Optional[Union[str, Path]] = None, model_kwargs: Optional[dict[str, Any]] = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained net in eval mode, and the arguments it was made with beside number of classes and input channels.

    Args:
        source: See `timm_weighted_skip.nets.load_net`.
        checkpoint: Weights instead of the source's own.
        model_kwargs: timm's arguments of the net.

    Raises:
        ValueError, OSError: There is no such net, it has no weights, or `checkpoint` isn't a checkpoint of it.
    """
    found = find_net(source, checkpoint)
    model = found.load(model_kwargs, need_weights=True)
    _, stored = architecture(found.name)
    args = {**stored, **found.arguments, **(model_kwargs or {})}
    return model, {k: v for k, v in args.items() if k not in {'num_classes', 'in_chans', *FOREIGN}}


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint directory holds the weights that it was made of."""
    try:
        validate_checkpoint(folder)
    except (OSError, ValueError):
        return False
    return True


def known_results(source: str) -> Optional[Results]:
    """What was measured of the net of `source`: a checkpoint directory's results, or a finished run's.

    A directory that is not whole has none: transformers keeps the config's text where it saves weights trained further.

    Raises:
        ValueError: The file with the results is damaged.
    """
    path = Path(source.removeprefix('local-dir:')).resolve()
    if (path / 'config.json').is_file():
        config = read_json(path / 'config.json')
        results = Results.from_dict(config['results'], str(path / 'config.json')) if 'results' in config else None
        return results if results and _is_whole(path) else None
    folder = path.parent if path.name == LAST else path
    file, siblings = folder / RESULT, folder.parent / RESULT
    if not (folder / LAST).is_file() or not file.is_file():
        return None
    run, of_all = read_json(file), None
    # A run of several seeds has a folder for each, and beside them the results of all.
    if siblings.is_file() and folder.name == f'seed{run.get("recipe", {}).get("seed")}':
        of_all = read_json(siblings)
    return Results.of_run(run, str(file), of_all)
