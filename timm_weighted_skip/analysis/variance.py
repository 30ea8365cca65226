"""How much skip weights differ between rounds of one training and between data sets (AdaResNet, arXiv 2408.09958).

The paper's section on different tasks, as its printed tables confirm it: of absolute values, *within* a group is the
mean over units of the population variance over rounds, *between* groups the mean over units of the population variance
of the groups' mean values. (The paper's two within-group figures carry each other's label.)
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from timm_weighted_skip.analysis.figures import colour, label_units, legend_above, literal, new_figure, styled
from timm_weighted_skip.analysis.tables import Result, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['group_variance']


def group_variance(groups: Mapping[str, np.ndarray], units: Sequence[str]) -> Result:
    """Variance of `|w|` within every group and between them.

    Args:
        groups: Name -> `w`, (units, rounds).
        units: Names.

    Raises:
        ValueError: A group has a single round, or another number of units.
    """
    for name, w in groups.items():
        if len(w) != len(units):
            raise ValueError(f'group {name!r} has {len(w)} mapping units where {len(units)} are expected')
        if w.shape[1] < 2:
            raise ValueError(f'group {name!r} has {w.shape[1]} round; a variance over rounds takes 2 or more')
    sizes = {name: np.abs(w) for name, w in groups.items()}
    means = {name: w.mean(1) for name, w in sizes.items()}
    rows: list[list] = [['within', name, w.shape[1], float(w.var(1).mean())] for name, w in sizes.items()]
    if len(groups) > 1:
        between = np.stack(list(means.values())).var(0)
        rows.append(['between', ', '.join(groups), sum(w.shape[1] for w in groups.values()), float(between.mean())])
    per_unit = [
        [unit, *(float(value) for name, w in sizes.items() for value in (means[name][u], w[u].var()))]
        for u, unit in enumerate(units)
    ]
    tables = {
        'variance': Table(['variance', 'of', 'rounds', 'value'], rows),
        'variance_units': Table(
            ['unit', *(f'{name} {of}' for name in groups for of in ('mean', 'variance'))], per_unit
        ),
    }
    return Result({'mapping units': len(units)}, tables, {'variance': lambda: _draw(sizes, units)})


@styled
def _draw(sizes: Mapping[str, np.ndarray], units: Sequence[str]) -> 'Figure':
    figure = new_figure()
    axes = figure.subplots()
    number = np.arange(1, len(units) + 1)
    for index, (name, w) in enumerate(sizes.items()):
        hue, style = colour(index)
        axes.fill_between(number, w.min(1), w.max(1), color=hue, alpha=0.2, linewidth=0)
        label = f'{literal(name)}: mean and range of {w.shape[1]} rounds'
        axes.plot(number, w.mean(1), style, color=hue, marker='o', label=label)
    label_units(axes, units)
    axes.set_ylim(bottom=0)
    axes.set_xlabel('mapping unit (number)')
    axes.set_ylabel('skip weight $|w|$ (no unit)')
    legend_above(axes, 1)
    return figure
