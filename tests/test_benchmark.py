"""The output of tools.benchmark, not its measurements."""
import importlib.util
import json
import types

import paddle
import pytest
from conftest import NARROW, ROOT, fails, run
from PIL import Image

from runtime import checkpoint
from tools.benchmark.latency import ACCURACY
from tools.benchmark.launches import count_launches
from tools.benchmark.loader import PHOTOGRAPHS
from tools.benchmark.train_worker import Trainer, repeated, turn
from tools.benchmark.turns import Worker
from utils import UserError
from weights import build_network


def test_unknown_subcommands():
    assert fails('-m', 'tools.benchmark', 'speed').startswith(
        "tools.benchmark: error: argument command: invalid choice: 'speed'")
    assert 'the following arguments are required: command' in fails('-m', 'tools.benchmark')


def test_ddp_benchmark(fashion, call_main):
    from tools.benchmark import ddp

    args = ['-data_path', fashion, '-batch_size', '4', '-steps', '2', '-repeats', '1', '-opts', *NARROW,
            'MODEL.NUM_CLASSES', '10']
    rows = [line.split() for line in call_main(ddp, *args)[2:]]
    assert [row[0] for row in rows] == ['1', '2'] and all(float(row[1]) > 0 for row in rows)
    assert rows[0][5] == '100.0%'
    program = ['-m', 'tools.benchmark', 'ddp']
    assert 'tools.benchmark ddp: error: -nproc, -steps and -repeats must be at least 1' in fails(
        *program, *args, '-repeats', '0')
    # in separate processes
    assert '-nproc 1: main_multi_gpu.py: error: ' in fails(*program, *args, 'TRAIN.ACCUM_ITER', '1000')


def test_count_launches():
    layer, x = paddle.nn.Linear(4, 3), paddle.ones([2, 4])
    optimizer = paddle.optimizer.SGD(0.1, parameters=layer.parameters())

    def step():
        layer(x).tanh().sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    step()
    assert count_launches(lambda: None) == 0
    assert count_launches(lambda: x + x) == 1
    # matmul, add, tanh, sum; the gradient of the loss; four gradients; the updates of weight and bias
    for _ in range(2):
        assert count_launches(step) == 4 + 1 + 4 + 2


@pytest.fixture
def latency(config, tmp_path):
    """A function that runs tools.benchmark latency on a narrow network and returns the process."""
    (tmp_path / 'narrow.yaml').write_text(config.dump())
    config.MODEL.NAME = 'wide'
    (tmp_path / 'wide.yaml').write_text(config.dump())

    def call(*args, names=('narrow',), start=run, **more):
        return start('-m', 'tools.benchmark', 'latency', '-cfg', *(tmp_path / f'{name}.yaml' for name in names),
                     '-threads', '1', '-turns', '2', '-seconds', '0.05', *args, **more)
    return call


def test_latency_of_every_engine(latency):
    rows = [json.loads(line) for line in latency('-batch', '2', '-json').stdout.splitlines()]
    old = paddle.__version__.startswith('2.')
    expected = {'paddle', 'paddle-unfused', 'inference-pdmodel', 'onnxruntime', 'openvino',
                *(['inference-plain'] if old else ['inference-openvino', 'inference-json'])}
    rows = [row for row in rows if row['engine'] != 'timm']  # timm has no such network
    floats = [row for row in rows if row['precision'] == 'float32']
    assert {row['engine'] for row in floats} == {row['engine'] for row in rows} == expected
    assert {row['engine'] for row in rows if row['precision'] == 'int8'} == {'onnxruntime', 'openvino'}
    assert min(floats, key=lambda row: row['milliseconds'])['ratio'] == 1
    for row in rows:
        assert len(row['turns']) == 2 and min(row['turns']) <= row['milliseconds'] <= max(row['turns'])
        assert row['ratio'] > 0 and (row['batch'], row['threads'], row['weights']) == (2, 1, 'random weights')
        assert row['cpu'] and any(name.startswith('paddlepaddle') for name in row['versions'])


def test_latency_of_fused_weights(latency, config, tmp_path):
    """An engine that cannot run fused weights reports why, and the others are measured."""
    weights = str(tmp_path / 'fused.pdparams')
    checkpoint.save(build_network(config, fused=True).state_dict(), weights)
    lines = latency('-engines', 'paddle', 'paddle-unfused', '-pretrained', weights).stdout.splitlines()
    assert '; given weights; 2 turns of 0.05 s' in lines[0]
    assert lines[2].endswith('1.00') and lines[3].endswith('float32   the weights are fused; give unfused ones')


