"""Checkpoint directories: what is written gives the net back, whole or not at all, with a card made from data."""

import json
import re
import shlex
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
from test_bad_checkpoints import Bomb

from timm_weighted_skip import cli
from timm_weighted_skip.convert import to_awm
from timm_weighted_skip.hub import Results, save_checkpoint, update_results, validate_checkpoint
from timm_weighted_skip.hub.card import model_card
from timm_weighted_skip.models.pretrained import HUB_OWNER, staged_cfgs
from timm_weighted_skip.nets import Trained, load_net

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
    loaded = validate_checkpoint(folder)
    assert loaded.num_classes == net.num_classes
    assert 'num_classes' not in args or 'label_names' not in loaded.pretrained_cfg  # those of other classes
    assert folder.stat().st_mode & 0o777 == 0o755
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    config = timm.data.resolve_model_data_config(loaded)
    transform = timm.data.create_transform(**config)  # as the card has it
    assert transform(image.convert('L' if x.shape[1] == 1 else 'RGB')).shape == tuple(config['input_size'])


@torch.no_grad()
def test_where_learned_weights_started_is_in_the_weights(tmp_path):
    net = randomise(timm.create_model('adaresnet14_cifar', skip_init=1.0)).eval()
    folder = save_checkpoint(net, tmp_path / 'adaresnet14_cifar.mine', model_args={'skip_init': 1.0})
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


