"""Names of models: those that this package registers, and what to say to one that is not registered."""

import difflib

import timm
from timm.models import get_arch_pretrained_cfgs, model_entrypoint, split_model_name_tag

__all__ = ['check_model_name', 'model_names']


def check_model_name(name: str) -> None:
    """Refuse a name that timm can't make a net of, such as one of a depth or with a tag that does not exist.

    Args:
        name: A registered name, with or without a tag, or a source such as `local-dir:FOLDER`, which always passes.

    Raises:
        ValueError: There is no such model or tag; the message lists what there is.
    """
    if ':' in name:
        return
    if not timm.is_model(name):
        known = timm.list_models()
        longer = [each for each in known if each.startswith(f'{name}_')]
        near = list(dict.fromkeys([*longer, *difflib.get_close_matches(name, known, n=4)]))[:4]
        there_is = f'near names are {", ".join(near)}' if near else '`weighted-skip list` has those of this package'
        raise ValueError(f'no model is called {name!r}; {there_is}')
    model, tag = split_model_name_tag(name)
    tagged = get_arch_pretrained_cfgs(model)
    if tag and name not in tagged:
        tags = ', '.join(split_model_name_tag(each)[1] for each, config in tagged.items() if config.has_weights)
        raise ValueError(f'{model} has no checkpoint {tag!r}; it has {tags or "none"}')


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
