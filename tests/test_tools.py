"""The tools, and the commands that lead from class folders to a fine-tuned model."""
import fcntl
import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import termios
import time

import forked
import numpy as np
import pytest
from conftest import NARROW, ROOT, fails, options, records, run, with_lists, write_images
from PIL import Image

from config import get_config
from images import read_image
from runtime import checkpoint
from tools.benchmark.__main__ import COMMANDS

PROGRAMS = [['main_single_gpu.py'], ['main_multi_gpu.py'], ['load_pytorch_weights.py'],
            *(['-m', 'tools.benchmark', command] for command in COMMANDS),
            *(['-m', f'tools.{path.stem}'] for path in sorted((ROOT / 'tools').glob('[a-z]*.py')))]


@pytest.mark.parametrize('program', PROGRAMS, ids=' '.join)
def test_help_is_complete(program):
    out = run(*program, '-h', fork=False).stdout
    name = ' '.join(program).replace('-m ', '')
    assert out.startswith(f'usage: {name}') and f'python {" ".join(program)}' in out
    flags = set(re.findall(r'(?<=[\[ ])-[a-z_]+', out.split('\n\n')[0])) - {'-h'}
    assert len(flags) == {'main_single_gpu.py': 17, 'main_multi_gpu.py': 18}.get(name, len(flags)) > 0
    # every flag in the usage line has its own entry: flag, placeholders, then words
    entries = re.split(r'\n  (?=-)', '\n  ' + re.split(r'\n(?:options|optional arguments):\n', out)[1].strip('\n'))
    placeholders = r'^\S+( \[?[A-Z][A-Z ]*(\.\.\.)?\]?)?'
    words = {entry.split()[0]: re.sub(placeholders, '', entry).split() for entry in entries[1:]}
    for flag in flags:
        assert len(words[flag]) >= 3, f'{flag} is not explained'
    assert fails(*program, '-nonsense').startswith(f'{name}: error: ')


def read(path):
    return path.read_text().splitlines()


def test_make_list_with_two_folders(tmp_path):
    for split, count in (('training set', 3), ('val', 2)):
        for name in ('zebra', 'Ant', 'sea lion'):
            write_images(tmp_path / split / name, count)
    (tmp_path / 'training set/zebra/deep').mkdir()
    shutil.copy(tmp_path / 'val/zebra/photo 0.jpg', tmp_path / 'training set/zebra/deep/X.JPEG')
    (tmp_path / 'training set/zebra/notes.txt').write_text('')
    (tmp_path / 'training set/zebra/._photo.jpg').write_text('')
    (tmp_path / 'training set/.cache').mkdir()
    out = run('-m', 'tools.make_list', '-data_path', tmp_path, '-train', 'training set', '-val', 'val').stdout
    assert read(tmp_path / 'class_names.txt') == ['Ant', 'sea lion', 'zebra'] and 'MODEL.NUM_CLASSES 3' in out
    assert read(tmp_path / 'train_list.txt') == [
        f'training set/{name}/{file} {label}' for label, name in enumerate(['Ant', 'sea lion', 'zebra'])
        for file in (['deep/X.JPEG'] if name == 'zebra' else []) + [f'photo {i}.jpg' for i in range(3)]]
    assert len(read(tmp_path / 'val_list.txt')) == 6
    shutil.rmtree(tmp_path / 'val/zebra')
    line = fails('-m', 'tools.make_list', '-data_path', tmp_path, '-train', 'training set', '-val', 'val')
    assert 'only one of them has zebra' in line


def test_make_list_reports_what_it_leaves_out(tmp_path):
    for name in ('photos/cat', 'photos/dog', 'photos/cat/.ipynb_checkpoints', 'photos/.Trash-0', 'more dogs'):
        write_images(tmp_path / name, 2)
    Image.new('RGB', (5, 5)).save(tmp_path / 'photos/cat/x.ppm')
    for name in ('cat/IMG_1.heic', 'cat/IMG_2.HEIC', 'photo.jpg', 'output/run/config.yaml', 'output/run/log.jsonl',
                 'output/run/curves.png', 'report/report.html', 'report/images.csv', 'report/worst.png'):
        path = tmp_path / 'photos' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('')
    (tmp_path / 'photos/dog/more').symlink_to('../../more dogs')
    (tmp_path / 'photos/dog/all').symlink_to('..')
    (tmp_path / 'photos/bird').symlink_to(tmp_path / 'more dogs')
    (tmp_path / 'photos/dog/link.jpg').symlink_to('../cat/photo 0.jpg')
    for name in ('bird', 'cat', 'dog'):
        write_images(tmp_path / 'val' / name, 1)
    (tmp_path / 'val/cat/seen.jpg').symlink_to('../../photos/cat/photo 1.jpg')
    out = run('-m', 'tools.make_list', '-data_path', tmp_path, '-train', 'photos', '-val', 'val').stdout.splitlines()
    folder = f'{tmp_path}/photos: left out'
    assert sorted(out[:7]) == [
        f'{folder} 1 (folders already searched): dog/more',
        f'{folder} 1 (images already listed under another path): dog/link.jpg',
        f'{folder} 1 (images outside the class folders): photo.jpg',
        f'{folder} 1 (links to a parent folder): dog/all',
        f'{folder} 2 (.heic files, which Pillow cannot read): cat/IMG_1.heic; cat/IMG_2.HEIC',
        f'{folder} 2 (folders of runs or reports): output/run; report',
        f'{folder} 2 (hidden or system files and folders): .Trash-0; cat/.ipynb_checkpoints']
    assert out[7] == f'{tmp_path}/val: left out 1 (images already listed under another path): cat/seen.jpg'
    assert read(tmp_path / 'class_names.txt') == ['bird', 'cat', 'dog']
    assert read(tmp_path / 'train_list.txt') == [f'photos/{name} {label}' for label, names in enumerate([
        ['bird/photo 0.jpg', 'bird/photo 1.jpg'], ['cat/photo 0.jpg', 'cat/photo 1.jpg', 'cat/x.ppm'],
        ['dog/photo 0.jpg', 'dog/photo 1.jpg']]) for name in names]
    assert read(tmp_path / 'val_list.txt') == [
        f'val/{name}/photo 0.jpg {label}' for label, name in enumerate(['bird', 'cat', 'dog'])]


