"""Where the nets' checkpoints come from: timm's own of the plain backbones, and ours.

A plain net is the case at identity of its weighted net, so timm's checkpoints serve as they are.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Optional, Union

import torch
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    list_pretrained,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from timm_weighted_skip.files import read_json
from timm_weighted_skip.layers import Gate, SkipWeight

__all__ = ['HUB_OWNER', 'build', 'checkpoint_filter_fn', 'default_cfgs_of', 'timm_cfgs']

HUB_OWNER = 'timm-weighted-skip'
"""Owner of the Hub repositories of the checkpoint directories that this project publishes."""


def checkpoint_root() -> Path:
    """Folder of the checkpoint directories: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / 'checkpoints'
    return installed if installed.is_dir() else package.parent / 'hub_cards'


def timm_cfgs(prefix: str, backbones: Iterable[str]) -> dict[str, PretrainedCfg]:
    """Default cfgs of `prefix + backbone` for every checkpoint that the installed timm has of it, timm's default first.

    They name timm's own Hub repositories; `checkpoint_filter_fn` adds what these lack.
    """
    cfgs = {name: cfg for backbone in backbones for name, cfg in get_arch_pretrained_cfgs(backbone).items()}
    return {f'{prefix}{name}': replace(cfg) for name, cfg in cfgs.items()}


def staged_cfgs(root: Path, names: Iterable[str]) -> dict[str, PretrainedCfg]:
    """Default cfgs of the checkpoint directories `<name>.<tag>` in `root` whose name is one of `names`.

    The weights are the directory's own file, or else those of its repository under `HUB_OWNER`. A directory whose net
    was made with arguments of its own, beside input channels, isn't the name's checkpoint; it loads as `local-dir:`.
    """
    names = set(names)
    cfgs = {}
    for file in sorted(root.glob('*.*/config.json')):
        name_and_tag = file.parent.name
        name, _ = split_model_name_tag(name_and_tag)
        if name not in names:
            continue
        try:
            config = read_json(file)
            known = {field.name for field in fields(PretrainedCfg)}
            stated = {k: v for k, v in {**config['pretrained_cfg'], **config}.items() if k in known}
            cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()}  # timm's scripts add to shapes
            _, _, _ = cfg['input_size']
            weights = file.with_name('model.safetensors')
            cfg.update(
                hf_hub_id=f'{HUB_OWNER}/{name_and_tag}',
                file=str(weights) if weights.is_file() else None,
            )
            if config['architecture'] != name:
                raise ValueError(f'its net is {config["architecture"]}, and its folder is named after {name}')
            if not config.get('model_args', {}).keys() - {'in_chans'}:
                cfgs[name_and_tag] = PretrainedCfg(**cfg)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            # The other checkpoints and every net remain of use.
            warnings.warn(f'{file} is no config of {name_and_tag} and is left out: {error}', stacklevel=2)
    return cfgs


def default_cfgs_of(cfgs: Mapping[str, Union[PretrainedCfg, dict[str, Any]]]) -> dict[str, DefaultCfg]:
    """timm's `generate_default_cfgs` of `cfgs` and of the checkpoint directories that the package has of these nets.

    A net's default is timm's checkpoint if it has one, else our first of the net's own images and classes: a checkpoint
    for other data does not change what the bare name builds.
    """
    default = {split_model_name_tag(name)[0]: name for name in reversed(list(cfgs))}  # the first of each net
    staged = staged_cfgs(checkpoint_root(), default)
    own = {name: cfg if isinstance(cfg, PretrainedCfg) else PretrainedCfg(**cfg) for name, cfg in cfgs.items()}
    entries = {**staged, **own}
    for name, cfg in staged.items():
        net = split_model_name_tag(name)[0]
        first = entries[default[net]]
        same = all(getattr(cfg, of) == getattr(first, of) for of in ('num_classes', 'input_size', 'mean', 'std'))
        if same and not first.has_weights:
            default[net] = name
    # timm takes a tag that ends in a star as the default, if no other with weights follows.
    nets = {split_model_name_tag(name)[0]: None for name in staged}
    starred = {f'{default[net]}*': entries.pop(default[net]) for net in nets}
    return generate_default_cfgs({**entries, **starred})


