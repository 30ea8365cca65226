"""Measuring a net on a set of images."""

from dataclasses import replace

import pytest
import timm
import torch

from timm_weighted_skip.data import ImageSet, load_image_set
from timm_weighted_skip.train.evaluate import evaluate_on


def test_images_too_small_for_the_net_are_refused():
    data = ImageSet(torch.zeros(10, 16, 16, 3, dtype=torch.uint8), torch.arange(10), tuple('abcdefghij'))
    with pytest.raises(ValueError, match='images of 16x16 pixels are too small; the net takes 28x28 and more'):
        evaluate_on(timm.create_model('adaresnet18_released'), data)


def test_classes_in_another_order_than_the_nets_are_refused():
    net = timm.create_model('awm_resnet14_cifar.digits', pretrained=True)
    data = load_image_set('digits', train=False)
    names = net.pretrained_cfg['label_names']
    turned = replace(data, classes=tuple(reversed(names)))
    with pytest.raises(ValueError, match=rf'number 0 is {names[-1]!r}, and for the net {names[0]!r}'):
        evaluate_on(net, turned)
    expected = evaluate_on(net, data)
    assert evaluate_on(net, replace(data, classes=tuple('abcdefghij'))) == expected  # names that say nothing to the net