def test_snippets_of_the_card_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 40), 50).save('image.jpg')
    snippets = re.findall(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        assert snippet.startswith('import timm_weighted_skip')
        # The repository is not published here; test_publish.py loads from one.
        session: dict = {}
        exec(snippet.replace(f'hf_hub:timm-weighted-skip/{NAME}', f'local-dir:{folder}'), session)
    assert session['embedding'].shape == (1, 64)


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


def test_command_line_from_training_checkpoint_to_folded_net(tmp_path, capsys):
    net = timm.create_model('adaresnet14_cifar', num_classes=7, sharing='kind', skip_init=0.7).eval()
    torch.save({'state_dict': net.state_dict(), 'epoch': 3, 'arch': 'adaresnet14_cifar'}, tmp_path / 'best.pth.tar')
    (tmp_path / 'results.json').write_text(json.dumps(results().to_dict()))
    ada, plain, awm = tmp_path / 'ada', tmp_path / 'plain', tmp_path / 'awm'
    source = ['adaresnet14_cifar', '--checkpoint', str(tmp_path / 'best.pth.tar')]
    options = ['--model-kwargs', 'num_classes=7', 'sharing=kind', '--results', str(tmp_path / 'results.json')]
    assert cli.main(['save', *source, *options, '--output', str(ada)]) == 0
    assert cli.main(['fold', f'local-dir:{ada}', '--output', str(plain)]) == 0
    assert cli.main(['convert', f'local-dir:{plain}', '--to', 'awm', '--output', str(awm)]) == 0
    assert capsys.readouterr().out == f'wrote {ada}\nwrote {plain}\nwrote {awm}\n'
    logits = net(IMAGE)
    for folder, architecture in ((ada, net.pretrained_cfg['architecture']), (plain, 'resnet14_cifar')):
        assert json.loads((folder / 'config.json').read_text())['architecture'] == architecture
        torch.testing.assert_close(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(IMAGE), logits)
    assert 'seed 1' in (ada / 'README.md').read_text()

    assert cli.main(['convert', f'local-dir:{ada}', '--to', 'plain', '--output', str(tmp_path / 'no')]) == 1
    assert cli.main(['save', *source, '--output', str(tmp_path / 'no')]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert 'fold' in errors[0]
    assert 'size mismatch for fc.weight' in errors[1]
    assert not (tmp_path / 'no').exists()


def images(path, shape=(40, 8, 8), classes='abcde'):
    """An image set of `classes` in `path`, as arguments of the command line."""
    for part in ('train', 'test'):
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        np.savez(
            path / f'own_{part}.npz', images=pixels, labels=np.arange(len(pixels)) % len(classes), classes=[*classes]
        )
    return ['--data', 'own', '--data-dir', str(path)]


def train(path, *arguments, model='adaresnet14_cifar', data=('--data', 'digits')):
    run = ['--output', str(path), '--experiment', 'run', '--epochs', '1', '--batch-size', '32']
    assert cli.main(['train', '--model', model, *data, *run, *arguments]) == 0
    return path / 'run'


def saved_config(source, folder, *arguments):
    assert cli.main(['save', str(source), '--output', str(folder), *arguments]) == 0
    return json.loads((folder / 'config.json').read_text())


def test_a_run_is_saved_with_what_it_says_of_itself_and_measured(tmp_path, capsys, monkeypatch):
    options = ['--model-kwargs', 'sharing=kind', '--mean', '0.3', '--std', '0.4', '--seeds', '3', '5']
    run, saved = train(tmp_path, *options) / 'seed5', tmp_path / 'saved'
    config = saved_config(run, saved)

    cfg, measured = config['pretrained_cfg'], Results.from_dict(config['results'])
    assert (config['architecture'], config['model_args']) == ('adaresnet14_cifar', {'sharing': 'kind'})
    assert (cfg['input_size'], cfg['mean'], cfg['std'], cfg['crop_pct']) == ([1, 8, 8], [0.3], [0.4], 1.0)
    assert cfg['label_names'] == [*'0123456789']
    result = json.loads((run / 'result.json').read_text())
    assert (measured.seed, measured.seeds, measured.epochs) == (5, [3, 5], 1)
    assert measured.top1[1] == round(result['last']['top1'], 2)
    assert (measured.split, Results.of_run({**result, 'data': 'folder'}, '').split) == ('test', 'validation')
    capsys.readouterr()
    named = ['adaresnet14_cifar', '--checkpoint', str(run / 'last.safetensors')]
    for source in ([run], [saved], [f'local-dir:{saved}'], named):
        assert cli.main(['eval', *map(str, source), '--data', 'digits']) == 0
        assert json.loads(capsys.readouterr().out)['top1'] == pytest.approx(result['last']['top1'])

    # The card's command trains it again.
    command = shlex.split(measured.recipe)[1:]
    assert cli.main([*command, '--output', str(tmp_path), '--experiment', 'again']) == 0
    assert json.loads((tmp_path / 'again/result.json').read_text())['last'] == result['last']

    monkeypatch.chdir(run)
    assert saved_config('.', tmp_path / 'here')['results'] == config['results']
    assert saved_config(saved, tmp_path / 'copy') == config
    assert saved_config(f'local-dir:{saved}', tmp_path / 'same') == config
    assert saved_config(named[0], tmp_path / 'named', *named[1:])['model_args'] == {'sharing': 'kind'}
    # What was measured is not of the best epoch's weights, nor of a net with other arguments.
    assert 'results' not in saved_config(run / 'model_best.safetensors', tmp_path / 'best')
    assert 'results' not in saved_config(run, tmp_path / 'other', '--model-kwargs', 'skip_init=1.0')
    run.with_name('seed5').rename(run.with_name('mine'))
    assert saved_config(run.with_name('mine'), tmp_path / 'alone')['results']['seeds'] == [5]


def test_a_saved_run_says_nothing_of_other_weights_of_its_model(tmp_path):
    data = images(tmp_path, (40, 64, 64, 3))
    run = train(tmp_path, model='awm_resnet18.fb_swsl_ig1b_ft_in1k', data=data)
    config = saved_config(run, tmp_path / 'saved')
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['num_classes'], cfg['label_names']) == ([3, 64, 64], 5, [*'abcde'])
    assert cfg['crop_pct'] == 1.0
    assert not {'test_input_size', 'test_crop_pct', 'origin_url', 'tag'} & cfg.keys()
    assert cfg['license'] == 'cc-by-nc-4.0'  # the weights may have been its
    assert 'license: cc-by-nc-4.0' in (tmp_path / 'saved/README.md').read_text()
    (run / 'result.json').unlink()
    assert 'results' not in saved_config(run, tmp_path / 'unfinished')


def test_of_a_checkpoint_with_a_moving_average_the_average_is_loaded(tmp_path):
    raw, average = (timm.create_model('adaresnet14_cifar').state_dict() for _ in range(2))
    torch.save({'state_dict': raw, 'state_dict_ema': average}, tmp_path / 'model_best.pth.tar')
    net = load_net('adaresnet14_cifar', tmp_path / 'model_best.pth.tar')
    assert torch.equal(net.conv1.weight, average['conv1.weight'])


def test_anothers_weights_have_no_classes_of_our_checkpoint(tmp_path):
    """The bare name's default is trained on CIFAR-10; what a file of weights was trained on, nobody knows."""
    weights = tmp_path / 'mnist.safetensors'
    safetensors.torch.save_file(timm.create_model('awm_resnet14_cifar', in_chans=1).state_dict(), weights)
    named = ['awm_resnet14_cifar', tmp_path / 'saved', '--checkpoint', str(weights), '--model-kwargs', 'in_chans=1']
    assert 'airplane' in timm.get_pretrained_cfg_value('awm_resnet14_cifar', 'label_names')
    assert 'label_names' not in saved_config(*named)['pretrained_cfg']


def test_convert_and_fold_take_a_run(tmp_path):
    run = train(tmp_path, '--model-kwargs', 'skip_init=0.5', data=images(tmp_path))
    assert cli.main(['fold', str(run), '--output', str(tmp_path / 'plain')]) == 0
    assert cli.main(['convert', str(tmp_path / 'plain'), '--to', 'awm', '--output', str(tmp_path / 'awm')]) == 0
    x = torch.randn(2, 1, 8, 8)
    nets = [timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).eval() for name in ('plain', 'awm')]
    torch.testing.assert_close(nets[0](x), load_net(str(run))(x))
    torch.testing.assert_close(nets[1](x), nets[0](x))