def test_make_list_follows_links(tmp_path):
    """Links may lead outside the dataset, or to images next to the class folders."""
    for folder, target in (('train/a', '..'), ('train/b', '../../x'), ('val/a', '../../y'), ('val/b', '../../z')):
        write_images((tmp_path / folder / target).resolve(), 2)
        (tmp_path / folder).mkdir(parents=True)
        for index in range(2):
            (tmp_path / folder / f'{index}.jpg').symlink_to(f'{target}/photo {index}.jpg')
    run('-m', 'tools.make_list', '-data_path', tmp_path, '-train', 'train', '-val', 'val')
    for split in ('train', 'val'):
        assert read(tmp_path / f'{split}_list.txt') == [
            f'{split}/{name}/{index}.jpg {label}' for label, name in enumerate('ab') for index in range(2)]


def test_make_list_writes_all_lists_or_none(tmp_path):
    for split in ('train', 'val'):
        write_images(tmp_path / split / 'x', 1)
    os.rename(tmp_path / 'val/x/photo 0.jpg', os.fsencode(tmp_path / 'val/x') + b'/caf\xe9.jpg')
    assert 'not in UTF-8' in fails('-m', 'tools.make_list', '-data_path', tmp_path, '-train', 'train', '-val', 'val')
    assert sorted(os.listdir(tmp_path)) == ['train', 'val']


def test_make_list_with_numeric_class_folders(tmp_path):
    """Without -numeric they are sorted as text, and the program warns."""
    for name in ('0', '1', '10', '2'):
        write_images(tmp_path / name, 2)
    command = ['-m', 'tools.make_list', '-data_path', tmp_path, '-train', '.', '-val_share', '0.5']
    out = run(*command).stdout
    assert f'{tmp_path}: the class folders are numbers, but sorted as text, so label 2 is folder 10; -numeric' in out
    assert read(tmp_path / 'class_names.txt') == ['0', '1', '10', '2']
    out = run(*command, '-numeric').stdout
    assert 'sorted as text' not in out and read(tmp_path / 'class_names.txt') == ['0', '1', '2', '10']
    assert [line.split('/')[0] for line in read(tmp_path / 'val_list.txt')] == ['0', '1', '2', '10']
    (tmp_path / '10').rename(tmp_path / '9')
    assert 'sorted as text' not in run(*command).stdout
    (tmp_path / '9').rename(tmp_path / 'nine')
    assert f'-numeric: {tmp_path}/nine is not a number; leave out -numeric' in fails(*command, '-numeric')


def test_make_list_with_a_split(tmp_path):
    for name, count in (('a', 10), ('b', 5), ('c', 2)):
        write_images(tmp_path / name, count)

    def split(*args):
        run('-m', 'tools.make_list', '-data_path', tmp_path, '-train', '.', '-val_share', '0.2', *args)
        return [read(tmp_path / f'{name}_list.txt') for name in ('train', 'val')]

    train, val = split()
    labels = [[line.split()[-1] for line in lines] for lines in (train, val)]
    assert [[part.count(label) for label in '012'] for part in labels] == [[8, 4, 1], [2, 1, 1]]
    assert not set(train) & set(val) and len(set(train) | set(val)) == 17
    assert train[0].startswith('a/photo ')
    assert split() == [train, val]
    assert split('-seed', '1') != [train, val]


@pytest.mark.parametrize('args, message', [
    (['-train', 'gone', '-val_share', '0.2'], 'gone: no such folder'),
    (['-train', 'empty', '-val_share', '0.2'], 'empty: contains no class folders'),
    (['-train', 'odd', '-val_share', '0.2'], 'x: contains no images'),
    (['-train', 'one', '-val_share', '0.2'], 'class x has only one image'),
    (['-train', 'one', '-val_share', '1.5'], '-val_share is 1.5'),
    (['-train', 'one', '-val_share', '0.5', '-seed', '-1'], '-seed is -1'),
    (['-train', 'one'], 'one of the arguments -val -val_share is required'),
    (['-train', 'bytes', '-val_share', '0.5'], 'not in UTF-8'),
])
def test_make_list_errors(tmp_path, args, message):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'odd/x').mkdir(parents=True)
    write_images(tmp_path / 'one/x', 1)
    write_images(tmp_path / 'bytes/x', 1)
    shutil.copy(tmp_path / 'one/x/photo 0.jpg', os.fsencode(tmp_path / 'bytes/x') + b'/caf\xe9.jpg')
    assert message in fails('-m', 'tools.make_list', '-data_path', tmp_path, *args)


def idx(folder, split, images, labels):
    for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
        header = struct.pack('>HBB', 0, 8, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape)
        with gzip.open(folder / f'{split}-{kind}-ubyte.gz', 'wb') as file:
            file.write(header + array.tobytes())


def test_make_fashion_mnist(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (4, 28, 28), dtype='uint8'), np.array([9, 0, 0, 3], 'uint8')
    idx(tmp_path, 'train', images, labels)
    idx(tmp_path, 't10k', images[:2], labels[:2])
    out = tmp_path / 'out'
    for _ in range(2):  # a second run works too
        run('-m', 'tools.make_fashion_mnist', '-source', tmp_path, '-output', out)
    assert read(out / 'train_list.txt') == ['train/Ankle_boot/00000.png 9', 'train/T-shirt_top/00001.png 0',
                                            'train/T-shirt_top/00002.png 0', 'train/Dress/00003.png 3']
    assert len(read(out / 'val_list.txt')) == 2 and len(read(out / 'class_names.txt')) == 10
    for line, image in zip(read(out / 'train_list.txt'), images):
        np.testing.assert_array_equal(np.asarray(Image.open(out / line.rsplit(' ', 1)[0])), image)
    run('-m', 'tools.make_fashion_mnist', '-source', tmp_path, '-output', tmp_path / 'jpg', '-format', 'jpg')
    assert Image.open(tmp_path / 'jpg' / read(tmp_path / 'jpg/val_list.txt')[0].split()[0]).format == 'JPEG'


def test_make_fashion_mnist_errors(tmp_path):
    command = ['-m', 'tools.make_fashion_mnist', '-source', tmp_path, '-output', tmp_path / 'out']
    assert 'train-images-idx3-ubyte.gz: no such file' in fails(*command)
    idx(tmp_path, 'train', np.zeros((3, 28, 28), 'uint8'), np.zeros(2, 'uint8'))
    assert 'do not match; copy the four files again' in fails(*command)
    idx(tmp_path, 'train', np.zeros((0, 28, 28), 'uint8'), np.zeros(0, 'uint8'))
    assert 'do not match; copy the four files again' in fails(*command)
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    whole = (ROOT / 'demo/t10k-images-idx3-ubyte.gz').read_bytes()
    for content in (b'x', whole[:5000], whole[:10] + b'\xff' * 2000 + whole[2010:]):
        path.write_bytes(content)
        assert 'train-images-idx3-ubyte.gz: cannot be read' in fails(*command)
    assert '/dev/null/x' in fails('-m', 'tools.make_fashion_mnist', '-source', 'demo', '-output', '/dev/null/x')


