"""Predict the classes of images with trained weights, an exported folder or an ONNX file.

Neither importing this module nor predicting with an ONNX file imports Paddle.
"""
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import threading
from typing import NamedTuple, Optional

import numpy as np
import yaml
from PIL import Image

from images import convert, read_image
from runtime.files import CLASS_NAMES, check_regular, read_names
from transforms import EvalTransform
from utils import UserError, describe_error, one_line

# engine -> the package it needs, and the command that installs it
ENGINES = {
    'paddle': ('paddle', 'pip install paddlepaddle==3.3.1'),
    'inference': ('paddle', 'pip install paddlepaddle==3.3.1'),
    'onnxruntime': ('onnxruntime', 'pip install onnxruntime'),
    'openvino': ('openvino', 'pip install openvino'),
}
WEIGHTS = ('.pdparams', '.safetensors')
ONNX = 'model.onnx'
ONNX_ENGINES = ('onnxruntime', 'openvino')  # in order of preference
# programs of Paddle Inference, fastest first
PROGRAMS = ('inference.pdmodel', 'inference.json')
PARAMS, CARD = 'inference.pdiparams', 'inference.yml'
# images per call, unless an export fixes the number
BATCH = 32
MOST_THREADS = 1024


@dataclasses.dataclass(frozen=True)
class Spec:
    """A network's input and output: preprocessing and class names."""
    name: str
    image_size: int
    crop_pct: float
    interpolation: str
    mean: tuple
    std: tuple
    exif_transpose: bool
    bit_depth: int
    class_names: tuple
    # input: 'normalized' floats, 'uint8' pixels, or floats from 0 to 1 ('unit')
    pixels: str = 'normalized'
    # whether the output is probabilities rather than logits
    softmax: bool = False
    # fixed number of images per call; None: any number
    batch: Optional[int] = None

    @classmethod
    def of_config(cls, config, class_names):
        """Return the Spec of a config's network."""
        data = config.DATA
        return cls(config.MODEL.NAME, data.IMAGE_SIZE, data.CROP_PCT, data.INTERPOLATION.lower(),
                   tuple(data.IMAGENET_MEAN), tuple(data.IMAGENET_STD), data.EXIF_TRANSPOSE, data.BIT_DEPTH,
                   tuple(class_names))

    def to_metadata(self):
        """Return {name: JSON}, as stored in ONNX files and exported folders."""
        return {name: json.dumps(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def of_metadata(cls, metadata, path):
        """Return the Spec stored in a model's metadata.

        Raises: UserError if the metadata was not written by tools.export_model.
        """
        try:
            values = {field.name: json.loads(metadata[field.name]) for field in dataclasses.fields(cls)}
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'{path}: its metadata does not describe the preprocessing ({describe_error(error, 80)}): '
                            'export it with python -m tools.export_model') from None

    @property
    def transform(self):
        """The evaluation transform, from an image to the uint8 pixels that `to_input` takes."""
        return EvalTransform(self.image_size, self.crop_pct, self.interpolation)

    def shift_and_scale(self):
        """Return (shift, scale), float32 [3, 1, 1], with (pixel - shift) * scale as in `transforms.Normalize`."""
        mean, std = (np.array(values, 'float32').reshape(-1, 1, 1) for values in (self.mean, self.std))
        largest = np.float32(1 if self.pixels == 'unit' else 255)
        return largest * mean, 1 / (largest * std)

    def to_input(self, pixels):
        """Convert uint8 [N, H, W, 3] to the network's input [N, 3, H, W], in the form of `pixels`."""
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        if self.pixels == 'uint8':
            return pixels
        if self.pixels == 'unit':
            return pixels.astype('float32') / np.float32(255)
        shift, scale = self.shift_and_scale()
        return (pixels.astype('float32') - shift) * scale


class Prediction(NamedTuple):
    """The most probable classes of an image, in descending order."""
    ids: list
    names: list
    probabilities: list


class Predictor:
    """Predict the classes of images.

    path: this project's weights (.pdparams or .safetensors, fused or not), an .onnx file, or a folder written by
        tools.export_model.
    config: the config of the weights; None: the config.yaml next to them. Exports need none.
    engine: one of ENGINES; 'auto': the fastest installed engine that can run the file.
    threads: CPU threads of the engine; None: the engine's default.
    Threads can share a Predictor; their calls run one at a time.
    Raises: UserError for a file that no engine can run, a missing engine, weights without a config or that do not fit
        theirs, and class names of another number.
    """

    def __init__(self, path, config=None, engine='auto', threads=None):
        if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
            raise UserError(f'threads is {threads!r}, but must be a whole number from 1 to {MOST_THREADS}, or None')
        self.lock = threading.Lock()
        self.path = os.fspath(path)
        self.engine = find_engine(self.path, engine)
        try:
            self.spec, self.run = LOADERS[self.engine](self.path, config, threads)
        except ImportError as error:
            raise UserError(f'{self.path}: the engine {self.engine} cannot be imported ({describe_error(error)}); '
                            f'install it again: {ENGINES[self.engine][1]}') from None
        self.transform = self.spec.transform

    def __call__(self, images, top=5):
        """Return a list with one Prediction per image: its `top` most probable classes.

        images: a list of paths, Pillow images and uint8 arrays [H, W, 3], or a single one.
        Raises: UserError for a file that cannot be read, anything that is not an image, a `top` below 1, and outputs
            that are not finite.
        """
        if type(top) is not int or top < 1:
            raise UserError(f'top is {top!r}, but must be a whole number from 1')
        if not isinstance(images, (list, tuple)):
            images = [images]
        predictions = []
        for start in range(0, len(images), BATCH):
            pixels = np.stack([self.pixels(image) for image in images[start:start + BATCH]])
            predictions += [self._prediction(row, top) for row in self.probabilities(pixels)]
        return predictions

    def pixels(self, image):
        """Return an image as uint8 [size, size, 3], preprocessed as in evaluation."""
        spec = self.spec
        if isinstance(image, (str, os.PathLike)):
            return self.transform(read_image(image, spec.exif_transpose, spec.bit_depth))
        if isinstance(image, np.ndarray) and image.dtype == 'uint8' and image.shape[2:] == (3,) and image.size:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image) or min(image.size) < 1:
            kind = f'{image.dtype} {list(image.shape)}' if isinstance(image, np.ndarray) else type(image).__name__
            raise UserError(f'an image is {kind}, but must be a path, a Pillow image or a uint8 array [H, W, 3]')
        try:
            return self.transform(convert(image, spec.exif_transpose, spec.bit_depth))
        except (ValueError, OSError) as error:
            raise UserError(f'an image cannot be read ({one_line(str(error))})') from None

    def outputs(self, pixels):
        """Map uint8 [N, size, size, 3] to float32 [N, classes]: logits, or probabilities with spec.softmax.

        Raises: UserError if an output is not finite.
        """
        with self.lock:  # Paddle Inference and OpenVINO serve one thread at a time
            outputs = run_batches(self.run, self.spec, pixels)
        if not np.isfinite(outputs).all():
            raise UserError(f'{self.path}: the outputs are not finite; its weights are broken')
        return outputs

    def probabilities(self, pixels):
        """Map uint8 [N, size, size, 3] to probabilities, float [N, classes]."""
        outputs = self.outputs(pixels)
        return outputs if self.spec.softmax else softmax(outputs)

    def _prediction(self, probabilities, top):
        ids = np.argsort(-probabilities, kind='stable')[:top].tolist()
        names = [self.spec.class_names[number] if self.spec.class_names else str(number) for number in ids]
        return Prediction(ids, names, probabilities[ids].tolist())


