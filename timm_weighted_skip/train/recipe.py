"""What a training run is asked to do: one set of names for recipes (YAML), the command line and Python.

The names are those of timm's train.py, so that a recipe is also a file for its `-c`.
"""

# ruff: noqa: RUF009  the functions called in the dataclass return fields

import argparse
import ast
import difflib
import math
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Optional

import yaml

from timm_weighted_skip.checks import check_choice, check_count

__all__ = [
    'NamedValues',
    'Recipe',
    'add_option',
    'add_recipe_arguments',
    'list_recipes',
    'load_recipe',
    'read_yaml',
    'recipe_arguments',
    'recipe_path',
]


class NamedValues(argparse.Action):
    """NAME=VALUE arguments, as timm's `ParseKwargs`, of which that before 1.0.31 fails on a path."""

    def __call__(self, parser, namespace, values, option_string=None):
        named = {}
        for value in values:
            name, given, text = value.partition('=')
            if not given:
                parser.error(f'argument {option_string}: {value!r} is not NAME=VALUE')
            try:
                named[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                named[name] = text
        setattr(namespace, self.dest, named)


def _option(default: Any, text: str, kind: Callable = str, metavar: str = 'X', **arguments: Any) -> Any:
    """A field with what argparse needs to know of it; the help ends in the default."""
    shown = ' '.join(map(str, default)) if isinstance(default, list) else default
    text = text if default is None else f'{text} ({shown})'
    metadata = {'help': text, 'type': kind, 'metavar': metavar, **arguments}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _switch(default: Optional[bool], text: str) -> Any:
    return field(default=default, metadata={'help': text, 'action': argparse.BooleanOptionalAction})


def _kwargs(text: str) -> Any:
    metadata = {'help': text, 'nargs': '*', 'action': NamedValues, 'metavar': 'NAME=VALUE'}
    return field(default_factory=dict, metadata=metadata)


def _check_kind(option: Field, value: Any) -> None:
    """Refuse what is no switch, list, dict or name where the option is one, as YAML's `"false"` or a single number."""
    action = option.metadata.get('action')
    kinds: tuple[type, ...]
    if action is argparse.BooleanOptionalAction:
        kinds, instead = (bool,), 'true or false'
    elif action is NamedValues:
        kinds, instead = (dict,), 'names with values'
    elif 'nargs' in option.metadata:
        kinds, instead = (list, tuple), 'a list'
    elif option.metadata.get('type') is str:
        kinds, instead = (str,), 'a name'
    else:
        return
    if not isinstance(value, kinds) and (value is not None or option.default is not None):
        raise ValueError(f'{option.name}={value!r} is not allowed; give {instead}')


def _number(name: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-3, without a point, as a string
    except (TypeError, ValueError):
        raise ValueError(f'{name}={value!r} is not a number') from None


def _as_in_yaml(value: Any) -> Any:
    """Lists for tuples, as a file gives the value back."""
    if isinstance(value, dict):
        return {name: _as_in_yaml(each) for name, each in value.items()}
    return [*map(_as_in_yaml, value)] if isinstance(value, (list, tuple)) else value


@dataclass
class Recipe:
    """How a net is trained. A switch that is None is chosen for the device.

    Raises:
        ValueError: A value is not allowed.
    """

    epochs: int = _option(300, 'epochs of the schedule', int, 'N')
    batch_size: int = _option(128, 'images per batch', int, 'N')
    grad_accum_steps: int = _option(1, 'batches per update', int, 'N')
    seed: int = _option(42, 'random seed', int, 'S')
    model_kwargs: dict[str, Any] = _kwargs(
        "further arguments of the model, such as hidden=32; in place of the recipe's"
    )

    alternate_freeze: int = _option(0, 'epochs per phase of alternating training; 0 trains all together', int, 'T')
    alternate_count: Literal['total', 'extra'] = _option(
        'total', "'total': --epochs contains both phases; 'extra': gate epochs come on top"
    )
    alternate_rule: Literal['strict', 'released'] = _option(
        'strict', "'strict' freezes the whole backbone, 'released' its weights only"
    )
    alternate_bn_stats: bool = _switch(False, 'keep running statistics in gate phases')

    opt: str = _option('sgd', "optimizer, one of timm's", str, 'NAME')
    lr: float = _option(0.1, 'learning rate', float, 'LR')
    momentum: float = _option(0.9, 'momentum', float, 'M')
    weight_decay: float = _option(2e-5, 'weight decay', float)
    opt_eps: Optional[float] = _option(None, "the optimizer's epsilon", float)
    opt_betas: Optional[list[float]] = _option(None, "the optimizer's betas", float, nargs='+')
    opt_kwargs: dict[str, Any] = _kwargs(
        "further arguments of the optimizer, such as filter_bias_and_bn=False; in place of the recipe's"
    )
    clip_grad: Optional[float] = _option(None, 'largest norm of the gradient', float, 'NORM')
    clip_mode: str = _option('norm', "'norm', 'value' or 'agc'")

    sched: str = _option('cosine', "learning rate schedule, one of timm's", str, 'NAME')
    sched_on_updates: bool = _switch(False, 'move the schedule at every update instead of every epoch')
    min_lr: float = _option(0.0, 'lowest learning rate (not of step, multistep)', float, 'LR')
    warmup_epochs: int = _option(0, 'epochs of warm-up', int, 'N')
    warmup_lr: float = _option(1e-5, 'where the warm-up starts', float, 'LR')
    cooldown_epochs: int = _option(0, 'epochs at --min-lr after the schedule (cosine, tanh, poly)', int, 'N')
    decay_epochs: float = _option(90, "epochs between drops ('step')", float, 'N')
    decay_milestones: list[int] = _option(
        [90, 180, 270],
        "one more than the epochs before each drop; with --sched-on-updates as many ('multistep')",
        int,
        'N',
        nargs='+',
    )
    decay_rate: float = _option(0.1, 'factor of a drop', float)

    pad_crop: int = _option(0, 'black pixels at each side before a random crop', int, 'N')
    hflip: float = _option(0.5, 'probability of mirroring', float, 'P')
    no_aug: bool = _switch(False, 'images as they are, whatever --pad-crop and --hflip say')
    mean: Optional[list[float]] = _option(None, "pixel mean per channel (the model's)", float, nargs='+')
    std: Optional[list[float]] = _option(None, "pixel deviation per channel (the model's)", float, nargs='+')
    smoothing: float = _option(0.1, 'label smoothing', float)

    model_ema: bool = _switch(False, 'keep a moving average of the weights and measure that')
    model_ema_decay: float = _option(0.9998, 'decay of the moving average', float)
    model_ema_warmup: bool = _switch(False, 'start the moving average with a smaller decay')

    grad_checkpointing: bool = _switch(
        False, 'compute activations twice to keep fewer; norms see each batch twice, too'
    )
    amp: Optional[bool] = _switch(None, 'bfloat16 autocast (on CUDA)')
    channels_last: Optional[bool] = _switch(None, 'channels-last memory layout (always)')
    torchcompile: Optional[bool] = _switch(None, 'torch.compile (where the run is long enough to win)')
    torchcompile_mode: Optional[str] = _option(None, 'compile, in this mode (on a GPU reduce-overhead)', str, 'MODE')

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            _check_kind(option, value)
            setattr(self, option.name, _as_in_yaml(value))
        if 'pretrained' in self.model_kwargs:
            raise ValueError('pretrained is no argument of a net; give --pretrained instead')
        for name in ('epochs', 'batch_size', 'grad_accum_steps'):
            check_count(name, getattr(self, name))
        for name in ('seed', 'alternate_freeze', 'pad_crop', 'warmup_epochs', 'cooldown_epochs'):
            check_count(name, getattr(self, name), least=0)
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} is not allowed; NumPy's end at {2**32 - 1}")
        for name in ('lr', 'momentum', 'weight_decay', 'min_lr', 'warmup_lr', 'decay_rate'):
            value = self._as_number(name)
            if not 0 <= value < math.inf:
                raise ValueError(f'{name}={value!r} is not allowed; give a finite number of 0 or more')
        for name in ('clip_grad', 'decay_epochs'):
            if getattr(self, name) is not None and not self._as_number(name) > 0:
                raise ValueError(f'{name}={getattr(self, name)!r} is not allowed; give a number above 0')
        if not 0 <= self._as_number('smoothing') < 1:
            raise ValueError(f'smoothing={self.smoothing!r} is not allowed; give a number of 0 or more, below 1')
        for name in ('hflip', 'model_ema_decay'):
            if not 0 <= self._as_number(name) <= 1:
                raise ValueError(f'{name}={getattr(self, name)!r} is not allowed; give a number from 0 to 1')
        if self.opt_eps is not None and not 0 <= self._as_number('opt_eps') < math.inf:
            raise ValueError(f'opt_eps={self.opt_eps!r} is not allowed; give a finite number of 0 or more')
        for name in ('mean', 'std', 'opt_betas'):
            if getattr(self, name) is not None:
                setattr(self, name, [_number(name, each) for each in getattr(self, name)])
                if not all(map(math.isfinite, getattr(self, name))):
                    raise ValueError(f'{name}={getattr(self, name)!r} is not allowed; give finite numbers')
        if self.opt_betas is not None and len(self.opt_betas) < 2:
            raise ValueError(f'opt_betas={self.opt_betas!r} is not allowed; give two or more')
        for milestone in self.decay_milestones:
            if isinstance(milestone, bool) or not isinstance(milestone, int):
                raise ValueError(f'decay_milestones={self.decay_milestones!r} is not allowed; give whole numbers')
        if self.decay_milestones != sorted(self.decay_milestones):
            raise ValueError(f'decay_milestones={self.decay_milestones!r} is not allowed; give them in ascending order')
        check_choice('clip_mode', self.clip_mode, ('norm', 'value', 'agc'))
        if self.sched == 'plateau':
            raise ValueError("sched='plateau' depends on measured accuracies; choose a schedule that depends on epochs")

    @property
    def augmentation(self) -> tuple[int, float]:
        """Padding and probability of mirroring, as `Batches` takes them."""
        return (0, 0.0) if self.no_aug else (self.pad_crop, self.hflip)

    def _as_number(self, name: str) -> float:
        setattr(self, name, _number(name, getattr(self, name)))
        return getattr(self, name)


def add_option(group: Any, option: Field, default: Any = argparse.SUPPRESS, **changed: Any) -> None:
    """Add the option of a field of `Recipe` to a group of arguments.

    Args:
        group: What has argparse's `add_argument`.
        option: The field.
        default: Of the parsed arguments; by default those that are not given are absent.
        changed: Of argparse's arguments those that are others here.
    """
    group.add_argument(f'--{option.name.replace("_", "-")}', default=default, **{**option.metadata, **changed})


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of `Recipe`."""
    group = parser.add_argument_group(
        'recipe', 'what the recipe says, overridden; in brackets what holds if neither says anything'
    )
    for option in fields(Recipe):
        add_option(group, option)


def recipe_arguments(options: dict[str, Any]) -> list[str]:
    """The arguments of `weighted-skip train` that give fields of a recipe these values.

    Raises:
        ValueError: A value is None or empty, which no argument can say.
    """
    arguments = []
    for name, value in options.items():
        option = name.replace('_', '-')
        if value is None or value in ([], ()):
            raise ValueError(f'{name}={value!r} can not be told on the command line; leave it out')
        if isinstance(value, bool):
            arguments.append(f'--{option}' if value else f'--no-{option}')
        elif isinstance(value, dict):
            arguments += [f'--{option}', *(f'{key}={each}' for key, each in value.items())]
        else:
            arguments += [f'--{option}', *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return arguments


def list_recipes() -> list[str]:
    """Names of the package's recipes."""
    folder = files('timm_weighted_skip.train') / 'recipes'
    return sorted(path.name.removesuffix('.yaml') for path in folder.iterdir() if path.name.endswith('.yaml'))


def recipe_path(recipe: str) -> Path:
    """The file of one of the package's recipes by its name; another value is taken as a path.

    Raises:
        ValueError: There is no such recipe.
    """
    if recipe in list_recipes():
        return Path(str(files('timm_weighted_skip.train') / 'recipes' / f'{recipe}.yaml'))
    if not Path(recipe).is_file():
        raise ValueError(f'no recipe {recipe!r}; give a YAML file or one of {", ".join(list_recipes())}')
    return Path(recipe)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of names and values.

    Raises:
        ValueError: It is anything else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not readable YAML: {" ".join(str(error).split())}') from None
    if not isinstance(values, dict):
        raise ValueError(f'{path} holds no names with values')
    return values


def load_recipe(recipe: Optional[str] = None, **overrides: Any) -> Recipe:
    """The recipe of a name or a YAML file, with some values overridden.

    Raises:
        ValueError: There is no such recipe, or a name or a value in it is not allowed.
    """
    values = read_yaml(recipe_path(recipe)) if recipe else {}
    known = [option.name for option in fields(Recipe)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3)
            names = f' (near names are {", ".join(near)})' if near else ''
            raise ValueError(
                f'recipe {recipe}: {name!r} is no argument of this trainer{names}; '
                "a recipe for timm's train.py runs with: python -m timm_weighted_skip.train -c FILE"
            )
    return Recipe(**{**values, **overrides})
