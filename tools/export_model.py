"""Export trained weights for other inference engines, and verify that the outputs are unchanged.

  python -m tools.export_model -cfg configs/mobileone_s0.yaml -pretrained mobileone_s0.pdparams -output exported
  python -m tools.export_model -cfg output/demo/config.yaml -pretrained output/demo/best.pdparams -output exported
  python -m tools.export_model -cfg configs/mobileone_s0.yaml -pretrained mobileone_s0.pdparams -output exported \\
    -precision int8 -calibration data/train_list.txt

-pretrained is a weight file, fused or not, or a training checkpoint (its EMA weights, if it has any). tools.predict
reads the -output folder, which contains

  model.onnx         for ONNX Runtime, OpenVINO, and others
  inference.pdmodel  for Paddle Inference; on PaddlePaddle 3 also inference.json
  inference.yml      the preprocessing and the class names

Each file is loaded by its engine and compared with the network, on random images and, if there is a val list, on images
from it. With -precision int8 only model.onnx is written, calibrated on the images of -calibration. -format ncnn mnn
exports for phones. See docs/deployment.md for details.
"""
import contextlib
import dataclasses
import os
import tempfile
from importlib.util import find_spec

import numpy as np

from config import get_config, get_parser, resolve_config, update_config
from deploy import phone
from deploy.predictor import LOADERS, ONNX, ONNX_ENGINES, Spec, find_class_names, load_program, run_batches, softmax
from images import find_images, read_image
from runtime.files import sync
from runtime.program import prepare_runtime, remedy, run_program
from utils import UserError, describe_error, setup_logger

# largest allowed difference of an export: relative to the largest output, and absolute; the larger of the two applies
TOLERANCE, NEGLIGIBLE = 3e-4, 1e-5
RANDOM_IMAGES, VAL_IMAGES = 8, 16
# for int8: smallest number of calibration images, and smallest share of held-out images that must keep their top-1
MIN_IMAGES, MIN_AGREEMENT = 8, 0.8


def sample_images(config, needs_data):
    """Return {kind: uint8 [N, size, size, 3]}: random images and, if there is a val list, images from it.

    needs_data: whether a missing val list is an error.
    """
    data, rng = config.DATA, np.random.default_rng(config.SEED)
    # distributed like the pixels of photographs, because some networks are chaotic on other inputs
    pixels = rng.normal(255 * np.array(data.IMAGENET_MEAN), 255 * np.array(data.IMAGENET_STD),
                        [RANDOM_IMAGES, data.IMAGE_SIZE, data.IMAGE_SIZE, 3])
    images = {'random images': pixels.clip(0, 255).astype('uint8')}
    if needs_data or os.path.exists(os.path.join(data.DATA_PATH, 'val_list.txt')):
        from datasets import get_dataset
        dataset = get_dataset(config, False)
        chosen = np.unique(np.linspace(0, len(dataset) - 1, VAL_IMAGES).astype(int))
        images['val images'] = np.stack([dataset[int(index)][0] for index in chosen])
    else:
        print(f'no val_list.txt in {data.DATA_PATH}: comparing on random images only; set -data_path to use a dataset')
    return images


def write(model, spec, folder, formats):
    """Write a fused network to a folder in the given formats.

    Returns: [(file name, installed engine that can load it)].
    """
    written = []
    if formats != ['paddle']:
        import onnx

        from deploy.onnx_graph import build_onnx
        proto, path = build_onnx(model, spec), os.path.join(folder, ONNX)
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, path)
        for name in phone.FORMATS:
            if name in formats:
                phone.convert(name, path, spec)
                written.append((phone.FORMATS[name][0], name))
        if 'onnx' in formats:
            written += [(ONNX, engine) for engine in ONNX_ENGINES if find_spec(engine)]
        else:
            os.remove(path)
    if 'paddle' in formats:
        from deploy.paddle_model import write_paddle
        written += [(name, 'inference') for name in write_paddle(model, spec, folder)]
    return written


def load(path, engine):
    """Return run(input) -> outputs for an exported file."""
    if engine == 'inference':
        return load_program(path)
    return phone.LOADERS[engine](path) if engine in phone.LOADERS else LOADERS[engine](path, None, None)[1]


def compare(path, engine, spec, images, expected):
    """Print how far the outputs of an exported file are from the network's, for each kind of image.

    Raises: UserError if the difference is too large.
    """
    name, run = os.path.basename(path), load(path, engine)
    for kind, pixels in images.items():
        outputs = softmax(expected[kind]) if spec.softmax else expected[kind]
        difference, largest = np.abs(run_batches(run, spec, pixels) - outputs).max(), np.abs(outputs).max()
        print(f'{name:20}{engine:14}{f"{len(pixels)} {kind}":20}{difference:12.3g}{difference / largest:12.3g}')
        if not difference <= max(TOLERANCE * largest, NEGLIGIBLE):
            raise UserError(f'{name}: {engine} differs from the network by {difference:.3g} on {kind}, more than '
                            f'{TOLERANCE:g} of the largest output, {largest:.3g}; nothing was exported: leave its '
                            'format out of -format, and please report it')


