"""The weights of every mapping unit: `w` over rounds of training, or `lam` over a data set.

AdaResNet's Tables I and II and Figs. 5 and 7 (arXiv 2408.09958, Algorithm 3), AWM's Fig. 6 (arXiv 1811.06878).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from torch import nn

from timm_weighted_skip.analysis.collect import Collected
from timm_weighted_skip.analysis.figures import colour, label_units, legend_above, literal, new_figure, styled
from timm_weighted_skip.analysis.tables import Result, Table
from timm_weighted_skip.analysis.units import MappingUnit, mapping_units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['gate_table', 'rounds_table', 'skip_rounds', 'unit_table', 'weights_of_rounds']

WEIGHT = "lam1, the residual branch's; the shortcut's is 1 - lam1", 'lam_k, of connection k'


def unit_table(model: nn.Module) -> Result:
    """Every unit of an AWM net, whose weights are not known without images."""
    units = mapping_units(model)
    rows = [[unit.name, unit.kind] for unit in units]
    return Result({'mapping units': len(units)}, {'units': Table(['unit', 'kind'], rows)})


def skip_rounds(models: Sequence[nn.Module]) -> tuple[list[MappingUnit], np.ndarray]:
    """The units of AdaResNets of one architecture, and their `w`, (units, rounds).

    Raises:
        ValueError: A net's weights depend on the image, or the nets' units are not the same.
    """
    rounds = [mapping_units(model) for model in models]
    w = [[float(unit.weight) for unit in units if unit.weight is not None] for units in rounds]
    for number, (units, values) in enumerate(zip(rounds, w), 1):
        if len(values) < len(units):
            raise ValueError(f'net {number} is an AWM net: its weights depend on the image; inspect it alone')
        if [unit.name for unit in units] != [unit.name for unit in rounds[0]]:
            raise ValueError(
                f'net {number} has {len(units)} mapping units and net 1 has {len(rounds[0])}, or of other names; '
                'rounds are trainings of one model'
            )
    return rounds[0], np.array(w).T


def rounds_table(models: Sequence[nn.Module]) -> Result:
    """`w` of every unit, a column per round, and the rounds' mean."""
    return weights_of_rounds(*skip_rounds(models))


def weights_of_rounds(units: Sequence[MappingUnit], w: np.ndarray) -> Result:
    """`rounds_table` of what `skip_rounds` returns."""
    rounds = w.shape[1]
    columns = [f'round_{r}' for r in range(1, rounds + 1)] + ['mean'] if rounds > 1 else ['w']
    values = np.column_stack([w, w.mean(1)]) if rounds > 1 else w
    rows = [[unit.name, unit.kind, *map(float, row)] for unit, row in zip(units, values)]
    table = Table(['unit', 'kind', *columns], rows)
    about = {'mapping units': len(units), 'weight': "w, the shortcut's; the plain net's is 1", 'rounds': rounds}
    return Result(about, {'weights': table}, {'weights': lambda: _draw_rounds(units, w)})


def gate_table(collected: Collected, classes: Optional[Sequence[str]] = None) -> Result:
    """Mean, variance (ddof 0), least and greatest `lam1` of every unit over the images.

    Args:
        collected: The images' weights.
        classes: Names of the classes, to tell the images' classes apart as well.
    """
    weights = collected.weights.astype(np.float64)  # sums of many nearly equal numbers lose digits in float32
    about: dict[str, Any] = {
        'images': len(weights),
        'weights': len(collected.units),
        'weight': WEIGHT['concat' in collected.kinds],
        'top-1 accuracy (%)': collected.accuracy,
    }
    columns = ['unit', 'kind', 'plain net', 'mean', 'variance', 'min', 'max']
    statistics = [weights.mean(0), weights.var(0), weights.min(0), weights.max(0)]
    rows = [
        [unit, kind, float(identity), *map(float, values)]
        for unit, kind, identity, *values in zip(collected.units, collected.kinds, collected.identity, *statistics)
    ]
    result = Result(about, {'weights': Table(columns, rows)}, {'weights': lambda: _draw_gates(collected)})
    if classes is not None:
        present = [k for k in range(len(classes)) if (collected.labels == k).any()]
        of_class = [weights[collected.labels == k] for k in present]
        columns = ['unit', 'class', 'images', 'mean', 'variance', 'min', 'max']
        rows = [
            [unit, classes[k], len(w), *(float(f(w[:, u])) for f in (np.mean, np.var, np.min, np.max))]
            for u, unit in enumerate(collected.units)
            for k, w in zip(present, of_class)
        ]
        means = np.stack([w.mean(0) for w in of_class]) - collected.identity
        names = [classes[k] for k in present]
        result.tables['classes'] = Table(columns, rows)
        result.figures['classes'] = lambda: _draw_classes(means, names, collected)
    return result


