"""Run the commands and Python snippets of README.md, CONTRIBUTING.md and docs/.

They run in a copy of the repository, with narrow networks and a few images.
"""
import glob
import gzip
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys

import forked
import paddle
import pytest
import yaml
from conftest import NARROW, ROOT, run, with_lists, write_images
from PIL import Image

from config import get_config
from deploy import phone
from mobileone import build_mobileone
from runtime import checkpoint

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
# commands that are not run here -> where they are tested
ELSEWHERE = {
    r'pip install|python3 -m venv': 'installation: .ci/run',
    r'(PADDLE=\S+ )?sh run_(demo|tests)\.sh|bash \.ci/run': '.ci/run',
    r'NNODES=': 'each waits for the other; test_clusters.py',
    r'from paddlex': 'needs PaddleX; what was seen by hand is on the page',
}
# only the flags of these commands are checked
PARSED = {
    r'python -m tools\.benchmark': 'takes minutes; test_benchmark.py',
    r'python -m tools\.ablations': 'takes hours; test_tools.py',
    r'python load_pytorch_weights\.py': 'needs files of PyTorch; test_load_pytorch_weights.py',
}
# the parts of PaddleDetection and PaddleSeg that the backbones need
STUBS = {
    'ppdet/core/workspace.py': 'def register(layer):\n    return layer\n',
    'ppdet/modeling/shape_spec.py': 'ShapeSpec = dict\n',
    'paddleseg/cvlibs.py': 'class manager:\n    class BACKBONES:\n        add_component = staticmethod(lambda x: x)\n',
}
PARSE = '''
import runpy, sys
from runtime.settings import ArgumentParser
parse_args = ArgumentParser.parse_args
def parse_and_stop(self, *args):
    parsed = parse_args(self, *args)
    if self.prog != 'tools.benchmark':  # which parses only the name of the benchmark
        print('parsed')
        sys.exit()
    return parsed
ArgumentParser.parse_args = parse_and_stop
del sys.argv[0]
if sys.argv[0] == '-m':
    runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name='__main__')
'''


def snippets(page):
    """Return [(language, code)] of a page in order: shell commands, without comments, and Python blocks.

    A shell block that is a script is left out.
    """
    found = []
    for language, block in re.findall(r'^```(shell|python)\n(.*?)^```', page.read_text(), re.M | re.S):
        if language == 'python':
            found.append((language, block))
        elif not block.startswith('#!'):
            lines = [shlex.split(line, comments=True) for line in block.replace('\\\n', ' ').splitlines()]
            found += [(language, shlex.join(words)) for words in lines if words]
    return found


def all_snippets(*languages):
    return [code for page in PAGES for language, code in snippets(page) if language in languages]


def matches(patterns, command):
    return next((pattern for pattern in patterns if re.match(pattern, command)), None)


