"""Write train_list.txt, val_list.txt, and class_names.txt for a folder of images sorted into class folders.

With a train folder and a val folder that contain the same class folders:
  python -m tools.make_list -data_path photos -train train -val val

With a single folder of class folders, where a share of each class becomes the val list:
  python -m tools.make_list -data_path photos -train . -val_share 0.2

Class folders are sorted by name, or as numbers with -numeric. Labels count from 0 in that order, and class_names.txt
keeps the names. Images are the files below a class folder, also through links, with the extension of a format that
Pillow reads. Each image is listed once, in one of the lists, even if several links lead to it. Hidden files and
folders, system folders, and the folders of runs and reports are left out; the program counts and names whatever it
leaves out. Paths are relative to -data_path, where the three files are written. The same images, share, and seed give
the same lists.
"""
import os
import re

import numpy as np

from images import RUNS, find_images
from runtime.files import CLASS_NAMES, write_text
from runtime.program import run_program
from runtime.settings import ArgumentParser
from utils import UserError, first_few, one_line


def find_classes(data_path, folder, numeric, listed):
    """Find the images of the class folders in data_path/folder. Print what is left out.

    numeric: sort the class names as numbers; listed: as for `find_images`.
    Returns: {class name: sorted paths of its images, relative to data_path}.
    Raises: UserError for a class without images and, if numeric, for names that are not numbers.
    """
    root = os.path.normpath(os.path.join(data_path, folder))
    if not os.path.isdir(root):
        raise UserError(f'{root}: no such folder; -train and -val are folders of class folders inside -data_path')
    images, left_out = find_images(root, listed)
    loose = [path for path in images if '/' not in path]
    if loose:
        left_out['images outside the class folders'] = loose
    for reason, paths in left_out.items():
        print(f'{root}: left out {len(paths)} ({reason}): {one_line(first_few(paths))}')
    names = set(os.listdir(root)) - {path for paths in left_out.values() for path in paths}
    classes = {name: [] for name in names if os.path.isdir(os.path.join(root, name))}
    prefix = os.path.relpath(root, data_path).replace(os.sep, '/')
    for path in images:
        if '/' in path:
            classes[path.split('/')[0]].append(path if prefix == '.' else f'{prefix}/{path}')
    for run in left_out.get(RUNS, []):  # a folder that contains only runs is not a class either
        if not classes.get(run.split('/')[0], True):
            del classes[run.split('/')[0]]
    for name in sorted(classes):
        if not classes[name]:
            raise UserError(f'{os.path.join(root, name)}: contains no images to list; remove the folder, or add images')
    if not classes:
        raise UserError(f'{root}: contains no class folders; put the images of each class in its own folder')
    return {name: classes[name] for name in sort_names(root, classes, numeric)}


def sort_names(root, names, numeric):
    """Sort the names of the class folders in `root` as text or, if numeric, as numbers. Print where the two differ.

    Raises: UserError if numeric and a name is not a number.
    """
    as_text = sorted(names)
    words = [name for name in as_text if not (name.isascii() and name.isdigit())]
    if words:
        if numeric:
            raise UserError(f'-numeric: {os.path.join(root, words[0])} is not a number; leave out -numeric')
        return as_text
    as_numbers = sorted(as_text, key=int)
    if numeric:
        return as_numbers
    for label, (name, other) in enumerate(zip(as_text, as_numbers)):
        if name != other:
            print(f'{root}: the class folders are numbers, but sorted as text, so label {label} is folder {name}; '
                  f'-numeric sorts them as numbers, which makes it folder {other}')
            break
    return as_text


def split_classes(classes, share, seed):
    """Split the images of each class at random. The val count is rounded, but each list gets at least one image.

    Returns: (train classes, val classes), each as from `find_classes`. Raises: UserError for a class with one image.
    """
    train, val = {}, {}
    for number, (name, paths) in enumerate(classes.items()):
        if len(paths) < 2:
            raise UserError(f'class {name} has only one image ({paths[0]}), but both lists need one; add images')
        count = min(len(paths) - 1, max(1, round(share * len(paths))))
        chosen = set(np.random.default_rng([seed, number]).permutation(len(paths))[:count].tolist())
        val[name] = [path for index, path in enumerate(paths) if index in chosen]
        train[name] = [path for index, path in enumerate(paths) if index not in chosen]
    return train, val


def to_list(classes):
    """Return the text of a list file. A class's label is its position in the dictionary.

    Raises: UserError for a file name that a list cannot represent.
    """
    lines = [f'{image} {label}\n' for label, images in enumerate(classes.values()) for image in images]
    for line in lines:
        # Python represents bytes that are not UTF-8 as surrogates
        if re.search('[\r\ud800-\udfff]|\n.', line):
            raise UserError(f'{line!r}: a file name with a line break, or not in UTF-8, cannot be listed; rename it')
    return ''.join(lines)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('-data_path', metavar='DIR', required=True, help='folder to write the lists to')
    parser.add_argument('-train', metavar='DIR', required=True, help='folder of class folders, relative to -data_path')
    val = parser.add_mutually_exclusive_group(required=True)
    val.add_argument('-val', metavar='DIR', help='the same for validation images')
    val.add_argument('-val_share', metavar='X', type=float, help='share of each class to use for validation, e.g. 0.2')
    parser.add_argument('-numeric', action='store_true', help='sort class folders as numbers: 2 comes before 10')
    parser.add_argument('-seed', metavar='N', type=int, default=0, help='seed of the random split (default: 0)')
    args = parser.parse_args()
    listed = set()
    train = find_classes(args.data_path, args.train, args.numeric, listed)
    if args.val is not None:
        val = find_classes(args.data_path, args.val, args.numeric, listed)
        if list(val) != list(train):
            odd = sorted(set(val) ^ set(train))
            raise UserError(f'the class folders of -train and -val differ: only one of them has {", ".join(odd)}')
    else:
        if not 0 < args.val_share < 1:
            raise UserError(f'-val_share is {args.val_share}, but must be between 0 and 1, like 0.2')
        if args.seed < 0:
            raise UserError(f'-seed is {args.seed}, but must be 0 or more')
        train, val = split_classes(train, args.val_share, args.seed)
    # build both before writing either: a new list next to an old one could have images in common with it
    for split, text in [('train', to_list(train)), ('val', to_list(val))]:
        path = os.path.join(args.data_path, f'{split}_list.txt')
        write_text(path, text)
        count = text.count('\n')
        print(f'{path}: {count} images')
    path = os.path.join(args.data_path, CLASS_NAMES)
    write_text(path, ''.join(f'{name}\n' for name in train))
    print(f'{path}: {len(train)} classes; configs/finetune.yaml reads the number from here, with other configs add '
          f'-opts MODEL.NUM_CLASSES {len(train)}')


if __name__ == '__main__':
    run_program(main)
