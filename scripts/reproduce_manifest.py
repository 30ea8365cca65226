"""What `scripts/reproduce.py` is to run: a YAML file of experiments, each with its runs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import numpy as np
from timm.models import is_model

from timm_weighted_skip.files import read_json
from timm_weighted_skip.hub.config import args_beside_weights
from timm_weighted_skip.train.freezing import AlternateFreezing
from timm_weighted_skip.train.recipe import Recipe, load_recipe, read_yaml, recipe_arguments

# Beginnings of fields of the recipe in which a run may differ from its baseline: what shapes nets, phases and speed.
MAY_DIFFER = ('model_kwargs', 'alternate_', 'torchcompile')


@dataclass(frozen=True, eq=False)
class Run:
    """One line of an experiment: a net and how it is trained, once per seed.

    Attributes:
        name: Unique in the experiment.
        model, data, recipe: As `weighted-skip train` takes them.
        options: Fields of the recipe that are overridden.
        paper: Accuracy in % that the paper reports.
        paper_weights: Skip weights that the paper reports, (units, rounds).
        baseline: The run that it is to be compared with, trained for the same number of epochs: RUN of the same
            experiment, or EXPERIMENT/RUN.
        checkpoint: Whether the first seed's weights become `hub_cards/<model>.<data>`.
        about: What a reader should know of it.
    """

    experiment: str
    name: str
    model: str
    data: str
    recipe: str
    seeds: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    paper: Optional[float] = None
    paper_weights: Optional[list[list[float]]] = None
    baseline: Optional[str] = None
    checkpoint: bool = False
    about: str = ''

    @property
    def path(self) -> str:
        return f'{self.experiment}/{self.name}'

    def recipe_of(self, seed: int) -> Recipe:
        return load_recipe(self.recipe, **self.options, seed=seed)

    def epochs(self) -> int:
        recipe = self.recipe_of(0)
        return AlternateFreezing(recipe.alternate_freeze, recipe.alternate_count).total_epochs(recipe.epochs)

    def arguments(self) -> list[str]:
        """Those of `weighted-skip train`, without seed, device and folders."""
        source = ['--model', self.model, '--data', self.data, '--recipe', self.recipe]
        return [*source, *recipe_arguments(self.options)]


@dataclass(frozen=True)
class Experiment:
    """Runs that are read together.

    Attributes:
        title: Heading of its section.
        runs: By name.
        against: Field of the recipe that a sweep changes, or 'depth'.
    """

    name: str
    title: str
    runs: dict[str, Run]
    against: Optional[str] = None


@dataclass(frozen=True)
class Manifest:
    """Experiments by name, in order; groups of runs whose weights' variance is compared; and where the results are."""

    experiments: dict[str, Experiment]
    variance: dict[str, str]
    folder: Path

    @cached_property
    def runs(self) -> dict[str, Run]:
        """Every run by EXPERIMENT/RUN."""
        return {run.path: run for experiment in self.experiments.values() for run in experiment.runs.values()}

    def baseline(self, run: Run) -> Optional[Run]:
        """The run that another is to be compared with, if any.

        Raises:
            KeyError: The manifest has no such run.
        """
        if run.baseline is None:
            return None
        return self.runs[run.baseline if '/' in run.baseline else f'{run.experiment}/{run.baseline}']

    def result_file(self, job: 'Job') -> Path:
        return self.folder / 'results' / job.run.experiment / f'{job.run.name}.seed{job.seed}.json'

    def result(self, job: 'Job') -> Optional[dict[str, Any]]:
        """What was measured of a finished training; None for any other.

        Raises:
            ValueError: The file is of another training than the manifest's.
        """
        file = self.result_file(job)
        if not file.exists():
            return None
        result = read_json(file)
        job.check(result, file)
        return result

    def jobs(self, only: str = '*') -> Iterator['Job']:
        """The runs with their seeds in the order in which they are worked off, those that match `only`."""
        for experiment in self.experiments.values():
            seeds = dict.fromkeys(seed for run in experiment.runs.values() for seed in run.seeds)
            for seed in seeds:
                for run in experiment.runs.values():
                    job = Job(run, seed)
                    if seed in run.seeds and fnmatch(job.name, only):
                        yield job


@dataclass(frozen=True)
class Job:
    """A run with one of its seeds."""

    run: Run
    seed: int

    @property
    def name(self) -> str:
        return f'{self.run.path}/seed{self.seed}'

    def check(self, trained: dict[str, Any], where: Path) -> None:
        """Refuse a training of another net, on other data or by another recipe than the manifest's.

        Args:
            trained: Its 'model', 'data' and 'recipe', and of a finished one the pixels' 'mean' and 'std'.
            where: Its file or folder.

        Raises:
            ValueError: They differ.
        """
        ours = {'model': self.run.model, 'data': self.run.data, **asdict(self.run.recipe_of(self.seed))}
        theirs = {'model': trained['model'], 'data': trained['data'], **trained['recipe']}
        for name in ('mean', 'std'):  # left to the images: the numbers that they had, but for rounding
            if ours[name] is not None and theirs.get(name) is None and name in trained:
                theirs[name] = [round(value, 6) for value in trained[name]]
        # A field that only one version of the recipe has is no difference.
        differing = [
            f'{name} {theirs[name]}, not {ours[name]}'
            for name in ours
            if name not in ('torchcompile', 'torchcompile_mode')  # they only say how fast
            and theirs.get(name, ours[name]) != ours[name]
        ]
        if differing:
            raise ValueError(
                f'{where} is of another training than {self.name}: {"; ".join(differing)}; remove it first'
            )