def softmax(logits):
    """Return the probabilities, float64 [N, classes], of logits [N, classes]."""
    powers = np.exp(logits.astype('float64') - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def run_batches(run, spec, pixels):
    """Return the outputs [N, classes] of an engine's run(input) for uint8 pixels [N, size, size, 3].

    It gets spec.batch images at a time, with the last batch padded, or up to BATCH if spec.batch is None.
    """
    size, rows = spec.batch or BATCH, []
    for start in range(0, len(pixels), size):
        images = pixels[start:start + size]
        missing = np.zeros([(spec.batch or len(images)) - len(images), *images.shape[1:]], 'uint8')
        rows.append(run(spec.to_input(np.concatenate([images, missing])))[:len(images)])
    return np.concatenate(rows)


def find_class_names(path, num_classes):
    """Return the names in the class_names.txt next to the weights.

    Without that file, returns ImageNet's names for 1000 classes, and () for any other number.

    Raises: UserError if the file does not have one name per class, and as `read_names`.
    """
    names = os.path.join(os.path.dirname(path), CLASS_NAMES)
    if not os.path.lexists(names):
        if num_classes != 1000:
            return ()
        names = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs',
                             'imagenet_classes.txt')
    found = read_names(names)
    if len(found) != num_classes:
        raise UserError(f'{names}: {len(found)} lines, but the network has {num_classes} classes: write one name per '
                        'class')
    return found


