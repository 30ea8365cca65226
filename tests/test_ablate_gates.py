"""`scripts/ablate_gates.py`: other weights in the gates' place, and nothing else."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import randomise

from timm_weighted_skip.analysis.units import mapping_units
from timm_weighted_skip.data import load_image_set
from timm_weighted_skip.nets import load_net
from timm_weighted_skip.train.evaluate import evaluate_on
from timm_weighted_skip.train.recipe import load_recipe

SCRIPTS = Path(__file__).resolve().parent.parent / 'scripts'
NAME = 'awm_resnet14_cifar.digits'


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import ablate_gates

    return ablate_gates


@pytest.mark.parametrize('name', ['awm_resnet14_cifar', 'awm_densenet22_bc_cifar'])
@torch.no_grad()
def test_held_gates_give_every_image_the_same_weights(script, name):
    net = randomise(timm.create_model(name)).eval()
    plain = timm.create_model(name, plain=True).eval()
    plain.load_state_dict(net.state_dict(), strict=False)
    for gate in script.gates(net).values():
        torch.nn.init.normal_(gate.fc2.weight)
    x = torch.randn(4, 3, 32, 32)
    before = net(x)
    with script.held(net, script.plain_weights(net)):
        assert torch.equal(net(x), plain(x))
    other = {name: torch.rand_like(lam) for name, lam in script.plain_weights(net).items()}
    with script.held(net, other):
        assert all(torch.allclose(unit.weight, other[unit.name].expand(4, -1)) for unit in mapping_units(net, x))
    assert torch.equal(net(x), before)
    assert not torch.allclose(plain(x), before)


@pytest.fixture
def digits(script):
    """The net of the package, an epoch's batches of what it was trained on, and its test images."""
    net, recipe = load_net(NAME), load_recipe('awm_cifar_short', batch_size=32, no_aug=True)
    train, test = (load_image_set('digits', train) for train in (True, False))
    return net, script.training_batches(net, train, recipe), test


def test_means_are_those_of_the_images(script, digits):
    net, batches, _ = digits
    lam = [unit.weight for unit in mapping_units(net, torch.cat([x for x, _ in batches.shuffled(0, 0)]))]
    means = script.mean_weights(net, batches)
    assert torch.allclose(torch.stack(list(means.values())).float(), torch.stack([unit.mean(0) for unit in lam]))


def test_the_table_begins_with_the_net_as_it_is(script, digits):
    net, _, test = digits
    torch.manual_seed(0)
    for gate in script.gates(net).values():
        torch.nn.init.normal_(gate.fc2.weight)  # its own hardly depend on the image
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    rows = script.ablate(*digits).rows
    assert [row[0] for row in rows] == ['inferred', 'mean', 'plain']
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert rows[0][1] == evaluate_on(net, test)['top1']
    assert rows[2][1] != rows[0][1]


@torch.no_grad()
def test_new_statistics_are_those_of_the_training_images(script, digits):
    net, batches, test = digits
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean += 3
    _, stored, new = script.ablate(net, batches, test).rows[0]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    net.train()
    for x, _ in batches.shuffled(seed=0, epoch=0):
        net(x)
    assert new == evaluate_on(net.eval(), test)['top1'] > stored


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('awm_resnet32_cifar', '--data', 'digits'), 'has no published weights; give --checkpoint FILE'),
        ((NAME, '--data', 'mnist', '--data-dir', 'nowhere'), 'no mnist in nowhere'),
        (('awm_resnet20_cifar.cifar10', '--data', 'digits'), '3 means and 3 deviations for images of 1 channels'),
    ],
)
def test_what_cannot_be_ablated_is_refused_in_a_line(script, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr('sys.argv', ['ablate_gates.py', *arguments, '--recipe', 'awm_cifar_short'])
    assert script.main() == 1
    err = capsys.readouterr().err
    assert err.startswith('ablate_gates: ')
    assert message in err


def test_an_adaresnet_has_no_gates(script, digits):
    with pytest.raises(ValueError, match='weights are not inferred; give an AWM net'):
        script.ablate(timm.create_model('adaresnet14_cifar', in_chans=1), *digits[1:])