@pytest.mark.parametrize(
    ('arguments', 'why'),
    [
        (['save', 'run', '--output', 'x'], "result.json is not of a run of this trainer ('command')"),
        (['eval', 'run', '--data', 'digits'], 'the data has 10 classes and the net 5'),
        (
            ['eval', 'run', '--data', 'colour', '--data-dir', '.'],
            'takes images of 1 channels, with 1 pixel means; those',
        ),
        (['eval', 'run', '--data', 'own', '--data-dir', '.', '--batch-size', '0'], 'batch_size=0'),
        (['inspect', 'run', '--model-kwargs', 'checkpoint_path=x'], 'checkpoint_path is no argument of a net'),
        (['inspect', 'nowhere.safetensors'], 'there is no file or folder nowhere.safetensors'),
        (['inspect', 'seeds'], 'has neither config.json nor last.safetensors; give one of its runs, seed0, seed1'),
        (['inspect', 'own_test.npz'], 'own_test.npz is not a whole safetensors file'),
        (['inspect', 'evil.safetensors'], 'says things of its net that make no sense'),
        (['inspect', 'count.safetensors'], 'says things of its net that make no sense'),
        (['inspect', 'list.safetensors'], 'says things of its net that make no sense'),
        (['inspect', 'foreign.safetensors'], 'is of a net that is not registered here: no model is called'),
        (['inspect', 'list.pth'], 'one of another kind is given as --checkpoint, with its model'),
        (
            ['inspect', 'adaresnet14_cifar', '--checkpoint', 'run/checkpoint-2.pth.tar'],
            'give run/checkpoint-2.safetensors',
        ),
        (['save', 'adaresnet14_cifar', '--checkpoint', 'evil.pth', '--output', 'x'], 'evil.pth is not a checkpoint'),
        (['save', 'adaresnet14_cifar', '--checkpoint', 'list.pth', '--output', 'x'], 'list.pth is not a checkpoint'),
        (['save', 'adaresnet14_cifar', '--checkpoint', 'empty.pth', '--output', 'x'], 'empty.pth is not a checkpoint'),
    ],
)
def test_what_a_run_can_not_give_is_one_clear_line(tmp_path, capsys, monkeypatch, arguments, why):
    monkeypatch.chdir(tmp_path)
    images(Path())
    np.savez('colour_test.npz', images=np.zeros((5, 8, 8, 3), np.uint8), labels=np.arange(5))
    about = Trained('adaresnet14_cifar', {}, [*'abcde'], [1, 8, 8], [0.3], [0.4])
    net = timm.create_model('adaresnet14_cifar', **about.arguments())
    for folder in ('run', 'seeds/seed0', 'seeds/seed1'):
        Path(folder).mkdir(parents=True)
        safetensors.torch.save_file(net.state_dict(), Path(folder, 'last.safetensors'), about.metadata())
    Path('run/result.json').write_text('{"data": "own", "recipe": {"seed": 0}, "last": {"top1": 1.0}}')
    for name, change in {
        'evil': {'model_kwargs': '{"checkpoint_path": "list.pth"}'},
        'count': {'classes': '5'},
        'list': {'model_kwargs': '[]'},
        'foreign': {'model': 'adaresnet15_cifar'},
    }.items():
        safetensors.torch.save_file(net.state_dict(), f'{name}.safetensors', {**about.metadata(), **change})
    torch.save([1, 2], 'list.pth')
    torch.save({'state_dict': Bomb(Path('executed'))}, 'evil.pth')
    Path('empty.pth').touch()
    safetensors.torch.save_file(net.state_dict(), 'run/checkpoint-2.safetensors', about.metadata())
    torch.save({'model': about.model, 'updates': 2}, 'run/checkpoint-2.pth.tar')
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert why in error
    assert error.count('\n') == 1
    assert not Path('x').exists()
    assert not Path('executed').exists()


def test_fold_reports_what_stays_weighted(tmp_path, capsys):
    net = timm.create_model('adaresnet14_cifar', skip_init=-1.0)
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    source = ['adaresnet14_cifar', '--checkpoint', str(tmp_path / 'net.pth')]
    assert cli.main(['fold', *source, '--output', str(tmp_path / 'folded')]) == 0
    assert 'identity shortcut: layer1.0, layer1.1, layer2.1, layer3.1\n' in capsys.readouterr().out
    assert json.loads((tmp_path / 'folded/config.json').read_text())['architecture'] == 'adaresnet14_cifar'

    constant = [*source, '--model-kwargs', 'skip_fixed=True', '--output', str(tmp_path / 'constant')]
    assert cli.main(['fold', *constant]) == 0
    assert not any(name.endswith('merge.weight') for name, _ in load_net(str(tmp_path / 'constant')).named_parameters())
