"""The weights that an AWM net infers for every image of a data set, in one pass."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from timm_weighted_skip.analysis.units import check_nan, eval_mode, gate_weights, gates, mapping_units
from timm_weighted_skip.layers import Gate

__all__ = ['Collected', 'collect']

PIXELS = 32  # a side
DRAWS = 10  # of random gates, which differ much


@dataclass(frozen=True)
class Collected:
    """N images' weights of U units, and what the net made of the images.

    A unit that merges a residual branch with a shortcut has one column, `lam1`, the branch's weight (the shortcut's is
    `1 - lam1`). A unit of a DenseNet has one for each of the K connections that it weighs, `name[k]`.

    Attributes:
        units: U names.
        kinds: U kinds, see `MappingUnit`.
        identity: (U,) the weights of the plain net: 1/2, or 1/K in a DenseNet.
        weights: (N, U).
        labels: (N,) the images' classes.
        predictions: (N,) the net's.
        controls: What the discriminant analysis compares the weights with, by name: (N, D), or (N, draws, D) of what is
            drawn at random.
    """

    units: list[str]
    kinds: list[str]
    identity: np.ndarray
    weights: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    controls: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Of the net on these images, in percent."""
        return float((self.predictions == self.labels).mean() * 100)


def _columns(lam: dict[str, torch.Tensor], concat: set[str]) -> torch.Tensor:
    """The units' weights side by side, (B, ..., U)."""
    return torch.cat([weight if name in concat else weight[..., :1] for name, weight in lam.items()], dim=-1).float()


class _Controls:
    """Reads, in the forward that infers the weights, what they are to be compared with.

    `features` are the classifier's inputs. `random gates` have the gates' inputs and shape but fresh weights in both
    layers, in several draws; the net itself goes on with its trained gates, so that only the reading differs.
    """

    def __init__(self, model: Any, concat: set[str], seed: int) -> None:
        self.random: list[dict[str, torch.Tensor]] = [{} for _ in range(DRAWS)]
        self.features = torch.empty(0)
        self.concat = concat
        self.handles = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for drawn in self.random:
                for name, gate in gates(model).items():
                    # Made anew, because a deep copy takes the hooks along that read the trained gate.
                    like, (paths, hidden) = gate.fc1.weight, gate.fc2.weight.shape
                    fresh = Gate(like.shape[1], hidden, paths, gate.scale, device=like.device, dtype=like.dtype)
                    fresh.fc2.reset_parameters()  # which `Gate` starts at 0
                    self.handles.append(gate.register_forward_hook(self._read(drawn, name, fresh)))
        self.handles.append(model.get_classifier().register_forward_pre_hook(self._keep))

    @staticmethod
    def _read(drawn: dict[str, torch.Tensor], name: str, fresh: Gate):
        return lambda gate, args, output: drawn.__setitem__(name, fresh(*args) / fresh.scale)

    def _keep(self, classifier: nn.Module, args: tuple[torch.Tensor]) -> None:
        self.features = args[0]

    def of(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = (min(size, PIXELS) for size in x.shape[2:])
        pixels = adaptive_avg_pool2d(x, (height, width)).flatten(1)
        drawn = torch.stack([_columns(weights, self.concat) for weights in self.random], dim=1)  # (B, draws, U)
        values = {'random gates': drawn, 'features': self.features, 'pixels': pixels}
        return {name: value.float() for name, value in values.items()}

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def collect(model: nn.Module, loader: Iterable, controls: bool = False, seed: int = 0) -> Collected:
    """Infer the weights of all images of `loader`, keeping of each batch only its row of results.

    Args:
        model: An AWM net on any device; a compiled one is called uncompiled, and takes that time.
        loader: Batches of images (B, C, H, W) and labels (B,), with the set as its attribute `dataset`.
        controls: Also keep pixels, features and random gates; these take N times as many numbers as each has. Of
            images of more than 32 pixels a side, averages over areas are kept, 32 a side (PCA has no time for more).
        seed: Of the random gates.

    Raises:
        ValueError: The net infers no weights, a weight is NaN, or there are no images.
    """
    model = unwrap_model(model)
    kinds = {unit.name: unit.kind for unit in mapping_units(model)}
    own = gates(model)
    if not own:
        raise ValueError(f"{type(model).__name__}'s weights do not depend on the image; inspect it without --data")
    concat = {name for name in own if kinds[name] == 'concat'}
    paths = {name: gate.fc2.out_features for name, gate in own.items()}
    columns = [(name, k) for name in own for k in range(paths[name] if name in concat else 1)]
    units = [f'{name}[{k}]' if name in concat else name for name, k in columns]
    total = len(loader.dataset)  # type: ignore[attr-defined]
    results: dict[str, np.ndarray] = {}
    done = 0
    like = next(model.parameters())
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        lam = stack.enter_context(gate_weights(model))
        control = _Controls(model, concat, seed) if controls else None
        if control:
            stack.callback(control.close)
        progress = stack.enter_context(tqdm(total=total, unit='image', desc='weights', disable=None))
        for x, labels in loader:
            logits = model(x.to(like.device, like.dtype))
            batch = {'weights': _columns(lam, concat), 'predictions': logits.argmax(1), 'labels': labels}
            if control:
                batch.update(control.of(x))
            for name, value in batch.items():
                rows = value.cpu().numpy()
                if name not in results:
                    results[name] = np.empty((total, *rows.shape[1:]), rows.dtype)
                results[name][done : done + len(rows)] = rows
            done += len(labels)
            progress.update(len(labels))
    if not done:
        raise ValueError('the data set has no images')
    results = {name: value[:done] for name, value in results.items()}
    check_nan([unit for unit, column in zip(units, results['weights'].T) if np.isnan(column).any()], len(units))
    return Collected(
        units=units,
        kinds=[kinds[name] for name, _ in columns],
        identity=np.array([1 / paths[name] for name, _ in columns]),
        weights=results.pop('weights'),
        labels=results.pop('labels'),
        predictions=results.pop('predictions'),
        controls=results,
    )