def test_demo_set_is_complete_and_small(tmp_path):
    files = list((ROOT / 'demo').glob('*.gz'))
    assert len(files) == 4 and sum(file.stat().st_size for file in files) < 3e6
    assert 'MIT' in (ROOT / 'demo/LICENSE').read_text()
    run('-m', 'tools.make_fashion_mnist', '-source', 'demo', '-output', tmp_path)
    for split, count in (('train', 5000), ('val', 1500)):
        labels = [int(line.split()[-1]) for line in read(tmp_path / f'{split}_list.txt')]
        assert len(labels) == count and min(np.bincount(labels, minlength=10)) > 0.08 * count


def test_from_class_folders_to_a_fine_tuned_model(fashion, tmp_path):
    """The commands of the README, with a narrow pretrained network of 10 classes and few steps."""
    photos, start, runs = tmp_path / 'my photos', tmp_path / 'start', tmp_path / 'run'
    for name in ('Bag', 'Sneaker'):
        shutil.copytree(fashion / 'train' / name, photos / name)
        for path in sorted((photos / name).iterdir())[12:]:
            path.unlink()
    narrow = ['-opts', *NARROW]
    run('main_single_gpu.py', '-data_path', fashion, '-output', start, *narrow, 'TRAIN.NUM_EPOCHS', '1',
        'MODEL.NUM_CLASSES', '10')
    run('-m', 'tools.make_list', '-data_path', photos, '-train', '.', '-val_share', '0.25')
    assert len(check_dataset(photos, '-opts', 'MODEL.NUM_CLASSES', '0', status=0)) == 4
    # fine-tuning needs pretrained weights
    command = ['main_single_gpu.py', '-cfg', 'configs/finetune.yaml', '-data_path', photos, '-output', runs, *narrow,
               'TRAIN.NUM_EPOCHS', '4']
    assert 'mobileone_s0.pdparams' in fails(*command)
    run(*command, 'MODEL.PRETRAINED', start / 'best.pdparams')
    rows = records(runs)
    # the evaluation at the start, then the only batch, which is kept although it is smaller than BATCH_SIZE
    assert [row['n'] for row in rows[:4]] == [6, 18, 6, 6] and [row['epoch'] for row in rows[:2]] == [0, 1]
    out = run('-m', 'tools.fuse', '-cfg', runs / 'config.yaml', '-pretrained', runs / 'best.pdparams', '-save',
              runs / 'fused.pdparams').stdout
    assert '6 val images' in out
    run('-m', 'tools.plot_log', runs)
    evaluation = ['-cfg', runs / 'config.yaml', '-pretrained', runs / 'best.pdparams']
    run('main_single_gpu.py', *evaluation, '-eval', '-output', runs, '-report', runs / 'report')
    run('-m', 'tools.export_model', *evaluation, '-output', tmp_path / 'int8', '-precision', 'int8', '-calibration',
        photos / 'train_list.txt', '-num_images', '8')
    assert all((runs / name).exists() for name in ('curves.png', 'report/report.html', 'run-eval.json'))
    # class names are passed on, even if NUM_CLASSES is still 0 in the config
    command = ['-m', 'tools.predict', next((photos / 'Bag').iterdir()), '-model']
    (tmp_path / 'exported').mkdir()
    narrow_file = tmp_path / 'narrow.yaml'
    narrow_file.write_text((runs / 'config.yaml').read_text().replace('NUM_CLASSES: 2', 'NUM_CLASSES: 0'))
    run('-m', 'tools.export_model', '-cfg', narrow_file, '-pretrained', runs / 'best.pdparams', '-output',
        tmp_path / 'exported', '-format', 'paddle')
    for model in ([tmp_path / 'int8'], [tmp_path / 'exported'], [runs / 'fused.pdparams'],
                  [runs / 'best.pdparams', '-cfg', narrow_file]):
        shown = run(*command, *model).stdout
        assert re.search(r'%  0 Bag$', shown, re.M) and re.search(r'%  1 Sneaker$', shown, re.M)
    # fuse copies them to a new folder, but does not replace different ones
    command = ['-m', 'tools.fuse', '-no_data', '-cfg', runs / 'config.yaml', '-pretrained', runs / 'best.pdparams']
    run(*command, '-save', tmp_path / 'new/fused.pdparams')
    assert read(tmp_path / 'new/class_names.txt') == ['Bag', 'Sneaker']
    (tmp_path / 'class_names.txt').write_text('cat\ndog\n')
    line = fails(*command, '-save', tmp_path / 'fused.pdparams')
    assert f'{tmp_path}/class_names.txt: names different classes than {runs}/class_names.txt' in line
    assert not (tmp_path / 'fused.pdparams').exists()
    (runs / 'class_names.txt').unlink()
    line = fails(*command, '-save', tmp_path / 'new/again.pdparams')
    assert f'{tmp_path}/new/class_names.txt: names classes, but {runs}/class_names.txt is missing; choose' in line
    assert not (tmp_path / 'new/again.pdparams').exists()


def test_draw_block(tmp_path):
    (tmp_path / 'matplotlib.py').write_text('raise ImportError("none here")')
    assert 'pip install matplotlib' in fails('-m', 'tools.draw_block', env={'PYTHONPATH': str(tmp_path)})
    pytest.importorskip('matplotlib', reason='drawing is an optional extra')
    run('-m', 'tools.draw_block', '-save', tmp_path / 'x.png')
    assert Image.open(tmp_path / 'x.png').size[0] == pytest.approx(Image.open(ROOT / 'mobileone.png').size[0], rel=0.1)
    assert '/dev/null/x.png' in fails('-m', 'tools.draw_block', '-save', '/dev/null/x.png')


