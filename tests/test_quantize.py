"""Int8 exports: rescaling preserves outputs; int8 preserves predictions even if channels differ in scale."""
import dataclasses
import gzip
import os
import resource
import sys

import numpy as np
import onnx
import paddle
import pytest
from conftest import ROOT, fails, run, variant_config
from test_mobileone import randomize

import deploy.quantize as int8
import tools.export_model as export_model
from config import get_config
from deploy.onnx_graph import build_onnx
from deploy.predictor import Predictor, Spec
from deploy.quantize import compare_outputs, find_outputs, quantize
from mobileone import build_mobileone, model_convert
from runtime import checkpoint
from tools.export_model import read_calibration
from transforms import Normalize
from utils import UserError

SIZE, NAMES = 28, [f'class {number}' for number in range(10)]


def demo_images(split, count):
    """Return images, uint8 [count, 28, 28, 3], and labels, int64 [count], of the demo set."""
    def read(kind, start, shape):
        with gzip.open(ROOT / f'demo/{split}-{kind}-ubyte.gz') as file:
            return np.frombuffer(file.read()[start:], 'uint8')[:int(np.prod(shape))].reshape(shape)
    return (np.repeat(read('images-idx3', 16, [count, SIZE, SIZE])[..., None], 3, axis=3),
            read('labels-idx1', 8, [count]).astype('int64'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a run trained for a few seconds, the fused network, which has SE, and its Spec."""
    folder = tmp_path_factory.mktemp('trained')
    config = get_config(str(ROOT / 'configs/demo.yaml'))
    config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT = SIZE, 1.0
    config.MODEL.NUM_BLOCKS, config.MODEL.CHANNELS, config.MODEL.USE_SE = [1, 1, 1, 2, 1], [8, 16, 16, 32, 64], True
    (folder / 'config.yaml').write_text(config.dump())
    (folder / 'class_names.txt').write_text('\n'.join(NAMES))
    paddle.seed(3)
    model, spec = build_mobileone(config), Spec.of_config(config, NAMES)
    pixels, labels = demo_images('train', 5000)
    normalize = Normalize(spec.mean, spec.std)
    optimizer = paddle.optimizer.AdamW(3e-3, parameters=model.parameters())
    for step in range(300):  # enough that rounding changes few predictions
        start = 32 * step % 4992
        batch = slice(start, start + 32)
        optimizer.set_lr(3e-3 * (1 - step / 300))
        logits = model(normalize(paddle.to_tensor(pixels[batch])))
        paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(labels[batch])).backward()
        optimizer.step()
        optimizer.clear_grad()
    model.eval()
    checkpoint.save(model.state_dict(), str(folder / 'best.pdparams'))
    return folder, model_convert(model), spec


def rescaled(model):
    """Return an equivalent network with channels ten times larger or smaller."""
    rng = np.random.default_rng(0)
    model = model_convert(model)
    for link in int8.find_links(model):
        int8.divide_activation(link, 10 ** rng.choice([-1.0, 1.0], len(link[0].bias)))
    return model


def logits_of(model, spec, pixels):
    with paddle.no_grad():
        return model(Normalize(spec.mean, spec.std)(paddle.to_tensor(pixels))).numpy()


def float_file(model, spec, folder):
    path = str(folder / 'model.onnx')
    onnx.save(build_onnx(model, spec), path)
    return path


@pytest.mark.parametrize('use_se', [False, True])
def test_equalization_keeps_the_outputs(use_se):
    """Tests narrow versions of S0 and S4."""
    config = variant_config('s4' if use_se else 's0')
    config.MODEL.CHANNELS, config.MODEL.EXPANSIONS, config.DATA.IMAGE_SIZE = [8, 8, 16, 32, 32], [1.0] * 5, 64
    model, spec = build_mobileone(config), Spec.of_config(config, [])
    randomize(model)
    fused = rescaled(model_convert(model))
    pixels = np.random.default_rng(1).integers(0, 256, [8, 64, 64, 3], 'uint8')
    expected = logits_of(fused, spec, pixels)
    largest = int8.find_largest(fused, spec, pixels)
    assert len(largest) == len(int8.find_links(fused)) == 1 + 2 * sum(config.MODEL.NUM_BLOCKS[1:])
    for network in (int8.equalize_weights(fused), int8.equalize_activations(fused, largest)):
        assert compare_outputs(logits_of(network, spec, pixels), expected)[1] >= 90
        before, after = (network.state_dict() for network in (fused, network))
        assert any(np.abs(before[name].numpy() / after[name].numpy()).max() > 2 for name in before)
    for (_, _, user), found in zip(int8.find_links(network), int8.find_largest(network, spec, pixels)):
        if user is not network.fc and user._groups > 1:
            assert found == pytest.approx(np.where(found == 0, 0, 1), rel=1e-3)


def test_quantize_handles_channels_of_different_scale(trained, tmp_path):
    _, model, spec = trained
    pixels, _ = demo_images('t10k', 1000)
    shares = []
    for network in (model, rescaled(model)):
        scores, best, held_out, expected = quantize(network, spec, pixels, float_file(network, spec, tmp_path))
        shares.append({way: share for way, (share, _) in scores.items()})
        assert len(held_out) == 250 and os.listdir(tmp_path) == ['model.onnx']
        assert scores[best][1] == max(decibels for _, decibels in scores.values()) and shares[-1][best] >= 0.95
        for engine in ('onnxruntime', 'openvino'):
            outputs = find_outputs(str(tmp_path / 'model.onnx'), engine, spec, held_out)
            assert compare_outputs(outputs, expected)[0] >= 0.95
    assert shares[0]['plain'] > shares[1]['plain'] + 0.05 and shares[1]['plain'] < 0.9


@pytest.fixture(scope='module')
def exported(trained, fashion, tmp_path_factory):
    """The int8 export, calibrated on a folder of class folders, and the lines that the export prints."""
    output = tmp_path_factory.mktemp('exported') / 'int8'
    process = run(*export_command(trained, output), '-calibration', fashion / 'val', '-num_images', '64')
    assert process.stderr == ''
    return output, process.stdout.splitlines()


def export_command(trained, output):
    return ['-m', 'tools.export_model', '-cfg', trained[0] / 'config.yaml', '-pretrained', trained[0] / 'best.pdparams',
            '-output', output, '-precision', 'int8']


def test_int8_export(exported, trained, tmp_path):
    output, lines = exported
    assert os.listdir(output) == ['model.onnx']
    start = next(number for number, line in enumerate(lines) if line.startswith('int8 from 48 images; 16 held out:'))
    assert [line[:34].split() for line in lines[start + 1:]] == [
        ['plain'], ['weights', 'equalized'], ['activations', 'equalized'], ['model.onnx', 'onnxruntime'],
        ['model.onnx', 'openvino'], f'exported to {output}: model.onnx'[:34].split()]
    assert sum(line.endswith('(kept)') for line in lines) == 1
    proto, other = onnx.load(output / 'model.onnx'), build_onnx(*trained[1:])
    onnx.checker.check_model(proto, full_check=True)
    assert proto.graph.input == other.graph.input and proto.graph.output == other.graph.output
    assert list(proto.metadata_props) == list(other.metadata_props)
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert {kind for name, kind in kinds.items() if 'weight_quantized' in name} == {onnx.TensorProto.INT8}
    scales = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer if tensor.name.endswith('_scale')}
    assert scales['stages.1.0.pw_1x1.weight_scale'] == [16] and scales['fc.weight_scale'] == [10]


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_int8_predictions_match_float32(engine, exported, trained, fashion):
    paths = sorted(fashion.glob('val/*/*.png'))[::10]
    found = Predictor(exported[0], engine=engine)(paths)
    expected = Predictor(trained[0] / 'best.pdparams')(paths)
    same = np.mean([one.ids[0] == other.ids[0] for one, other in zip(found, expected)])
    assert len(paths) >= 100 and same >= 0.95
    process = run('-m', 'tools.predict', paths[0], '-model', exported[0], '-engine', engine, '-top', '1')
    assert found[0].names[0] in process.stdout


@pytest.mark.parametrize('options', [{'pixels': 'uint8', 'batch': 3}, {'pixels': 'unit', 'softmax': True}])
def test_quantize_with_other_inputs_and_outputs(options, trained, tmp_path):
    _, model, spec = trained
    spec = dataclasses.replace(spec, **options)
    pixels, _ = demo_images('t10k', 100)
    path = float_file(model, spec, tmp_path)
    inputs = onnx.load(path).graph.input
    _, _, held_out, expected = quantize(model, spec, pixels, path)
    assert onnx.load(path).graph.input == inputs
    for engine in ('onnxruntime', 'openvino'):
        share, decibels = compare_outputs(find_outputs(path, engine, spec, held_out), expected)
        assert share >= 0.9 and decibels > 15


def test_calibration_images(trained, fashion, tmp_path):
    spec = trained[2]
    pixels = read_calibration(str(fashion / 'val_list.txt'), 10, spec, 10)
    names = [line.rsplit(' ', 1)[0] for line in (fashion / 'val_list.txt').read_text().splitlines()]
    assert len(pixels) == 10
    for count in (256, 10 ** 20):
        assert len(read_calibration(str(fashion / 'val_list.txt'), count, spec, 10)) == len(names)
    predictor = Predictor(trained[0] / 'best.pdparams')
    for index, name in ((0, names[0]), (1, names[3]), (-1, names[-1])):
        assert pixels[index].tobytes() == predictor.pixels(fashion / name).tobytes()
    for name in ('linked', '.hidden'):
        (tmp_path / name).symlink_to(fashion / 'val/Bag')
    names = sorted((fashion / 'val/Bag').iterdir())
    pixels = read_calibration(str(tmp_path), 10 ** 9, spec, 10)
    assert len(pixels) == len(names) and pixels[1].tobytes() == predictor.pixels(names[1]).tobytes()


def test_int8_errors(trained, fashion, tmp_path):
    output = tmp_path / 'x'
    command = export_command(trained, output)
    assert '-precision int8 needs -calibration: a list or a folder' in fails(*command)
    for flag, value in (('-calibration', fashion / 'val'), ('-num_images', '64')):
        assert f'{flag} works only with -precision int8' in fails(*command[:-2], flag, value)
    command.append('-calibration')
    for formats in (['paddle'], ['onnx', 'ncnn']):
        message = fails(*command, fashion / 'val', '-format', *formats)
        assert f'works only with -format onnx, not {" ".join(formats)}' in message
    assert '-num_images is 7, but must be at least 8' in fails(*command, fashion / 'val', '-num_images', '7')
    assert 'no/list.txt: no such list or folder' in fails(*command, 'no/list.txt')
    (tmp_path / 'empty').mkdir()
    assert f'{tmp_path}/empty: 0 images, but int8 needs at least 8' in fails(*command, tmp_path / 'empty')
    lines = (fashion / 'val_list.txt').read_text().splitlines()
    few = tmp_path / 'few.txt'
    few.write_text('\n'.join(lines[:7]))
    assert 'few.txt: 7 images, but int8 needs at least 8' in fails(*command, few)
    few.write_text('\n'.join(8 * ['image.png 0']))
    assert f'image, {tmp_path}/image.png, does not exist; the paths of a list are rel' in fails(*command, few)
    few.write_text(f'{fashion}/{lines[0]}\n' + '\n'.join(8 * ['image.png 0']))
    assert f'{tmp_path}/image.png: cannot read the image' in fails(*command, few)
    few.write_text('\n'.join(8 * ['image.png']))
    assert "few.txt:1: 'image.png' is not \"path label\"" in fails(*command, few)
    assert 'model.onnx' not in run(*command, few, status=2).stdout, 'found only after files were written'
    assert sorted(os.listdir(tmp_path)) == ['empty', 'few.txt']


def test_full_disk_while_quantizing(trained, tmp_path, monkeypatch):
    """The shape inference of onnx does not report it. The file that it writes is longer than the file that it reads."""
    _, model, spec = trained
    path, pixels = float_file(model, spec, tmp_path), demo_images('t10k', 16)[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 500, limits[1]))
    try:
        with pytest.raises(OSError, match='No space left on device'):
            int8.write_int8(model, spec, pixels, str(tmp_path / 'int8.onnx'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ['model.onnx']


def test_package_that_cannot_be_imported(trained, fashion, tmp_path):
    (tmp_path / 'onnxruntime.py').write_text('raise ImportError("libcudart.so: no such file")')
    message = fails(*export_command(trained, tmp_path / 'x'), '-calibration', fashion / 'val',
                    env={'PYTHONPATH': str(tmp_path)})
    assert 'a package cannot be imported (ImportError: libcudart.so: no such file): install it again' in message
    assert os.listdir(tmp_path) == ['onnxruntime.py']


def test_int8_with_different_predictions_is_discarded(trained, fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(export_model, 'prepare_runtime', lambda: None)  # not in the process of the tests
    monkeypatch.setattr(export_model, 'MIN_AGREEMENT', 1.01)
    monkeypatch.setattr(sys, 'argv', [*map(str, export_command(trained, tmp_path / 'x')[1:]), '-calibration',
                                      str(fashion / 'val'), '-num_images', '8'])
    with pytest.raises(UserError, match="onnxruntime keeps the network's top-1 prediction .* of 2 held-out images"):
        export_model.main()
    assert os.listdir(tmp_path) == []
