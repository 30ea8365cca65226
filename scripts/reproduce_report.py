"""The report and the checkpoints of `scripts/reproduce.py`: tables, figures and verdicts, all from the results' files.

What stands between `<!-- NAME -->` and `<!-- /NAME -->` in REPORT.md, and in the README's sections `reproduction` and
`checkpoints`, is written here and nowhere else.
"""

import re
import shlex
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import timm
import torch
from reproduce_manifest import Experiment, Job, Manifest, Run

from timm_weighted_skip.analysis import mapping_units
from timm_weighted_skip.analysis.curves import Run as Curve
from timm_weighted_skip.analysis.curves import curves, sweep
from timm_weighted_skip.analysis.figures import colour, label_units, legend_above, new_figure, render, styled
from timm_weighted_skip.analysis.inspection import weights_of_rounds
from timm_weighted_skip.analysis.tables import Result, Table, require
from timm_weighted_skip.analysis.variance import group_variance
from timm_weighted_skip.costs import count_costs
from timm_weighted_skip.files import read_json, write_file
from timm_weighted_skip.hub import Results, save_checkpoint, update_results
from timm_weighted_skip.hub.checkpoint import build_net
from timm_weighted_skip.hub.source import known_results, load_net_and_args
from timm_weighted_skip.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_results(manifest: Manifest, run: Run) -> dict[int, dict[str, Any]]:
    """Seed -> result of the finished trainings of a run."""
    results = ((seed, manifest.result(Job(run, seed))) for seed in run.seeds)
    return {seed: result for seed, result in results if result is not None}


def last_top1(results: dict[int, dict[str, Any]]) -> list[float]:
    return [result['last']['top1'] for result in results.values()]


def last_epochs(results: dict[int, dict[str, Any]], field: str, count: int) -> list[float]:
    """Mean of a field of the log over the last epochs, of every seed whose log has it."""
    curves = [[line.get(field) for line in result['curve'][-count:]] for result in results.values()]
    return [statistics.fmean(values) for values in curves if None not in values]


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation (n - 1) and number of accuracies."""
    if not values:
        return '-'
    mean = f'{statistics.fmean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f} ({len(values)})' if len(values) > 1 else f'{mean} (1)'


def device_of(machine: dict[str, Any]) -> str:
    """What a run was trained on, and in which precision."""
    threads = f'{machine["threads"]} thread{"s" if machine["threads"] > 1 else ""}'
    precision = 'bfloat16' if machine['amp'] else 'float32'
    return f'{machine["device"]}, {threads}, {precision}, torch {machine["versions"]["torch"]}'


def short_commit(commit: Optional[str]) -> str:
    """What `package_commit` told, with its mark of a changed checkout."""
    return '-' if commit is None else commit[:9] + '+' * commit.endswith('+')


def reported(accuracy: Optional[float]) -> str:
    """A paper's figure, if it has one."""
    return '-' if accuracy is None else f'{accuracy:.2f}'


def compare(ours: Sequence[float], baseline: Sequence[float]) -> tuple[str, str]:
    """Difference of the means with its 95 % interval by Welch's t, and what that says."""
    if not ours or not baseline:
        return '-', '-'
    difference = f'{statistics.fmean(ours) - statistics.fmean(baseline):+.2f}'
    if len(ours) < 2:
        return difference, 'one seed: no verdict'
    if len(baseline) < 2:
        return difference, 'one seed of the baseline: no verdict'
    if len({*ours}) == len({*baseline}) == 1:
        return difference, 'no spread: no verdict'
    from scipy.stats import ttest_ind

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # that no spread in one of the two may be a loss of precision
        low, high = ttest_ind(ours, baseline, equal_var=False).confidence_interval(0.95)
    verdict = 'better' if low > 0 else 'worse' if high < 0 else 'within noise'
    return f'{difference} [{low:+.2f}, {high:+.2f}]', verdict


def accuracy_table(manifest: Manifest, experiment: Experiment) -> str:
    """One line per run of an experiment: ours, the paper's, and the comparison with the baseline."""
    rows = []
    for run in experiment.runs.values():
        results = read_results(manifest, run)
        accuracies = [
            last_epochs(results, 'train_top1', 1),
            last_top1(results),
            last_epochs(results, 'eval_top1', 3),
            [result['best']['top1'] for result in results.values()],
        ]
        plain = manifest.baseline(run)
        baseline = read_results(manifest, plain) if plain else {}
        compared = compare(last_top1(results), last_top1(baseline))
        ours = map(spread, accuracies) if results else ['not run', '-', '-', '-']
        rows.append([run.name, str(run.epochs()), *ours, reported(run.paper), run.baseline or '-', *compared])
    measured = ['training (%)', 'last epoch (%)', 'last three (%)', 'best epoch (%)']
    return markdown_table(['run', 'epochs', *measured, 'paper (%)', 'baseline', 'difference', 'verdict'], rows)