@styled
def _draw_rounds(units: Sequence[MappingUnit], w: np.ndarray) -> 'Figure':
    figure = new_figure()
    axes = figure.subplots()
    number = np.arange(1, len(w) + 1)
    axes.axhline(0, color='0.7', linewidth=0.6)
    for r, values in enumerate(w.T):
        hue, style = colour(r)
        axes.plot(number, values, style, color=hue, marker='o', linewidth=0.8, label=f'round {r + 1}')
    if w.shape[1] > 1:
        axes.plot(number, w.mean(1), color='black', linewidth=2, label='mean')
    label_units(axes, [unit.name for unit in units])
    axes.set_xlabel('mapping unit (number)')
    axes.set_ylabel('skip weight $w$ (no unit)')
    if w.shape[1] > 1:
        legend_above(axes, 4)
    return figure


@styled
def _draw_gates(collected: Collected) -> 'Figure':
    figure = new_figure(height=3.2)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    weights, number = collected.weights.astype(np.float64), np.arange(1, len(collected.units) + 1)
    hue, accent = colour(0)[0], colour(1)[0]
    symbol, what = _terms(collected)
    top.fill_between(
        number, weights.min(0), weights.max(0), color=hue, alpha=0.2, linewidth=0, label='least to greatest'
    )
    top.plot(number, weights.mean(0), color=hue, marker='o', markersize=2.5, label='mean')
    top.step(number, collected.identity, where='mid', color='black', linewidth=0.8, linestyle='--', label='plain net')
    label_units(top, collected.units)
    label_units(bottom, collected.units, names=False)
    top.set_ylabel(f'weight {symbol} (no unit)')
    legend_above(top, 3)
    bottom.bar(number, weights.var(0), color=accent)
    bottom.set_ylabel(f'variance of {symbol}')
    bottom.set_xlabel(f'{what} (number)')
    return figure


def _terms(collected: Collected) -> tuple[str, str]:
    """Symbol of a weight, and what has one."""
    return (r'$\lambda_k$', 'connection') if 'concat' in collected.kinds else (r'$\lambda_1$', 'mapping unit')


@styled
def _draw_classes(means: np.ndarray, classes: Sequence[str], collected: Collected) -> 'Figure':
    units, (symbol, what) = collected.units, _terms(collected)
    figure = new_figure(height=min(9.0, max(2.4, 1.2 + 0.13 * len(classes))))
    axes = figure.subplots()
    limit = max(float(np.abs(means).max()), 1e-6)
    extent = (0.5, len(units) + 0.5, len(classes) - 0.5, -0.5)
    image = axes.imshow(means, cmap='PuOr', vmin=-limit, vmax=limit, aspect='auto', extent=extent, interpolation='none')
    label_units(axes, units, letter=0.026)
    legible = len(classes) <= 120
    if legible:
        axes.set_yticks(range(len(classes)), map(literal, classes), fontsize=7 if len(classes) <= 20 else 4)
    axes.set_xlabel(f'{what} (number)')
    axes.set_ylabel('class' if legible else 'class (number, from 0)')
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(f"mean {symbol} minus the plain net's")
    return figure
