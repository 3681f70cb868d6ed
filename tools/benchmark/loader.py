"""Measure how many images per second are loaded for training, compared with torchvision if it is installed.

  python -m tools.benchmark loader -num_workers 1 2
  python -m tools.benchmark loader -cfg configs/mobileone_s2.yaml -data_path /dataset/imagenet -num_workers 4 8 16

The images are those in the train_list.txt of -data_path. Without -data_path, they are photographs from scikit-image and
scikit-learn, cropped to 500 x 375 pixels and saved as JPEG with quality 92. Rows for one process without data workers:

  decode      decode whole images with Pillow
  transform   make images from their files: crop, resize, flip, and the config's augmentations
  collate     assemble a batch from images in memory

Rows for each number of data workers:

  training            the training loader, end to end
  hand-over           the same with images in the workers' memory: only collate and hand over batches
  torchvision Pillow  PyTorch's loader, with torchvision's crop, resize and flip on Pillow images
  torchvision v2      the same on uint8 tensors, with torchvision's decoder

The torchvision rows have no augmentations. Each row has its own process. Rows with the same number of workers take
turns of -batches batches, with pauses in between. The first turn does not count, nor do the first 1 + 2 x workers
batches of each turn. The table shows medians over the turns, the range of the time per batch, and the ratio of times,
turn by turn, to torchvision v2 or, without it, to the first row with that number of workers.
"""
import importlib.util
import json
import os
import statistics
import tempfile

from config import get_config, get_parser, resolve_config, update_config, with_values
from images import read_image
from runtime.files import write_text
from runtime.program import prepare_runtime
from tools.benchmark.loader_worker import LOADERS, STAGES, TORCHVISION, config_of
from tools.benchmark.turns import compare, describe_cpu, find_versions, measure, with_range
from utils import UserError

# package -> the color photographs of at least SIZE that it ships
PHOTOGRAPHS = {
    'skimage': ('data/astronaut.png', 'data/coffee.png', 'data/motorcycle_left.png', 'data/rocket.jpg'),
    'sklearn': ('datasets/images/china.jpg', 'datasets/images/flower.jpg'),
}
# width and height of an average ImageNet image
SIZE = 500, 375


def find_photographs():
    """Return the paths of PHOTOGRAPHS. Raises: UserError if one of them is not installed."""
    paths = []
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        folder = spec.submodule_search_locations[0] if spec else ''
        paths += [os.path.join(folder, name) for name in names]
    if not all(map(os.path.isfile, paths)):
        raise UserError('the photographs of scikit-image and scikit-learn are missing: pip install scikit-image '
                        'scikit-learn, or give -data_path')
    return paths


def write_photographs(folder, count):
    """Write the photographs and a train_list.txt that cycles through them in `count` lines. Returns: their bytes."""
    names, paths = [], find_photographs()
    for path in paths:
        image = read_image(path)
        left, top = ((side - wanted) // 2 for side, wanted in zip(image.size, SIZE))
        names.append(f'{os.path.splitext(os.path.basename(path))[0]}.jpg')
        image.crop((left, top, left + SIZE[0], top + SIZE[1])).save(os.path.join(folder, names[-1]), quality=92)
    write_text(os.path.join(folder, 'train_list.txt'),
               ''.join(f'{names[number % len(names)]} 0\n' for number in range(count)))
    return [os.path.getsize(os.path.join(folder, name)) for name in names]


def parse_args():
    """Parse the command line. Raises: UserError for values out of range."""
    parser = get_parser(__doc__, ('data_path', 'batch_size', 'image_size'))
    parser.add_argument('-num_workers', metavar='N', nargs='+', type=int, dest='workers',
                        help="numbers of data workers to measure (default: the config's)")
    parser.add_argument('-batches', metavar='N', type=int, default=20, help='batches per turn (default: 20)')
    parser.add_argument('-turns', metavar='N', type=int, default=5, help='turns per row (default: 5)')
    parser.add_argument('-json', action='store_true', help='print a JSON object per row instead of the table')
    args = parser.parse_args()
    if min(args.batches, args.turns) < 1 or min(args.workers or [0]) < 0:
        raise UserError('-batches and -turns must be at least 1, and -num_workers 0 or more')
    return args


def make_groups(workers, batch):
    """Return the groups of rows that take turns: the stages without workers, and the loaders per number of workers."""
    names = [*LOADERS, *(TORCHVISION if importlib.util.find_spec('torchvision') else ())]
    return [[{'pipeline': name, 'workers': count, 'batch': batch, 'threads': 1} for name in group]
            for count, group in [(None, STAGES), *((count, names) for count in workers)]]


def choose_base(rows):
    """Return the row of torchvision v2, or the first row; None if there are no rows."""
    return next((row for row in rows if row['pipeline'] == 'torchvision v2'), next(iter(rows), None))


def describe(row):
    """Return a row as a line of the table."""
    start = f'{row["pipeline"]:20}{"-" if row["workers"] is None else row["workers"]:>7}'
    if 'error' in row:
        return f'{start}  {row["error"]}'
    return f'{start}{row["images_per_second"]:10.1f}  {with_range(row["turns"], 1):36}{row["ratio"]:.2f}'


def main():
    args = parse_args()
    config = resolve_config(with_values(update_config(get_config(), args), {'TRAIN.CURRICULUM': []}))
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # for the workers too, so that batches stay in host memory
    prepare_runtime()
    from datasets import get_dataset
    from runtime.workers import default_workers
    batch, workers = config.DATA.BATCH_SIZE, args.workers or [config.DATA.NUM_WORKERS]
    workers = [default_workers() if count < 0 else count for count in workers]
    groups = make_groups(workers, batch)
    for row in (row for rows in groups for row in rows):
        config_of(row, config)  # report invalid values before anything is measured
    count = batch * (1 + 2 * max(workers) + args.batches)
    with tempfile.TemporaryDirectory() as folder:
        if args.data_path:
            images = len(get_dataset(config))
            if images < count:
                raise UserError(f'{config.DATA.DATA_PATH}/train_list.txt: {images} images are too few for a '
                                f'turn of {count}: lower -batches, -batch_size or -num_workers')
            source = f'{images} images of {config.DATA.DATA_PATH}'
        else:
            sizes = write_photographs(folder, count)
            config = with_values(config, {'DATA.DATA_PATH': folder})
            source = f'{len(sizes)} photographs, {SIZE[0]} x {SIZE[1]}, {statistics.mean(sizes) / 1000:.0f} kB'
        write_text(os.path.join(folder, 'config.yaml'), config.dump())
        machine, _ = describe_cpu()
        versions = find_versions('paddlepaddle', 'paddlepaddle-gpu', 'pillow', 'torch', 'torchvision')
        if not args.json:
            print(f'{machine}; {", ".join(map(" ".join, versions.items()))}; {source}; to {config.DATA.IMAGE_SIZE} '
                  f'pixels; {args.turns} turns of {args.batches} batches of {batch}')
            print('pipeline            workers  images/s  ms per batch (range)                ratio')
        for rows in groups:
            measure('tools.benchmark.loader_worker', rows, folder, args.turns, args.batches)
            compare(rows, choose_base)
            for row in rows:
                if 'turns' in row:
                    row['images_per_second'] = 1000 * batch / row['milliseconds']
                print(json.dumps({**row, 'machine': machine, 'versions': versions, 'images': source}) if args.json
                      else describe(row), flush=True)
