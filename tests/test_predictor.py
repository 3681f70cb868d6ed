"""Predictions and exports: every engine, the exported files, and the command-line programs."""
import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import os
import sys

import numpy as np
import onnx
import paddle
import pytest
from conftest import ROOT, fails, run, variant_config, write_images
from PIL import Image
from test_mobileone import randomize

import tools.export_model as export_model
from datasets import get_dataset
from deploy.onnx_graph import build_onnx
from deploy.paddle_model import describe, with_batch_norms
from deploy.predictor import Predictor, Spec, find_class_names
from mobileone import build_mobileone, model_convert
from runtime import checkpoint
from transforms import Normalize
from utils import UserError

NAMES = [f'class {number}, $"ä"' for number in range(10)]
ENGINES = ['paddle', 'inference', 'onnxruntime', 'openvino']


@pytest.fixture(scope='module')
def trained(fashion, tmp_path_factory):
    """The folder of a finished run (config.yaml, best.pdparams, class_names.txt), its network and its config."""
    from config import get_config
    folder = tmp_path_factory.mktemp('trained')
    config = get_config(str(ROOT / 'configs/demo.yaml'))
    config.DATA.DATA_PATH, config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT = str(fashion), 48, 0.9
    config.MODEL.NUM_BLOCKS, config.MODEL.CHANNELS, config.MODEL.USE_SE = [1, 1, 1, 2, 1], [4, 4, 8, 8, 8], True
    (folder / 'config.yaml').write_text(config.dump())
    (folder / 'class_names.txt').write_text(''.join(f'{name}\n' for name in NAMES))
    paddle.seed(3)
    model = build_mobileone(config)
    randomize(model)
    model.eval()
    checkpoint.save(model.state_dict(), str(folder / 'best.pdparams'))
    return folder, model, config


def export(trained, output, *args, **kwargs):
    folder, _, _ = trained
    return run('-m', 'tools.export_model', '-cfg', folder / 'config.yaml', '-pretrained', folder / 'best.pdparams',
               '-output', output, *args, **kwargs)


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    output = tmp_path_factory.mktemp('exported') / 'model'
    out = export(trained, output).stdout
    programs = 1 if paddle.__version__.startswith('2.') else 2
    # each file and engine, on random and on real images
    assert len([line for line in out.splitlines() if line.endswith(('e-07', 'e-06'))]) == 2 * (2 + programs)
    assert set(os.listdir(output)) == {'model.onnx', 'inference.pdmodel', 'inference.pdiparams', 'inference.yml',
                                       *['inference.json'] * (programs - 1)}
    assert not (ROOT / '__cache__').exists()  # the cache of OpenVINO in PaddlePaddle
    return output


def model_path(engine, trained, exported):
    return {'paddle': trained[0] / 'best.pdparams', 'onnxruntime': exported / 'model.onnx'}.get(engine, exported)


@pytest.mark.parametrize('engine', ENGINES)
def test_predictions_match_evaluation(engine, trained, exported):
    folder, model, config = trained
    predictor = Predictor(model_path(engine, trained, exported), engine=engine, threads=1)
    dataset = get_dataset(config, False)
    pixels = np.stack([dataset[index][0] for index in range(35)])
    normalized = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)(paddle.to_tensor(pixels))
    assert predictor.spec.to_input(pixels).tobytes() == normalized.numpy().tobytes()
    with paddle.no_grad():
        probabilities = paddle.nn.functional.softmax(model(normalized)).numpy()
    paths = [dataset.name_of(index) for index in range(35)]
    assert np.stack([predictor.pixels(path) for path in paths]).tobytes() == pixels.tobytes()
    predictions = predictor(paths, top=3)
    for prediction, row in zip(predictions, probabilities):
        assert prediction.probabilities == pytest.approx(np.sort(row)[::-1][:3], abs=1e-5)
        assert prediction.names == [NAMES[number] for number in prediction.ids]
        assert row[prediction.ids] == pytest.approx(prediction.probabilities, abs=1e-5)
    image = Image.open(paths[0])
    for other in (image, np.asarray(image.convert('RGB')), [image], paths[:1]):
        again, = predictor(other, 3)
        assert again.names == predictions[0].names
        assert again.probabilities == pytest.approx(predictions[0].probabilities, abs=1e-6)  # other batch size


