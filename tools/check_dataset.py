"""Check a dataset: every line of train_list.txt and val_list.txt, and whether every image can be read.

  python -m tools.check_dataset -data_path /dataset/imagenet
  python -m tools.check_dataset -data_path photos -opts MODEL.NUM_CLASSES 2 -save photos_checked -unique

Images are read as in training, on all cores. The program prints
  - each bad line, with its number and the problem
  - each line whose image has the same pixels as an earlier one in its list or in the train list
  - a summary of each list, with its smallest and largest class
  - classes that occur in only one list, and labels that seem to start at 1
  - whether 16-bit images use fewer bits, which makes them dark (see DATA.BIT_DEPTH)

-save writes lists without the bad lines and with absolute paths, so that training works with -data_path photos_checked.
With -unique, the saved train list contains each image once, and none that is also in the val list or has several
labels. The exit status is 1 if any line is bad.
"""
import collections
import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from tqdm import tqdm

from config import get_config, get_parser, resolve_config, update_config, with_values
from runtime.files import CLASS_NAMES, copy, write_text
from runtime.program import end_with_parent, prepare_runtime, run_program, usable_cores
from utils import UserError, first_few, program_name, setup_logger

LISTS = ('train_list.txt', 'val_list.txt')


@dataclass
class Checked:
    """A checked list, with the label of each line and a digest of its image's pixels (None if unknown)."""
    path: str
    lines: collections.abc.Sequence
    labels: list
    digests: list

    def __post_init__(self):
        # {digest: index of the first line with that image}, in list order
        self.firsts = {}
        for index, digest in enumerate(self.digests):
            if digest:
                self.firsts.setdefault(digest, index)

    def good(self):
        """Return the indices of the lines that are not bad."""
        return [index for index, digest in enumerate(self.digests) if digest]


def check_line(line, config):
    """Read the image named by a line of a list.

    Returns: (problem or '', label, digest of the pixels, result of `images.read_range`). Unknown values are None, as
    is the range if DATA.BIT_DEPTH is set.
    """
    from datasets import parse_line
    from images import read_image, read_range
    data, num_classes, label = config.DATA, config.MODEL.NUM_CLASSES, None
    try:
        name, label = parse_line(line)
        if 0 < num_classes <= label:
            raise UserError(f'{line!r}: the label is outside MODEL.NUM_CLASSES {num_classes}')
        path = os.path.join(data.DATA_PATH, name)
        image = read_image(path, data.EXIF_TRANSPOSE, data.BIT_DEPTH)
        digest = hashlib.sha256(repr(image.size).encode())
        digest.update(image.tobytes())
        return '', label, digest.digest()[:16], None if data.BIT_DEPTH else read_range(path)
    except UserError as error:
        return str(error), label, None, None


def check_lines(lines, config):
    """Return the results of `check_line` for a list of lines."""
    return [check_line(line, config) for line in lines]


def _start_worker(parent):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)


@contextlib.contextmanager
def start_workers(count):
    """Yield a pool of `count` processes. They are killed at once when the block ends, normally or by an exception.

    Raises: UserError if the system cannot fork, and if a process is killed.
    """
    if 'fork' not in multiprocessing.get_all_start_methods():
        raise UserError(f'{program_name()} forks its processes, which this system does not support: run it on Linux or '
                        'macOS')
    # forked processes share the memory of imported modules; multiprocessing.Pool would wait forever for a killed one
    context = multiprocessing.get_context('fork')
    parent = os.getpid()
    workers = ProcessPoolExecutor(count, context, _start_worker, (parent,))

    def interrupt(number, frame):
        # Ctrl-C in a terminal reaches the workers too, even while they start; they are killed below
        if os.getpid() == parent:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield workers
    except BrokenProcessPool:
        raise UserError('a process that reads images was killed, perhaps for lack of memory: run again with fewer '
                        'cores (taskset) or more memory') from None
    finally:
        # a process that is still starting may lose SIGTERM: the inherited handler may raise where Python ignores it
        for process in multiprocessing.active_children():
            process.kill()
        workers.shutdown()


