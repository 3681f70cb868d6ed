"""Schedules as pure functions of the global step (`Schedule`), optimizers (`build_optimizer`), EMA (`ModelEma`)."""
import copy
import math

import paddle

from utils import UserError, blend, first_few, mismatches

# optimizer state per parameter, under Paddle's names
STATES = {'sgd': ['velocity'], 'adamw': ['moment1', 'moment2', 'beta1_pow_acc', 'beta2_pow_acc']}


def warmup_cosine(step, total_steps, warmup_steps, base, start, end):
    """Return the value at optimizer step `step` (from 0): linear warm-up from `start` to `base`, then cosine to `end`.

    The warm-up takes `warmup_steps` steps; the cosine reaches `end` after the last step (arXiv 1608.03983, without
    restarts).
    """
    if step < warmup_steps:
        return start + (base - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return end + (base - end) * 0.5 * (1 + math.cos(math.pi * min(1, progress)))


class Schedule:
    """Learning rate, weight decay and EMA decay of a run at optimizer step `step` (from 0).

    total_batch: images per step. The config's values are for a total batch of TRAIN.LINEAR_SCALED_LR: from there,
    learning rates scale linearly (arXiv 1706.02677), and the EMA decays per image, not per step (arXiv 2307.13813).
    """

    def __init__(self, config, steps_per_epoch, total_batch):
        train = config.TRAIN
        scale = total_batch / train.LINEAR_SCALED_LR if train.LINEAR_SCALED_LR else 1.0
        self.steps_per_epoch, self.total_batch = steps_per_epoch, total_batch
        self.total_steps = train.NUM_EPOCHS * steps_per_epoch
        warmup_epochs = min(train.WARMUP_EPOCHS, train.NUM_EPOCHS - 1)
        self.warmup_steps = warmup_epochs * steps_per_epoch
        self.warmup = f'{warmup_epochs} epochs of warm-up'
        if warmup_epochs < train.WARMUP_EPOCHS:
            self.warmup += f' (TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS}, cut for TRAIN.NUM_EPOCHS {train.NUM_EPOCHS})'
        self.base, self.start, self.end = (scale * lr for lr in (train.BASE_LR, train.WARMUP_START_LR, train.END_LR))
        self.decay = train.WEIGHT_DECAY
        self.end_decay = train.END_WEIGHT_DECAY if train.END_WEIGHT_DECAY >= 0 else train.WEIGHT_DECAY
        self.max_ema_decay = train.MODEL_EMA_DECAY ** scale

    def __str__(self):
        return (f'{self.total_steps} steps of {self.total_batch} images, {self.steps_per_epoch} per epoch; learning '
                f'rate up to {self.base:g} after {self.warmup}, weight decay {self.decay:g} to {self.end_decay:g}, EMA '
                f'decay up to {self.max_ema_decay:g}')

    def lr(self, step):
        return warmup_cosine(step, self.total_steps, self.warmup_steps, self.base, self.start, self.end)

    def weight_decay(self, step):
        return warmup_cosine(step, self.total_steps, 0, self.decay, self.decay, self.end_decay)

    def ema_decay(self, step):
        """Return the EMA decay, ramped up at first so that the random initial weights are soon forgotten."""
        return min(self.max_ema_decay, (1 + step) / (10 + step))


def build_schedule(config, sampler):
    """Return the Schedule for a config and a TrainSampler. A step takes a window of TRAIN.ACCUM_ITER batches.

    The last window of an epoch may be shorter. Raises: UserError for a window longer than an epoch.
    """
    window = config.TRAIN.ACCUM_ITER
    if window > len(sampler):
        raise UserError(f'TRAIN.ACCUM_ITER is {window}, but an epoch has only {len(sampler)} batches of '
                        f'{sampler.total_batch} images; lower it, or DATA.BATCH_SIZE')
    return Schedule(config, -(-len(sampler) // window), sampler.total_batch * window)


def parameter_groups(model):
    """Return (decayed, rest): weight decay applies to parameters with two or more dimensions, not to norms and biases.

    Split by shape, not by name: Paddle's parameter names never match the model's.
    """
    trainable = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    return [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]


def describe_groups(model):
    """Describe the size of both `parameter_groups` in one line."""
    decayed, rest = (f'{len(group)} tensors ({sum(p.size for p in group):,} parameters)'
                     for group in parameter_groups(model))
    return f'weight decay on {decayed}, none on {rest}'


def build_optimizer(config, model):
    """Build SGD with momentum or AdamW (TRAIN.OPTIMIZER), with weight decay only on the first of `parameter_groups`.

    config: resolved, so that its TRAIN.OPTIMIZER.NAME is one of the two. The learning rate is set before each step,
    with `optimizer.set_lr`.
    """
    options = config.TRAIN.OPTIMIZER
    decayed, rest = parameter_groups(model)
    # floats: Paddle rejects an int 0
    groups = [{'params': decayed, 'weight_decay': float(config.TRAIN.WEIGHT_DECAY)},
              {'params': rest, 'weight_decay': 0.0}]
    if options.NAME.lower() == 'sgd':
        return paddle.optimizer.Momentum(learning_rate=0.0, momentum=options.MOMENTUM, parameters=groups,
                                         use_nesterov=options.NESTEROV, use_multi_tensor=True)
    return paddle.optimizer.AdamW(learning_rate=0.0, beta1=options.BETAS[0], beta2=options.BETAS[1],
                                  epsilon=options.EPS, parameters=groups)


def set_weight_decay(optimizer, value):
    """Set the weight decay of the decayed group from the next step on.

    Uses private fields, because Paddle has no public API for this. AdamW reads its field at every step; Momentum
    copies its field for each tensor at the first step (2.6.2 and 3.3.1; a test covers both optimizers).
    """
    decayed = optimizer._param_groups[0]
    if isinstance(optimizer, paddle.optimizer.Momentum):
        decayed['regularization_coeff'] = value
        for groups in optimizer._regularization_coeff_dict.values():
            groups[0][:] = [value] * len(groups[0])
    else:
        decayed['weight_decay'] = value


def _states(optimizer, model):
    """Yield (our name, Paddle's name, shape) for each tensor of an optimizer's state.

    Our names extend the model's (fc.weight.velocity). Paddle's contain a count of the layers built so far in the
    process, so a second model gets different ones.
    """
    kind = 'sgd' if isinstance(optimizer, paddle.optimizer.Momentum) else 'adamw'
    for name, parameter in model.named_parameters():
        if not parameter.stop_gradient:
            for state in STATES[kind]:
                shape = [1] if state.endswith('_pow_acc') else list(parameter.shape)
                yield f'{name}.{state}', f'{parameter.name}_{state}_0', shape


def optimizer_state(optimizer, model):
    """Return the state of a model's optimizer as {name: tensor}; empty before the first step."""
    state = optimizer.state_dict()
    # between a resume and the first step the state holds the loaded arrays (3.3.1) or is empty (2.6.2)
    if not state:
        return {}
    return {ours: state[theirs] if isinstance(state[theirs], paddle.Tensor) else paddle.to_tensor(state[theirs])
            for ours, theirs, _ in _states(optimizer, model)}


def load_optimizer_state(optimizer, model, state, path):
    """Load the arrays of `optimizer_state` into a new optimizer. Names and shapes must match exactly.

    Raises: UserError that names `path` and the mismatches.
    """
    states = list(_states(optimizer, model))
    problems = mismatches({ours: f'{shape} float32' for ours, _, shape in states},
                       {ours: f'{list(array.shape)} {array.dtype}' for ours, array in state.items()})
    if problems:
        raise UserError(f'{path}: its optimizer state does not match: {first_few(problems)}; resume with the '
                        'TRAIN.OPTIMIZER, TRAIN.FREEZE and network of that run')
    optimizer.set_state_dict({theirs: state[ours] for ours, theirs, _ in states})


class ModelEma:
    """Exponential moving average of a model's state, batch-norm statistics included, except of frozen layers.

    network: a copy of the model, in evaluation mode, whose tensors are the average. Create it after loading weights.
    """

    def __init__(self, model):
        self.network = copy.deepcopy(model)
        self.network.eval()
        for parameter in self.network.parameters():
            parameter.stop_gradient = True
        # collect the tensors once, not at each step: loading and training change them in place. Leave frozen layers
        # out, because averaging equal values may change their last bit. A layer's batch-norm statistics, which are
        # parameters too, are averaged if any other parameter of the layer trains
        own = model.state_dict()
        training = {id(tensor) for layer in model.sublayers(include_self=True)
                    if any(not tensor.stop_gradient for tensor in layer.parameters(include_sublayers=False))
                    for tensor in layer.parameters(include_sublayers=False)}
        self.averages, self.tensors = zip(*((average, own[name]) for name, average in self.network.state_dict().items()
                                            if id(own[name]) in training))

    def update(self, decay):
        """average = decay * average + (1 - decay) * model, in place, in one operator."""
        blend(self.averages, self.tensors, decay)