def test_invalid_images_and_arguments_are_refused(trained):
    predictor = Predictor(trained[0] / 'best.pdparams')
    for image, kind in ((np.zeros([4, 4, 3]), r'float64 \[4, 4, 3\]'), (np.zeros([4, 4], 'uint8'), r'uint8 \[4, 4\]'),
                        (3, 'int')):
        with pytest.raises(UserError, match=f'an image is {kind}, but must be a path, a Pillow image or a uint8 array'):
            predictor([image])
    for image in (np.zeros([0, 4, 3], 'uint8'), Image.new('RGB', (0, 5))):
        with pytest.raises(UserError, match='an image is .*, but must be'):
            predictor([image])
    with pytest.raises(UserError, match='top is 0, but must be a whole number from 1'):
        predictor(np.zeros([4, 4, 3], 'uint8'), top=0)
    with pytest.raises(UserError, match='threads is 100000, but must be a whole number from 1 to 1024'):
        Predictor(trained[0] / 'best.pdparams', threads=100000)
    with pytest.raises(UserError, match='range is unknown'):
        predictor(Image.fromarray(np.zeros([4, 4], 'float32')))
    with pytest.raises(UserError, match='^missing.jpg: '):
        predictor('missing.jpg')


@pytest.mark.parametrize('engine', ENGINES)
def test_threads_can_share_a_predictor(engine, trained, exported):
    predictor = Predictor(model_path(engine, trained, exported), engine=engine, threads=1)
    images = list(np.random.default_rng(0).integers(0, 256, [8, 60, 50, 3], 'uint8'))
    expected = [predictor(image) for image in images]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(predictor, images)) == expected


def test_loading_keeps_the_random_state(trained):
    paddle.seed(1)
    expected = paddle.rand([3]).numpy()
    paddle.seed(1)
    Predictor(trained[0] / 'best.pdparams')
    assert (paddle.rand([3]).numpy() == expected).all()


def test_nonfinite_weights_are_refused(trained, tmp_path):
    folder, model, config = trained
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    weights['fc.bias'] = weights['fc.bias'] * np.float32('nan')
    checkpoint.save(weights, str(tmp_path / 'nan.pdparams'))
    with pytest.raises(UserError, match='nan.pdparams: the outputs are not finite; its weights are broken'):
        Predictor(tmp_path / 'nan.pdparams', config)(np.zeros([4, 4, 3], 'uint8'))
    command = ['-m', 'tools.export_model', '-cfg', folder / 'config.yaml', '-output', tmp_path / 'x']
    assert 'the outputs are not finite' in fails(*command, '-pretrained', tmp_path / 'nan.pdparams')
    assert os.listdir(tmp_path) == ['nan.pdparams']


def test_onnx_files_need_no_paddle(exported, fashion):
    code = f"""
import sys
sys.modules['paddle'] = None  # its import raises
from deploy.predictor import Predictor
import tools.predict
for engine in ('auto', 'onnxruntime', 'openvino'):
    print(Predictor({str(exported / 'model.onnx')!r}, engine=engine)(sys.argv[1])[0].names[0])
"""
    image = next(fashion.glob('val/*/*.png'))
    names = run('-c', code, image, fork=False).stdout.splitlines()
    assert len(names) == 3 and set(names) <= set(NAMES) and len(set(names)) == 1


@pytest.mark.parametrize('args', [['-softmax', '-batch', '3'], ['-normalize', 'uint8'],
                                  ['-normalize', 'unit', '-softmax', '-image_size', '32', '-batch', '1']])
