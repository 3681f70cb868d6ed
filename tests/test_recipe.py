"""The recipe: schedules and curriculum, whether training follows them, what tools.show_recipe prints; distillation."""
import json
import math

import numpy as np
import paddle
import pytest
from conftest import ROOT, STAGES, fails, options, records, run

import engine
from config import get_config, resolve_config, with_values
from datasets import Stage, describe_curriculum, get_dataset, get_stage
from mobileone import build_mobileone
from run import build_criterion, build_loader, build_training
from run import run as train
from runtime import checkpoint
from tools.show_recipe import get_recipe
from weights import load_weights

CONFIGS = sorted((ROOT / 'configs').glob('*.yaml'))
IMAGES = 1281167


def recipe_of(name, world_size=8):
    return get_recipe(resolve_config(get_config(str(ROOT / f'configs/{name}.yaml'))), IMAGES, world_size)


@pytest.mark.parametrize('variant', range(5))
def test_the_papers_recipe(variant):
    rows = recipe_of(f'mobileone_s{variant}')
    assert [row['epoch'] for row in rows] == list(range(1, 301))
    assert {row['steps'] for row in rows} == {IMAGES // 256}
    assert list(rows[0]) == ['epoch', 'lr', 'weight_decay', 'image_size', 'auto_augment_strength', 'ema_decay', 'steps']
    by_epoch = {row['epoch']: row for row in rows}
    # the warm-up ends with epoch 5, then the cosine starts
    assert [by_epoch[epoch]['lr'] for epoch in (1, 2, 6)] == pytest.approx([0.0002, 0.0002 + 0.0998 / 5, 0.1])
    # the middle of the cosine's 295 epochs is the middle of epoch 153
    assert (by_epoch[153]['lr'] + by_epoch[154]['lr']) / 2 == pytest.approx(0.0501, rel=1e-4)
    last = 0.0002 + 0.0998 * (1 + math.cos(math.pi * 294 / 295)) / 2
    assert by_epoch[300]['lr'] == pytest.approx(last)
    # weight decay falls from the first step on
    assert by_epoch[1]['weight_decay'] == 1e-4
    assert by_epoch[6]['weight_decay'] == pytest.approx(1e-5 + 9e-5 * (1 + math.cos(math.pi * 5 / 300)) / 2)
    assert by_epoch[151]['weight_decay'] == pytest.approx(5.5e-5)
    assert by_epoch[300]['weight_decay'] == pytest.approx(1e-5, rel=1e-3)
    assert (by_epoch[1]['ema_decay'], by_epoch[300]['ema_decay']) == (0.1, 0.9995)
    assert by_epoch[2]['ema_decay'] == pytest.approx((1 + 5004) / (10 + 5004))
    stages = [(row['image_size'], row['auto_augment_strength']) for row in rows]
    if variant < 2:
        assert set(stages) == {(224, 0.0)}
    else:
        assert stages == [(160, 0.3)] * 39 + [(192, 0.7)] * 75 + [(224, 1.0)] * 186
    config = get_config(str(ROOT / f'configs/mobileone_s{variant}.yaml')).TRAIN
    assert (config.OPTIMIZER.NAME, config.OPTIMIZER.MOMENTUM, config.SMOOTHING) == ('SGD', 0.9, 0.1)
    assert config.MODEL_EMA and config.AUTO_AUGMENT == (variant >= 2)
    for name in ('MIXUP_ALPHA', 'CUTMIX_ALPHA', 'COLOR_JITTER', 'RAND_AUGMENT', 'RANDOM_ERASE_PROB', 'GRAD_CLIP'):
        assert not config[name]
    assert config.CUTMIX_MINMAX == [0.0, 0.0]


def test_recipe_with_a_larger_batch():
    rows = recipe_of('mobileone_s0', 16)
    assert rows[5]['lr'] == pytest.approx(0.2) and rows[0]['steps'] == IMAGES // 512
    assert rows[0]['weight_decay'] == 1e-4 and rows[-1]['ema_decay'] == pytest.approx(0.9995 ** 2)


def test_stages():
    config = get_config()
    assert get_stage(config, 1) == get_stage(config, 300) == Stage(224, 0.0)
    config.TRAIN.AUTO_AUGMENT = True
    assert get_stage(config, 7) == Stage(224, 1.0)
    config.TRAIN.CURRICULUM = STAGES
    assert [get_stage(config, epoch) for epoch in (1, 2, 3, 4, 300)] == [Stage(24, 0.3)] * 2 + [Stage(32, 1.0)] * 3


@pytest.fixture
def curriculum(config, fashion, tmp_path):
    """The config of a run of 4 epochs with 3 steps each, in which everything that can vary between epochs does."""
    config.DATA.DATA_PATH, config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS = str(fashion), 16, 0
    config.SAVE = str(tmp_path / 'run')
    config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.VALIDATE_FREQ = 4, 1, 4
    config.TRAIN.WEIGHT_DECAY, config.TRAIN.END_WEIGHT_DECAY = 0.1, 0.01
    config.TRAIN.AUTO_AUGMENT, config.TRAIN.CURRICULUM = True, STAGES
    return config


def test_describe_curriculum(curriculum):
    line = describe_curriculum(curriculum)
    assert line == ('curriculum: from epoch 1: 24 pixels, AutoAugment 0.3; from epoch 3: 32 pixels, AutoAugment 1; '
                    'evaluation at 32 pixels')
    curriculum.TRAIN.NUM_EPOCHS = 2
    assert describe_curriculum(curriculum) == (
        line + '; TRAIN.NUM_EPOCHS is 2, so the stages from epoch 3 on are not reached')


def watched(monkeypatch, config):
    """Run a training. Returns: what each step actually used, and the (epoch, strength) of each loader created."""
    steps, loaders = [], []
    train_step = engine.train_step

    def step(training, batches, number):
        result = train_step(training, batches, number)
        steps.append({'step': number, 'lr': training.optimizer.get_lr(),
                      'weight_decay': training.optimizer._param_groups[0]['regularization_coeff'],
                      'image_size': batches[0][0].shape[1]})
        return result

    def dataset(config, is_train, epoch=1):
        made = get_dataset(config, is_train, epoch)
        if is_train:
            loaders.append((epoch, made.transform.augmentations[0].strength))
        return made
    monkeypatch.setattr(engine, 'train_step', step)
    monkeypatch.setattr('run.get_dataset', dataset)
    train(config)
    return steps, loaders


def test_training_follows_the_printed_recipe(curriculum, monkeypatch):
    rows = get_recipe(resolve_config(curriculum), 60, 1)
    steps, loaders = watched(monkeypatch, curriculum)
    with open(curriculum.SAVE + '/log.txt', encoding='utf-8') as file:
        log = file.read()
    assert describe_curriculum(curriculum) in log and 'weight decay 0.1 to 0.01, EMA' in log
    assert [step['step'] for step in steps] == list(range(12)) and [row['steps'] for row in rows] == [3] * 4
    for row, step in zip(rows, steps[::3]):
        assert {key: step[key] for key in ('lr', 'weight_decay', 'image_size')} == {
            key: row[key] for key in ('lr', 'weight_decay', 'image_size')}
    assert [step['image_size'] for step in steps] == [24] * 6 + [32] * 6
    assert loaders == [(1, 0.3), (3, 1.0)]  # one loader per stage
    log = [row for row in records(curriculum.SAVE) if row['split'] == 'train']
    assert [row['image_size'] for row in log] == [row['image_size'] for row in rows] == [24, 24, 32, 32]
    assert [row['lr'] for row in log] == [step['lr'] for step in steps[2::3]]
    assert [row['weight_decay'] for row in log] == [step['weight_decay'] for step in steps[2::3]]
    assert {row['image_size'] for row in records(curriculum.SAVE) if row['split'] == 'val'} == {32}


@pytest.mark.parametrize('done, sizes', [(1, [24, 32, 32]), (2, [32, 32]), (3, [32])])
def test_last_epoch_starts_in_the_right_stage(curriculum, monkeypatch, done, sizes):
    curriculum.TRAIN.LAST_EPOCH = done
    steps, _ = watched(monkeypatch, curriculum)
    assert [step['image_size'] for step in steps[::3]] == sizes
    assert steps[0]['step'] == 3 * done


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
@pytest.mark.parametrize('decay, end', [(0.5, 0.1), (0.0, 0.4), (0.3, 0.0)])
def test_each_step_uses_its_scheduled_weight_decay(curriculum, optimizer, decay, end):
    """With zero gradients, weights shrink by lr times this step's decay, and no other parameter changes."""
    curriculum.TRAIN.OPTIMIZER.NAME, curriculum.TRAIN.OPTIMIZER.MOMENTUM = optimizer, 0.0
    curriculum.TRAIN.WEIGHT_DECAY, curriculum.TRAIN.END_WEIGHT_DECAY = decay, end
    loader = build_loader(curriculum, True)
    training = build_training(curriculum, build_mobileone(curriculum), loader)
    training.criterion = lambda inputs, logits, targets: 0 * logits.sum()
    batches = list(loader)[:1]
    parameters = {name: p for name, p in training.model.named_parameters() if not p.stop_gradient}
    for step in (3, 6, 11):
        before = {name: p.numpy() for name, p in parameters.items()}
        engine.train_step(training, batches, step)
        value = end + (decay - end) * (1 + math.cos(math.pi * step / 12)) / 2
        for name, parameter in parameters.items():
            factor = 1 - training.schedule.lr(step) * value if parameter.ndim > 1 else 1
            np.testing.assert_allclose(parameter.numpy(), before[name] * factor, rtol=2e-6, atol=1e-9, err_msg=name)


OFF = {'DATA.CROP_SCALE': [1.0, 1.0]}
ERASE, MIX = {'TRAIN.RANDOM_ERASE_PROB': 1.0}, {'TRAIN.MIXUP_ALPHA': 1.0, 'TRAIN.CUTMIX_ALPHA': 1.0}
RAND = {'TRAIN.RAND_AUGMENT': True}
AUTO = {'TRAIN.AUTO_AUGMENT': True}


@pytest.mark.parametrize('base, values', [
    ({}, {'TRAIN.AUTO_AUGMENT': True}),
    (AUTO, {'TRAIN.CURRICULUM': [{'EPOCH': 1, 'IMAGE_SIZE': 32, 'AUTO_AUGMENT_STRENGTH': 0.2}]}),
    (AUTO, {'TRAIN.CURRICULUM': [{'EPOCH': 1, 'IMAGE_SIZE': 48, 'AUTO_AUGMENT_STRENGTH': 1.0}]}),
    ({}, RAND),
    (RAND, {'TRAIN.RAND_AUGMENT_LAYERS': 4}),
    (RAND, {'TRAIN.RAND_AUGMENT_MAGNITUDE': 2}),
    ({}, {'TRAIN.COLOR_JITTER': 0.4}),
    (AUTO, {'TRAIN.COLOR_JITTER': 0.4}),
    ({}, ERASE),
    (ERASE, {'TRAIN.RANDOM_ERASE_PROB': 0.2}),
    (ERASE, {'TRAIN.RANDOM_ERASE_MODE': 'const'}),
    (ERASE, {'TRAIN.RANDOM_ERASE_MODE': 'rand'}),
    (ERASE, {'TRAIN.RANDOM_ERASE_COUNT': 4}),
    ({}, {'TRAIN.MIXUP_ALPHA': 0.4}),
    ({}, {'TRAIN.CUTMIX_ALPHA': 0.4}),
    ({}, {'TRAIN.CUTMIX_MINMAX': [0.2, 0.4]}),
    (MIX, {'TRAIN.MIXUP_PROB': 0.0}),
    ({**MIX, 'TRAIN.MIXUP_SWITCH_PROB': 0.0}, {'TRAIN.MIXUP_SWITCH_PROB': 1.0}),
    (MIX, {'TRAIN.MIXUP_MODE': 'elem'}),
    (MIX, {'TRAIN.MIXUP_MODE': 'pair'}),
    ({}, {'DATA.CROP_SCALE': [0.1, 0.2]}),
    ({}, {'DATA.INTERPOLATION': 'nearest'}),
], ids=lambda values: ','.join(values) if isinstance(values, dict) else '')
def test_each_option_changes_the_pixels_that_reach_the_network(config, fashion, base, values):
    config.DATA.DATA_PATH, config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS = str(fashion), 16, 0
    config.TRAIN.LINEAR_SCALED_LR = 0
    seen = []
    for changes in (OFF | base, OFF | base, OFF | base | values):
        changed = resolve_config(with_values(config, changes))
        loader = build_loader(changed, True)
        training = build_training(changed, build_mobileone(changed), loader)
        network = training.network
        training.network = lambda inputs, network=network: seen.append(inputs.numpy()) or network(inputs)
        engine.train_step(training, list(loader)[:1], 1)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert seen[0].shape != seen[2].shape or (seen[0] != seen[2]).any()


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_two_steps_of_each_stage(path, fashion):
    """Each config keeps its network, image sizes and options, but trains on two images per batch."""
    config = get_config(str(path))
    config.DATA.DATA_PATH, config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS = str(fashion), 2, 0
    config.MODEL.NUM_CLASSES = max(10, config.MODEL.NUM_CLASSES)
    config = resolve_config(config)
    rows = get_recipe(config, 60, 1)
    assert len(rows) == config.TRAIN.NUM_EPOCHS
    model = build_mobileone(config)
    starts = [stage['EPOCH'] for stage in config.TRAIN.CURRICULUM] or [1]
    training = build_training(config, model, build_loader(config, True))
    for epoch in starts:
        loader = build_loader(config, True, epoch)
        loader.batch_sampler.set_epoch(epoch)
        for step, batch in enumerate(loader):
            assert batch[0].shape == [2, *[rows[epoch - 1]['image_size']] * 2, 3]
            before = model.fc.weight.numpy()
            sums = engine.train_step(training, [batch], (epoch - 1) * 30 + step)
            assert np.isfinite(sums.numpy()).all() and (model.fc.weight.numpy() != before).any()
            if step == 1:
                break


def test_show_recipe(tmp_path):
    args = ['-m', 'tools.show_recipe', '-cfg', 'configs/mobileone_s2.yaml', '-num_images', '1000', '-world_size', '2']
    out = run(*args, '-json', tmp_path / 'x.json', '-opts', 'TRAIN.NUM_EPOCHS', '150', 'DATA.BATCH_SIZE', '10').stdout
    rows = json.loads((tmp_path / 'x.json').read_text())
    assert len(rows) == 150 and rows[0]['steps'] == 50 and rows[114]['image_size'] == 224
    lines = out.splitlines()
    assert 'AutoAugment' in out and 'SGD, momentum 0.9' in out and 'label smoothing 0.1' in out
    table = [line.split() for line in lines[-150:]]
    for row, cells in zip(rows, table):
        assert [float(cell) for cell in cells] == pytest.approx([
            row['epoch'], row['lr'], row['weight_decay'], row['image_size'], row['auto_augment_strength'],
            row['ema_decay'], row['steps']], rel=1e-5)
    config = with_values(get_config(str(ROOT / 'configs/mobileone_s2.yaml')),
                         {'TRAIN.NUM_EPOCHS': 150, 'DATA.BATCH_SIZE': 10})
    assert rows == get_recipe(config, 1000, 2)
    everything = ['-opts', 'TRAIN.OPTIMIZER.NAME', 'AdamW', 'TRAIN.COLOR_JITTER', '0.4', 'TRAIN.RANDOM_ERASE_PROB',
                  '0.25', 'TRAIN.MIXUP_ALPHA', '0.2', 'TRAIN.CUTMIX_ALPHA', '1', 'TRAIN.GRAD_CLIP', '5',
                  'TRAIN.MODEL_EMA', 'False', 'TRAIN.DISTILLATION.TYPE', 'soft', 'TRAIN.DISTILLATION.TEACHER_CFG', 'a',
                  'TRAIN.DISTILLATION.TEACHER_WEIGHTS', 'b.pdparams', 'AMP', 'True']
    out = run(*args, *everything).stdout
    for words in ('AdamW, betas [0.9, 0.999]', 'color jitter 0.4', 'random erasing 0.25 (pixel)', 'mixup 0.2',
                  'CutMix', 'clipped at 5', 'AMP O1 float16', 'distillation soft from b.pdparams', ' off '):
        assert words in out
    out = run(*args, '-opts', 'EVAL', 'True', 'TRAIN.DISTILLATION.TYPE', 'hard', *everything[-6:-2]).stdout
    assert 'distillation hard from b.pdparams, alpha 0.5\n' in out and len(out.splitlines()) == 306
    assert 'TRAIN.LAST_EPOCH is 600' in fails(*args, '-opts', 'EVAL', 'True', 'TRAIN.LAST_EPOCH', '600')
    assert 'must be at least 1' in fails(*args, '-world_size', '0')
    assert 'TRAIN.ACCUM_ITER is 600, but an epoch has only 15 batches of 64' in fails(*args, '-accum_iter', '600')
    assert 'too few for 2000 processes' in fails(*args, '-world_size', '2000')
    assert 'TRAIN.CURRICULUM[1]' in fails(*args, '-opts', 'TRAIN.CURRICULUM', str(2 * STAGES[:1]))


@pytest.fixture(scope='module')
def teacher(fashion, tmp_path_factory):
    """Config and weights of a narrow network trained for one epoch. The config's training keys must be ignored."""
    folder = tmp_path_factory.mktemp('teacher')
    run('main_single_gpu.py', '-output', folder, *options(fashion, 'TRAIN.NUM_EPOCHS', '1'))
    path = folder / 'teacher.yaml'
    path.write_text('BASE: config.yaml\nMODEL: {RESUME: auto, PRETRAINED: x}\n'
                    'TRAIN: {LAST_EPOCH: 9, DISTILLATION: {TYPE: soft}}\n')
    return path, folder / 'best.pdparams'


def distilled(fashion, teacher, *more):
    return options(fashion, 'TRAIN.NUM_EPOCHS', '2', 'TRAIN.DISTILLATION.TEACHER_CFG', teacher[0],
                   'TRAIN.DISTILLATION.TEACHER_WEIGHTS', teacher[1], 'MODEL.NUM_BRANCHES', '[1,1,1,1,1]', *more)


@pytest.mark.parametrize('kind', ['soft', 'Hard'])
def test_distillation(fashion, teacher, tmp_path, kind):
    opts = distilled(fashion, teacher, 'TRAIN.DISTILLATION.TYPE', kind)
    out = run('main_single_gpu.py', '-output', tmp_path / 'a', *opts).stdout
    assert f'loaded EMA weights (unfused) from {teacher[1]}' in out and 'fused the branches' in out
    run('main_single_gpu.py', '-output', tmp_path / 'b', *opts, 'TRAIN.DISTILLATION.ALPHA', '0')
    run('main_single_gpu.py', '-output', tmp_path / 'c', *opts, 'TRAIN.DISTILLATION.TYPE', 'none')
    a, b, c = ([row['loss'] for row in records(tmp_path / name)] for name in 'abc')
    assert a[0] != b[0] and b == c  # with alpha 0 the teacher has no effect
    state = checkpoint.load(str(tmp_path / 'a/latest.pdparams'))
    assert set(state['model']) == set(build_mobileone(get_config(str(tmp_path / 'a/config.yaml'))).state_dict())


def test_tau_and_the_teacher_reach_the_loss(config, fashion, teacher):
    config.DATA.DATA_PATH, config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS = str(fashion), 16, 0
    config.TRAIN.NUM_EPOCHS = 10
    options = config.TRAIN.DISTILLATION
    options.TYPE, options.TEACHER_CFG, options.TEACHER_WEIGHTS = 'SOFT', str(teacher[0]), str(teacher[1])
    options.ALPHA, options.TAU = 0.25, 3.0
    criterion = build_criterion(resolve_config(config), False)
    assert (criterion.distillation_type, criterion.alpha, criterion.tau) == ('soft', 0.25, 3.0)
    assert not any('blocks' in name for name in criterion.teacher_model.state_dict())
    images = paddle.randn([2, 3, 32, 32])
    own = build_mobileone(get_config(str(teacher[0])))
    own.set_state_dict(load_weights(str(teacher[1]))[0])
    own.eval()
    criterion.teacher_model.eval()
    np.testing.assert_allclose(criterion.teacher_model(images), own(images), rtol=1e-3, atol=1e-4)


def test_teacher_and_student_get_the_same_inputs(config, fashion):
    """Both get the erased and mixed images, with the matching targets."""
    config.DATA.DATA_PATH, config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS = str(fashion), 16, 0
    config.TRAIN.RANDOM_ERASE_PROB = config.TRAIN.MIXUP_ALPHA = 1.0
    loader = build_loader(config, True)
    training = build_training(config, build_mobileone(config), loader)
    network, criterion, seen = training.network, training.criterion, []
    training.network = lambda inputs: seen.append(inputs) or network(inputs)
    training.criterion = lambda *args: seen.extend(args) or criterion(*args)
    engine.train_step(training, list(loader)[:1], 1)
    to_network, to_teacher, logits, targets = seen
    assert to_network is to_teacher and logits.shape == targets.shape == [16, 10]


def test_mismatched_teachers_are_rejected(fashion, teacher, tmp_path):
    def message(*more):
        return fails('main_single_gpu.py', '-output', tmp_path / 'x',
                     *distilled(fashion, teacher, 'TRAIN.DISTILLATION.TYPE', 'soft', *more))
    assert 'nowhere.pdparams: no such weight file' in message('TRAIN.DISTILLATION.TEACHER_WEIGHTS', 'nowhere.pdparams')
    assert 'nowhere.yaml: cannot read the config file' in message('TRAIN.DISTILLATION.TEACHER_CFG', 'nowhere.yaml')
    assert 'MODEL.NUM_CLASSES is 10 for the teacher, 12 for the student' in message('MODEL.NUM_CLASSES', '12')
    assert 'DATA.IMAGENET_MEAN is' in message('DATA.IMAGENET_MEAN', '[0.5,0.5,0.5]')
    assert 'DATA.IMAGENET_STD is' in message('DATA.IMAGENET_STD', '[0.5,0.5,0.5]')
    other = tmp_path / 'other.yaml'
    other.write_text(f'BASE: {teacher[0]}\nTRAIN: {{SMOOTHING: 3}}\n')
    assert 'the teacher (TRAIN.DISTILLATION): TRAIN.SMOOTHING is 3.0' in message(
        'TRAIN.DISTILLATION.TEACHER_CFG', other)
    assert 'there is no teacher: set TEACHER_CFG and TEACHER_WEIGHTS' in message('TRAIN.DISTILLATION.TEACHER_CFG', '')
    assert not (tmp_path / 'x').exists()
    other.write_text(f'BASE: {teacher[0]}\nMODEL: {{CHANNELS: [4, 4, 8, 8, 12]}}\n')
    assert 'does not fit the network of the config' in message('TRAIN.DISTILLATION.TEACHER_CFG', other)


def test_plot_of_the_recipe(tmp_path):
    pytest.importorskip('matplotlib', reason='drawing is an optional extra')
    run('-m', 'tools.show_recipe', '-cfg', 'configs/demo.yaml', '-plot', tmp_path / 'x.png')
    assert (tmp_path / 'x.png').read_bytes()[:4] == b'\x89PNG'
