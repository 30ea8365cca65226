"""A bad checkpoint is refused with the file and the reason, and nothing of it is executed."""

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints import make_checkpoint

from timm_weighted_skip.hub import validate_checkpoint
from timm_weighted_skip.hub.weights import read_weights, write_weights


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp('whole'))


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def refused(folder: Path, file: str, why: str) -> None:
    with pytest.raises((ValueError, OSError), match=why) as error:
        validate_checkpoint(folder)
    assert str(folder) in str(error.value)
    assert file in str(error.value)
    assert '\n' not in str(error.value)


def rewrite(file: Path, change) -> None:
    """Change the tensors of a file and give it a digest that fits."""
    tensors, metadata = read_weights(file)
    change(tensors)
    write_weights(tensors, file, {k: v for k, v in metadata.items() if k != 'sha256'})


def test_a_whole_one_passes(folder):
    rewrite(folder / 'model.safetensors', lambda tensors: None)
    validate_checkpoint(folder)


@pytest.mark.parametrize('keep', [0, 5, 8, 1000, 400_000, -1])
def test_truncated(folder, keep):
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:keep])
    refused(folder, 'model.safetensors', 'truncated or damaged')


def test_any_flipped_bit(whole, tmp_path):
    data = (whole / 'model.safetensors').read_bytes()
    file = tmp_path / 'model.safetensors'
    header = int.from_bytes(data[:8], 'little')
    draw = random.Random(0)
    positions = [*range(8), *draw.sample(range(8, 8 + header), 40), *draw.sample(range(8 + header, len(data)), 10)]
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=r'model\.safetensors'):
            read_weights(file)


def test_huge_header(folder):
    (folder / 'model.safetensors').write_bytes((2**62).to_bytes(8, 'little') + b'{}')
    refused(folder, 'model.safetensors', 'claims a header of 4,611,686,018,427,387,904')


def test_wrong_shape(folder):
    rewrite(folder / 'model.safetensors', lambda t: t.update({'conv1.weight': torch.zeros(16, 3, 5, 5)}))
    refused(folder, 'model.safetensors', r'conv1\.weight has shape \(16, 3, 5, 5\), not \(16, 3, 3, 3\)')


def test_missing_key(folder):
    rewrite(folder / 'model.safetensors', lambda t: t.pop('layer1.0.merge.gate.fc1.weight'))
    refused(folder, 'model.safetensors', r'lacks layer1\.0\.merge\.gate\.fc1\.weight \(1\)')


def test_all_gates_missing(folder):
    """A plain net's weights are no AWM checkpoint, although loading would complete them."""

    def plain(tensors):
        for name in [name for name in tensors if 'gate' in name]:
            del tensors[name]

    rewrite(folder / 'model.safetensors', plain)
    refused(folder, 'model.safetensors', r'lacks .*\(12\)')


def test_extra_key(folder):
    rewrite(folder / 'model.safetensors', lambda t: t.update(extra=torch.zeros(1)))
    refused(folder, 'model.safetensors', r'has in excess extra \(1\)')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_not_finite(folder, value):
    rewrite(folder / 'model.safetensors', lambda t: t['layer1.0.conv1.weight'].view(-1)[3:4].fill_(value))
    refused(folder, 'model.safetensors', r'layer1\.0\.conv1\.weight holds NaN or Inf')


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    'name', ['model.safetensors', 'sample/logits.safetensors', 'pytorch_model.bin', 'notes.txt', 'a.pth']
)
@pytest.mark.parametrize('kind', ['pickle', 'torch'])
def test_pickle_is_not_executed(folder, name, kind, tmp_path):
    mark = tmp_path / 'executed'
    if kind == 'pickle':
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({'state_dict': Bomb(mark)}, folder / name)
    refused(folder, name, 'is a pickle')
    assert not mark.exists()


def test_safetensors_of_another_hand(folder):
    tensors, _ = read_weights(folder / 'model.safetensors')
    safetensors.torch.save_file(tensors, folder / 'model.safetensors')
    refused(folder, 'model.safetensors', 'no digest')


@pytest.mark.parametrize(
    ('change', 'why'),
    [
        ({'architecture': 'resnet14_cifar'}, "names 'resnet14_cifar', but the weights are of 'awm_resnet14_cifar'"),
        ({'model_args': {'hidden': 8}}, r'fc1\.weight has shape'),
        ({'model_args': {'no_such': 1}}, "unexpected keyword argument 'no_such'"),
        ({'model_args': {'pretrained_cfg_overlay': {'file': 'x.pth'}}}, 'pretrained_cfg_overlay among its model_args'),
        ({'model_args': [1]}, 'needs an object'),
        ({'model_args': {'block': 'BasicBlock'}}, "cannot be built: 'str' object has no attribute"),
        ({'num_classes': 3}, 'does not fit the weights|stored logits'),
        ({'num_classes': None}, 'does not fit the weights'),
        ({'num_classes': '10'}, 'does not fit the weights'),
        ({'pretrained_cfg': {'url': 'http://example.org/x.pth'}}, "sets url='http://example.org/x.pth'"),
        ({'pretrained_cfg': {'no_such': 1}}, 'no_such'),
        ({'results': {'top1': [1]}}, 'results lack'),
    ],
)
def test_bad_config(folder, change, why):
    file = folder / 'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused(folder, str(folder), why)


def test_unregistered_architecture(folder):
    file = folder / 'config.json'
    file.write_text(file.read_text().replace('"awm_resnet14_cifar"', '"awm_resnet15_cifar"'))
    rewrite(folder / 'model.safetensors', lambda tensors: None)
    tensors, metadata = read_weights(folder / 'model.safetensors')
    write_weights(tensors, folder / 'model.safetensors', {**metadata, 'architecture': 'awm_resnet15_cifar'})
    refused(folder, 'config.json', "names the architecture 'awm_resnet15_cifar', which is not registered")


@pytest.mark.parametrize('text', ['', '{"architecture": ', '[1, 2]', '\0\0'])
def test_config_that_is_not_json(folder, text):
    (folder / 'config.json').write_text(text)
    refused(folder, 'config.json', 'is not JSON|not an object')


@pytest.mark.parametrize('name', ['README.md', 'config.json', 'model.safetensors', 'sample/logits.safetensors'])
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, name, f'has no {name}')


@pytest.mark.parametrize('text', ['# no front matter', '---\n- a list\n---\n', '---\n{: bad yaml\n---\n'])
def test_bad_card(folder, text):
    (folder / 'README.md').write_text(text)
    refused(folder, 'README.md', 'is not a model card')


def test_weights_that_were_exchanged(folder):
    """Whole, finite and of the right shapes, but not those that the sample was made with."""
    rewrite(folder / 'model.safetensors', lambda t: t['layer1.0.conv1.weight'].mul_(-1))
    refused(folder, 'sample/logits.safetensors', 'stored logits')


@pytest.mark.parametrize('shape', [(1, 1, 32, 32), (1, 3, 2, 2)])
def test_a_sample_that_the_net_does_not_take(folder, shape):
    rewrite(folder / 'sample/logits.safetensors', lambda tensors: tensors.update(input=torch.zeros(shape)))
    refused(folder, 'logits.safetensors', 'does not take the stored input')


def test_no_such_folder(tmp_path):
    refused(tmp_path / 'nothing', 'nothing', 'is not a folder')
