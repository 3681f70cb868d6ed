"""ImageNet-style list files, the samplers that choose the images of each batch, and the training curriculum.

A sample is indexed by a pair (epoch, index), and its randomness is a function of (SEED, epoch, index). Data workers
keep no state, so any number of them gives the same batches.
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
from runtime.files import CLASS_NAMES, check_regular, read_names, to_plain
from runtime.loader import Loader
from transforms import AutoAugment, ColorJitter, EvalTransform, RandAugment, TrainTransform
from utils import LOG, UserError

# bytes and lines of a list that are parsed at a time, so that parsing needs little memory on top of the list
BLOCK_BYTES, BLOCK_LINES = 2 ** 22, 2 ** 16


class Lines(Sequence):
    """The lines of a list file, decoded on access. Bytes that are not UTF-8 become surrogates.

    The content stays one bytearray. Strings would take twice the memory, and each data worker would end up with a copy
    of them all, because reading a string writes its reference count.
    """

    def __init__(self, content):
        """content: the lines as a bytearray, each followed by a line feed."""
        self.content = content
        self.bytes = np.frombuffer(content, 'uint8')
        # of each line, and of the one that would follow the last
        self.starts = np.concatenate([[0], *(
            start + 1 + np.flatnonzero(self.bytes[start:start + BLOCK_BYTES] == ord('\n'))
            for start in range(0, len(content), BLOCK_BYTES))])

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]
        return self.content[self.starts[index]:self.starts[index + 1] - 1].decode(errors='surrogateescape')


def _with_slashes(content, path):
    """Replace backslashes in a list file's bytes with slashes, unless the first path with one exists as written."""
    at = content.find(b'\\')
    if at < 0:
        return content
    line = content[content.rfind(b'\n', 0, at) + 1:content.find(b'\n', at)].decode(errors='surrogateescape')
    name = line.rsplit(maxsplit=1)[0]
    # leave UTF-16 without a byte-order mark and network paths as they are: `parse_line` rejects them
    if '\0' in line or content.startswith(b'\\\\') or b'\n\\\\' in content:
        return content
    if os.path.lexists(os.path.join(os.path.dirname(path), name)):
        return content
    LOG.info(f'{path}: backslashes in paths are read as slashes, because {name!r} does not exist')
    return content.replace(b'\\', b'/')


def read_lines(path):
    """Read the `Lines` of a list written on any system (`to_plain`, `_with_slashes`), without trailing empty lines.

    Raises: UserError for a list that is missing, empty, unreadable, broken UTF-16, or not a regular file.
    """
    check_regular(path)
    try:
        with open(path, 'rb') as file:
            content = bytearray(os.path.getsize(path))
            del content[file.readinto(content):]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, 'strerror', error)
        raise UserError(f'{path}: cannot read the list ({reason}); set DATA.DATA_PATH to the folder that contains it, '
                        'see README.md or python -m tools.make_list -h') from None
    content = to_plain(content, path)
    while content[-1:].isspace():
        del content[-1]
    if not content:
        raise UserError(f'{path}: the list is empty; write one line "path label" per image')
    content += b'\n'
    return Lines(_with_slashes(content, path))


def parse_line(line):
    """Split a line "path label" into (path, label); the path may contain whitespace. Raises: UserError."""
    try:
        line.encode()
    except UnicodeEncodeError:
        raise UserError(f'{line!r} is not UTF-8 text; save the list as UTF-8 (if it is GBK: iconv -f GBK -t UTF-8)') \
            from None
    name, label = (line.rsplit(maxsplit=1) + ['', ''])[:2]
    if not (label.isascii() and label.isdigit() and len(label) < 19):
        raise UserError(f'{line!r} contains null characters (UTF-16 without a byte-order mark?); save the list as UTF-8'
                        if '\0' in line else f'{line!r} is not "path label" with an integer label from 0')
    if re.match(r'[A-Za-z]:|\\\\', name) and os.name != 'nt':
        raise UserError(f"{line!r} is on a Windows drive or share; write paths relative to the list's folder")
    return name, int(label)