def _curves(experiment: Experiment, results: dict[str, dict[int, dict[str, Any]]]) -> list[Curve]:
    """The first seed's curve of every run."""
    first = {name: next(iter(of_seed.values())) for name, of_seed in results.items()}
    return [Curve(Path(experiment.name, name), result['curve'], result) for name, result in first.items()]


def skip_weight_rounds(results: dict[int, dict[str, Any]]) -> tuple[list[str], np.ndarray]:
    """Names of the units of an AdaResNet run and their `w`, (units, rounds)."""
    rounds = [result['mapping_units'] for result in results.values()]
    return list(rounds[0]), np.array([[unit['mean'][0] for unit in units.values()] for units in rounds]).T


def sizes_table(results: dict[int, dict[str, Any]], paper: list[list[float]]) -> str:
    """`|w|` of every unit beside the paper's (AdaResNet, Tables I and II): mean, standard deviation, rounds."""
    names, w = skip_weight_rounds(results)
    rows = [
        [name, spread(ours), spread(theirs), compare(ours, theirs)[0]]
        for name, ours, theirs in zip(names, np.abs(w).tolist(), np.abs(paper).tolist(), strict=True)
    ]
    return markdown_table(['unit', 'ours', 'paper', 'difference'], rows)


def lam1(unit: dict[str, Any]) -> tuple[float, float]:
    """Mean of a gate's `lam1` over the test images, and its standard deviation."""
    return unit['mean'][0], unit['variance'][0] ** 0.5


@styled
def _draw_gates(results: dict[int, dict[str, Any]]) -> 'Figure':
    """AWM's Fig. 6 of every seed: mean of `lam1` per unit over the test images, with its standard deviation."""
    figure = new_figure()
    axes = figure.subplots()
    axes.axhline(0.5, color='0.6', linewidth=0.6)
    for index, (seed, result) in enumerate(results.items()):
        units, (hue, style) = result['mapping_units'], colour(index)
        number, (mean, deviation) = np.arange(1, len(units) + 1), np.array([*map(lam1, units.values())]).T
        axes.fill_between(number, mean - deviation, mean + deviation, color=hue, alpha=0.2, linewidth=0)
        axes.plot(number, mean, style, color=hue, marker='o', label=f'seed {seed}')
    label_units(axes, list(units))
    axes.set_xlabel('mapping unit (number)')
    axes.set_ylabel('mean of $\\lambda_1$ over the images\n(shaded: ± deviation)')
    legend_above(axes, 4)
    return figure


def connection_weights(results: dict[int, dict[str, Any]]) -> Result:
    """The weights of an AWM DenseNet's connections, means over the test images times their number."""
    rows = []
    for unit, first in next(iter(results.values()))['mapping_units'].items():
        count = len(first['mean'])
        weights = [[count * mean for mean in result['mapping_units'][unit]['mean']] for result in results.values()]
        rows.append([unit, count, *(end for each in weights for end in (min(each), max(each)))])
    columns = ['unit', 'connections', *(f'seed {seed} {of}' for seed in results for of in ('least', 'largest'))]
    about = "means over the test images in multiples of the plain net's, the least and the largest connection"
    return Result({'weights': about}, {'weights': Table(columns, rows)})


def weights_of(run: Run, results: dict[int, dict[str, Any]]) -> Optional[Result]:
    """The weights that a run has learned."""
    units, fixed = next(iter(results.values()))['mapping_units'], run.options.get('model_kwargs', {}).get('skip_fixed')
    if not units or fixed:
        return None
    if any(len(unit['mean']) > 2 for unit in units.values()):
        return connection_weights(results)
    if any(len(unit['mean']) == 1 for unit in units.values()):
        _, w = skip_weight_rounds(results)
        rounds = weights_of_rounds(mapping_units(timm.create_model(run.model)), w)
        return replace(rounds, about={'weights': "`w`, where the plain net's is 1"})
    columns = ['unit', *(f'seed {seed} {of}' for seed in results for of in ('mean', 'deviation'))]
    rows = [
        [unit, *(value for result in results.values() for value in lam1(result['mapping_units'][unit]))]
        for unit in units
    ]
    about = "the branch's `lam1` over the test images, where the plain net's is 0.5"
    return Result({'weights': about}, {'weights': Table(columns, rows)}, {'weights': lambda: _draw_gates(results)})


