"""A training run in its folder: args.yaml, log.jsonl, checkpoints, result.json.

`last.safetensors` and `model_best.safetensors` are the weights to use, of the last epoch and of the epoch with the best
test accuracy (which a paper should not report); their metadata names the net. With a moving average they are its.
"""

import json
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import timm
import torch
import yaml
from filelock import FileLock, Timeout
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

import timm_weighted_skip
from timm_weighted_skip.commit import package_commit
from timm_weighted_skip.data import load_image_set
from timm_weighted_skip.files import check_folder, read_json, write_file
from timm_weighted_skip.nets import ARGS, FOREIGN, LAST, LOG, RESULT, Trained, architecture
from timm_weighted_skip.train.checkpoint import has_checkpoint, link, read_checkpoint, save_checkpoint, weights_file
from timm_weighted_skip.train.recipe import Recipe
from timm_weighted_skip.train.task import Task, command_of
from timm_weighted_skip.train.trainer import EpochStopped, Trainer, make_net, stop_signals

__all__ = ['alone_in', 'describe', 'holds_run', 'run', 'run_seeds', 'summary']

Analysis = Callable[[nn.Module, Iterable[torch.Tensor]], Any]


def describe(result: dict, folder: Path) -> str:
    """What `run_seeds` found, in a line or two."""
    if 'seeds' in result:
        lines = [
            f'{name} epoch: {result[name]["mean"]:.2f} +- {result[name]["std"]:.2f} % ({len(result["seeds"])} seeds)'
            for name in ('last', 'best')
        ]
    else:
        best = f'{result["best"]["top1"]:.2f} % (epoch {result["best"]["epoch"] + 1})'
        lines = [f'last epoch: {result["last"]["top1"]:.2f} %', f'best epoch: {best}']
    return f'{result["model"]}, test accuracy of the ' + ', of the '.join(lines) + f'; written to {folder}'


def holds_run(folder: Path) -> bool:
    """Whether a folder has something to lose or to go on with.

    A run that was refused, or stopped in its first steps, leaves none of it.
    """
    return any(any(folder.rglob(pattern)) for pattern in ('checkpoint-*', RESULT, LAST))


def run_seeds(
    task: Task, folder: Path, seeds: list[int], resume: bool = False, analysis: Optional[Analysis] = None
) -> dict:
    """`run` for one seed in `folder`, for several in a folder each below it; returns `run`'s result or a summary."""
    if not resume and holds_run(folder):
        again = shlex.join(['--resume', str(folder)])
        instead = f'go on with it by {again}, or ' if (folder / ARGS).is_file() else ''
        raise ValueError(f'{folder} holds a run; {instead}give another --experiment')
    # Whatever is wrong with a seed or an argument shows before the first training.
    tasks = [replace(task, recipe=replace(task.recipe, seed=seed)) for seed in seeds]
    try:
        args = yaml.safe_dump({**asdict(task), 'seeds': seeds}, sort_keys=False)
    except yaml.YAMLError as error:
        raise ValueError(f'an argument is of a kind that {ARGS} can not hold: {error}') from None
    results = []
    try:
        with _folder_for_run(folder):
            for each in tasks:
                of_seed = folder if len(seeds) == 1 else folder / f'seed{each.recipe.seed}'
                of_seed.mkdir(exist_ok=True)
                results.append(run(each, of_seed, analysis, partial(write_file, folder / ARGS, args)))
    except KeyboardInterrupt:
        if not (folder / ARGS).exists():
            raise KeyboardInterrupt('stopped before the training began') from None
        again = shlex.join(['weighted-skip', 'train', '--resume', str(folder)])
        raise KeyboardInterrupt(f'stopped; go on with: {again}') from None
    if len(seeds) == 1:
        return results[0]
    result = summary(results)
    write_file(folder / RESULT, json.dumps(result, indent=1))
    return result