def parse_plain_lines(lines, first, last):
    """Parse `Lines` first to last - 1 with NumPy, if they end in a visible ASCII character, space or tab, and digits.

    Returns: (int64 labels, bool array that is True for such lines). The labels of other lines are undefined.
    """
    starts = lines.starts[first:last + 1]
    ends = starts[1:] - 1
    labels, at, is_digit = np.zeros(len(ends), 'int64'), ends - 1, np.ones(len(ends), bool)
    for place in range(18):  # from the last digit backward; any 18 digits fit into an int64
        digits = lines.bytes[at].astype('int64') - ord('0')
        is_digit &= (digits >= 0) & (digits <= 9)
        if not is_digit.any():
            break
        labels += np.where(is_digit, digits * 10 ** place, 0)
        at -= is_digit  # stops at the line feed before the line; before the first line, the last byte (-1) is one
    blank, letter = lines.bytes[at], lines.bytes[at - 1]
    is_plain = (at < ends - 1) & ((blank == ord(' ')) | (blank == ord('\t'))) & (letter > ord(' ')) & (letter < 127)
    is_plain &= (lines.bytes[starts[:-1] + 1] != ord(':')) & (lines.bytes[starts[:-1]] != ord('\\'))  # C:/x, \\nas\x
    try:
        lines.content[starts[0]:starts[-1]].decode()
    except UnicodeDecodeError:
        is_plain[:] = False
    return labels, is_plain


class Paths(Sequence):
    """The paths in the `Lines` of a list, parsed on access."""

    def __init__(self, lines):
        self.lines = lines

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return parse_line(self.lines[index])[0]


def read_list(path, num_classes):
    """Read a list file with one line "path label" per image.

    Returns: (`Paths` relative to the list's folder, int64 array of labels).
    Raises: UserError as `read_lines`, and for a malformed line or a label >= num_classes, with its line number.
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
        raise UserError(f'{path}:{outside[0] + 1}: labels run from 1 to MODEL.NUM_CLASSES {num_classes}, but must '
                        'count from 0: subtract 1 from each')
    if len(outside):
        names = os.path.join(os.path.dirname(path), CLASS_NAMES)
        has_names = os.path.isfile(names) and len(read_names(names)) == num_classes
        raise UserError(f'{path}:{outside[0] + 1}: label {labels[outside[0]]} is out of range for MODEL.NUM_CLASSES '
                        f'{num_classes}; this list needs {labels.max() + 1}'
                        + (f', but {names} has {num_classes} names: add the missing ones' if has_names else ''))
    return Paths(lines), labels


def count_classes(data_path):
    """Count the classes of a dataset: the lines of its class_names.txt, or else the largest label in its lists + 1.

    Returns: (number, path of the file that determined it).
    Raises: UserError as `read_names` and `read_list`.
    """
    names, *lists = (os.path.join(data_path, name) for name in (CLASS_NAMES, 'train_list.txt', 'val_list.txt'))
    if os.path.isfile(names):
        return len(read_names(names)), names
    any_label = np.iinfo('int64').max
    found = [(int(read_list(path, any_label)[1].max()) + 1, path) for path in lists]
    return max(found, key=lambda pair: pair[0])


class ImageNet2012Dataset(Dataset):
    """The images of a list file. dataset[epoch, index], or dataset[index] for epoch 0 -> (uint8 [H, W, 3], label).

    read: callable path -> image.
    transform: callable (image, NumPy generator) -> uint8 [size, size, 3], with an attribute `size`.
    seed: seeds the generator of an item, together with epoch and index.
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
        """Return the path of an image."""
        return os.path.join(self.data_path, self.paths[index])

    def __getitem__(self, item):
        epoch, index = item if isinstance(item, tuple) else (0, item)
        image = self.read(self.name_of(index))
        return self.transform(image, np.random.default_rng([self.seed, epoch, index])), self.labels[index]


