"""Parameters and multiply-accumulates of every registered name against counts worked out by hand.

The counts below follow the papers' descriptions, layer by layer, and share nothing with the code that builds the nets.
"""

import math

import pytest
import timm
import torch

from timm_weighted_skip.analysis.listing import model_cost
from timm_weighted_skip.costs import count_costs
from timm_weighted_skip.hub import save_checkpoint
from timm_weighted_skip.models.names import model_names

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Count:
    """Adds up weights and multiply-accumulates."""

    def __init__(self):
        self.params = self.macs = 0

    def conv(self, cin, cout, kernel, size, bias=False, norm=True):
        weights = cin * cout * kernel * kernel
        self.params += weights + cout * bias + 2 * cout * norm
        self.macs += weights * size * size

    def norm(self, channels):
        self.params += 2 * channels

    def linear(self, cin, cout, bias=True):
        self.params += cin * cout + cout * bias
        self.macs += cin * cout

    def gate(self, channels, hidden, paths):
        self.linear(channels, hidden, bias=False)
        self.linear(hidden, paths, bias=False)


def resnet(blocks, widths, size, stem, strides, classes, expansion=1, bias=False, merge=lambda count, width: None):
    """A residual net whose stem leaves maps of `size` pixels; `stem` is (kernel, width, its own output size)."""
    count, (kernel, cin, stem_size) = Count(), stem
    count.conv(3, cin, kernel, stem_size, bias)
    for n, width, stride in zip(blocks, widths, strides):
        for i in range(n):
            before, cout = size, width * expansion
            size = math.ceil(size / stride) if i == 0 else size
            if expansion == 1:
                count.conv(cin, width, 3, size, bias)
                count.conv(width, width, 3, size, bias)
            else:
                count.conv(cin, width, 1, before)
                count.conv(width, width, 3, size)
                count.conv(width, cout, 1, size)
            if i == 0 and (stride > 1 or cin != cout):
                count.conv(cin, cout, 1, size, bias)
            merge(count, cout)
            cin = cout
    count.linear(cin, classes)
    return count


def densenet(n_layers, growth, stem, size, classes, gates):
    """A DenseNet-BC whose stem leaves maps of `size` pixels; `stem` is (kernel, output size, has a norm)."""
    count, channels = Count(), 2 * growth
    count.conv(3, channels, stem[0], stem[1], norm=stem[2])
    for block, n in enumerate(n_layers):
        for layer in range(n):
            if gates and layer:
                count.gate(channels, 24, layer + 1)
            count.norm(channels)
            count.conv(channels, 4 * growth, 1, size)
            count.conv(4 * growth, growth, 3, size, norm=False)
            channels += growth
        if gates:
            count.gate(channels, 24, n + 1)
        count.norm(channels)
        if block < len(n_layers) - 1:
            count.conv(channels, channels // 2, 1, size, norm=False)
            channels, size = channels // 2, size // 2
    count.linear(channels, classes)
    return count


def merge_of(name):
    if name.startswith('awm'):
        return lambda count, width: count.gate(2 * width, 16, 2)
    if name.startswith('ada'):
        return lambda count, width: setattr(count, 'params', count.params + 1)
    return lambda count, width: None


def by_hand(name):
    if name == 'awm_densenet121':
        return densenet((6, 12, 24, 16), 32, (7, 112, True), 56, 1000, gates=True)
    digits = ''.join(filter(str.isdigit, name)) or '40'  # awm_densenet_bc is depth 40
    depth = int(digits)
    if 'densenet' in name:
        return densenet(((depth - 4) // 6,) * 3, 12, (3, 32, False), 32, 10, gates=name.startswith('awm'))
    if name.endswith('_cifar'):
        return resnet(((depth - 2) // 6,) * 3, (16, 32, 64), 32, (3, 16, 32), (1, 2, 2), 10, merge=merge_of(name))
    if name.endswith('_released'):
        stem, widths = (7, 64, 16), (64, 128, 256, 512)
        return resnet((2,) * 4, widths, 8, stem, (2, 2, 2, 2), 10, bias=True, merge=merge_of(name))
    stem, expansion, widths = (7, 64, 112), 4 if depth >= 50 else 1, (64, 128, 256, 512)
    return resnet(BLOCKS[depth], widths, 56, stem, (1, 2, 2, 2), 1000, expansion, merge=merge_of(name))


@pytest.mark.parametrize('name', model_names())
def test_parameters_and_macs(name):
    expected, cost = by_hand(name), model_cost(name)
    assert (cost.params, cost.macs) == (expected.params, expected.macs)


@pytest.mark.parametrize(
    ('name', 'params'),
    [('resnet110_cifar', 1_730_714), ('awm_resnet110_cifar', 1_730_714 + 66_240), ('densenet40_bc_cifar', 176_122)],
)
def test_published_parameter_counts(name, params):
    assert model_cost(name).params == params


@pytest.mark.parametrize(('depth', 'units'), [(14, 6), (20, 9), (32, 15), (44, 21), (56, 27), (110, 54)])
def test_number_of_mapping_units_is_table_1s(depth, units):
    assert model_cost(f'awm_resnet{depth}_cifar').units == model_cost(f'adaresnet{depth}_cifar').units == units


def test_a_card_counts_as_the_list_does(tmp_path):
    """The released net computes its first projection in a cheaper way on a CPU, which is no other net."""
    name = 'adaresnet18_released'
    folder = save_checkpoint(timm.create_model(name), tmp_path / 'net')
    assert f'GMACs: {model_cost(name).macs / 1e9:.3f}' in (folder / 'README.md').read_text()


def test_counting_leaves_nothing_on_a_net_that_fails():
    model = timm.create_model('awm_resnet14_cifar')
    with pytest.raises(RuntimeError):
        count_costs(model, torch.randn(1, 4, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize('name', ['pit_ti_224', 'coat_tiny'])
def test_nets_that_widen_a_parameter_are_counted(name):
    with torch.device('meta'):
        costs = count_costs(timm.create_model(name).eval(), torch.zeros(1, 3, 224, 224))
    assert costs.macs > costs.params > 0
