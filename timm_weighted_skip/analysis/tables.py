"""What an analysis found, as numbers (CSV and JSON), as tables in the terminal and as pictures (PNG and SVG)."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from timm_weighted_skip.files import write_file
from timm_weighted_skip.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['Result', 'Table', 'format_value', 'require']


LONGEST = 120
"""Rows that the terminal shows of a table: the per-class weights of a small net, not every epoch of several runs."""


def require(*modules: str) -> None:
    """Raise an ImportError that says what to install unless every one of `modules`, of the analysis extra, is there."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"this needs {' and '.join(missing)}; install with: pip install 'timm-weighted-skip[analysis]'"
        )


def format_value(value: Any) -> str:
    """To read: floats to four places, or to two digits if they are smaller."""
    if value is None:
        return '-'
    if not isinstance(value, float):
        return str(value)
    return f'{value:.1e}' if 0 < abs(value) < 5e-4 else f'{value:.4f}'


@dataclass(frozen=True)
class Table:
    """Columns and rows; a cell without a value is None."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def cells(self) -> list[list[str]]:
        """The rows as text to read."""
        return [[format_value(value) for value in row] for row in self.rows]

    def numeric(self) -> list[bool]:
        """Whether a column holds numbers."""
        return [not any(isinstance(value, str) for value in column) for column in zip(*self.rows)]

    def text(self) -> str:
        """For the terminal: numbers to the right, words to the left, and of a long table both ends."""
        lines = [list(self.columns), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines)]
        numeric = self.numeric()
        aligned = (
            [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(line, widths, numeric)]
            for line in lines
        )
        text = ['  '.join(line).rstrip() for line in aligned]
        if left_out := max(0, len(self.rows) - LONGEST):
            half = LONGEST // 2
            text[half + 1 : -half] = [f'... {left_out} rows more, all of which --output DIR writes']
        return '\n'.join(text)

    def markdown(self, right: bool = False) -> str:
        """For a README; with `right`, all columns but the first are put to the right."""
        return markdown_table(self.columns, self.cells(), right)

    def csv(self) -> str:
        """In full precision."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator='\n')
        writer.writerows([self.columns, *self.rows])
        return out.getvalue()

    def records(self) -> list[dict[str, Any]]:
        """For JSON, which has no numbers that are not finite: those are None."""
        finite = [[None if isinstance(v, float) and not math.isfinite(v) else v for v in row] for row in self.rows]
        return [dict(zip(self.columns, row)) for row in finite]


@dataclass(frozen=True)
class Result:
    """The outcome of one analysis.

    Attributes:
        about: What was measured on what.
        tables: By name, which is the stem of the CSV file.
        figures: By name; called to draw, so that numbers alone need no matplotlib.
    """

    about: dict[str, Any]
    tables: dict[str, Table]
    figures: dict[str, Callable[[], 'Figure']] = field(default_factory=dict)

    def text(self) -> str:
        about = '\n'.join(f'{key}: {format_value(value)}' for key, value in self.about.items())
        return '\n\n'.join([about, *(table.text() for table in self.tables.values())])

    def save(self, folder: Union[str, Path]) -> list[Path]:
        """Write `<table>.csv`, `<table>.json`, `<figure>.png` and `<figure>.svg` to `folder`; returns their paths."""
        from timm_weighted_skip.analysis.figures import render

        files: dict[Path, Union[str, bytes]] = {}
        for name, table in self.tables.items():
            numbers = {'about': self.about, 'rows': table.records()}
            files[Path(folder, f'{name}.csv')] = table.csv()
            files[Path(folder, f'{name}.json')] = json.dumps(numbers, indent=1) + '\n'
        for name, draw in self.figures.items():
            figure = draw()
            for form in ('png', 'svg'):
                files[Path(folder, f'{name}.{form}')] = render(figure, form)
        for path, content in files.items():
            write_file(path, content)
        return list(files)
