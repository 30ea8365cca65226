#!/usr/bin/env python3
"""Work off a manifest of training runs, and make the report and the checkpoints of what is finished.

    scripts/reproduce.py --data-dir DIR [--only 'awm-short/*'] [--budget MINUTES]   # train
    scripts/reproduce.py --report                                                 # tables, figures, README
    scripts/reproduce.py --checkpoints                                            # hub_cards

Runs are taken in the manifest's order, and of each experiment first every run's first seed. A finished run has a file
under `results/`, beside the manifest, and is not trained again; one that was stopped, by Ctrl-C, SIGTERM, a kill or the
end of the budget, goes on where it was. Each is a process of its own that runs `weighted-skip train`; its folder, with
checkpoints and output, is below `--runs`. `--report` and `--checkpoints` are of all finished runs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from reproduce_manifest import Job, Manifest, read_manifest
from tqdm import tqdm

from timm_weighted_skip.analysis.curves import read_run
from timm_weighted_skip.analysis.listing import model_cost
from timm_weighted_skip.files import write_file
from timm_weighted_skip.nets import LOG
from timm_weighted_skip.train.runs import alone_in, holds_run
from timm_weighted_skip.train.task import read_task

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / 'scripts' / 'reproduce' / 'manifest.yaml'


def write_result(manifest: Manifest, job: Job, folder: Path) -> str:
    """Keep of a finished run its result and its curve, a JSON file with a line per field; returns what to say of it."""
    run = read_run(folder)
    fields = {'experiment': job.run.experiment, 'run': job.run.name, 'seed': job.seed, **run.result, 'curve': run.log}
    lines = ',\n'.join(f'{json.dumps(name)}: {json.dumps(value)}' for name, value in fields.items())
    write_file(manifest.result_file(job), f'{{\n{lines}\n}}\n')
    return f'{job.name}: {run.result["last"]["top1"]:.2f} % after {run.result["wall_time"] / 60:.1f} minutes'


def finished_epochs(folder: Path) -> int:
    """Epochs that a run has behind it."""
    log = folder / LOG
    return log.read_bytes().count(b'\n') if log.exists() else 0


@dataclass
class Process:
    """A job that is being trained."""

    job: Job
    folder: Path
    handle: subprocess.Popen
    epochs: int

    def new_epochs(self) -> int:
        """Epochs that were finished since the last call."""
        before, self.epochs = self.epochs, finished_epochs(self.folder)
        return self.epochs - before

    def last_line(self) -> str:
        output = self.folder.with_suffix('.out').read_text(encoding='utf-8', errors='replace')
        lines = output.replace('\r', '\n').splitlines()
        return lines[-1] if lines else 'no output'


def busy(folder: Path) -> bool:
    """Whether a process trains there: that of another runner, or of one that was killed."""
    if not folder.exists():
        return False
    try:
        with alone_in(folder):
            return False
    except ValueError:
        return True


def start(job: Job, runs: Path, args: argparse.Namespace, threads: int) -> Process:
    """Begin a job, or go on with it.

    Raises:
        ValueError: Its folder is of another training.
    """
    folder = runs / job.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'timm_weighted_skip.cli', 'train']
    if holds_run(folder):
        job.check(asdict(read_task(folder)[0]), folder)
        command += ['--resume', str(folder)]
    else:
        command += [*job.run.arguments(), '--seed', str(job.seed)]
        command += ['--output', str(folder.parent), '--experiment', folder.name]
    command += ['--device', args.device, *(['--data-dir', str(args.data_dir)] if args.data_dir else [])]
    with folder.with_suffix('.out').open('ab') as output:
        # A session of its own: a Ctrl-C in the terminal reaches this process alone, which passes it on once.
        handle = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': str(threads)},
            start_new_session=True,
        )
    return Process(job, folder, handle, finished_epochs(folder))


def train(manifest: Manifest, args: argparse.Namespace) -> int:
    """Work off what is not finished; returns the exit status."""
    jobs = [job for job in manifest.jobs(args.only) if manifest.result(job) is None]
    if not jobs:
        print(f'nothing to do: every run that matches {args.only!r} is finished')
        return 0
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    deadline = time.monotonic() + 60 * args.budget
    waiting, active, failed, done = list(jobs), list[Process](), list[str](), 0
    # An epoch counts as much as its net computes, so that the time left is that of the work left.
    macs = {model: model_cost(model).macs for model in {job.run.model for job in jobs}}
    cost, epochs = {job: macs[job.run.model] for job in jobs}, {job: job.run.epochs() for job in jobs}
    layout = '{desc}{percentage:3.0f} %|{bar}| {elapsed}<{remaining}'
    total = sum(cost[job] * epochs[job] for job in jobs)
    before = sum(cost[job] * finished_epochs(args.runs / job.name) for job in jobs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop like Ctrl-C
    with tqdm(total=total, initial=before, bar_format=layout, disable=None) as bar:

        def announce() -> None:
            names = ', '.join(f'{p.job.name} {p.epochs}/{epochs[p.job]}' for p in active)
            bar.set_description_str(f'{done}/{len(jobs)} runs; {names}: ')

        try:
            while (waiting or active) and time.monotonic() < deadline:
                while waiting and len(active) < args.jobs:
                    job = waiting.pop(0)
                    if manifest.result(job):  # another runner's
                        continue
                    if busy(args.runs / job.name):
                        bar.write(f'{job.name} is being trained by another process')
                        continue
                    try:
                        active.append(start(job, args.runs, args, threads))
                    except ValueError as error:
                        failed.append(job.name)
                        bar.write(f'{job.name} failed: {error}', file=sys.stderr)
                time.sleep(0.2)
                for process in list(active):
                    ended = process.handle.poll() is not None
                    bar.update(cost[process.job] * process.new_epochs())
                    if not ended:
                        continue
                    active.remove(process)
                    if process.handle.returncode and busy(process.folder):  # another runner's was there first
                        bar.write(f'{process.job.name} is being trained by another process')
                    elif process.handle.returncode:
                        failed.append(process.job.name)
                        bar.write(f'{process.job.name} failed: {process.last_line()}', file=sys.stderr)
                    else:
                        bar.write(write_result(manifest, process.job, process.folder))
                        done += 1
                announce()
        except KeyboardInterrupt:
            pass
        finally:
            for process in active:
                process.handle.terminate()  # it saves what it has and ends
            for process in active:
                process.handle.wait()
    left = sum(manifest.result(job) is None for job in jobs) - len(failed)
    print(f'{done} runs finished, {len(failed)} failed, {left} left' + ('; the same command goes on' if left else ''))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--manifest', type=Path, default=MANIFEST, metavar='FILE')
    parser.add_argument('--only', default='*', metavar='GLOB', help='of EXPERIMENT/RUN/seedN')
    parser.add_argument(
        '--budget', type=float, default=float('inf'), metavar='MINUTES', help='stop and save after this time'
    )
    parser.add_argument('--device', default='cpu', help='default: %(default)s')
    parser.add_argument('--data-dir', type=Path, metavar='DIR', help='where the image sets are')
    parser.add_argument('--jobs', type=int, metavar='N',
                        help='runs at once; default: one per processor on a CPU, four on anything else')  # fmt: skip
    parser.add_argument('--runs', type=Path, metavar='DIR', help='default: runs, beside the manifest')
    parser.add_argument('--list', action='store_true', help='show the runs and which are finished')
    parser.add_argument('--report', action='store_true', help='write the tables and figures of the finished runs')
    parser.add_argument('--checkpoints', action='store_true', help='make the checkpoint directories of finished runs')
    args = parser.parse_args()
    if args.jobs is None:
        # The kernels of a small net alone keep a large GPU busy for half of the time that a step takes.
        args.jobs = (os.cpu_count() or 1) if args.device == 'cpu' else 4
    if args.jobs < 1:
        parser.error(f'--jobs {args.jobs} is not allowed; give 1 or more')
    if not args.budget > 0:
        parser.error(f'--budget {args.budget} is not allowed; give more than 0')
    if args.only != '*' and (args.report or args.checkpoints):
        parser.error('--only does not go with --report and --checkpoints, which are of all finished runs')
    args.runs = args.runs or args.manifest.parent / 'runs'
    # README and hub_cards of the repository are of its own manifest.
    home = ROOT if args.manifest.resolve() == MANIFEST else args.manifest.parent
    try:
        manifest = read_manifest(args.manifest)
        if not any(manifest.jobs(args.only)):
            raise ValueError(
                f'no run matches --only {args.only!r}; --list shows them, such as {next(manifest.jobs()).name}'
            )
        if args.list:
            for job in manifest.jobs(args.only):
                print('-   ' if manifest.result(job) is None else 'done', job.name)
            return 0
        if args.report or args.checkpoints:
            import reproduce_report

            if args.checkpoints:
                reproduce_report.write_checkpoints(manifest, args.runs, home / 'hub_cards')
            if args.report:
                reproduce_report.write_report(manifest)
                if home == ROOT:
                    reproduce_report.write_readme(manifest, home / 'README.md', home / 'hub_cards')
            return 0
        return train(manifest, args)
    except (ValueError, OSError, ImportError) as error:
        print(f'reproduce: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