def test_latency_of_timm(latency, tmp_path):
    """Uses a stand-in for timm, which the tests do not install."""
    for name, code in STAND_INS.items():
        path = tmp_path / 'fake' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    env = {'PYTHONPATH': f'{tmp_path}/fake:{ROOT}'}
    rows = latency('-engines', 'timm', '-batch', '1', '3', env=env, fork=False).stdout.splitlines()[2:]
    assert [row.split()[1:5] for row in rows] == [[batch, '1', 'timm', 'float32'] for batch in '13']
    assert all(row.endswith('1.00') for row in rows)


STAND_INS = {
    'torch.py': '''
import contextlib
inference_mode = contextlib.nullcontext
set_num_threads = from_numpy = lambda value: value
''',
    'timm/__init__.py': '''
import numpy
class Network:
    def eval(self): return self
    def __call__(self, images):
        assert images.shape in [(1, 3, 32, 32), (3, 3, 32, 32)] and images.dtype == "float32"
        return self
    def numpy(self): return numpy.zeros([1, 10])
def create_model(name, num_classes):
    assert num_classes == 10
    return Network()
''',
    'timm/utils.py': 'reparameterize_model = lambda model: model',
}


def test_latency_plot(latency, tmp_path):
    pytest.importorskip('matplotlib', reason='drawing is an optional extra')
    latency('-engines', 'paddle', '-plot', tmp_path / 'latency.png', names=('narrow', 'wide'))
    with Image.open(tmp_path / 'latency.png') as image:
        assert image.size[0] > 500
    text = (ROOT / 'README.md').read_text()
    assert all(f'| {name} | {accuracy} |' in text for name, accuracy in ACCURACY.items()) and len(ACCURACY) == 5


@pytest.mark.parametrize('name', ['latency_worker', 'loader_worker', 'train_worker'])
def test_worker_that_ends_reports_why(tmp_path, name):
    module, row = f'tools.benchmark.{name}', {'threads': 1, 'batch': 1}
    with Worker(module, row, str(tmp_path)) as worker, pytest.raises(UserError, match='config.yaml: cannot read the'):
        worker.turn(1)
    with Worker(module, row, str(tmp_path)) as worker:
        worker.process.kill()
        with pytest.raises(UserError, match=r'its process ended with status -9 \(killed, perhaps for lack of memory\)'):
            worker.turn(1)


@pytest.mark.parametrize('args, message', [
    (['-engines', 'tensorrt'], "argument -engines: invalid choice: 'tensorrt'"),
    (['-engines', 'timm'], '-engines timm: needs torch and timm: install it'),
    (['-turns', '0'], '-threads, -batch and -turns must be at least 1'),
    (['-seconds', 'nan'], '-seconds above 0'),
    (['-pretrained', 'a', 'b'], '-pretrained has 2 files for 1 configs: give one per config'),
    (['-pretrained', 'nowhere.pdparams'], 'nowhere.pdparams'),
])
def test_latency_errors(latency, args, message):
    if args[-1] == 'timm' and importlib.util.find_spec('timm'):
        pytest.skip('timm is installed')
    assert message in latency(*args, start=fails)


@pytest.fixture
def train(config, tmp_path):
    """A function that runs tools.benchmark train on a narrow network and returns the process."""
    config.MODEL.NAME = 'narrow'
    (tmp_path / 'narrow.yaml').write_text(config.dump())

    def call(*args, start=run, **more):
        return start('-m', 'tools.benchmark', 'train', '-cfg', tmp_path / 'narrow.yaml', '-threads', '1', '-turns', '2',
                     '-steps', '2', *args, **more)
    return call


def test_training_on_a_synthetic_batch(train):
    rows = [json.loads(line) for line in train('-batch_size', '2', '3', '-json').stdout.splitlines()]
    rows = [row for row in rows if row['framework'] == 'paddle']
    assert [row['batch'] for row in rows] == [2, 3] and rows[0]['launches'] == rows[1]['launches'] > 50
    for row in rows:
        assert len(row['turns']) == 2 and min(row['turns']) <= row['milliseconds'] <= max(row['turns'])
        assert row['images_per_second'] > 0 and row['memory'] > 0 and row['waiting'] is None and row['ratio'] == 1
        assert row['machine'] and any(name.startswith('paddlepaddle') for name in row['versions'])


def test_training_on_a_dataset(train, fashion):
    """The turns span several epochs of seven batches each."""
    lines = train('-data_path', fashion, '-batch_size', '8', '-num_workers', '0', '2').stdout.splitlines()
    assert 'narrow at 32 pixels; 2 turns of 2 steps' in lines[0]
    rows = [line.split() for line in lines[2:] if line.startswith('paddle')]
    assert [row[:4] for row in rows] == [['paddle', 'float32', '8', workers] for workers in '02']
    assert all(row[-2].endswith('%') for row in rows) and rows[0][-1] == '1.00'


