"""Pretrained weights: timm's of the plain backbones, and ours out of the package."""

import json
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from checkpoints import make_checkpoint, new_process
from conftest import randomise
from hub_standin import HubStandIn, Repo
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

import timm_weighted_skip
from timm_weighted_skip.models import pretrained

BACKBONES = {
    **{f'{prefix}resnet{depth}': f'resnet{depth}' for prefix in ('ada', 'awm_') for depth in (18, 34, 50, 101, 152)},
    'awm_densenet121': 'densenet121',
}


@pytest.mark.parametrize('name', BACKBONES)
def test_tags_are_those_of_the_installed_timm(name):
    theirs = {tagged.split('.')[1]: cfg for tagged, cfg in get_arch_pretrained_cfgs(BACKBONES[name]).items()}
    ours = {tagged.split('.')[1]: cfg for tagged, cfg in get_arch_pretrained_cfgs(name).items()}
    assert {tag: (cfg.hf_hub_id, cfg.input_size) for tag, cfg in ours.items()} == {
        tag: (cfg.hf_hub_id, cfg.input_size) for tag, cfg in theirs.items()
    }
    assert get_pretrained_cfg(name).tag == get_pretrained_cfg(BACKBONES[name]).tag
    assert all(cfg.architecture == name for cfg in ours.values())


@pytest.fixture(scope='module', params=['resnet18', 'densenet121'])
def plain_file(request, tmp_path_factory) -> tuple[str, Path]:
    """A plain backbone's name and checkpoint, as timm has it."""
    file = tmp_path_factory.mktemp('timm') / 'model.safetensors'
    safetensors.torch.save_file(randomise(timm.create_model(request.param)).eval().state_dict(), file)
    return request.param, file


@torch.no_grad()
@pytest.mark.parametrize(
    'args',
    [
        {},
        {'in_chans': 1, 'num_classes': 0},
        {'features_only': True, 'out_indices': [1, 3]},
    ],
)
def test_weighted_net_equals_timms_to_the_bit(plain_file, args):
    backbone, file = plain_file
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    plain = timm.create_model(backbone, **overlay, **args).eval()
    x = torch.randn(2, args.get('in_chans', 3), 64, 64)
    for name in (name for name, plain_name in BACKBONES.items() if plain_name == backbone):
        weighted = timm.create_model(name, **overlay, **args).eval()
        got, expected = weighted(x), plain(x)
        if not args.get('features_only'):
            got, expected = [got], [expected]
        assert len(got) == len(expected)
        assert all(map(torch.equal, got, expected))


def test_another_number_of_classes_keeps_the_backbone(tmp_path):
    file = tmp_path / 'model.safetensors'
    stored = timm.create_model('resnet18').state_dict()
    safetensors.torch.save_file(stored, file)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    net = timm.create_model('awm_resnet18', num_classes=7, **overlay)
    own = net.state_dict()
    assert own['fc.weight'].shape == (7, 512)
    assert all(torch.equal(own[name], tensor) for name, tensor in stored.items() if not name.startswith('fc'))


@pytest.mark.parametrize('sharing', ['kind', 'unified'])
def test_shared_weights_start_at_one(tmp_path, sharing):
    file = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(timm.create_model('resnet18').state_dict(), file)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    net = timm.create_model('adaresnet18', sharing=sharing, **overlay)
    assert {unit.weight.item() for unit in timm_weighted_skip.mapping_units(net)} == {1.0}


@pytest.mark.parametrize('name', ['awm_resnet44_cifar', 'adaresnet44_cifar', 'resnet44_cifar', 'awm_densenet_bc'])
def test_a_name_without_checkpoint_says_so(name):
    with pytest.raises(RuntimeError, match=rf'No pretrained weights exist for {name}.*with weights: none'):
        timm.create_model(name, pretrained=True)


def test_an_unknown_tag_lists_the_known():
    with pytest.raises(RuntimeError, match=r'nope.*Tags of awm_resnet18 with weights: .*a1_in1k'):
        timm.create_model('awm_resnet18.nope', pretrained=True)


def test_a_weighted_checkpoint_is_not_completed_in_silence(tmp_path):
    file = tmp_path / 'model.safetensors'
    tensors = timm.create_model('awm_resnet14_cifar').state_dict()
    del tensors['layer1.0.merge.gate.fc1.weight']
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(RuntimeError, match=r'Missing key.*layer1\.0\.merge\.gate\.fc1\.weight'):
        timm.create_model('awm_resnet14_cifar', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


LOGITS = """
import sys, timm, torch, timm_weighted_skip, safetensors.torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
x = safetensors.torch.load_file(sys.argv[2])['input']
safetensors.torch.save_file({'logits': model(x).detach()}, sys.argv[3])
"""


def test_timms_repository_is_where_the_weights_come_from(tmp_path):
    plain = randomise(timm.create_model('resnet18')).eval()
    x = torch.randn(1, 3, 64, 64)
    safetensors.torch.save_file({'input': x}, tmp_path / 'x.safetensors')
    with HubStandIn() as hub:
        hub.repos['timm/resnet18.a1_in1k'] = Repo(private=False)
        hub.repos['timm/resnet18.a1_in1k'].commit({'model.safetensors': safetensors.torch.save(plain.state_dict())})
        new_process(
            LOGITS,
            'awm_resnet18.a1_in1k',
            tmp_path / 'x.safetensors',
            tmp_path / 'y.safetensors',
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / 'cache'),
        )
    assert torch.equal(safetensors.torch.load_file(tmp_path / 'y.safetensors')['logits'], plain(x).detach())