def test_plot_log(fashion, tmp_path):
    pytest.importorskip('matplotlib', reason='drawing is an optional extra')
    from matplotlib import pyplot

    from tools import plot_log

    folders = [tmp_path / name for name in ('a', 'b', 'c')]
    stages = str([{'EPOCH': epoch, 'IMAGE_SIZE': size, 'AUTO_AUGMENT_STRENGTH': 0.0}
                  for epoch, size in ((1, 24), (3, 32))])
    for folder, decay, epochs in zip(folders, ('1e-4', '1e-2', '1e-2'), ('3', '4', '4')):
        run('main_single_gpu.py', '-output', folder, *options(
            fashion, 'TRAIN.NUM_EPOCHS', epochs, 'TRAIN.WEIGHT_DECAY', decay, 'TRAIN.CURRICULUM', stages))
    out = run('-m', 'tools.plot_log', *folders, '-save', tmp_path / 'x.png').stdout.splitlines()
    assert out[:3] == [f'{folder}: {epochs} epochs' for folder, epochs in zip(folders, (3, 4, 4))]
    assert out[3].startswith(f'{tmp_path}/x.png: drew training loss, training top-1 (%), ')
    lower = Image.open(tmp_path / 'x.png').size
    assert f'{folders[0]}/curves.png: drew' in run('-m', 'tools.plot_log', *folders[:2]).stdout
    assert lower[0] == 1560 and lower[1] > Image.open(folders[0] / 'curves.png').size[1]  # the legend is longer

    assert plot_log.label_runs(folders[:2]) == (['TRAIN.NUM_EPOCHS 3\nTRAIN.WEIGHT_DECAY 0.0001',
                                                'TRAIN.NUM_EPOCHS 4\nTRAIN.WEIGHT_DECAY 0.01'], '')
    assert plot_log.label_runs(folders[1:]) == ([str(folder) for folder in folders[1:]], '')
    assert plot_log.label_runs(folders)[0][1] == f'{folders[1]}\nTRAIN.NUM_EPOCHS 4\nTRAIN.WEIGHT_DECAY 0.01'
    # as right after a resume: the last line is incomplete, and a separate evaluation has epoch 0
    log = folders[1] / 'log.jsonl'
    rows = records(folders[1])
    log.write_text(json.dumps({**rows[-1], 'epoch': 0}) + '\n' + log.read_text() + '{"epoch": 5, "st')
    read_rows = plot_log.read_log(folders[1])
    assert len(read_rows) == len(rows) and all(read.items() <= row.items() for read, row in zip(read_rows, rows))
    pyplot.close('all')
    plot_log.draw([('first', plot_log.read_log(folders[0])), ('second', rows)], tmp_path / 'y.png')
    axes = pyplot.gcf().axes
    drawn = {axis.get_title(): [list(map(list, line.get_data())) for line in axis.lines] for axis in axes}

    def curve(split, weights, field):
        return [[row['epoch'] for row in rows if (row['split'], row['weights']) == (split, weights)],
                [row[field] for row in rows if (row['split'], row['weights']) == (split, weights)]]
    assert drawn['training loss'][1] == curve('train', 'raw', 'loss')
    assert drawn['training top-1 (%)'][1] == curve('train', 'raw', 'acc1')
    assert drawn['validation loss'][2:] == [curve('val', 'raw', 'loss'), curve('val', 'ema', 'loss')]
    assert drawn['validation top-1 (%)'][2:] == [curve('val', 'raw', 'acc1'), curve('val', 'ema', 'acc1')]
    assert drawn['learning rate'][1] == curve('train', 'raw', 'lr')
    assert drawn['weight decay'][1] == curve('train', 'raw', 'weight_decay')
    assert drawn['training image size (pixels)'][1] == [[1, 2, 3, 4], [24, 24, 32, 32]]
    styles = [line.get_linestyle() for axis in axes if 'validation' in axis.get_title() for line in axis.lines]
    assert styles == ['--', '-'] * 4
    colors = {line.get_label(): line.get_color() for axis in axes for line in axis.lines}
    assert set(colors) == {'first', 'second'} and colors['first'] != colors['second']
    pyplot.close('all')
    plot_log.draw([(r'a$\foo$b', rows)], tmp_path / 'z.png')  # not a formula
    for line in ('x', '{"epoch": 1}', '[]'):
        log.write_text(f'{json.dumps(rows[0])}\n{line}\n')
        assert 'log.jsonl:2: is not an epoch record' in fails('-m', 'tools.plot_log', folders[1])
    log.write_text('')
    assert 'contains no training epoch yet' in fails('-m', 'tools.plot_log', folders[1])
    assert 'nowhere/log.jsonl: cannot read the log (No such file or directory); give the folder of a run' in fails(
        '-m', 'tools.plot_log', tmp_path / 'nowhere')
    assert '/dev/null/x.png' in fails('-m', 'tools.plot_log', folders[0], '-save', '/dev/null/x.png')


def test_plot_log_lists_many_differing_keys_in_a_table(tmp_path):
    """The figure grows with the table, so that no curve is covered."""
    pytest.importorskip('matplotlib', reason='drawing is an optional extra')
    from matplotlib import pyplot

    from tools import plot_log
    row = {'epoch': 1, 'split': 'train', 'weights': 'raw', 'loss': 1.0, 'acc1': 1.0, 'lr': 1.0, 'weight_decay': 1.0,
           'image_size': 1}
    folders = [tmp_path / name for name in ('demo', 's4', 'a folder of a name that is long')]
    for folder, name in zip(folders, ('demo', 'mobileone_s4', 'finetune')):
        folder.mkdir()
        (folder / 'config.yaml').write_text(get_config(str(ROOT / f'configs/{name}.yaml')).dump())
    labels, table = plot_log.label_runs(folders)
    names, *rows = table.splitlines()
    assert labels == [str(folder) for folder in folders] and len(rows) > 20
    assert len({len(line) for line in (names, *rows)}) == 1
    assert names.endswith('  ...lder of a name that is long')
    assert next(line for line in rows if 'NUM_CLASSES' in line).split() == ['MODEL.NUM_CLASSES', '10', '1000', '0']
    assert next(line for line in rows if 'CURRICULUM' in line).split()[-1] == '[]'
    pyplot.close('all')
    plot_log.draw([(label, [row]) for label in labels], tmp_path / 'x.png', table)
    figure = pyplot.gcf()
    figure.draw_without_rendering()
    legend, = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width and 0 <= box.y0
    assert box.y1 < min(axis.get_tightbbox().y0 for axis in figure.axes if axis.lines)
    assert min(axis.bbox.height for axis in figure.axes) > 0.1 * 1560
    pyplot.close('all')


