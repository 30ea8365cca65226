"""Loss and accuracies of a net on a set of images."""

from typing import Any, Optional

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from timm_weighted_skip.checks import check_classes, check_count, check_device, check_input_size, input_channels
from timm_weighted_skip.data import ImageSet
from timm_weighted_skip.train.batches import Batches

__all__ = ['evaluate', 'evaluate_on']


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Batches, amp: bool = False, net: Optional[nn.Module] = None
) -> dict[str, float]:
    """Loss and accuracies in % over all images.

    Args:
        model: Called in eval mode.
        batches: The images.
        amp: bfloat16 autocast.
        net: What to call for a batch of another size than the others, where `model` is compiled for one.

    Raises:
        ValueError: The loss is not finite.
    """
    model.eval()
    loss = correct = correct5 = torch.zeros((), dtype=torch.float64, device=batches.labels.device)
    for x, labels in batches.in_order():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            output = (model if len(x) == batches.batch_size else net or model)(x)
        output = output.float()
        loss = loss + cross_entropy(output, labels, reduction='sum')
        hits = output.topk(min(5, output.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        correct, correct5 = correct + hits[:, 0].sum(), correct5 + hits.sum()
    if not loss.isfinite():
        raise ValueError(f'the test loss is {loss}: the weights hold or lead to numbers that are not finite')
    count = len(batches)
    return {'loss': float(loss) / count, 'top1': 100 * float(correct) / count, 'top5': 100 * float(correct5) / count}


def evaluate_on(
    net: nn.Module, data: ImageSet, batch_size: int = 256, device: str = 'cpu', amp: bool = False
) -> dict[str, Any]:
    """Number of images, loss and accuracies of a trained net on a set of images, as they are.

    Args:
        net: Its `pretrained_cfg` tells the normalisation. It stays on `device`, in eval mode and channels last.
        data: The images.
        batch_size: Images per batch.
        device: Where to run.
        amp: bfloat16 autocast.

    Raises:
        ValueError: The net is of other classes or another number of channels, the images are too small for it, or its
            loss is not finite.
    """
    check_device(device)
    check_count('batch_size', batch_size)
    check_classes(net, data.classes)
    config: Any = net.pretrained_cfg
    takes, channels = input_channels(net), data.images.shape[3]
    if not takes == channels == len(config['mean']):
        raise ValueError(
            f'the net takes images of {takes} channels, with {len(config["mean"])} pixel means; those of the data have '
            f'{channels}; give a net that was trained on such images'
        )
    check_input_size(net, *data.images.shape[1:3])
    batches = Batches(data, batch_size, config['mean'], config['std'], device, channels_last=True)
    net = net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {'images': len(data.labels), **evaluate(net, batches, amp)}
