"""The images with the lowest and the highest sum of `lam1` over the units (AWM, arXiv 1811.06878, Fig. 7)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from timm_weighted_skip.analysis.collect import Collected
from timm_weighted_skip.analysis.figures import COLUMN, literal, new_figure, styled
from timm_weighted_skip.analysis.tables import Result, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['extreme_images']


def extreme_images(
    collected: Collected, classes: Sequence[str], picture: Callable[[int], Image.Image], count: int = 16
) -> Result:
    """The `count` images that use the residual branches least, and the `count` that use them most.

    Args:
        collected: The images' weights.
        classes: Names of the classes.
        picture: Called with the number of an image.
        count: Images of each end; half of the set if there are fewer.

    Raises:
        ValueError: The net is a DenseNet, whose weights sum to the same for every image, or `count` is below 1.
    """
    if 'concat' in collected.kinds:
        raise ValueError('a DenseNet has no residual branches: its weights sum to the same for every image')
    if count < 1:
        raise ValueError(f'count={count} is not allowed; give 1 or more')
    total = collected.weights.sum(1, dtype=np.float64)
    order = np.argsort(total, kind='stable')
    count = min(count, len(order) // 2) or 1
    ends = {'lowest': order[:count], 'highest': order[::-1][:count]}
    columns = ['sum', 'rank', 'image', 'class', 'predicted', 'lam1 sum', 'lam1 mean']
    rows = [
        [end, rank, int(i), classes[collected.labels[i]], classes[collected.predictions[i]], float(total[i]),
         float(total[i] / len(collected.units))]
        for end, images in ends.items()
        for rank, i in enumerate(images, 1)
    ]  # fmt: skip
    about = {
        'images': len(total),
        'mapping units': len(collected.units),
        'sum over a plain net': float(collected.identity.sum()),
        'mean sum': float(total.mean()),
    }
    sheet = {
        end: [(picture(int(i)), classes[collected.labels[i]], float(total[i])) for i in images]
        for end, images in ends.items()
    }
    return Result(about, {'extremes': Table(columns, rows)}, {'extremes': lambda: _draw(sheet)})


@styled
def _draw(sheet: dict[str, list[tuple[Image.Image, str, float]]], columns: int = 8) -> 'Figure':
    rows = -(-len(sheet['lowest']) // columns)
    width = 2 * COLUMN
    figure = new_figure(width=width, height=2 * (rows * 1.12 * width / columns + 0.3))
    parts: Any = figure.subfigures(2, 1)
    for part, (end, images) in zip(parts, sheet.items()):
        part.suptitle(rf'{end} sum of $\lambda_1$ over the mapping units', fontsize=8)
        for axes, entry in zip(part.subplots(rows, columns, squeeze=False).flat, images + [None] * columns):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if entry is not None:
                image, name, value = entry
                shown = image if image.mode == 'L' else image.convert('RGB')
                axes.imshow(shown, cmap='gray', vmin=0, vmax=255, interpolation='none')  # grey as it is, not stretched
                axes.set_xlabel(f'{literal(name)}\n$\\Sigma\\lambda_1$ = {value:.4f}', fontsize=7)
    return figure
