"""Tables in Markdown."""

from collections.abc import Sequence
from html import escape

__all__ = ['markdown_table']


def _cell(text: str) -> str:
    """`text` as it is, in one cell: lines, bars and tags would end it or vanish."""
    return escape(' '.join(text.splitlines()), quote=False).replace('|', r'\|')


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """A table for a README; with `right`, all columns but the first are put to the right."""
    rule = ['---', *['---:' if right else '---'] * (len(columns) - 1)]
    lines = [[*map(_cell, columns)], rule, *([*map(_cell, row)] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
