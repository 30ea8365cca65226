"""The names under which this package registers its models."""

import difflib

import timm
from timm.models import model_entrypoint

__all__ = ['model_names']


def model_names(pattern: str = '*') -> list[str]:
    """Registered names of this package that match the wildcard `pattern`, in timm's natural order.

    Raises:
        ValueError: None matches; the message lists near names.
    """
    package = __name__.rpartition('.')[0]
    ours = [name for name in timm.list_models() if model_entrypoint(name).__module__.rpartition('.')[0] == package]
    names = [name for name in timm.list_models(pattern) if name in set(ours)]
    if not names:
        near = difflib.get_close_matches(pattern, ours, n=4) or ours
        raise ValueError(f'no model of this package is called {pattern!r}; there are {", ".join(near)}')
    return names