def test_ablations(fashion, tmp_path, call_main):
    from tools import ablations

    base, arms = ablations.BASE, ablations.ARMS
    assert [name for name in arms if arms[name].branches == 1] == ['one_branch', 'plain']
    assert [name for name in arms if not arms[name].skip_and_scale] == ['no_skip_scale', 'plain']
    assert [name for name in arms if arms[name].end_decay == 1] == ['constant_decay']
    assert base.TRAIN.END_WEIGHT_DECAY == pytest.approx(base.TRAIN.WEIGHT_DECAY / 10)
    assert max(base.MODEL.NUM_BRANCHES) == 4 and max(base.MODEL.NUM_BLOCKS) > 1
    args = ['-m', 'tools.ablations', '-data_path', fashion, '-output', tmp_path / 'out', '-seeds', '2', '-epochs', '2',
            '-train_images', '25', '-weight_decay', '0.02']
    lines = call_main(ablations, *args[2:])
    out = tmp_path / 'out/2_epochs_of_25_decay_0.02'
    assert [len(read(out / f'data/{split}_list.txt')) for split in ('train', 'val')] == [25, 35]
    assert sum(line.endswith(': done') for line in lines) == 10
    assert lines[10] == '| arm | raw, epoch 1 | ema, epoch 1 | raw, epoch 2 | ema, epoch 2 | to the first |'
    assert [line.split(' | ')[0] for line in lines[12:]] == [f'| {arm.description}' for arm in ablations.ARMS.values()]
    values = [ablations.read_accuracies(out / f'no_skip_scale-{seed}')[2, 'raw'] for seed in (0, 1)]
    cell = f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}'
    assert lines[15].split(' | ')[3] == cell
    last = [[ablations.read_accuracies(out / f'{arm}-{seed}')[2, 'ema'] for seed in (0, 1)] for arm in ablations.ARMS]
    assert [line.split(' | ')[5] for line in lines[12:]] == [
        f'{first - last[0][0]:+.2f}, {second - last[0][1]:+.2f} |' for first, second in last]
    weights = {arm: checkpoint.load(str(out / f'{arm}-0/latest.pdparams'))['model'] for arm in ablations.ARMS}
    assert len({key.rsplit('.', 2)[0] for key in weights['paper'] if 'stages.2.0.dw_3x3_blocks' in key}) == 4
    for arm, recipe in ablations.ARMS.items():
        other = [key for key in weights[arm] if 'dw_skip' in key or 'dw_1x1' in key or 'pw_skip' in key]
        assert bool(other) == recipe.skip_and_scale
        k = len([key for key in weights[arm] if key.startswith('stages.2.1.pw_1x1_blocks') and 'conv' in key])
        assert k == recipe.branches
    logs = {arm: records(out / f'{arm}-0') for arm in ('paper', 'constant_decay')}
    assert {row['weight_decay'] for row in logs['constant_decay']} == {0.02}
    assert [row['weight_decay'] for row in logs['paper'] if row['split'] == 'train'] == pytest.approx([0.02, 0.011])
    assert call_main(ablations, *args[2:])[10:] == lines[10:]  # no run is missing
    configs = [get_config(str(out / f'paper-{seed}/config.yaml')) for seed in (0, 1)]
    assert [config.SEED for config in configs] == [0, 1]
    for more in (['-seeds', '0'], ['-epochs', '1']):
        assert 'must be at least 1, -epochs 2' in fails(*args, *more)
    assert '-train_images is 61, but' in fails(*args, '-train_images', '61')
    with_lists(fashion, tmp_path / 'other', train=(fashion / 'train_list.txt').read_text().splitlines()[1:])
    other = [tmp_path / 'other' if argument == fashion else argument for argument in args]
    assert 'the runs in this folder use different images; choose another -output' in fails(*other)
    assert 'set -data_path to a folder written by tools.make_fashion_mnist' in fails(
        '-m', 'tools.ablations', '-data_path', tmp_path, '-output', tmp_path / 'y')
    for name in ('latest', 'best'):
        (out / f'paper-0/{name}.pdparams').write_bytes(b'')
    process = run(*args, '-jobs', '1', status=2)  # in a separate process
    assert re.search(r'/paper-0: exited with status 2: .*error: .*paper-0', process.stderr)
    assert len(process.stdout.splitlines()) <= 1  # at most one run that had already started; no others start


def check_dataset(folder, *more, status):
    """Run the tool, which must print nothing on stderr, and return its lines."""
    process = run('-m', 'tools.check_dataset', '-data_path', folder, *more, status=status)
    assert process.stderr == ''
    return process.stdout.splitlines()


def test_check_dataset_lists_every_bad_line(fashion, tmp_path):
    train, val = (read(fashion / f'{split}_list.txt') for split in ('train', 'val'))
    bad = {2: 'no label', 5: 'train/cut.png 3', 6: '', 40: f'{train[39][:-1]}10', 45: 'train/gone.png 0',
           60: b'caf\xe9.png 0'.decode(errors='surrogateescape')}
    lines = [bad.get(number, line) for number, line in enumerate(train, 1)]
    lines[10] = lines[20] = lines[0]
    data = with_lists(fashion, tmp_path / 'my data', val=[*val, lines[0], lines[0]])
    (data / 'train_list.txt').write_bytes('\n'.join(lines).encode(errors='surrogateescape'))
    (data / 'train').unlink()
    shutil.copytree(fashion / 'train', data / 'train')
    (data / 'train/cut.png').write_bytes((fashion / train[0].rsplit(' ', 1)[0]).read_bytes()[:100])
    shutil.copyfile(fashion / 'class_names.txt', data / 'class_names.txt')
    out = check_dataset(data, '-opts', 'MODEL.NUM_CLASSES', '0', '-save', tmp_path / 'good', status=1)
    path = f'{data}/train_list.txt'
    starts = [f"{path}:2: 'no label' is not \"path label\"",
              f'{path}:5: {data}/train/cut.png: cannot read the image (', f"{path}:6: '' is not",
              f"{path}:40: '{bad[40]}': the label is outside MODEL.NUM_CLASSES 10",
              f'{path}:45: {data}/train/gone.png: cannot read the image (No such file or directory)',
              f"{path}:60: 'caf\\udce9.png 0' is not UTF-8 text",
              f'{path}: 60 lines, 6 bad, 2 repeated',
              *(f'{data}/val_list.txt:{number}: {lines[0][:-2]} is the same image as {path}:1' for number in (36, 37)),
              f'{data}/val_list.txt: 37 lines, 0 bad, 1 repeated, 1 of the images also in train_list.txt',
              f'{path}: 10 classes; the smallest is ', f'{data}/val_list.txt: 10 classes; the smallest is ',
              f'{tmp_path}/good/train_list.txt: 54 lines written', f'{tmp_path}/good/val_list.txt: 37 lines written']
    assert len(out) == len(starts) and all(line.startswith(start) for line, start in zip(out, starts)), out

    assert read(tmp_path / 'good/train_list.txt') == [
        f'{data}/{line}' for number, line in enumerate(lines, 1) if number not in bad]
    # the saved lists can be used directly, with the class names
    assert read(tmp_path / 'good/class_names.txt') == read(fashion / 'class_names.txt')
    assert check_dataset(tmp_path / 'good', '-opts', 'MODEL.NUM_CLASSES', '10', status=0)[3].startswith(
        f'{tmp_path}/good/val_list.txt: 37 lines, 0 bad')
    run('main_single_gpu.py', '-output', tmp_path / 'run', *options(tmp_path / 'good', 'TRAIN.NUM_EPOCHS', '1'))
    assert [row['n'] for row in records(tmp_path / 'run')] == [48, 37, 37]
    assert 'good/train_list.txt: would be replaced; choose another -save' in fails(
        '-m', 'tools.check_dataset', '-data_path', data, '-save', tmp_path / 'good')


