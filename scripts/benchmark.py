#!/usr/bin/env python3
"""Time our nets beside timm's plain, SE, ECA, SK and dense ones, and count what they keep in memory.

    scripts/benchmark.py [--models awm_resnet50 seresnet50] [--mode eval|train|import] [--compile] [--json FILE]
    scripts/benchmark.py --readme scripts/results/*.json  # the README's table, from the files of runs

Every net is compared with the plain net of its backbone, which runs beside it in the same process: in each round every
net of a backbone takes one step, in an order that rotates. `ratio` is the median over the rounds of a net's time over
the plain net's of the same round, with the quartiles in brackets; what those straddle is not resolved. One thread on a
CPU is timed by the CPU time it takes, which other work on the machine changes less than the time that passes.

`bound` is the ratio which memory traffic alone allows a merge outside the convolutions' kernels: the plain net's time
plus the bytes that the merges must move beyond a plain sum's (`PASSES`), at the speed of a large copy, measured in
the same run. A net can be below it: maps that stay in a cache move faster, and an eager plain net takes two more
passes than counted here, as it adds and rectifies one after the other.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler's start and stop messages

import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg_value
from torch import nn
from torch.profiler import profile

from timm_weighted_skip import set_fused_merge
from timm_weighted_skip.analysis.listing import model_cost
from timm_weighted_skip.analysis.tables import Table
from timm_weighted_skip.checks import check_device
from timm_weighted_skip.commit import package_commit
from timm_weighted_skip.files import write_file
from timm_weighted_skip.layers import ActiveWeightedConcat, ActiveWeightedMapping, SkipWeight
from timm_weighted_skip.models.blocks import WeightedBottleneck

# Plain net -> what is compared with it.
BACKBONES = {
    'resnet18': ['awm_resnet18', 'adaresnet18'],
    'resnet50': ['awm_resnet50', 'adaresnet50', 'seresnet50', 'skresnet50'],
    'resnet50d': ['ecaresnet50d'],
    'densenet121': ['awm_densenet121'],
    'resnet20_cifar': ['awm_resnet20_cifar', 'adaresnet20_cifar'],
    'densenet40_bc_cifar': ['awm_densenet_bc'],
}

# Passes over a feature map, read or written, that a merge and its ReLU need: (forward, backward).
# Plain: read F and s, write y; read g and y, write the gradient that both paths share.
# Ada: as plain; backward reads s for dL/dw and writes a gradient of its own for s.
# AWM: both maps are read once more for their means (in eval a bottleneck's branch where it has a quarter of the
# channels, before its last convolution); backward first reads g, y and s for dL/dlam, then g and y again to
# write two gradients, since the gate's own gradient enters them. Compiled for training, the mean of the branch
# and dL/dlam1 come from the norm's passes; left are reading s for its mean and for dL/dlam2, and the second gradient.
# Concat: none. The weights enter the affine of the norm that goes over the maps in any case. The means are taken once
# per map and not per reader, which is not counted.
PASSES = {SkipWeight: (3, 5), ActiveWeightedMapping: (5, 7), ActiveWeightedConcat: (0, 0)}
PLAIN_PASSES = {SkipWeight: (3, 3), ActiveWeightedMapping: (3, 3), ActiveWeightedConcat: (0, 0)}


@dataclass
class Row:
    """What was measured of one net; times in ms, memory in MiB, parameters and MACs per image in millions."""

    model: str
    params: float
    macs: float
    ms: float
    ratio: list[float]  # first quartile, median, third quartile
    bound: float
    saved: float
    peak: float


def plain_of(name: str) -> str:
    """The plain net that `name` is compared with."""
    for plain, others in BACKBONES.items():
        if name in (plain, *others):
            return plain
    named = re.search(r'(resnet|densenet)\d[^.]*', name)
    return named[0] if named and timm.is_model(named[0]) else name


def groups_of(names: Sequence[str], parser: argparse.ArgumentParser) -> list[list[str]]:
    """The nets by the plain net that they are compared with, which comes first; the parser refuses unknown ones."""
    unknown = [name for name in names if not timm.is_model(name)]
    if unknown:
        parser.error(f'--models: unknown {", ".join(unknown)}; `weighted-skip list` and timm.list_models() name them')
    groups: dict[str, list[str]] = {}
    for name in names:
        group = groups.setdefault(plain_of(name), [plain_of(name)])
        if name not in group:
            group.append(name)
    return list(groups.values())


class Net:
    """A net with what it takes to let it make steps on images of `size`, (C, H, W)."""

    def __init__(self, name: str, size: tuple[int, int, int], args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.name, self.train = name, args.mode == 'train'
        self.fused_norm = args.compile and not args.no_fused_merge
        self.size = size
        batch = args.batch_size or (128 if size[1] <= 32 else 8)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = timm.create_model(name, in_chans=size[0]).train(self.train).to(args.device)
        self.model.to(memory_format=layout)
        self.x = torch.randn(batch, *size, device=args.device).contiguous(memory_format=layout)
        self.y = torch.arange(batch, device=args.device) % 10
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.forward: Callable = torch.compile(self.model) if args.compile else self.model
        self.amp = torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp)

    def step(self) -> None:
        if not self.train:
            with torch.inference_mode(), self.amp:
                self.forward(self.x)
            return
        self.optimizer.zero_grad()
        with self.amp:
            loss = F.cross_entropy(self.forward(self.x), self.y)
        loss.backward()
        self.optimizer.step()


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    clock = time.process_time if device.type == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = clock()
    step()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return 1e3 * (clock() - start)


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile; of however few values, none lies beyond them."""
    return statistics.quantiles(values, n=4, method='inclusive')


