"""Image sets in memory and their batches, against torchvision's transforms."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torchvision.transforms import functional as tv

from timm_weighted_skip.analysis.data import load_images
from timm_weighted_skip.data import ImageSet, load_image_set
from timm_weighted_skip.train.batches import Batches
from timm_weighted_skip.train.recipe import Recipe
from timm_weighted_skip.train.runs import run_seeds
from timm_weighted_skip.train.task import Task
from timm_weighted_skip.train.trainer import normalisation, pixel_moments

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def image_set(count=20, size=8, channels=3, classes=4):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(256, size=(count, size, size, channels), dtype=np.uint8))
    return ImageSet(images, torch.arange(count) % classes, tuple('abcd'[:classes]))


@pytest.mark.parametrize('download', [False, True])
def test_torchvision_fetches_what_it_is_asked_to(monkeypatch, tmp_path, download):
    def stand_in(root, train, download):
        asked.append((root, train, download))
        return SimpleNamespace(data=np.zeros((2, 32, 32, 3), np.uint8), targets=[0, 1], classes=['a', 'b'])

    asked = []
    monkeypatch.setattr('torchvision.datasets.CIFAR10', stand_in)
    task = Task('awm_resnet14_cifar', 'cifar10', str(tmp_path), download, recipe=Recipe(epochs=1, batch_size=2))
    assert run_seeds(task, tmp_path / 'run', [0])['last']['epoch'] == 0
    assert asked == [(str(tmp_path), True, download), (str(tmp_path), False, download)]


def test_pixel_statistics_are_the_recipes_else_the_nets_else_the_images():
    net = timm.create_model('resnet14_cifar')
    colour, grey = image_set(), image_set(channels=1)
    assert normalisation(Recipe(), net, colour) == (net.pretrained_cfg['mean'], net.pretrained_cfg['std'])
    pixels = grey.images.numpy() / 255
    assert normalisation(Recipe(), net, grey) == (
        pytest.approx((pixels.mean(),)),
        pytest.approx((pixels.std(),), rel=1e-3),
    )
    assert normalisation(Recipe(mean=[0.0], std=[1.0]), net, grey) == ((0.0,), (1.0,))
    assert normalisation(Recipe(mean=[0.0], std=[1.0]), net, colour) == ((0.0,) * 3, (1.0,) * 3)
    released = timm.create_model('resnet18_released')  # whose three channels have one mean and one deviation
    assert normalisation(Recipe(), released, grey) == ((0.0,), (1.0,))
    assert normalisation(Recipe(), released, colour) == ((0.0,) * 3, (1.0,) * 3)
    of_channels = [0.1, 0.2, 0.3]
    assert normalisation(Recipe(mean=of_channels), net, colour) == (tuple(of_channels), net.pretrained_cfg['std'])
    mean, std = normalisation(Recipe(mean=[0.0]), net, grey)
    assert (mean, std) == ((0.0,), pytest.approx((pixels.std(),), rel=1e-3))


def test_pixel_statistics_do_not_depend_on_the_number_of_threads():
    images = image_set(channels=2).images
    pixels = images.double() / 255
    expected = [pixels.mean((0, 1, 2)).tolist(), pixels.std((0, 1, 2)).tolist()]
    assert [*pixel_moments(images)] == [pytest.approx(values, rel=1e-12) for values in expected]
    threads, many, found = torch.get_num_threads(), image_set(2000, 32, 1).images, []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(pixel_moments(many))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def by_torchvision(image, padding, top, left, flip):
    image = tv.pad(Image.fromarray(image.numpy()), padding)
    image = tv.crop(image, top, left, image.height - 2 * padding, image.width - 2 * padding)
    return tv.normalize(tv.to_tensor(tv.hflip(image) if flip else image), MEAN, STD)


def test_every_crop_and_flip_is_torchvisions():
    data = image_set()
    batches = Batches(data, 5, MEAN, STD, pad_crop=2, hflip=0.5)
    for flip in (False, True):
        for top in range(5):
            for left in range(5):
                tensors = (torch.tensor([value]) for value in (7, top, left, flip))
                x, _ = batches._take(*tensors)
                torch.testing.assert_close(x[0], by_torchvision(data.images[7], 2, top, left, flip), atol=1e-5, rtol=0)


def test_test_batches_are_every_image_as_it_is():
    data = image_set()
    for pad_crop in (0, 3):
        x, labels = (torch.cat(parts) for parts in zip(*Batches(data, 7, MEAN, STD, pad_crop=pad_crop).in_order()))
        expected = torch.stack([by_torchvision(image, 0, 0, 0, False) for image in data.images])
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)
        assert torch.equal(labels, data.labels)


def test_shuffled_epoch_draws_every_offset_and_flip_and_no_image_twice():
    # Each image is one bright pixel in the middle, of a colour that names the image: its place tells the crop.
    images = torch.zeros(250, 5, 5, 1, dtype=torch.uint8)
    images[:, 2, 1, 0] = torch.arange(1, 251)
    data = ImageSet(images, torch.zeros(250, dtype=torch.long), ('a',))
    batches = Batches(data, 50, (0.0,), (1.0,), pad_crop=1, hflip=0.5)
    x = torch.cat([x for x, _ in batches.shuffled(seed=0, epoch=0)])
    bright = x.flatten(1).max(1)
    assert (bright.values * 255).round().int().sort().values.tolist() == list(range(1, 251))
    rows, columns = bright.indices // 5, bright.indices % 5
    assert set(rows.tolist()) == {1, 2, 3}
    assert set(columns.tolist()) == {0, 1, 2, 3, 4}  # 0 to 2 as it is, 2 to 4 mirrored


def test_an_epoch_depends_on_seed_and_number_and_can_be_taken_up_anywhere():
    batches = Batches(image_set(), 4, MEAN, STD, pad_crop=2, hflip=0.5, channels_last=True)
    whole = list(batches.shuffled(1, 3))
    assert len(whole) == 5
    for start in range(6):
        rest = list(batches.shuffled(1, 3, start))
        assert len(rest) == 5 - start
        assert all(torch.equal(a, b) for pair in zip(rest, whole[start:]) for a, b in zip(*pair))
    for other in ((1, 4), (2, 3)):
        assert not torch.equal(next(batches.shuffled(*other))[0], whole[0][0])
    assert whole[0][0].is_contiguous(memory_format=torch.channels_last)


def test_npz_folder_and_digits_are_read(tmp_path):
    data = image_set()
    for split, folder in (('train', 'train'), ('test', 'validation')):
        np.savez(tmp_path / f'mine_{split}.npz', images=data.images, labels=data.labels, classes=np.array(data.classes))
        for name in data.classes:
            (tmp_path / folder / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(data.images, data.labels)):
            Image.fromarray(image.numpy()).save(tmp_path / folder / data.classes[label] / f'{i:02d}.png')
    for train in (True, False):
        npz, folder = (load_image_set(name, train, tmp_path) for name in ('mine', 'folder'))
        assert torch.equal(npz.images, data.images)
        assert npz.classes == folder.classes == data.classes
        order = data.labels.argsort(stable=True)
        assert torch.equal(folder.images, data.images[order])
        assert torch.equal(folder.labels, data.labels[order])
    np.savez(
        tmp_path / 'bytes_train.npz', images=data.images, labels=data.labels, classes=np.array([b'a', b'b', b'c', b'd'])
    )
    assert load_image_set('bytes', True, tmp_path).classes == data.classes
    train, test = load_image_set('digits', True), load_image_set('digits', False)
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    assert train.images.max() == 255


def test_a_folders_classes_have_timms_numbers(tmp_path):
    for folder in ('train', 'test'):
        for name in ('1', '2', '10', 'Bat', 'ant'):
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new('L', (4, 4)).save(tmp_path / folder / name / 'a.png')
    for train, split in ((True, 'train'), (False, 'test')):
        theirs = create_dataset('', root=str(tmp_path / split), search_split=False)
        data = load_image_set('folder', train, tmp_path)
        assert dict(zip(data.classes, range(5))) == theirs.reader.class_to_idx
        assert data.labels.tolist() == [label for _, label in theirs]
    path = tmp_path / 'train' / 'ant' / 'a.png'
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OSError, match=r'ant/a\.png is not a readable image'):
        load_image_set('folder', True, tmp_path)
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(path)
    with pytest.raises(OSError, match=r'ant/a\.png .* mode I;16, have more than 8 bits; save it with 8'):
        load_image_set('folder', True, tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(path)
    data = path.read_bytes()
    second = data.index(b'IDAT', data.index(b'IDAT') + 4)
    path.write_bytes(data[: second - 4] + bytes(4) + data[second:])
    with pytest.raises(OSError, match=r'ant/a\.png is not a readable image: broken PNG'):  # a SyntaxError to Pillow
        load_image_set('folder', True, tmp_path)


def test_torchvisions_files_are_read_by_training_and_by_analyses(tmp_path):
    raw = tmp_path / 'MNIST/raw'
    raw.mkdir(parents=True)
    images, labels = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4), np.arange(5, dtype=np.uint8)
    for part in ('train', 't10k'):
        for name, array in (('images-idx3', images), ('labels-idx1', labels)):
            header = struct.pack(f'>{1 + array.ndim}i', 0x800 + array.ndim, *array.shape)
            (raw / f'{part}-{name}-ubyte').write_bytes(header + array.tobytes())
    data = load_image_set('mnist', False, tmp_path)
    assert torch.equal(data.images[..., 0], torch.from_numpy(images))
    assert data.labels.tolist() == labels.tolist()
    assert data.classes[7] == '7 - seven'
    analysed = load_images('mnist', timm.create_model('adaresnet14_cifar', in_chans=1), tmp_path, mean=(0,), std=(1,))
    assert analysed.classes == list(data.classes)
    assert np.array_equal(analysed.picture(3), images[3])
    assert analysed[3][1] == 3
    whole = (raw / 't10k-images-idx3-ubyte').read_bytes()
    for size in (len(whole) - 9, 3):
        (raw / 't10k-images-idx3-ubyte').write_bytes(whole[:size])
        with pytest.raises(OSError, match='if they are damaged, remove them and fetch them again with --download'):
            load_image_set('mnist', False, tmp_path)


def test_torchvisions_imagenet_has_several_names_for_a_class(tmp_path):
    names = {f'n{number}': (f'name{number}', 'alias') for number in range(3)}
    torch.save((names, []), tmp_path / 'meta.bin')
    for wnid in names:
        (tmp_path / 'val' / wnid).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(tmp_path / 'val' / wnid / '0.png')
    images = load_images('imagenet', timm.create_model('resnet14_cifar', num_classes=3), tmp_path)
    assert images.classes == ['name0, alias', 'name1, alias', 'name2, alias']
    assert [label for _, label in images] == [0, 1, 2]


def test_images_are_of_the_size_that_timm_tests_with():
    net = timm.create_model('awm_resnet18.a1_in1k', num_classes=10)
    assert net.pretrained_cfg['test_input_size'] != net.pretrained_cfg['input_size']
    expected = create_transform(**resolve_data_config({}, model=net, use_test_size=True))
    assert str(load_images('digits', net).transform) == str(expected)
    assert load_images('digits', net, input_size=(3, 64, 64))[0][0].shape == (3, 64, 64)


def test_what_is_no_image_set_is_refused_in_one_line(tmp_path):
    def refused(match, data, error=(ValueError, OSError)):
        with pytest.raises(error, match=match) as caught:
            load_image_set(data, True, tmp_path)
        assert '\n' not in str(caught.value)

    refused('choose one of cifar10', 'imagenet')
    refused('cifar10_train.npz', 'cifar10')
    refused('no folder train', 'folder')
    (tmp_path / 'a_train.npz').write_bytes(b'PK\x03\x04 cut off')
    refused('a_train.npz is not a readable image set', 'a')
    np.savez(tmp_path / 'b_train.npz', x=np.zeros(3))
    refused("'x'", 'b')
    np.savez(tmp_path / 'c_train.npz', images=np.zeros((0, 4, 4, 3), np.uint8), labels=np.zeros(0, int))
    refused('empty', 'c')
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / 'd_train.npz', images=images, labels=np.array([0, 1, 2]), classes=np.array(['x', 'y']))
    refused('labels 0 to 2 with 2 classes', 'd')
    np.savez(tmp_path / 'e_train.npz', images=images.astype(float), labels=np.array([0, 1, 2]))
    refused('uint8', 'e')
    np.savez(tmp_path / 'f_train.npz', images=images, labels=np.array([0.9, 1.7, 2.9]))
    refused('labels are float64; they must be integers', 'f')
    with pytest.raises(ValueError, match='--data-dir'):
        load_image_set('cifar10', True)
    with pytest.raises(ValueError, match='smaller --batch-size'):
        next(Batches(image_set(), 21, MEAN, STD).shuffled(0, 0))
