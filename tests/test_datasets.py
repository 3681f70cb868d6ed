"""List files, samplers, and batches that depend only on seed, epoch and rank."""
import codecs
import hashlib
import os
import tracemalloc

import numpy as np
import pytest
from conftest import write_images

import datasets
import images
from datasets import (
    EvalSampler,
    TrainSampler,
    count_classes,
    describe_dataset,
    get_dataloader,
    get_dataset,
    parse_line,
    read_list,
)
from utils import UserError


def listed(folder, text, name='train_list.txt'):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_list_paths_may_contain_spaces(tmp_path):
    paths, labels = read_list(listed(tmp_path, 'a/b 1.jpg 0\na/c  d e.jpg 4\r\nlast\t2\n\n'), 5)
    assert list(paths) == ['a/b 1.jpg', 'a/c  d e.jpg', 'last'] and paths[-1] == 'last'
    assert labels.tolist() == [0, 4, 2] and labels.dtype == np.int64


@pytest.mark.parametrize('content', [
    'a/ü 1.jpg 0\r\nb 4\r\n'.encode(),
    'a/ü 1.jpg\t0\rb\t4'.encode(),
    'a/ü 1.jpg 0\nb 4\n\n'.encode('utf-8-sig'),
    'a/ü 1.jpg 0\n\ufeffb 4\n'.encode(),  # two concatenated lists
    *(mark + 'a/ü 1.jpg 0\r\nb 4\r\n'.encode(name) for mark, name in (
        (codecs.BOM_UTF16_LE, 'utf-16-le'), (codecs.BOM_UTF16_BE, 'utf-16-be'))),
])
def test_lists_from_other_systems(tmp_path, content):
    paths, labels = read_list(listed(tmp_path, content), 5)
    assert list(paths) == ['a/ü 1.jpg', 'b'] and labels.tolist() == [0, 4]


@pytest.mark.parametrize('there, expected', [
    (['a/b/1.jpg', 'c/2.jpg'], ['x.jpg', 'a/b/1.jpg', 'c/2.jpg']),
    ([], ['x.jpg', 'a/b/1.jpg', 'c/2.jpg']),
    (['a\\b/1.jpg', 'c\\2.jpg'], ['x.jpg', 'a\\b/1.jpg', 'c\\2.jpg']),  # a valid name on Linux
])
def test_backslashes(tmp_path, monkeypatch, there, expected):
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('')
    logged = []
    monkeypatch.setattr(datasets.LOG, 'info', logged.append)
    path = listed(tmp_path, 'x.jpg 0\r\na\\b/1.jpg 1\r\nc\\2.jpg 2\r\n')
    assert list(read_list(path, 3)[0]) == expected
    line = f"{path}: backslashes in paths are read as slashes, because 'a\\\\b/1.jpg' does not exist"
    assert logged == ([] if '\\' in expected[1] else [line])


def test_backslashes_stay_in_utf16_without_a_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.LOG, 'info', lambda line: pytest.fail(line))
    with pytest.raises(UserError, match='train_list.txt:1: .* contains null characters'):
        read_list(listed(tmp_path, 'a\\b.jpg 0\n'.encode('utf-16-le')), 5)


@pytest.mark.parametrize('text, message', [
    ('a 0\nb\n', r"train_list.txt:2: 'b' is not \"path label\""),
    ('a 0\n\nb 1\n', r"train_list.txt:2: '' is not"),
    ('a 0\nb x\n', 'train_list.txt:2:'),
    ('a 0\nb -1\n', 'train_list.txt:2:'),
    ('a 0\nb 1.0\n', 'train_list.txt:2:'),
    ('a 0\nb 1_0\n', 'train_list.txt:2:'),
    ('a 0\nb \u0663\n', 'train_list.txt:2:'),  # a digit, but not ASCII
    ('a 0\nb ' + '9' * 40, 'train_list.txt:2:'),
    ('a 0\nb 5\nc 11\n', 'train_list.txt:2: label 5 is out of range for MODEL.NUM_CLASSES 5; this list needs 12'),
    ('', 'train_list.txt: the list is empty'),
    ('a 1\nb 5\n', 'train_list.txt:2: labels run from 1 to MODEL.NUM_CLASSES 5, but must count from 0: subtract 1'),
    (b'a\xff\xfe 0\n', r"train_list.txt:1: 'a.* 0' is not UTF-8 text; .*; python -m tools.check_dataset"),
    ('a 0\n照片 1\n'.encode('gbk'), r'train_list.txt:2: .* is not UTF-8 text; save the list as UTF-8 .*-f GBK'),
    (b'a 0\n' + 'b 1\n'.encode('utf-16-le'), r'train_list.txt:2: .* contains null characters \(UTF-16 without'),
    (b'\xff\xfea\0 \x000', 'train_list.txt: is not valid UTF-16 at byte 6; save it as UTF-8'),
    ('a 0\nC:\\photos\\b.jpg 1\n', 'train_list.txt:2: .* is on a Windows drive or share; write paths relative'),
    ('a 0\nC:/photos/b.jpg 1\n', 'train_list.txt:2: .* is on a Windows drive'),
    ('a 0\nD:b.jpg 1\n', 'train_list.txt:2: .* is on a Windows drive'),
    ('a\\b 0\n\\\\nas\\photos\\b.jpg 1\n', 'train_list.txt:2: .* is on a Windows drive'),
])
def test_list_errors_name_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_list(listed(tmp_path, text), 5)


