"""Checkpoint directories: what is written gives the net back, whole or not at all, with a card made from data."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from checkpoints import NAME, make_checkpoint, results, trained_net
from conftest import randomise
from huggingface_hub import ModelCard
from PIL import Image

from timm_weighted_skip.convert import to_awm
from timm_weighted_skip.hub import Results, save_checkpoint, update_results, validate_checkpoint
from timm_weighted_skip.hub.card import model_card
from timm_weighted_skip.hub.config import model_config
from timm_weighted_skip.models.pretrained import HUB_OWNER, staged_cfgs

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
STAGED = sorted(file.parent for file in (Path(__file__).parents[1] / 'hub_cards').glob('*/config.json'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp('cards'))


@torch.no_grad()
def test_local_dir_gives_the_net_back(folder):
    net = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(net(IMAGE), trained_net()(IMAGE))
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob('*.*')) == [
        'README.md',
        'config.json',
        'model.safetensors',
        'sample/logits.safetensors',
    ]
    assert [file.name for file in folder.parent.iterdir()] == [NAME]


def test_weights_carry_where_they_come_from(folder):
    with safetensors.safe_open(folder / 'model.safetensors', 'pt') as file:
        metadata = file.metadata()
    assert metadata.keys() == {'format', 'architecture', 'timm_weighted_skip', 'timm', 'recipe', 'commit', 'sha256'}
    assert metadata['commit'] == results().commit
    assert metadata['recipe'] == results().recipe


@pytest.mark.parametrize(
    ('name', 'args'),
    [
        ('awm_resnet14_cifar', {'num_classes': 5, 'in_chans': 1}),
        ('awm_resnet14_cifar', {'hidden': 4, 'scale': 1.0}),
        ('adaresnet14_cifar', {'sharing': 'kind', 'skip_fixed': True, 'skip_init': 2.0}),
        ('awm_densenet22_bc_cifar', {'scale': 'paper'}),
        ('adaresnet18', {'stem_type': 'deep', 'replace_stem_pool': True}),
        ('resnet14_cifar', {}),
    ],
)
@torch.no_grad()
def test_nets_of_other_arguments(tmp_path, name, args):
    net = timm.create_model(name, **args).eval()
    recorded = {k: v for k, v in args.items() if k not in ('num_classes', 'in_chans')}
    folder = save_checkpoint(net, tmp_path / 'net', model_args=recorded)
    x = IMAGE[:, : args.get('in_chans', 3)]
    assert torch.equal(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x), net(x))
    config = json.loads((folder / 'config.json').read_text())
    alike = timm.create_model(  # as transformers makes it
        config['architecture'], num_classes=config['num_classes'], **config['model_args']
    )
    alike.load_state_dict(safetensors.torch.load_file(folder / 'model.safetensors'))
    assert torch.equal(alike.eval()(x), net(x))
    loaded = validate_checkpoint(folder)
    assert loaded.num_classes == net.num_classes
    assert 'num_classes' not in args or 'label_names' not in loaded.pretrained_cfg  # those of other classes
    assert folder.stat().st_mode & 0o777 == 0o755
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    config = timm.data.resolve_model_data_config(loaded)
    transform = timm.data.create_transform(**config)  # as the card has it
    assert transform(image.convert('L' if x.shape[1] == 1 else 'RGB')).shape == tuple(config['input_size'])


@torch.no_grad()
def test_where_what_it_learned_started_is_in_the_weights(tmp_path):
    args = {'skip_init': 1.0, 'zero_init_last': False}
    net = randomise(timm.create_model('adaresnet14_cifar', **args)).eval()
    folder = save_checkpoint(net, tmp_path / 'adaresnet14_cifar.mine', model_args=args)
    assert torch.equal(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(IMAGE), net(IMAGE))
    assert staged_cfgs(tmp_path, ['adaresnet14_cifar']).keys() == {folder.name}  # it is the name's checkpoint
    # A net with arguments that make another net of it is not.
    fixed = {'skip_init': 1.0, 'skip_fixed': True}
    save_checkpoint(
        timm.create_model('adaresnet14_cifar', **fixed), tmp_path / 'adaresnet14_cifar.fixed', model_args=fixed
    )
    assert json.loads((tmp_path / 'adaresnet14_cifar.fixed/config.json').read_text())['model_args'] == fixed
    assert staged_cfgs(tmp_path, ['adaresnet14_cifar']).keys() == {folder.name}


@torch.no_grad()
def test_half_precision(tmp_path):
    net = trained_net().bfloat16()
    folder = save_checkpoint(net, tmp_path / 'net')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(loaded(IMAGE), net.float()(IMAGE))


def test_arguments_that_were_left_out_are_noticed_and_nothing_is_left(tmp_path):
    # No shape tells the two nets apart.
    with pytest.raises(ValueError, match=r'net/sample/logits.safetensors: .*stored logits.*model_args'):
        save_checkpoint(trained_net(scale=1.0), tmp_path / 'net')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('args', [{'sharing': 'kind'}, {'skip_fixed': True, 'skip_init': 1.0}], ids=str)
def test_arguments_that_no_output_tells_are_noticed_too(tmp_path, args):
    net = timm.create_model('adaresnet14_cifar', **args)
    with pytest.raises(ValueError, match=r'has \d+ parameters to train, not \d+; .* sharing or skip_fixed'):
        save_checkpoint(net, tmp_path / 'net.tag')
    assert not list(tmp_path.iterdir())
    save_checkpoint(net, tmp_path / 'net.tag', model_args=args)


def test_a_net_without_a_classifier_is_an_encoder_of_features(tmp_path):
    folder = save_checkpoint(trained_net(num_classes=0), tmp_path / 'net')
    card = (folder / 'README.md').read_text()
    assert 'pipeline_tag: image-feature-extraction' in card
    assert 'lassif' not in card
    assert 'embedding = model(images)  # (1, 64)' in card


def test_what_no_config_can_tell_is_refused(tmp_path):
    args = {'norm_layer': torch.nn.InstanceNorm2d}
    net = timm.create_model('awm_resnet14_cifar', **args)
    with pytest.raises(ValueError, match=r"norm_layer=<class .*InstanceNorm2d'> can not be told in config.json"):
        save_checkpoint(net, tmp_path / 'net', model_args=args)
    with pytest.raises(ValueError, match='the net does not take an image of its input size: mat1'):
        save_checkpoint(trained_net(global_pool=''), tmp_path / 'net', model_args={'global_pool': ''})
    assert not list(tmp_path.iterdir())


def test_a_net_without_a_registered_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match='awm_seresnet18 is not registered'):
        save_checkpoint(to_awm(timm.create_model('seresnet18')), tmp_path / 'net')
    assert not list(tmp_path.iterdir())


def test_a_net_of_features_only_is_refused(tmp_path):
    net = timm.create_model(NAME.partition('.')[0], features_only=True)
    with pytest.raises(ValueError, match='FeatureListNet is no classifier'):
        save_checkpoint(net, tmp_path / 'no')
    assert not any(tmp_path.iterdir())


def test_what_is_there_stays(folder):
    before = {file: file.read_bytes() for file in folder.rglob('*.*')}
    with pytest.raises(FileExistsError, match='exists'):
        save_checkpoint(timm.create_model('awm_resnet14_cifar'), folder)
    assert {file: file.read_bytes() for file in folder.rglob('*.*')} == before


def test_card_front_matter(folder):
    data = ModelCard.load(folder / 'README.md').data
    assert data.library_name == 'timm'
    assert data.license == 'apache-2.0'
    assert data.datasets == ['uoft-cs/cifar10']
    assert data.metrics == ['accuracy']
    assert 'transformers' not in data.tags
    assert [(result.dataset_split, result.metric_value) for result in data.eval_results] == [
        ('test', 91.0),
        ('test', 90.5),
    ]


def test_card_says_what_was_measured(folder):
    text = (folder / 'README.md').read_text()
    for section in ('Model Details', 'Model Usage', 'Model Comparison', 'Citation'):
        assert f'\n## {section}\n' in text
    for usage in ('Image Classification', 'Feature Map Extraction', 'Image Embeddings'):
        assert f'\n### {usage}\n' in text
    assert 'after the last of 4 epochs' in text
    assert '| **awm_resnet14_cifar** | 90.50 ± 0.71 (n=2) |\n| resnet14_cifar | 89.25 ± 0.35 (n=2) |' in text
    assert f'{sum(p.numel() for p in trained_net().parameters()) / 1e6:.2f}' in text
    assert '- **Code:** `0123abc`\n' in text
    assert 'arXiv:1811.06878' in text


def test_card_of_a_changed_checkout_says_so(tmp_path):
    folder = save_checkpoint(trained_net(), tmp_path / 'net', replace(results(), commit='0123abc+'))
    assert '- **Code:** `0123abc` with changes\n' in (folder / 'README.md').read_text()


def test_card_without_results_claims_nothing(tmp_path):
    text = (save_checkpoint(trained_net(), tmp_path / 'net') / 'README.md').read_text()
    assert 'No measurement of these weights is recorded.' in text
    assert not ModelCard(text).data.eval_results


@pytest.mark.parametrize(
    ('name', 'args', 'family', 'row'),
    [
        ('awm_resnet14_cifar', {'plain': True}, 'An image classification net.', 'awm_resnet14_cifar (plain)'),
        ('adaresnet14_cifar', {'skip_fixed': True, 'skip_init': 2.0}, 'have fixed weights.', 'adaresnet14_cifar'),
    ],
)
def test_card_says_what_is_not_learned(tmp_path, name, args, family, row):
    folder = save_checkpoint(timm.create_model(name, **args), tmp_path / 'net', results(), model_args=args)
    text = (folder / 'README.md').read_text()
    assert family in text
    assert f'| **{row}** |' in text
    assert ('arXiv' in text) != args.get('plain', False)


def test_a_license_is_that_of_net_or_results_and_never_ours(tmp_path):
    net = timm.create_model('awm_resnet14_cifar', pretrained_cfg_overlay={'license': None})
    folder = save_checkpoint(net, tmp_path / 'net', replace(results(), license=''))
    card = folder / 'README.md'
    assert ModelCard.load(card).data.license is None
    update_results(folder, replace(results(), license='cc-by-nc-4.0'))
    assert ModelCard.load(card).data.license == 'cc-by-nc-4.0'
    assert json.loads((folder / 'config.json').read_text())['pretrained_cfg']['license'] == 'cc-by-nc-4.0'


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_snippets_of_the_card_run(tmp_path, monkeypatch, channels):
    monkeypatch.chdir(tmp_path)
    pixels = dict(input_size=(channels, 32, 32), mean=(0.5,) * channels, std=(0.25,) * channels)
    net = trained_net(in_chans=channels, pretrained_cfg_overlay=pixels)
    folder = save_checkpoint(net, tmp_path / NAME, results())
    Image.effect_noise((40, 40), 50).save('image.jpg')
    snippets = re.findall(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)
    assert len(snippets) == 3
    sessions: list[dict] = [{} for _ in snippets]
    for snippet, session in zip(snippets, sessions):
        assert snippet.startswith('import timm_weighted_skip')
        # The repository is not published here; test_publish.py loads from one.
        exec(snippet.replace(f'hf-hub:timm-weighted-skip/{NAME}', f'local-dir:{folder}'), session)
    assert sessions[0]['logits'].shape == (1, 10)
    assert sessions[2]['embedding'].shape == (1, 64)


@pytest.mark.parametrize(('channels', 'named'), [(1, True), (3, True), (4, False)])
def test_the_config_names_no_first_convolution_that_some_timm_would_draw_anew(channels, named):
    assert ('first_conv' in model_config(trained_net(in_chans=channels))['pretrained_cfg']) is named


def test_the_card_tells_the_width_of_the_embedding(tmp_path):
    args = {'global_pool': 'catavgmax'}
    folder = save_checkpoint(trained_net(**args), tmp_path / 'net', model_args=args)
    assert (folder / 'README.md').read_text().count('# (1, 128)') == 2


def test_results_are_updated_from_within_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / folder.name))
    update_results(Path('.'), results())
    assert Path('README.md').read_text() == (folder / 'README.md').read_text()


@pytest.mark.parametrize('staged', STAGED, ids=lambda path: path.name)
def test_staged_checkpoints_are_valid_and_their_cards_current(staged):
    validate_checkpoint(staged)
    card, current = (staged / 'README.md').read_text(), model_card(staged, f'{HUB_OWNER}/{staged.name}')
    assert ModelCard(card).text == ModelCard(current).text
    assert ModelCard(card).data.to_dict() == ModelCard(current).data.to_dict()


@torch.no_grad()
def test_digits_checkpoint_classifies_digits():
    digits = pytest.importorskip('sklearn.datasets').load_digits()
    net = timm.create_model('awm_resnet14_cifar.digits', pretrained=True).eval()
    mean, std = net.pretrained_cfg['mean'], net.pretrained_cfg['std']
    images = (torch.as_tensor(digits.images).float() / 16 - mean[0]) / std[0]
    right = net(images.unsqueeze(1)).argmax(1) == torch.as_tensor(digits.target)
    assert right.float().mean() > 0.97  # training images included


@pytest.mark.parametrize(
    ('change', 'why'),
    [
        ({'top1': [90.0]}, 'one seed per accuracy'),
        ({'seed': 7}, 'the one whose weights these are'),
        ({'top1': [90.0, 101.0]}, r'accuracies in %'),
        ({'top1': 90.0}, 'wrong type'),
        ({'top1': [True, 90.0]}, 'give accuracies in %'),
        ({'commit': None}, 'commit=None is not allowed; give text'),
        ({'dataset_id': None}, 'dataset_id=None is not allowed; give text'),
        ({'epochs': None}, 'epochs=None is not allowed; give a whole number'),
        ({'accuracy': 90.0}, r"unknown \['accuracy'\]"),
    ],
)
def test_results_that_make_no_sense_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        Results.from_dict({**results().to_dict(), **change})
