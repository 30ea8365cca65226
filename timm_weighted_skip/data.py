"""Image sets held in memory. Shapes: N images, H x W pixels, C channels."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Optional, Union

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset

__all__ = ['FETCHED', 'SETS', 'ImageSet', 'load_image_set', 'open_folder', 'torchvision_reason']

FETCHED = ('cifar10', 'cifar100', 'mnist')  # by torchvision
SETS = (*FETCHED, 'digits', 'folder')
FOLDERS = {'train': ('train',), 'test': ('validation', 'val', 'test')}


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with their labels.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int64 (N,), counted from 0.
        classes: Names of the classes in the labels' order.

    Raises:
        ValueError: There are no images, or labels that do not fit images or classes.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(f'images are {_describe(self.images)}; they must be uint8 of shape (N, H, W[, C])')
        if not len(self.images):
            raise ValueError('the data set is empty; it must hold at least one image')
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f'{len(self.images)} images with labels of shape {tuple(self.labels.shape)}')
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(f'labels {low} to {high} with {len(self.classes)} classes; they must be counted from 0')

    def digest(self) -> str:
        """SHA-256 of images and labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def _describe(array: Any) -> str:
    return f'{str(array.dtype).removeprefix("torch.")} of shape {tuple(array.shape)}'


def _image_set(images: Any, labels: Any, classes: Any = None) -> ImageSet:
    images, labels = torch.from_numpy(np.asarray(images)), np.asarray(labels)
    if len(labels) and labels.dtype.kind not in 'iu':
        raise ValueError(f'labels are {labels.dtype}; they must be integers, counted from 0')
    labels = torch.from_numpy(labels).long()
    if images.ndim == 3:
        images = images[..., None]
    if classes is None:
        classes = range(int(labels.max()) + 1 if len(labels) else 0)
    return ImageSet(images, labels, tuple(each.decode() if isinstance(each, bytes) else str(each) for each in classes))


def _load_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not {'images', 'labels'} <= set(arrays):
                raise ValueError(f'it holds {sorted(arrays)}; images and labels are needed, classes may be')
            return _image_set(arrays['images'], arrays['labels'], arrays.get('classes'))
    except Exception as error:  # numpy raises whatever the broken part of the file leads to
        raise ValueError(f'{path} is not a readable image set: {error}') from None


def _load_torchvision(name: str, train: bool, root: Path, download: bool) -> ImageSet:
    from torchvision import datasets

    cls = {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100, 'mnist': datasets.MNIST}[name]
    try:
        data = cls(str(root), train=train, download=download)
    except (RuntimeError, AssertionError, ValueError, LookupError, EOFError, UnpicklingError) as error:
        reason = torchvision_reason(error)
        if 'not found' not in reason:  # a download that failed, or files of the right names
            raise OSError(
                f"{name} could not be read from torchvision's files in {root} ({reason}); if they are damaged, remove "
                'them and fetch them again with --download'
            ) from None
        raise OSError(
            f"no {name} in {root}: neither {name}_{'train' if train else 'test'}.npz nor torchvision's files, "
            f'which weighted-skip train and eval fetch with --download ({reason})'
        ) from None
    return _image_set(data.data, data.targets, data.classes)


def torchvision_reason(error: Exception) -> str:
    """What torchvision says is wrong with its files, without its advice to use an argument that no command here has."""
    said = str(error) or type(error).__name__
    return said.splitlines()[0].partition('. You can use download')[0]


def open_folder(root: Path, train: bool) -> ImageDataset:
    """timm's data set of `root/{train,validation}/<class>/<image>`, with the class numbers that its scripts use.

    Raises:
        OSError: There is no such folder, or no image in it.
    """
    names = FOLDERS['train' if train else 'test']
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise OSError(f'{root} has no folder {" or ".join(names)} of one folder of images per class')
    try:
        return create_dataset('', root=str(folder), search_split=False)
    except RuntimeError as error:
        raise OSError(f'{folder} is not a readable image folder: {error}') from None


def read_image(data: ImageDataset, index: int) -> tuple[Image.Image, int]:
    """An image and its class number, where indexing `data` gives the next image in place of one that can't be read.

    Raises:
        OSError: It is not a readable image of 8 bits.
    """
    stream, label = data.reader[index]
    try:
        with stream:
            image = Image.open(stream)
            if image.mode[0] in 'IF':  # of which Pillow would make white
                raise OSError(f'its pixels, of mode {image.mode}, have more than 8 bits; save it with 8')
            return image.convert('RGB'), label
    # Pillow raises the others for damaged PNGs and for images beyond all measure.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f'{data.filename(index, absolute=True)} is not a readable image: {error}') from None


def _load_folder(root: Path, train: bool) -> ImageSet:
    data, arrays, labels = open_folder(root, train), [], []
    for index in range(len(data)):
        image, label = read_image(data, index)
        arrays.append(np.asarray(image))
        labels.append(label)
    sizes = sorted({array.shape[:2] for array in arrays})
    if len(sizes) > 1:
        raise ValueError(
            f"{root} holds images of {len(sizes)} sizes, such as {sizes[0]} and {sizes[-1]}; this trainer's sets are "
            "of one size, timm's train.py takes any: python -m timm_weighted_skip.train"
        )
    return _image_set(np.stack(arrays), labels, data.reader.class_to_idx)


def _load_digits(train: bool) -> ImageSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn; install with: pip install 'timm-weighted-skip[analysis]'"
        ) from error

    digits = load_digits()
    part = slice(0, 1437) if train else slice(1437, None)  # the last fifth is the test
    images = (digits.images[part] * (255 / 16)).round().astype(np.uint8)
    return _image_set(images, digits.target[part], digits.target_names)


def load_image_set(
    data: str, train: bool, data_dir: Optional[Union[str, Path]] = None, download: bool = False
) -> ImageSet:
    """Load a whole image set into memory.

    Args:
        data: 'digits', scikit-learn's, needs no folder; 'folder', `data_dir/{train,validation}/<class>/<image>`; any
            other name NAME, `data_dir/NAME_{train,test}.npz` with `images`, `labels` and perhaps `classes`; and if
            there is none, torchvision's 'cifar10', 'cifar100' or 'mnist' in `data_dir`.
        train: The training split, else the test split.
        data_dir: The data's folder.
        download: Let torchvision fetch the set into `data_dir`.

    Raises:
        ValueError: The name is unknown, or what was read is no image set.
        OSError: There is nothing to read.
    """
    if data == 'digits':
        return _load_digits(train)
    if data_dir is None:
        raise ValueError(f'--data {data} needs --data-dir, the folder of its files')
    root = Path(data_dir)
    if data == 'folder':
        return _load_folder(root, train)
    npz = root / f'{data}_{"train" if train else "test"}.npz'
    if npz.exists():
        return _load_npz(npz)
    if data in FETCHED:
        return _load_torchvision(data, train, root, download)
    raise ValueError(f'--data {data!r} is unknown and {npz} is not there; choose one of {", ".join(SETS)}')