def test_check_dataset_finds_duplicate_images(tmp_path):
    """Duplicates have the same pixels, in any file format. -unique removes them only from the train list."""
    write_images(tmp_path / 'x', 4)
    for number in (0, 2):
        Image.open(tmp_path / f'x/photo {number}.jpg').save(tmp_path / f'x/{number}.png')
    Image.new('L', (2, 3)).save(tmp_path / 'x/tall.png')
    Image.new('L', (3, 2)).save(tmp_path / 'x/wide.png')
    train = ['photo 0.jpg 0', 'photo 1.jpg 1', '0.png 0', 'photo 1.jpg 2', 'photo 2.jpg 1', 'photo 3.jpg 0',
             'photo 3.jpg 0', 'tall.png 0', 'wide.png 0']
    for split, lines in (('train', train), ('val', ['2.png 1', 'gone.png 0'])):
        (tmp_path / f'{split}_list.txt').write_text(''.join(f'x/{line}\n' for line in lines))
    out = check_dataset(tmp_path, '-save', tmp_path / 'good', '-unique', status=1)
    path, val = tmp_path / 'train_list.txt', tmp_path / 'val_list.txt'
    assert out[:2] == [f'{path}:3: x/0.png is the same image as {path}:1, x/photo 0.jpg',
                       f'{path}:4: x/photo 1.jpg is the same image as {path}:2, x/photo 1.jpg, but with label 2, not 1']
    assert out[2] == f'{path}: 9 lines, 0 bad, 3 repeated' and out[3].startswith(f'{val}:2: {tmp_path}/x/gone.png: ')
    assert out[4:6] == [f'{val}:1: x/2.png is the same image as {path}:5, x/photo 2.jpg',
                        f'{val}: 2 lines, 1 bad, 1 of the images also in train_list.txt']
    assert read(tmp_path / 'good/train_list.txt') == [f'{tmp_path}/x/{train[index]}' for index in (0, 5, 7, 8)]
    assert f'{path}: no images are left for labels 1; 2' in out
    assert read(tmp_path / 'good/val_list.txt') == [f'{tmp_path}/x/2.png 1']
    assert '-unique is for the lists that -save writes: add -save' in fails(
        '-m', 'tools.check_dataset', '-data_path', tmp_path, '-unique')


@pytest.mark.parametrize('train, val, num_classes, lines', [
    ([0, 0, 0, 1, 2, 2], [0, 1, 2, 2], 3, ['train_list.txt: 3 classes; the smallest is label 1 with 1 images, the '
                                           'largest is label 0 with 3', 'val_list.txt: 3 classes; the smallest is ']),
    ([0, 7, 7, 9], [0], 1000, ['train_list.txt: 3 classes', 'val_list.txt: no images for 2 classes of '
                               'train_list.txt: 7; 9']),
    ([0], [0, 3], 4, ['val_list.txt: 2 classes', 'train_list.txt: no images for 1 classes of val_list.txt: 3']),
    ([1, 2], [1, 2], 9, ['train_list.txt: 2', 'val_list.txt: 2', 'no image has label 0, and the largest is 2: labels '
                         'count from 0, so if these start at 1, subtract 1 from each']),
    ([2, 4], [2], 4, ['train_list.txt: 2', 'val_list.txt: no', 'no image has label 0, and the largest is 4']),
    ([2, 4], [2, 4], 5, ['train_list.txt: 2', 'val_list.txt: 2']),  # a subset of the classes
    ([None, 0], [None], 1, ['val_list.txt: no images for 1 classes of train_list.txt: 0']),
])
def test_check_dataset_describes_labels(train, val, num_classes, lines, capsys):
    """None is the label of a bad line."""
    from tools.check_dataset import Checked, print_labels
    print_labels([Checked(name, [], labels, [label is not None and bytes([number])
                                             for number, label in enumerate(labels)])
                  for name, labels in (('train_list.txt', train), ('val_list.txt', val))], num_classes)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(lines) and all(map(str.startswith, out, lines))


def test_check_dataset_reads_a_windows_list(tmp_path):
    write_images(tmp_path / 'x', 2)
    (tmp_path / 'val_list.txt').write_bytes('x\\photo 0.jpg\t0\r\nx\\photo 1.jpg\t0\r\n'.encode('utf-16'))
    out = check_dataset(tmp_path, '-save', tmp_path / 'good', status=0)
    assert f' {tmp_path}/val_list.txt: backslashes in paths are read as slashes, because' in out[0]
    assert out[1] == f'{tmp_path}/val_list.txt: 2 lines, 0 bad'
    assert read(tmp_path / 'good/val_list.txt') == [f'{tmp_path}/x/photo {number}.jpg 0' for number in (0, 1)]