def find_engine(path, engine='auto'):
    """Return the name of the engine that will run the model at a path. Raises: as `Predictor`."""
    if engine not in ('auto', *ENGINES):
        raise UserError(f'engine is {engine!r}, but must be one of auto, {", ".join(ENGINES)}')
    if not os.path.exists(path):
        raise UserError(f'{path}: no such file; give weights, an .onnx file or a folder written by tools.export_model')
    files = os.listdir(path) if os.path.isdir(path) else [os.path.basename(path)]
    if not os.path.isdir(path):
        check_regular(path)
    able = [*ONNX_ENGINES] * any(file.lower().endswith('.onnx') for file in files)
    able += ['inference'] * (os.path.isdir(path) and bool(set(PROGRAMS) & set(files)))
    able += ['paddle'] * (not os.path.isdir(path) and files[0].endswith(WEIGHTS))
    if not able:
        raise UserError(f'{path}: neither weights ({", ".join(WEIGHTS)}), nor an .onnx file, nor an export with {ONNX} '
                        f'or {PROGRAMS[0]}; give the best.pdparams of a run, or export again with -format onnx')
    if engine == 'auto':
        engine = next((name for name in able if importlib.util.find_spec(ENGINES[name][0])), able[0])
    if engine not in able:
        raise UserError(f'{path}: can be run by {" or ".join(able)}, not by {engine}; export it with python -m '
                        'tools.export_model')
    if not importlib.util.find_spec(ENGINES[engine][0]):
        raise UserError(f'{path}: the engine {engine} is not installed: {ENGINES[engine][1]}')
    return engine


def _load_paddle(path, config, threads, fused=True):
    """Load weights into PaddlePaddle, on the current device."""
    from config import get_config, resolve_config, with_values
    if config is None:
        saved = os.path.join(os.path.dirname(path), 'config.yaml')
        if not os.path.exists(saved):
            raise UserError(f'{path}: weights need the config of their network, but {saved} does not exist: give -cfg')
        config = get_config(saved)
    config = resolve_config(with_values(config, {'EVAL': True, 'MODEL.DEPLOY': fused, 'MODEL.PRETRAINED': path,
                                                 'MODEL.RESUME': ''}))
    if threads and 'paddle' not in sys.modules:
        os.environ['OMP_NUM_THREADS'] = str(threads)
    import paddle

    from weights import load_model, with_classes_of
    config = with_classes_of(config, path)
    if threads:
        paddle.base.core.set_num_threads(threads)
    state = paddle.get_rng_state()
    model, _ = load_model(config, path)
    paddle.set_rng_state(state)  # building the network drew random weights
    model.eval()

    def run(images):
        with paddle.no_grad():
            return model(paddle.to_tensor(images)).numpy()
    return Spec.of_config(config, find_class_names(path, config.MODEL.NUM_CLASSES)), run


def _load_inference(path, config, threads):
    """Load a folder into Paddle Inference.

    On a CPU it uses the OpenVINO in PaddlePaddle 3's wheel if possible, which reads only .pdmodel files.
    """
    program = next(os.path.join(path, name) for name in PROGRAMS if os.path.exists(os.path.join(path, name)))
    card = os.path.join(path, CARD)
    try:
        with open(card, encoding='utf-8') as file:
            spec = Spec.of_metadata(yaml.safe_load(file)['MobileOne'], card)
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f'{card}: cannot be read ({describe_error(error, 80)}): export again') from None
    return spec, load_program(program, threads)


