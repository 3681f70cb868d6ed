"""Write a smaller copy of a dataset, for machines whose cores cannot read large images as fast as the GPU trains.

  python -m tools.resize_dataset -data_path /dataset/imagenet -output /dataset/imagenet_400 -shorter 400

Images are resized with Pillow's bicubic filter, so that their shorter side is -shorter pixels. Images that are already
that small are copied unchanged. The copy has the same relative paths, train_list.txt, val_list.txt, and
class_names.txt. JPEG images stay JPEG. All others become lossless PNG, without changing the file name. The EXIF
orientation is kept, and pixels with more than 8 bits are reduced to 8 according to DATA.BIT_DEPTH. Files that already
exist in -output are skipped, even if they were made with another -shorter: after an interruption, run the same command
again. Bad images are named and left out of the lists, and the exit status is then 1.
"""
import collections
import functools
import os
import sys

from PIL import Image
from tqdm import tqdm

from config import get_config, get_parser, resolve_config, update_config
from images import ORIENTATION, read_image
from runtime.files import CLASS_NAMES, copy, replace
from runtime.program import prepare_runtime, run_program, usable_cores
from tools.check_dataset import find_lists, map_parts, save_list, start_workers
from utils import UserError, describe_error, one_line


def read_oriented(path, bit_depth):
    """Return (image from `read_image`, its EXIF orientation). Raises: UserError for a bad image or bad EXIF data."""
    image = read_image(path, bit_depth=bit_depth)
    try:
        return image, image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # Pillow raises several types
        raise UserError(f'{one_line(path)}: cannot read the EXIF data ({describe_error(error)}); remove them') from None


def resize(image, shorter):
    """Resize an image so that its shorter side is `shorter` pixels, and drop its metadata."""
    scale = shorter / min(image.size)
    resized = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
    resized.info.clear()
    return resized


def copy_image(name, data, args):
    """Write one image of a list to args.output, resized if it is larger than args.shorter. data: the config's DATA.

    Returns: ('resized', 'copied', 'skipped' or 'bad', and the problem or '').
    Raises: UserError, OSError if the image cannot be written.
    """
    source, target = os.path.join(data.DATA_PATH, name), os.path.join(args.output, name)
    if os.path.isabs(name) or '..' in name.split('/'):
        return 'bad', f'{one_line(name)}: is outside -data_path, and its copy outside -output; use a path inside'
    if os.path.exists(target):
        return 'skipped', ''
    try:
        image, orientation = read_oriented(source, data.BIT_DEPTH)
    except UserError as error:
        return 'bad', str(error)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if min(image.size) <= args.shorter:
        copy(source, target)
        return 'copied', ''
    with open(source, 'rb') as file:
        kind = 'JPEG' if file.read(2) == b'\xff\xd8' else 'PNG'
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    replace(target, functools.partial(resize(image, args.shorter).save, format=kind, quality=args.quality,
                                      exif=exif if orientation != 1 else b''))
    return 'resized', ''


def copy_images(names, data, args):
    """Return the results of `copy_image` for a list of names."""
    return [copy_image(name, data, args) for name in names]


def parse_args():
    """Parse the command line. Raises: UserError for values out of range."""
    parser = get_parser(__doc__, ['data_path'])
    parser.add_argument('-output', metavar='DIR', required=True, help='folder for the copy')
    parser.add_argument('-shorter', metavar='N', type=int, default=400,
                        help='maximum length of the shorter side, in pixels (default: 400)')
    parser.add_argument('-quality', metavar='N', type=int, default=90,
                        help='JPEG quality of resized images, 1 to 100 (default: 90)')
    parser.add_argument('-workers', metavar='N', type=int, default=usable_cores(),
                        help='number of processes (default: one per core)')
    args = parser.parse_args()
    if min(args.shorter, args.workers) < 1:
        raise UserError('-shorter and -workers must be at least 1')
    if not 1 <= args.quality <= 100:
        raise UserError(f'-quality is {args.quality}, but must be from 1 to 100')
    return args


def main():
    args = parse_args()
    config = resolve_config(update_config(get_config(), args))
    data = config.DATA
    if os.path.realpath(args.output) == os.path.realpath(data.DATA_PATH):
        raise UserError(f'-output {args.output}: is the same folder as -data_path; choose another')
    prepare_runtime()
    from datasets import read_list
    # accept any number of classes
    lists = {name: read_list(os.path.join(data.DATA_PATH, name), sys.maxsize) for name in find_lists(data.DATA_PATH)}
    names = list(dict.fromkeys(name for paths, _ in lists.values() for name in paths))
    os.makedirs(args.output, exist_ok=True)
    counts, bad = collections.Counter(), set()
    with start_workers(args.workers) as workers, tqdm(
            map_parts(workers, copy_images, names, data, args), total=len(names), leave=False, file=sys.stdout,
            disable=None) as bar:
        for name, (outcome, fault) in zip(names, bar):
            counts[outcome] += 1
            if fault:
                bad.add(name)
                tqdm.write(fault)
    print(f'{args.output}: ' + ', '.join(f'{counts[name]} {name}' for name in ('resized', 'copied', 'skipped', 'bad')))
    for name, (paths, labels) in lists.items():
        save_list(os.path.join(args.output, name),
                  [(path, label) for path, label in zip(paths, labels.tolist()) if path not in bad])
    classes = os.path.join(data.DATA_PATH, CLASS_NAMES)
    if os.path.exists(classes):
        copy(classes, os.path.join(args.output, CLASS_NAMES))
    sys.exit(1 if bad else 0)


if __name__ == '__main__':
    run_program(main)
