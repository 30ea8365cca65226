"""Alternating training of backbone and gates (AWM, arXiv 1811.06878, section 3.2)."""

from typing import Literal, NamedTuple

import torch
from timm.layers import use_reentrant_ckpt
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_weighted_skip.checks import check_choice, check_count
from timm_weighted_skip.layers import Gate

__all__ = ['AlternateFreezing', 'Phase']

Phase = Literal['backbone', 'gates', 'joint']
NOTE = '_freezing'
JOINTLY = 'train with period 0 (--alternate-freeze 0, or alternate_freeze: 0 in the file of -c)'


class _Note(NamedTuple):
    """What a net keeps of its freezing, so that its copies have theirs.

    Names, as another parameter or norm can take the place of one.

    Attributes:
        held: Parameters that the user does not want trained.
        frozen: Parameters that were not trained after the last call; what differs at the next is the user's doing.
        norms: Norms that moved before the first call.
    """

    held: set[str]
    frozen: set[str]
    norms: set[str]


class AlternateFreezing:
    """Trains backbone and gates in turn, `period` epochs each, backbone first.

        freezing = AlternateFreezing(period=3)
        for epoch in range(epochs):
            phase = freezing(model, epoch)

    Call it at the start of every epoch, after the optimizer has been made (timm's factory leaves out parameters that
    are frozen by then, for good). What a phase does not train is frozen to the bit: it needs no gradient, and its last
    gradient is dropped, so that neither momentum nor weight decay can move it and a gradient norm does not count it.

    What the user freezes, before the first call or between two, stays frozen until the user thaws it; freezing what the
    phase has at rest anyway changes nothing and goes unseen. `release` lets all else be trained again. The phase
    depends on the epoch's number alone, so a resumed run lands in the right one.

    Args:
        period: Epochs per phase; 0 trains both together. The paper's best is 3.
        count: 'total', the schedule's epochs contain both phases, so a plain net at the same number of epochs costs the
            same; 'extra', every epoch of the schedule comes twice, for the backbone and for the gates (the released
            code: 350 and 348 epochs), see `total_epochs` and `schedule_epoch`.
        freeze: What of the backbone a gate phase freezes. 'strict', all of it; 'released', weights only: its biases,
            those of norm layers included, are trained in both phases.
        freeze_bn_stats: Keep running statistics as they are in a gate phase; normalising stays by batch.

    Raises:
        ValueError: `period` is not a whole number of 0 or more, or `count` or `freeze` is unknown.
    """

    def __init__(
        self,
        period: int = 3,
        count: Literal['total', 'extra'] = 'total',
        freeze: Literal['strict', 'released'] = 'strict',
        freeze_bn_stats: bool = False,
    ) -> None:
        check_count('period', period, least=0)
        check_choice('count', count, ('total', 'extra'))
        check_choice('freeze', freeze, ('strict', 'released'))
        self.period = period
        self.count = count
        self.freeze = freeze
        self.freeze_bn_stats = freeze_bn_stats

    def phase(self, epoch: int) -> Phase:
        """What epoch number `epoch`, counted from 0, trains."""
        if not self.period:
            return 'joint'
        return 'gates' if epoch // self.period % 2 else 'backbone'

    def total_epochs(self, epochs: int) -> int:
        """Epochs to run for a schedule of `epochs`: more than these only with `count='extra'`."""
        if self.count == 'total' or not self.period:
            return epochs
        return epochs + epochs // self.period * self.period

    def schedule_epoch(self, epoch: int) -> int:
        """The schedule's epoch at which epoch `epoch` of the run is: the learning rate's, for one."""
        if self.count == 'total' or not self.period:
            return epoch
        cycle, position = divmod(epoch, 2 * self.period)
        return cycle * self.period + position % self.period

    def __call__(self, model: nn.Module, epoch: int) -> Phase:
        """Freeze and thaw the parameters of `model` for `epoch`; returns the phase.

        Args:
            model: The net, compiled or wrapped for data-parallel training as it may be.
            epoch: Counted from 0.

        Raises:
            ValueError: The net has no gates, or its wrapper or its checkpointing can't train it in phases.
        """
        phase = self.phase(epoch)
        if phase == 'joint':
            self.release(model)
            return phase
        net = _own_net(model)
        gates = _gates(model)
        note = _note(net)
        for name, parameter in net.named_parameters():
            if name in note.held:
                continue
            if parameter in gates:
                trained = phase == 'gates'
            else:
                trained = phase == 'backbone' or (self.freeze == 'released' and name.endswith('bias'))
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None
        _have_guards_checked(net)
        # Not `norm.eval()`, which the next `model.train()` would undo, and which normalises by other numbers.
        _set_tracking(net, note, phase == 'backbone' or not self.freeze_bn_stats)
        vars(net)[NOTE] = note._replace(frozen=_frozen(net))
        return phase

    def release(self, model: nn.Module) -> None:
        """Let everything of `model` be trained that the user did not freeze."""
        net = _own_net(model)
        if NOTE not in vars(net):
            return
        note = _note(net)
        for name, parameter in net.named_parameters():
            if name not in note.held:
                parameter.requires_grad_(True)
        _have_guards_checked(net)
        _set_tracking(net, note, True)
        del vars(net)[NOTE]