def read_calibration(path, count, spec, num_classes):
    """Read up to `count` evenly spaced images of a list or folder, preprocessed as in evaluation.

    Subfolders and linked folders are searched too. Returns: uint8 [N, size, size, 3].
    Raises: UserError for fewer than MIN_IMAGES images, and for a list or an image that cannot be read.
    """
    from datasets import read_list
    if not os.path.exists(path):
        raise UserError(f'-calibration {path}: no such list or folder')
    if os.path.isdir(path):
        paths = [os.path.join(path, name) for name in find_images(path)[0]]
    else:
        paths = [os.path.join(os.path.dirname(path), name) for name in read_list(path, num_classes)[0]]
    if len(paths) < MIN_IMAGES:
        raise UserError(f'-calibration {path}: {len(paths)} images, but int8 needs at least {MIN_IMAGES}, '
                        'preferably hundreds: add images like those the network will see')
    if not os.path.isdir(path) and not os.path.exists(paths[0]):
        raise UserError(f'-calibration {path}: its first image, {paths[0]}, does not exist; the paths of a list are '
                        'relative to its folder')
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int))
    return np.stack([spec.transform(read_image(paths[index], spec.exif_transpose, spec.bit_depth))
                     for index in chosen])


def make_int8(model, spec, path, pixels, source):
    """Quantize the ONNX file of a fused network to int8, and print how well each engine reproduces its outputs.

    pixels: uint8 [N, size, size, 3], images from `source`.
    Raises: UserError if the top-1 prediction changes for too many images.
    """
    from deploy.quantize import compare_outputs, find_outputs, quantize
    scores, best, held_out, expected = quantize(model, spec, pixels, path)
    title = f'int8 from {len(pixels) - len(held_out)} images; {len(held_out)} held out:'
    print(f'{title:36}{"same top-1":>14}{"SNR":>10}')
    for way, (share, decibels) in scores.items():
        print(f'{way:34}{share:16.1%}{decibels:7.1f} dB{" (kept)" * (way == best)}')
    for engine in filter(find_spec, ONNX_ENGINES):
        share, decibels = compare_outputs(find_outputs(path, engine, spec, held_out), expected)
        print(f'{os.path.basename(path):20}{engine:14}{share:16.1%}{decibels:7.1f} dB')
        if not share >= MIN_AGREEMENT:
            raise UserError(f"-precision int8: {engine} keeps the network's top-1 prediction for {share:.1%} of "
                            f'{len(held_out)} held-out images of {source}, less than {MIN_AGREEMENT:.0%}; nothing was '
                            'exported: give more images like those the network was trained on, or use -precision '
                            'float32')


def parse_batch(text):
    """Return -batch as a number, or None for 'dynamic'. Raises: UserError for any other text."""
    if text == 'dynamic':
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65536):
        raise UserError(f"-batch is {text!r}, but must be a number from 1 to 65536, or 'dynamic'")
    return int(text)


def check_formats(formats, pixels, batch):
    """Check that the formats can be written, verified and combined with the other flags.

    Raises: UserError for a missing package, and for flags that a format does not support.
    """
    missing = [] if find_spec('onnx') else ['onnx']
    missing += [] if 'onnx' not in formats or any(map(find_spec, ONNX_ENGINES)) else ['onnxruntime']
    if formats != ['paddle'] and missing:
        name = next(name for name in formats if name != 'paddle')
        raise UserError(f'-format {name} needs {" and ".join(missing)}: pip install -r requirements-deploy.txt, or '
                        'choose -format paddle')
    for name in phone.FORMATS:
        if name in formats and not phone.find_converter(name):
            raise UserError(f'-format {name} needs its converter: {phone.FORMATS[name][1]}')
        if name in formats and (pixels == 'uint8' or batch not in (None, 1)):
            raise UserError(f'-format {name} takes one floating-point image at a time: leave out -batch, and use '
                            '-normalize unit instead of uint8')


def check_int8(args):
    """Check the flags of -precision int8, and set the default of -num_images.

    Raises: UserError for a missing flag or package, and for flags that do not go together.
    """
    if args.precision != 'int8':
        for flag in ('calibration', 'num_images'):
            if getattr(args, flag) is not None:
                raise UserError(f'-{flag} works only with -precision int8: add it, or leave out -{flag}')
        return
    if not args.calibration:
        raise UserError('-precision int8 needs -calibration: a list or a folder of images like those the network will '
                        'see')
    if set(args.format) != {'onnx'}:
        raise UserError(f'-precision int8 works only with -format onnx, not {" ".join(args.format)}: leave out the '
                        'other formats, or export them to another folder')
    args.num_images = 256 if args.num_images is None else args.num_images
    if args.num_images < MIN_IMAGES:
        raise UserError(f'-num_images is {args.num_images}, but must be at least {MIN_IMAGES}, preferably hundreds')
    if not find_spec('onnxruntime'):
        raise UserError('-precision int8 needs onnxruntime: pip install -r requirements-deploy.txt')


