"""What a training run is asked to do: by its command line, by the args.yaml in its folder, and as a command again."""

import argparse
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

import timm
from timm.models import parse_model_name

from timm_weighted_skip.nets import ARGS
from timm_weighted_skip.train.recipe import Recipe, list_recipes, load_recipe, read_yaml, recipe_arguments

__all__ = ['Task', 'command_of', 'read_task', 'task_of']


@dataclass
class Task:
    """Which net a run trains, on what, by which recipe, by its name or file; see `load_image_set` for the data."""

    model: str
    data: str
    data_dir: Optional[str] = None
    download: bool = False
    pretrained: bool = False
    device: str = 'cpu'
    recipe_name: Optional[str] = None
    recipe: Recipe = field(default_factory=Recipe)


def read_task(folder: Path) -> tuple[Task, list[int]]:
    """The run and the seeds that a folder was made for.

    Raises:
        ValueError: It is not a run's folder.
    """
    path = folder / ARGS
    if not path.is_file():
        if (folder.parent / ARGS).is_file():
            raise ValueError(f'{folder} is a seed of the run {folder.parent}; give that')
        raise ValueError(f'{folder} has no {ARGS}; give the folder of a run of this trainer')
    values = read_yaml(path)
    try:
        seeds, recipe = list(values.pop('seeds')), Recipe(**values.pop('recipe'))
        if not seeds:
            raise ValueError(f'{path} names no seeds')
        return Task(**values, recipe=recipe), seeds
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not this trainer's ({error})") from None


def task_of(args: argparse.Namespace) -> tuple[Task, list[int], Path]:
    """The run, seeds and folder that `weighted-skip train` was asked for."""
    if args.data is None:
        raise ValueError('--data is missing: the images to train on, such as cifar10 with --data-dir, or digits')
    given = {option.name: getattr(args, option.name) for option in fields(Recipe) if hasattr(args, option.name)}
    recipe = load_recipe(args.recipe, **given)
    name = Path(args.recipe).stem if args.recipe else None
    if args.seeds and 'seed' in given:
        raise ValueError(f'--seed {given["seed"]} with --seeds; give one of them')
    repeated = {seed for seed in args.seeds or () if args.seeds.count(seed) > 1}
    if repeated:
        raise ValueError(f'--seeds has {", ".join(map(str, repeated))} more than once; give each seed once')
    # The run may go on from elsewhere.
    data_dir = args.data_dir and str(Path(args.data_dir).absolute())
    if Path(args.model).is_dir() and not timm.is_model(args.model):
        raise ValueError(
            f'--model {args.model} is a folder; give local-dir:{args.model} if it is that of a checkpoint, which '
            '`weighted-skip save` makes of a run'
        )
    where, model = parse_model_name(args.model)
    source = f'{where}:{Path(model).absolute()}' if where == 'local-dir' else args.model
    task = Task(source, args.data, data_dir, args.download, args.pretrained, args.device, args.recipe, recipe)
    experiment = args.experiment or '-'.join(filter(None, (Path(model).name, args.data, name)))
    return task, args.seeds or [recipe.seed], Path(args.output) / experiment


def _without_folders(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a net with the files of weights that they name, but not where these lie."""
    named = dict(model_kwargs)
    for name, value in model_kwargs.items():
        if isinstance(value, dict):
            named[name] = _without_folders(value)
        elif name in ('file', 'checkpoint_path') and isinstance(value, str):
            named[name] = Path(value).name
    return named


def command_of(task: Task) -> str:
    """What trains the net of a run again, with the data wherever they are."""
    known = task.recipe_name in list_recipes()
    recipe, base = asdict(task.recipe), asdict(load_recipe(task.recipe_name if known else None))
    recipe['model_kwargs'] = _without_folders(recipe['model_kwargs'])
    changed = {name: value for name, value in recipe.items() if value != base[name] and name != 'seed'}
    where, model = parse_model_name(task.model)
    model = f'local-dir:{Path(model).name}' if where == 'local-dir' else task.model  # a path says where, not what
    source = ['--model', model, '--data', task.data, *(['--pretrained'] if task.pretrained else [])]
    source += ['--recipe', str(task.recipe_name)] if known else []
    return shlex.join(['weighted-skip', 'train', *source, *recipe_arguments({**changed, 'seed': recipe['seed']})])
