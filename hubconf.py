"""MobileOne for paddle.hub: paddle.hub.load(FOLDER_OF_THE_CLONE, 'mobileone_s0', source='local', pretrained=FILE)."""
import os as _os

from config import get_config as _get_config
from mobileone import build_mobileone as _build_mobileone
from mobileone import model_convert as _model_convert
from weights import load_model as _load_model

dependencies = ['numpy', 'paddle', 'PIL', 'tqdm', 'yacs', 'yaml']
_CONFIGS = _os.path.join(_os.path.dirname(_os.path.abspath(__file__)), 'configs')


def _build(name, pretrained, fused, num_classes):
    config = _get_config(_os.path.join(_CONFIGS, f'{name}.yaml'))
    config.MODEL.NUM_CLASSES = num_classes
    model = _load_model(config, _os.fspath(pretrained))[0] if pretrained else _build_mobileone(config)
    return _model_convert(model) if fused else model


def mobileone_s0(pretrained='', fused=False, num_classes=1000):
    """MobileOne-S0: [N, 3, H, W] images -> [N, num_classes] logits.

    pretrained: path of a weight file of this project, fused or not; '': random weights.
    fused: return the fused network, in evaluation mode.
    num_classes: number of classes in the weights.
    Raises: UserError for a file that cannot be read or weights that do not fit.
    """
    return _build('mobileone_s0', pretrained, fused, num_classes)


def mobileone_s1(pretrained='', fused=False, num_classes=1000):
    """MobileOne-S1; see mobileone_s0."""
    return _build('mobileone_s1', pretrained, fused, num_classes)


def mobileone_s2(pretrained='', fused=False, num_classes=1000):
    """MobileOne-S2; see mobileone_s0."""
    return _build('mobileone_s2', pretrained, fused, num_classes)


def mobileone_s3(pretrained='', fused=False, num_classes=1000):
    """MobileOne-S3; see mobileone_s0."""
    return _build('mobileone_s3', pretrained, fused, num_classes)


def mobileone_s4(pretrained='', fused=False, num_classes=1000):
    """MobileOne-S4; see mobileone_s0."""
    return _build('mobileone_s4', pretrained, fused, num_classes)