class Report:
    """Sections as they are made, and the figures beside them."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.figures = manifest, manifest.folder / 'figures'

    def picture(self, result: Result, figure: str, name: str, text: str) -> str:
        """Draw a figure of `result` to a file; returns the Markdown that shows it."""
        path = self.figures / f'{name}.svg'
        write_file(path, render(result.figures[figure](), 'svg'))
        return f'![{text}]({path.relative_to(self.manifest.folder)})'

    def experiment(self, experiment: Experiment) -> str:
        parts = [f'## {experiment.title}', accuracy_table(self.manifest, experiment)]
        about = [f'- `{run.name}`: {run.about}' for run in experiment.runs.values() if run.about]
        parts += ['\n'.join(about)] if about else []
        results = {name: found for name, run in experiment.runs.items() if (found := read_results(self.manifest, run))}
        if results:
            drawn = _curves(experiment, results)
            title = 'Accuracy and loss per epoch, first seed'
            parts.append(self.picture(curves(drawn), 'curves', f'{experiment.name}-curves', title))
        if experiment.against and results:
            every = [
                Curve(Path(r['run'], str(r['seed'])), r['curve'], r)
                for found in results.values()
                for r in found.values()
            ]
            swept = sweep(every, experiment.against)
            points = swept.tables['sweep']
            if len({row[1] for row in points.rows}) > 1:  # else there is nothing to see yet
                title = f'Error against {experiment.against}'
                parts += [f'{key}: {value}' for key, value in swept.about.items() if key != 'runs']
                parts += [points.markdown(), self.picture(swept, 'sweep', f'{experiment.name}-sweep', title)]
        for name, of_seed in results.items():
            weights = weights_of(experiment.runs[name], of_seed)
            if weights is not None:
                parts += [f'Weights of `{name}`, {weights.about["weights"]}:', weights.tables['weights'].markdown()]
                file, title = f'{experiment.name}-{name}-weights', f'Weights of {name}'
                parts += [self.picture(weights, figure, file, title) for figure in weights.figures]
            if paper := experiment.runs[name].paper_weights:
                parts.append(f"Sizes `|w|` of `{name}`, mean ± standard deviation (rounds), and the paper's:")
                parts.append(sizes_table(of_seed, paper))
        return '\n\n'.join(parts)

    def variance(self) -> Optional[str]:
        """AdaResNet's variances within and between data sets, once there are rounds of all groups."""
        groups: dict[str, np.ndarray] = {}
        paper: dict[str, np.ndarray] = {}
        names: list[str] = []
        for group, path in self.manifest.variance.items():
            run = self.manifest.runs[path]
            results = read_results(self.manifest, run)
            if len(results) < 2:
                return None
            names, groups[group] = skip_weight_rounds(results)
            if run.paper_weights:
                paper[group] = np.array(run.paper_weights)
        if not groups:
            return None
        found = group_variance(groups, names)
        table = found.tables['variance']
        if paper.keys() == groups.keys():
            theirs = group_variance(paper, names).tables['variance']
            values = [[*row, value] for row, (*_, value) in zip(table.rows, theirs.rows)]
            table = Table([*table.columns, "from the paper's tables"], values)
        picture = self.picture(found, 'variance', 'variance', 'Mean and range of the weights of each data set')
        return f'{table.markdown()}\n\n{picture}'

    def runs(self) -> str:
        """What was run where, and how much was not."""
        jobs, rows = list(self.manifest.jobs()), []
        for job in jobs:
            result = self.manifest.result(job)
            if result is None:
                continue
            machines = (*result.get('earlier', ()), result)  # some may differ in what is not told here
            where = '; then '.join(dict.fromkeys(map(device_of, machines)))
            commit = ' then '.join(dict.fromkeys(short_commit(m['commit']) for m in machines))
            speed = '-' if result['images_per_second'] is None else f'{result["images_per_second"]:.0f}'
            rows.append([job.name, f'{result["wall_time"] / 60:.1f}', speed, where, commit])
        finished = f'{len(rows)} of {len(jobs)} runs of the manifest are finished; the tables above tell which.'
        marked = 'After a commit, `+` tells of changes that were not committed.'
        return f'{finished} {marked}\n\n{markdown_table(["run", "minutes", "images/s", "device", "commit"], rows)}'

    def summary(self) -> str:
        """For the README: every finished comparison in a line, an experiment's title in its first."""
        rows: list[list[str]] = []
        for experiment in self.manifest.experiments.values():
            title = experiment.title
            for run in experiment.runs.values():
                ours, plain = last_top1(read_results(self.manifest, run)), self.manifest.baseline(run)
                if plain is None or not ours:
                    continue
                theirs = last_top1(read_results(self.manifest, plain))
                name = f'{run.name}: {run.about}' if run.about else run.name
                paper = f'{reported(run.paper)} / {reported(plain.paper)}'
                rows.append([title, name, spread(ours), spread(theirs), *compare(ours, theirs), paper])
                title = ''
        measured = ['accuracy (%)', 'its baseline (%)', 'difference', 'verdict']
        columns = ['experiment', 'run', *measured, 'paper: run / baseline (%)']
        return markdown_table(columns, rows) if rows else 'No comparison is finished.'


