"""One look for all pictures: a journal column wide, colour-blind safe, text of 8 points."""

import functools
import io
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from timm_weighted_skip.analysis.tables import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['COLUMN', 'colour', 'label_units', 'legend_above', 'literal', 'new_figure', 'render', 'styled']

COLUMN = 3.5  # inches: 89 mm, a column of a two-column page

# Okabe and Ito's colours, which stay apart under every kind of colour blindness; their yellow is too light for lines.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')

STYLE: Any = {
    'font.size': 8,
    'axes.titlesize': 8,
    'axes.labelsize': 8,
    'legend.fontsize': 7,
    'xtick.labelsize': 7,
    'ytick.labelsize': 7,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.6,
    'axes.axisbelow': True,
    'lines.linewidth': 1.2,
    'lines.markersize': 3,
    'legend.frameon': False,
    'legend.title_fontsize': 7,
    'savefig.dpi': 300,
    'svg.hashsalt': 'weighted-skip',  # the same picture is the same file
}


Draw = TypeVar('Draw', bound=Callable[..., Any])


def styled(draw: Draw) -> Draw:
    """Have a function that draws do so in the common style, or say what to install."""

    @functools.wraps(draw)
    def in_style(*args: Any, **kwargs: Any) -> Any:
        require('matplotlib')
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return in_style  # type: ignore[return-value]


def new_figure(width: float = COLUMN, height: float = 2.4) -> 'Figure':
    """An empty figure of `width` x `height` inches; not pyplot's, which would keep it and look for a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def colour(index: int) -> tuple[str, str]:
    """Colour and line style of curve number `index`; the style changes when the colours begin again."""
    return COLOURS[index % len(COLOURS)], ('-', '--', ':', '-.')[index // len(COLOURS) % 4]


def literal(text: str) -> str:
    """`text` for a figure as it is; matplotlib reads mathematics between dollars, and hides what begins with `_`."""
    text = text.replace('$', r'\$')
    return rf'$\_${text[1:]}' if text.startswith('_') else text


def label_units(axes: 'Axes', units: Sequence[str], names: bool = True, letter: float = 0.02) -> None:
    """Number the mapping units 1..U on the x axis, part the net's stages by lines and name those that are wide enough.

    Args:
        axes: With unit number u drawn at x = u.
        units: Their names.
        names: Write the stages' names on top.
        letter: Share of the axes' width that a letter takes; more than the usual one beside a colour bar.
    """
    from matplotlib.ticker import MaxNLocator

    start = 0.5
    for stage, members in groupby(
        units, key=lambda unit: unit.removeprefix('features.').removeprefix('dense').split('.')[0].split('[')[0]
    ):
        width = len(list(members))
        if start > 0.5:
            axes.axvline(start, color='0.85', linewidth=0.6, zorder=0)
        if names and width > letter * (len(stage) + 1) * len(units):
            axes.text(start + width / 2, 1.01, stage, transform=axes.get_xaxis_transform(), ha='center', va='bottom',
                      fontsize=7, color='0.35')  # fmt: skip
        start += width
    axes.set_xlim(0.5, start)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend_above(axes: 'Axes', columns: int, bottom: float = 1.06) -> None:
    """Put the legend where it covers no data: from `bottom` of the axes' height on, which is over the stages' names."""
    axes.legend(ncols=columns, loc='lower center', bbox_to_anchor=(0.5, bottom), columnspacing=1)


@styled
def render(figure: 'Figure', form: str) -> bytes:
    """The bytes of `figure` as 'png' or 'svg'."""
    out = io.BytesIO()
    figure.savefig(out, format=form, metadata={'Date': None} if form == 'svg' else {})
    return out.getvalue()
