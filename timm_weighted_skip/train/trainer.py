"""Training of one net on an image set held in memory, on one device."""

import ctypes
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn

from timm_weighted_skip.checks import check_device
from timm_weighted_skip.data import ImageSet
from timm_weighted_skip.models.names import check_model_name
from timm_weighted_skip.nets import DAMAGED, MISFITS
from timm_weighted_skip.train.batches import Batches, mix_seed
from timm_weighted_skip.train.evaluate import evaluate
from timm_weighted_skip.train.freezing import AlternateFreezing
from timm_weighted_skip.train.recipe import Recipe

__all__ = ['EpochStopped', 'Trainer', 'make_net', 'normalisation', 'pixel_moments', 'stop_signals']

# Images that a run must process for torch.compile to win back on a CPU the minutes that it takes to compile.
IMAGES_WORTH_COMPILING = 500_000


class EpochStopped(KeyboardInterrupt):
    """An epoch was stopped between two updates."""


def make_net(model: str, data: ImageSet, pretrained: bool = False, **model_kwargs: Any) -> nn.Module:
    """timm's net of that name for the images and classes of `data`.

    Raises:
        ValueError: timm can't make it, or it can't take images of that size.
        FileNotFoundError: A file of weights that an argument names is not there.
    """
    check_model_name(model)
    shape: dict[str, Any] = {'num_classes': len(data.classes), 'in_chans': data.images.shape[3]}
    for name, value in shape.items():
        if model_kwargs.pop(name, value) != value:
            raise ValueError(f'{name} of the data is {value}; do not give another')
    try:
        net = timm.create_model(model, pretrained=pretrained, **shape, **model_kwargs)
        with torch.inference_mode():
            output = net.eval()(torch.zeros(1, *data.images.shape[1:]).permute(0, 3, 1, 2))
    except (*DAMAGED, *MISFITS) as error:
        # Nets of a fixed or a smallest image size assert; the rest are arguments that are not the net's.
        raise ValueError(f'model {model!r}: {error}') from None
    except FileNotFoundError as error:
        if str(error):
            raise
        raise FileNotFoundError(f'no file of weights as {model_kwargs} names, seen from {Path.cwd()}') from None
    if getattr(output, 'shape', None) != (1, len(data.classes)):
        raise ValueError(f'model {model!r} with {model_kwargs} does not give one number per class; train the whole net')
    return net.train()


def pixel_moments(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and deviation of uint8 images (N, H, W, C), as of pixels in [0, 1].

    The sums are of whole numbers: the same bits however many threads there are, with which a run may go on.
    """
    mean, std, levels = [], [], torch.arange(256)
    for channel in images.unbind(3):
        counts = torch.bincount(channel.flatten(), minlength=256)
        n, total, squares = (int((counts * levels**power).sum()) for power in range(3))
        mean.append(total / (255 * n))
        std.append(math.sqrt((n * squares - total**2) / (n * max(n - 1, 1))) / 255)
    return mean, std


def normalisation(recipe: Recipe, net: nn.Module, data: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and deviation: the recipe's, else the net's, else those of the images.

    A single number of the recipe's is that of every channel, as in timm, and so is one that all channels of the net
    have; of a net whose channels differ, images of another number of channels take their own.

    Raises:
        ValueError: A deviation is not above 0.
    """
    channels = data.images.shape[3]
    config: Any = net.pretrained_cfg
    mean, std = config['mean'], config['std']
    if len({*mean}) == len({*std}) == 1:
        mean, std = mean[:1], std[:1]
    elif len(mean) != channels:
        mean, std = pixel_moments(data.images)
    mean, std = recipe.mean or mean, recipe.std or std
    if not all(deviation > 0 for deviation in std):
        raise ValueError(f'the pixel deviations are {list(std)}; give --std with numbers above 0')
    return tuple(mean * channels if len(mean) == 1 else mean), tuple(std * channels if len(std) == 1 else std)


def _has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs, which on a GPU comes with torch."""
    return device.type != 'cpu' or any(map(shutil.which, (os.environ.get('CXX', 'g++'), 'g++', 'c++', 'clang++')))


def _compiles(device: torch.device, images: int) -> bool:
    """Whether torch.compile has the compiler it needs and would win back its time."""
    if device.type == 'cpu':
        return images >= IMAGES_WORTH_COMPILING and _has_compiler(device)
    return device.type == 'cuda'


def _keep_memory() -> None:
    """Have glibc reuse the memory of activations instead of giving it back to the system at every step."""
    if sys.platform == 'linux':
        with suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD at its largest
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM only set what the yielded function tells, and say so; a second one is as usual."""
    stopped = []
    previous: dict[signal.Signals, Any] = {}

    def stop(number, frame) -> None:
        stopped.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)
        with suppress(OSError):  # not by `print`, which the signal may have interrupted
            os.write(2, b'\nstopping once this step is done and saved; a second signal stops at once\n')

    with suppress(ValueError):  # not in the main thread: no handlers
        for each in (signal.SIGINT, signal.SIGTERM):
            previous[each] = signal.signal(each, stop)
    try:
        yield lambda: bool(stopped)
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


