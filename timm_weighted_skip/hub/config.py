"""What a checkpoint directory says of its net: timm's `config.json`, and in it the training and what it measured."""

import json
import math
import statistics
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Optional

from timm.models import filter_pretrained_cfg, is_model
from torch import nn

from timm_weighted_skip.checks import input_channels, is_finite_number

__all__ = ['FILES', 'SAMPLE', 'Results', 'add_results', 'args_beside_weights', 'model_config', 'one_line']

# In a folder of its own: some versions of timm can't choose between two safetensors files side by side.
SAMPLE = 'sample/logits.safetensors'
FILES = ('README.md', 'config.json', 'model.safetensors', SAMPLE)
"""The files of a checkpoint directory. The sample is an input and the logits that the net gave for it."""

DATASETS = {  # of `weighted-skip train`: name, id on the Hub
    'cifar10': ('CIFAR-10', 'uoft-cs/cifar10'),
    'cifar100': ('CIFAR-100', 'uoft-cs/cifar100'),
    'mnist': ('MNIST', 'ylecun/mnist'),
    'digits': ("scikit-learn's digits", 'sklearn-digits'),
    'folder': ('a folder of images', 'folder'),
}


@dataclass(frozen=True)
class Results:
    """How a checkpoint was trained and what was measured; the data of its model card.

    Attributes:
        dataset: Name of the data, such as 'CIFAR-10'.
        dataset_id: Its id on the Hub, such as 'uoft-cs/cifar10'; a name without owner if it is not there.
        split: What accuracy was measured on.
        recipe: Command that trains the net again.
        epochs: Length of the training.
        seeds: One per training run.
        top1: Accuracy after the last epoch in %, one per seed.
        seed: The run whose weights these are.
        commit: Version of the code that trained it, a commit or a release; with '+' at its end, it was changed since.
            Of a run that went on with other code, all, with commas between.
        license: Of the weights; without one, that of the net's config.
        description: What a reader should know of these weights, in a sentence or two.
        comparison: Other nets' accuracies under the same recipe, name to one per seed.
    """

    dataset: str
    dataset_id: str
    split: str
    recipe: str
    epochs: int
    seeds: list[int]
    top1: list[float]
    seed: int
    commit: str
    license: str = ''
    description: str = ''
    comparison: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in fields(self):
            value, kind = getattr(self, each.name), each.type
            if kind in (str, int) and type(value) is not kind:
                wanted = 'text' if kind is str else 'a whole number'
                raise ValueError(f'results: {each.name}={value!r} is not allowed; give {wanted}')
        for name, values in {'top1': self.top1, **self.comparison}.items():
            if not values or not all(is_finite_number(v) and 0 <= v <= 100 for v in values):
                raise ValueError(f'results: {name}={values!r} is not allowed; give accuracies in %, one per seed')
        whole = all(type(seed) is int for seed in self.seeds)
        if not whole or not len({*self.seeds}) == len(self.seeds) == len(self.top1) or self.seed not in self.seeds:
            raise ValueError(
                f'results: seeds={self.seeds!r} and seed={self.seed!r} do not fit top1={self.top1!r}; give one seed '
                'per accuracy, none twice, and as seed the one whose weights these are'
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = 'results') -> 'Results':
        """Results of JSON data; `source` names it in errors.

        Raises:
            ValueError: A field is missing, unknown or has a value that makes no sense.
        """
        if not isinstance(values, dict):
            raise ValueError(f'{source}: the results are a {type(values).__name__}; give an object with fields')
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        allowed = {f.name for f in fields(cls)}
        if needed - values.keys() or values.keys() - allowed:
            raise ValueError(
                f'{source}: results lack {sorted(needed - values.keys())} and have unknown '
                f'{sorted(values.keys() - allowed)}; the fields are {", ".join(sorted(allowed))}'
            )
        try:
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise ValueError(f'{source}: a field of the results has the wrong type: {error}') from None

    @classmethod
    def of_run(cls, run: dict[str, Any], source: str, of_all: Optional[dict[str, Any]] = None) -> 'Results':
        """Results of a run of `weighted-skip train`.

        Args:
            run: Its `result.json`.
            source: Names it in errors.
            of_all: `result.json` of a training of several seeds that this run was one of.

        Raises:
            ValueError: A field is missing or has a value that makes no sense.
        """
        try:
            recipe = run['command']
            if run['recipe'].get('amp') is None:  # by the device, which may be another the next time
                recipe += ' --amp' if run['amp'] else ' --no-amp'
            commits = dict.fromkeys(part['commit'] for part in (*run.get('earlier', ()), run))
            release = f'timm-weighted-skip {run["versions"]["timm_weighted_skip"]}'
            dataset, identifier = DATASETS.get(run['data'], (run['data'], run['data']))
            seed, top1 = run['recipe']['seed'], run['last']['top1']
            seeds, accuracies = (of_all['seeds'], of_all['last']['top1']) if of_all else ([seed], [top1])
            return cls(
                dataset=dataset,
                dataset_id=identifier,
                split='validation' if run['data'] == 'folder' else 'test',
                recipe=recipe,
                epochs=run['epochs'],
                seeds=seeds,
                top1=[round(value, 2) for value in accuracies],
                seed=seed,
                commit=', '.join(commit or release for commit in commits),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f'{source} is not of a run of this trainer ({error}); give what was measured by --results'
            ) from None

    @property
    def own(self) -> float:
        """Accuracy in % of the weights themselves."""
        return self.top1[self.seeds.index(self.seed)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def accuracy(top1: list[float]) -> str:
    """'93.12 ± 0.20 (n=3)', the standard deviation being the sample's; a single run has none."""
    spread = f' ± {statistics.stdev(top1):.2f}' if len(top1) > 1 else ''
    return f'{math.fsum(top1) / len(top1):.2f}{spread} (n={len(top1)})'


def args_beside_weights(model_args: dict[str, Any]) -> dict[str, Any]:
    """Those of a net's arguments that it is rebuilt with; where what it learned started is in the weights no more."""
    starts = {'zero_init_last'} if model_args.get('skip_fixed') else {'zero_init_last', 'skip_init'}
    return {k: v for k, v in model_args.items() if k not in starts}


def model_config(
    model: nn.Module, model_args: Optional[dict[str, Any]] = None, results: Optional[Results] = None
) -> dict[str, Any]:
    """timm's `config.json` of `model`, from which its `local-dir:` and `hf-hub:` rebuild the net.

    It is made of the net itself and `model_args` alone, so that it says the same under every version of timm. Pixel
    means and deviations of other channels than the net's become their average.

    Args:
        model: Net with a `pretrained_cfg`, as every net of `timm.create_model` has.
        model_args: Arguments that the net was made with, beside number of classes and input channels.
        results: Goes into the config, where timm lets it be.

    Raises:
        ValueError: The architecture is not registered, as of `to_awm` of a net whose AWM form has no name; or `model`
            is another module, such as a net of features only; or one of its arguments is a class or a function.
    """
    if not hasattr(model, 'pretrained_cfg') or not hasattr(model, 'num_classes'):
        raise ValueError(f'{type(model).__name__} is no classifier of timm; give a net of create_model as a whole')
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k != 'state_dict'}  # type: ignore[union-attr, operator]
    cfg = filter_pretrained_cfg(cfg, remove_source=True, remove_null=True)
    architecture = cfg.pop('architecture')
    if not is_model(architecture):
        raise ValueError(
            f'{architecture} is not registered in timm, so no config could rebuild the net; write its weights alone '
            '(--output FILE.safetensors) and load them into a net that is converted again'
        )
    num_classes: int = model.num_classes  # type: ignore[assignment]
    if not cfg.get('num_classes') == num_classes == len(cfg.get('label_names', range(num_classes))):
        # These speak of other classes than the net's.
        cfg = {k: v for k, v in cfg.items() if k not in ('label_names', 'label_descriptions', 'label_offset')}
    in_chans = input_channels(model)
    cfg.update(num_classes=num_classes, input_size=(in_chans, *cfg['input_size'][1:]))
    for name in ('mean', 'std'):
        if len(cfg[name]) != in_chans:
            cfg[name] = (statistics.fmean(cfg[name]),) * in_chans
    if in_chans not in (1, 3):
        cfg.pop('first_conv', None)  # timm before 1.0.31 would take it for one of 3 channels and draw it anew
    cfg.pop('tag', None)
    config: dict[str, Any] = {
        'architecture': architecture,
        'num_classes': num_classes,
        'num_features': model.num_features,
        # As timm publishes them, and where transformers looks for them.
        **{name: cfg.pop(name) for name in ('label_names', 'label_descriptions') if name in cfg},
        'pretrained_cfg': cfg,
    }
    args = args_beside_weights(model_args or {})
    for name, value in args.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(f"{name}={value!r} can not be told in config.json; give timm's name of it") from None
    if in_chans != 3:
        args['in_chans'] = in_chans  # timm takes it from the input size, but transformers makes the net of these alone
    config['model_args'] = args  # none as well: transformers would save a null, which timm 1.0.31 can't read
    if results:
        add_results(config, results)
    return config


def add_results(config: dict[str, Any], results: Results) -> None:
    """Have `config` say `results`, and of its weights the license that they name."""
    config['results'] = results.to_dict()
    if results.license:
        config['pretrained_cfg']['license'] = results.license


def one_line(error: BaseException) -> str:
    """The text of an error without its line breaks."""
    return ' '.join(str(error).split())
