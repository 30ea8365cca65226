"""`scripts/ablate_gates.py`: other weights in the gates' place, and nothing else."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomise

from timm_weighted_skip import cli
from timm_weighted_skip.analysis.collect import collect
from timm_weighted_skip.analysis.data import load_images
from timm_weighted_skip.analysis.units import mapping_units
from timm_weighted_skip.nets import load_net

SCRIPTS = Path(__file__).resolve().parent.parent / 'scripts'
NAME = 'awm_resnet14_cifar.digits'


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import ablate_gates

    yield ablate_gates
    del sys.modules['ablate_gates']


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


def test_means_are_those_of_the_images(script):
    net = load_net(NAME)
    loader = load_images('digits', net).loader()
    collected = collect(net, loader)
    means = script.mean_weights(net, loader)
    assert [float(lam[0]) for lam in means.values()] == pytest.approx(collected.weights.mean(0))
    assert all(float(lam.sum()) == pytest.approx(1) for lam in means.values())


def test_the_table_begins_with_the_net_as_it_is(script, capsys):
    assert cli.main(['eval', NAME, '--data', 'digits']) == 0
    top1 = json.loads(capsys.readouterr().out)['top1']
    net = load_net(NAME)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    loaders = [load_images('digits', net, split=split).loader() for split in ('train', 'validation')]
    rows = script.ablate(net, *loaders).rows
    assert [row[0] for row in rows] == ['inferred', 'mean', 'plain']
    assert rows[0][1] == pytest.approx(top1)
    assert rows[2][1] != rows[0][1]
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            ('awm_resnet32_cifar', '--data', 'digits'),
            'has no published weights; give --checkpoint FILE',
        ),
        ((NAME, '--data', 'mnist', '--data-dir', 'nowhere'), "no images of 'mnist'"),
        (('adaresnet20_cifar.cifar10', '--data', 'digits'), 'weights are not inferred; give an AWM net'),
    ],
)
def test_what_cannot_be_ablated_is_refused_in_a_line(script, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr('sys.argv', ['ablate_gates.py', *arguments])
    assert script.main() == 1
    err = capsys.readouterr().err
    assert err.startswith('ablate_gates: ')
    assert message in err
