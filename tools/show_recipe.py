"""Show what a training run will do in each epoch. Needs no data.

  python -m tools.show_recipe -cfg configs/mobileone_s2.yaml
  python -m tools.show_recipe -cfg configs/mobileone_s2.yaml -plot recipe.png -json recipe.json
  python -m tools.show_recipe -cfg configs/demo.yaml -num_images 5000 -world_size 1

The values are those of the first step of each epoch, computed by the functions that training uses.
"""
import json

from config import get_config, get_parser, resolve_config, update_config, with_values
from runtime.files import replace, write_text
from runtime.program import prepare_runtime, run_program
from tools import import_pyplot
from utils import UserError

# fields that are plotted -> titles
TITLES = {'lr': 'learning rate', 'weight_decay': 'weight decay', 'image_size': 'image size (pixels)',
          'auto_augment_strength': 'AutoAugment strength', 'ema_decay': 'EMA decay'}


def get_recipe(config, num_images, world_size):
    """Return a record per epoch: {epoch, lr, weight_decay, image_size, auto_augment_strength, ema_decay, steps}.

    ema_decay: None without an EMA; steps: number of optimizer steps in the epoch.
    """
    from datasets import TrainSampler, get_stage
    from optim import build_schedule

    schedule = build_schedule(config, TrainSampler(num_images, config.DATA.BATCH_SIZE, config.SEED, 0, world_size))
    rows = []
    for epoch in range(config.TRAIN.LAST_EPOCH + 1, config.TRAIN.NUM_EPOCHS + 1):
        step, stage = (epoch - 1) * schedule.steps_per_epoch, get_stage(config, epoch)
        rows.append({'epoch': epoch, 'lr': schedule.lr(step), 'weight_decay': schedule.weight_decay(step),
                     'image_size': stage.image_size, 'auto_augment_strength': stage.auto_augment_strength,
                     'ema_decay': schedule.ema_decay(step) if config.TRAIN.MODEL_EMA else None,
                     'steps': schedule.steps_per_epoch})
    return rows


def describe(config, num_images, world_size):
    """Return lines that describe what does not change between epochs."""
    data, train = config.DATA, config.TRAIN
    options, distillation = train.OPTIMIZER, train.DISTILLATION
    if options.NAME.lower() == 'sgd':
        optimizer = f'SGD, momentum {options.MOMENTUM:g}{", Nesterov" if options.NESTEROV else ""}'
    else:
        optimizer = f'AdamW, betas {options.BETAS}, epsilon {options.EPS:g}'
    teacher = f'{distillation.TYPE} from {distillation.TEACHER_WEIGHTS}, alpha {distillation.ALPHA:g}'
    if distillation.TYPE.lower() == 'soft':
        teacher += f', tau {distillation.TAU:g}'
    parts = {
        f'random crops of {data.CROP_SCALE[0]:g} to {data.CROP_SCALE[1]:g} of the area, flips': True,
        'AutoAugment': train.AUTO_AUGMENT,
        f'RandAugment ({train.RAND_AUGMENT_LAYERS} at {train.RAND_AUGMENT_MAGNITUDE})': train.RAND_AUGMENT,
        f'color jitter {train.COLOR_JITTER:g}': train.COLOR_JITTER,
        f'random erasing {train.RANDOM_ERASE_PROB:g} ({train.RANDOM_ERASE_MODE})': train.RANDOM_ERASE_PROB,
        f'mixup {train.MIXUP_ALPHA:g}': train.MIXUP_ALPHA * train.MIXUP_PROB,
        'CutMix': max(train.CUTMIX_ALPHA, *train.CUTMIX_MINMAX) * train.MIXUP_PROB,
    }
    return [
        f'{config.MODEL.NAME}: {train.NUM_EPOCHS} epochs of {num_images:,} images, each step {world_size} processes x '
        f'DATA.BATCH_SIZE {data.BATCH_SIZE} x TRAIN.ACCUM_ITER {train.ACCUM_ITER}',
        f'optimizer: {optimizer}, no weight decay on batch norm and biases; gradients '
        f'{f"clipped at {train.GRAD_CLIP:g}" if train.GRAD_CLIP else "not clipped"}; '
        f'AMP {f"{config.AMP_LEVEL} {config.AMP_DTYPE}" if config.AMP else "off"}',
        f'images: {", ".join(name for name, is_on in parts.items() if is_on)}; {data.INTERPOLATION}',
        f'loss: label smoothing {train.SMOOTHING:g}; distillation '
        f'{"none" if distillation.TYPE.lower() == "none" else teacher}',
        f'evaluation: {data.IMAGE_SIZE} pixels, crop {data.CROP_PCT:g}, {data.INTERPOLATION}',
    ]


def plot(rows, title, path):
    """Plot the values of a recipe over its epochs into a PNG file."""
    pyplot = import_pyplot()
    names = [name for name in TITLES if rows[0][name] is not None]
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), layout='constrained')
    for axis, name in zip(axes, names):
        axis.step([row['epoch'] for row in rows], [row[name] for row in rows], where='post')
        axis.set(title=TITLES[name], xlabel='epoch', ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    replace(path, lambda partial: figure.savefig(partial, dpi=110, format='png'))


def main():
    parser = get_parser(__doc__, ('batch_size', 'image_size', 'accum_iter', 'amp'))
    parser.add_argument('-num_images', metavar='N', type=int, default=1281167,
                        help="number of training images (default: ImageNet's 1281167)")
    parser.add_argument('-world_size', metavar='N', type=int, default=8, help='number of processes (default: 8)')
    parser.add_argument('-json', metavar='FILE', help='write a list with one record per epoch to this file')
    parser.add_argument('-plot', metavar='FILE', help='plot the values into this PNG (needs matplotlib)')
    args = parser.parse_args()
    config = resolve_config(with_values(update_config(get_config(), args), {'EVAL': False}))
    if min(args.num_images, args.world_size) < 1:
        raise UserError('-num_images and -world_size must be at least 1')
    prepare_runtime()
    rows = get_recipe(config, args.num_images, args.world_size)
    print('\n'.join(describe(config, args.num_images, args.world_size)))
    print('epoch  learning rate  weight decay  pixels  AutoAugment  EMA decay   steps')
    for row in rows:
        ema = 'off' if row['ema_decay'] is None else f'{row["ema_decay"]:.6f}'
        print(f'{row["epoch"]:5}  {row["lr"]:13.6g}  {row["weight_decay"]:12.6g}  {row["image_size"]:6}  '
              f'{row["auto_augment_strength"]:11g}  {ema:>9}  {row["steps"]:6}')
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1))
    if args.plot:
        plot(rows, config.MODEL.NAME, args.plot)


if __name__ == '__main__':
    run_program(main)
