"""The README's claims, as far as a test can check them, and the imports between modules."""
import ast
import graphlib
import inspect
import pkgutil
import re
import shutil
import subprocess

import paddle
import pytest
from conftest import ROOT, run, variant_config
from paddle.vision import transforms as paddle_transforms
from PIL import Image
from test_mobileone import SIZES

from config import KEYS, UNSUPPORTED
from mobileone import build_mobileone, model_convert

README = (ROOT / 'README.md').read_text()
DATA, MIGRATION = ((ROOT / f'docs/{name}.md').read_text() for name in ('data', 'migration'))


def test_sizes_in_the_readme():
    for variant, (fused, trainable, flops_fused, flops, all_unfused) in SIZES.items():
        exact = f'| mobileone_{variant} | {trainable:,} | {all_unfused:,} | {fused:,} | {flops:,} | {flops_fused:,} |'
        assert exact in README
        rounded = (f'{all_unfused / 1e6:.1f}M | {flops / 1e9:.1f}G | {fused / 1e6:.1f}M | {flops_fused / 1e9:.1f}G | '
                   '224 | 0.875 | bicubic |')
        row = next(line for line in README.splitlines() if line.startswith(f'| mobileone_{variant} '))
        assert rounded in row


def test_files_named_in_the_readme_exist():
    names = set(re.findall(r'\b((?:tools/|configs/|tests/|docs/)?[\w]+\.(?:py|sh|yaml|png|md))\b', README))
    names |= {f'tools/{name}/__main__.py' if (ROOT / 'tools' / name).is_dir() else f'tools/{name}.py'
              for name in re.findall(r'python -m tools\.(\w+)', README)}
    made = {'config.yaml', 'curves.png', 'compare.png', 'recipe.png'}  # by the commands there
    assert len(names) > 10
    assert [name for name in names - made if not (ROOT / name).exists()] == []


@pytest.fixture
def weights_s0(tmp_path):
    paddle.seed(5)
    model = build_mobileone(variant_config('s0'))
    paddle.save(model.state_dict(), str(tmp_path / 'mobileone_s0.pdparams'))
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    return model


@pytest.mark.parametrize('snippet', ['seed', 'readme'])
def test_python_snippets(snippet, weights_s0, tmp_path):
    """Runs the snippet of README.md, and that of the port's first README once `import paddle` is added."""
    code = re.search(r'```python\n(.*?)```', README, re.S)[1]
    if snippet == 'seed':
        code = '''
import paddle
from config import get_config
from mobileone import build_mobileone as build_model
config = get_config('./configs/mobileone_s0.yaml')
model = build_model(config)
model_state_dict = paddle.load('./mobileone_s0.pdparams')
model.set_state_dict(model_state_dict)
'''
    Image.new('RGB', (300, 260), (90, 120, 30)).save(tmp_path / 'photo.jpg')
    check = "\nmodel.eval(); print(repr(float(model(paddle.full([1, 3, 64, 64], 0.5)).abs().sum())))\n"
    out = run('-c', code + check, cwd=tmp_path, env={'PYTHONPATH': str(ROOT)}).stdout
    weights_s0.eval()
    with paddle.no_grad():
        expected = float(weights_s0(paddle.full([1, 3, 64, 64], 0.5)).abs().sum())
        assert float(model_convert(weights_s0)(paddle.full([1, 3, 64, 64], 0.5)).abs().sum()) == pytest.approx(expected,
                                                                                                              rel=1e-3)
    assert float(out.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)


def test_names_on_the_migration_page_exist():
    """The column "Now" names functions, classes, their parameters and config keys."""
    cells = [row.split('|')[-2] for row in re.findall(r'^\| .*', MIGRATION.split('###')[1], re.M)]
    names = re.findall(r'`([a-z]+(?:\.\w+)+)(?:\((.*?)\))?`', ' '.join(cells))
    assert len(names) > 30
    for name, parameters in names:
        found = pkgutil.resolve_name(name)
        assert not parameters or set(parameters.split(', ')) <= set(inspect.signature(found).parameters), name
    keys = set(re.findall(r'\b(?:DATA|MODEL|TRAIN)\.[A-Z_.]*[A-Z]', MIGRATION + DATA))
    assert len(keys) > 20 and keys <= {*KEYS, *UNSUPPORTED}


def test_preprocessing_on_the_migration_page(tmp_path, monkeypatch):
    """It equals PaddlePaddle's resize, crop and normalization, as before the migration."""
    [code] = re.findall(r'```python\n(.*?)```', MIGRATION + DATA, re.S)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    Image.effect_noise((300, 260), 90).convert('RGB').save(tmp_path / 'photo.jpg')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    data = names['config'].DATA
    old = paddle_transforms.Compose([
        paddle_transforms.Resize(int(data.IMAGE_SIZE / data.CROP_PCT), 'bicubic'),
        paddle_transforms.CenterCrop(data.IMAGE_SIZE), paddle_transforms.ToTensor(),
        paddle_transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])(Image.open('photo.jpg'))
    assert names['images'].shape == [1, 3, 224, 224]
    assert float((names['images'][0] - old).abs().max()) < 1e-5


@pytest.mark.parametrize('path', [*ROOT.glob('*.sh'), *ROOT.glob('tools/*.sh')], ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    assert path.read_text().startswith('#!/bin/sh\n#') and 'set -eu' in path.read_text()
    subprocess.run(['sh', '-n', path], check=True)


def test_environment_script_names_the_mistake(tmp_path):
    """The PATH has the shell's own tools and no Python."""
    for name in ('sh', 'dirname', 'cat'):
        (tmp_path / name).symlink_to(shutil.which(name))
    process = subprocess.run([tmp_path / 'sh', ROOT / 'tools/venv.sh', tmp_path / 'venv', 'paddlepaddle==3.3.1'],
                             text=True, capture_output=True, env={'PATH': str(tmp_path)})
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith('venv.sh: error: no Python 3.9 to 3.12 found')


def project_imports():
    """Return {module: the project's modules that it imports anywhere}, without the tests."""
    paths = [path for folder in ('', 'runtime/', 'deploy/', 'tools/', 'tools/*/')
             for path in ROOT.glob(f'{folder}*.py')]
    names = {'.'.join(path.relative_to(ROOT).with_suffix('').parts).replace('.__init__', ''): path for path in paths}
    imports = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f'{path}: {ast.unparse(node)}'
                found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
        imports[name] = found & set(names) - {'runtime', 'deploy'}
    return imports


def test_nothing_imports_upward_or_in_a_circle():
    imports = project_imports()
    assert {'runtime.settings', 'utils'} <= imports['config'] and {'engine', 'weights'} <= imports['run']
    for name, found in imports.items():
        if name.startswith('runtime'):
            assert all(other == 'utils' or other.startswith('runtime.') for other in found), name
        if not name.startswith('tools'):
            assert not any(other.startswith('tools') for other in found), name
        if name.startswith('deploy'):
            assert not {'run', 'engine'} & found, name
        elif not name.startswith('tools'):
            assert {other for other in found if other.startswith('deploy')} <= {
                'run': {'deploy.report'}}.get(name, set()), name
    assert imports['utils'] == set() and 'run' not in imports['engine']
    list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError
    assert not any('mobileone' in path.read_text().lower() for path in ROOT.glob('runtime/[a-z]*.py'))
