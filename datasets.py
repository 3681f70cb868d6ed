"""ImageNet in list files, the samplers that decide which image comes when, and the curriculum.

A sample's index is a pair (epoch, index). Whatever is random about it is a function of (SEED, epoch, index), so workers
hold no state: any number of them gives the same batches.
"""
import functools
import os
import re
import zlib  # noqa: F401  before Paddle: see utils.py
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from paddle.io import Dataset

from images import find_backend, open_image, read_image
from runtime.files import check_regular, read_names, to_plain
from runtime.loader import Loader
from transforms import AutoAugment, ColorJitter, EvalTransform, RandAugment, TrainTransform
from utils import LOG, UserError

# bytes and lines of a list that are parsed at a time: its parsing takes little memory besides the list
BLOCK_BYTES, BLOCK_LINES = 2 ** 22, 2 ** 16
CLASS_NAMES = 'class_names.txt'


class Lines(Sequence):
    """The lines of a list file, each decoded when it is asked for; bytes that are not UTF-8 are surrogates in it.

    They are kept in one piece: strings would take twice the memory, and a data worker, which writes to every string
    that it reads (its count of references), would copy them all.
    """

    def __init__(self, content):
        """content: the lines as a bytearray, with a line feed after each."""
        self.content = content
        self.bytes = np.frombuffer(content, 'uint8')
        # of each line, and where the next one would start
        self.starts = np.concatenate([[0], *(
            start + 1 + np.flatnonzero(self.bytes[start:start + BLOCK_BYTES] == ord('\n'))
            for start in range(0, len(content), BLOCK_BYTES))])

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]
        return self.content[self.starts[index]:self.starts[index + 1] - 1].decode(errors='surrogateescape')


def _with_slashes(content, path):
    """The bytes of a list file with slashes for backslashes, unless the first path with one exists as it is."""
    at = content.find(b'\\')
    if at < 0:
        return content
    line = content[content.rfind(b'\n', 0, at) + 1:content.find(b'\n', at)].decode(errors='surrogateescape')
    name = line.rsplit(maxsplit=1)[0]
    # UTF-16 without its mark, and paths on another computer, are errors of their lines
    if '\0' in line or content.startswith(b'\\\\') or b'\n\\\\' in content:
        return content
    if os.path.lexists(os.path.join(os.path.dirname(path), name)):
        return content
    LOG.info(f'{path}: backslashes in its paths are read as slashes, for there is no file {name!r}')
    return content.replace(b'\\', b'/')


def read_lines(path):
    """The `Lines` of a list file but empty ones at its end, whatever system wrote it: see `to_plain`, `_with_slashes`.

    Raises: UserError for a missing or an empty list, and for what is no regular file, or broken UTF-16.
    """
    check_regular(path)
    try:
        with open(path, 'rb') as file:
            content = bytearray(os.path.getsize(path))
            del content[file.readinto(content):]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, 'strerror', error)
        raise UserError(f'{path}: cannot read the list ({reason}); DATA.DATA_PATH is the folder that holds it, see '
                        'README.md or python -m tools.make_list -h') from None
    content = to_plain(content, path)
    while content[-1:].isspace():
        del content[-1]
    if not content:
        raise UserError(f'{path}: the list is empty; write a line "path label" per image')
    content += b'\n'
    return Lines(_with_slashes(content, path))


def parse_line(line):
    """(path, label) of a list's line: the path, a blank, the label. The path may hold blanks. Raises: UserError."""
    try:
        line.encode()
    except UnicodeEncodeError:
        raise UserError(f'{line!r} is not UTF-8 text; save the list as UTF-8: where it is GBK, by iconv -f GBK -t '
                        'UTF-8') from None
    name, label = (line.rsplit(maxsplit=1) + ['', ''])[:2]
    if not (label.isascii() and label.isdigit() and len(label) < 19):
        raise UserError(f'{line!r} holds null characters, perhaps UTF-16 text without its mark; save the list as UTF-8'
                        if '\0' in line else f'{line!r} is not "path label", the label a whole number from 0')
    if re.match(r'[A-Za-z]:|\\\\', name) and os.name != 'nt':
        raise UserError(f"{line!r} is on a drive of Windows; write paths relative to the list's folder")
    return name, int(label)


