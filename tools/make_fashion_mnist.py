"""Write Fashion-MNIST as image files with ImageNet-style lists.

  python -m tools.make_fashion_mnist -source demo -output data/fashion_mnist_demo
  python -m tools.make_fashion_mnist -source /usr/share/datasets/fashion-mnist -output data/fashion_mnist

-source must contain the four files of the dataset (github.com/zalandoresearch/fashion-mnist, MIT license):
train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz.
The folder `demo` of this repository has the first images of each; Debian's package dataset-fashion-mnist has them all.
The t10k images become the val list. Running the command again rewrites the same files.
"""
import gzip
import os
import struct
import zlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from runtime.files import CLASS_NAMES, write_text
from runtime.program import run_program
from runtime.settings import ArgumentParser
from utils import UserError

CLASSES = ['T-shirt_top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle_boot']
SPLITS = {'train': 'train', 'val': 't10k'}


def read_idx(path):
    """Return the uint8 array in a gzipped IDX file. Raises: UserError for a missing or broken file."""
    try:
        with gzip.open(path, 'rb') as file:
            content = file.read()
        zero, kind, dims = struct.unpack('>HBB', content[:4])
        shape = struct.unpack(f'>{dims}I', content[4:4 + 4 * dims])
        if zero != 0 or kind != 8:
            raise ValueError('not an IDX file of bytes')
        return np.frombuffer(content, dtype='uint8', offset=4 + 4 * dims).reshape(shape)
    except FileNotFoundError:
        raise UserError(f'{path}: no such file; -source must contain the four files that -h lists') from None
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f'{path}: cannot be read ({error}); copy it again') from None


def write_split(images, labels, folder, split, extension):
    """Write the images of a split to folder/split, and its list file."""
    for name in CLASSES:
        os.makedirs(os.path.join(folder, split, name), exist_ok=True)
    options = {'quality': 95} if extension == 'jpg' else {}
    lines = []
    for index, (image, label) in enumerate(zip(tqdm(images, split, disable=None), labels)):
        path = f'{split}/{CLASSES[label]}/{index:05d}.{extension}'
        Image.fromarray(image).save(os.path.join(folder, path), **options)
        lines.append(f'{path} {label}\n')
    write_text(os.path.join(folder, f'{split}_list.txt'), ''.join(lines))


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('-source', metavar='DIR', required=True, help='folder with the four .gz files')
    parser.add_argument('-output', metavar='DIR', required=True, help='folder for the images and lists')
    parser.add_argument('-format', choices=['png', 'jpg'], default='png', help='image format (default: png, lossless)')
    args = parser.parse_args()
    for split, prefix in SPLITS.items():
        images, labels = (read_idx(os.path.join(args.source, f'{prefix}-{kind}-ubyte.gz'))
                          for kind in ('images-idx3', 'labels-idx1'))
        if images.ndim != 3 or labels.shape != images.shape[:1] or not len(labels) or labels.max() >= len(CLASSES):
            raise UserError(f'{args.source}: images {images.shape} and labels {labels.shape} of {prefix} do not match; '
                            'copy the four files again')
        write_split(images, labels, args.output, split, args.format)
        print(f'{args.output}/{split}_list.txt: {len(labels)} images')
    write_text(os.path.join(args.output, CLASS_NAMES), ''.join(f'{name}\n' for name in CLASSES))


if __name__ == '__main__':
    run_program(main)
