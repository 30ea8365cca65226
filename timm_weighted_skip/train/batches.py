"""Batches of an image set held in memory, augmented on the device.

Shapes: N images, B of a batch, H x W pixels, C channels.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Union

import torch

from timm_weighted_skip.data import ImageSet

__all__ = ['Batches', 'mix_seed']


def mix_seed(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch of every run, in the 32 bits that torch's CPU generator takes of one."""
    return (seed * 1_000_003 + epoch) % 2**32


class Batches:
    """Batches of an image set on the device, normalised: `(x, labels)` with x float32 (B, C, H, W).

    Padding, cropping, flipping and normalising are those of torchvision's `RandomCrop(H, padding)`,
    `RandomHorizontalFlip`, `ToTensor` and `Normalize`, for the whole batch in one gather. What is drawn depends on
    seed and epoch alone, so an epoch can be taken up at any batch.

    Args:
        data: The images.
        batch_size: B.
        mean, std: Per channel, of pixels in [0, 1].
        device: Where images and batches live.
        pad_crop: Pixels of black that are added at each side before cropping back to H x W.
        hflip: Probability of mirroring left to right.
        channels_last: Memory layout of x.

    Raises:
        ValueError: Means do not fit the channels.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: Union[str, torch.device] = 'cpu',
        pad_crop: int = 0,
        hflip: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        _, self.height, self.width, channels = data.images.shape
        if not len(mean) == len(std) == channels:
            raise ValueError(f'{len(mean)} means and {len(std)} deviations for images of {channels} channels')
        self.batch_size, self.pad_crop, self.hflip, self.channels_last = batch_size, pad_crop, hflip, channels_last
        padding = (0, 0, pad_crop, pad_crop, pad_crop, pad_crop)
        self.images = torch.nn.functional.pad(data.images, padding).to(device)
        self.labels = data.labels.to(device)
        self.classes = data.classes
        deviation = torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * deviation)).float().to(device)
        self.shift = (-torch.tensor(mean, dtype=torch.float64) / deviation).float().to(device)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def _take(self, index, top, left, flip) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.images.device
        rows = top[:, None] + torch.arange(self.height, device=device)  # (B, H)
        columns = torch.arange(self.width, device=device)
        columns = left[:, None] + torch.where(flip[:, None], self.width - 1 - columns, columns)  # (B, W)
        x = self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
        x = (x.float().mul_(self.scale).add_(self.shift)).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x if self.channels_last else x.contiguous(), self.labels[index]

    def in_order(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every image once, as it is; the last batch may be smaller."""
        for index in torch.arange(len(self), device=self.images.device).split(self.batch_size):
            centre = torch.full_like(index, self.pad_crop)
            yield self._take(index, centre, centre, torch.zeros_like(index, dtype=torch.bool))

    def whole(self) -> int:
        """Number of an epoch's whole batches.

        Raises:
            ValueError: A batch has more images than there are.
        """
        if self.batch_size > len(self):
            raise ValueError(f'a batch of {self.batch_size} from {len(self)} images; give a smaller --batch-size')
        return len(self) // self.batch_size

    def shuffled(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The epoch's whole batches from number `start` on, shuffled and augmented; the few images over are left out.

        Raises:
            ValueError: As `whole`.
        """
        whole = self.whole()
        generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
        drawn = (
            torch.randperm(len(self), generator=generator),
            *torch.randint(2 * self.pad_crop + 1, (2, len(self)), generator=generator),
            torch.rand(len(self), generator=generator) < self.hflip,
        )
        batches = zip(*(values.to(self.images.device).split(self.batch_size) for values in drawn))
        for batch in islice(batches, start, whole):
            yield self._take(*batch)
