"""One self-contained HTML page about a run or a checkpoint."""

import base64
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from timm_weighted_skip import __version__
from timm_weighted_skip.analysis.figures import render
from timm_weighted_skip.analysis.tables import Result, format_value, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['html_report']

_LONG = 24  # rows; a longer table is folded


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values to read, nested ones by their dotted path; what has no value is left out."""
    facts: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            facts += [(f'{name}.{inner}', text) for inner, text in _facts(value)]
        elif value is not None:
            facts.append((name, json.dumps(value) if isinstance(value, (list, bool)) else format_value(value)))
    return facts


def _image(figure: 'Figure') -> str:
    """A data URI: pixels for photographs, SVG for the rest."""
    form, kind = ('png', 'png') if any(axes.images for axes in figure.axes) else ('svg', 'svg+xml')
    return f'data:image/{kind};base64,{base64.b64encode(render(figure, form)).decode()}'


def html_report(title: str, sections: Mapping[str, Result]) -> str:
    """A page with a heading, pictures and tables for every section; it refers to nothing outside itself."""
    require('jinja2', 'matplotlib')
    import jinja2

    template = files('timm_weighted_skip.analysis').joinpath('report.html').read_text(encoding='utf-8')
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    drawn = {
        heading: {
            'about': _facts(result.about),
            'figures': {
                name: (_image(figure), figure.get_figwidth())
                for name, draw in result.figures.items()
                for figure in [draw()]
            },
            'tables': {
                name: (table.columns, table.cells(), table.numeric(), len(table.rows) > _LONG)
                for name, table in result.tables.items()
            },
        }
        for heading, result in sections.items()
    }
    return page.render(title=title, version=__version__, sections=drawn)
