"""Convert a PyTorch checkpoint of MobileOne, official or timm, to a weight file of this project.

  python load_pytorch_weights.py mobileone_s0_unfused.pth.tar mobileone_s0.pdparams -cfg configs/mobileone_s0.yaml

The tensor names show whether the checkpoint is official or timm, fused or not, and whether MobileOne is part of a
larger network. Every tensor of MobileOne must be present and fit the network of -cfg and -opts. Only files
other than .safetensors need PyTorch (pip install torch).
"""
import argparse
import os

from config import SETTINGS, get_config, get_parser, update_config
from runtime.files import check_regular
from runtime.program import prepare_runtime, run_program
from runtime.safe_pickle import check_key
from utils import UserError, one_line

# keys under which training checkpoints store weights; averaged weights come first
WRAPPERS = ('model_ema', 'state_dict_ema', 'state_dict', 'model')


def read_pytorch(path):
    """Read the tensors of a PyTorch file without running code from it.

    Returns: ({name: array}, the WRAPPERS around them, outermost first). The arrays are views, so an expanded tensor
        takes no extra memory; bfloat16 becomes uint16, as in Paddle.
    Raises: UserError without PyTorch >= 2.6, and for a file that contains no tensors or cannot be read safely.
    """
    try:
        import torch
    except ImportError:
        raise UserError('reading a PyTorch checkpoint needs PyTorch: pip install torch') from None
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
        # CVE-2025-32434
        raise UserError(f'in PyTorch {torch.__version__}, a file can run code despite weights_only: pip install '
                        '"torch>=2.6"')
    check_regular(path)
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint; give a .pth, .pth.tar or .safetensors file')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm stores its arguments next to the weights
            state, wrappers = unwrap(torch.load(path, map_location='cpu', weights_only=True))
        names = list(state) if isinstance(state, dict) else []
        tensors = {check_key(name): state[name] for name in names if isinstance(state[name], torch.Tensor)}
    except MemoryError:
        raise
    except Exception as error:  # a broken or hostile file raises nearly every type
        # PyTorch's own message is left out: it recommends loading the file unsafely
        raise UserError(f'{path}: not a PyTorch state dict that can be read safely ({type(error).__name__}); download '
                        'it again from its publisher, or save only the state dict') from None
    if not tensors:
        raise UserError(f'{path}: contains no dictionary of tensors, bare or under {", ".join(WRAPPERS)}, but '
                        f'{type(state).__name__} {one_line(str(names), 100)}; save only the state dict')
    return {name: to_array(tensor, name, path) for name, tensor in tensors.items()}, wrappers


def unwrap(state):
    """Return (the innermost dictionary in WRAPPERS, their names, outermost first); empty wrappers are skipped."""
    wrappers = []
    while len(wrappers) < 4:  # a dictionary may contain itself
        inner = [name for name in WRAPPERS if isinstance(state, dict) and state.get(name)
                 and isinstance(state[name], dict)]
        if not inner:
            break
        wrappers.append(inner[0])
        state = state[inner[0]]
    return state, wrappers


def to_array(tensor, name, path):
    """Return a PyTorch tensor as an array that shares its memory; bfloat16 becomes uint16 with the same bits.

    Raises: UserError for a data type or layout that NumPy lacks.
    """
    import torch
    try:
        if tensor.dtype == torch.bfloat16:
            return tensor.detach().view(torch.int16).numpy().view('uint16')
        return tensor.detach().numpy()
    except (TypeError, RuntimeError):  # quantized or sparse, for example
        raise UserError(f'{path}: {name} is a tensor of {tensor.dtype} ({tensor.layout}), which NumPy does not '
                        'support; save it as dense float32') from None


def main():
    parser = get_parser(__doc__, flags=())
    parser.add_argument('input', help='checkpoint to convert (.pth, .pth.tar, .safetensors)')
    parser.add_argument('output', help='weight file to write (.pdparams or .safetensors)')
    args = parser.parse_args()
    if not args.cfg:
        raise UserError('-cfg is required: give the YAML config of the variant, as for training')
    if os.path.realpath(args.input) == os.path.realpath(args.output):
        raise UserError(f'{args.output}: is also the input; choose another name for the converted weights')
    config = SETTINGS.checked(update_config(get_config(), args))
    state_dict, wrappers = None, []
    if not args.input.endswith('.safetensors'):
        state_dict, wrappers = read_pytorch(args.input)  # before importing Paddle: both load an OpenMP runtime
    prepare_runtime()
    from runtime import checkpoint
    from weights import convert_state_dict, find_layout, is_fused
    if state_dict is None:
        state_dict = checkpoint.load(args.input)
    print(f'{args.input}: SHA-256 {checkpoint.sha256(args.input)}')
    place = f'in {".".join(wrappers)}: ' if wrappers else ''
    print(f'{args.input}: {place}{find_layout(state_dict).description}')
    converted = convert_state_dict(state_dict, config)
    checkpoint.save(converted, args.output)
    kind = 'fused' if is_fused(converted) else 'unfused'
    print(f'{args.output}: {len(converted)} tensors ({kind}), {sum(v.size for v in converted.values()):,} values')


if __name__ == '__main__':
    run_program(main)
