"""The merges: their equations, their gradients, and what holds at identity."""

import copy
import io
from functools import partial

import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch._subclasses import FakeTensorMode

from timm_weighted_skip.layers import ActiveWeightedConcat, ActiveWeightedMapping, Gate, SkipWeight, skip_weights

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def maps(n=3, c=4, dtype=torch.float64, requires_grad=False):
    """A residual branch's and a shortcut's output, (N, C, 5, 6)."""
    return [torch.randn(n, c, 5, 6, dtype=dtype).requires_grad_(requires_grad) for _ in range(2)]


def trained(layer: nn.Module) -> nn.Module:
    """Give a gate weights away from their start, so that every image gets its own."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def paper_lam(gate: Gate, z: torch.Tensor) -> torch.Tensor:
    """Section 3.1 to the letter: sigmoids over their sum."""
    p = torch.sigmoid(torch.relu(z @ gate.fc1.weight.T) @ gate.fc2.weight.T)
    return p / p.sum(1, keepdim=True)


@pytest.mark.parametrize('dtype', DTYPES)
def test_fresh_mapping_is_the_plain_sum_to_the_bit(dtype):
    residual, shortcut = maps(dtype=dtype)
    assert torch.equal(ActiveWeightedMapping(4, dtype=dtype)(residual, shortcut), residual + shortcut)


def test_parameters_that_are_reset_are_those_of_a_fresh_mapping():
    layer = trained(ActiveWeightedMapping(4))
    layer.apply(lambda module: module.reset_parameters() if hasattr(module, 'reset_parameters') else None)
    residual, shortcut = maps(dtype=torch.float32)
    assert torch.equal(layer(residual, shortcut), residual + shortcut)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('units', [2, 3, 7, 25, 49])
def test_fresh_concat_passes_through_to_the_bit(units, dtype):
    x = torch.randn(2, 3 * units, 4, 4, dtype=dtype)
    assert torch.equal(ActiveWeightedConcat([3] * units, dtype=dtype)(x), x)


@pytest.mark.parametrize('scale', [1.0, 2.0])
def test_mapping_computes_the_papers_equation(scale):
    residual, shortcut = maps()
    layer = trained(ActiveWeightedMapping(4, hidden=5, scale=scale, dtype=torch.float64))
    lam = paper_lam(layer.gate, torch.cat([residual.mean((2, 3)), shortcut.mean((2, 3))], 1))[:, :, None, None, None]
    torch.testing.assert_close(layer(residual, shortcut), scale * (lam[:, 0] * residual + lam[:, 1] * shortcut))


@pytest.mark.parametrize(('scale', 'factor'), [('units', 3), ('paper', 1)])
def test_concat_scales_every_unit_by_its_own_weight(scale, factor):
    widths = [6, 2, 2]
    x = torch.randn(3, 10, 4, 4, dtype=torch.float64)
    layer = trained(ActiveWeightedConcat(widths, hidden=5, scale=scale, dtype=torch.float64))
    lam = paper_lam(layer.gate, x.mean((2, 3)))
    for k, (unit, weighted) in enumerate(zip(x.split(widths, 1), layer(x).split(widths, 1))):
        torch.testing.assert_close(weighted, factor * lam[:, k, None, None, None] * unit)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('paths', [2, 5])
def test_gate_is_finite_and_normalised_at_any_logits(paths, dtype):
    gate = Gate(paths, 2 * paths, paths, dtype=dtype)
    identity = torch.eye(paths, dtype=dtype)
    gate.fc1.weight.data = torch.cat([identity, -identity])  # with this the logits are z itself
    gate.fc2.weight.data = torch.cat([identity, -identity], dim=1)
    for large in (30.0, torch.finfo(dtype).max):
        rows = [[large] * paths, [-large] * paths, [-large, large] + [0.0] * (paths - 2)]
        lam = gate(torch.tensor(rows, dtype=dtype))
        assert lam.isfinite().all()
        assert lam[2, 0] == 0 or large == 30
        torch.testing.assert_close(lam.double().sum(1), torch.ones(3).double(), atol=4 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize(
    'layer',
    [
        SkipWeight(0.3, dtype=torch.float64),
        SkipWeight(2.0, fixed=True, dtype=torch.float64),
        ActiveWeightedMapping(4, hidden=3, dtype=torch.float64),
        trained(ActiveWeightedMapping(4, hidden=3, dtype=torch.float64)),
    ],
    ids=['skip', 'fixed', 'fresh gate', 'trained gate'],
)
def test_gradients_of_the_two_path_merges(layer):
    names, values = zip(*layer.named_parameters()) if any(True for _ in layer.parameters()) else ((), ())

    def merge(residual, shortcut, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (residual, shortcut))

    assert torch.autograd.gradcheck(merge, (*maps(requires_grad=True), *values))


def test_gradients_of_the_concat():
    layer = trained(ActiveWeightedConcat([3, 1, 2], hidden=3, dtype=torch.float64))
    names, values = zip(*layer.named_parameters())
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p)), (x,)), (x, *values)
    )


def test_skip_weight_gradient_is_the_papers():
    residual, shortcut = maps()
    layer = SkipWeight(0.7, dtype=torch.float64)
    y = layer(residual, shortcut)
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(layer.weight.grad, (g * shortcut).sum())


@pytest.mark.parametrize(
    'layer', [SkipWeight(0.0, plain=True), ActiveWeightedMapping(4, plain=True)], ids=['skip', 'mapping']
)
def test_plain_two_path_merges_are_the_sum_without_parameters(layer):
    residual, shortcut = maps()
    assert torch.equal(layer(residual, shortcut), residual + shortcut)
    assert not layer.state_dict()


def test_plain_concat_is_the_identity_without_parameters():
    x = torch.randn(1, 5, 2, 2)
    layer = ActiveWeightedConcat([2, 3], plain=True)
    assert torch.equal(layer(x), x)
    assert not layer.state_dict()


@pytest.mark.parametrize(('sharing', 'distinct'), [('block', 4), ('kind', 2), ('unified', 1)])
@pytest.mark.parametrize('fixed', [False, True])
def test_sharing_gives_units_the_same_weight(sharing, distinct, fixed):
    def build():
        make = skip_weights(sharing, init=0.5, fixed=fixed)
        return nn.ModuleList(make(8, projection) for projection in (True, False, True, False))

    net = build()
    with torch.device('meta'):
        empty = build()
    state = {name: entry.clone() for name, entry in net.state_dict().items()}
    empty.to_empty(device='cpu').load_state_dict(state, assign=True)
    pickled = io.BytesIO()
    torch.save(net, pickled)
    pickled.seek(0)
    loaded = torch.load(pickled, weights_only=False)
    for units in (net, empty, loaded, copy.deepcopy(net), copy.deepcopy(net).double()):
        assert [unit.weight.item() for unit in units] == [0.5] * 4
        assert len({id(unit.weight) for unit in units}) == distinct
        assert len(list(units.parameters())) == (0 if fixed else distinct)
        if sharing == 'kind':
            assert units[0].weight is units[2].weight


@pytest.mark.parametrize('fixed', [False, True])
def test_a_functional_call_leaves_shared_weights_as_they_were(fixed):
    make = skip_weights('unified', init=0.5, fixed=fixed)
    net = nn.Sequential(*(nn.ModuleDict({'merge': make(8, False)}) for _ in range(3)))
    net.forward = lambda x: sum(unit['merge'](x, x) for unit in net)
    weight, x = net[0]['merge'].weight, torch.ones(())
    assert torch.func.functional_call(net, {'0.merge.weight': torch.tensor(9.0)}, x) == 30
    assert torch.func.grad(lambda w: torch.func.functional_call(net, {'0.merge.weight': w}, x))(torch.tensor(9.0)) == 3
    assert all(unit['merge'].weight is weight for unit in net)
    assert net(x) == 4.5


def test_normal_start_closes_identity_units_and_draws_projections():
    make = skip_weights('kind', init='normal')
    projection, identity = make(8, True), make(8, False)
    assert projection.weight != 0
    assert identity.weight == 0
    assert skip_weights('unified', init='normal')(8, False).weight != 0  # it is the projections', too
    torch.manual_seed(0)
    draws = torch.stack([skip_weights(init='normal')(8, True).weight.detach() for _ in range(500)])
    assert draws.std().item() == pytest.approx(0.05, rel=0.1)


def test_fixed_weight_is_no_parameter_but_in_the_state_dict():
    layer = SkipWeight(2.0, fixed=True)
    assert not list(layer.parameters())
    assert layer.state_dict()['weight'] == 2


def test_shared_weight_is_stored_once_per_unit_and_never_as_shared_memory():
    make = skip_weights('unified', init=0.5)
    net = nn.Sequential(*(nn.ModuleDict({'merge': make(8, False)}) for _ in range(3)))
    state = net.state_dict()
    assert len(state) == 3
    save(state)  # raises where tensors share memory
    state['0.merge.weight'].fill_(7.0)  # the first entry is the weight itself, as in any state dict
    assert net[2]['merge'].weight == 7
    net.load_state_dict({name: torch.tensor(3.0) for name in state})
    assert net[1]['merge'].weight == 3


@pytest.mark.parametrize('fixed', [False, True])
def test_a_unit_that_is_given_a_weight_of_its_own_keeps_it(fixed):
    make = skip_weights('unified', init=0.5, fixed=fixed)
    net = nn.ModuleList(make(8, False) for _ in range(3))
    own = torch.tensor(2.0)
    net[0].weight = own if fixed else nn.Parameter(own)
    net.double()
    assert [unit.weight.item() for unit in net] == [2, 0.5, 0.5]
    assert net[0].weight is not net[1].weight is net[2].weight
    net.load_state_dict({'0.weight': torch.tensor(4.0), '1.weight': torch.tensor(3.0), '2.weight': torch.tensor(3.0)})
    assert [unit.weight.item() for unit in net] == [4, 3, 3]


def test_weights_in_one_flat_tensor_are_not_shared():
    net = nn.Sequential(SkipWeight(0.5), SkipWeight(0.5))
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(flat, net.parameters())
    for entry in net.state_dict().values():
        entry.fill_(7.0)
    assert (net[0].weight, net[1].weight) == (7, 7)


def test_state_dict_beside_entries_that_are_no_plain_tensors():
    class Counting(nn.Module):
        def get_extra_state(self):
            return {'steps': 1}

    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    state = nn.Sequential(Counting(), sparse, SkipWeight(0.5)).state_dict()
    assert (state['0._extra_state'], state['2.weight']) == ({'steps': 1}, 0.5)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: ActiveWeightedMapping(4, hidden=-1), r'hidden=-1 is not allowed; give a whole number'),
        (lambda: ActiveWeightedMapping(4, hidden=1.5), r'hidden=1.5 is not allowed'),
        (lambda: ActiveWeightedMapping(4, scale=0), r'scale=0 is not allowed; give a finite number other than 0'),
        (lambda: ActiveWeightedMapping(4, scale=float('nan')), r'scale=nan is not allowed'),
        (lambda: ActiveWeightedConcat([2, 2], scale=2.0), r"scale=2.0 is not allowed; choose one of 'units', 'paper'"),
        (lambda: SkipWeight('uniform'), r"skip_init='uniform' is not allowed; give a finite number or 'normal'"),
        (lambda: skip_weights('layer'), r"sharing='layer' is not allowed; choose one of 'block', 'kind', 'unified'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.skipif(torch.__version__ < '2.10', reason='fake tensors of a GPU abort without one')
@pytest.mark.parametrize('make', [partial(SkipWeight, 0.5), partial(ActiveWeightedMapping, 4)])
def test_half_precision_maps_stay_so_under_autocast(make, request):
    """`addcmul` gives the widest of its inputs' types under CUDA's autocast, which fake tensors tell without a GPU."""
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    torch.set_autocast_enabled('cuda', True)
    request.addfinalizer(partial(torch.set_autocast_enabled, 'cuda', False))
    with FakeTensorMode():
        maps = torch.empty(2, 4, 3, 3, device='cuda', dtype=torch.bfloat16)
        assert make(device='cuda')(maps, maps).dtype == torch.bfloat16
