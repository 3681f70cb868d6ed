"""Write train_list.txt, val_list.txt and class_names.txt for a folder of images sorted into class folders.

Two folders, a train one and a val one, with the same class folders in them:
  python -m tools.make_list -data_path photos -train train -val val

One folder of class folders, of which a share of each class becomes the val list:
  python -m tools.make_list -data_path photos -train . -val_share 0.2

Classes are numbered in the order of their sorted names, which class_names.txt keeps. Images are the files below a class
folder whose names end in .jpg, .jpeg, .png, .bmp, .gif, .tif, .tiff, .webp, in any case. Paths are relative to
-data_path, where the three files are written. The same images, share and seed give the same lists.
"""
import os
import re

import numpy as np

from runtime.files import write_text
from runtime.program import run_program
from runtime.settings import ArgumentParser
from utils import UserError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp')


def find_classes(data_path, folder):
    """{class name: sorted paths of its images, relative to data_path}, of the class folders in data_path/folder."""
    root = os.path.join(data_path, folder)
    if not os.path.isdir(root):
        raise UserError(f'{root}: no such folder; -train and -val are folders of class folders inside -data_path')
    classes = {}
    for name in sorted(os.listdir(root)):
        if name.startswith('.') or not os.path.isdir(os.path.join(root, name)):
            continue
        classes[name] = sorted(
            os.path.relpath(os.path.join(parent, file), data_path).replace(os.sep, '/')
            for parent, _, files in os.walk(os.path.join(root, name)) for file in files
            if file.lower().endswith(EXTENSIONS) and not file.startswith('.'))
        if not classes[name]:
            raise UserError(f'{os.path.join(root, name)}: holds no images; remove the folder, or add images '
                            f'({", ".join(EXTENSIONS)})')
    if not classes:
        raise UserError(f'{root}: holds no class folders; put the images of each class in a folder of its own')
    return classes


def split_classes(classes, share, seed):
    """Divide the images of each class at random: (train classes, val classes), the val share rounded, at least one."""
    train, val = {}, {}
    for number, (name, paths) in enumerate(classes.items()):
        if len(paths) < 2:
            raise UserError(f'class {name} has one image ({paths[0]}): it cannot be in both lists; add images')
        count = min(len(paths) - 1, max(1, round(share * len(paths))))
        chosen = set(np.random.default_rng([seed, number]).permutation(len(paths))[:count].tolist())
        val[name] = [path for index, path in enumerate(paths) if index in chosen]
        train[name] = [path for index, path in enumerate(paths) if index not in chosen]
    return train, val


def write_list(path, classes):
    """Write 'path label' lines, the label being the class's place in the dictionary. Returns their number."""
    lines = [f'{image} {label}\n' for label, images in enumerate(classes.values()) for image in images]
    for line in lines:
        # Python stands in for what is not UTF-8 with surrogates
        if re.search('[\r\ud800-\udfff]|\n.', line):
            raise UserError(f'{line!r}: a file name with a line break, or not in UTF-8, cannot be listed; rename it')
    write_text(path, ''.join(lines))
    return len(lines)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('-data_path', metavar='DIR', required=True, help='folder the lists are written to')
    parser.add_argument('-train', metavar='DIR', required=True, help='folder of class folders, relative to -data_path')
    val = parser.add_mutually_exclusive_group(required=True)
    val.add_argument('-val', metavar='DIR', help='the same for validation')
    val.add_argument('-val_share', metavar='X', type=float, help='share of each class for validation, e.g. 0.2')
    parser.add_argument('-seed', metavar='N', type=int, default=0, help='seed of the split (default: 0)')
    args = parser.parse_args()
    train = find_classes(args.data_path, args.train)
    if args.val is not None:
        val = find_classes(args.data_path, args.val)
        if list(val) != list(train):
            odd = sorted(set(val) ^ set(train))
            raise UserError(f'the folders of -train and -val differ: {", ".join(odd)} is in only one of them')
    else:
        if not 0 < args.val_share < 1:
            raise UserError(f'-val_share is {args.val_share}, but must be between 0 and 1, like 0.2')
        if args.seed < 0:
            raise UserError(f'-seed is {args.seed}, but must be 0 or more')
        train, val = split_classes(train, args.val_share, args.seed)
    for split, classes in (('train', train), ('val', val)):
        path = os.path.join(args.data_path, f'{split}_list.txt')
        print(f'{path}: {write_list(path, classes)} images')
    path = os.path.join(args.data_path, 'class_names.txt')
    write_text(path, ''.join(f'{name}\n' for name in train))
    print(f'{path}: {len(train)} classes; train with -opts MODEL.NUM_CLASSES {len(train)}')


if __name__ == '__main__':
    run_program(main)
