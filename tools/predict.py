"""Print the most probable classes of images.

  python -m tools.predict photo.jpg -model exported
  python -m tools.predict photos/ 'more/*.png' -model mobileone_s0.pdparams -cfg configs/mobileone_s0.yaml -json

-model is a folder written by tools.export_model, an .onnx file from it, or weights with their config: -cfg, or the
config.yaml next to them. IMAGE is a file, a folder, or a glob pattern. A file that cannot be read is reported and
skipped, and the exit status is then 1. See docs/deployment.md for details.
"""
import glob
import json
import os
import sys

from config import get_config
from deploy.predictor import ENGINES, Predictor, find_engine
from deploy.report import THUMBNAIL, Drawn, draw_images, import_figure
from images import is_image, read_image
from runtime.program import prepare_runtime, run_program, use_device
from runtime.settings import ArgumentParser, add_device_flag
from utils import UserError, one_line, program_name

# images drawn by -plot
DRAWN = 20


def find_images(names):
    """Expand files, folders and glob patterns to a list of files, in order.

    Raises: UserError for a folder without images.
    """
    paths = []
    for name in names:
        if os.path.isdir(name):
            found = [os.path.join(name, file) for file in sorted(os.listdir(name)) if is_image(file)]
            if not found:
                raise UserError(f'{name}: no images in this folder (subfolders are not searched: name them)')
            paths += found
        else:
            # an existing file whose name looks like a pattern is not expanded
            paths += [name] if os.path.lexists(name) else [
                path for path in sorted(glob.glob(name, recursive=True)) if not os.path.isdir(path)] or [name]
    return paths


def predict(predictor, paths, top):
    """Yield (path, Prediction), or (path, UserError) for a file that cannot be read."""
    for path in paths:
        try:
            yield path, predictor(path, top)[0]
        except UserError as error:
            yield path, error


def show(path, result):
    """Print a result of `predict` as text; print an error to stderr."""
    if isinstance(result, UserError):
        sys.stdout.flush()
        print(f'{program_name()}: error: {result}', file=sys.stderr)
        return
    print(one_line(path))
    for number, name, probability in zip(*result):
        print(f'  {probability:7.2%}  {number}' + (f' {one_line(name)}' if name != str(number) else ''))


def show_json(path, result):
    """Print a result of `predict` as a JSON object."""
    if isinstance(result, UserError):
        print(json.dumps({'image': path, 'error': str(result)}))
        return
    print(json.dumps({'image': path, 'top': [{'id': number, 'name': name, 'probability': probability}
                                             for number, name, probability in zip(*result)]}))


def plot(results, spec, path):
    """Draw images next to bars for their classes into a PNG file. results: [(path, Prediction)]."""
    drawn = []
    for name, result in results:
        image = read_image(name, spec.exif_transpose, spec.bit_depth)
        image.thumbnail(THUMBNAIL)
        drawn.append(Drawn(os.path.basename(name), image, result.names, result.probabilities))
    draw_images(drawn, path, columns=-(-len(drawn) // 7))


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='files, folders, or glob patterns')
    parser.add_argument('-model', metavar='PATH', required=True, help='exported folder, .onnx file, or weights')
    parser.add_argument('-cfg', metavar='FILE', help='config of the weights (default: config.yaml next to them)')
    parser.add_argument('-top', metavar='N', type=int, default=5, help='number of classes per image (default: 5)')
    parser.add_argument('-json', action='store_true', help='print one line of JSON per image')
    parser.add_argument('-engine', default='auto', choices=['auto', *ENGINES],
                        help='inference engine (default: the fastest installed one that can run the model)')
    add_device_flag(parser)
    parser.add_argument('-threads', metavar='N', type=int, help="CPU threads (default: the engine's choice)")
    parser.add_argument('-plot', metavar='FILE', help=f'draw the first {DRAWN} images and their classes into this PNG')
    args = parser.parse_args()
    if args.top < 1:
        raise UserError(f'-top is {args.top}, but must be at least 1')
    if args.plot is not None:
        import_figure()
        if not os.path.isdir(os.path.dirname(args.plot) or '.') or os.path.isdir(args.plot):
            raise UserError(f'-plot {args.plot!r}: cannot be written; name a PNG file in an existing folder')
    paths = find_images(args.images)
    engine = find_engine(args.model, args.engine)
    if ENGINES[engine][0] == 'paddle':
        if args.threads:
            os.environ['OMP_NUM_THREADS'] = str(args.threads)
        prepare_runtime(args.device)
        use_device(args.device)
    elif args.device:
        raise UserError(f'-device is {args.device}, but the engine {engine} chooses its own device: leave it out, or '
                        'use weights or -engine inference')
    predictor = Predictor(args.model, get_config(args.cfg) if args.cfg else None, args.engine, args.threads)
    drawn, count, failed = [], 0, False
    for path, result in predict(predictor, paths, args.top):
        (show_json if args.json else show)(path, result)
        failed |= isinstance(result, UserError)
        if not isinstance(result, UserError):
            count += 1
            drawn += [(path, result)] * (count <= DRAWN)
    if args.plot is not None and drawn:
        plot(drawn, predictor.spec, args.plot)
        if not args.json:
            print(f'{args.plot}: drew {len(drawn)} of {count} images')
    sys.exit(int(failed))


if __name__ == '__main__':
    run_program(main)
