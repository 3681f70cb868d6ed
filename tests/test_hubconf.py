"""Loading MobileOne through paddle.hub."""
import numpy as np
import paddle
import pytest
from conftest import ROOT, run, variant_config

from mobileone import build_mobileone, model_convert
from runtime import checkpoint


def test_variants_are_listed():
    names = paddle.hub.list(str(ROOT), source='local')
    assert sorted(names) == [f'mobileone_s{number}' for number in range(5)]
    assert 'pretrained' in paddle.hub.help(str(ROOT), 'mobileone_s0', source='local')


@pytest.mark.parametrize('is_fused', [False, True])
def test_networks_with_weights(is_fused, tmp_path):
    model = build_mobileone(variant_config('s0'))
    model.eval()
    path = str(tmp_path / 'weights.pdparams')
    checkpoint.save((model_convert(model) if is_fused else model).state_dict(), path)
    images = paddle.randn([1, 3, 64, 64])
    with paddle.no_grad():
        expected = model(images).numpy()
        for fused in (False, True):
            loaded = paddle.hub.load(str(ROOT), 'mobileone_s0', source='local', pretrained=path, fused=fused)
            loaded.eval()
            np.testing.assert_allclose(loaded(images).numpy(), expected, atol=1e-4 * np.abs(expected).max())
            assert any('_blocks.' in name for name in loaded.state_dict()) == (not is_fused and not fused)


def test_from_another_folder(tmp_path):
    """Loads weights for ten classes, given as a pathlib.Path, from a different current folder."""
    config = variant_config('s0')
    config.MODEL.NUM_CLASSES = 10
    checkpoint.save(build_mobileone(config).state_dict(), str(tmp_path / 'weights.pdparams'))
    code = (f"import pathlib, paddle; model = paddle.hub.load({str(ROOT)!r}, 'mobileone_s0', source='local', "
            "pretrained=pathlib.Path('weights.pdparams'), num_classes=10); "
            'print(type(model).__name__, list(model.fc.weight.shape))')
    assert run('-c', code, cwd=tmp_path, fork=False).stdout.splitlines()[-1] == 'MobileOne [1024, 10]'