def parse_plain_lines(lines, first, last):
    """Parse at once the `Lines` first to last - 1 that end in a visible ASCII character, a space or tab, and digits.

    Returns: (their labels, int64, whether each is such a line: the label of any other is not known).
    """
    starts = lines.starts[first:last + 1]
    ends = starts[1:] - 1
    labels, at, is_digit = np.zeros(len(ends), 'int64'), ends - 1, np.ones(len(ends), bool)
    for place in range(18):  # from the last digit on, as many as an int64 can hold
        digits = lines.bytes[at].astype('int64') - ord('0')
        is_digit &= (digits >= 0) & (digits <= 9)
        if not is_digit.any():
            break
        labels += np.where(is_digit, digits * 10 ** place, 0)
        at -= is_digit  # not beyond the line feed before the line; before the first line that is the content's last
    blank, letter = lines.bytes[at], lines.bytes[at - 1]
    is_plain = (at < ends - 1) & ((blank == ord(' ')) | (blank == ord('\t'))) & (letter > ord(' ')) & (letter < 127)
    is_plain &= (lines.bytes[starts[:-1] + 1] != ord(':')) & (lines.bytes[starts[:-1]] != ord('\\'))  # C:/x, \\nas\x
    try:
        lines.content[starts[0]:starts[-1]].decode()
    except UnicodeDecodeError:
        is_plain[:] = False
    return labels, is_plain


class Paths(Sequence):
    """The paths in the `Lines` of a list."""

    def __init__(self, lines):
        self.lines = lines

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return parse_line(self.lines[index])[0]


def read_list(path, num_classes):
    """Read a list file, a line per image as in `parse_line`.

    Returns: (`Paths`, relative ones, int64 array of labels).
    Raises: UserError, naming file and line, for a missing list, a malformed line or a label outside num_classes.
    """
    lines = read_lines(path)
    labels = np.empty(len(lines), 'int64')
    for first in range(0, len(lines), BLOCK_LINES):
        labels[first:first + BLOCK_LINES], is_plain = parse_plain_lines(lines, first, first + BLOCK_LINES)
        for index in first + np.flatnonzero(~is_plain):
            try:
                labels[index] = parse_line(lines[index])[1]
            except UserError as error:
                raise UserError(f'{path}:{index + 1}: {error}; python -m tools.check_dataset lists all bad lines') \
                    from None
    outside = np.flatnonzero(labels >= num_classes)
    if len(outside) and labels.min() == 1 and labels.max() == num_classes:
        raise UserError(f'{path}:{outside[0] + 1}: labels are 1 to MODEL.NUM_CLASSES {num_classes}, but count from 0: '
                        'subtract 1 from each')
    if len(outside):
        names = os.path.join(os.path.dirname(path), CLASS_NAMES)
        has_names = os.path.isfile(names) and len(read_names(names)) == num_classes
        raise UserError(f'{path}:{outside[0] + 1}: label {labels[outside[0]]} is outside MODEL.NUM_CLASSES '
                        f'{num_classes}; {labels.max() + 1} would fit this list'
                        + (f', but {names} has {num_classes} names: add the others' if has_names else ''))
    return Paths(lines), labels


def count_classes(data_path):
    """How many classes a data set has: the lines of its class_names.txt, or else by the largest label of its lists.

    Returns: (the number, the file that says it).
    Raises: UserError for a data set without lists, and as `read_names` and `read_list`.
    """
    names, *lists = (os.path.join(data_path, name) for name in (CLASS_NAMES, 'train_list.txt', 'val_list.txt'))
    if os.path.isfile(names):
        return len(read_names(names)), names
    any_label = np.iinfo('int64').max
    found = [(int(read_list(path, any_label)[1].max()) + 1, path) for path in lists]
    return max(found, key=lambda pair: pair[0])


