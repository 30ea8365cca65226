"""Training curves of several runs, and what a sweep of runs ends at.

AdaResNet's Figs. 3, 4 and 6 (arXiv 2408.09958): accuracy per epoch. AWM's (arXiv 1811.06878) Fig. 4: error per epoch;
Fig. 5: error against the period t; Fig. 9: error against depth.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import numpy as np

from timm_weighted_skip.analysis.figures import colour, legend_above, literal, new_figure, styled
from timm_weighted_skip.analysis.tables import Result, Table
from timm_weighted_skip.nets import LOG, RESULT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['Run', 'curves', 'has_log', 'read_run', 'sweep']

_CURVES = ('train_loss', 'train_top1', 'eval_loss', 'eval_top1', 'lr')
_NAMES = {'loss': 'train_loss', 'top1': 'train_top1', 'test_loss': 'eval_loss', 'test_top1': 'eval_top1'}


@dataclass(frozen=True)
class Run:
    """A run's folder as it was read.

    Attributes:
        folder: Where it is.
        log: One dict per epoch, by timm's names: `epoch`, `phase`, `train_loss`, `train_top1`, `eval_loss`,
            `eval_top1`, `lr`; accuracies in percent, what was not logged is missing.
        result: Of the finished run, its `model`, `recipe` and more; empty before.
    """

    folder: Path
    log: list[dict[str, Any]]
    result: dict[str, Any]

    def values(self, field: str) -> np.ndarray:
        """`field` per epoch, (epochs,), NaN where it was not logged."""
        return np.array([np.nan if entry.get(field) is None else float(entry[field]) for entry in self.log])

    def test_top1(self) -> tuple[Optional[float], Optional[float]]:
        """Accuracy of the last epoch that was tested, and of the best."""
        tested = self.values('eval_top1')
        tested = tested[~np.isnan(tested)]
        return (float(tested[-1]), float(tested.max())) if len(tested) else (None, None)

    def gate_phases(self) -> list[tuple[int, int]]:
        """First and last epoch of every phase that trained the gates alone."""
        spans: list[tuple[int, int]] = []
        for entry in self.log:
            if entry.get('phase') == 'gates':
                goes_on = spans and spans[-1][1] == entry['epoch'] - 1
                first = spans.pop()[0] if goes_on else entry['epoch']
                spans.append((first, entry['epoch']))
        return spans


def has_log(folder: Path) -> bool:
    """Whether `read_run` finds a log in `folder`."""
    return (folder / LOG).is_file() or (folder / 'summary.csv').is_file()


def _timm_log(rows: Iterable[list[str]]) -> list[dict[str, float]]:
    """The epochs of timm's summary.csv. A run that was resumed goes on below a second header, from where it went on."""
    names: list[str] = []
    log: list[dict[str, float]] = []
    for row in filter(None, rows):
        if not names or 'epoch' in row:
            names = row
            continue
        entry = {name: float(value) for name, value in zip(names, row) if value}
        if 'epoch' in entry:
            log = [before for before in log if before.get('epoch', -1) < entry['epoch']]
        log.append(entry)
    return log


def read_run(folder: Union[str, Path]) -> Run:
    """Read `log.jsonl` and `result.json`, or the `summary.csv` that timm's train.py writes.

    Raises:
        OSError: There is no log in `folder`.
        ValueError: A log is empty or damaged, or its epochs are not numbered.
    """
    folder = Path(folder).resolve()
    lines, summary, result = folder / LOG, folder / 'summary.csv', folder / RESULT
    try:
        if lines.is_file():
            log = [json.loads(line) for line in lines.read_text(encoding='utf-8').splitlines() if line.strip()]
        elif summary.is_file():
            with summary.open(newline='') as file:
                log = _timm_log(csv.reader(file))
        else:
            raise FileNotFoundError(f'{folder} has neither log.jsonl nor summary.csv; give the folder of a run')
        outcome = json.loads(result.read_text(encoding='utf-8')) if result.is_file() else {}
        if not all(isinstance(entry, dict) for entry in (*log, outcome)):
            raise ValueError('it has something else than objects')
    except ValueError as error:
        raise ValueError(f'{folder}: the log cannot be read: {error}') from error
    if not log or not all(isinstance(entry.get('epoch'), (int, float)) for entry in log):
        raise ValueError(f'{folder}: the log has {len(log)} epochs, and each needs a number "epoch"')
    log = [{_NAMES.get(name, name): value for name, value in entry.items()} for entry in log]
    for name, value in ((name, entry.get(name)) for entry in log for name in _CURVES):
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f'{folder}: the log says {name} {value!r}, which is not a number')
    return Run(folder, [{**entry, 'epoch': int(entry['epoch'])} for entry in log], outcome)


