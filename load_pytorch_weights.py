"""Convert an official PyTorch checkpoint of MobileOne (mobileone_s0.pth.tar, mobileone_s0_unfused.pth.tar, ...).

  python load_pytorch_weights.py -cfg configs/mobileone_s0.yaml mobileone_s0_unfused.pth.tar mobileone_s0.pdparams

Fused and unfused checkpoints are told apart by their tensors' names. Reading one needs PyTorch (pip install torch);
every tensor must be there and fit the network of the config.
"""
import os

from config import get_config
from runtime.files import check_regular
from runtime.program import prepare_runtime, run_program
from runtime.settings import ArgumentParser
from utils import UserError


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
    check_regular(path)
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint; give a .pth.tar file')
    try:
        state_dict = torch.load(path, map_location='cpu', weights_only=True)
    except MemoryError:
        raise
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
    from runtime import checkpoint
    from weights import convert_state_dict, is_fused
    print(f'{args.input}: SHA-256 {checkpoint.sha256(args.input)}')
    converted = convert_state_dict(state_dict, config)
    checkpoint.save(converted, args.output)
    kind = 'fused' if is_fused(converted) else 'unfused'
    print(f'{args.output}: {len(converted)} tensors ({kind}), {sum(v.size for v in converted.values()):,} values')


if __name__ == '__main__':
    run_program(main)
