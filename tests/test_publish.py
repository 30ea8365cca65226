"""Publishing, through the real client, to a stand-in for the Hub."""

import json
import shutil
import socket
import time

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from checkpoints import make_checkpoint, new_process, trained_net
from hub_standin import Fault, HubStandIn, Repo
from test_pretrained import LOGITS

from timm_weighted_skip import cli
from timm_weighted_skip.hub import publish
from timm_weighted_skip.hub.publish import _readdressed, publish_all
from timm_weighted_skip.models.pretrained import HUB_OWNER

TOKEN = 'hf_token_of_user'
REPO = 'user/net.test'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp('cards'))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubStandIn() as hub:
        point_at(monkeypatch, hub.url)
        monkeypatch.setenv('HF_HUB_DISABLE_XET', '1')
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True, raising=False)
        # The client waits longer and longer between its attempts.
        monkeypatch.setattr(time, 'sleep', lambda seconds: None)
        yield hub


def point_at(monkeypatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', url)


def downloaded(hub: HubStandIn, tmp_path, token: str = '') -> torch.Tensor:
    """Logits for the image in `x.safetensors` of what a new process loads from the Hub."""
    out = tmp_path / 'y.safetensors'
    env = {'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'cache'), **({'HF_TOKEN': token} if token else {})}
    new_process(LOGITS, f'hf-hub:{REPO}', tmp_path / 'x.safetensors', out, **env)
    return safetensors.torch.load_file(out)['logits']


@torch.no_grad()
def test_what_is_published_loads_to_the_bit_in_a_new_process(hub, folder, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    safetensors.torch.save_file({'input': x}, tmp_path / 'x.safetensors')
    said = publish(folder, REPO, private=True, token=TOKEN)
    assert said == f'published {REPO}: {hub.url}/{REPO}/commit/{hub.repos[REPO].head[0]}'
    assert hub.repos[REPO].private
    assert hub.commits(REPO) == 1
    assert torch.equal(downloaded(hub, tmp_path, TOKEN), trained_net()(x))
    with pytest.raises(AssertionError, match=r'404|401'):  # private: not for others
        downloaded(hub, tmp_path / 'other', 'hf_token_of_other')


def test_files_and_card_name_their_own_repository(hub, folder):
    publish(folder, REPO, token=TOKEN)
    files = hub.repos[REPO].head[1]
    assert files.keys() == {
        '.gitattributes',
        'README.md',
        'config.json',
        'model.safetensors',
        'sample/logits.safetensors',
    }
    assert files['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    card = files['README.md'].decode()
    assert f"'hf-hub:{REPO}'" in card
    assert 'timm-weighted-skip/' not in card


def test_a_renamed_directory_is_published_under_its_new_name(hub, folder, tmp_path):
    renamed = shutil.copytree(folder, tmp_path / 'renamed')
    publish(renamed, REPO, token=TOKEN)
    card = hub.repos[REPO].head[1]['README.md'].decode()
    assert folder.name not in card
    assert card.count(REPO) == 3
    name = REPO.split('/')[1]
    assert f'\n# Model card for {name}\n' in card
    assert f'\n- name: {name}\n' in card


def test_publishing_again_makes_no_commit_until_something_changes(hub, folder, tmp_path):
    publish(folder, REPO, token=TOKEN)
    assert publish(folder, REPO, token=TOKEN) == f'{REPO} is up to date, no commit was made'
    assert hub.commits(REPO) == 1
    card = folder / 'README.md'
    before = card.read_text()
    try:
        card.write_text(before + '\nA remark.\n')
        assert publish(folder, REPO, token=TOKEN).startswith('published')
    finally:
        card.write_text(before)
    assert hub.commits(REPO) == 2


@pytest.mark.parametrize(
    ('request_pattern', 'action', 'why'),
    [
        ('POST /api/repos/create', 400, r'told to answer 400 to Bearer \*\*\*'),
        ('POST /api/repos/create', 401, 'the token is not valid'),
        ('POST /api/repos/create', 'drop', 'could not be reached'),
        ('POST /api/repos/create', 'page', 'no answer of the Hub'),
        ('POST .*/commit', 'page', 'no answer of the Hub'),
        ('POST .*/preupload', 403, 'no right to write'),
        ('POST .*/lfs/objects/batch', 429, 'too many requests'),
        ('PUT /lfs', 'drop', 'could not be reached'),
        ('PUT /lfs', 500, 'a problem of its own'),
        ('POST .*/commit', 409, 'changed the repository meanwhile'),
        ('POST .*/commit', 429, 'too many requests'),
        ('POST .*/commit', 500, 'a problem of its own'),
        ('POST .*/commit', 'drop', 'could not be reached'),
    ],
)
def test_a_failure_is_explained_publishes_nothing_and_can_be_mended(hub, folder, request_pattern, action, why):
    hub.fault = Fault(request_pattern, action)
    with pytest.raises(OSError, match=rf'^{REPO} was not published: .*{why}') as error:
        publish(folder, REPO, token=TOKEN)
    assert '\n' not in str(error.value)
    assert TOKEN not in str(error.value)
    assert REPO not in hub.repos or hub.commits(REPO) == 0
    hub.fault = None
    assert publish(folder, REPO, token=TOKEN).startswith('published')


def test_running_again_sends_only_what_is_missing(hub, folder):
    hub.fault = Fault('POST .*/commit', 500)
    with pytest.raises(OSError, match='was not published'):
        publish(folder, REPO, token=TOKEN)
    assert len(hub.lfs) == 2
    hub.fault = None
    hub.log.clear()
    publish(folder, REPO, token=TOKEN)
    assert not [request for request in hub.log if request.startswith('PUT')]
    assert hub.repos[REPO].head[1]['model.safetensors'] == (folder / 'model.safetensors').read_bytes()


def test_one_dropped_connection_is_no_failure(hub, folder):
    hub.fault = Fault('PUT /lfs', 'drop', times=1)
    assert publish(folder, REPO, token=TOKEN).startswith('published')


def test_repository_that_changed_meanwhile(hub, folder, monkeypatch):
    publish(folder, REPO, token=TOKEN)
    create_commit = huggingface_hub.HfApi.create_commit

    def after_another(*args, **kwargs):
        hub.repos[REPO].commit({'README.md': b'by another'})
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, 'create_commit', after_another)
    with pytest.raises(OSError, match='changed the repository meanwhile'):
        publish(folder, REPO, token=TOKEN)
    assert hub.repos[REPO].head[1] == {'README.md': b'by another'}


@pytest.mark.parametrize(
    ('repo_id', 'token', 'why'),
    [
        ('other/net', TOKEN, 'no right to write there'),
        (REPO, 'hf_wrong', 'the token is not valid'),
    ],
)
def test_who_may_not_write(hub, folder, repo_id, token, why):
    with pytest.raises(OSError, match=why):
        publish(folder, repo_id, token=token)
    assert not hub.repos


def test_a_public_repository_does_not_become_private_in_silence(hub, folder):
    hub.repos[REPO] = Repo(private=False)
    with pytest.raises(ValueError, match='exists and is public'):
        publish(folder, REPO, private=True, token=TOKEN)
    assert hub.commits(REPO) == 0


def test_network_down(folder, monkeypatch):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        point_at(monkeypatch, f'http://127.0.0.1:{free.getsockname()[1]}')
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    with pytest.raises(OSError, match=rf'^{REPO} was not published: the Hub could not be reached'):
        publish(folder, REPO, token=TOKEN)


@pytest.mark.parametrize(
    ('repo_id', 'why'), [('net', 'has no owner'), ('a/b/c', 'not a name'), ('a/b c', 'not a name')]
)
def test_names_that_the_hub_would_not_take(hub, folder, repo_id, why):
    with pytest.raises(ValueError, match=why):
        publish(folder, repo_id, token=TOKEN)
    assert not hub.log


def test_of_all_none_is_sent_if_one_has_no_name_and_what_a_killed_save_left_is_none(hub, tmp_path, folder):
    for name in ('a.mine', 'b mine', '.c.left'):
        shutil.copytree(folder, tmp_path / name)
    with pytest.raises(ValueError, match="b mine' is not a name of the Hub"):
        list(publish_all(tmp_path, 'me', token=TOKEN))
    assert not hub.log
    shutil.rmtree(tmp_path / 'b mine')
    assert [line.partition(':')[0] for line in publish_all(tmp_path, 'me', dry_run=True)] == [
        'would publish to the public repository me/a.mine'
    ]


def test_invalid_directory_sends_nothing(hub, tmp_path):
    folder = make_checkpoint(tmp_path)
    data = bytearray((folder / 'model.safetensors').read_bytes())
    data[-1] ^= 1
    (folder / 'model.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='is damaged'):
        publish(folder, REPO, token=TOKEN)
    assert not hub.log


def test_dry_run_prints_what_would_be_sent_and_needs_no_hub(folder, capsys, monkeypatch):
    point_at(monkeypatch, 'http://127.0.0.1:9')
    assert cli.main(['publish', str(folder), '--repo-id', REPO, '--private', '--dry-run']) == 0
    out = capsys.readouterr().out
    assert out.startswith(f'would publish to the private repository {REPO}:\n')
    assert f'model.safetensors  {(folder / "model.safetensors").stat().st_size:,} bytes' in out


def test_command_line_with_a_token_file(hub, folder, tmp_path, capsys):
    (tmp_path / 'token').write_text(f'{TOKEN}\n')
    command = ['publish', str(folder), '--repo-id', REPO, '--token-file', str(tmp_path / 'token')]
    assert cli.main(command) == 0
    hub.fault = Fault('POST .*/commit', 500)
    assert cli.main([*command[:3], 'user/second', *command[4:]]) == 1
    captured = capsys.readouterr()
    assert 'published' in captured.out
    assert 'weighted-skip: user/second was not published' in captured.err
    assert TOKEN not in captured.out + captured.err


@pytest.mark.parametrize('content', [b'', b'hf_secret with blanks', b'hf_secret\nhf_secret', b'hf_secret\xff'])
def test_a_bad_token_file_is_refused_without_showing_it(folder, tmp_path, capsys, content):
    (tmp_path / 'token').write_bytes(content)
    assert cli.main(['publish', str(folder), '--repo-id', REPO, '--token-file', str(tmp_path / 'token')]) == 1
    error = capsys.readouterr().err
    assert f'{tmp_path / "token"} is ' in error
    assert 'secret' not in error


def test_no_token(folder, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
    assert cli.main(['publish', str(folder), '--repo-id', REPO]) == 1
    assert 'no Hub token was found; run `hf auth login`, set HF_TOKEN or give --token-file' in capsys.readouterr().err


def test_all_of_a_folder(hub, tmp_path, capsys, monkeypatch):
    for tag in ('a', 'b'):
        make_checkpoint(tmp_path / 'cards', f'awm_resnet14_cifar.{tag}')
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    command = ['publish', '--all', '--root', str(tmp_path / 'cards'), '--owner', 'user']
    assert cli.main(command) == 0
    assert sorted(hub.repos) == ['user/awm_resnet14_cifar.a', 'user/awm_resnet14_cifar.b']
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count('is up to date') == 2

    # A bad one keeps all of them back.
    (tmp_path / 'cards/awm_resnet14_cifar.b/README.md').unlink()
    hub.repos.clear()
    assert cli.main(command) == 1
    assert not hub.repos


LOAD = """
import sys, time, timm, timm_weighted_skip
time.sleep = lambda seconds: None
timm.create_model(sys.argv[1], pretrained=True)
"""


MAIN = 'import sys; from timm_weighted_skip.cli import main; sys.exit(main(sys.argv[1:]))'


def test_a_run_that_began_with_published_weights_needs_the_hub_no_more(hub, folder, tmp_path):
    publish(folder, REPO, token=TOKEN)
    options = ('--model', f'hf-hub:{REPO}', '--pretrained', '--data', 'digits', '--epochs', 1, '--output', tmp_path)
    env = {'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'cache')}
    new_process(MAIN, 'train', *options, **env)
    run = tmp_path / f'{REPO.partition("/")[2]}-digits'
    offline = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'empty')}
    measured = json.loads(new_process(MAIN, 'eval', run, '--data', 'digits', **offline))
    assert measured['top1'] == pytest.approx(json.loads((run / 'result.json').read_text())['last']['top1'])


def test_truncated_download_leaves_no_file(hub, folder, tmp_path):
    publish(folder, REPO, token=TOKEN)
    hub.fault = Fault('GET .*/resolve/.*model.safetensors', 'truncate')
    env = {'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'cache')}
    with pytest.raises(AssertionError, match=r'(?i)peer closed|consistency check|incomplete'):
        new_process(LOAD, f'hf-hub:{REPO}', **env)
    assert list((tmp_path / 'cache').rglob('config.json'))
    assert not list((tmp_path / 'cache').rglob('model.safetensors'))
    hub.fault = None
    new_process(LOAD, f'hf-hub:{REPO}', **env)
    (stored,) = (tmp_path / 'cache').rglob('model.safetensors')
    assert stored.read_bytes() == (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('name', ['awm+x', 'my net', 'x@1'])
def test_a_card_is_of_the_repository_whatever_the_folder_was_called(tmp_path, name):
    card = (make_checkpoint(tmp_path, name) / 'README.md').read_text()
    assert f"'hf-hub:{HUB_OWNER}/{name}'" in card
    readdressed = _readdressed(card, REPO)
    assert f"'hf-hub:{REPO}'" in readdressed
    assert f"'hf_hub:{REPO}'" in _readdressed(card.replace('hf-hub:', 'hf_hub:'), REPO)  # of an earlier version
    assert '# Model card for net.test' in readdressed
    assert name not in readdressed
