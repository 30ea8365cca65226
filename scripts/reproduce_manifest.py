"""What `scripts/reproduce.py` is to run: a YAML file of experiments, each with its runs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Optional

from timm.models import is_model

from timm_weighted_skip.train.freezing import AlternateFreezing
from timm_weighted_skip.train.recipe import Recipe, load_recipe, read_yaml, recipe_arguments


@dataclass(frozen=True, eq=False)
class Run:
    """One line of an experiment: a net and how it is trained, once per seed.

    Attributes:
        name: Unique in the experiment.
        model, data, recipe: As `weighted-skip train` takes them.
        options: Fields of the recipe that are overridden.
        paper: Accuracy in % that the paper reports.
        baseline: Name of the run that it is to be compared with, trained for the same number of epochs.
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
    baseline: Optional[str] = None
    checkpoint: bool = False
    about: str = ''

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

    def result_file(self, job: 'Job') -> Path:
        return self.folder / 'results' / job.run.experiment / f'{job.run.name}.seed{job.seed}.json'

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
        return f'{self.run.experiment}/{self.run.name}/seed{self.seed}'


def read_manifest(path: Path) -> Manifest:
    """The manifest of a YAML file.

    Raises:
        ValueError: Something in it is missing, unknown or not allowed.
    """
    values = read_yaml(path)
    experiments = {}
    for name, section in values.get('experiments', {}).items():
        try:
            common = {key: section[key] for key in ('data', 'recipe', 'seeds') if key in section}
            runs = {}
            for key, own in section['runs'].items():
                merged = {**common, **own, 'options': {**section.get('options', {}), **own.get('options', {})}}
                runs[key] = Run(name, key, **{**merged, 'seeds': tuple(merged['seeds'])})
            experiments[name] = Experiment(name, section['title'], runs, section.get('against'))
        except (KeyError, TypeError) as error:
            raise ValueError(f'{path}: experiment {name}: {error}') from None
        for run in runs.values():
            try:
                run.recipe_of(0)
            except (ValueError, TypeError) as error:
                raise ValueError(f'{path}: {name}/{run.name}: {error}') from None
            if not is_model(run.model):
                raise ValueError(f'{path}: {name}/{run.name}: no model {run.model!r}')
            if run.baseline is not None and run.baseline not in runs:
                raise ValueError(f'{path}: {name}/{run.name}: baseline {run.baseline!r} is no run of {name}')
    if not experiments:
        raise ValueError(f'{path} has no experiments')
    return Manifest(experiments, values.get('variance', {}), path.parent)