def _experiment(name: str, section: dict[str, Any]) -> Experiment:
    """One entry of the manifest's `experiments`."""
    common = {'data', 'recipe', 'seeds'}
    unknown = section.keys() - common - {'title', 'runs', 'options', 'against'}
    if unknown:
        raise ValueError(f'unknown {", ".join(sorted(unknown))}')
    runs = {}
    for key, own in section['runs'].items():
        merged = {name: section[name] for name in common & section.keys()} | own
        merged['options'] = {**section.get('options', {}), **own.get('options', {})}
        runs[key] = Run(name, key, **{**merged, 'seeds': tuple(merged['seeds'])})
    for run in runs.values():
        try:
            _check(run)
        except (ValueError, TypeError) as error:
            raise ValueError(f'run {run.name}: {error}') from None
    against = section.get('against')
    if against not in (None, 'depth', *(f'recipe.{option.name}' for option in fields(Recipe))):
        raise ValueError(f'against {against!r}; give depth or recipe.FIELD')
    return Experiment(name, section['title'], runs, against)


def _check(run: Run) -> None:
    run.arguments()  # which refuses what no training can be told
    recipe = run.recipe_of(0)
    for seed in run.seeds:
        replace(recipe, seed=seed)  # which refuses what is none
    if not is_model(run.model):
        raise ValueError(f'no model {run.model!r}')
    if not run.seeds or len(set(run.seeds)) < len(run.seeds):
        raise ValueError(f'seeds {list(run.seeds)}; give one or more, each once')
    if run.paper is not None and not isinstance(run.paper, (int, float)):
        raise ValueError(f'paper {run.paper!r}; give an accuracy in %')
    if run.paper_weights is not None and (np.ndim(run.paper_weights) != 2 or len(run.paper_weights[0]) < 2):
        raise ValueError(f'paper_weights {run.paper_weights!r}; give a list of two or more rounds for each unit')
    if run.baseline is not None and not isinstance(run.baseline, str):
        raise ValueError(f'baseline {run.baseline!r}; give the name of a run')
    args = args_beside_weights(recipe.model_kwargs)
    if run.checkpoint and args:
        raise ValueError(f'checkpoint: true, but {args} make another net than {run.model}; leave one of them out')


def _check_baseline(manifest: Manifest, run: Run) -> None:
    try:
        plain = manifest.baseline(run)
    except KeyError:
        plain = run
    if plain is run:
        raise ValueError(f'baseline {run.baseline!r} is no other run; give one of {run.experiment}, or EXPERIMENT/RUN')
    if plain is None:
        return
    if (plain.data, plain.epochs(), plain.seeds) != (run.data, run.epochs(), run.seeds):
        raise ValueError(
            f'baseline {run.baseline} is not trained on the same data for as many epochs, with the same seeds'
        )
    ours, theirs = (asdict(each.recipe_of(0)) for each in (run, plain))
    differ = [name for name in ours if not name.startswith(MAY_DIFFER) and ours[name] != theirs[name]]
    if differ:
        raise ValueError(f'baseline {run.baseline} is trained by a recipe with another {", ".join(differ)}')


def read_manifest(path: Path) -> Manifest:
    """The manifest of a YAML file.

    Raises:
        ValueError: Something in it is missing, unknown or not allowed.
    """
    values = read_yaml(path)
    experiments = {}
    for part in ('experiments', 'variance'):
        if not isinstance(values.get(part) or {}, dict):
            raise ValueError(f'{path}: {part} is no list of names with values')
    for name, section in (values.get('experiments') or {}).items():
        try:
            if not isinstance(name, str):
                raise ValueError('its name is no text; put it in quotes')
            experiments[name] = _experiment(name, section)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f'{error} is missing' if isinstance(error, KeyError) else error
            raise ValueError(f'{path}: experiment {name}: {reason}') from None
    if not experiments:
        raise ValueError(f'{path} has no experiments')
    variance = values.get('variance') or {}
    manifest = Manifest(experiments, variance, path.parent)
    for run in manifest.runs.values():
        try:
            _check_baseline(manifest, run)
        except ValueError as error:
            raise ValueError(f'{path}: experiment {run.experiment}: run {run.name}: {error}') from None
    for group, name in variance.items():
        if name not in manifest.runs:
            raise ValueError(f'{path}: variance {group}: {name!r} is no EXPERIMENT/RUN of it')
    return manifest
