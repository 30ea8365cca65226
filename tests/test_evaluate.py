"""Measuring a net on a set of images."""

from dataclasses import replace

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from timm_weighted_skip.checks import check_device
from timm_weighted_skip.data import ImageSet, load_image_set
from timm_weighted_skip.train.evaluate import evaluate_on


def test_images_too_small_for_the_net_are_refused():
    data = ImageSet(torch.zeros(10, 16, 16, 3, dtype=torch.uint8), torch.arange(10), tuple('abcdefghij'))
    with pytest.raises(ValueError, match='images of 16x16 pixels are too small; the net takes 28x28 and more'):
        evaluate_on(timm.create_model('adaresnet18_released'), data)


def test_loss_and_accuracies_are_means_over_the_images():
    net = timm.create_model('awm_resnet14_cifar.digits', pretrained=True).eval()
    data = load_image_set('digits', train=False)
    data = replace(data, images=data.images[:50], labels=data.labels[:50].roll(1))  # most of them wrong
    mean, std = (net.pretrained_cfg[name][0] for name in ('mean', 'std'))
    output = net(((data.images / 255 - mean) / std).permute(0, 3, 1, 2)).detach()
    best = output.topk(5).indices == data.labels[:, None]
    expected = {'loss': cross_entropy(output, data.labels).item(), 'top1': 100 * best[:, 0].double().mean().item()}
    expected['top5'] = 100 * best.sum().item() / 50
    measured = evaluate_on(net, data, batch_size=16)  # the last batch has two images
    assert measured == pytest.approx({'images': 50, **expected}, rel=1e-5)
    assert 0 < measured['top1'] < measured['top5']


def test_classes_in_another_order_than_the_nets_are_refused():
    net = timm.create_model('awm_resnet14_cifar.digits', pretrained=True)
    data = load_image_set('digits', train=False)
    names = net.pretrained_cfg['label_names']
    turned = replace(data, classes=tuple(reversed(names)))
    with pytest.raises(ValueError, match=rf'number 0 is {names[-1]!r}, and for the net {names[0]!r}'):
        evaluate_on(net, turned)
    expected = evaluate_on(net, data)
    assert evaluate_on(net, replace(data, classes=tuple('abcdefghij'))) == expected  # names that say nothing to the net


def test_a_device_without_float64_is_refused(monkeypatch):
    def empty_of_mps(*size, dtype=None, device=None):
        if dtype == torch.float64:
            raise TypeError('Cannot convert a MPS Tensor to float64 dtype. Please use float32 instead.')
        return torch.zeros(size, dtype=dtype)

    monkeypatch.setattr(torch, 'empty', empty_of_mps)
    with pytest.raises(ValueError, match=r"'mps' is not to be had \(.* to float64 dtype\); give cpu or cuda"):
        check_device('mps')
