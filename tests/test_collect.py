"""Streaming an AWM net's weights over a data set."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_weighted_skip import mapping_units
from timm_weighted_skip.analysis.collect import DRAWS, collect
from timm_weighted_skip.layers import Gate


def net_and_loader(name='awm_resnet14_cifar', images=10, batch_size=4):
    torch.manual_seed(0)
    net = timm.create_model(name)
    for module in net.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module.fc2.weight)
    data = TensorDataset(torch.randn(images, 3, 8, 8), torch.arange(images) % 10)
    return net.eval(), DataLoader(data, batch_size, generator=torch.Generator())  # not torch's own


def test_weights_are_those_of_mapping_units_in_order_of_the_images():
    net, loader = net_and_loader()
    got = collect(net, loader)
    units = mapping_units(net, loader.dataset.tensors[0])
    assert got.units == [unit.name for unit in units]
    assert got.kinds == [unit.kind for unit in units]
    np.testing.assert_allclose(got.weights, torch.stack([unit.weight[:, 0] for unit in units], 1), atol=1e-6)
    assert (got.identity == 0.5).all()
    assert got.labels.tolist() == loader.dataset.tensors[1].tolist()
    with torch.no_grad():
        assert got.predictions.tolist() == net(loader.dataset.tensors[0]).argmax(1).tolist()


def test_a_dense_net_has_a_column_per_connection_and_they_sum_to_one():
    got = collect(*net_and_loader('awm_densenet22_bc_cifar'))
    reads = {unit.split('[')[0] for unit in got.units}
    assert len(reads) == 9
    np.testing.assert_allclose(got.weights.sum(1), 9, rtol=1e-5)
    np.testing.assert_allclose(got.identity.sum(), 9)
    assert got.units[:2] == [f'features.denseblock1.denselayer2[{k}]' for k in range(2)]


@pytest.mark.parametrize('in_place', [False, True])
def test_a_net_that_was_compiled_and_run_before(in_place):
    net, loader = net_and_loader()
    expected = collect(net, loader).weights
    if in_place:
        net.compile(backend='eager')
    compiled = net if in_place else torch.compile(net, backend='eager')
    compiled(loader.dataset.tensors[0][:4])
    np.testing.assert_array_equal(collect(compiled, loader).weights, expected)


def test_collecting_changes_neither_the_net_nor_torchs_random_numbers():
    net, loader = net_and_loader()
    net.train()
    net.layer1.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes, random = [module.training for module in net.modules()], torch.get_rng_state()
    collect(net, loader, controls=True)
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_controls_are_read_beside_the_weights():
    net, loader = net_and_loader()
    plain, got = collect(net, loader), collect(net, loader, controls=True)
    x = loader.dataset.tensors[0]
    np.testing.assert_array_equal(got.weights, plain.weights)
    np.testing.assert_array_equal(got.controls['pixels'], x.flatten(1))
    large = x.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :40]  # of (64, 40) pixels
    batches = DataLoader(TensorDataset(large, torch.zeros(len(x))), batch_size=5)
    assert collect(net, batches, controls=True).controls['pixels'].shape == (len(x), 3 * 32 * 32)
    with torch.no_grad():
        features = net.forward_head(net.forward_features(x), pre_logits=True)
    np.testing.assert_allclose(got.controls['features'], features, atol=1e-5)
    random = got.controls['random gates']
    images, units = got.weights.shape
    assert random.shape == (images, DRAWS, units)
    assert np.abs(random - got.weights[:, None]).max() > 0.01
    assert random.std(0).min() > 0
    assert random.std(1).min() > 0
    np.testing.assert_array_equal(collect(net, loader, controls=True).controls['random gates'], random)
    assert not np.array_equal(collect(net, loader, controls=True, seed=1).controls['random gates'], random)


def test_what_is_kept_of_a_batch_is_its_row_of_results():
    """No tensor of an earlier batch is alive when a later one is asked for."""
    import gc
    import weakref

    net, loader = net_and_loader(images=12)
    seen: list[weakref.ref] = []

    class Watching:
        dataset = loader.dataset

        def __iter__(self):
            for x, labels in loader:
                gc.collect()
                alive = [ref for ref in seen[:-1] if ref() is not None]
                assert not alive
                seen.append(weakref.ref(x))
                yield x, labels

    collect(net, Watching())
    assert len(seen) == 3


def test_refusals():
    net, loader = net_and_loader()
    with pytest.raises(ValueError, match='do not depend on the image'):
        collect(timm.create_model('adaresnet14_cifar'), loader)
    with pytest.raises(ValueError, match='no weighted mapping units'):
        collect(timm.create_model('resnet14_cifar'), loader)
    with pytest.raises(ValueError, match='no images'):
        collect(net, DataLoader(TensorDataset(torch.empty(0, 3, 8, 8), torch.empty(0))))
    nn.init.constant_(net.layer3[0].merge.gate.fc2.weight, float('nan'))
    with pytest.raises(ValueError, match=r'mapping units are NaN: layer3\.0'):
        collect(net, loader)