@pytest.fixture
def installed(tmp_path) -> Path:
    """The package as a wheel has it, with a checkpoint in it."""
    site = tmp_path / 'site'
    package = Path(timm_weighted_skip.__file__).parent
    shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns('__pycache__', 'checkpoints'))
    make_checkpoint(site / package.name / 'checkpoints')
    return site


def test_checkpoint_in_the_wheel_loads_offline(installed, tmp_path):
    folder = installed / 'timm_weighted_skip/checkpoints/awm_resnet14_cifar.test'
    out = tmp_path / 'y.safetensors'
    args = ('awm_resnet14_cifar.test', folder / 'sample/logits.safetensors', out)
    new_process(LOGITS, *args, path=installed, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'cache'))
    expected = safetensors.torch.load_file(folder / 'sample/logits.safetensors')['logits']
    assert torch.equal(safetensors.torch.load_file(out)['logits'], expected)


def test_checkpoint_that_is_not_in_the_wheel_comes_from_its_repository(installed, tmp_path):
    folder = installed / 'timm_weighted_skip/checkpoints/awm_resnet14_cifar.test'
    with HubStandIn() as hub:
        repo = hub.repos['timm-weighted-skip/awm_resnet14_cifar.test'] = Repo(private=False)
        repo.commit({'model.safetensors': (folder / 'model.safetensors').read_bytes()})
        (folder / 'model.safetensors').unlink()
        out = tmp_path / 'y.safetensors'
        args = ('awm_resnet14_cifar.test', folder / 'sample/logits.safetensors', out)
        new_process(LOGITS, *args, path=installed, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / 'cache'))
    expected = safetensors.torch.load_file(folder / 'sample/logits.safetensors')['logits']
    assert torch.equal(safetensors.torch.load_file(out)['logits'], expected)


def test_a_broken_checkpoint_in_the_package_leaves_the_rest_of_use(installed, tmp_path):
    config = installed / 'timm_weighted_skip/checkpoints/awm_resnet14_cifar.test/config.json'
    config.write_text('{"architecture": ')
    code = "import timm, timm_weighted_skip; print(timm.list_pretrained('awm_resnet14_cifar.test'))"
    assert new_process(code, path=installed) == '[]\n'


def test_which_checkpoint_is_the_default(tmp_path, monkeypatch):
    """A checkpoint for other data does not change what the bare name builds, one for the same becomes its default."""
    monkeypatch.setattr(pretrained, 'checkpoint_root', lambda: tmp_path)

    def stage(name: str, input_size: list[int], num_classes: int, **cfg) -> None:
        config = {'architecture': name.partition('.')[0], 'num_classes': num_classes}
        config['pretrained_cfg'] = {'input_size': input_size, **cfg}
        config['model_args'] = {} if input_size[0] == 3 else {'in_chans': input_size[0]}
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(json.dumps(config))

    def tags() -> dict[str, list[str]]:
        cifar = {'input_size': (3, 32, 32), 'num_classes': 10}
        cfgs = {
            'net_cifar.untrained': cifar,
            'net.a_in1k': {'hf_hub_id': 'timm/'},
            'net.b_in1k': {'hf_hub_id': 'timm/'},
        }
        return {name: list(cfg.tags) for name, cfg in pretrained.default_cfgs_of(cfgs).items()}

    assert tags() == {'net_cifar': ['untrained'], 'net': ['a_in1k', 'b_in1k']}
    stage('net_cifar.digits', [1, 8, 8], 10)
    stage('net_cifar.cifar100', [3, 32, 32], 100)
    stage('net_cifar.bright', [3, 32, 32], 10, mean=[0.9, 0.9, 0.9])
    stage('net.mine', [3, 224, 224], 1000)
    stage('other.mine', [3, 224, 224], 1000)
    assert tags().keys() == {'net_cifar', 'net'}
    assert tags()['net_cifar'][0] == 'untrained'
    assert sorted(tags()['net_cifar']) == ['bright', 'cifar100', 'digits', 'untrained']
    assert tags()['net'][0] == 'a_in1k'
    stage('net_cifar.cifar10', [3, 32, 32], 10)
    assert tags()['net_cifar'][0] == 'cifar10'


