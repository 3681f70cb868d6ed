"""The process that measures one row of tools.benchmark.loader."""
import contextlib
import functools
import itertools
import os
import time

from config import get_config, resolve_config, with_values
from images import read_image
from runtime.program import prepare_runtime, run_program
from tools.benchmark.turns import serve_turns

# images kept in memory when reading is not measured
IN_MEMORY = 16


def decode(loader):
    """Decode whole images with Pillow; yield after each batch."""
    for batch in loader.batch_sampler:
        for _, index in batch:
            read_image(loader.dataset.name_of(index))
        yield


def transform(loader):
    """Read, crop, resize, flip and augment images in this process; yield after each batch."""
    for batch in loader.batch_sampler:
        for item in batch:
            loader.dataset[item]
        yield


class Ready:
    """A dataset that keeps a few items of another dataset in memory, so that reading takes no time."""

    def __init__(self, dataset):
        self.items = [dataset[index] for index in range(min(IN_MEMORY, len(dataset)))]
        self.name_of = dataset.name_of
        self.shape = dataset.shape

    def __len__(self):
        return len(self.items)

    def __getitem__(self, item):
        return self.items[item[1] % len(self.items)]


def collate(loader):
    """Collate images in memory; yield after each batch."""
    from runtime.workers import Workers
    for _ in Workers(Ready(loader.dataset), loader.batch_sampler.batch_size, 0).read(loader.batch_sampler):
        yield


def hand_over(loader):
    """Return an iterator over batches of images that data workers keep in memory."""
    from runtime.loader import Loader
    return iter(Loader(Ready(loader.dataset), loader.batch_sampler, loader.num_workers))


# name -> function of training's loader that returns an iterator with more batches than a turn needs
STAGES = {'decode': decode, 'transform': transform, 'collate': collate}
LOADERS = {'training': iter, 'hand-over': hand_over}


def start_paddle(row, config):
    """Return a function that starts the iterator of a row, each time in a new epoch."""
    prepare_runtime()
    from run import build_loader
    loader, epochs = build_loader(config, True), itertools.count(1)

    def start_epoch():
        loader.batch_sampler.set_epoch(next(epochs))
        return {**STAGES, **LOADERS}[row['pipeline']](loader)
    return start_epoch


class Files:
    """A dataset for PyTorch's loader: load(path) applied to the images of train_list.txt."""

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
    """Return load(path) -> uint8 tensor [3, H, W], with torchvision's transforms on Pillow images."""
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
    """Return the same with torchvision's decoder and its v2 transforms on uint8 tensors."""
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
    """Do the same as `start_paddle` with PyTorch's loader."""
    import torch
    torch.set_num_threads(row['threads'])
    dataset = Files(config, TORCHVISION[row['pipeline']](config))
    loader = torch.utils.data.DataLoader(dataset, row['batch'], shuffle=True, num_workers=row['workers'])

    def start_epoch():
        yield from loader  # the workers exit with this generator
    return start_epoch


def turn(start_epoch, workers, batches):
    """Return the milliseconds per batch.

    The first batch and two per data worker do not count, because the workers' first batches arrive all at once.
    """
    with contextlib.closing(start_epoch()) as iterator:
        for _ in itertools.islice(iterator, 1 + 2 * workers):
            pass
        start = time.perf_counter()
        for _ in itertools.islice(iterator, batches):
            pass
        return 1000 * (time.perf_counter() - start) / batches


def config_of(row, config):
    """Return the config of a row. config: shared by all rows. Raises: UserError for an invalid value."""
    return resolve_config(with_values(config, {
        'DATA.BATCH_SIZE': row['batch'], 'DATA.NUM_WORKERS': row['workers'] or 0}))


def start(row, folder):
    """Return turn(batches) for a row. folder: contains config.yaml, shared by all rows."""
    config = config_of(row, get_config(os.path.join(folder, 'config.yaml')))
    start_epoch = (start_torchvision if row['pipeline'] in TORCHVISION else start_paddle)(row, config)
    return functools.partial(turn, start_epoch, row['workers'] or 0)


if __name__ == '__main__':
    run_program(lambda: serve_turns(start))