def load_program(program, threads=None, bfloat16=False, engine='openvino'):
    """Return run(images) for a program of Paddle Inference: on its OpenVINO engine if it has one, else on oneDNN.

    Raises: UserError for a program that cannot be read.
    """
    from paddle import __version__, device, inference
    params = os.path.join(os.path.dirname(program), PARAMS)
    if not os.path.isfile(params):  # PaddlePaddle 3.3.1 would run with arbitrary weights
        raise UserError(f'{params}: no such file, but {os.path.basename(program)} needs it: export again')
    if program.endswith('.json') and __version__.startswith('2.'):  # it would crash
        raise UserError(f'{program}: PaddlePaddle {__version__} cannot read it: export again with this PaddlePaddle')
    config = inference.Config(program, params)
    config.disable_glog_info()
    if threads:
        config.set_cpu_math_library_num_threads(threads)
    if device.get_device().startswith('gpu'):
        # initial memory pool in MB, and the current GPU; not measured
        config.enable_use_gpu(256, int(device.get_device().partition(':')[2] or 0))
    elif engine == 'openvino' and program.endswith('.pdmodel') and hasattr(config, 'enable_openvino_engine'):
        config.enable_openvino_engine(inference.PrecisionType.Bfloat16 if bfloat16 else
                                      inference.PrecisionType.Float32)
    else:
        config.enable_mkldnn()
    with tempfile.TemporaryDirectory() as cache:  # OpenVINO's cache, otherwise __cache__ in the current folder
        config.set_optim_cache_dir(cache)
        try:
            predictor = inference.create_predictor(config)
        except Exception as error:  # Paddle raises many types
            raise UserError(f'{program}: Paddle Inference cannot read it, or {PARAMS} ({describe_error(error, 100)}): '
                            'export again') from None
    source, = map(predictor.get_input_handle, predictor.get_input_names())
    target, = map(predictor.get_output_handle, predictor.get_output_names())

    def run(images):
        source.copy_from_cpu(images)
        predictor.run()
        return target.copy_to_cpu()
    return run


def _onnx_file(path):
    return os.path.join(path, ONNX) if os.path.isdir(path) else path


def _load_onnxruntime(path, config, threads):
    import onnxruntime
    path = _onnx_file(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    try:
        # the CUDA provider comes with onnxruntime-gpu; not measured
        providers = [name for name in ('CUDAExecutionProvider', 'CPUExecutionProvider')
                     if name in onnxruntime.get_available_providers()]
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own exception types
        raise UserError(f'{path}: ONNX Runtime cannot read it ({describe_error(error)}): export again') from None
    return (Spec.of_metadata(session.get_modelmeta().custom_metadata_map, path),
            lambda images: session.run(None, {'image': images})[0])


def _load_openvino(path, config, threads, precision='f32'):
    import openvino
    path = _onnx_file(path)
    options = {'INFERENCE_PRECISION_HINT': precision, 'PERFORMANCE_HINT': 'LATENCY'}
    try:
        core = openvino.Core()
        model = core.read_model(path)
        request = core.compile_model(model, 'CPU', {
            **options, **({'INFERENCE_NUM_THREADS': threads} if threads else {})}).create_infer_request()
    except RuntimeError as error:
        raise UserError(f'{path}: OpenVINO cannot read it ({describe_error(error)}): export again') from None
    names = [field.name for field in dataclasses.fields(Spec) if model.has_rt_info(['framework', field.name])]
    metadata = {name: model.get_rt_info(['framework', name]).value for name in names}
    return Spec.of_metadata(metadata, path), lambda images: next(iter(request.infer({'image': images}).values())).copy()


# engine -> function of (path, config, threads) that returns (Spec, run(images)); extra arguments serve tools.benchmark
LOADERS = {'paddle': _load_paddle, 'inference': _load_inference, 'onnxruntime': _load_onnxruntime,
           'openvino': _load_openvino}
