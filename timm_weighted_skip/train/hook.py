"""What alternating training changes in a loaded train.py of timm: three of its names are wrapped, none of its code is.

`train_one_epoch` freezes before every epoch; `create_scheduler_v2` counts gate epochs on top where that is asked for;
`create_loader` crops from a padded image. Beside the script, torch's `DistributedDataParallel` learns, for the whole
process, to expect parameters at rest.
"""

import argparse
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel

from timm_weighted_skip.checks import check_count
from timm_weighted_skip.train.freezing import AlternateFreezing
from timm_weighted_skip.train.recipe import Recipe, add_option

__all__ = ['add_arguments', 'install']

# What else `create_loader` would do to images where it is asked to. --color-jitter, which it does unasked, is left out.
AUGMENTATIONS = {
    're_prob': '--reprob',
    'auto_augment': '--aa',
    'vflip': '--vflip',
    'grayscale_prob': '--grayscale-prob',
    'gaussian_blur_prob': '--gaussian-blur-prob',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of alternating training to train.py's parser, under the names that recipes use."""
    group = parser.add_argument_group(
        'timm_weighted_skip',
        "-c also takes the name of a recipe. `--train-script PATH` names this script's file, `--script validate` "
        '(benchmark, inference, onnx_export) runs another one with the nets registered.',
    )
    for option in fields(Recipe):
        if option.name.startswith('alternate_'):
            add_option(group, option, option.default)
        elif option.name == 'pad_crop':
            only = 'augment by random crops after padding by N and --hflip only (0)'
            add_option(group, option, option.default, help=only)


def install(script: ModuleType, args: argparse.Namespace, default_period: int = 0) -> None:
    """Have the loaded `script` train in phases.

    Args:
        script: timm's train.py as a module, before its `main` has built the model.
        args: What it was called with.
        default_period: Epochs per phase if `args` does not say.

    Raises:
        ValueError: An option is not allowed, or the script is not one that can be hooked.
    """
    missing = [
        name for name in ('train_one_epoch', 'create_scheduler_v2', 'create_loader') if not hasattr(script, name)
    ]
    if missing:
        raise ValueError(f"{script.__name__} is not a train.py of timm's that can be hooked: it has no {missing[0]}")
    freezing = AlternateFreezing(
        getattr(args, 'alternate_freeze', default_period),
        getattr(args, 'alternate_count', 'total'),
        getattr(args, 'alternate_rule', 'strict'),
        getattr(args, 'alternate_bn_stats', False),
    )
    pad_crop = getattr(args, 'pad_crop', 0)
    check_count('pad_crop', pad_crop, least=0)
    hooked: Any = script
    if pad_crop:
        hooked.create_loader = _with_pad_crop(hooked.create_loader, pad_crop)
    if freezing.period:
        hooked.train_one_epoch = _in_phases(hooked.train_one_epoch, freezing)
        if freezing.count == 'extra':
            if getattr(args, 'sched_on_updates', False):
                raise ValueError("alternate_count='extra' needs a schedule by epochs; leave out --sched-on-updates")
            hooked.create_scheduler_v2 = _with_gate_epochs(hooked.create_scheduler_v2, freezing)
        _expect_parameters_at_rest()


def _in_phases(train_one_epoch: Callable, freezing: AlternateFreezing) -> Callable:
    @functools.wraps(train_one_epoch)
    def train_one_epoch_of_a_phase(epoch, model, *args, **kwargs):
        try:
            phase = freezing(model, epoch)
        except ValueError as error:
            raise SystemExit(f'train.py: {error}') from None
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(f'Epoch {epoch} trains: {phase}', flush=True)
        # Without a reference that outlives the script's, processes that use gloo may hang when they exit.
        train_one_epoch_of_a_phase.kept = model, kwargs.get('task')  # type: ignore[attr-defined]
        return train_one_epoch(epoch, model, *args, **kwargs)

    return train_one_epoch_of_a_phase


def _with_gate_epochs(create_scheduler: Callable, freezing: AlternateFreezing) -> Callable:
    @functools.wraps(create_scheduler)
    def create_scheduler_with_gate_epochs(*args, **kwargs):
        scheduler, epochs = create_scheduler(*args, **kwargs)
        if scheduler is not None:
            step = scheduler.step
            scheduler.step = lambda epoch, metric=None: step(freezing.schedule_epoch(epoch), metric)
        return scheduler, freezing.total_epochs(epochs)

    return create_scheduler_with_gate_epochs


def _with_pad_crop(create_loader: Callable, pad_crop: int) -> Callable:
    @functools.wraps(create_loader)
    def create_loader_with_pad_crop(dataset, *args, **kwargs):
        from torchvision import transforms

        loader = create_loader(dataset, *args, **kwargs)
        bound = inspect.signature(create_loader).bind(dataset, *args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments
        if not options['is_training'] or options['no_aug']:
            return loader
        if options.get('num_aug_splits'):
            raise SystemExit('train.py: --pad-crop makes one image of an image; leave out --aug-splits')
        if options.get('use_multi_epochs_loader'):
            raise SystemExit('train.py: --pad-crop comes too late for it; leave out --use-multi-epochs-loader')
        if others := [name for option, name in AUGMENTATIONS.items() if options.get(option)]:
            raise SystemExit(f'train.py: --pad-crop augments by crops and flips only; leave out {", ".join(others)}')
        size = options['input_size'][-2:]
        steps = [
            transforms.Resize(size),
            transforms.RandomCrop(size, padding=pad_crop),
            transforms.RandomHorizontalFlip(options['hflip']),
        ]
        if options['use_prefetcher']:  # it normalises on the device
            steps.append(transforms.PILToTensor())
        else:
            steps += [transforms.ToTensor(), transforms.Normalize(options['mean'], options['std'])]
        dataset.transform = transforms.Compose(steps)
        return loader

    return create_loader_with_pad_crop


def _expect_parameters_at_rest() -> None:
    """Have every `DistributedDataParallel` look for the parameters that a phase leaves without a gradient.

    The class is changed in place, because timm names it in several modules. On a CPU it takes no device ids, which
    train.py passes whatever the device is.
    """
    init = DistributedDataParallel.__init__
    if hasattr(init, '__wrapped__'):
        return

    @functools.wraps(init)
    def init_for_phases(self, *args, **kwargs) -> None:
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        bound.arguments['find_unused_parameters'] = True
        if next(unwrap_model(bound.arguments['module']).parameters()).device.type == 'cpu':
            bound.arguments['device_ids'] = None
        init(*bound.args, **bound.kwargs)

    DistributedDataParallel.__init__ = init_for_phases  # type: ignore[method-assign]