@contextlib.contextmanager
def new_folder(path):
    """Yield a temporary folder to fill, which is renamed to `path` at the end if nothing has failed.

    Raises: UserError if `path` is not empty or cannot be written.
    """
    target = os.path.realpath(path)
    if not path or os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise UserError(f'-output {path!r} already exists and is not an empty folder; remove it, or choose another')
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='export-', dir=os.path.dirname(target)) as parent:
            folder = os.path.join(parent, os.path.basename(target))
            os.mkdir(folder)
            yield folder
            for name in os.listdir(folder):
                sync(os.path.join(folder, name))
            os.rename(folder, target)
    except OSError as error:
        raise UserError(f'-output {path}: cannot write ({error.strerror or error}); {remedy(error)}') from None


def main():
    parser = get_parser(__doc__, ['data_path', 'image_size', 'pretrained'])
    parser.add_argument('-output', metavar='DIR', required=True, help='folder to write; it must be empty or not exist')
    parser.add_argument('-format', nargs='+', choices=['paddle', 'onnx', *phone.FORMATS],
                        help='formats to write (default: paddle onnx; with int8: onnx)')
    parser.add_argument('-softmax', action='store_true', help='output probabilities instead of logits')
    parser.add_argument('-normalize', choices=['uint8', 'unit'], help='include normalization in the network, which '
                        'then takes uint8 pixels or floats from 0 to 1')
    parser.add_argument('-batch', metavar='N', default='dynamic', help='fix the number of images per call, and '
                        'with it the image size (default: dynamic)')
    parser.add_argument('-precision', choices=['float32', 'int8'], default='float32',
                        help='precision of weights and activations (default: float32)')
    parser.add_argument('-calibration', metavar='PATH', help='calibration images for int8: a list file like '
                        'train_list.txt, or a folder')
    parser.add_argument('-num_images', metavar='N', type=int, help='number of -calibration images to use; '
                        'a quarter of them is held out for the comparison (default: 256)')
    parser.add_argument('-raw', action='store_true', help="export a checkpoint's raw weights, not its EMA weights")
    args = parser.parse_args()
    batch = parse_batch(args.batch)
    args.format = args.format or (['onnx'] if args.precision == 'int8' else ['paddle', 'onnx'])
    check_int8(args)
    if not args.pretrained:
        raise UserError('-pretrained is needed: the weights to export')
    config = update_config(get_config(), args)
    config.EVAL, config.MODEL.DEPLOY, config.MODEL.RESUME = True, False, ''
    config = resolve_config(config)
    check_formats(args.format, args.normalize, batch)
    with new_folder(args.output) as folder:
        prepare_runtime()
        try:
            export(config, args, batch, folder)
        except ImportError as error:
            raise UserError(f'a package cannot be imported ({describe_error(error)}): install it again, see '
                            'requirements-deploy.txt') from None
    print(f'exported to {args.output}: {", ".join(sorted(os.listdir(args.output)))}')


def export(config, args, batch, folder):
    """Write the network to a folder as the flags request, and compare each file with it."""
    import paddle

    from mobileone import model_convert
    from transforms import Normalize
    from weights import load_model, with_classes_of
    setup_logger()
    config = with_classes_of(config, config.MODEL.PRETRAINED)
    model, _ = load_model(config, config.MODEL.PRETRAINED, raw=args.raw)
    model.eval()
    spec = dataclasses.replace(
        Spec.of_config(config, find_class_names(config.MODEL.PRETRAINED, config.MODEL.NUM_CLASSES)),
        pixels=args.normalize or 'normalized', softmax=args.softmax, batch=batch)
    calibration = read_calibration(args.calibration, args.num_images, spec, config.MODEL.NUM_CLASSES) if (
        args.precision == 'int8') else None
    images = sample_images(config, bool(args.data_path))
    normalize = Normalize(spec.mean, spec.std)
    with paddle.no_grad():
        expected = {kind: model(normalize(paddle.to_tensor(pixels))).numpy() for kind, pixels in images.items()}
    if not all(np.isfinite(logits).all() for logits in expected.values()):
        raise UserError(f'{config.MODEL.PRETRAINED}: the outputs are not finite; choose other weights')
    fused = model_convert(model)
    exported = write(fused, spec, folder, args.format)
    print(f'{"file":20}{"engine":14}{"compared on":20}{"difference":>12}{"relative":>12}')
    for name, engine in exported:
        compare(os.path.join(folder, name), engine, spec, images, expected)
    if args.precision == 'int8':
        make_int8(fused, spec, os.path.join(folder, ONNX), calibration, args.calibration)


if __name__ == '__main__':
    run_program(main)