def _own_net(model: nn.Module) -> nn.Module:
    """The net without its wrappers, with the parameters that it trains."""
    net = unwrap_model(model)
    for module in net.modules():
        if hasattr(module, 'reshard'):
            # After a forward without gradients FSDP2's modules show the parameters that they gathered, which go again.
            module.reshard()
    return net


def _gates(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the gates of a net that can be trained in phases."""
    net = unwrap_model(model)
    if isinstance(net, torch.jit.ScriptModule):
        raise ValueError(f'a scripted net can not be trained in phases; leave out --torchscript, or {JOINTLY}')
    gates = {p for m in net.modules() if isinstance(m, Gate) for p in m.parameters()}
    if not gates:
        raise ValueError(
            f'{type(net).__name__} has no gates to train in turn with its backbone; nets that have are called '
            f'awm_* (such as awm_resnet20_cifar), made without plain=True; or {JOINTLY}'
        )
    if any(getattr(m, 'grad_checkpointing', False) for m in net.modules()) and use_reentrant_ckpt():
        raise ValueError(
            're-entrant gradient checkpointing passes no gradient through a frozen backbone; unset TIMM_REENTRANT_CKPT'
        )
    _check_data_parallel(model)
    return gates


def _frozen(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if not parameter.requires_grad}


def _note(net: nn.Module) -> _Note:
    """The net's note, with what the user froze and thawed since the last call."""
    frozen = _frozen(net)
    note = vars(net).get(NOTE)
    if note is None:
        norms = {name for name, module in net.named_modules() if getattr(module, 'track_running_stats', False)}
        return _Note(frozen, frozen, norms)
    thawed = note.frozen - frozen
    return note._replace(held=note.held - thawed | frozen - note.frozen)


def _set_tracking(net: nn.Module, note: _Note, tracking: bool) -> None:
    for name, module in net.named_modules():
        if name in note.norms:
            module.track_running_stats = tracking  # type: ignore[assignment]


def _have_guards_checked(net: nn.Module) -> None:
    """Have torch.compile see what was frozen and thawed.

    In some versions (2.8 and 2.11, not 2.14) a compiled net does not look at its parameters again while the dicts that
    hold them are as they were: a frozen and thawed parameter would get no gradient, and nothing would say so.
    """
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, None)
            module.register_parameter(name, parameter)


def _check_data_parallel(model: nn.Module) -> None:
    """Refuse a `DistributedDataParallel` that would wait for the gradients of what is frozen."""
    wrapper = getattr(model, '_orig_mod', model)
    if isinstance(wrapper, DistributedDataParallel) and not (
        wrapper.find_unused_parameters and not wrapper.static_graph
    ):
        raise ValueError(
            'frozen parameters have no gradients to synchronise; '
            'make DistributedDataParallel with find_unused_parameters=True and without static_graph'
        )
