"""Alternating training of backbone and gates (AWM, arXiv 1811.06878, section 3.2)."""

from typing import Literal

from torch import nn

from timm_weighted_skip.layers import Gate

__all__ = ['AlternateFreezing', 'Phase']

Phase = Literal['backbone', 'gates', 'joint']


class AlternateFreezing:
    """Trains backbone and gates in turn, `period` epochs each, backbone first.

    Call it at the start of every epoch, after the optimizer has been made (timm's factory leaves out parameters that
    are frozen by then, for good). What a phase does not train is frozen to the bit: it needs no gradient, and its last
    gradient is dropped, so that neither momentum nor weight decay can move it.

    Args:
        period: Epochs per phase; 0 trains both together. The paper's best is 3.

    Raises:
        ValueError: `period` is not a whole number of 0 or more.
    """

    def __init__(self, period: int = 3) -> None:
        if isinstance(period, bool) or not isinstance(period, int) or period < 0:
            raise ValueError(f'period={period!r} is not a number of epochs; give a whole number of 0 or more')
        self.period = period

    def phase(self, epoch: int) -> Phase:
        """What epoch number `epoch`, counted from 0, trains."""
        if not self.period:
            return 'joint'
        return 'gates' if epoch // self.period % 2 else 'backbone'

    def __call__(self, model: nn.Module, epoch: int) -> Phase:
        """Freeze and thaw the parameters of `model` for `epoch`; returns the phase."""
        phase = self.phase(epoch)
        gates = {p for m in model.modules() if isinstance(m, Gate) for p in m.parameters()}
        for parameter in model.parameters():
            trained = phase == 'joint' or (phase == 'gates') == (parameter in gates)
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None
        return phase