class ImageNet2012Dataset(Dataset):
    """The images of a list file. Item (epoch, index), or index for epoch 0 -> (uint8 [H, W, 3], label).

    read: callable path -> image.
    transform: callable (image, NumPy generator) -> uint8 array [H, W, 3], whose sides are its `size`.
    seed: with epoch and index, the seed of an item's generator.
    """

    def __init__(self, data_path, list_name, num_classes, read, transform, seed=0):
        super().__init__()
        self.data_path = data_path
        self.list_path = os.path.join(data_path, list_name)
        self.paths, self.labels = read_list(self.list_path, num_classes)
        self.read = read
        self.transform = transform
        self.shape = transform.size, transform.size, 3
        self.seed = seed

    def __len__(self):
        return len(self.paths)

    def name_of(self, index):
        """The path of an image."""
        return os.path.join(self.data_path, self.paths[index])

    def __getitem__(self, item):
        epoch, index = item if isinstance(item, tuple) else (0, item)
        image = self.read(self.name_of(index))
        return self.transform(image, np.random.default_rng([self.seed, epoch, index])), self.labels[index]


class TrainSampler:
    """Batches of (epoch, index) in an order that depends on (seed, epoch) alone, and every rank's share of them.

    A step takes batch_size * world_size images of the order, rank r the r-th part: two ranks with batch b see what
    one with 2b sees. The last partial step is dropped, unless it is the only one.
    """

    def __init__(self, length, batch_size, seed, rank=0, world_size=1):
        if length < world_size:
            raise UserError(f'{length} training images are too few for {world_size} processes')
        self.length = length
        self.total_batch = min(length, batch_size * world_size)
        self.batch_size = -(-self.total_batch // world_size)  # of rank 0, the largest
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.set_epoch(1)

    def set_epoch(self, epoch, start=0):
        """epoch: counted from 1; start: how many of its batches are left out, because they have been trained on."""
        self.epoch = epoch
        self.start = start

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        for step in range(self.start, len(self)):
            total = order[step * self.total_batch:(step + 1) * self.total_batch]
            yield [(self.epoch, int(index)) for index in np.array_split(total, self.world_size)[self.rank]]

    def __len__(self):
        """Batches of a whole epoch."""
        return max(1, self.length // self.total_batch)

    def describe_dropped(self):
        """A line on the images that an epoch leaves out; '' if it has them all."""
        dropped = self.length - len(self) * self.total_batch
        return f'{dropped} of {self.length} training images, others in each epoch, are left out: they do not fill a ' \
               f'batch of {self.total_batch}' if dropped else ''


class EvalSampler:
    """Batches of (0, index) that together name every image once over all ranks: no padding, the last may be partial."""

    def __init__(self, length, batch_size, rank=0, world_size=1):
        self.indices = range(rank, length, world_size)
        self.batch_size = min(batch_size, max(1, len(self.indices)))

    def __iter__(self):
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start:start + self.batch_size]]

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)


@dataclass(frozen=True)
class Stage:
    """What an epoch of training looks like: side of the images in pixels, strength of AutoAugment, 0 (off) to 1."""
    image_size: int
    auto_augment_strength: float


def get_stage(config, epoch):
    """The Stage of an epoch (from 1) by TRAIN.CURRICULUM; without one, all images are DATA.IMAGE_SIZE large."""
    stages = [stage for stage in config.TRAIN.CURRICULUM if stage['EPOCH'] <= epoch]
    if not stages:
        return Stage(config.DATA.IMAGE_SIZE, float(config.TRAIN.AUTO_AUGMENT))
    return Stage(stages[-1]['IMAGE_SIZE'], stages[-1]['AUTO_AUGMENT_STRENGTH'])


