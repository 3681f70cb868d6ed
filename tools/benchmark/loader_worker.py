"""One row of tools.benchmark.loader, in a process of its own."""
import contextlib
import functools
import itertools
import os
import time

from config import get_config, resolve_config, with_values
from images import read_image
from runtime.program import prepare_runtime, run_program
from tools.benchmark.turns import answer_turns

# images that are kept in memory where reading them is not measured
IN_MEMORY = 16


def decode(loader):
    """Yield after each batch of images that Pillow decodes whole."""
    for batch in loader.batch_sampler:
        for _, index in batch:
            read_image(loader.dataset.name_of(index))
        yield


def transform(loader):
    """Yield after each batch of images that this process reads, crops, resizes, flips and augments."""
    for batch in loader.batch_sampler:
        for item in batch:
            loader.dataset[item]
        yield


class Ready:
    """A dataset that takes no time: it has a few items of another in memory."""

    def __init__(self, dataset):
        self.items = [dataset[index] for index in range(min(IN_MEMORY, len(dataset)))]
        self.name_of = dataset.name_of
        self.shape = dataset.shape

    def __len__(self):
        return len(self.items)

    def __getitem__(self, item):
        return self.items[item[1] % len(self.items)]


def collate(loader):
    """Yield after each batch of images in memory that is put together."""
    from runtime.workers import Workers
    for _ in Workers(Ready(loader.dataset), loader.batch_sampler.batch_size, 0).read(loader.batch_sampler):
        yield


def hand_over(loader):
    """Yield batches of images that data workers have in memory."""
    from runtime.loader import Loader
    return iter(Loader(Ready(loader.dataset), loader.batch_sampler, loader.num_workers))


# name -> function of training's loader; a generator of batches, of which more than a turn has
STAGES = {'decode': decode, 'transform': transform, 'collate': collate}
LOADERS = {'training': iter, 'hand-over': hand_over}


def start_paddle(row, config):
    """A function that starts a row's generator, in a new epoch each time."""
    prepare_runtime()
    from run import build_loader
    loader, epochs = build_loader(config, True), itertools.count(1)

    def start_epoch():
        loader.batch_sampler.set_epoch(next(epochs))
        return {**STAGES, **LOADERS}[row['pipeline']](loader)
    return start_epoch


class Files:
    """load(path) of the images of a list, for PyTorch's loader."""

    def __init__(self, config, load):
        with open(os.path.join(config.DATA.DATA_PATH, 'train_list.txt'), encoding='utf-8-sig') as file:
            self.paths = [os.path.join(config.DATA.DATA_PATH, line.rsplit(maxsplit=1)[0])
                          for line in file if line.strip()]
        self.load = load

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.load(self.paths[index]), 0


def load_by_pillow(config):
    """load(path) -> uint8 tensor [3, H, W], by torchvision on Pillow's images."""
    from PIL import Image
    from torchvision import transforms
    data = config.DATA
    apply = transforms.Compose([
        transforms.RandomResizedCrop(data.IMAGE_SIZE, data.CROP_SCALE,
                                     interpolation=transforms.InterpolationMode(data.INTERPOLATION.lower())),
        transforms.RandomHorizontalFlip(), transforms.PILToTensor()])

    def load(path):
        with Image.open(path) as image:
            return apply(image.convert('RGB'))
    return load


def load_by_v2(config):
    """The same by torchvision's own decoder and its transforms of uint8 tensors."""
    from torchvision import io
    from torchvision.transforms import InterpolationMode, v2
    data = config.DATA
    apply = v2.Compose([
        v2.RandomResizedCrop(data.IMAGE_SIZE, data.CROP_SCALE,
                             interpolation=InterpolationMode(data.INTERPOLATION.lower()), antialias=True),
        v2.RandomHorizontalFlip()])
    return lambda path: apply(io.decode_image(io.read_file(path), io.ImageReadMode.RGB))


TORCHVISION = {'torchvision Pillow': load_by_pillow, 'torchvision v2': load_by_v2}


def start_torchvision(row, config):
    """As `start_paddle`."""
    import torch
    torch.set_num_threads(row['threads'])
    dataset = Files(config, TORCHVISION[row['pipeline']](config))
    loader = torch.utils.data.DataLoader(dataset, row['batch'], shuffle=True, num_workers=row['workers'])

    def start_epoch():
        yield from loader  # whose workers end with this generator
    return start_epoch


def turn(start_epoch, workers, batches):
    """Milliseconds of a batch. The first batches of data workers, two of each, come all at once: they do not count."""
    with contextlib.closing(start_epoch()) as iterator:
        for _ in itertools.islice(iterator, 1 + 2 * workers):
            pass
        start = time.perf_counter()
        for _ in itertools.islice(iterator, batches):
            pass
        return 1000 * (time.perf_counter() - start) / batches


def config_of(row, config):
    """The config of a row. config: that of all rows. Raises: UserError for a value that cannot be."""
    return resolve_config(with_values(config, {
        'DATA.BATCH_SIZE': row['batch'], 'DATA.NUM_WORKERS': row['workers'] or 0}))


def start(row, folder):
    """turn(batches) of a row. folder: holds config.yaml, the config of all rows."""
    config = config_of(row, get_config(os.path.join(folder, 'config.yaml')))
    start_epoch = (start_torchvision if row['pipeline'] in TORCHVISION else start_paddle)(row, config)
    return functools.partial(turn, start_epoch, row['workers'] or 0)


if __name__ == '__main__':
    run_program(lambda: answer_turns(start))