def build(
    model_cls: type[nn.Module], variant: str, pretrained: bool, feature_cfg: Optional[dict[str, Any]] = None, **kwargs
) -> Any:
    """Build a net with timm's builder.

    Args:
        model_cls: Its class; that has a `feature_cfg`, of which `feature_cfg` changes what it names.
        variant: Its registered name.
        pretrained: Load the weights that its default cfg, or the one in `kwargs`, names.
        kwargs: The builder's and the class's.

    Raises:
        RuntimeError: The net, or the tag, has no weights.
    """
    if pretrained:
        kwargs = _pretrained_source(variant, kwargs)
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={**model_cls.feature_cfg, **(feature_cfg or {})},  # type: ignore[dict-item]
        **kwargs,
    )


def _pretrained_source(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` of a net that is to be pretrained, with which timm's builder loads what they name.

    Args:
        variant: The net's registered name.
        kwargs: The builder's, of which `pretrained_cfg` and `pretrained_cfg_overlay` matter here.

    Raises:
        RuntimeError: The net, or the tag, has no weights. As timm's, with the tags that there are.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    if overlay.get('hf_hub_id') or overlay.get('url'):
        # timm prefers a file, as our own checkpoints have, and a repository to a URL.
        overlay = {'file': None, 'hf_hub_id': None, **overlay}
        kwargs = {**kwargs, 'pretrained_cfg_overlay': overlay}
    try:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), dict(overlay))
        if cfg.has_weights or cfg.state_dict:
            return kwargs
        problem = f'No pretrained weights exist for {variant}{f".{cfg.tag}" if cfg.tag else ""}.'
    except RuntimeError as error:
        problem = str(error)
    tags = ', '.join(split_model_name_tag(name)[1] for name in list_pretrained(f'{variant}.*'))
    raise RuntimeError(
        f'{problem} Tags of {variant} with weights: {tags or "none"}. Use `pretrained=False` for random init, '
        '`pretrained_cfg_overlay=dict(file=...)` for a file; `timm.list_pretrained()` has every name with weights.'
    )


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Complete a plain backbone's state dict with weights at identity: `w = 1`, and gates whose last layer is 0.

    A state dict that has some of the weights is not a plain backbone's and stays as it is.

    Raises:
        ValueError: The net's weights are fixed at another value than the plain backbone's, or its untrained gates give
            other weights.
    """
    state_dict = state_dict.get('state_dict', state_dict)  # type: ignore[assignment]
    # torchvision's names in a DenseNet have a dot more, as in `norm.1`.
    state_dict = {re.sub(r'(denselayer\d+\.(?:norm|conv))\.(\d)', r'\1\2', k): v for k, v in state_dict.items()}
    own = model.state_dict()
    identity = {}
    other = None
    for name, module in model.named_modules():
        if isinstance(module, SkipWeight) and module.weight is not None:
            identity[f'{name}.weight'] = torch.ones_like(own[f'{name}.weight'])
            if not isinstance(module.weight, nn.Parameter) and module.init not in (0, 1):
                other = f'skip_fixed with skip_init={module.init!r}', 'skip_init'
        elif isinstance(module, Gate):
            identity[f'{name}.fc1.weight'] = own[f'{name}.fc1.weight']
            identity[f'{name}.fc2.weight'] = torch.zeros_like(own[f'{name}.fc2.weight'])
            if module.scale != module.fc2.out_features:
                other = f'scale={module.scale:g} over {module.fc2.out_features} paths', 'scale'
    if identity.keys() & state_dict.keys():
        return state_dict
    if other:
        what, argument = other
        raise ValueError(
            f'{what} is not the net of these weights, whose paths all weigh 1; leave {argument} out, or start from '
            'them by `load_state_dict(strict=False)`'
        )
    return {**state_dict, **identity}