def test_training_turn():
    """The host waits for the device before and after the measured steps, and the warm-up uses up prefetched batches."""
    events = []
    cuda = types.SimpleNamespace(synchronize=lambda: events.append('wait'), max_memory_allocated=lambda: 7,
                                 empty_cache=lambda: events.append('free'))
    loader = types.SimpleNamespace(num_workers=1, waited=0.0)

    def count(window):
        events.append('count')
        return 5
    window = [(None, [1, 2]), (None, [3])]
    trainer = Trainer(lambda: repeated(window), lambda window: events.append(len(window)), cuda, None, loader, count)
    result = turn(trainer, 2)
    assert events == [2, 2, 2, 'wait', 2, 2, 'wait', 'count', 'free']
    assert (result['memory'], result['launches'], result['waiting'], result['workers']) == (7, 5, 0, 1)
    assert result['images_per_second'] * result['milliseconds'] == pytest.approx(1000 * 3)
    events.clear()
    assert turn(trainer, 1)['launches'] == 5 and 'count' not in events


def test_training_next_to_timm(train, tmp_path):
    """Uses a stand-in for timm. A row that runs out of memory reports it, and the others are measured."""
    for name, code in TRAINING_STAND_INS.items():
        path = tmp_path / 'fake' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    env = {'PYTHONPATH': f'{tmp_path}/fake:{ROOT}'}
    lines = train('-batch_size', '2', '3', env=env, fork=False).stdout.splitlines()[2:]
    rows = [line.split() for line in lines]
    assert [row[:3] for row in rows] == [[name, 'float32', batch] for batch in '23' for name in ('paddle', 'timm')]
    assert rows[1][-1] == '1.00' and float(rows[0][-1]) > 0 and rows[2][-1] == '1.00'
    assert lines[3].endswith('  out of memory: use smaller batches, images or networks, or a machine with '
                             'more memory')
    assert 'timm has no network wide' in train('-opts', 'MODEL.NAME', 'wide', env=env, fork=False).stdout


TRAINING_STAND_INS = {
    'torch.py': '''
import contextlib, types
class Tensor:
    def __init__(self, size): self.size = size
    def __len__(self): return self.size[0]
    def __truediv__(self, count): return self
    def backward(self): pass
float16 = 'float16'
set_num_threads = lambda threads: None
randn = lambda size, device: Tensor(size)
randint = lambda high, size, device: Tensor(size)
autocast = lambda device, dtype, enabled: contextlib.nullcontext()
class Scaler:
    def __init__(self, device, enabled): assert (device, enabled) == ('cpu', False)
    def scale(self, loss): return loss
    def step(self, optimizer): optimizer.step()
    def update(self): pass
amp = types.SimpleNamespace(GradScaler=Scaler)
backends = types.SimpleNamespace(cudnn=types.SimpleNamespace())
''',
    'timm/__init__.py': '''
class Network:
    def to(self, device): return self
    def train(self): return self
    def __call__(self, images):
        assert images.size in ([2, 3, 32, 32], [3, 3, 32, 32])
        if len(images) == 3:
            raise RuntimeError("CUDA out of memory.\\nTried to allocate 2 GiB")
        return images
is_model = lambda name: name == 'narrow'
create_model = lambda name, num_classes: Network()
''',
    'timm/loss.py': 'LabelSmoothingCrossEntropy = lambda smoothing: lambda logits, labels: logits',
    'timm/optim.py': '''
import types
def create_optimizer_v2(model, name, lr, weight_decay):
    assert name == 'sgd'
    return types.SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
''',
    'timm/utils.py': '''
import types
ModelEmaV3 = lambda model, decay: types.SimpleNamespace(update=lambda model: None)
''',
}


@pytest.mark.parametrize('args, message', [
    (['-steps', '0'], '-threads, -steps and -turns must be at least 1'),
    (['-batch_size', '2', '0'], 'DATA.BATCH_SIZE is 0, but must be at least 1'),
    (['-num_workers', '2'], '-num_workers has no effect on a synthetic batch: add -data_path'),
    (['-data_path', 'nowhere'], 'nowhere/train_list.txt: cannot read the list'),
    (['-precision', 'float32', 'O1'], 'mixed precision (-precision O1 O2, -dtype) has no effect on a CPU'),
    (['-dtype', 'bfloat16'], 'mixed precision (-precision O1 O2, -dtype) has no effect on a CPU'),
])
def test_training_errors(train, args, message):
    assert message in train(*args, start=fails)