@pytest.fixture(scope='module')
def original(fashion, tmp_path_factory):
    """A copy of the repository with the files that the pages' commands read."""
    folder = tmp_path_factory.mktemp('docs') / 'clone'
    for name in ('configs', 'demo', 'deploy', 'runtime', 'tools'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    for path in ROOT.iterdir():
        if path.suffix in ('.py', '.sh', '.txt'):
            shutil.copy(path, folder)
    narrow = [[key, yaml.safe_load(value)] for key, value in zip(NARROW[::2], NARROW[1::2])]
    for path in (folder / 'configs').glob('*.yaml'):
        config = yaml.safe_load(path.read_text())
        for key, value in [*narrow, ['TRAIN.NUM_EPOCHS', 1], ['TRAIN.CURRICULUM', []], ['VALIDATE_FREQ', 1]]:
            section, key = key.rpartition('.')[::2]
            (config.setdefault(section, {}) if section else config)[key] = value
        path.write_text(yaml.safe_dump(config))
    for path in (folder / 'demo').glob('*.gz'):
        content = gzip.decompress(path.read_bytes())
        dims, size = content[3], 48 * (28 * 28 if content[3] == 3 else 1)
        header = content[:4] + struct.pack('>I', 48) + content[8:4 + 4 * dims]
        path.write_bytes(gzip.compress(header + content[4 + 4 * dims:][:size]))
    (folder / 'data').mkdir()
    with_lists(fashion, folder / 'data/imagenet')
    paddle.seed(0)
    for variant in range(5):
        path = folder / f'mobileone_s{variant}.pdparams'
        network = build_mobileone(get_config(str(folder / f'configs/mobileone_s{variant}.yaml')))
        # one class for all images, so that int8 changes none of these predictions
        network.fc.bias.set_value(10.0 * paddle.eye(1, network.fc.bias.shape[0]).flatten())
        checkpoint.save(network.state_dict(), str(path))
    for name, code in STUBS.items():
        (folder / 'stubs' / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / 'stubs' / name).write_text(code)
    for name in ('cat', 'dog'):
        write_images(folder / 'photos' / name, 10)
    for path in ('photo.jpg', 'photos/photo.jpg'):
        Image.new('RGB', (50, 40)).save(folder / path)
    run('-m', 'tools.make_fashion_mnist', '-source', 'demo', '-output', 'data/fashion_mnist_demo', cwd=folder)
    run('main_single_gpu.py', '-cfg', 'configs/demo.yaml', '-output', 'output/demo', cwd=folder)
    return folder


@pytest.fixture
def clone(original, tmp_path):
    return shutil.copytree(original, tmp_path / 'clone', symlinks=True)


def expand(pattern, clone):
    """Expand a pattern in the clone as a shell does: to the matching paths, or to itself."""
    return sorted(os.path.relpath(path, clone) for path in glob.glob(str(clone / pattern))) or [pattern]


def run_command(command, clone):
    """Run one command as the shell does in the top folder of the clone. Returns (exit status, output)."""
    command = command.replace('/dataset/imagenet', 'data/imagenet').replace('/usr/share/datasets/fashion-mnist', 'demo')
    words = [word for pattern in shlex.split(command) for word in expand(pattern, clone)]
    env = {**os.environ, 'PYTHON': sys.executable, 'DATA_PATH': 'data/imagenet'}
    while '=' in words[0]:
        name, value = words.pop(0).split('=', 1)
        env[name] = value
    if words[0] == 'sh' or words[1:3] == ['-m', 'paddle.distributed.launch']:
        words[0] = {'sh': 'sh', 'python': sys.executable}[words[0]]
        process = subprocess.run(words, cwd=clone, env=env, capture_output=True, text=True, timeout=300)
    else:
        assert words[0] == 'python'
        parsed = ['-c', PARSE] if matches(PARSED, command) else []
        process = forked.run([sys.executable, *parsed, *words[1:]], clone, env, timeout=300)
        assert not parsed or process.stdout == 'parsed\n', process
    return process.returncode, process.stdout + process.stderr


def run_python(code, clone):
    """Run a Python block in the top folder of the clone. Returns (exit status, output)."""
    code = code.replace('/path/to/clone', str(clone))
    process = forked.run([sys.executable, '-c', code], clone, {**os.environ, 'PYTHONPATH': str(clone / 'stubs')})
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_commands_and_python_snippets(page, clone):
    for language, code in snippets(page):
        is_missing = '-format ncnn' in code and not phone.find_converter('ncnn')  # as in test_phone.py
        if not matches(ELSEWHERE, code) and not is_missing:
            status, output = (run_python if language == 'python' else run_command)(code, clone)
            assert status == 0, f'{code}\n{output}'


def test_backbones(clone):
    """The backbones return the maps of forward_features for pretrained weights, fused or not."""
    blocks = [code for language, code in snippets(ROOT / 'docs/deployment.md') if language == 'python']
    [detection], [segmentation] = ([code for code in blocks if name in code] for name in ('ppdet', 'paddleseg'))
    status, output = run_python(detection + segmentation + '''
import paddle
from mobileone import model_convert
images = paddle.rand([2, 3, 64, 64])
for layer, inputs in ((MobileOneDet, {'image': images}), (MobileOneSeg, images)):
    backbone = layer(pretrained='mobileone_s4.pdparams')
    backbone.eval()
    maps, expected = model_convert(backbone)(inputs), backbone.network.forward_features(images)[-len(backbone(inputs)):]
    assert all(float((a - b).abs().max() / b.abs().max()) < 1e-4 for a, b in zip(maps, expected))
    print([map.shape[1] for map in maps])
backbone = MobileOneDet(pretrained='mobileone_s4.pdparams')
print([spec['channels'] for spec in backbone.out_shape], [spec['stride'] for spec in backbone.out_shape])
''', clone)
    assert (status, output) == (0, '[8, 8, 8]\n[4, 8, 8, 8]\n[8, 8, 8] [8, 16, 32]\n'), output


def test_every_exception_is_needed():
    codes = all_snippets('shell', 'python')
    assert len(codes) > 60
    assert [pattern for pattern in [*ELSEWHERE, *PARSED] if not any(matches([pattern], code) for code in codes)] == []


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Links lead to files and headings of the repository; GitHub's anchor is the heading in lower case."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
    for target in re.findall(r'(?:\]\(|src=")([^)"]+)', text):
        name, _, anchor = target.partition('#')
        if '://' not in target:
            linked = page.parent / name if name else page
            assert linked.exists(), target
            headings = re.findall(r'^#+ (.*)', linked.read_text(), re.M) if anchor else []
            anchors = [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings]
            assert not anchor or anchor in anchors, target


def test_tests_that_the_pages_name_exist():
    pattern = r'`(test_\w+\.py)`:((?:,? `test_\w+`)+)'
    found = [match for page in PAGES for match in re.findall(pattern, page.read_text())]
    assert len(found) > 50
    for name, tests in found:
        defined = re.findall(r'^def (test_\w+)', (ROOT / 'tests' / name).read_text(), re.M)
        assert set(re.findall(r'\w+', tests)) <= set(defined), name


def test_requirement_files_exist():
    names = re.findall(r'-r (\S+)', ' '.join(all_snippets('shell')))
    assert 'requirements.txt' in names and all((ROOT / name).is_file() for name in names)
