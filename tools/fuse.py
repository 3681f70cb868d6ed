"""Fuse trained weights into the plain network, verify that its outputs are the same, and save the fused weights.

  python -m tools.fuse -cfg configs/demo.yaml -pretrained output/demo/best.pdparams -save output/demo/fused.pdparams

-pretrained is an unfused weight file or a training checkpoint (its EMA weights, if it has any). Both networks are run
on the val list of DATA.DATA_PATH or -data_path; the table compares their accuracy, parameters, and latency on this
machine, and the last line reports the largest difference between their logits. With -no_data, random images replace the
val list, and no accuracy is shown. The saved file works with `-eval -pretrained`.
"""
import filecmp
import os
import time

import numpy as np

from config import get_config, get_parser, resolve_config, update_config
from runtime.files import CLASS_NAMES, copy
from runtime.program import prepare_runtime, run_program, use_device
from runtime.settings import add_device_flag
from utils import UserError, setup_logger


def count_parameters(model):
    """Return the number of trainable parameters; batch-norm statistics do not count."""
    return sum(p.size for p in model.parameters() if not p.stop_gradient)


def latencies(models, size, batch, repeats=20):
    """Return each model's median forward time in seconds per image, measured alternately on the current device."""
    import paddle
    images = paddle.randn([batch, 3, size, size])
    seconds = [[] for _ in models]
    with paddle.no_grad():
        for repeat in range(repeats + 3):
            for model, times in zip(models, seconds):
                start = time.perf_counter()
                model(images).numpy()  # waits for the device
                if repeat >= 3:  # the first three warm up
                    times.append(time.perf_counter() - start)
    return [float(np.median(times)) / batch for times in seconds]


def largest_difference(models, batches, normalize):
    """Compare the logits of two models over batches of uint8 images [N, H, W, 3].

    Returns: (largest absolute difference, largest absolute logit of the first model).
    """
    import paddle
    largest = np.zeros(2)
    with paddle.no_grad():
        for images in map(normalize, batches):
            first, second = (model(images) for model in models)
            largest = np.maximum(largest, [float((first - second).abs().max()), float(first.abs().max())])
    return largest


def compare(models, loader, config):
    """Print a table that compares an unfused and a fused network, and the largest difference between their logits.

    models: (unfused, fused). loader: the val images; None: random images.
    """
    import paddle

    from engine import evaluate
    from transforms import Normalize
    size, normalize = config.DATA.IMAGE_SIZE, Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)

    def show(*row):
        print('{:18}{:>16}{:>16}'.format(*row), flush=True)
    names = 'unfused', 'fused'
    show('', *names)
    if loader:
        metrics = evaluate(list(zip(names, models)), loader, normalize, config.REPORT_FREQ).values()
        show('top-1 accuracy', *(f'{m.acc1:.2f}%' for m in metrics))
        if config.MODEL.NUM_CLASSES > 5:
            show('top-5 accuracy', *(f'{m.acc5:.2f}%' for m in metrics))
        batches, compared = (images for images, _ in loader), f'{len(loader.dataset)} val images'
    else:
        paddle.seed(config.SEED)
        batches, compared = [paddle.randint(0, 256, [8, size, size, 3]).astype('uint8')], '8 random images'
    show('parameters', *(f'{count_parameters(model):,}' for model in models))
    for batch in (1, 32):
        times = latencies(models, size, batch)
        show(f'latency, batch {batch}', *(f'{1000 * t:.2f} ms/image' for t in times))
    difference, largest = largest_difference(models, batches, normalize)
    print(f'largest logit difference {difference:.2g} of logits up to {largest:.3g} on {compared}, {size}x{size}, '
          f'{paddle.device.get_device()}')


def check_class_names(source, target):
    """Check that no other class_names.txt is next to the fused weights: predictions would use its names.

    Raises: UserError if `target` exists and is not a copy of `source`.
    """
    if os.path.lexists(target) and not os.path.isfile(source):
        raise UserError(f'{target}: names classes, but {source} is missing; choose another folder for -save')
    if os.path.lexists(target) and not filecmp.cmp(source, target, shallow=False):
        raise UserError(f'{target}: names different classes than {source}; choose another folder for -save')


def main():
    parser = get_parser(__doc__, ['data_path', 'image_size', 'pretrained'])
    parser.add_argument('-save', metavar='FILE', help='write the fused weights to this .pdparams or .safetensors')
    parser.add_argument('-no_data', action='store_true', help='compare on random images instead of a dataset')
    add_device_flag(parser)
    args = parser.parse_args()
    if not args.pretrained:  # not from the config, which may name the weights that a run started from
        raise UserError('-pretrained is needed: the weights to fuse')
    config = update_config(get_config(), args)
    config.EVAL, config.MODEL.DEPLOY = True, False
    config = resolve_config(config)
    if args.save and os.path.realpath(args.save) == os.path.realpath(config.MODEL.PRETRAINED):
        raise UserError(f'-save {args.save} would replace the unfused weights, which cannot be recovered: choose '
                        'another name')
    prepare_runtime(args.device)
    from datasets import get_dataloader, get_dataset
    from mobileone import model_convert
    from runtime import checkpoint
    from weights import is_fused, load_model, with_classes_of
    use_device(args.device)
    config = with_classes_of(config, config.MODEL.PRETRAINED)
    loader = None if args.no_data else get_dataloader(config, get_dataset(config, False), False)
    setup_logger()
    model, _ = load_model(config, config.MODEL.PRETRAINED)
    if is_fused(model.state_dict()):
        raise UserError(f'{config.MODEL.PRETRAINED}: already fused; give the unfused weights')
    model.eval()
    fused = model_convert(model)
    if args.save:
        source, target = (os.path.join(os.path.dirname(path), CLASS_NAMES)
                          for path in (config.MODEL.PRETRAINED, args.save))
        check_class_names(source, target)
        checkpoint.save(fused.state_dict(), args.save)
        if os.path.isfile(source) and not os.path.exists(target):
            copy(source, target)
    compare([model, fused], loader, config)
    if args.save:
        print(f'fused weights: {args.save}')


if __name__ == '__main__':
    run_program(main)
