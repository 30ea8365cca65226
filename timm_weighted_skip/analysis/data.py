"""Labelled images to read a net's weights on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_weighted_skip.checks import check_classes, check_input_size, input_channels
from timm_weighted_skip.data import FETCHED, ImageSet, load_image_set, open_folder, read_image, torchvision_reason

__all__ = ['LabelledImages', 'load_images']


@dataclass
class LabelledImages(Dataset):
    """Images as the net takes them.

    Attributes:
        source: Pairs of a PIL image and its class number.
        classes: Names in the order of the numbers.
        transform: From PIL image to tensor.
        mode: PIL's, 'RGB' or 'L'.
    """

    source: Sequence[tuple[Image.Image, int]]
    classes: list[str]
    transform: Callable[[Image.Image], torch.Tensor]
    mode: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.source[index]
        return self.transform(image.convert(self.mode)), label

    def picture(self, index: int) -> Image.Image:
        """The image as it is."""
        return self.source[index][0]

    def loader(self, batch_size: int = 128, workers: int = 0) -> DataLoader:
        """In order, the last batch included."""
        return DataLoader(self, batch_size, num_workers=workers)


class _Pictures:
    """The images of a set held in memory as pairs of a PIL image and its label."""

    def __init__(self, data: ImageSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = self.data.images[index].numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), int(self.data.labels[index])


class _Files:
    """The images of a data set of timm's as pairs of a PIL image and its label; one that can't be read is an error."""

    def __init__(self, data: ImageDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.data, index)


def load_images(
    name: str,
    model: nn.Module,
    data_dir: Optional[Union[str, Path]] = None,
    split: str = 'validation',
    **data_args: Any,
) -> LabelledImages:
    """The images of a set, made ready for `model` as timm evaluates it.

    Args:
        name: 'digits', scikit-learn's; 'folder', `data_dir/{train,validation}/<class>/<image>`; NAME for
            `data_dir/NAME_{train,test}.npz` with arrays `images`, `labels` and perhaps `classes`, or else torchvision's
            data set in `data_dir`; or a name of timm's `create_dataset`, such as `hfds/ILSVRC/imagenet-1k`.
        model: Tells input size, normalisation and number of classes.
        data_dir: Where the data lies.
        split: 'train', or timm's names for the rest.
        data_args: Overrides of timm's data config: `input_size`, `mean`, `std`.

    Raises:
        ValueError: There are no images, their classes are not the net's, or name, shape, size or channels
            are wrong.
        OSError: There is no such file or folder. Reading an image raises it too, if its file is damaged.
    """
    train = split in ('train', 'training')
    npz = Path(data_dir or '.', f'{name}_{"train" if train else "test"}.npz')
    source: Any
    if name in ('digits', *FETCHED) or npz.is_file() or (data_dir is None and '/' not in name):
        data = load_image_set(name, train, data_dir)
        source, classes = _Pictures(data), list(data.classes)
    elif name == 'folder':
        source = open_folder(Path(data_dir or '.'), train)
        classes = _class_names(source)
    else:
        dataset = name if '/' in name else f'torch/{name}'
        try:
            source = create_dataset(dataset, root=str(data_dir) if data_dir else None, split=split)
        except (RuntimeError, AssertionError) as error:
            raise OSError(
                f'no images of {name!r}, split {split!r}, in {data_dir}: no {npz.name}, and {torchvision_reason(error)}'
            ) from error
        except TypeError:
            if data_dir is not None:
                raise
            raise ValueError(f'--data {name} needs --data-dir, the folder of its files') from None
        if isinstance(source, IterableDataset):
            raise ValueError(f'{name!r} is a stream; give a data set whose images have numbers')
        classes = _class_names(source)
        if not classes:
            raise ValueError(f'{name!r} does not name its classes; give a data set that does')
    if not len(source):
        raise ValueError(f'{name!r}, split {split!r}, has no images')
    check_classes(model, classes)
    if isinstance(source, ImageDataset):
        source = _Files(source)
    return LabelledImages(source, classes, *_transform(model, data_args))


def _class_names(source: Any) -> list[str]:
    """The names that one of timm's or torchvision's data sets gives its classes; of several for one, all."""
    names: Any = getattr(source, 'classes', None) or getattr(getattr(source, 'reader', None), 'class_to_idx', ())
    return [name if isinstance(name, str) else ', '.join(name) for name in names]


def _transform(model: nn.Module, data_args: dict[str, Any]) -> tuple[Callable[[Image.Image], torch.Tensor], str]:
    """timm's evaluation transform for `model`, and PIL's mode of its images."""
    cfg: Any = getattr(model, 'pretrained_cfg', {})
    channels = input_channels(model)
    if channels not in (1, 3):
        raise ValueError(f'the net takes images of {channels} channels; give one of 1 or 3, as pictures have')
    given = {name: value for name, value in data_args.items() if value is not None}
    given.setdefault('input_size', (channels, *(cfg.get('test_input_size') or cfg['input_size'])[1:]))
    if given['input_size'][0] != channels:
        raise ValueError(
            f'the net takes {channels} channel(s), and input_size has {given["input_size"][0]}; give {channels} H W'
        )
    for name in ('mean', 'std'):
        value = given.get(name) or cfg[name]
        if len(value) != channels:
            raise ValueError(
                f'the net takes {channels} channel(s), and {name} has {len(value)} value(s); '
                'give --mean and --std as it was trained'
            )
    config = resolve_data_config(given, model=model, use_test_size=True)
    check_input_size(model, *config['input_size'][1:])
    return create_transform(**config), 'L' if channels == 1 else 'RGB'
