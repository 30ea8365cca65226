"""Reading a checkpoint directory with suspicion."""

from pathlib import Path
from typing import Any, Optional

import timm
import torch
from timm.models import is_model
from torch import nn

from timm_weighted_skip.files import read_json
from timm_weighted_skip.hub.config import FILES, SAMPLE, Results, one_line
from timm_weighted_skip.hub.weights import is_pickle, read_weights
from timm_weighted_skip.nets import FOREIGN, MISFITS

__all__ = ['build_net', 'validate_checkpoint']

# Another CPU's convolutions differ in the last digits; another net differs in the first.
SAMPLE_ERROR = 1e-3


def _first(names: set[str]) -> str:
    return f'{", ".join(sorted(names)[:3])}{", ..." if len(names) > 3 else ""} ({len(names)})'


def build_net(config: dict[str, Any], file: Path, **kwargs: Any) -> nn.Module:
    """The net that the config in `file` names, untrained; `kwargs` are `timm.create_model`'s."""
    architecture, args, cfg = config.get('architecture'), config.get('model_args', {}), config.get('pretrained_cfg')
    if not isinstance(architecture, str) or not is_model(architecture):
        raise ValueError(f'{file} names the architecture {architecture!r}, which is not registered in timm')
    if not isinstance(args, dict) or not isinstance(cfg, dict):
        raise ValueError(f'{file} needs an object as pretrained_cfg, and as model_args if it has any')
    if foreign := FOREIGN & args.keys():
        raise ValueError(
            f'{file} has {", ".join(sorted(foreign))} among its model_args; these are not arguments of a net'
        )
    for source in ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'custom_load'):
        if cfg.get(source):
            raise ValueError(f'{file} sets {source}={cfg[source]!r}; the weights are those of its own directory')
    try:
        return timm.create_model(architecture, pretrained_cfg={**cfg, 'architecture': architecture}, **args, **kwargs)
    except MISFITS as error:
        raise ValueError(f'{file}: {architecture} cannot be built: {one_line(error)}') from None


def _match(tensors: dict[str, torch.Tensor], model: nn.Module, architecture: str, file: Path) -> None:
    """Refuse tensors that aren't exactly those of the net."""
    own = model.state_dict()
    problems = []
    if missing := own.keys() - tensors.keys():
        problems.append(f'lacks {_first(missing)}')
    if extra := tensors.keys() - own.keys():
        problems.append(f'has in excess {_first(extra)}')
    for name in sorted(own.keys() & tensors.keys()):
        got, wanted = tensors[name], own[name]
        if got.shape != wanted.shape:
            problems.append(f'{name} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}')
        elif got.is_floating_point() != wanted.is_floating_point():
            problems.append(f'{name} is {got.dtype}, not {wanted.dtype}')
    if problems:
        raise ValueError(f'{file} does not hold the weights of {architecture}: {"; ".join(problems[:4])}')


def validate_checkpoint(folder: Path) -> nn.Module:
    """The trained net of a checkpoint directory, in eval mode, after every check that can be made offline.

    The config names a registered net; the weights are whole, finite and exactly that net's; loading the directory as a
    user does gives those weights to the bit, and the net gives the stored sample's logits; the model card's front
    matter is readable; no file is a pickle.

    Raises:
        ValueError, OSError: The first check that fails: the file, the reason.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is not a folder; checkpoint directories are made by `weighted-skip save`')
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f'{folder} has no {name}; a checkpoint directory holds {", ".join(FILES)}')
    for file in sorted(file for file in folder.rglob('*') if file.is_file()):
        if is_pickle(file):
            raise ValueError(f'{file} is a pickle, which can run any code when it is loaded; remove it')
    config = read_json(folder / 'config.json')
    if 'results' in config:
        Results.from_dict(config['results'], str(folder / 'config.json'))
    tensors, metadata = read_weights(folder / 'model.safetensors')
    sample, _ = read_weights(folder / SAMPLE)
    architecture = config.get('architecture', '')
    if metadata.get('architecture') != architecture:
        raise ValueError(
            f'{folder / "config.json"} names {architecture!r}, but the weights are of {metadata.get("architecture")!r}'
        )
    _match(tensors, build_net(config, folder / 'config.json'), architecture, folder / 'model.safetensors')
    _check_card(folder / 'README.md')

    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    except MISFITS as error:
        raise ValueError(f'{folder / "config.json"} does not fit the weights: {one_line(error)}') from None
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, tensors[name].to(tensor.dtype)):
            raise ValueError(f'{folder / "model.safetensors"}: {name} did not load as it is stored')
    _check_sample(model, sample, folder / SAMPLE)
    return model


@torch.no_grad()
def _check_sample(model: nn.Module, sample: dict[str, torch.Tensor], file: Path) -> None:
    if sample.keys() != {'input', 'logits'}:
        raise ValueError(f'{file} holds {sorted(sample)}, not an input and its logits')
    try:
        logits = model(sample['input'])
    except MISFITS as misfit:
        raise ValueError(f'{file}: the net does not take the stored input: {one_line(misfit)}') from None
    error: Optional[float] = None
    if logits.shape == sample['logits'].shape:
        error = ((logits - sample['logits']).norm() / sample['logits'].norm().clamp_min(1e-12)).item()
    if error is None or not error < SAMPLE_ERROR:
        raise ValueError(
            f'{file}: the rebuilt net does not give the stored logits (relative error {error}); was it made with '
            'arguments that config.json does not have as model_args?'
        )


def _check_card(file: Path) -> None:
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(file.read_text(encoding='utf-8'))
        if card.data.get('library_name') != 'timm':
            raise ValueError(f'library_name is {card.data.get("library_name")!r}, not timm')
    except Exception as error:  # of the YAML parser's own making
        raise ValueError(f'{file} is not a model card: {one_line(error)}') from None