@dataclass
class Position:
    """Where a run is: before batch `batch` of epoch `epoch`.

    `loss` and `correct`, the images that were classified rightly, are sums over the epoch's earlier batches.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss: float = 0.0
    correct: float = 0.0


class Trainer:
    """Trains a net by a recipe; same seed, same machine, same bits, however often it is stopped and resumed.

    What is drawn in an epoch depends on seed and epoch alone: batches are drawn by `Batches.shuffled`, and torch's
    generator is seeded anew at the start of an epoch. `state_dict` is whole between any two updates.

    Args:
        net: The net; the caller has seeded torch before making it.
        recipe: What to do.
        train: Training images.
        test: Test images.
        device: Where to train.

    Raises:
        ValueError: Something in the recipe does not fit net or data.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, train: ImageSet, test: ImageSet, device: str = 'cpu') -> None:
        self.recipe = recipe
        self.device = check_device(device)
        self.freezing = AlternateFreezing(
            recipe.alternate_freeze, recipe.alternate_count, recipe.alternate_rule, recipe.alternate_bn_stats
        )
        self.amp = self.device.type == 'cuda' if recipe.amp is None else recipe.amp
        channels_last = recipe.channels_last is not False
        self.mean, self.std = normalisation(recipe, net, train)

        def batches(data: ImageSet, pad_crop: int = 0, hflip: float = 0.0) -> Batches:
            return Batches(data, recipe.batch_size, self.mean, self.std, self.device, pad_crop, hflip, channels_last)

        self.train_batches, self.test_batches = batches(train, *recipe.augmentation), batches(test)
        self.batches_per_epoch = self.train_batches.whole()
        if recipe.grad_accum_steps > self.batches_per_epoch:
            raise ValueError(
                f'grad_accum_steps={recipe.grad_accum_steps} is more than an epoch of {self.batches_per_epoch} batches'
            )
        self.updates_per_epoch = self.batches_per_epoch // recipe.grad_accum_steps

        if self.device.type == 'cuda':
            torch.backends.cudnn.deterministic = True
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        _keep_memory()
        if recipe.grad_checkpointing:
            try:
                net.set_grad_checkpointing()  # type: ignore[operator]
            except (AssertionError, AttributeError) as error:
                raise ValueError(f'grad_checkpointing: {error}; leave it out') from None
        self.net = net.to(self.device)
        if channels_last and self.device.type != 'cpu':
            # On a CPU oneDNN lays weights out as it likes, and a fused optimizer copies those that are not contiguous.
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss_fn = LabelSmoothingCrossEntropy(recipe.smoothing) if recipe.smoothing else nn.CrossEntropyLoss()
        self.optimizer = self._make_optimizer()
        self.scheduler, scheduled = self._make_scheduler()
        self.epochs = self.freezing.total_epochs(scheduled)
        self.ema = None
        if recipe.model_ema:
            self.ema = ModelEmaV3(self.net, recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
        mode, self.compiled = recipe.torchcompile_mode, recipe.torchcompile
        if self.compiled is None:
            self.compiled = mode is not None or _compiles(self.device, self.epochs * len(train.labels))
        if self.compiled and not _has_compiler(self.device):
            raise ValueError('torchcompile needs a C++ compiler, and there is none; install g++, or leave it out')
        self.model: nn.Module = self.net
        if self.compiled:
            if mode is None and self.device.type == 'cuda':
                mode = 'reduce-overhead'  # CUDA graphs: launching the kernels of a small net takes longer than they do
            try:
                self.model = torch.compile(self.net, mode=mode)  # type: ignore[assignment]
            except RuntimeError as error:
                raise ValueError(f'torchcompile_mode={mode!r}: {error}') from None
        self.position = Position()
        self.freezing(self.net, 0)  # which refuses a net that can't be trained so

    def _make_optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        options: dict[str, Any] = {'eps': recipe.opt_eps, 'betas': recipe.opt_betas}
        options = {name: value for name, value in options.items() if value is not None}
        try:
            optimizer = get_optimizer_class(recipe.opt.removeprefix('lookahead_'), bind_defaults=False)
            if (
                'fused' in signature(optimizer).parameters
                and not {'foreach', 'differentiable'} & recipe.opt_kwargs.keys()
            ):
                # By the released rule gates take their first step with biases that have momentum already, and torch's
                # fused SGD can't take both at once.
                options['fused'] = recipe.alternate_rule == 'strict'
            options.update(recipe.opt_kwargs)
            made = create_optimizer_v2(self.net, recipe.opt, recipe.lr, recipe.weight_decay, recipe.momentum, **options)
            if getattr(made, 'is_second_order', False):
                raise ValueError("it takes second derivatives, which this trainer does not make; timm's train.py does")
            return made
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f'optimizer {recipe.opt!r}: {error}') from None

    def _make_scheduler(self):
        names = (
            'sched', 'min_lr', 'warmup_epochs', 'warmup_lr', 'cooldown_epochs', 'decay_epochs', 'decay_milestones',
            'decay_rate',
        )  # fmt: skip
        scheduler, epochs = create_scheduler_v2(
            self.optimizer,
            num_epochs=self.recipe.epochs,
            step_on_epochs=not self.recipe.sched_on_updates,
            updates_per_epoch=self.updates_per_epoch,
            **{name: getattr(self.recipe, name) for name in names},
        )
        if scheduler is None and self.recipe.sched != 'none':
            raise ValueError(f'sched={self.recipe.sched!r} is unknown to timm; choose cosine, multistep, step or none')
        return scheduler, epochs

    @property
    def eval_net(self) -> nn.Module:
        """The net whose accuracy counts: the moving average if there is one."""
        return self.ema.module if self.ema else self.net

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on from `position`, beside the weights."""
        random = {'cpu': torch.get_rng_state()}
        if self.device.type == 'cuda':
            random['cuda'] = torch.cuda.get_rng_state(self.device)
        return {**vars(self.position), 'optimizer': self.optimizer.state_dict(), 'random': random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken. The weights are the caller's."""
        self.optimizer.load_state_dict(state['optimizer'])
        torch.set_rng_state(state['random']['cpu'])
        if 'cuda' in state['random'] and self.device.type == 'cuda':
            torch.cuda.set_rng_state(state['random']['cuda'], self.device)
        self.position = Position(**{name: state[name] for name in vars(Position())})

    def _set_rate(self, epoch: int, updates: int) -> None:
        """Set the learning rate for the update that comes after `updates` of epoch `epoch`."""
        if self.scheduler is not None:
            epoch = self.freezing.schedule_epoch(epoch)
            self.scheduler.step(epoch)
            self.scheduler.step_update(epoch * self.updates_per_epoch + updates)

    def train_epoch(
        self,
        progress: Callable[[int, Optional[float]], None] = lambda images, loss: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Train the rest of the current epoch.

        Args:
            progress: Called after every update with its number of images and, now and then, the mean loss so far.
            stopped: Asked after every update whether to stop, see `stop_signals`.

        Returns:
            'phase', 'lr', the mean 'loss' and 'top1' in % of the training images as they were seen, and 'images' and
            'seconds' of this call.

        Raises:
            EpochStopped: It is to stop; everything is as after the last update.
            ValueError: The loss is no longer finite.
        """
        recipe, at = self.recipe, self.position
        phase = self.freezing(self.model, at.epoch)
        if at.batch == 0:
            torch.manual_seed(mix_seed(recipe.seed, at.epoch))
        self.model.train()
        # The batches that don't fill an update are left out, like the images that don't fill a batch.
        end = self.updates_per_epoch * recipe.grad_accum_steps
        totals = torch.tensor([at.loss, at.correct], dtype=torch.float64, device=self.device)
        started, checked, first = time.perf_counter(), time.perf_counter(), at.batch
        for batch, (x, labels) in enumerate(self.train_batches.shuffled(recipe.seed, at.epoch, at.batch), at.batch):
            if batch == end:
                break
            if batch % recipe.grad_accum_steps == 0:
                self._set_rate(at.epoch, batch // recipe.grad_accum_steps)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                output = self.model(x)
                loss = self.loss_fn(output, labels) / recipe.grad_accum_steps
            loss.backward()
            correct = (output.detach().argmax(1) == labels).sum()
            totals += torch.stack([loss.detach() * recipe.grad_accum_steps, correct])
            if (batch + 1) % recipe.grad_accum_steps:
                continue
            if recipe.clip_grad is not None:
                dispatch_clip_grad(self._clipped(), recipe.clip_grad, recipe.clip_mode)
            self.optimizer.step()
            self.optimizer.zero_grad()
            at.batch, at.updates = batch + 1, at.updates + 1
            if self.ema:
                self.ema.update(self.net, at.updates)
            mean = None
            if time.perf_counter() > checked + 1 or at.batch == end:  # not always: reading the loss waits for it
                checked = time.perf_counter()
                mean = self._read(totals)
            progress(recipe.batch_size * recipe.grad_accum_steps, mean)
            if stopped():
                self._read(totals)
                raise EpochStopped
        images, seconds = (at.batch - first) * recipe.batch_size, time.perf_counter() - started
        lr = max(group['lr'] for group in self.optimizer.param_groups)
        top1 = 100 * at.correct / (at.batch * recipe.batch_size)
        result = {'phase': phase, 'lr': lr, 'loss': at.loss / at.batch, 'top1': top1}
        self.position = Position(at.epoch + 1, updates=at.updates)
        return {**result, 'images': images, 'seconds': seconds}

    def _read(self, totals: torch.Tensor) -> float:
        """Note the epoch's sums so far; returns the mean loss.

        Raises:
            ValueError: It is not finite.
        """
        at = self.position
        at.loss, at.correct = totals.tolist()
        mean = at.loss / at.batch
        if not math.isfinite(mean):
            raise ValueError(f'the loss is {mean} in epoch {at.epoch + 1}; give a smaller --lr than {self.recipe.lr}')
        return mean

    def _clipped(self) -> list[nn.Parameter]:
        """What a gradient's norm is taken of; by timm's custom, 'agc' leaves the classifier out."""
        head: set[nn.Parameter] = set()
        if self.recipe.clip_mode == 'agc':
            classifier: Any = self.net.get_classifier()  # type: ignore[operator]
            heads = classifier if isinstance(classifier, tuple) else (classifier,)  # a distilled net has two
            head = {p for each in heads for p in each.parameters()}
        return [p for p in self.net.parameters() if p not in head]

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracies of `eval_net` on the test images, in the precision of its weights."""
        return evaluate(self.ema.module if self.ema else self.model, self.test_batches, net=self.eval_net)