def with_quartiles(values: Sequence[float], digits: int = 3) -> str:
    """The median with the other two of `quartiles` in brackets."""
    low, middle, high = (f'{value:.{digits}f}' for value in values)
    return f'{middle} [{low}, {high}]'


def saved_bytes(net: Net) -> int:
    """Bytes that a training step's forward keeps for its backward, parameters aside, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(net.model.parameters(), net.model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), net.amp:
        loss = F.cross_entropy(net.forward(net.x), net.y)
    total = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    del loss
    return total


def peak_bytes(net: Net, device: torch.device) -> int:
    """The most memory that one step holds beyond what was there before it."""
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        net.step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        net.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def extra_bytes(net: Net) -> float:
    """Bytes that the merges of `net` must move in a step beyond what plain sums and concatenations do."""
    total = 0.0
    expanded = {block.merge for block in net.model.modules() if isinstance(block, WeightedBottleneck)}

    def count(merge: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if not merge.state_dict():  # plain
            return
        passes, plain = PASSES[type(merge)], PLAIN_PASSES[type(merge)]
        extra: float = passes[0] - plain[0] + (passes[1] - plain[1] if net.train else 0)
        if type(merge) is ActiveWeightedMapping and net.train and net.fused_norm:
            extra -= 3
        elif type(merge) is ActiveWeightedMapping and merge in expanded and not net.train:
            extra -= 0.75
        total += extra * output.numel() * output.element_size()

    handles = [m.register_forward_hook(count) for m in net.model.modules() if type(m) in PASSES]
    with torch.no_grad(), net.amp:
        net.model(net.x)
    for handle in handles:
        handle.remove()
    return total


def copy_speed(device: torch.device) -> float:
    """Bytes per ms, read and written, of a copy between buffers of 256 MiB that exist already."""
    a, b = (torch.ones(2**26, device=device) for _ in range(2))
    return 2 * a.nbytes / statistics.median(timed(lambda: b.copy_(a), device) for _ in range(7))


def compare(names: list[str], args: argparse.Namespace, speed: float) -> list[Row]:
    """Run nets of one backbone in turn; the first is the plain one."""
    default: Any = get_pretrained_cfg_value(names[0], 'input_size')
    size = (default[0], args.img_size, args.img_size) if args.img_size else default
    nets = [Net(name, size, args) for name in names]
    extra = [extra_bytes(net) for net in nets]
    saved = [saved_bytes(net) if net.train and not args.compile else 0 for net in nets]
    for net in nets:
        for _ in range(args.warmup):
            net.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(args.rounds):
        turn = i % len(nets)
        for net in nets[turn:] + nets[:turn]:
            times[net.name].append(timed(net.step, args.device))
    plain_ms, rows = statistics.median(times[names[0]]), []
    for net, more, kept in zip(nets, extra, saved):
        ratio = quartiles([own / plain for own, plain in zip(times[net.name], times[names[0]])])
        cost = model_cost(net.name, net.size)
        ms, bound = statistics.median(times[net.name]), 1 + more / speed / plain_ms
        peak = peak_bytes(net, args.device)
        memory = kept / 2**20, peak / 2**20
        rows.append(Row(net.name, cost.params / 1e6, cost.macs / 1e6, ms, ratio, bound, *memory))
    return rows


def table(rows: list[Row]) -> str:
    """Rows of one backbone in Markdown; the first is the plain net's."""
    columns = ['model', 'params (M)', 'MACs (M)', 'ms', 'ratio', 'bound', 'saved (MiB)', 'ratio', 'peak (MiB)']
    lines = []
    for row in rows:
        saved = (f'{row.saved:.1f}', f'{row.saved / rows[0].saved:.3f}') if row.saved else (None, None)
        counts = row.model, f'{row.params:.3f}', f'{row.macs:.1f}'
        times = f'{row.ms:.1f}', with_quartiles(row.ratio), f'{row.bound:.3f}'
        lines.append([*counts, *times, *saved, f'{row.peak:.1f}'])
    return Table(columns, lines).markdown(right=True)