def test_export_options(args, trained, fashion, tmp_path):
    export(trained, tmp_path / 'x', *args)
    paths = sorted(fashion.glob('val/*/*.png'))[:4]
    expected = Predictor(trained[0] / 'best.pdparams', with_size(trained, args))(paths)
    proto = onnx.load(tmp_path / 'x/model.onnx')
    shape = [dim.dim_value or dim.dim_param for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    assert shape == {'3': [3, 3, 48, 48], 'uint8': ['batch', 3, 'height', 'width'], '1': [1, 3, 32, 32]}[args[-1]]
    assert proto.graph.output[0].name == ('probabilities' if '-softmax' in args else 'logits')
    for engine in ENGINES[1:]:
        for prediction, other in zip(Predictor(tmp_path / 'x', engine=engine)(paths), expected):
            assert prediction.ids == other.ids
            assert prediction.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_raw_and_ema_weights(trained, fashion, tmp_path):
    folder, model, config = trained
    ema = {name: value.numpy() * (1 if '.norm.' in name else 1.5) for name, value in model.state_dict().items()}
    path = str(tmp_path / 'checkpoint.pdparams')
    checkpoint.save({'model': model.state_dict(), 'model_ema': ema}, path)
    image = next(fashion.glob('val/*/*.png'))
    answers = []
    for name, args in (('ema', []), ('raw', ['-raw'])):
        run('-m', 'tools.export_model', '-cfg', folder / 'config.yaml', '-pretrained', path, '-output', tmp_path / name,
            '-format', 'onnx', *args)
        answers += Predictor(tmp_path / name)(image)[0].probabilities[:1]
    raw = Predictor(folder / 'best.pdparams')(image)[0].probabilities[0]
    assert answers[1] == pytest.approx(raw, abs=1e-5) and abs(answers[0] - raw) > 1e-3


def with_size(trained, args):
    config = trained[2].clone()
    config.DATA.IMAGE_SIZE = 32 if '-image_size' in args else 48
    return config


@pytest.mark.parametrize('pixels, mean, std, scale', [
    ('normalized', [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 1 / 255), ('uint8', [0] * 3, [1] * 3, 1),
    ('unit', [0] * 3, [1] * 3, 1 / 255)])
def test_inference_yml_describes_preprocessing_to_paddlex(pixels, mean, std, scale):
    config = variant_config('s0')
    config.DATA.INTERPOLATION = 'lanczos'
    content = describe(dataclasses.replace(Spec.of_config(config, ['a']), pixels=pixels))
    resize, crop, normalize, transpose = content['PreProcess']['transform_ops']
    assert resize == {'ResizeImage': {'resize_short': 256, 'backend': 'pil', 'interpolation': 'LANCZOS4'}}
    assert crop == {'CropImage': {'size': 224}} and transpose == {'ToCHWImage': None}
    assert normalize == {'NormalizeImage': {'mean': mean, 'std': std, 'scale': scale, 'order': '', 'channel_num': 3}}
    assert content['Global'] == {'model_name': 'mobileone_s0'}
    assert content['PostProcess'] == {'Topk': {'topk': 5, 'label_list': ['a']}}


def test_onnx_file_accepts_any_image_size(trained, exported):
    import onnxruntime
    session = onnxruntime.InferenceSession(exported / 'model.onnx')
    images = np.random.default_rng(0).standard_normal([2, 3, 50, 33]).astype('float32')
    with paddle.no_grad():
        assert session.run(None, {'image': images})[0] == pytest.approx(
            trained[1](paddle.to_tensor(images)).numpy(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize('variant, nodes', [('s0', 89), ('s4', 161)])
def test_onnx_graph_is_small_and_names_its_stages(variant, nodes):
    config = variant_config(variant)
    config.MODEL.DEPLOY = True
    proto = build_onnx(build_mobileone(config), Spec.of_config(config, []))
    assert len(proto.graph.node) == nodes and proto.opset_import[0].version == 13
    outputs = {output for node in proto.graph.node for output in node.output}
    assert {f'stage{number}' for number in range(5)} | {'features', 'logits'} <= outputs
    assert {node.name for node in proto.graph.node} == outputs


def test_onnx_graph_is_identical_on_paddle_2_and_3(trained):
    """The same fused weights give the same bytes."""
    _, model, config = trained
    fused = model_convert(model)
    rng = np.random.default_rng(0)
    for tensor in fused.parameters():
        tensor.set_value(rng.standard_normal(tensor.shape).astype('float32'))
    proto = build_onnx(fused, Spec.of_config(config, NAMES))
    assert hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()[:16] == 'f750b818a071a8c7'


def test_batch_norms_can_carry_the_biases(trained):
    """This network is exported on PaddlePaddle 2.6.2."""
    fused = model_convert(trained[1])
    other = with_batch_norms(fused)
    assert 'stages.1.0.dw_3x3.conv.bias' not in other.state_dict()
    images = paddle.randn([2, 3, 48, 48])
    with paddle.no_grad():
        assert other(images).numpy() == pytest.approx(fused(images).numpy(), rel=1e-5, abs=1e-5)


def test_export_with_different_outputs_is_discarded(trained, tmp_path, monkeypatch, capsys):
    def broken(model, spec, build=build_onnx):
        model.fc.bias.set_value(model.fc.bias + 1)
        return build(model, spec)
    monkeypatch.setattr('deploy.onnx_graph.build_onnx', broken)
    folder = trained[0]
    monkeypatch.setattr(sys, 'argv', ['export', '-cfg', str(folder / 'config.yaml'), '-pretrained',
                                      str(folder / 'best.pdparams'), '-output', str(tmp_path / 'x'), '-format', 'onnx'])
    monkeypatch.setattr(export_model, 'prepare_runtime', lambda: None)  # not in the process of the tests
    with pytest.raises(UserError, match='model.onnx: onnxruntime differs from the network by .*; nothing was exported'):
        export_model.main()
    assert os.listdir(tmp_path) == []


def test_export_errors(trained, tmp_path):
    command = ['-m', 'tools.export_model', '-cfg', trained[0] / 'config.yaml', '-output', tmp_path / 'x']
    assert '-pretrained is needed' in fails(*command)
    command += ['-pretrained', trained[0] / 'best.pdparams']
    for batch in ('0', '²', '99999999'):
        assert f'-batch is {batch!r}, but must be a number from 1 to 65536' in fails(*command, '-batch', batch)
    assert 'typo/val_list.txt: cannot read the list' in fails(*command, '-data_path', 'typo')
    assert 'no/weights: no such' in fails(*command[:-1], 'no/weights')
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x/file').touch()
    for output in (tmp_path / 'x', tmp_path / 'x/file', ''):
        assert 'already exists and is not an empty folder' in fails(*command, '-output', output)
    assert 'x/file/y: cannot write (File exists)' in fails(*command, '-output', tmp_path / 'x/file/y')
    assert os.listdir(tmp_path / 'x') == ['file'] and os.listdir(tmp_path) == ['x']
    (tmp_path / 'link').symlink_to('empty')
    (tmp_path / 'empty').mkdir()
    run(*command, '-output', tmp_path / 'link', '-format', 'onnx')
    assert os.listdir(tmp_path / 'empty') == ['model.onnx']


def test_full_disk_error_names_the_output(tmp_path):
    message = f'-output {tmp_path}/x: cannot write .No space left on device.; free up disk space'
    with pytest.raises(UserError, match=message), export_model.new_folder(str(tmp_path / 'x')):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_missing_packages(exported, monkeypatch):
    from importlib.util import find_spec
    missing = set()
    for module in ('importlib.util', 'tools.export_model'):
        monkeypatch.setattr(f'{module}.find_spec', lambda name: None if name in missing else find_spec(name))
    missing.add('onnxruntime')
    assert Predictor(exported).engine == 'openvino'
    with pytest.raises(UserError, match='the engine onnxruntime is not installed: pip install onnxruntime'):
        Predictor(exported, engine='onnxruntime')
    missing.add('openvino')
    assert Predictor(exported).engine == 'inference'
    with pytest.raises(UserError, match='the engine onnxruntime is not installed'):
        Predictor(exported / 'model.onnx')
    with pytest.raises(UserError, match='-format onnx needs onnxruntime: pip install -r requirements-deploy.txt'):
        export_model.check_formats(['onnx', 'paddle'], None, None)
    missing.add('onnx')
    export_model.check_formats(['paddle'], None, None)


def test_unusable_models_are_refused(trained, exported, tmp_path):
    for path, message in ((tmp_path / 'nothing', 'no such file'), (tmp_path, 'neither weights .* with model.onnx or'),
                          (trained[0] / 'config.yaml', 'neither weights')):
        with pytest.raises(UserError, match=f'{path}: {message}'):
            Predictor(path)
    with pytest.raises(UserError, match='best.pdparams: can be run by paddle, not by openvino'):
        Predictor(trained[0] / 'best.pdparams', engine='openvino')
    with pytest.raises(UserError, match="engine is 'tensorrt', but must be one of auto, paddle, inference"):
        Predictor(exported, engine='tensorrt')
    foreign = onnx.load(exported / 'model.onnx')
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / 'foreign.onnx')
    (tmp_path / 'broken.onnx').write_bytes((exported / 'model.onnx').read_bytes()[:1000])
    for engine, reader in (('onnxruntime', 'ONNX Runtime'), ('openvino', 'OpenVINO')):
        with pytest.raises(UserError, match='foreign.onnx: its metadata does not describe the preprocessing'):
            Predictor(tmp_path / 'foreign.onnx', engine=engine)
        with pytest.raises(UserError, match=f'broken.onnx: {reader} cannot read it'):
            Predictor(tmp_path / 'broken.onnx', engine=engine)
    (tmp_path / 'w.pdparams').touch()
    with pytest.raises(UserError, match='w.pdparams: weights need the config of their network, but .* does not exist'):
        Predictor(tmp_path / 'w.pdparams')


@pytest.mark.parametrize('name, length, message', [
    ('inference.pdmodel', 1000, 'inference.pdmodel: Paddle Inference cannot read it'),
    ('inference.json', 1000, 'inference.json: Paddle Inference cannot read it'),
    ('inference.pdiparams', 1000, 'inference.pdmodel: Paddle Inference cannot read it, or inference.pdiparams'),
    ('inference.pdiparams', None, 'inference.pdiparams: no such file'),
    ('inference.yml', 10, 'inference.yml: cannot be read'), ('inference.yml', None, 'inference.yml: cannot be read'),
    ('inference.yml', 0, 'inference.yml: cannot be read')])
def test_broken_paddle_inference_files_are_refused(name, length, message, exported, tmp_path):
    for path in exported.glob('inference.*'):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if name == 'inference.json':
        if paddle.__version__.startswith('2.'):
            (tmp_path / name).touch()
            message = 'inference.json: PaddlePaddle 2.6.2 cannot read it'
        (tmp_path / 'inference.pdmodel').unlink()
    if length is None:
        (tmp_path / name).unlink()
    else:
        os.truncate(tmp_path / name, length)
    with pytest.raises(UserError, match=message):
        Predictor(tmp_path, engine='inference')


def test_class_names(tmp_path):
    imagenet = find_class_names(str(tmp_path / 'w.pdparams'), 1000)
    assert len(set(imagenet)) == 1000 and imagenet[0] == 'tench' and imagenet[-1] == 'toilet tissue'
    assert find_class_names(str(tmp_path / 'w.pdparams'), 10) == ()
    (tmp_path / 'class_names.txt').write_text('a\nb\n')
    assert find_class_names(str(tmp_path / 'w.pdparams'), 2) == ('a', 'b')
    with pytest.raises(UserError, match='class_names.txt: 2 lines, but the network has 1000 classes'):
        find_class_names(str(tmp_path / 'w.pdparams'), 1000)
    (tmp_path / 'class_names.txt').write_bytes('Mäuse, graue\r\n"b"\r\n'.encode('utf-16'))  # Unicode text from Excel
    assert find_class_names(str(tmp_path / 'w.pdparams'), 2) == ('Mäuse, graue', '"b"')
    (tmp_path / 'class_names.txt').write_text('a\n\nb')
    with pytest.raises(UserError, match="class_names.txt:2: '' is not a name"):
        find_class_names(str(tmp_path / 'w.pdparams'), 3)


def test_predict_program(trained, exported, tmp_path):
    write_images(tmp_path / 'photos', 2)
    for name in ('notes.txt', '._photo 0.jpg', 'clip.mpg', 'drawing.eps'):
        (tmp_path / 'photos' / name).write_text('no image')
    (tmp_path / 'broken.png').write_text('no image either')
    command = ['-m', 'tools.predict', '-model', exported, '-top', '2']
    out = run(*command, tmp_path / 'photos').stdout.splitlines()
    assert out[0] == f'{tmp_path}/photos/photo 0.jpg' and out[3] == f'{tmp_path}/photos/photo 1.jpg' and len(out) == 6
    assert any(f'%  {number} class {number}, $"' in out[1] for number in range(10))
    process = run(*command, tmp_path / 'broken.png', tmp_path / 'photos/*.jpg', '-json', '-plot', tmp_path / 'bars.png',
                  status=1)
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert [row['image'] for row in rows] == [str(tmp_path / name) for name in ('broken.png', 'photos/photo 0.jpg',
                                                                               'photos/photo 1.jpg')]
    assert rows[0]['error'].startswith(f'{tmp_path}/broken.png: cannot read the image')
    assert [list(entry) for entry in rows[1]['top']] == [['id', 'name', 'probability']] * 2
    assert Image.open(tmp_path / 'bars.png').size[1] > 300
    process = run(*command, tmp_path / 'broken.png', tmp_path / 'photos', '-engine', 'inference', '-threads', '1',
                  status=1)
    assert process.stdout.splitlines() == out and process.stderr.startswith('tools.predict: error: ')
    process = run(*command, tmp_path / 'photos', '-engine', 'inference', '-device', 'cpu')
    assert process.stdout.splitlines() == out and process.stderr == ''
    line = fails(*command, tmp_path / 'photos', '-engine', 'inference', '-device', 'gpu')
    assert 'finds no GPU: it is a CPU build' in line
    line = fails(*command, tmp_path / 'photos', '-engine', 'onnxruntime', '-device', 'cpu')
    assert '-device is cpu, but the engine onnxruntime chooses its own device: leave it out' in line
    assert '-top is 0, but must be at least 1' in fails(*command, tmp_path / 'photos', '-top', '0')
    assert "-plot 'no/bars.png': cannot be written" in fails(*command, tmp_path / 'photos', '-plot', 'no/bars.png')
    out = run(*command, tmp_path / 'photos', '-plot', tmp_path / 'bars.png').stdout.splitlines()
    assert out[6:] == [f'{tmp_path}/bars.png: drew 2 of 2 images']
    process = run(*command, tmp_path / '*o*', status=1)  # matches a folder, which is left out, and a file
    assert process.stdout == '' and len(process.stderr.splitlines()) == 1
    (tmp_path / 'empty').mkdir()
    assert 'no images in this folder' in fails(*command, tmp_path / 'empty')
    other = run('-m', 'tools.predict', '-model', trained[0] / 'best.pdparams', '-top', '2', tmp_path / 'photos').stdout
    assert [line[9:] for line in other.splitlines() if '%' in line] == [line[9:] for line in out if '%' in line]