def test_a_file_of_torchvisions_densenet(tmp_path):
    small = {'block_config': (2, 2, 2, 2), 'growth_rate': 8}
    plain = randomise(timm.create_model('densenet121', **small)).eval()
    names = {key: re.sub(r'(denselayer\d\.(?:norm|conv))(\d)', r'\1.\2', key) for key in plain.state_dict()}
    assert 'features.denseblock1.denselayer1.norm.1.weight' in names.values()
    torch.save({names[key]: value for key, value in plain.state_dict().items()}, tmp_path / 'densenet.pth')
    overlay = {'file': str(tmp_path / 'densenet.pth'), 'hf_hub_id': None}
    model = timm.create_model('awm_densenet121', pretrained=True, pretrained_cfg_overlay=overlay, **small).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x))


def test_shapes_of_a_checkpoint_are_tuples_as_timms_are():
    """timm's benchmark.py and onnx_export.py put the batch before `input_size`."""
    cfg = timm.create_model('awm_resnet14_cifar', pretrained=False).pretrained_cfg
    assert cfg['tag'] == 'cifar10'
    assert (2, *cfg['input_size']) == (2,) + cfg['input_size']
    assert not [name for name, value in cfg.items() if isinstance(value, list)]


def test_wheel_takes_small_weights_and_every_config(tmp_path):
    pytest.importorskip('hatchling')
    hook = runpy.run_path(str(Path(__file__).parents[1] / 'scripts/hatch_build.py'))['CheckpointsHook']
    for name, size in (('small.tag', 1_000), ('large.tag', 10_000_000)):
        folder = tmp_path / 'hub_cards' / name
        folder.mkdir(parents=True)
        (folder / 'config.json').write_text('{}')
        (folder / 'README.md').write_text('')
        (folder / 'model.safetensors').write_bytes(bytes(size))
    included: dict[str, dict[str, str]] = {'standard': {}, 'editable': {}}
    for version, files in included.items():
        hook.initialize(SimpleNamespace(root=tmp_path), version, {'force_include': files})
    assert set(included['standard'].values()) == {
        'timm_weighted_skip/checkpoints/small.tag/config.json',
        'timm_weighted_skip/checkpoints/small.tag/model.safetensors',
        'timm_weighted_skip/checkpoints/large.tag/config.json',
    }
    assert not included['editable']


@pytest.mark.parametrize(('name', 'scale'), [('awm_resnet14_cifar', 1.0), ('awm_densenet22_bc_cifar', 'paper')])
def test_gates_of_another_scale_are_not_put_behind_a_plain_nets_weights(name, scale, tmp_path):
    plain = timm.create_model(name.removeprefix('awm_'), pretrained=False)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    source = {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(tmp_path / 'plain.safetensors')}}
    timm.create_model(name, **source)
    with pytest.raises(ValueError, match=r'scale=1 over \d paths is not the net of these weights.*; leave scale out'):
        timm.create_model(name, **source, scale=scale)


@pytest.mark.parametrize('name', ['awm_resnet20_cifar', 'awm_densenet22_bc_cifar'])
@pytest.mark.parametrize('source', [{'hf_hub_id': 'me/mine'}, {'url': 'https://example.org/mine.safetensors'}])
def test_a_source_that_the_user_names_comes_before_our_own_file(name, source):
    assert timm.get_pretrained_cfg(name).file
    # In place of what the source would need a network for.
    weights = timm.create_model(name, pretrained=False).state_dict()
    net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={**source, 'state_dict': weights})
    asked = {key: net.pretrained_cfg.get(key) for key in ('file', 'hf_hub_id', 'url')}
    assert asked == {'file': None, 'hf_hub_id': None, 'url': None, **source}


def test_a_fixed_weight_is_not_overwritten_by_a_plain_nets(tmp_path):
    plain = timm.create_model('resnet14_cifar', pretrained=False)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    source = {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(tmp_path / 'plain.safetensors')}}
    with pytest.raises(ValueError, match=r'skip_fixed with skip_init=2\.0 is not the net of these weights'):
        timm.create_model('adaresnet14_cifar', **source, skip_fixed=True, skip_init=2.0)
    model = timm.create_model('adaresnet14_cifar', **source, skip_fixed=True)
    assert model.layer1[0].merge.weight == 1


@pytest.mark.parametrize(
    ('config', 'why'),
    [
        ({'num_classes': 10, 'pretrained_cfg': {'input_size': None}}, 'cannot unpack'),
        ({'num_classes': 10, 'pretrained_cfg': {'input_size': [32, 32]}}, 'not enough values'),
        ({'num_classes': 10, 'pretrained_cfg': {}}, 'input_size'),
        ({'num_classes': 10}, 'pretrained_cfg'),
        ({'architecture': 'other', 'pretrained_cfg': {'input_size': [3, 32, 32]}}, 'its net is other'),
    ],
)
def test_a_config_that_timm_could_not_use_is_left_out(tmp_path, config, why):
    whole = {'num_classes': 10, 'input_size': [3, 32, 32]}
    for name, values in (
        ('net.bad', config),
        ('net.good', {'architecture': 'net', 'pretrained_cfg': {**whole, 'file': 'elsewhere'}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=rf'net.bad/config.json .* left out: .*{why}'):
        cfgs = pretrained.staged_cfgs(tmp_path, ['net'])
    assert {name: (cfg.num_classes, cfg.file) for name, cfg in cfgs.items()} == {'net.good': (10, None)}