LOADER = ['-m', 'tools.benchmark', 'loader', '-image_size', '32', '-batch_size', '4', '-batches', '2', '-turns', '2']


def test_loading_a_dataset(fashion):
    """No image is read twice in a turn, so the list must be long enough."""
    command = [*LOADER, '-data_path', fashion, '-num_workers', '0', '1']
    rows = [json.loads(line) for line in run(*command, '-json').stdout.splitlines()]
    rows = [row for row in rows if not row['pipeline'].startswith('torchvision')]
    assert [(row['pipeline'], row['workers']) for row in rows] == [
        ('decode', None), ('transform', None), ('collate', None), ('training', 0), ('hand-over', 0), ('training', 1),
        ('hand-over', 1)]
    for row in rows:
        assert len(row['turns']) == 2 and min(row['turns']) <= row['milliseconds'] <= max(row['turns'])
        assert row['images_per_second'] * row['milliseconds'] == pytest.approx(4000) and row['ratio'] > 0
        assert row['machine'] and row['images'] == f'60 images of {fashion}'
    assert fails(*command, '-batches', '13').endswith(
        f'{fashion}/train_list.txt: 60 images are too few for a turn of 64: lower -batches, -batch_size or '
        '-num_workers')


def test_loading_photographs_next_to_torchvision(tmp_path):
    """Uses stand-ins for the packages that ship photographs and for torchvision, with one row that fails."""
    fake = tmp_path / 'fake'
    for package, names in PHOTOGRAPHS.items():
        for number, name in enumerate(names):
            path = fake / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (501 + number, 375), (90, 120, 30)).save(path)
        (fake / package / '__init__.py').write_text('')
    for name, code in LOADING_STAND_INS.items():
        path = fake / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    env = {'PYTHONPATH': f'{fake}:{ROOT}'}
    lines = run(*LOADER, '-num_workers', '0', env=env, fork=False).stdout.splitlines()
    assert '; 6 photographs, 500 x 375, ' in lines[0] and 'to 32 pixels; 2 turns of 2 batches of 4' in lines[0]
    assert [line[:27].split() for line in lines[2:]] == [
        ['decode', '-'], ['transform', '-'], ['collate', '-'], ['training', '0'], ['hand-over', '0'],
        ['torchvision', 'Pillow', '0'], ['torchvision', 'v2', '0']]
    assert lines[7].endswith('ValueError: no such crop') and lines[8].endswith('1.00') and lines[2].endswith('1.00')
    (fake / 'skimage/data/rocket.jpg').unlink()
    process = run(*LOADER, status=2, env=env, fork=False)
    assert process.stderr == ('tools.benchmark loader: error: the photographs of scikit-image and scikit-learn are '
                              'missing: pip install scikit-image scikit-learn, or give -data_path\n')


LOADING_STAND_INS = {
    'torch.py': '''
import types
class DataLoader:
    def __init__(self, dataset, batch_size, shuffle, num_workers):
        assert (batch_size, shuffle, num_workers) == (4, True, 0)
        self.dataset = dataset
    def __iter__(self):
        for start in range(0, len(self.dataset), 4):
            yield [self.dataset[start + index] for index in range(4)]
set_num_threads = lambda threads: None
utils = types.SimpleNamespace(data=types.SimpleNamespace(DataLoader=DataLoader))
''',
    'torchvision/__init__.py': '',
    'torchvision/io.py': '''
import types
read_file = lambda path: open(path, 'rb').read()
ImageReadMode = types.SimpleNamespace(RGB='RGB')
def decode_image(data, mode):
    assert data[:2] == b"\\xff\\xd8" and mode == 'RGB'
''',
    'torchvision/transforms/__init__.py': '''
InterpolationMode = str
Compose = None
def RandomResizedCrop(size, scale, interpolation):
    raise ValueError("no such crop")
''',
    'torchvision/transforms/v2.py': '''
def RandomResizedCrop(size, scale, interpolation, antialias):
    assert (size, list(scale), interpolation, antialias) == (32, [0.08, 1.0], 'bicubic', True)
RandomHorizontalFlip = lambda: None
Compose = lambda transforms: lambda image: image
''',
}


@pytest.mark.parametrize('args, message', [
    (['-batches', '0'], '-batches and -turns must be at least 1, and -num_workers 0 or more'),
    (['-num_workers', '2', '-1'], '-batches and -turns must be at least 1, and -num_workers 0 or more'),
    (['-batch_size', '0'], 'DATA.BATCH_SIZE is 0, but must be at least 1'),
    (['-data_path', 'nowhere'], 'nowhere/train_list.txt: cannot read the list'),
])
def test_loading_errors(args, message):
    assert message in fails(*LOADER, *args)
