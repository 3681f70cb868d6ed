"""Convert an official PyTorch checkpoint of MobileOne (mobileone_s0.pth.tar, mobileone_s0_unfused.pth.tar, ...).

  python load_pytorch_weights.py -cfg configs/mobileone_s0.yaml mobileone_s0_unfused.pth.tar mobileone_s0.pdparams

Fused and unfused checkpoints are told apart by their tensors' names. Reading one needs PyTorch (pip install torch);
every tensor must be there and fit the network of the config.
"""
import os

import numpy as np

from config import ArgumentParser, get_config
from program import prepare_runtime, run_program
from utils import UserError, first_few


def convert_state_dict(state_dict, config):
    """Rename an official state dict to the Paddle network of a config.

    state_dict: {official name: tensor or array}, fused or unfused.
    Returns: {Paddle name: ndarray}, in the order of the network's own state dict.
    Raises: UserError that names missing, unexpected and misshapen tensors.
    """
    from mobileone import build_mobileone
    config = config.clone()
    config.defrost()
    config.MODEL.DEPLOY = any('reparam_conv' in name for name in state_dict)
    converted, used, problems = {}, set(), []
    for name, target in build_mobileone(config).state_dict().items():
        official = official_name(name)
        used.add(official)
        if official not in state_dict:
            problems.append(f'missing {official}')
            continue
        value = np.asarray(state_dict[official])
        value = value.T if name == 'fc.weight' else value  # PyTorch keeps [out, in], Paddle [in, out]
        if list(value.shape) != list(target.shape):
            problems.append(f'{official} is {list(state_dict[official].shape)}, which does not fit {name} '
                            f'{list(target.shape)}')
        converted[name] = np.ascontiguousarray(value)
    # the batch counters of PyTorch's batch norms have no counterpart; each belongs to a batch norm that is used
    counters = {name.replace('running_mean', 'num_batches_tracked') for name in used if 'running_mean' in name}
    problems += [f'unexpected {name}' for name in state_dict if name not in used | counters]
    if problems:
        raise UserError(f'the checkpoint does not fit the network of the config: {first_few(problems)}; '
                        'give the -cfg of its variant')
    return converted


def official_name(name):
    """The official PyTorch name of a Paddle name, e.g. stages.1.0.pw_skip._mean -> stage1.1.rbr_skip.running_mean.

    The stem `stages.0.0` is `stage0`; a block's depthwise and pointwise layers are two blocks, 2j and 2j + 1.
    """
    if name.startswith('fc.'):
        return name.replace('fc.', 'linear.')
    _, stage, block, part, rest = name.split('.', 4)
    layer, part = part.split('_', 1)
    prefix = 'stage0' if stage == '0' else f'stage{stage}.{2 * int(block) + (layer == "pw")}'
    if part == 'se':
        return f'{prefix}.se.{rest}'
    if rest.startswith('conv.') and (layer, part) in (('dw', '3x3'), ('pw', '1x1')):
        return f'{prefix}.reparam_conv.{rest[len("conv."):]}'
    branch = {'skip': 'rbr_skip', '1x1': 'rbr_scale'}.get(part, 'rbr_conv')
    rest = rest.replace('norm.', 'bn.').replace('_mean', 'running_mean').replace('_variance', 'running_var')
    return f'{prefix}.{branch}.{rest}'


def read_pytorch(path):
    """The tensors of a PyTorch file as arrays, read without running code from it. Raises: UserError."""
    try:
        import torch
    except ImportError:
        raise UserError('reading a PyTorch checkpoint needs PyTorch: pip install torch') from None
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
        # CVE-2025-32434
        raise UserError(f'PyTorch is {torch.__version__}, in which a file can run code in spite of weights_only: pip '
                        'install "torch>=2.6"')
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint; give a .pth.tar file')
    try:
        state_dict = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a broken or hostile file raises nearly every type
        # without PyTorch's own words, which recommend the unsafe way
        raise UserError(f'{path}: not a PyTorch state dict that can be read safely ({type(error).__name__}); download '
                        'it again from its publisher') from None
    if not isinstance(state_dict, dict) or not all(hasattr(value, 'numpy') for value in state_dict.values()):
        raise UserError(f'{path}: holds no flat dictionary of tensors, as the official checkpoints are')
    return {name: tensor.numpy() for name, tensor in state_dict.items()}


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('-cfg', metavar='FILE', required=True, help='YAML config of the variant, as for training')
    parser.add_argument('input', help='official checkpoint (.pth.tar)')
    parser.add_argument('output', help='weight file to write (.pdparams or .safetensors)')
    args = parser.parse_args()
    if os.path.realpath(args.input) == os.path.realpath(args.output):
        raise UserError(f'{args.output}: is the input too; give the converted weights a name of their own')
    config = get_config(args.cfg)
    state_dict = read_pytorch(args.input)  # before Paddle: both bring an OpenMP runtime
    prepare_runtime()
    import checkpoint
    print(f'{args.input}: SHA-256 {checkpoint.sha256(args.input)}')
    converted = convert_state_dict(state_dict, config)
    checkpoint.save(converted, args.output)
    kind = 'fused' if checkpoint.is_fused(converted) else 'unfused'
    print(f'{args.output}: {len(converted)} tensors ({kind}), {sum(v.size for v in converted.values()):,} values')


if __name__ == '__main__':
    run_program(main)