def map_parts(workers, function, items, *args):
    """Return an iterator over the results of `function` for a list of items, in order, computed by a pool.

    function(part of the items, *args) -> one result per item of that part.
    """
    # several items per task save overhead, and several tasks per core keep all cores busy
    size = min(32, 1 + len(items) // 100)
    rest = iter(items)
    # not map(), which cancels pending tasks on an interrupt; the executor of Python 3.11 then prints tracebacks
    tasks = [workers.submit(function, part, *args) for part in iter(lambda: list(itertools.islice(rest, size)), [])]
    return (result for task in tasks for result in task.result())


def check_list(path, config, workers):
    """Print the bad lines of a list. Returns: (`Checked`, the ranges of its 16-bit images)."""
    from datasets import read_lines
    lines = read_lines(path)
    results = map_parts(workers, check_lines, lines, config)
    labels, digests, ranges = [], [], []
    with tqdm(results, desc=os.path.basename(path), total=len(lines), leave=False, file=sys.stdout,
              disable=None) as bar:
        for number, (fault, label, digest, extrema) in enumerate(bar, 1):
            if fault:
                tqdm.write(f'{path}:{number}: {fault}')
            labels.append(label)
            digests.append(digest)
            ranges += [extrema] if extrema else []
    return Checked(path, lines, labels, digests), ranges


def print_copies(checked, others):
    """Print the lines of a list whose image occurs earlier in it, or in one of the lists `others`.

    Exact repetitions of a line are not printed, because some lists weight their images this way.
    """
    from datasets import parse_line
    for index in checked.good():
        line = checked.lines[index]
        for other in [checked, *others]:
            first = other.firsts.get(checked.digests[index])
            if first is None or other is checked and other.lines[first] == line:
                continue
            (name, label), known = parse_line(line), other.labels[first]
            labels = f', but with label {label}, not {known}' if label != known else ''
            print(f'{checked.path}:{index + 1}: {name} is the same image as {other.path}:{first + 1}, '
                  f'{parse_line(other.lines[first])[0]}{labels}')


def print_summary(checked, others):
    """Print how many lines of a list are bad or repeat an image, and how many images it shares with `others`."""
    good = len(checked.good())
    summary = f'{checked.path}: {len(checked.lines)} lines, {len(checked.lines) - good} bad'
    if len(checked.firsts) < good:
        summary += f', {good - len(checked.firsts)} repeated'
    for other in others:
        count = len(checked.firsts.keys() & other.firsts.keys())
        summary += f', {count} of the images also in {os.path.basename(other.path)}' if count else ''
    print(summary)


def choose_unique(train, others):
    """Return indices of lines of a train list that contain each image once.

    Images that are also in one of the lists `others`, or that have several labels, are left out.
    """
    left_out = {digest for other in others for digest in other.firsts}
    left_out |= {train.digests[index] for index in train.good()
                 if train.labels[index] != train.labels[train.firsts[train.digests[index]]]}
    return [index for digest, index in train.firsts.items() if digest not in left_out]


def print_labels(lists, num_classes):
    """Describe the labels of the good lines of some `Checked`.

    Print the smallest and the largest class of each list, the classes that occur in only one list, and whether the
    labels seem to start at 1.
    """
    counts = {checked.path: collections.Counter(checked.labels[index] for index in checked.good()) for checked in lists}
    for path, count in counts.items():
        if len(count) > 1:
            ranked = count.most_common()
            (largest, most), (smallest, least) = ranked[0], ranked[-1]
            print(f'{path}: {len(count)} classes; the smallest is label {smallest} with {least} images, the largest is '
                  f'label {largest} with {most}')
    for path, other in itertools.permutations(counts, 2):
        missing = [str(label) for label in sorted(counts[other].keys() - counts[path].keys())]
        if missing:
            print(f'{path}: no images for {len(missing)} classes of {os.path.basename(other)}: {first_few(missing)}')
    used = {label for checked in lists for label in checked.labels if label is not None}
    if used and 0 not in used and (max(used) == num_classes or used == set(range(1, max(used) + 1))):
        print(f'no image has label 0, and the largest is {max(used)}: labels count from 0, so if these start at 1, '
              'subtract 1 from each')


def describe_ranges(ranges):
    """Describe in one line the 16-bit images that use fewer bits; '' if none do.

    ranges: (smallest, largest pixel) of each 16-bit image.
    """
    fewer = [extrema for extrema in ranges if extrema[1] < 2 ** 15]
    if not fewer:
        return ''
    low, high = min(low for low, _ in fewer), max(high for _, high in fewer)
    bits = max(1, high.bit_length())
    if len(fewer) == len(ranges):
        remedy = f'set DATA.BIT_DEPTH {bits} or, for color images, rescale the files'
    else:
        remedy = 'rescale their files, because the other images use all 16 bits'
    return (f'{len(fewer)} of {len(ranges)} images with 16 bits use fewer and will be dark: their pixels are from '
            f'{low} to {high}; if they have only {bits} bits, {remedy}')


def save_list(path, good):
    """Write a list unless it would be empty, and print the outcome. good: pairs of path and label."""
    if not good:
        print(f'{path}: not written, because no lines are left')
        return
    write_text(path, ''.join(f'{name} {label}\n' for name, label in good))
    print(f'{path}: {len(good)} lines written')


def save_checked(lists, args):
    """Write a list of `Checked` without their bad lines to the folder args.save.

    args.unique: reduce the train list to `choose_unique`.
    """
    from datasets import parse_line
    for checked in lists:
        folder, name = os.path.split(checked.path)
        is_train = name == LISTS[0]
        indices = choose_unique(checked, lists[1:]) if args.unique and is_train else checked.good()
        images = [parse_line(checked.lines[index]) for index in indices]
        lost = sorted({checked.labels[index] for index in checked.good()} - {label for _, label in images})
        if lost:
            print(f'{checked.path}: no images are left for labels {first_few([str(label) for label in lost])}')
        save_list(os.path.join(args.save, name),
                  [(os.path.abspath(os.path.join(folder, image)), label) for image, label in images])


def find_lists(data_path):
    """Return the names of the lists in a folder. Raises: UserError if it has none."""
    found = [name for name in LISTS if os.path.lexists(os.path.join(data_path, name))]
    if not found:
        raise UserError(f'{data_path}: contains neither {" nor ".join(LISTS)}; set -data_path to the folder of the '
                        'lists, or write them with python -m tools.make_list')
    return found


def main():
    parser = get_parser(__doc__, ['data_path'])
    parser.add_argument('-save', metavar='DIR', help='write the lists, without bad lines, to this folder')
    parser.add_argument('-unique', action='store_true', help='with -save: drop images from the train list that are '
                        'duplicates, are also in the val list, or have several labels')
    args = parser.parse_args()
    config = resolve_config(update_config(get_config(), args))
    data_path = config.DATA.DATA_PATH
    found = find_lists(data_path)
    if args.unique and not args.save:
        raise UserError('-unique is for the lists that -save writes: add -save DIR')
    if args.save:
        for name in (*LISTS, CLASS_NAMES):
            if os.path.lexists(os.path.join(args.save, name)):
                raise UserError(f'{os.path.join(args.save, name)}: would be replaced; choose another -save folder, or '
                                'remove the file')
        os.makedirs(args.save, exist_ok=True)
    prepare_runtime()
    setup_logger()
    names = os.path.join(data_path, CLASS_NAMES)
    if not config.MODEL.NUM_CLASSES and os.path.isfile(names):
        from datasets import count_classes
        config = with_values(config, {'MODEL.NUM_CLASSES': count_classes(data_path)[0]})
    lists, ranges = [], []
    with start_workers(usable_cores()) as workers:
        for name in found:
            checked, found_ranges = check_list(os.path.join(data_path, name), config, workers)
            ranges += found_ranges
            print_copies(checked, lists)
            print_summary(checked, lists)
            lists.append(checked)
    print_labels(lists, config.MODEL.NUM_CLASSES)
    if args.save:
        save_checked(lists, args)
        if os.path.isfile(names):
            copy(names, os.path.join(args.save, CLASS_NAMES))
    note = describe_ranges(ranges)
    if note:
        print(note)
    sys.exit(0 if all(all(checked.digests) for checked in lists) else 1)


if __name__ == '__main__':
    run_program(main)
