"""Writing a checkpoint directory: all of it or none."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
from timm.utils import unwrap_model
from torch import nn

import timm_weighted_skip
from timm_weighted_skip.files import read_json, write_file
from timm_weighted_skip.hub.card import model_card
from timm_weighted_skip.hub.checkpoint import validate_checkpoint
from timm_weighted_skip.hub.config import SAMPLE, Results, add_results, model_config, one_line
from timm_weighted_skip.hub.weights import write_weights
from timm_weighted_skip.models.pretrained import HUB_OWNER
from timm_weighted_skip.nets import MISFITS

__all__ = ['save_checkpoint', 'save_weights', 'update_results']


def save_checkpoint(
    model: nn.Module,
    folder: Path,
    results: Optional[Results] = None,
    model_args: Optional[dict[str, Any]] = None,
) -> Path:
    """Write `model` as a checkpoint directory that loads by `local-dir:`, and once it is published by `hf-hub:`.

    It is written beside its place, validated, and then moved there, so that a directory is whole or absent.

    Args:
        model: A net of `timm.create_model` or of `timm_weighted_skip.convert` whose architecture is registered. Its
            `pretrained_cfg` tells names of classes, pixel means and license, in a new net those of the default
            checkpoint of its name: a net of other images is made with them as `pretrained_cfg_overlay`.
        folder: Directory to make; its name is that of the repository, `<model>.<tag>` by custom.
        results: How the net was trained and what was measured; without them the card says that nothing was.
        model_args: Arguments that the net was made with, beside number of classes and input channels.

    Returns:
        `folder`.

    Raises:
        FileExistsError: There is something at `folder`.
        ValueError: What was written does not give `model` back; see `validate_checkpoint`.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f'{folder} exists; give another name or remove it')
    model = unwrap_model(model)
    config = model_config(model, model_args, results)
    metadata = {
        'format': 'pt',
        'architecture': config['architecture'],
        'timm_weighted_skip': timm_weighted_skip.__version__,
        'timm': timm.__version__,
        'recipe': results.recipe if results else '',
        'commit': results.commit if results else '',
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    try:
        sample = _sample(model, config['pretrained_cfg']['input_size'])
        _write_config_and_card(staging, config, folder.name)
        write_weights(model.state_dict(), staging / 'model.safetensors', metadata)
        (staging / SAMPLE).parent.mkdir()
        write_weights(sample, staging / SAMPLE, {'format': 'pt'})
        # Outputs don't tell which weights are shared, nor which are constants.
        rebuilt, own = ([name for name, _ in net.named_parameters()] for net in (validate_checkpoint(staging), model))
        if rebuilt != own:
            raise ValueError(
                f'{folder}: the rebuilt net has {len(rebuilt)} parameters to train, not {len(own)}; was it made with '
                'arguments, such as sharing or skip_fixed, that model_args lacks?'
            )
        staging.chmod(0o755)  # a temporary folder is its owner's alone
        staging.rename(folder)
    except ValueError as error:
        raise ValueError(str(error).replace(str(staging), str(folder))) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def update_results(folder: Union[str, Path], results: Results) -> None:
    """Have config and card of a checkpoint directory say `results`, as when more seeds or a baseline were trained."""
    folder = Path(folder)
    config = read_json(folder / 'config.json')
    add_results(config, results)
    _write_config_and_card(folder, config, folder.resolve().name)


def _write_config_and_card(folder: Path, config: dict[str, Any], name: str) -> None:
    """Write the texts of the checkpoint directory `name` to `folder`; the card is made of the config."""
    write_file(folder / 'config.json', json.dumps(config, indent=2) + '\n')
    write_file(folder / 'README.md', model_card(folder, f'{HUB_OWNER}/{name}'))


def save_weights(model: nn.Module, file: Path) -> Path:
    """Write the weights of `model` alone, as of a net whose architecture has no registered name; returns `file`.

    Raises:
        FileExistsError: There is something at `file`.
    """
    if file.exists():
        raise FileExistsError(f'{file} exists; give another name or remove it')
    write_weights(unwrap_model(model).state_dict(), file, {'format': 'pt'})
    return file


@torch.no_grad()
def _sample(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """One image (1, C, H, W) of noise and its logits (1, classes)."""
    net = copy.deepcopy(model).cpu().float().eval()  # as it loads
    image = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))
    try:
        return {'input': image, 'logits': net(image)}
    except MISFITS as misfit:
        raise ValueError(f'the net does not take an image of its input size: {one_line(misfit)}') from None