def fill(path: Path, sections: dict[str, Optional[str]]) -> None:
    """Replace what stands between the markers of every section that has a text.

    Raises:
        ValueError: A marker is missing or there twice.
    """
    text = path.read_text(encoding='utf-8')
    for name, section in sections.items():
        parts = re.split(rf'(<!-- /?{re.escape(name)} -->\n)', text)
        if len(parts) != 5:
            raise ValueError(
                f'{path}: <!-- {name} --> and <!-- /{name} --> must be there once each, on their own lines'
            )
        if section is not None:
            parts[2] = f'{section}\n'
        text = ''.join(parts)
    write_file(path, text)


def checkpoint_table(root: Path) -> str:
    """The checkpoint directories whose configs say what was measured, and that."""
    rows = []
    for file in sorted(root.glob('[!.]*/config.json')):
        config = read_json(file)
        if 'results' not in config:
            continue
        results = Results.from_dict(config['results'], str(file))
        with torch.device('meta'):
            image = torch.empty(1, *config['pretrained_cfg']['input_size'])
            cost = count_costs(build_net(config, file).eval(), image)
        name = f'[{file.parent.name}](hub_cards/{file.parent.name})'
        accuracies = f'{results.own:.2f}', spread(results.top1)
        counts = f'{cost.params / 1e6:.3f}', f'{cost.macs / 1e6:.1f}'
        rows.append([name, results.dataset, str(results.epochs), *accuracies, *counts])
    columns = ['checkpoint', 'data', 'epochs', 'top-1 (%)', 'mean ± std (n)', 'params (M)', 'MACs (M)']
    return markdown_table(columns, rows)


def write_report(manifest: Manifest) -> None:
    """Bring the tables and figures of the REPORT.md beside the manifest up to date."""
    require('matplotlib', 'scipy')
    report = Report(manifest)
    sections = {name: report.experiment(experiment) for name, experiment in manifest.experiments.items()}
    fill(manifest.folder / 'REPORT.md', {**sections, 'variance': report.variance(), 'runs': report.runs()})


def write_readme(manifest: Manifest, readme: Path, cards: Path) -> None:
    """Bring the README's tables up to date: of the checkpoints in `cards`, and of what was compared."""
    fill(readme, {'checkpoints': checkpoint_table(cards), 'reproduction': Report(manifest).summary()})


def results_of(manifest: Manifest, run: Run, results: dict[int, dict[str, Any]]) -> Results:
    """What the checkpoint of a run, of its first seed, says of it and of the runs that it is compared with."""
    first = results[run.seeds[0]]
    group = {run, manifest.baseline(run)} - {None}
    others = [o for o in manifest.runs.values() if o is not run and group & {o, manifest.baseline(o)}]
    without = [each.model for each in (run, *others) if not each.about]
    comparison = {}
    for other in others:
        about = other.about or (other.name if without.count(other.model) > 1 else '')
        name = f'{other.model} ({about})' if about else other.model
        comparison[name] = last_top1(read_results(manifest, other))
    command = shlex.join(['weighted-skip', 'train', *run.arguments(), '--seed', str(run.seeds[0])])
    of_all = {'seeds': list(results), 'last': {'top1': last_top1(results)}}
    return replace(
        Results.of_run({**first, 'command': command}, run.name, of_all),
        license='apache-2.0',
        description=run.about and f'{run.about[0].upper()}{run.about[1:]}.',
        comparison={name: [round(value, 2) for value in top1] for name, top1 in comparison.items() if top1},
    )


def _which(results: Results) -> str:
    """The training of a checkpoint's own weights: what was trained again elsewhere has another accuracy."""
    return f'`{results.recipe}` with {results.own:.2f} %'


def write_checkpoints(manifest: Manifest, runs: Path, root: Path) -> None:
    """Make `<model>.<data>` in `root` of the first seed of every finished run that the manifest marks.

    One that is there keeps its weights, and says what has been measured since.
    """
    for experiment in manifest.experiments.values():
        for run in experiment.runs.values():
            folder, results = root / f'{run.model}.{run.data}', read_results(manifest, run)
            if not run.checkpoint or run.seeds[0] not in results:
                continue
            if folder.exists():
                there = known_results(str(folder))
                measured = results_of(manifest, run, results)
                known = 'no known run' if there is None else _which(there)
                if known != _which(measured):
                    raise ValueError(f'{folder} is of {known}, not of {_which(measured)}; remove it first')
                update_results(folder, measured)
                continue
            model, model_args = load_net_and_args(str(runs / Job(run, run.seeds[0]).name))
            save_checkpoint(model, folder, results_of(manifest, run, results), model_args)
            print(f'wrote {folder}')