@contextmanager
def _folder_for_run(folder: Path) -> Iterator[None]:
    """Have `folder` to oneself; one that is made here goes again if no training begins."""
    check_folder(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        try:
            yield
        finally:
            if is_new and not (folder / ARGS).exists():
                shutil.rmtree(folder, ignore_errors=True)  # some systems can't remove the lock's open file


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse to train in a folder where another process does; the lock of a process that was killed is no hindrance.

    Raises:
        ValueError: Another process trains there.
    """
    try:
        with FileLock(folder / '.lock', timeout=1):  # seconds: who only asks whether it is free holds it for a moment
            yield
    except Timeout:
        raise ValueError(f'another process is training in {folder}; wait for it, or stop it') from None


def summary(results: list[dict]) -> dict:
    """Mean and standard deviation (n - 1) of the last epochs' and of the best epochs' accuracies of several runs."""
    accuracies = {'last': [r['last']['top1'] for r in results], 'best': [r['best']['top1'] for r in results]}
    return {
        'model': results[0]['model'],
        'data': results[0]['data'],
        'recipe_name': results[0]['recipe_name'],
        'seeds': [r['recipe']['seed'] for r in results],
        **{
            name: {'top1': values, 'mean': statistics.fmean(values), 'std': statistics.stdev(values)}
            for name, values in accuracies.items()
        },
    }


def run(
    task: Task, folder: Path, analysis: Optional[Analysis] = None, begin: Callable[[], None] = lambda: None
) -> dict:
    """Train, from the folder's newest checkpoint if it has one, and write everything down there.

    Args:
        task: What to do.
        folder: Exists.
        analysis: Called with the trained net and an iterable of all test images in normalised batches; what it
            returns becomes the result's 'mapping_units', unless it raises a `ValueError`, as for plain nets.
        begin: Called when nothing stands against the training any more.

    Returns:
        What result.json holds; that of an earlier call if the run is finished.

    Raises:
        ValueError: Something is wrong with the data, the recipe or the folder's files, or the loss became infinite.
        KeyboardInterrupt: The run was stopped; its state is saved.
    """
    if (folder / RESULT).exists():
        finished = read_json(folder / RESULT)
        if not {'model', 'last', 'best'} <= finished.keys():
            raise ValueError(f'{folder / RESULT} is not what a run measured; remove it, and the run goes on to its end')
        return finished
    recipe = task.recipe
    train = load_image_set(task.data, True, task.data_dir, task.download)
    test = load_image_set(task.data, False, task.data_dir, task.download)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        which = f'only one set has {", ".join(odd[:3])}' if odd else 'they are in another order'
        raise ValueError(
            f'{len(train.classes)} classes to train and {len(test.classes)} to test, and {which}; give both sets the '
            'same (an npz without `classes` is taken to have those of its labels alone, a folder those with images)'
        )
    random_seed(recipe.seed)
    pretrained, model_kwargs = task.pretrained, dict(recipe.model_kwargs)
    if has_checkpoint(folder):  # it replaces all weights: those that the run began with need not be there any more
        pretrained = False
        model_kwargs.pop('checkpoint_path', None)
    net = make_net(task.model, train, pretrained, **model_kwargs)
    trainer = Trainer(net, recipe, train, test, task.device)
    if 0 < trainer.epochs <= recipe.alternate_freeze:
        begins = f'--alternate-freeze {recipe.alternate_freeze} begins with as many epochs of the backbone'
        print(f'no epoch of {trainer.epochs} trains the gates: {begins}', file=sys.stderr)
    book = _resume(task, folder, trainer, {'training': train.digest(), 'test': test.digest()})
    begin()
    _note_machine(trainer, book['machines'])
    with tqdm(
        total=trainer.epochs * trainer.updates_per_epoch * recipe.grad_accum_steps * recipe.batch_size,
        initial=trainer.position.updates * recipe.grad_accum_steps * recipe.batch_size,
        unit=' images',
        unit_scale=True,
        disable=None,
        smoothing=0.05,
    ) as bar:
        try:
            while trainer.position.epoch < trainer.epochs:
                if _epoch(task, folder, trainer, book, bar):
                    raise KeyboardInterrupt
        except EpochStopped:
            _save(task, folder, trainer, book)
            raise KeyboardInterrupt from None
    return _finish(task, folder, trainer, book, analysis)


def _note_machine(trainer: Trainer, machines: list[dict[str, Any]]) -> None:
    """Add what trains from here on, and from which epoch, unless it is what trained so far."""
    on_gpu = trainer.device.type == 'cuda'
    machine = {
        'device': torch.cuda.get_device_name(trainer.device) if on_gpu else platform.processor() or 'cpu',
        'threads': torch.get_num_threads(),
        'compiled': bool(trainer.compiled),
        'amp': bool(trainer.amp),
        'versions': {
            'timm_weighted_skip': timm_weighted_skip.__version__,
            'timm': timm.__version__,
            'torch': str(torch.__version__),  # a class of torch's own, which no checkpoint may hold
            'python': platform.python_version(),
        },
        'commit': package_commit(),
    }
    if not machines or machines[-1] != {**machine, 'from_epoch': machines[-1]['from_epoch']}:
        machines.append({**machine, 'from_epoch': trainer.position.epoch})


def _epoch(task: Task, folder: Path, trainer: Trainer, book: dict[str, Any], bar: tqdm) -> bool:
    """Train and measure one epoch, write its line and its checkpoint; returns whether to stop after it.

    Raises:
        EpochStopped: It was stopped between two updates; nothing is written.
    """
    number = trainer.position.epoch
    bar.set_description(f'epoch {number + 1}/{trainer.epochs} {trainer.freezing.phase(number)}')

    def progress(images: int, loss: Optional[float]) -> None:
        if loss is not None:
            bar.set_postfix(loss=f'{loss:.3f}', refresh=False)
        bar.update(images)

    with stop_signals() as stopped:  # an epoch is whole with its test accuracy, its line and its checkpoint
        started = time.perf_counter()
        try:
            trained = trainer.train_epoch(progress, stopped)
            measured = trainer.evaluate()
        finally:
            book['wall_time'] += time.perf_counter() - started
        images, seconds = trained.pop('images'), trained.pop('seconds')
        speed = round(images / seconds, 1) if images else None
        line = {'epoch': number, **trained, 'images_per_second': speed, **{f'test_{k}': v for k, v in measured.items()}}
        book['log'].append(line)
        if 'best' not in book or measured['top1'] > book['best']['top1']:
            book['best'] = {'epoch': number, **measured}
        book['last'] = {'epoch': number, **measured}
        # The line comes before the checkpoint: a run that is killed between them drops it and trains the epoch again.
        write_file(folder / LOG, ''.join(json.dumps(each) + '\n' for each in book['log']))
        _save(task, folder, trainer, book)
    bar.write(
        f'epoch {number + 1}/{trainer.epochs} {trained["phase"]}: lr {trained["lr"]:.4g}, '
        f'loss {trained["loss"]:.4f}, top1 {trained["top1"]:.2f} %, '
        f'test loss {measured["loss"]:.4f}, top1 {measured["top1"]:.2f} %, {speed} images/s'
    )
    return stopped()


def _trained(task: Task, trainer: Trainer) -> Trained:
    """What the weights are of."""
    batches = trainer.test_batches
    size = [len(trainer.mean), batches.height, batches.width]
    model, arguments = architecture(task.model)
    # Where the net started, as `pretrained_cfg_overlay` and a tag or a folder's name tell, is not what it is.
    kwargs = {name: value for name, value in {**arguments, **task.recipe.model_kwargs}.items() if name not in FOREIGN}
    config: Any = trainer.net.pretrained_cfg
    mean, std = list(trainer.mean), list(trainer.std)
    overlay = task.recipe.model_kwargs.get('pretrained_cfg_overlay') or {}
    # The license of the net's own weights is not that of others in their place.
    others = not {'file', 'url', 'hf_hub_id', 'state_dict'}.isdisjoint(overlay)
    began = (overlay if others else config).get('license') if task.pretrained else None
    return Trained(model, kwargs, list(batches.classes), size, mean, std, license=began)


def _save(task: Task, folder: Path, trainer: Trainer, book: dict[str, Any]) -> None:
    weights = {'': trainer.net.state_dict()}
    if trainer.ema:
        weights['ema'] = trainer.ema.module.state_dict()
    kept = {name: book[name] for name in ('wall_time', 'machines', 'images', 'best', 'last') if name in book}
    state = {**trainer.state_dict(), 'book': kept, 'model': task.model, 'recipe': asdict(task.recipe)}
    about = {'epochs': str(trainer.position.epoch), 'timm_weighted_skip': timm_weighted_skip.__version__}
    save_checkpoint(folder, weights, state, {**book['trained'].metadata(), **about})
    _link(folder, trainer, book)


def _link(folder: Path, trainer: Trainer, book: dict[str, Any]) -> None:
    """Name the weights of the checkpoint at the trainer's position by what they are."""
    path = weights_file(folder, trainer.position.updates, 'ema' if trainer.ema else '')
    link(path, LAST)
    if 'best' in book and book['best']['epoch'] == trainer.position.epoch - 1 and not trainer.position.batch:
        link(path, 'model_best.safetensors')


def _resume(task: Task, folder: Path, trainer: Trainer, images: dict[str, str]) -> dict[str, Any]:
    """Bring `trainer` to the folder's newest checkpoint, if there is one; returns the run's bookkeeping.

    `images` has the digest of each set.
    """
    now = _trained(task, trainer)
    book: dict[str, Any] = {'log': [], 'wall_time': 0.0, 'machines': [], 'trained': now, 'images': images}
    checkpoint = read_checkpoint(folder, ['', 'ema'] if trainer.ema else [''])
    if checkpoint is None:
        return book
    weights, state = checkpoint
    ours = asdict(task.recipe)
    theirs = {**asdict(Recipe()), **state['recipe']}  # an older version's lacks what came after it
    differing = [name for name in ours if theirs[name] != ours[name]]
    if state['model'] != task.model or differing:
        raise ValueError(
            f'the checkpoint in {folder} is of {state["model"]} with another recipe or model than {task.model} '
            f'(differing: {", ".join(differing) or "model"}); resume a run in its own folder'
        )
    try:
        trainer.net.load_state_dict(weights[''])
        if trainer.ema:
            trainer.ema.module.load_state_dict(weights['ema'])
        trainer.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f'the checkpoint in {folder} does not fit {task.model}: {str(error).splitlines()[0]}'
        ) from None
    then = Trained.read(weights_file(folder, trainer.position.updates))
    changed = [of for of in ('classes', 'input_size', 'mean', 'std') if getattr(then, of) != getattr(now, of)]
    if changed:
        raise ValueError(
            f'the run in {folder} began with other {", ".join(changed)} than the images and {task.model} have now '
            f'({"; ".join(f"{getattr(then, of)}, not {getattr(now, of)}" for of in changed)}); '
            'go on with the images and the default checkpoint that it began with'
        )
    began = state['book'].get('images', images)  # an older version's state has none
    if others := [name for name in images if began[name] != images[name]]:
        raise ValueError(
            f'the run in {folder} began with other {" and ".join(others)} images or labels than {task.data} has now; '
            'go on with those that it began with'
        )
    book.update(state['book'])
    if (folder / LOG).exists():
        try:
            lines = [json.loads(text) for text in (folder / LOG).read_text(encoding='utf-8').splitlines()]
            book['log'] = [line for line in lines if line['epoch'] < trainer.position.epoch]
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f'{folder / LOG} is damaged: a line is no epoch ({error})') from None
    _link(folder, trainer, book)  # which a kill may have forestalled
    return book


def _finish(task: Task, folder: Path, trainer: Trainer, book: dict[str, Any], analysis: Optional[Analysis]) -> dict:
    speeds = [line['images_per_second'] for line in book['log'] if line['images_per_second']]
    *earlier, machine = book['machines']
    result = {
        'model': task.model,
        'data': task.data,
        'recipe_name': task.recipe_name,
        'command': command_of(task),
        'last': book['last'],
        'best': book['best'],
        'mapping_units': None,
        'parameters': sum(p.numel() for p in trainer.net.parameters()),
        'epochs': trainer.epochs,
        'wall_time': round(book['wall_time'], 1),
        'images_per_second': round(statistics.fmean(speeds), 1) if speeds else None,
        'recipe': asdict(task.recipe),
        'mean': trainer.mean,
        'std': trainer.std,
        **machine,
        'earlier': earlier,
    }
    if analysis is not None:
        with suppress(ValueError):  # a plain net has no weights to tell of
            images_in_order = (x for x, _ in trainer.test_batches.in_order())
            result['mapping_units'] = analysis(trainer.eval_net.eval(), images_in_order)
    write_file(folder / RESULT, json.dumps(result, indent=1))
    return result