def readme_table(files: list[Path]) -> str:
    """What runs with `--json` measured, in short: a table per device and precision, by kind of run, without plain nets.

    Raises:
        OSError, ValueError: A file can't be read, is none of `--json`, or measures again what another has measured.
    """
    of_device: dict[tuple[str, str], list[tuple[dict, dict[str, dict]]]] = {}
    for file in files:
        try:
            run = json.loads(file.read_text(encoding='utf-8'))
            setting, rows = run['setting'], {row['model']: row for row in run['rows']}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f'{file} is not a file that --json wrote') from error
        of_device.setdefault((setting['device'], setting['amp']), []).append((setting, rows))
    return '\n\n'.join(map(device_table, of_device.values()))


def device_table(runs: list[tuple[dict, dict[str, dict]]]) -> str:
    """The table of one device and precision from the settings of its runs and their rows by model."""
    columns: dict[str, dict[str, str]] = {}
    settings: set[str] = set()
    for setting, rows in runs:
        flags = [name.replace('_', ' ') for name in ('compile', 'amp', 'channels_last') if setting[name] == 'True']
        times, saved = ', '.join([setting['mode'], *flags]), ', '.join(['saved', *flags])
        for name, row in rows.items():
            if name != (plain := plain_of(name)):
                if name in columns.setdefault(times, {}):
                    raise ValueError(f'{name}, {times}, is measured twice; give files of which no two agree in that')
                columns[times][name] = with_quartiles(row['ratio'])
                if row['saved']:
                    columns.setdefault(saved, {})[name] = f'{row["saved"] / rows[plain]["saved"]:.3f}'
        plural = '' if setting['threads'] == '1' else 's'
        threads = f', {setting["threads"]} thread{plural}' if setting['device'] == 'cpu' else ''
        batch = f', batches of {setting["batch_size"]}' if setting['batch_size'] else ''
        versions = f'torch {setting["torch"]}, timm {setting["timm"]}'
        settings.add(f'{setting["device"]}{threads}{batch}, {setting["rounds"]} rounds, {versions}')
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [[name, *(column.get(name) for column in columns.values())] for name in names]
    shown = Table(['model', *columns], lines).markdown(right=True)
    return f'{shown}\n\nMeasured on: {"; ".join(sorted(settings))}.'


def import_ms(rounds: int) -> tuple[float, float]:
    """Milliseconds that importing timm takes, and this package after it; medians over fresh interpreters."""
    code = (
        'import time; a = time.perf_counter(); import timm; b = time.perf_counter(); import timm_weighted_skip; '
        'print(b - a, time.perf_counter() - b)'
    )
    runs = [subprocess.run([sys.executable, '-c', code], capture_output=True, check=True) for _ in range(rounds)]
    ours = [[1e3 * float(s) for s in run.stdout.split()] for run in runs]
    return statistics.median(run[0] for run in ours), statistics.median(run[1] for run in ours)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not allowed; give 1 or more')
    return value


def several(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f'{value} has no quartiles; give 2 or more')
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', metavar='NAME', help='default: every net of BACKBONES in this file')
    parser.add_argument('--mode', choices=('eval', 'train', 'import'), default='eval')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--compile', action='store_true', help='torch.compile every net')
    parser.add_argument('--no-fused-merge', action='store_true', help='merge by the plain formula')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--batch-size', type=positive, help='default: 128 for images of 32 pixels, 8 for larger ones')
    parser.add_argument('--img-size', type=positive, help="default: each plain net's own")
    parser.add_argument('--rounds', type=several, default=21, help='2 or more')
    parser.add_argument('--warmup', type=positive, default=3)
    parser.add_argument('--threads', type=positive, default=1)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures here, too')
    parser.add_argument('--readme', nargs='+', type=Path, metavar='FILE', help="only print these files' table")
    args = parser.parse_args()
    if args.readme:
        try:
            print(readme_table(args.readme))
        except (OSError, ValueError) as error:
            parser.error(f'--readme: {error}')
        return 0
    groups = groups_of(args.models or [*BACKBONES, *itertools.chain(*BACKBONES.values())], parser)
    try:
        args.device = check_device(args.device)
    except ValueError as error:
        parser.error(f'--device: {error}')
    if args.mode == 'import':
        if args.json:
            parser.error('--json is of --mode eval and train')
        before, ours = import_ms(min(args.rounds, 7))
        print(f'import timm: {before:.0f} ms, timm_weighted_skip after it: {ours:.0f} ms')
        return 0
    torch.set_num_threads(args.threads)
    set_fused_merge(not args.no_fused_merge)
    speed = copy_speed(args.device)
    setting: dict[str, object] = {key: str(value) if value is not None else None for key, value in vars(args).items()}
    setting |= {
        'device': torch.cuda.get_device_name(args.device) if args.device.type == 'cuda' else str(args.device),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'commit': package_commit(),
        'copy_gb_per_s': round(speed / 1e6, 1),
    }
    print(' '.join(f'{key}={value}' for key, value in setting.items() if value not in (None, 'False')))
    results: list[Row] = []
    for names in groups:
        rows = compare(names, args, speed)
        print(f'\n{table(rows)}', flush=True)
        results += rows
    if args.json:
        figures = {'setting': setting, 'rows': [asdict(row) for row in results]}
        write_file(args.json, json.dumps(figures, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