def _check_distinct(runs: Sequence[Run]) -> None:
    if len({run.folder for run in runs}) < len(runs):
        raise ValueError('a run is given twice; give each once')


def curves(runs: Sequence[Run], error: bool = False) -> Result:
    """Accuracy and loss of every epoch.

    Args:
        runs: One or more.
        error: Draw the error, 100 % less the accuracy.

    Raises:
        ValueError: A run is given twice.
    """
    _check_distinct(runs)
    names = _names(runs)
    columns = ['run', 'epoch', 'phase', *_CURVES]
    epochs = [
        [name, entry['epoch'], *(entry.get(field) for field in columns[2:])]
        for name, run in zip(names, runs)
        for entry in run.log
    ]
    rows = [[name, str(run.result.get('model', '-')), len(run.log), *run.test_top1()] for name, run in zip(names, runs)]
    tables = {
        'runs': Table(['run', 'model', 'epochs', 'last top-1 (%)', 'best top-1 (%)'], rows),
        'curves': Table(columns, epochs),
    }
    return Result({'runs': len(runs)}, tables, {'curves': lambda: _draw_curves(names, runs, error)})


def sweep(runs: Sequence[Run], against: str) -> Result:
    """Last-epoch error of finished runs, mean and standard deviation (ddof 1) over those of one model and value.

    They are to differ in the seed alone; in what else they do is said.

    Args:
        runs: Finished runs.
        against: The x axis: a field of `result.json` (`recipe.lr` for one within another), or `depth`, the number in
            the model's name.

    Raises:
        ValueError: A run has no result, no such field, a value that is no number, or no test accuracy; or a run is
            given twice.
    """
    x: Any
    cells: dict[tuple[str, float], list[Run]] = {}
    _check_distinct(runs)
    for run in runs:
        model = series = _field(run, 'model')
        if against == 'depth':
            number = re.search(r'\d+', model)
            series, x = re.sub(r'\d+', '', model), number and number[0]
        else:
            x = _field(run, against)
        try:
            key = series, float(x)
        except (TypeError, ValueError):
            raise ValueError(f'run {run.folder}: {against} is {x!r}; it must be a number') from None
        cells.setdefault(key, []).append(run)
    rows: list[list[Any]] = []
    differing: set[str] = set()
    for (series, value), members in sorted(cells.items()):
        differing |= _differing(members)
        last_errors, best_errors = zip(*map(_errors, members))
        deviation = float(np.std(last_errors, ddof=1)) if len(members) > 1 else None
        x = int(value) if value.is_integer() else value
        rows.append([series, x, len(members), float(np.mean(last_errors)), deviation, float(np.mean(best_errors))])
    columns = ['model', against, 'runs', 'last error (%)', 'deviation', 'best error (%)']
    about: dict[str, Any] = {'runs': len(runs)}
    if differing:
        about['runs of one point differ, beside the seed, in'] = ', '.join(sorted(differing))
    return Result(about, {'sweep': Table(columns, rows)}, {'sweep': lambda: _draw_sweep(rows, against)})


def _errors(run: Run) -> tuple[float, float]:
    """Error of the last epoch that was tested, and of the best."""
    last, best = run.test_top1()
    if last is None or best is None:
        raise ValueError(f'run {run.folder} has no test accuracy in its log')
    return 100 - last, 100 - best