def test_check_dataset_with_one_list(tmp_path):
    """No empty list is written, and EXIF data are read only if training reads them."""
    write_images(tmp_path / 'x', 1)
    Image.new('RGB', (5, 5)).save(tmp_path / 'x/exif.png', exif=b'Exif\0\0no TIFF')
    (tmp_path / 'train_list.txt').write_text('x/exif.png 0\n')
    assert check_dataset(tmp_path, status=0) == [f'{tmp_path}/train_list.txt: 1 lines, 0 bad']
    out = check_dataset(tmp_path, '-opts', 'DATA.EXIF_TRANSPOSE', 'True', '-save', tmp_path / 'good', status=1)
    assert out[0].startswith(f'{tmp_path}/train_list.txt:1: {tmp_path}/x/exif.png: cannot read the image (')
    assert out[1:] == [f'{tmp_path}/train_list.txt: 1 lines, 1 bad',
                       f'{tmp_path}/good/train_list.txt: not written, because no lines are left']
    assert not list((tmp_path / 'good').iterdir())


@pytest.mark.parametrize('largest, more, kind, lines', [
    # largest: the largest pixels of the images in train_list.txt and val_list.txt
    ((500, 4000), [], 'PNG', ['2 of 2 images with 16 bits use fewer and will be dark: their pixels are from 9 to '
                              '4000; if they have only 12 bits, set DATA.BIT_DEPTH 12 or, for color images, rescale '
                              'the files']),
    ((500, 40000), [], 'PNG', ['1 of 2 images with 16 bits use fewer and will be dark: their pixels are from 9 to '
                               '500; if they have only 9 bits, rescale their files, because the other images use all '
                               '16 bits']),
    ((40000, 32768), [], 'TIFF', []),
    ((500, 4000), ['-opts', 'DATA.BIT_DEPTH', '12'], 'TIFF', []),
    ((500, 4000), ['-opts', 'DATA.BIT_DEPTH', '16'], 'PNG', []),  # the user knows that they are dark
])
def test_check_dataset_reports_unused_bits(largest, more, kind, lines, tmp_path):
    for split, value in zip(('train', 'val'), largest):
        Image.fromarray(np.array([[9, value]], 'uint16')).save(tmp_path / split, kind)
        (tmp_path / f'{split}_list.txt').write_text(f'{split} 0\n')
    assert check_dataset(tmp_path, *more, status=0)[2:] == lines


def test_check_dataset_applies_the_bit_depth(tmp_path):
    Image.fromarray(np.array([[9, 4096]], 'uint16')).save(tmp_path / 'x', 'PNG')
    (tmp_path / 'val_list.txt').write_text('x 0\n')
    out = check_dataset(tmp_path, '-opts', 'DATA.BIT_DEPTH', '12', status=1)
    assert out[0].startswith(f'{tmp_path}/val_list.txt:1: {tmp_path}/x: cannot read the image (pixels from 9 to 4096')


def test_check_dataset_errors(tmp_path):
    command = ['-m', 'tools.check_dataset', '-data_path', tmp_path]
    assert f'{tmp_path}: contains neither train_list.txt nor val_list.txt' in fails(*command)
    (tmp_path / 'val_list.txt').write_text('')
    assert 'val_list.txt: the list is empty' in fails(*command)
    for name in ('val_list.txt', 'class_names.txt'):
        (tmp_path / name[:3]).mkdir()
        (tmp_path / name[:3] / name).write_text('')
        assert f'{name}: would be replaced' in fails(*command, '-save', tmp_path / name[:3])


def resize_dataset(folder, output, *more, status=0):
    """Run the tool, which must print nothing on stderr, and return its lines."""
    process = run('-m', 'tools.resize_dataset', '-data_path', folder, '-output', output, *more, status=status)
    assert process.stderr == ''
    return process.stdout.splitlines()


def photos(folder):
    """Write a dataset of large and small images in several formats, with both lists. Returns: its image paths."""
    (folder / 'a b').mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype='uint8')
    image, exif = Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC), Image.Exif()
    exif[0x0112] = 6
    image.save(folder / 'a b/turned.JPEG', quality=95, exif=exif)
    image.save(folder / 'a b/png in disguise.JPEG', 'PNG', exif=exif)
    image.convert('CMYK').save(folder / 'a b/cmyk.jpg', quality=95)
    image.resize((50, 40)).save(folder / 'a b/small.jpg', exif=exif)
    image.save(folder / 'a b/turned.tif', tiffinfo=exif)
    Image.fromarray(np.asarray(image)[:, :, 0].astype('uint16') * 16).save(folder / 'a b/12 bits.png')
    names = [f'a b/{path.name}' for path in sorted((folder / 'a b').iterdir())]
    lines = [f'{name} {label}\r\n' for label, name in enumerate([*names, names[0]])]
    (folder / 'train_list.txt').write_text(''.join(lines))
    (folder / 'val_list.txt').write_text(f'{names[-1]} 2000\n')
    (folder / 'class_names.txt').write_text('A\nB\n')
    return names


def test_resize_dataset(tmp_path):
    source, output = tmp_path / 'source', tmp_path / 'small/40'
    names = photos(source)
    lines = resize_dataset(source, output, '-shorter', '40', '-workers', '2', '-opts', 'DATA.BIT_DEPTH', '12')
    assert lines == [f'{output}: 5 resized, 1 copied, 0 skipped, 0 bad', f'{output}/train_list.txt: 7 lines written',
                     f'{output}/val_list.txt: 1 lines written']
    for name in ('train_list.txt', 'val_list.txt', 'class_names.txt'):
        assert read(output / name) == read(source / name)
    assert sorted(path.name for path in (output / 'a b').iterdir()) == sorted(name[4:] for name in names)
    assert (output / 'a b/small.jpg').read_bytes() == (source / 'a b/small.jpg').read_bytes()
    for name in set(names) - {'a b/small.jpg'}:
        with Image.open(output / name) as image:
            is_jpeg = name in ('a b/turned.JPEG', 'a b/cmyk.jpg')
            assert image.format == ('JPEG' if is_jpeg else 'PNG') and image.mode == 'RGB'
        # the same image, with and without its EXIF rotation
        for exif_transpose in (False, True):
            large, small = (read_image(str(folder / name), exif_transpose, 12) for folder in (source, output))
            assert sorted(small.size) == [40, 53] and (large.width > large.height) == (small.width > small.height)
            expected = np.asarray(large.resize(small.size, Image.Resampling.BICUBIC)).astype(int)
            assert abs(np.asarray(small) - expected).mean() < (4 if is_jpeg else 0.5)
    assert read_image(str(output / 'a b/turned.JPEG'), True).size == (40, 53)


