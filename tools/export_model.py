"""Export trained weights to the formats that other engines run, and show that these give the same answers.

  python -m tools.export_model -cfg configs/mobileone_s0.yaml -pretrained mobileone_s0.pdparams -output exported
  python -m tools.export_model -cfg output/demo/config.yaml -pretrained output/demo/best.pdparams -output exported

-pretrained is a weight file, fused or not, or a training checkpoint (its EMA weights, if it has some). -output becomes
a folder of model.onnx (ONNX Runtime, OpenVINO and others) and of inference.pdmodel, on PaddlePaddle 3 inference.json
too (Paddle Inference), with inference.yml; tools.predict takes it. Each file is loaded again by its engine and compared
with the given network, on random images and on those of the val list, if there is one. docs/deployment.md has more.
"""
import dataclasses
import os
import tempfile

import numpy as np

from config import get_config, get_parser, resolve_config, update_config
from runtime.program import prepare_runtime, run_program
from utils import UserError, setup_logger

# share of the largest output by which an exported network may differ
TOLERANCE = 3e-4


def read_images(config, count=16):
    """{what they are: uint8 [N, size, size, 3]}: random ones, and some of the val list, if there is one."""
    data, rng = config.DATA, np.random.default_rng(config.SEED)
    shape = [count // 2, data.IMAGE_SIZE, data.IMAGE_SIZE, 3]
    # pixels as those of photographs: some networks are chaotic beyond them
    pixels = rng.normal(255 * np.array(data.IMAGENET_MEAN), 255 * np.array(data.IMAGENET_STD), shape)
    images = {'random images': pixels.clip(0, 255).astype('uint8')}
    if os.path.exists(os.path.join(data.DATA_PATH, 'val_list.txt')):
        from datasets import get_dataset
        dataset = get_dataset(config, False)
        chosen = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))
        images['val images'] = np.stack([dataset[int(index)][0] for index in chosen])
    return images


def write(model, spec, folder, formats):
    """Write a fused network to a folder. Returns: the engine and the file of each artefact."""
    written = []
    if 'onnx' in formats:
        import onnx

        from deploy.onnx_graph import build_onnx
        from deploy.predictor import ONNX, find_engine
        proto = build_onnx(model, spec)
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, os.path.join(folder, ONNX))
        written.append((find_engine(folder), ONNX))
    if 'paddle' in formats:
        from deploy.paddle_model import write_paddle
        written += [('inference', name) for name in write_paddle(model, spec, folder)]
    return written


def compare(expected, folder, spec, engine, name, images):
    """Print how far an artefact is from the logits that are expected of images. Raises: UserError if it is too far."""
    from deploy.predictor import Predictor, load_program
    predictor = Predictor(folder, engine=engine)
    if engine == 'inference':
        predictor.run = load_program(os.path.join(folder, name))
    for kind, pixels in images.items():
        logits = expected[kind]
        if spec.softmax:
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            logits = powers / powers.sum(axis=1, keepdims=True)
        difference, largest = np.abs(predictor.outputs(pixels) - logits).max(), np.abs(logits).max()
        print(f'{name:20}{engine:14}{f"{len(pixels)} {kind}":20}{difference:12.3g}{difference / largest:12.3g}')
        if not difference <= TOLERANCE * largest:
            raise UserError(f'{name}: {engine} differs from the network by {difference:.3g} on {kind}, more than '
                            f'{TOLERANCE:g} of the largest output, {largest:.3g}; nothing was exported. '
                            'Check that the weights are finite and trained')


def parse_batch(text):
    if text == 'dynamic':
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"-batch is {text!r}, but must be a number from 1, or 'dynamic'")
    return int(text)


def check_packages(formats):
    """Raises: UserError for packages that a format needs, or its check."""
    from importlib.util import find_spec
    if 'onnx' in formats:
        missing = [name for name in ('onnx',) if not find_spec(name)]
        missing += [] if find_spec('onnxruntime') or find_spec('openvino') else ['onnxruntime']
        if missing:
            raise UserError(f'-format onnx needs {" and ".join(missing)}: pip install -r requirements-deploy.txt, or '
                            'choose -format paddle')


def main():
    parser = get_parser(__doc__, ['data_path', 'image_size', 'pretrained'])
    parser.add_argument('-output', metavar='DIR', required=True, help='folder to make; it must be empty or not there')
    parser.add_argument('-format', nargs='+', choices=['paddle', 'onnx'], default=['paddle', 'onnx'],
                        help='formats to write (default: both)')
    parser.add_argument('-softmax', action='store_true', help='let the network give probabilities, not logits')
    parser.add_argument('-normalize', choices=['uint8', 'unit'], help='let the network normalise its images: it takes '
                        'uint8 pixels, or floats from 0 to 1')
    parser.add_argument('-batch', metavar='N', default='dynamic', help='images at a time, and the image size fixed '
                        '(default: dynamic)')
    parser.add_argument('-raw', action='store_true', help="a checkpoint's raw weights, not its EMA")
    args = parser.parse_args()
    batch = parse_batch(args.batch)
    if not args.pretrained:
        raise UserError('-pretrained is needed: the weights to export')
    config = update_config(get_config(), args)
    config.EVAL, config.MODEL.DEPLOY, config.MODEL.RESUME = True, False, ''
    config = resolve_config(config)
    output = os.path.abspath(args.output)
    if os.path.lexists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise UserError(f'{args.output}: is there and not an empty folder; remove it, or choose another -output')
    check_packages(args.format)
    prepare_runtime()
    import paddle

    from deploy.predictor import Spec, find_class_names
    from mobileone import model_convert
    from transforms import Normalize
    from weights import load_model
    setup_logger()
    model, _ = load_model(config, config.MODEL.PRETRAINED, raw=args.raw)
    model.eval()
    spec = dataclasses.replace(
        Spec.of_config(config, find_class_names(config.MODEL.PRETRAINED, config.MODEL.NUM_CLASSES)),
        pixels=args.normalize or 'normalized', softmax=args.softmax, batch=batch)
    images = read_images(config)
    normalize = Normalize(spec.mean, spec.std)
    with paddle.no_grad():
        expected = {kind: model(normalize(paddle.to_tensor(pixels))).numpy() for kind, pixels in images.items()}
    os.makedirs(os.path.dirname(output), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='export-', dir=os.path.dirname(output)) as parent:
        folder = os.path.join(parent, 'whole')
        os.mkdir(folder)
        artefacts = write(model_convert(model), spec, folder, args.format)
        print(f'{"file":20}{"engine":14}{"compared on":20}{"difference":>12}{"relative":>12}')
        for engine, name in artefacts:
            compare(expected, folder, spec, engine, name, images)
        os.rename(folder, output)
    print(f'exported to {args.output}: {", ".join(sorted(os.listdir(output)))}')


if __name__ == '__main__':
    run_program(main)
