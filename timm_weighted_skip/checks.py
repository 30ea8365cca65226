"""What is refused, in one line that says what is allowed: values, devices, and images and classes that fit no net."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from timm_weighted_skip.files import first_sentence

__all__ = [
    'check_choice',
    'check_classes',
    'check_count',
    'check_device',
    'check_input_size',
    'check_not_given',
    'input_channels',
    'is_finite_number',
]


def check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f'{name}={value!r} is not allowed; give a whole number of {least} or more')


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not allowed; choose one of {", ".join(map(repr, choices))}')


def is_finite_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_not_given(given: Mapping[str, object], fixed: Mapping[str, object], what: str) -> None:
    """Refuse arguments that are `fixed` in `what`, such as 'a CIFAR ResNet'."""
    if both := [name for name in given if name in fixed]:
        raise TypeError(f'{", ".join(both)} can not be given: {what} has its own; leave it out')


def input_channels(net: nn.Module) -> int:
    """Channels of the images that a net takes; its config's `first_conv` may name a stem of several."""
    return next(module for module in net.modules() if isinstance(module, nn.Conv2d)).in_channels


def check_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: torch has none, or it can't take the sums over images, which are of float64.
    """
    try:
        empty = torch.empty(0, dtype=torch.float64, device=device)  # a TypeError of "mps"
        empty.cpu()  # which "meta" can't
        return empty.device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f'device {device!r} is not to be had ({first_sentence(error)}); give cpu or cuda') from None


def check_input_size(net: nn.Module, height: int, width: int) -> None:
    """Refuse images that `net` would not take.

    Raises:
        ValueError: They are smaller than its `min_input_size`, if it has one.
    """
    least = getattr(net, 'min_input_size', 1)
    if min(height, width) < least:
        raise ValueError(f'images of {height}x{width} pixels are too small; the net takes {least}x{least} and more')


def check_classes(net: nn.Module, classes: Sequence[object]) -> None:
    """Refuse images whose classes are not the net's.

    Names are compared with those of its config where both have the same ones: others, or numbers, may mean the same.

    Raises:
        ValueError: They are more or fewer, or in another order.
    """
    own = getattr(net, 'num_classes', len(classes))  # a net of features alone has none
    if own != len(classes):
        raise ValueError(
            f'the data has {len(classes)} classes and the net {own}; give the set that it was made for '
            '(an npz without `classes` is taken to have those of its labels alone)'
        )
    config: Any = getattr(net, 'pretrained_cfg', {})
    names, given = [*(config.get('label_names') or ())], [*map(str, classes)]
    if given != names and set(given) == set(names):
        first = next(i for i, pair in enumerate(zip(given, names)) if pair[0] != pair[1])
        raise ValueError(
            f'the classes of the data are in another order than those of the net: number {first} is {given[first]!r}, '
            f'and for the net {names[first]!r}; number the labels as the net does'
        )
