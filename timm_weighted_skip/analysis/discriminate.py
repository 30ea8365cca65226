"""How well the weights of an image tell its class (AWM, arXiv 1811.06878, section 4.4, Fig. 10).

Feature vector -> PCA -> LDA to 30 dimensions -> Euclidean distance to the class means of the training set. The rank-k
identification rate is the share of test images whose class is among the k nearest means. The paper compares the
weights with the raw pixels; the net's last features and gates that were never trained put both in proportion. Of what
is drawn at random the mean over the draws is taken.

Every entry of a vector is first scaled to unit variance: PCA, which looks at variance alone, would else drop the units
whose weights move little, however well these tell classes.
"""

from typing import TYPE_CHECKING

import numpy as np

from timm_weighted_skip.analysis.collect import Collected
from timm_weighted_skip.analysis.figures import colour, legend_above, new_figure, styled
from timm_weighted_skip.analysis.tables import Result, Table, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['bootstrap_interval', 'discriminate', 'true_class_ranks']

RESAMPLES, LEVEL = 2000, 0.95


def true_class_ranks(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, labels: np.ndarray, dims: int, variance: float
) -> tuple[np.ndarray, int, int]:
    """For every test vector, how many class means are nearer than its own class's.

    Args:
        train, test: Feature vectors (N, D).
        train_labels, labels: Classes (N,).
        dims: Dimensions that LDA keeps; at most the classes less one and what PCA left.
        variance: Share of the training set's variance that PCA keeps.

    Returns:
        Ranks (N,), 0 for the nearest, and the dimensions that PCA and LDA kept.
    """
    require('sklearn')
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import pairwise_distances
    from sklearn.neighbors import NearestCentroid
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    scaled = scaler.transform(train)
    pca = PCA(n_components=variance, svd_solver='covariance_eigh').fit(scaled)
    kept = min(dims, len(np.unique(train_labels)) - 1, pca.n_components_)
    reduced = pca.transform(scaled)
    lda = LinearDiscriminantAnalysis(n_components=kept).fit(reduced, train_labels)
    means = NearestCentroid().fit(lda.transform(reduced), train_labels)
    distance = pairwise_distances(lda.transform(pca.transform(scaler.transform(test))), means.centroids_)  # (N, K)
    own = distance[np.arange(len(labels)), np.searchsorted(means.classes_, labels)]
    return (distance < own[:, None]).sum(1), int(pca.n_components_), int(kept)


def bootstrap_interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile interval (95 %) of the mean of `values`, (N,), over resampled images.

    Drawing N images with replacement is drawing how often each distinct value comes, which is multinomial.
    """
    distinct, counts = np.unique(values, return_counts=True)
    means = rng.multinomial(len(values), counts / len(values), size=RESAMPLES) @ distinct / len(values)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def discriminate(
    train: Collected, test: Collected, dims: int = 30, variance: float = 0.99, max_rank: int = 10, seed: int = 0
) -> Result:
    """Identification rates of rank 1 to `max_rank` from the weights and from every control of `train` and `test`.

    Args:
        train, test: Of the training images, for PCA, LDA and class means, and of the test images.
        dims, variance: As `true_class_ranks`.
        max_rank: At most the number of classes, where every rate is 100 %.
        seed: Of the bootstrap.

    Raises:
        ValueError: `dims`, `variance` or `max_rank` is out of range, a test image is of a class that no training image
            is of, or all images have the same weights.
    """
    if dims < 1 or max_rank < 1 or not 0 < variance < 1:
        raise ValueError(
            f'dims={dims}, max_rank={max_rank}, variance={variance}: '
            'dims and max_rank are 1 or more, variance is between 0 and 1'
        )
    classes = np.unique(train.labels)
    unseen = np.setdiff1d(test.labels, classes)
    if len(classes) < 2:
        raise ValueError('all training images are of one class; give images of two or more')
    if len(unseen):
        raise ValueError(f'no training image is of class {unseen[0]}, and a test image is; give training images of it')
    rng = np.random.default_rng(seed)
    top = min(max_rank, len(classes))
    hits: dict[str, np.ndarray] = {}
    sizes, rows, drawn = [], [], []
    for name in ('weights', *train.controls):
        vectors = [train.weights, test.weights] if name == 'weights' else [train.controls[name], test.controls[name]]
        if not np.ptp(vectors[0], axis=0).any():
            raise ValueError(
                f'all images have the same {name}: the gates have not been trained, or the set is constant'
            )
        draws = zip(*(np.moveaxis(v.reshape(len(v), -1, v.shape[-1]), 1, 0) for v in vectors))
        ranks, after_pca, after_lda = zip(
            *(true_class_ranks(first, train.labels, second, test.labels, dims, variance) for first, second in draws)
        )
        of_draws = np.stack(ranks)[..., None] < np.arange(1, top + 1)  # (draws, N, ranks)
        hits[name] = of_draws.mean(0)
        sizes.append([name, vectors[0].shape[-1], max(after_pca), max(after_lda)])
        if len(of_draws) > 1:
            rates = 100 * of_draws.mean(1)
            drawn += [[name, d, float(rate[0]), float(rate.mean())] for d, rate in enumerate(rates, 1)]
        for k in range(top):
            low, high = bootstrap_interval(hits[name][:, k], rng)
            rows.append([name, k + 1, 100 * float(hits[name][:, k].mean()), 100 * low, 100 * high])
    differences = []
    for name in train.controls:
        gain = (hits['weights'].mean(1) - hits[name].mean(1)) * 100  # (N,) of each image, so that the pairs stay pairs
        differences.append([f'weights minus {name}', float(gain.mean()), *bootstrap_interval(gain, rng)])
    tables = {
        'discriminate': Table(['vector', 'rank', 'rate (%)', 'low', 'high'], rows),
        'discriminate_differences': Table([f'mean over ranks 1-{top}', 'points', 'low', 'high'], differences),
        'discriminate_dimensions': Table(['vector', 'dimensions', 'after PCA', 'after LDA'], sizes),
    }
    if drawn:
        tables['discriminate_draws'] = Table(['vector', 'draw', 'rank 1 (%)', f'mean over ranks 1-{top} (%)'], drawn)
    about = {
        'training images': len(train.labels),
        'test images': len(test.labels),
        'classes': len(classes),
        'variance kept by PCA': variance,
        'interval': f'{LEVEL:.0%}, {RESAMPLES} bootstrap resamples of the test images',
    }
    return Result(about, tables, {'discriminate': lambda: _draw(tables['discriminate'], sizes, 100 / len(classes))})


@styled
def _draw(table: Table, sizes: list[list], chance: float) -> 'Figure':
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(height=2.8)
    axes = figure.subplots()
    top = max(row[1] for row in table.rows)
    for index, (name, dimensions, *_) in enumerate(sizes):
        hue, _ = colour(index)
        rank, rate, low, high = np.array([row[1:] for row in table.rows if row[0] == name]).T
        axes.fill_between(rank, low, high, color=hue, alpha=0.25, linewidth=0)
        axes.plot(rank, rate, color=hue, marker='os^D'[index % 4], label=f'{name} ({dimensions}-d)')
    ranks = np.arange(1, top + 1)
    axes.plot(ranks, chance * ranks, color='0.5', linestyle=':', label='chance')
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.set_ylim(0, 102)
    axes.set_xlabel('rank $k$ (number of classes)')
    axes.set_ylabel('identification rate (%)')
    legend_above(axes, 3, 1.0)
    return figure