class TrainSampler:
    """One rank's batches of (epoch, index), in an order that depends only on (seed, epoch).

    Each step takes the next batch_size * world_size images and gives part r to rank r, so two ranks with batch size b
    train on the same images as one rank with 2b. The last partial step is dropped, unless it is the only one.

    Raises: UserError for fewer images than ranks.
    """

    def __init__(self, length, batch_size, seed, rank=0, world_size=1):
        if length < world_size:
            raise UserError(f'{length} training images are too few for {world_size} processes: use fewer processes')
        self.length = length
        self.total_batch = min(length, batch_size * world_size)
        self.batch_size = -(-self.total_batch // world_size)  # of rank 0, which gets the largest part
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.set_epoch(1)

    def set_epoch(self, epoch, start=0):
        """epoch: counted from 1; start: number of its batches to skip, because the run has already used them."""
        self.epoch = epoch
        self.start = start

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        for step in range(self.start, len(self)):
            total = order[step * self.total_batch:(step + 1) * self.total_batch]
            yield [(self.epoch, int(index)) for index in np.array_split(total, self.world_size)[self.rank]]

    def __len__(self):
        """Number of batches in a whole epoch."""
        return max(1, self.length // self.total_batch)

    def describe_dropped(self):
        """Describe in one line the images that an epoch drops; '' if it drops none."""
        dropped = self.length - len(self) * self.total_batch
        return f'{dropped} of {self.length} training images, different ones each epoch, are dropped: they do not ' \
               f'fill a batch of {self.total_batch}' if dropped else ''


class EvalSampler:
    """One rank's batches of (0, index). Together, the ranks get every image once; the last batch may be partial."""

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
    """Settings of a training epoch: side of the images in pixels, strength of AutoAugment from 0 (off) to 1."""
    image_size: int
    auto_augment_strength: float


def get_stage(config, epoch):
    """Return the Stage of an epoch (from 1): from TRAIN.CURRICULUM, or else DATA.IMAGE_SIZE and TRAIN.AUTO_AUGMENT."""
    stages = [stage for stage in config.TRAIN.CURRICULUM if stage['EPOCH'] <= epoch]
    if not stages:
        return Stage(config.DATA.IMAGE_SIZE, float(config.TRAIN.AUTO_AUGMENT))
    return Stage(stages[-1]['IMAGE_SIZE'], stages[-1]['AUTO_AUGMENT_STRENGTH'])


def describe_curriculum(config):
    """Describe the stages of TRAIN.CURRICULUM in one line, including those that the run is too short to reach."""
    stages = config.TRAIN.CURRICULUM
    parts = [f'from epoch {stage["EPOCH"]}: {stage["IMAGE_SIZE"]} pixels, AutoAugment '
             f'{stage["AUTO_AUGMENT_STRENGTH"]:g}' for stage in stages]
    parts.append(f'evaluation at {config.DATA.IMAGE_SIZE} pixels')
    late = [stage['EPOCH'] for stage in stages if stage['EPOCH'] > config.TRAIN.NUM_EPOCHS]
    if late:
        parts.append(f'TRAIN.NUM_EPOCHS is {config.TRAIN.NUM_EPOCHS}, so the stages from epoch {late[0]} on are not '
                     'reached')
    return f'curriculum: {"; ".join(parts)}'


def get_augmentations(train, strength):
    """Return the augmentations that TRAIN.* enables, functions (image, rng) -> image. strength: of AutoAugment."""
    augmentations = []
    if train.AUTO_AUGMENT:
        augmentations.append(AutoAugment(strength))
    if train.RAND_AUGMENT:
        augmentations.append(RandAugment(train.RAND_AUGMENT_LAYERS, train.RAND_AUGMENT_MAGNITUDE))
    if train.COLOR_JITTER:
        augmentations.append(ColorJitter(train.COLOR_JITTER))
    return augmentations


def get_dataset(config, is_train=True, epoch=1):
    """Return the training set of a config for an epoch, or its validation set (DATA.*, MODEL.NUM_CLASSES, SEED).

    Raises: UserError for an unknown DATA.DATASET or DATA.INTERPOLATION, and as `read_list`, `find_backend`, and,
    with MODEL.NUM_CLASSES 0, `count_classes`.
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


def describe_dataset(dataset, num_classes, is_train=True):
    """Describe a dataset in one line: images, labels, and the share of the largest class (the accuracy of always
    guessing it). Points out labels that may start at 1 and classes that do not occur.
    """
    used, counts = int(dataset.labels.max()) + 1, np.unique(dataset.labels, return_counts=True)[1]
    least = dataset.labels.min()
    line = (f'{dataset.list_path}: {len(dataset)} images, labels {least} to {used - 1}, '
            f'{counts.max() / len(dataset):.1%} of them in the largest class')
    if used < num_classes:
        line += f': {num_classes - used} of MODEL.NUM_CLASSES {num_classes} unused'
    if is_train and 2 * used < num_classes:  # an evaluation takes the number from the weights
        line += '; set MODEL.NUM_CLASSES 0 to take it from the data'
    return f'{line}; labels count from 0: if these start at 1, subtract 1 from each' if least else line


def get_dataloader(config, dataset, is_train=True, rank=0, world_size=1):
    """Return the `Loader` for this rank's share of a dataset. In evaluation, DATA.BATCH_SIZE_EVAL 0 means BATCH_SIZE.

    Before each training epoch, call `loader.batch_sampler.set_epoch(epoch)` with epochs counted from 1.
    Raises: UserError for a rank that is not below world_size, and for fewer training images than processes.
    """
    data = config.DATA
    if not 0 <= rank < world_size:  # PaddleViT's port had a flag, use_dist_sampler, where rank is here
        raise UserError(f'rank is {rank}, but must be below world_size, {world_size}: give both, or neither')
    if is_train:
        sampler = TrainSampler(len(dataset), data.BATCH_SIZE, config.SEED, rank, world_size)
    else:
        sampler = EvalSampler(len(dataset), data.BATCH_SIZE_EVAL or data.BATCH_SIZE, rank, world_size)
    return Loader(dataset, sampler, data.NUM_WORKERS, data.WORKER_TIMEOUT)
