"""The merges of a mapping unit: how a block's residual branch `F(x)` and its shortcut `s(x)` become one feature map.

timm's plain block computes `relu(F + s)`. A merge replaces the `+`; the activation stays the block's. `merge_relu` does
both in one step where `fused.can_fuse` allows it.
The papers call `F` the transformed data (tfd) and `s` the input represent data (ipd).

Shapes: N images, C channels, H x W pixels, K incoming units of a concatenation, e hidden width of a gate.
"""

from collections.abc import Callable, Sequence
from typing import List, Literal, Union  # noqa: UP035  TorchScript reads List

import torch
import torch.nn.functional as F
from torch import nn

from timm_weighted_skip import fused, fused_norm
from timm_weighted_skip.checks import check_choice, check_count, is_finite_number

__all__ = ['ActiveWeightedConcat', 'ActiveWeightedMapping', 'Gate', 'SkipWeight', 'skip_weights']

SkipInit = Union[float, Literal['normal']]


class SkipWeight(nn.Module):
    """AdaResNet's merge, `F + w * s` with one learned scalar `w` (arXiv 2408.09958, eq. 2).

    Its gradient is `dL/dw = sum(dL/dy * s)`. `w = 1` is the plain residual unit.

    Args:
        init: Where `w` starts. 0 is the paper's (Algorithm 2): the shortcut starts closed. 'normal' draws from a
            normal distribution with a standard deviation of 0.05.
        fixed: `w` is a buffer and stays at `init`.
        plain: `F + s`, without a weight.

    Raises:
        ValueError: `init` is neither a finite number nor 'normal', or a switch neither true nor false.
    """

    def __init__(self, init: SkipInit = 0.0, fixed: bool = False, plain: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        if init != 'normal' and not is_finite_number(init):
            raise ValueError(f"skip_init={init!r} is not allowed; give a finite number or 'normal'")
        check_choice('skip_fixed', fixed, (False, True))
        check_choice('plain', plain, (False, True))
        self.init = init
        self.sharers = [self]
        self.loaded: tuple[str, list[str]] = '', []
        weight = torch.empty((), device=device, dtype=dtype)
        if fixed or plain:
            self.register_buffer('weight', None if plain else weight)
        else:
            self.weight = nn.Parameter(weight)
        self.reset_parameters()

    def share(self) -> 'SkipWeight':
        """A merge for another unit with the same weight, and none of moving, copying and loading parts them."""
        # Not this module in two places: `torch.func.functional_call`, which swaps tensors name by name, would take
        # what it has put in under the first name for what it has to put back under the second.
        fixed, plain = not isinstance(self.weight, nn.Parameter), self.weight is None
        other = SkipWeight(fixed=fixed, plain=plain, device='meta')
        other.init, other.weight, other.sharers = self.init, self.weight, self.sharers
        self.sharers.append(other)
        return other

    def _sharing(self) -> list['SkipWeight']:
        """This and the merges that have its weight still: one may have been given, or pruned to, one of its own."""
        return [other for other in self.sharers if other.weight is self.weight]

    def _apply(self, *args, **kwargs) -> 'SkipWeight':
        sharing = self._sharing()
        super()._apply(*args, **kwargs)
        for other in sharing:  # torch may have made a new tensor, as of one on the meta device
            other.weight = self.weight
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Refuses values that differ where the weight is shared: torch would let the last unit's count for all."""
        name, own, sharing = f'{prefix}weight', self.weight, self._sharing()
        value = state_dict.get(name)
        # What is no scalar is torch's to refuse.
        if own is not None and isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_meta:
            first, call = self.loaded
            if call is not errors:  # the list of one `load_state_dict`
                first = name
            elif first and not own.is_meta and not torch.allclose(value.to(own), own, rtol=0, atol=0, equal_nan=True):
                errors.append(
                    f'{first} and {name} are one weight in this net, and their values differ ({own.item():.4g} and '
                    f'{value.item():.4g}); make the net with the `sharing` that they were trained with'
                )
                first = ''  # once is enough
            for other in sharing:
                other.loaded = first, errors
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for other in sharing:  # torch may have put in the state dict's own tensor, by `assign=True`
            other.weight = self.weight

    def starts_open(self, projection: bool) -> bool:
        """Whether a fresh unit whose residual branch gives 0 passes on what it reads.

        Of an identity shortcut relu keeps nothing of a negative multiple, and a small one fades along a chain of units.
        A projection ends in a norm, whose output has both signs and a scale of its own. `'normal'` is the released
        script's start, all norms of which start at 1.
        """
        if self.weight is None:
            return True
        return self.init != 'normal' and (self.init != 0 if projection else self.init >= 1)

    def reset_parameters(self) -> None:
        if self.weight is None:
            return
        if self.init == 'normal':
            nn.init.normal_(self.weight, std=0.05)
        else:
            nn.init.constant_(self.weight, self.init)

    def forward(self, residual: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            return residual + shortcut
        weight = self.weight.to(residual.dtype)  # else CUDA's autocast makes float32 of all that comes after
        return torch.addcmul(residual, weight, shortcut)  # (N, C, H, W)

    def merge_relu(self, residual: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """`relu(self(residual, shortcut))`, overwriting `residual`."""
        if self.weight is None:
            return residual.add_(shortcut).relu_()
        return fused.skip_relu(residual, shortcut, self.weight)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        """A weight that several units share is stored once per unit, as a copy after the first.

        So safetensors, which refuses tensors that share memory, takes the state dict as it is, an exponential moving
        average over its entries counts the weight once, and the checkpoint loads into a net of any sharing.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = f'{prefix}weight'
        if not keep_vars and key in destination and self.weight.device.type != 'meta':
            own = destination[key]
            # Other modules' entries need not be tensors.
            others = [v for k, v in destination.items() if k != key and isinstance(v, torch.Tensor) and v.ndim == 0]
            if any((v.device, v.dtype) == (own.device, own.dtype) and own.is_set_to(v) for v in others):
                destination[key] = own.clone()

    def extra_repr(self) -> str:
        if self.weight is None:
            return 'plain=True'
        return f'init={self.init!r}, fixed={not isinstance(self.weight, nn.Parameter)}'


def skip_weights(
    sharing: str = 'block', init: SkipInit = 0.0, fixed: bool = False, plain: bool = False
) -> Callable[..., SkipWeight]:
    """A maker of one net's `SkipWeight` modules, which have one weight where units share it.

    Args:
        sharing: 'block', one weight per mapping unit (eq. 8, Tables I and II); 'kind', one for all identity and one for
            all projection shortcuts ("two weights"); 'unified', one for the net (section II.D.2, "a unique one").
        init: As for `SkipWeight`; with 'normal' the identity units' weights start at 0, as in the released code.
        fixed: As for `SkipWeight`.
        plain: As for `SkipWeight`.

    Returns:
        `make(channels, projection, device=None, dtype=None)`, called once per mapping unit in forward order.

    Raises:
        ValueError: `sharing` is unknown.
    """
    check_choice('sharing', sharing, ('block', 'kind', 'unified'))
    shared: dict[object, SkipWeight] = {}

    def make(channels: int, projection: bool, device=None, dtype=None) -> SkipWeight:
        key = {'block': len(shared), 'kind': projection, 'unified': None}[sharing]
        if key in shared:
            return shared[key].share()
        drawn = projection or sharing == 'unified'
        start = 0.0 if init == 'normal' and not drawn else init
        shared[key] = SkipWeight(start, fixed=fixed, plain=plain, device=device, dtype=dtype)
        return shared[key]

    return make


class Gate(nn.Module):
    """Infers the weights of K incoming paths from their pooled features (arXiv 1811.06878, section 3.1, Fig. 3).

    `p = sigmoid(W2 relu(W1 z))`, `lam = p / sum(p)`, returned as `scale * lam`. `W2` starts at zero, and then every
    `lam` is exactly 1/K.

    The sigmoids enter through their logarithms and relative to the largest, so that their sum is never 0, whatever
    the logits and in any precision.

    Args:
        in_features: Length of `z`, all paths' channels together.
        hidden: Width e between the two layers.
        paths: Number K of weights.
        scale: What the weights of an image sum to.

    Raises:
        ValueError: `hidden` is not a width, or `scale` not a finite number other than 0.
    """

    def __init__(
        self, in_features: int, hidden: int, paths: int = 2, scale: float = 1.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_count('hidden', hidden)
        if not is_finite_number(scale) or scale == 0:
            raise ValueError(f'scale={scale!r} is not allowed; give a finite number other than 0')
        self.scale = float(scale)
        self.fc1 = nn.Linear(in_features, hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, paths, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.fc2.weight)

    def reset_parameters(self) -> None:
        self.fc1.reset_parameters()
        nn.init.zeros_(self.fc2.weight)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        logit = self.fc2(F.relu(self.fc1(z)))  # (N, K)
        log_p = F.logsigmoid(logit)
        # The maximum cancels in the ratio below, so it needs no gradient.
        p = (log_p - log_p.detach().amax(dim=1, keepdim=True)).exp()
        return p * self.scale / p.sum(dim=1, keepdim=True)  # (N, K)


class ActiveWeightedMapping(nn.Module):
    """AWM's merge, `scale * (lam1 * F + lam2 * s)` with `lam` inferred from each image (arXiv 1811.06878, eq. 2).

    `lam` comes from a `Gate` over `z = concat(GAP(F), GAP(s))`. With the default `scale=2` an untrained gate gives
    `F + s` to the last bit; `scale=1` is the paper's bare equation.

    Args:
        channels: C of both feature maps.
        hidden: The gate's hidden width.
        scale: Factor of the weighted sum.
        plain: `F + s`, without a gate.

    Raises:
        ValueError: As `Gate`.
    """

    def __init__(
        self, channels: int, hidden: int = 16, scale: float = 2.0, plain: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_choice('plain', plain, (False, True))
        self.gate = None if plain else Gate(2 * channels, hidden, paths=2, scale=scale, device=device, dtype=dtype)

    def starts_open(self, projection: bool) -> bool:
        """As `SkipWeight.starts_open`: a fresh gate gives the shortcut half of `scale`."""
        return self.gate is None or projection or self.gate.scale >= 2

    def forward(self, residual: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return residual + shortcut
        z = torch.cat([fused.channel_means(residual), fused.channel_means(shortcut)], dim=1)  # (N, 2C)
        w1, w2 = self.gate(z).to(residual.dtype)[..., None, None, None].unbind(1)  # (N, 1, 1, 1)
        return torch.addcmul(w1 * residual, w2, shortcut)  # (N, C, H, W)

    def merge_relu(self, residual: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """`relu(self(residual, shortcut))`; may overwrite `residual`."""
        if self.gate is None:
            return residual.add_(shortcut).relu_()
        return fused.mapping_relu(residual, shortcut, self.gate)

    def norm_relu(self, x: torch.Tensor, shortcut: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
        """`relu(self(norm(conv(x)), shortcut))`, where `fused_norm.can_fuse_norm`."""
        assert self.gate is not None  # `can_fuse_norm` has asked
        return fused_norm.norm_relu(x, shortcut, conv, norm, self.gate)


class ActiveWeightedConcat(nn.Module):
    """AWM for dense connections: each incoming unit of a concatenation times its own weight (section 4.3, Fig. 8).

    The gate sees the GAP of every unit, which is the GAP of their concatenation. A unit is scaled by `K * lam_k`, so
    an untrained gate passes the concatenation through to the last bit.

    Args:
        widths: Channels of the K units, in the order in which they are concatenated.
        hidden: The gate's hidden width.
        scale: 'units' scales by `K * lam_k`, 'paper' by `lam_k` alone.
        plain: The concatenation as it is, without a gate.

    Raises:
        ValueError: `scale` is unknown, or as `Gate`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        hidden: int = 24,
        scale: str = 'units',
        plain: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice('scale', scale, ('units', 'paper'))
        check_choice('plain', plain, (False, True))
        self.widths = list(widths)
        paths = len(self.widths)
        factor = paths if scale == 'units' else 1
        self.gate = None if plain else Gate(sum(widths), hidden, paths, scale=factor, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return x
        weight = self.gate(fused.channel_means(x)).to(x.dtype)  # (N, K)
        per_channel: List[torch.Tensor] = []  # noqa: UP006
        for k, width in enumerate(self.widths):
            per_channel.append(weight.narrow(1, k, 1).expand(-1, width))
        return x * torch.cat(per_channel, dim=1)[..., None, None]  # (N, C, H, W)

    def extra_repr(self) -> str:
        return f'widths={self.widths}'
