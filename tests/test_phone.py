"""Exports for phones: converted with the tools of ncnn and MNN, and checked with their engines."""
import os

import pytest
from conftest import fails
from test_predictor import export, trained  # noqa: F401  a fixture

import tools.export_model as export_model
from deploy import phone
from utils import UserError


@pytest.mark.parametrize('name, files', [('mnn', ['model.mnn']), ('ncnn', ['model.ncnn.bin', 'model.ncnn.param'])])
@pytest.mark.parametrize('args', [[], ['-softmax', '-batch', '1', '-normalize', 'unit']])
def test_phone_exports(name, files, args, trained, tmp_path):  # noqa: F811
    if not phone.find_converter(name):
        pytest.skip(f'needs {name}')
    more = [] if args else ['onnx']
    folder = tmp_path / 'net.params'  # a name that contains ".param"
    out = export(trained, folder, '-format', *more, name, *args).stdout
    lines = [line for line in out.splitlines() if line.startswith(files[-1])]
    assert len(lines) == 2 and all(float(line.split()[-1]) < 1e-4 for line in lines)
    assert sorted(os.listdir(folder)) == [*files, *(f'model.{kind}' for kind in more)]
    os.truncate(folder / files[0], 1000)  # as on a full disk
    with pytest.raises(UserError, match=f'^{files[-1]}: its engine cannot read what the converter wrote'):
        phone.LOADERS[name](str(folder / files[-1]))


def test_package_without_its_converter(tmp_path, monkeypatch):
    monkeypatch.setattr(phone, 'find_spec', lambda name: type('Spec', (), {
        'submodule_search_locations': [str(tmp_path)]}))
    assert phone.find_converter('ncnn') is None


def test_converter_errors(trained, tmp_path, monkeypatch):  # noqa: F811
    converter = tmp_path / 'converter'
    converter.write_text('#!/bin/sh\necho "one line" >&2; echo "the operator is unknown" >&2; exit 3\n')
    converter.chmod(0o755)
    monkeypatch.setattr(phone, 'find_converter', lambda name: str(converter))
    (tmp_path / 'model.onnx').touch()
    spec = type('Spec', (), {'image_size': 32})
    with pytest.raises(UserError, match='-format mnn: its converter failed with status 3 .the operator is unknown.;'):
        phone.convert('mnn', str(tmp_path / 'model.onnx'), spec)
    with pytest.raises(UserError, match='-format mnn takes one floating-point image at a time'):
        export_model.check_formats(['mnn'], 'uint8', None)
    with pytest.raises(UserError, match='-format ncnn takes one floating-point image at a time'):
        export_model.check_formats(['onnx', 'ncnn'], None, 2)
    monkeypatch.setattr(phone, 'find_converter', lambda name: None)
    with pytest.raises(UserError, match='-format ncnn needs its converter: pip install ncnn && pip install --no-deps'):
        export_model.check_formats(['ncnn'], None, None)


def test_unknown_format_is_refused(trained, tmp_path):  # noqa: F811
    folder = trained[0]
    assert 'invalid choice' in fails('-m', 'tools.export_model', '-cfg', folder / 'config.yaml', '-pretrained',
                                     folder / 'best.pdparams', '-output', tmp_path / 'x', '-format', 'coreml')
    assert os.listdir(tmp_path) == []
