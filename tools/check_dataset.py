"""Check a data set: every line of its train_list.txt and val_list.txt, and that the image there can be read.

  python -m tools.check_dataset -data_path /dataset/imagenet
  python -m tools.check_dataset -data_path photos -opts MODEL.NUM_CLASSES 2 -save photos_checked

Images are read as training reads them, on all cores. Each bad line is printed with its number and what is wrong, then a
summary of each list; repeated images, and those in both lists, are counted there, but not bad. At the end it says
whether images are stored in 16 bits but use fewer, which makes them dark: see DATA.BIT_DEPTH. -save writes the lists
without their bad lines, with absolute paths: -data_path photos_checked then trains on what is left. The exit status is
1 if a line is bad.
"""
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from config import get_config, get_parser, resolve_config, update_config
from runtime.files import write_text
from runtime.program import end_with_parent, prepare_runtime, run_program, usable_cores
from utils import UserError, program_name

LISTS = ('train_list.txt', 'val_list.txt')


def check_line(line, config):
    """Read the image of a line of a list. Returns: its range as `read_range` does; None where DATA.BIT_DEPTH is set.

    Raises: UserError that says what is wrong with the line or its image.
    """
    from datasets import parse_line
    from images import read_image, read_range
    data, num_classes = config.DATA, config.MODEL.NUM_CLASSES
    name, label = parse_line(line)
    if label >= num_classes:
        raise UserError(f'{line!r}: the label is outside MODEL.NUM_CLASSES {num_classes}')
    path = os.path.join(data.DATA_PATH, name)
    read_image(path, data.EXIF_TRANSPOSE, data.BIT_DEPTH)
    return None if data.BIT_DEPTH else read_range(path)


def check_lines(lines, config):
    """A pair per line of a list: what is wrong with it, '' if nothing is, and what `check_line` returns, or None."""
    results = []
    for line in lines:
        try:
            results.append(('', check_line(line, config)))
        except UserError as error:
            results.append((str(error), None))
    return results


def _start_worker(parent):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)


@contextlib.contextmanager
def start_workers(count):
    """A pool of `count` processes, which are ended at once when the block is left, however that happens."""
    if 'fork' not in multiprocessing.get_all_start_methods():
        raise UserError(f'{program_name()} forks its processes, which this system cannot: run it on Linux or macOS')
    # forked, they share the memory of what is imported; not multiprocessing.Pool, which waits for one that was killed
    context = multiprocessing.get_context('fork')
    parent = os.getpid()
    workers = ProcessPoolExecutor(count, context, _start_worker, (parent,))

    def interrupt(number, frame):
        # a terminal's Ctrl-C reaches all, workers that have hardly started too; they are ended below
        if os.getpid() == parent:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield workers
    except BrokenProcessPool:
        raise UserError('a process that reads images was killed, for lack of memory perhaps: run it again with fewer '
                        'cores (taskset), or more memory') from None
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        workers.shutdown()


def map_parts(workers, function, items, *args):
    """Iterate over the results of function(part of the items, *args), which returns one for each, in their order."""
    # a task of several items costs less in passing it on, and several tasks a core keep all busy
    size = min(32, 1 + len(items) // 100)
    rest = iter(items)
    # not map(), which cancels what is left when it is interrupted: of this the executor (Python 3.11) makes tracebacks
    tasks = [workers.submit(function, part, *args) for part in iter(lambda: list(itertools.islice(rest, size)), [])]
    return (result for task in tasks for result in task.result())


def check_list(path, config, workers):
    """Print the bad lines of a list.

    Returns: (number of lines, the good ones as pairs of path and label, the ranges of images of 16 bits).
    """
    from datasets import parse_line, read_lines
    lines = read_lines(path)
    results = map_parts(workers, check_lines, lines, config)
    good, ranges = [], []
    with tqdm(results, desc=os.path.basename(path), total=len(lines), leave=False, file=sys.stdout,
              disable=None) as bar:
        for number, (line, (fault, extrema)) in enumerate(zip(lines, bar), 1):
            if fault:
                tqdm.write(f'{path}:{number}: {fault}')
            else:
                good.append(parse_line(line))
                ranges += [extrema] if extrema else []
    return len(lines), good, ranges


def describe_ranges(ranges):
    """A line on the images of 16 bits that use fewer; '' where none does. ranges: (smallest, largest pixel) of each."""
    fewer = [extrema for extrema in ranges if extrema[1] < 2 ** 15]
    if not fewer:
        return ''
    low, high = min(low for low, _ in fewer), max(high for _, high in fewer)
    bits = max(1, high.bit_length())
    if len(fewer) == len(ranges):
        remedy = f'set DATA.BIT_DEPTH {bits}, or if they are colored, scale them in their files'
    else:
        remedy = 'scale them in their files, for the others use all 16'
    return (f'{len(fewer)} of {len(ranges)} images of 16 bits use fewer and will be dark: their pixels are from {low} '
            f'to {high}; if {bits} bits are all they have, {remedy}')


def save_list(path, good):
    """Write a list, unless it would be empty, and say so. good: pairs of path and label."""
    if not good:
        print(f'{path}: not written, no line is left')
        return
    write_text(path, ''.join(f'{name} {label}\n' for name, label in good))
    print(f'{path}: {len(good)} lines written')


def find_lists(data_path):
    """The names of the lists that a folder holds. Raises: UserError if it holds none."""
    found = [name for name in LISTS if os.path.lexists(os.path.join(data_path, name))]
    if not found:
        raise UserError(f'{data_path}: holds neither {" nor ".join(LISTS)}; -data_path is the folder of the lists, '
                        'python -m tools.make_list writes them')
    return found


def main():
    parser = get_parser(__doc__, ['data_path'])
    parser.add_argument('-save', metavar='DIR', help='write the lists without their bad lines to this folder')
    args = parser.parse_args()
    config = resolve_config(update_config(get_config(), args))
    data_path = config.DATA.DATA_PATH
    found = find_lists(data_path)
    if args.save:
        for name in LISTS:
            if os.path.lexists(os.path.join(args.save, name)):
                raise UserError(f'{os.path.join(args.save, name)}: would be replaced; choose another -save folder, or '
                                'remove it')
        os.makedirs(args.save, exist_ok=True)
    prepare_runtime()
    bad, before, ranges = 0, set(), []
    with start_workers(usable_cores()) as workers:
        for name in found:
            path = os.path.join(data_path, name)
            count, good, found_ranges = check_list(path, config, workers)
            ranges += found_ranges
            bad += count - len(good)
            images = {image for image, _ in good}
            summary = f'{path}: {count} lines, {count - len(good)} bad'
            if len(images) < len(good):
                summary += f', {len(good) - len(images)} repeated'
            if images & before:
                summary += f', {len(images & before)} of the images also in {found[0]}'
            print(summary)
            before = images
            if args.save:
                save_list(os.path.join(args.save, name), [
                    (os.path.abspath(os.path.join(data_path, image)), label) for image, label in good])
    note = describe_ranges(ranges)
    if note:
        print(note)
    sys.exit(1 if bad else 0)


if __name__ == '__main__':
    run_program(main)