def describe_curriculum(config):
    """A line on the stages of TRAIN.CURRICULUM, and on those that a run so short never reaches."""
    stages = config.TRAIN.CURRICULUM
    parts = [f'from epoch {stage["EPOCH"]} {stage["IMAGE_SIZE"]} pixels, AutoAugment '
             f'{stage["AUTO_AUGMENT_STRENGTH"]:g}' for stage in stages]
    parts.append(f'evaluation at {config.DATA.IMAGE_SIZE} pixels')
    late = [stage['EPOCH'] for stage in stages if stage['EPOCH'] > config.TRAIN.NUM_EPOCHS]
    if late:
        parts.append(f'TRAIN.NUM_EPOCHS is {config.TRAIN.NUM_EPOCHS}, so the stages from epoch {late[0]} on are not '
                     'reached')
    return f'curriculum: {"; ".join(parts)}'


def get_augmentations(train, strength):
    """Functions (image, rng) -> image: the augmentations that TRAIN.* asks for. strength: AutoAugment's."""
    augmentations = []
    if train.AUTO_AUGMENT:
        augmentations.append(AutoAugment(strength))
    if train.RAND_AUGMENT:
        augmentations.append(RandAugment(train.RAND_AUGMENT_LAYERS, train.RAND_AUGMENT_MAGNITUDE))
    if train.COLOR_JITTER:
        augmentations.append(ColorJitter(train.COLOR_JITTER))
    return augmentations


def get_dataset(config, is_train=True, epoch=1):
    """The training set of a config as it is in an epoch, or its validation set (DATA.*, MODEL.NUM_CLASSES, SEED).

    Raises: UserError for an unknown DATA.DATASET, and for the reasons of `read_list` and `find_backend`.
    """
    data = config.DATA
    options = {'exif_transpose': data.EXIF_TRANSPOSE, 'bit_depth': data.BIT_DEPTH}
    if data.DATASET.lower() != 'imagenet2012':
        raise UserError(f'DATA.DATASET is {data.DATASET!r}, but must be imagenet2012')
    if is_train:
        stage = get_stage(config, epoch)
        fast = find_backend(data.IMAGE_BACKEND)
        read = functools.partial(open_image, fast=fast, **options)
        transform = TrainTransform(stage.image_size, data.CROP_SCALE, data.INTERPOLATION,
                                   get_augmentations(config.TRAIN, stage.auto_augment_strength), fast)
    else:
        read = functools.partial(read_image, **options)
        transform = EvalTransform(data.IMAGE_SIZE, data.CROP_PCT, data.INTERPOLATION)
    return ImageNet2012Dataset(data.DATA_PATH, 'train_list.txt' if is_train else 'val_list.txt',
                               config.MODEL.NUM_CLASSES or count_classes(data.DATA_PATH)[0], read, transform,
                               config.SEED)


def describe_dataset(dataset, num_classes):
    """A line on a data set: its list, images and classes, what always guessing the largest class would score, whether
    its labels may count from 1, and whether the network has more classes than the list.
    """
    used, counts = int(dataset.labels.max()) + 1, np.unique(dataset.labels, return_counts=True)[1]
    least = dataset.labels.min()
    line = (f'{dataset.list_path}: {len(dataset)} images, labels {least} to {used - 1}, '
            f'{counts.max() / len(dataset):.1%} of them in the largest class')
    if used < num_classes:
        line += f': {num_classes - used} of MODEL.NUM_CLASSES {num_classes} unused'
    if 2 * used < num_classes:
        line += '; set MODEL.NUM_CLASSES 0 to take it from the data'
    return f'{line}; labels count from 0: if these start at 1, subtract 1 from each' if least else line


def get_dataloader(config, dataset, is_train=True, rank=0, world_size=1):
    """`Loader` of this rank's share of a dataset, DATA.BATCH_SIZE or in evaluation DATA.BATCH_SIZE_EVAL images each.

    Before each epoch of training call `loader.batch_sampler.set_epoch(epoch)`, epochs counted from 1.
    """
    data = config.DATA
    if is_train:
        sampler = TrainSampler(len(dataset), data.BATCH_SIZE, config.SEED, rank, world_size)
    else:
        sampler = EvalSampler(len(dataset), data.BATCH_SIZE_EVAL or data.BATCH_SIZE, rank, world_size)
    return Loader(dataset, sampler, data.NUM_WORKERS, data.WORKER_TIMEOUT)