def test_resize_dataset_resumes_and_names_bad_images(tmp_path):
    source, output = tmp_path / 'source', tmp_path / 'small'
    names = photos(source)
    (source / 'a b/cut.jpg').write_bytes((source / 'a b/turned.JPEG').read_bytes()[:1000])
    (tmp_path / 'outside.jpg').write_bytes((source / 'a b/turned.JPEG').read_bytes())
    Image.new('RGB', (50, 50)).save(source / 'a b/exif.png', exif=b'Exif\0\0no TIFF')
    bad = ['a b/cut.jpg', '../outside.jpg', 'a b/gone.jpg', 'a b/exif.png']
    (source / 'val_list.txt').write_text(''.join(f'{name} 0\n' for name in [*bad, names[0], bad[0]]))
    (output / 'a b').mkdir(parents=True)
    (output / names[0]).write_text('as it was')
    command = ['-shorter', '40', '-quality', '50', '-opts', 'DATA.BIT_DEPTH', '12']
    lines = resize_dataset(source, output, *command, status=1)
    assert [line.split(' (')[0] for line in lines] == [
        f'{source}/a b/cut.jpg: cannot read the image',
        '../outside.jpg: is outside -data_path, and its copy outside -output; use a path inside',
        f'{source}/a b/gone.jpg: cannot read the image', f'{source}/a b/exif.png: cannot read the EXIF data',
        f'{output}: 4 resized, 1 copied, 1 skipped, 4 bad', f'{output}/train_list.txt: 7 lines written',
        f'{output}/val_list.txt: 1 lines written']
    assert read(output / 'val_list.txt') == [f'{names[0]} 0'] and (output / names[0]).read_text() == 'as it was'
    # as after an interruption
    (output / names[0]).rename(output / f'{names[0]}.partial')
    (source / 'val_list.txt').write_text(f'{bad[0]} 0\n')
    lines = resize_dataset(source, output, *command, status=1)
    assert lines[1:] == [
        f'{output}: 1 resized, 0 copied, 5 skipped, 1 bad', f'{output}/train_list.txt: 7 lines written',
        f'{output}/val_list.txt: not written, because no lines are left']
    assert len(list((output / 'a b').iterdir())) == len(names)
    size = (output / 'a b/turned.JPEG').stat().st_size
    (output / 'a b/turned.JPEG').unlink()
    resize_dataset(source, output, *command, '-quality', '95', status=1)
    assert (output / 'a b/turned.JPEG').stat().st_size > size


@pytest.mark.parametrize('args, message', [
    (['-output', '.'], '-output {}: is the same folder as -data_path; choose another'),
    (['-shorter', '0'], '-shorter and -workers must be at least 1'),
    (['-workers', '0'], '-shorter and -workers must be at least 1'),
    (['-quality', '101'], '-quality is 101, but must be from 1 to 100'),
    (['-output', 'full'], "full/a b/12 bits.png: cannot write (No space left on device); free up disk space"),
])
def test_resize_dataset_errors(tmp_path, args, message):
    photos(tmp_path)
    (tmp_path / 'full/a b').mkdir(parents=True)
    (tmp_path / 'full/a b/12 bits.png.partial').symlink_to('/dev/full')
    args = [str(tmp_path / value) if flag == '-output' else value for flag, value in zip([''] + args, args)]
    line = fails('-m', 'tools.resize_dataset', '-data_path', tmp_path, '-output', tmp_path / 'copy', *args, '-opts',
                 'DATA.BIT_DEPTH', '12')
    assert message.format(tmp_path) in line
    assert not (tmp_path / 'full/a b/12 bits.png').exists()


# tools.check_dataset where reading an image takes forever; the file path.read shows that a worker has started to do so
STUCK = '''
import pathlib, runpy, time
from runtime.program import prepare_runtime
prepare_runtime()
import images

def read_image(path, *args):
    pathlib.Path(f'{path}.read').touch()
    time.sleep(1000)

images.read_image = read_image
runpy.run_module('tools.check_dataset', run_name='__main__', alter_sys=True)
'''


def workers_of(process, mark):
    """Wait for a process of a program to create the file `mark`, and return the ids of all its processes."""
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text()
    return [int(number) for number in children.split()]


@pytest.mark.parametrize('victim, number, status, message', [
    ('all', signal.SIGINT, 130, 'interrupted'),  # like Ctrl-C in a terminal
    ('program', signal.SIGINT, 130, 'interrupted'),
    ('worker', signal.SIGKILL, 2, 'a process that reads images was killed'),
    ('program', signal.SIGKILL, -signal.SIGKILL, ''),
])
def test_check_dataset_ends_together_with_its_workers(tmp_path, victim, number, status, message):
    (tmp_path / 'val_list.txt').write_text('x 0\n')  # with several cores, one worker reads and the others are idle
    process = forked.Program(['-c', STUCK, '-data_path', tmp_path], start_new_session=True)
    workers = workers_of(process, tmp_path / 'x.read')
    assert workers
    # a negative number addresses the process group
    os.kill({'all': -process.pid, 'program': process.pid, 'worker': workers[0]}[victim], number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status and len(error.splitlines()) == bool(message) and message in error
    deadline = time.monotonic() + 60
    while any(pathlib.Path(f'/proc/{worker}').exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_loses_sigterm_is_killed(tmp_path):
    """It would wait forever for the lock that another worker held when it was terminated."""
    task = f"""
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open('{tmp_path}/started', 'w').close()
time.sleep(1)
"""
    program = f"""
import os, time
from tools.check_dataset import start_workers
with start_workers(3) as workers:
    workers.submit(exec, {task!r})
    while not os.path.exists('{tmp_path}/started'):
        time.sleep(0.05)
"""
    process = forked.Program(['-c', program], start_new_session=True)
    assert process.wait(20) == 0


def test_check_dataset_shows_a_progress_bar_on_a_terminal(tmp_path):
    write_images(tmp_path / 'x', 1)
    (tmp_path / 'val_list.txt').write_text('x/photo 0.jpg 0\n' * 50)
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 200, 0, 0))
    process = forked.Program(['-m', 'tools.check_dataset', '-data_path', tmp_path], stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert process.wait(60) == 0
    shown = os.read(controller, 65536).decode()
    assert 'val_list.txt:   0%|' in shown and '| 0/50 [' in shown
    assert shown.splitlines()[-1].endswith('val_list.txt: 50 lines, 0 bad, 49 repeated')