@pytest.mark.parametrize('block', [1, 2, 1000])
def test_block_parsing_agrees_with_parse_line(tmp_path, monkeypatch, block):
    """The result for a line does not depend on other lines or on where a block ends."""
    monkeypatch.setattr(datasets, 'BLOCK_LINES', block)
    monkeypatch.setattr(datasets, 'BLOCK_BYTES', block)
    lines = ['a/b.jpg 3', ' a 0', 'x\t12', 'x  7 ', '5 5', 'é 1', 'x\u3000 2', 'x\u30003', 'x\x0b4', '~ 0123', '\x7f 9',
             f'x {"0" * 17}8', '1 10', '::/b 3']
    paths, labels = read_list(listed(tmp_path, '\n'.join(lines)), 1000)
    assert list(zip(paths, labels.tolist())) == [parse_line(line) for line in lines]
    for bad in ('12', 'x1', 'x 1' + '0' * 18, b'\xff 1', 'x \u0661', ' 1', 'x 1 a', '-1', 'x -1', 'C:/x 1', 'd:x 1',
                '\\\\x 1'):
        for place in range(len(lines)):
            with pytest.raises(UserError, match=f'train_list.txt:{place + 1}: .* is (not|on) '):
                text = [line.encode() for line in lines]
                text[place] = bad.encode() if isinstance(bad, str) else bad
                read_list(listed(tmp_path, b'\n'.join(text)), 1000)


