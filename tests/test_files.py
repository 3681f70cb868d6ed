"""Writing files completely or not at all, and rejecting paths that are not regular files."""
import codecs
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from conftest import fails, options, run, with_lists, write_images
from test_tools import idx

from config import get_config
from datasets import read_lines
from images import read_image
from runtime import checkpoint, files
from utils import UserError


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / 'x'
    for text in ('one\n', 'zwei: ß\n'):
        files.write_text(str(path), text)
        assert path.read_text('utf-8') == text and os.listdir(tmp_path) == ['x']


def test_an_error_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / 'x'
    path.write_text('as it was')

    def write(partial):
        pathlib.Path(partial).write_text('half')
        raise MemoryError
    with pytest.raises(MemoryError):
        files.replace(str(path), write)
    assert path.read_text() == 'as it was' and os.listdir(tmp_path) == ['x']
    with pytest.raises(UserError, match=f'^{re.escape(str(tmp_path))}/gone/x: cannot write'):
        files.write_text(str(tmp_path / 'gone/x'), '')


def make_list(folder, fashion):
    write_images(folder / 'a', 4)
    return ['-m', 'tools.make_list', '-data_path', folder, '-train', '.', '-val_share', '0.5']


def make_fashion_mnist(folder, fashion):
    for split in ('train', 't10k'):
        idx(folder, split, np.zeros((2, 28, 28), 'uint8'), np.zeros(2, 'uint8'))
    return ['-m', 'tools.make_fashion_mnist', '-source', folder, '-output', folder]


def show_recipe(folder, fashion):
    return ['-m', 'tools.show_recipe', '-json', folder / 'recipe.json', '-opts', 'TRAIN.NUM_EPOCHS', '6']


def plot_recipe(folder, fashion):
    pytest.importorskip('matplotlib', reason='drawing is an optional extra')
    return ['-m', 'tools.show_recipe', '-plot', folder / 'recipe.png', '-opts', 'TRAIN.NUM_EPOCHS', '6']


def plot_log(folder, fashion):
    pytest.importorskip('matplotlib', reason='drawing is an optional extra')
    record = {'epoch': 1, 'split': 'train', 'weights': 'raw', 'loss': 1, 'acc1': 1, 'lr': 1, 'weight_decay': 1,
              'image_size': 32}
    (folder / 'log.jsonl').write_text(json.dumps(record) + '\n')
    (folder / 'config.yaml').write_text('')
    return ['-m', 'tools.plot_log', folder, '-save', folder / 'curves.png']


def draw_block(folder, fashion):
    pytest.importorskip('matplotlib', reason='drawing is an optional extra')
    return ['-m', 'tools.draw_block', '-save', folder / 'block.png']


def train(folder, fashion):
    return ['main_single_gpu.py', '-output', folder, *options(fashion)]


@pytest.mark.parametrize('prepare, name', [
    (make_list, 'train_list.txt'), (make_list, 'val_list.txt'), (make_list, 'class_names.txt'),
    (make_fashion_mnist, 'train_list.txt'), (make_fashion_mnist, 'val_list.txt'),
    (make_fashion_mnist, 'class_names.txt'), (show_recipe, 'recipe.json'), (plot_recipe, 'recipe.png'),
    (plot_log, 'curves.png'), (draw_block, 'block.png'), (train, 'config.yaml'),
], ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_full_disk_leaves_the_old_file(prepare, name, fashion, tmp_path):
    command = prepare(tmp_path, fashion)
    path = tmp_path / name
    path.write_text('')
    (tmp_path / f'{name}.partial').symlink_to('/dev/full')
    assert f'error: {path}: cannot write (No space left on device); free up disk space' in fails(*command)
    assert path.read_text() == '' and not os.path.lexists(tmp_path / f'{name}.partial')


def test_a_full_disk_leaves_no_checked_list(fashion, tmp_path):
    """tools.check_dataset does not replace existing lists."""
    (tmp_path / 'val_list.txt.partial').symlink_to('/dev/full')
    line = fails('-m', 'tools.check_dataset', '-data_path', fashion, '-save', tmp_path)
    assert f'error: {tmp_path}/val_list.txt: cannot write (No space left on device)' in line
    assert os.listdir(tmp_path) == ['train_list.txt']


def test_a_full_disk_leaves_the_lists_of_ablations_unchanged(fashion, tmp_path):
    from tools import ablations

    command = ['-m', 'tools.ablations', '-data_path', fashion, '-output', tmp_path, '-train_images', '20', '-epochs',
               '2', '-weight_decay', '0.1']
    folder = tmp_path / '2_epochs_of_20_decay_0.1/data'
    ablations.write_lists(str(fashion), str(folder), 20)
    for name in ('train_list.txt', 'val_list.txt'):
        before = (folder / name).read_bytes()
        (folder / f'{name}.partial').symlink_to('/dev/full')
        assert f'error: {folder / name}: cannot write (No space left on device)' in fails(*command)
        assert (folder / name).read_bytes() == before and len(os.listdir(folder)) == 2


def make_irregular(kind, path):
    """Create something other than a regular file. Returns: its name in messages."""
    if kind == 'folder':
        path.mkdir()
        return 'a folder'
    if kind == 'pipe':
        os.mkfifo(path)
    else:
        path.symlink_to('/dev/zero')
    return 'a pipe, a socket or a device'


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'device'])
@pytest.mark.parametrize('function', [
    files.check_regular, read_lines, files.read_names, read_image, get_config, checkpoint.load,
    checkpoint.load_training, checkpoint.check_exists, lambda path: files.write_text(path, '')],
    ids=['check_regular', 'list', 'names', 'image', 'config', 'weights', 'checkpoint', 'check_exists', 'written'])