def _differing(runs: Sequence[Run]) -> set[str]:
    """In what the data and the recipes of runs differ, beside the seed."""
    asked = [{'data': run.result.get('data'), **(run.result.get('recipe') or {})} for run in runs]
    names = {name for values in asked for name in values} - {'seed'}
    return {name for name in names if any(values.get(name) != asked[0].get(name) for values in asked)}


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders without what is common to all."""
    common = os.path.commonpath([run.folder.parent for run in runs])
    return [os.path.relpath(run.folder, common) for run in runs]


def _field(run: Run, path: str) -> Any:
    value: Any = run.result
    for part in path.split('.'):
        if not isinstance(value, dict) or part not in value:
            there = ', '.join(map(str, value)) if isinstance(value, dict) and value else 'nothing'
            raise ValueError(f'result.json of run {run.folder} has no {path!r}; there is {there}')
        value = value[part]
    return value


def _shade(axes: 'Axes', runs: Sequence[Run]) -> None:
    """Shade the gates' phases if all runs that have some have the same."""
    schedules = {tuple(spans) for run in runs if (spans := run.gate_phases())}
    if len(schedules) == 1:
        for index, (first, last) in enumerate(schedules.pop()):
            label = None if index else 'gates alone (in turn)'
            axes.axvspan(first - 0.5, last + 0.5, color='0.9', linewidth=0, zorder=0, label=label)


def _fit(axes: 'Axes') -> None:
    """Fit the y axis to all but the first tenth of every curve, whose steep start would leave the rest no room."""
    points = [np.array(line.get_xydata(), float) for line in axes.lines]
    y = np.concatenate([xy[xy[:, 0] >= xy[0, 0] + len(xy) // 10, 1] for xy in points])
    y = y[np.isfinite(y)]
    if len(y) and y.min() < y.max():
        margin = 0.05 * np.ptp(y)
        axes.set_ylim(y.min() - margin, y.max() + margin)


@styled
def _draw_curves(names: Sequence[str], runs: Sequence[Run], error: bool) -> 'Figure':
    columns = 1 if max(map(len, names)) > 24 else 2
    figure = new_figure(height=4.2 + 0.16 * max(0, len(names) / columns - 4))  # a long legend takes none of the plots'
    top, bottom = figure.subplots(2, sharex=True)
    for index, (name, run) in enumerate(zip(names, runs)):
        hue, style = colour(index)
        epoch = run.values('epoch')
        marker = 'o' if len(epoch) < 3 else ''
        for axes, kind in ((top, 'top1'), (bottom, 'loss')):
            for part in ('train', 'eval'):
                values = run.values(f'{part}_{kind}')
                values = 100 - values if error and kind == 'top1' else values
                look = dict(linewidth=1.4, label=literal(name)) if part == 'eval' else dict(linewidth=0.7, alpha=0.6)
                axes.plot(epoch, values, style, color=hue, marker=marker, **look)
    for axes in (top, bottom):
        _fit(axes)
        _shade(axes, runs)
    top.set_ylabel('top-1 error (%)' if error else 'top-1 accuracy (%)')
    bottom.set_ylabel('loss (nats)')
    bottom.set_xlabel('epoch (number); thick: test, thin: training')
    legend_above(top, columns, 1.0)
    return figure


@styled
def _draw_sweep(rows: Sequence[Sequence[Any]], against: str) -> 'Figure':
    figure = new_figure()
    axes = figure.subplots()
    field = against.rsplit('.', 1)[-1]
    in_turn = field == 'alternate_freeze'
    for index, series in enumerate(dict.fromkeys(row[0] for row in rows)):
        hue, style = colour(index)
        values = np.array([(row[1], row[3], row[4]) for row in rows if row[0] == series], float)
        if in_turn and values[0, 0] == 0:  # all trained together, which is no period
            _, error, deviation = values[0]
            axes.axhline(error, color=hue, linestyle=':', linewidth=1, label=f'{literal(series)}, together')
            axes.axhspan(error - deviation, error + deviation, color=hue, alpha=0.15, linewidth=0)
            values = values[1:]
        x, error, deviation = values.T
        axes.errorbar(
            x, error, deviation, color=hue, linestyle=style, marker='os^D'[index % 4], capsize=2, label=literal(series)
        )
    axes.set_xlabel({'depth': 'depth (layers)', 'alternate_freeze': 'period t (epochs)'}.get(field, field))
    axes.set_ylabel('top-1 error, last epoch (%, ± std)')
    axes.set_xticks(sorted({row[1] for row in rows if not in_turn or row[1]}))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.legend()
    return figure