def test_a_list_takes_little_more_memory_than_its_file(tmp_path):
    """Adds only a start and a label per line, and no strings, which each data worker would copy."""
    count = 200_000
    path = listed(tmp_path, ''.join(f'train/n01440764/n01440764_{number}.JPEG 0\n' for number in range(count)))
    tracemalloc.start()
    paths, labels = read_list(path, 1)
    kept, peak = (memory - os.path.getsize(path) - 16 * count for memory in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert len(paths) == len(labels) == count and paths[7] == 'train/n01440764/n01440764_7.JPEG'
    assert kept < 2 ** 20 and peak < 16 * 2 ** 20


def test_missing_list(tmp_path):
    with pytest.raises(UserError, match='train_list.txt.*No such file.*DATA.DATA_PATH'):
        read_list(str(tmp_path / 'train_list.txt'), 5)


def test_train_sampler():
    def epoch(number, seed=0, **kwargs):
        sampler = TrainSampler(23, 5, seed, **kwargs)
        sampler.set_epoch(number)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        return batches

    first = epoch(1)
    assert [len(batch) for batch in first] == [5] * 4  # the partial batch is dropped
    flat = [index for batch in first for _, index in batch]
    assert len(set(flat)) == 20 and set(flat) <= set(range(23)) and flat != sorted(flat)
    assert all(number == 1 for batch in first for number, _ in batch)
    assert first == epoch(1)
    assert [i for b in epoch(2) for _, i in b] != flat
    assert [i for b in epoch(1, seed=1) for _, i in b] != flat
    # two ranks split the images of one rank with twice the batch size
    ranks = [epoch(1, rank=rank, world_size=2) for rank in (0, 1)]
    sampler = TrainSampler(23, 10, 0)
    assert [a + b for a, b in zip(*ranks)] == list(sampler)


def test_train_sampler_keeps_the_only_batch():
    assert [len(batch) for batch in TrainSampler(3, 5, 0)] == [3]
    parts = [list(TrainSampler(3, 5, 0, rank, 2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [1, 1]
    assert sorted(index for part in parts for _, index in part[0]) == [0, 1, 2]
    with pytest.raises(UserError, match='1 training images are too few for 2 processes'):
        TrainSampler(1, 5, 0, 0, 2)


@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
def test_eval_sampler_has_every_image_once(world_size):
    samplers = [EvalSampler(7, 2, rank, world_size) for rank in range(world_size)]
    batches = [batch for sampler in samplers for batch in sampler]
    assert sorted(index for batch in batches for _, index in batch) == list(range(7))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


def digests(config, epoch, is_train=True, **kwargs):
    loader = get_dataloader(config, get_dataset(config, is_train), is_train, **kwargs)
    if is_train:
        loader.batch_sampler.set_epoch(epoch)
    return [hashlib.sha1(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest() for images, labels in loader]


@pytest.fixture(scope='module')
def jpegs(tmp_path_factory):
    """A training set of 60 JPEG files."""
    folder = tmp_path_factory.mktemp('jpegs')
    write_images(folder / 'train', 60, (130, 110))
    (folder / 'train_list.txt').write_text(''.join(f'train/photo {index}.jpg 0\n' for index in range(60)))
    return folder


@pytest.mark.parametrize('backend', ['pillow', 'fast'])
def test_batches_depend_only_on_seed_epoch_and_rank(config, jpegs, backend):
    config.DATA.DATA_PATH = str(jpegs)
    config.DATA.IMAGE_BACKEND = backend
    config.DATA.BATCH_SIZE = 16
    # with workers first: if a thread that has used OpenCV ends during the fork, a worker can inherit a held lock
    with_workers = []
    for config.DATA.NUM_WORKERS in (1, 3):
        with_workers.append(digests(config, 1))
    config.DATA.NUM_WORKERS = 0
    first = digests(config, 1)
    assert with_workers == [first, first] and len(set(first)) == 3
    assert set(digests(config, 2)).isdisjoint(first)
    assert set(digests(config, 1, rank=1, world_size=2)).isdisjoint(digests(config, 1, rank=0, world_size=2))
    config.SEED = 1
    assert set(digests(config, 1)).isdisjoint(first)


def test_backends_crop_and_flip_alike(config, jpegs, monkeypatch):
    config.DATA.DATA_PATH = str(jpegs)
    asked = []

    def record(image, *args):
        asked.append(args)
        return np.zeros((32, 32, 3), 'uint8')
    monkeypatch.setattr(images.Jpeg, 'region', record)
    for config.DATA.IMAGE_BACKEND in ('pillow', 'fast'):
        dataset = get_dataset(config)
        for index in range(60):
            dataset[1, index]
    assert asked[:60] == asked[60:] and len(set(asked)) == 60
    assert {side for _, side, _, _ in asked} == {32} and {flip for *_, flip in asked} == {False, True}


def test_epochs_of_one_loader_differ(config, fashion):
    """Order and crops change, and workers follow the sampler's epoch, not the one in which they started."""
    config.DATA.DATA_PATH = str(fashion)
    config.DATA.NUM_WORKERS = 2
    dataset = get_dataset(config)
    assert (dataset[1, 0][0] != dataset[2, 0][0]).any() and (dataset[1, 0][0] == dataset[1, 0][0]).all()
    loader = get_dataloader(config, dataset)
    epochs = []
    for epoch in (1, 2, 1):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append([images.numpy() for images, _ in loader])
    assert all((a == b).all() for a, b in zip(epochs[0], epochs[2]))
    assert all((a != b).any() for a, b in zip(epochs[0], epochs[1]))


def test_seed_reaches_the_crops(config, fashion):
    config.DATA.DATA_PATH = str(fashion)
    before = get_dataset(config)[1, 0][0]
    config.SEED = 1
    assert (get_dataset(config)[1, 0][0] != before).any()
    assert (get_dataset(config)[0][0] == get_dataset(config)[0, 0][0]).all()  # without an epoch: epoch 0


def test_loaded_batch(config, fashion):
    config.DATA.DATA_PATH = str(fashion)
    config.DATA.BATCH_SIZE, config.DATA.BATCH_SIZE_EVAL = 60, 10
    batch, labels = next(iter(get_dataloader(config, get_dataset(config))))
    assert str(batch.dtype).endswith('uint8') and batch.shape == [60, 32, 32, 3]
    assert str(labels.dtype).endswith('int64') and labels.shape == [60]
    sizes = [len(labels) for _, labels in get_dataloader(config, get_dataset(config, False), False)]
    assert sizes == [10, 10, 10, 5]
    config.DATA.BATCH_SIZE_EVAL = 0  # as BATCH_SIZE
    assert [len(labels) for _, labels in get_dataloader(config, get_dataset(config, False), False)] == [35]


def test_config_reaches_the_images(config, fashion):
    config.DATA.DATA_PATH = str(fashion)
    before = get_dataset(config)[1, 0][0]
    config.DATA.CROP_SCALE = [0.1, 0.2]
    assert (get_dataset(config)[1, 0][0] != before).any()
    before = get_dataset(config, False)[0, 0][0]
    config.DATA.CROP_PCT = 0.5
    assert (get_dataset(config, False)[0, 0][0] != before).any()
    config.DATA.DATASET = 'cifar10'
    with pytest.raises(UserError, match='cifar10'):
        get_dataset(config)
    config.DATA.DATASET, config.DATA.INTERPOLATION = 'imagenet2012', 'cubic'
    with pytest.raises(UserError, match="DATA.INTERPOLATION is 'cubic', but must be one of nearest"):
        get_dataset(config)


def test_unused_classes_are_reported(config, fashion):
    config.DATA.DATA_PATH = str(fashion)
    line = describe_dataset(get_dataset(config), 10)
    assert line.endswith('train_list.txt: 60 images, labels 0 to 9, 16.7% of them in the largest class')
    assert describe_dataset(get_dataset(config), 12) == f'{line}: 2 of MODEL.NUM_CLASSES 12 unused'
    assert describe_dataset(get_dataset(config), 1000) == (
        f'{line}: 990 of MODEL.NUM_CLASSES 1000 unused; set MODEL.NUM_CLASSES 0 to take it from the data')
    assert describe_dataset(get_dataset(config), 1000, False) == f'{line}: 990 of MODEL.NUM_CLASSES 1000 unused'


def test_labels_that_start_at_1_are_reported(config, tmp_path):
    """Without class_names.txt, the number of classes does not reveal unused ones."""
    listed(tmp_path, 'a 1\nb 2\nc 3\nd 3\n')
    listed(tmp_path, 'a 1\n', 'val_list.txt')
    config.DATA.DATA_PATH, config.MODEL.NUM_CLASSES = str(tmp_path), 0
    assert describe_dataset(get_dataset(config), 4) == (
        f'{tmp_path}/train_list.txt: 4 images, labels 1 to 3, 50.0% of them in the largest class; labels count from 0: '
        'if these start at 1, subtract 1 from each')


def test_num_classes_0_counts_the_classes_of_the_data(config, tmp_path):
    config.DATA.DATA_PATH, config.MODEL.NUM_CLASSES = str(tmp_path), 0
    with pytest.raises(UserError, match='train_list.txt: cannot read the list'):
        count_classes(str(tmp_path))
    (tmp_path / 'train_list.txt').write_text('a.jpg 0\nb.jpg 1\n')
    (tmp_path / 'val_list.txt').write_text('c.jpg 2\n')
    assert count_classes(str(tmp_path)) == (3, str(tmp_path / 'val_list.txt'))
    assert get_dataset(config).labels.tolist() == [0, 1]
    (tmp_path / 'class_names.txt').write_bytes(b'\xef\xbb\xbfcat\r\ndog\r\nowl\r\nelk\r\n\r\n')
    assert count_classes(str(tmp_path)) == (4, str(tmp_path / 'class_names.txt'))
    (tmp_path / 'class_names.txt').write_text('cat\ndog\n')
    line = 'val_list.txt:1: label 2 is out of range for MODEL.NUM_CLASSES 2; this list needs 3'
    with pytest.raises(UserError, match=f'{line}, but {tmp_path}/class_names.txt has 2 names: add the missing ones$'):
        get_dataset(config, False)
    (tmp_path / 'class_names.txt').write_text('cat\ndog\nowl\n')
    config.MODEL.NUM_CLASSES = 2
    with pytest.raises(UserError, match=f'{line}$'):
        get_dataset(config, False)
    (tmp_path / 'class_names.txt').write_text('cat\n\nowl\n')
    with pytest.raises(UserError, match="class_names.txt:2: '' is not a name"):
        count_classes(str(tmp_path))


def test_a_rank_outside_the_group_is_refused(fashion, config):
    config.DATA.DATA_PATH = str(fashion)
    with pytest.raises(UserError, match='rank is True, but must be below world_size, 1'):
        get_dataloader(config, get_dataset(config), True, True)


@pytest.mark.parametrize('length, batch, line', [
    (60, 16, '12 of 60 training images, different ones each epoch, are dropped: they do not fill a batch of 16'),
    (60, 15, ''), (7, 16, ''),
])
def test_dropped_images_are_reported(length, batch, line):
    sampler = TrainSampler(length, batch, seed=0)
    assert sampler.describe_dropped() == line
    assert sum(map(len, sampler)) == length - int(line.split()[0] if line else 0)