def test_irregular_files_are_refused(function, kind, tmp_path):
    path = tmp_path / 'x'
    name = make_irregular(kind, path)
    with pytest.raises(UserError, match=f'^{re.escape(str(path))}: is {name}, not a regular file; give a file$'):
        function(str(path))
    assert os.listdir(tmp_path) == ['x'] and not path.is_file()


def test_errors_name_the_config_key_of_the_path(tmp_path):
    with pytest.raises(UserError, match='set MODEL.PRETRAINED to a file$'):
        checkpoint.check_exists(str(tmp_path), 'MODEL.PRETRAINED')


def test_missing_files_are_not_irregular(tmp_path):
    files.check_regular(str(tmp_path / 'x'))
    (tmp_path / 'x').symlink_to('nowhere')
    files.check_regular(str(tmp_path / 'x'))


@pytest.mark.parametrize('kind', ['list', 'image', 'config', 'base', 'weights', 'checkpoint', 'teacher'])
def test_programs_refuse_pipes(kind, fashion, tmp_path):
    """The error is one line and immediate, although nothing writes to the pipes."""
    pipe = tmp_path / 'x'
    data = with_lists(fashion, tmp_path / 'data', val=[f'{pipe} 0'] if kind == 'image' else ['val 0'])
    if kind == 'list':
        pipe = data / 'train_list.txt'
        pipe.unlink()
    os.mkfifo(pipe)
    (tmp_path / 'base.yaml').write_text('BASE: [x]\n')
    args = {'config': ['-cfg', pipe], 'base': ['-cfg', tmp_path / 'base.yaml'], 'weights': ['-pretrained', pipe],
            'checkpoint': ['-resume', pipe]}.get(kind, [])
    teacher = ['TRAIN.DISTILLATION.TYPE', 'soft', 'TRAIN.DISTILLATION.TEACHER_CFG', 'configs/mobileone_s0.yaml',
               'TRAIN.DISTILLATION.TEACHER_WEIGHTS', pipe, 'MODEL.NUM_CLASSES', '1000']
    line = fails('main_single_gpu.py', '-output', tmp_path / 'run', *args, *options(
        data, 'TRAIN.NUM_EPOCHS', '1', *(teacher if kind == 'teacher' else [])))
    assert f'{pipe}: is a pipe, a socket or a device, not a regular file; ' in line


def test_check_dataset_lists_pipes(fashion, tmp_path):
    """Pipes are listed together with other bad lines."""
    os.mkfifo(tmp_path / 'x')
    shutil.copy(fashion / (fashion / 'val_list.txt').read_text().split()[0], tmp_path / 'y')
    (tmp_path / 'val_list.txt').write_text('x 0\ny 0\n')
    out = run('-m', 'tools.check_dataset', '-data_path', tmp_path, status=1).stdout.splitlines()
    assert out == [f'{tmp_path}/val_list.txt:1: {tmp_path}/x: is a pipe, a socket or a device, not a regular file; '
                   'give a file', f'{tmp_path}/val_list.txt: 2 lines, 1 bad']


def test_make_list_does_not_import_paddle():
    run('-c', 'import sys, tools.make_list; assert "paddle" not in sys.modules', fork=False)


@pytest.mark.parametrize('content', [
    '\ufeffMäuse, graue\r\n"b"\r\n\r\n'.encode(), 'Mäuse, graue\r"b"'.encode(),
    'Mäuse, graue\r\n"b"\r\n'.encode('utf-16'), codecs.BOM_UTF16_BE + 'Mäuse, graue\n"b"'.encode('utf-16-be'),
])
def test_names_from_any_system(content, tmp_path):
    (tmp_path / 'names.txt').write_bytes(content)
    assert files.read_names(str(tmp_path / 'names.txt')) == ('Mäuse, graue', '"b"')


@pytest.mark.parametrize('content, message', [
    (b'', "names.txt:1: '' is not a name; write one name per line, in UTF-8"),
    (b'a\n \nb\n', "names.txt:2: ' ' is not a name"),
    ('a\nb\n'.encode('utf-16-le'), r"names.txt:1: 'a\\x00' is not a name"),
    ('Mäuse\nb'.encode('latin-1'), 'names.txt: cannot be read .*; save it as UTF-8'),
    (b'\xff\xfea\0\n', 'names.txt: is not valid UTF-16 at byte 4; save it as UTF-8'),
])
def test_invalid_names_are_refused(content, message, tmp_path):
    (tmp_path / 'names.txt').write_bytes(content)
    with pytest.raises(UserError, match=message):
        files.read_names(str(tmp_path / 'names.txt'))
