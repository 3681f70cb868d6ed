"""MobileOne in PaddlePaddle ("An Improved One millisecond Mobile Backbone", arXiv 2206.04040).

During training, each layer is a sum of parallel branches (section 3.2, figure 3: k convolutions, a 1x1 "scale"
convolution and a batch-norm "skip"). For inference, the branches are fused into one convolution with a bias.

Fusion: `MobileOneBlock.equivalent_kernel_bias` computes that convolution, `MobileOneBlock.switch_to_deploy` replaces
a block's branches with it, and `model_convert` fuses a copy of a whole network. Training: a layer's convolutions share
their input, so `merged_branches` runs them as one convolution with stacked kernels.
"""
import contextlib
import copy
import functools
import math
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn as nn
import paddle.nn.functional as F

from config import stage_widths
from utils import UserError, blend


class ConvNorm(nn.Sequential):
    """A branch's convolution and batch norm or, with `norm=False`, a fused convolution with a bias.

    [N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride]
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1, norm=True):
        conv = nn.Conv2D(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2,
                         groups=groups, bias_attr=False if norm else None,
                         weight_attr=paddle.ParamAttr(initializer=nn.initializer.KaimingUniform()))
        layers = [('conv', conv)]
        if norm:
            layers.append(('norm', nn.BatchNorm2D(out_channels)))
        super().__init__(*layers)


class SEBlock(nn.Layer):
    """Squeeze-and-excitation (arXiv 1709.01507): scale each channel by a gate computed from the channel means.

    [N, channels, H, W] -> the same shape. ratio: bottleneck width as a fraction of the channels.
    """

    def __init__(self, channels, ratio=1 / 16):
        super().__init__()
        # at least one, so that networks narrower than the paper's can use SE
        bottleneck = max(1, int(channels * ratio))
        self.pool = nn.AdaptiveAvgPool2D(1)
        self.reduce = nn.Conv2D(channels, bottleneck, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2D(bottleneck, channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.expand(self.relu(self.reduce(self.pool(x)))))


class MobileOneBlock(nn.Layer):
    """A depthwise 3x3 layer and a pointwise 1x1 layer, each a sum of branches followed by optional SE and ReLU.

    [N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride]

    The branches are attributes of the block (`dw_...` and `pw_...`), named as in the released weights. Each layer has
    `num_branches` convolutions with batch norm, and a batch-norm "skip" if input and output have the same shape; the
    3x3 layer also has a 1x1 "scale" convolution with batch norm.

    deploy: build the fused block, with one convolution with a bias per layer.
    use_pw: False for the stem, which is a single dense 3x3 layer.
    """

    def __init__(self, in_channels, out_channels, num_branches=1, stride=1, use_se=False, deploy=False, use_pw=True):
        super().__init__()
        self.deploy = deploy
        # layer name -> MergedLayer, inside `merged_branches`
        self.merged = {}
        self.act = nn.ReLU()
        dw_channels = in_channels if use_pw else out_channels
        # layer name -> arguments of its convolution
        self.convs = {'dw_3x3': dict(in_channels=in_channels, out_channels=dw_channels, kernel_size=3, stride=stride,
                                     groups=in_channels if use_pw else 1)}
        if use_pw:
            self.convs['pw_1x1'] = dict(in_channels=dw_channels, out_channels=out_channels, kernel_size=1)
        for name, conv in self.convs.items():
            prefix = name[:2]
            if use_se:
                setattr(self, f'{prefix}_se', SEBlock(conv['out_channels']))
            if deploy:
                setattr(self, name, ConvNorm(**conv, norm=False))
                continue
            if conv['in_channels'] == conv['out_channels'] and conv.get('stride', 1) == 1:
                setattr(self, f'{prefix}_skip', nn.BatchNorm2D(conv['in_channels']))
            if conv['kernel_size'] > 1:
                setattr(self, f'{prefix}_1x1', ConvNorm(**{**conv, 'kernel_size': 1}))
            setattr(self, f'{name}_blocks', nn.LayerList([ConvNorm(**conv) for _ in range(num_branches)]))

    def _branches(self, name):
        """Return the list of branches of layer `name` ('dw_3x3' or 'pw_1x1')."""
        branches = list(getattr(self, f'{name}_blocks'))
        for other in ('1x1', 'skip'):
            if hasattr(self, f'{name[:2]}_{other}'):
                branches.append(getattr(self, f'{name[:2]}_{other}'))
        return branches

    def mergeable_branches(self, name):
        """Return [(convolution, norm)] for layer `name` if its convolutions can run as one in training, else [].

        That takes two or more of them, all plain (`_is_plain`), with norms of equal momentum and epsilon.
        """
        branches = [] if self.deploy else [branch for branch in self._branches(name) if isinstance(branch, ConvNorm)]
        pairs = [(branch.conv, branch.norm) for branch in branches]
        if len(pairs) < 2 or not all(_is_plain(branch, *pair) for branch, pair in zip(branches, pairs)):
            return []
        return pairs if len({(norm._momentum, norm._epsilon) for _, norm in pairs}) == 1 else []

    def _merged_forward(self, x, name):
        """Compute layer `name` from its MergedLayer: one convolution and one norm, plus the skip, if any."""
        conv, merged = self.convs[name], self.merged[name]
        size, groups, kernel = conv['kernel_size'], conv.get('groups', 1), merged.kernel
        stride = conv.get('stride', 1)
        if groups > 1 and _is_on_cpu(x):
            groups, kernel = _widen_groups(groups, kernel, x.shape[-1] / stride)
        y = F.conv2d(x, kernel, stride=stride, padding=size // 2, groups=groups)
        # updates merged.mean and merged.variance in place; `merged_branches` returns them to the norms
        y = F.batch_norm(y, merged.mean, merged.variance, merged.weight, merged.bias, True, merged.norm._momentum,
                         merged.norm._epsilon)
        y = _sum_neighbors(y, kernel.shape[0] // conv['out_channels'])
        skip = getattr(self, f'{name[:2]}_skip', None)
        return y if skip is None else y + skip(x)

    def forward(self, x):
        for name in self.convs:
            if self.deploy:
                x = getattr(self, name)(x)
            elif name in self.merged:
                x = self._merged_forward(x, name)
            else:
                x = sum_tensors([branch(x) for branch in self._branches(name)])
            if hasattr(self, f'{name[:2]}_se'):
                x = getattr(self, f'{name[:2]}_se')(x)
            x = self.act(x)
        return x

    def equivalent_kernel_bias(self, name):
        """Return the convolution equal to layer `name` in evaluation: kernel [O, I / groups, K, K], bias [O], float64.

        Only for an unfused block. Each branch folds into a convolution, and the sum of convolutions has the summed
        kernels and biases.
        Raises: UserError for a branch that contains other layers, such as those that quantization inserts.
        """
        conv, branches = self.convs[name], self._branches(name)
        for branch in branches:
            _check_branch(branch, name)
        folded = [_fold_batch_norm(branch, conv) for branch in branches]
        return sum_tensors([kernel for kernel, _ in folded]), sum_tensors([bias for _, bias in folded])

    @paddle.no_grad()
    def switch_to_deploy(self):
        """Replace the branches with their equivalent convolutions, in place. A fused block stays as it is.

        Raises: UserError as `equivalent_kernel_bias`.
        """
        if self.deploy:
            return
        for name, conv in self.convs.items():
            kernel, bias = self.equivalent_kernel_bias(name)
            # batch-norm statistics are parameters too, always frozen
            frozen = all(tensor.stop_gradient for branch in self._branches(name) for tensor in branch.parameters())
            prefix = name[:2]
            dtype = getattr(self, f'{name}_blocks')[0].conv.weight.dtype
            for branch in (f'{prefix}_skip', f'{prefix}_1x1', f'{name}_blocks'):
                if hasattr(self, branch):
                    delattr(self, branch)
            fused = ConvNorm(**conv, norm=False).to(dtype=dtype)
            fused.conv.weight.set_value(kernel.astype(dtype))
            fused.conv.bias.set_value(bias.astype(dtype))
            for tensor in fused.parameters():
                tensor.stop_gradient = frozen
            fused.training = self.training
            setattr(self, name, fused)
        self.deploy = True


def sum_tensors(tensors):
    """Return the sum of tensors with the same shape, added from left to right."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _check_branch(branch, name):
    """Raise a UserError unless `_fold_batch_norm` can fold this branch of layer `name`."""
    for layer in (branch.conv, branch.norm) if isinstance(branch, ConvNorm) else (branch,):
        if not isinstance(layer, (nn.Conv2D, nn.BatchNorm2D, nn.SyncBatchNorm)):
            raise UserError(f'a branch of {name} contains {type(layer).__name__}, but only Conv2D and BatchNorm2D can '
                            'be fused: convert the network before quantizing it')


def _fold_batch_norm(branch, conv):
    """Fold a branch (a ConvNorm, or a skip's batch norm) into float64 kernel [O, I / groups, K, K] and bias [O]."""
    size = conv['kernel_size']
    if isinstance(branch, ConvNorm):
        norm, kernel = branch.norm, branch.conv.weight.astype('float64')
    else:
        norm, kernel = branch, _identity_kernel(conv['in_channels'], conv.get('groups', 1))
    kernel = _pad_kernel(kernel, size)
    # Paddle's kernels (2.6.2, 3.3.1) round epsilon to float32, which matters for 1e-5 next to a tiny variance
    epsilon = float(np.float32(norm._epsilon))
    scale = norm.weight.astype('float64') / paddle.sqrt(norm._variance.astype('float64') + epsilon)
    bias = norm.bias.astype('float64') - norm._mean.astype('float64') * scale
    return kernel * scale.reshape([-1, 1, 1, 1]), bias


def _pad_kernel(kernel, size):
    """Pad kernels with zeros: [O, I, K, K] -> [O, I, size, size]."""
    margin = (size - kernel.shape[-1]) // 2
    return F.pad(kernel, [0] * 4 + [margin] * 4) if margin else kernel


def _identity_kernel(channels, groups):
    """Return the 1x1 kernel of the identity, [channels, channels / groups, 1, 1]."""
    kernel = paddle.eye(channels, dtype='float64')
    if groups == channels:
        kernel = paddle.ones([channels, 1], dtype='float64')
    return kernel.reshape([channels, channels // groups, 1, 1])


class MergedLayer(NamedTuple):
    """A layer's k convolutions and norms, stacked into one of each. Channels o * k to o * k + k - 1 sum to output o.

    kernel: [O * k, I / groups, K, K]; weight, bias, mean, variance: of the norms, [O * k]; norm: one of the k norms,
    for momentum and epsilon.
    """
    kernel: paddle.Tensor
    weight: paddle.Tensor
    bias: paddle.Tensor
    mean: paddle.Tensor
    variance: paddle.Tensor
    norm: nn.BatchNorm2D


@contextlib.contextmanager
def merged_branches(stages):
    """Context manager in which unfused blocks in training mode run each layer's convolutions as one, where possible.

    stages: layers with MobileOneBlocks as direct children. Outputs, gradients and running statistics equal those of
    separate branches; the norms receive their statistics on exit. The tensors of all norms are gathered at once,
    because the time of a GPU step grows with its number of operators.
    """
    blocks = [block for stage in stages for block in stage.children() if isinstance(block, MobileOneBlock)]
    layers = [(block, name, pairs) for block in blocks for name in block.convs
              if (pairs := block.mergeable_branches(name))]
    if not layers:
        yield
        return
    norms = [norm for _, _, pairs in layers for _, norm in pairs]
    channels = [norm.weight.shape[0] for norm in norms]
    order, inverse, sizes = _merged_order(tuple(len(pairs) for _, _, pairs in layers), tuple(channels),
                                          paddle.device.get_device())

    def gather(attribute):
        return paddle.gather(paddle.concat([getattr(norm, attribute) for norm in norms]), order).split(sizes)
    with paddle.amp.auto_cast(enable=False):
        kernels = [_stack_kernels([conv.weight for conv, _ in pairs], block.convs[name]['kernel_size'])
                   for block, name, pairs in layers]
        weights, biases = gather('weight'), gather('bias')
        with paddle.no_grad():
            means, variances = gather('_mean'), gather('_variance')
    for (block, name, pairs), *tensors in zip(layers, kernels, weights, biases, means, variances):
        block.merged[name] = MergedLayer(*tensors, pairs[0][1])
    try:
        yield
    finally:
        for block, _, _ in layers:
            block.merged = {}
    with paddle.no_grad():
        for attribute, tensors in (('_mean', means), ('_variance', variances)):
            values = paddle.gather(paddle.concat(tensors), inverse).split(channels)
            blend([getattr(norm, attribute) for norm in norms], values, keep=0)


def _is_plain(branch, conv, norm):
    """Whether a branch is just a convolution and a batch norm in training mode, without hooks."""
    return ((type(branch), type(conv), type(norm)) == (ConvNorm, nn.Conv2D, nn.BatchNorm2D) and norm.training
            and not norm._use_global_stats
            and not any(layer._forward_pre_hooks or layer._forward_post_hooks for layer in (branch, conv, norm)))


def _stack_kernels(kernels, size):
    """Stack k kernels [O, I / groups, K, K] into [O * k, I / groups, size, size], in the order of a MergedLayer."""
    return paddle.stack([_pad_kernel(kernel, size) for kernel in kernels], axis=1).flatten(0, 1)


@functools.lru_cache(maxsize=16)
def _merged_order(counts, channels, device):
    """Return (order, inverse order, sizes): indices that turn concatenated norm vectors into those of MergedLayers.

    counts: norms per layer; channels: per norm; device: the current one, for the cache; sizes: O * k per layer.
    """
    parts, sizes, start, norm = [], [], 0, 0
    for count in counts:
        sizes.append(count * channels[norm])
        parts.append(start + np.arange(sizes[-1]).reshape([count, -1]).T.ravel())
        start, norm = start + sizes[-1], norm + count
    order = np.concatenate(parts)
    return paddle.to_tensor(order), paddle.to_tensor(np.argsort(order)), sizes


def _is_on_cpu(x):
    return x.place.is_cpu_place()


def _widen_groups(groups, kernel, size):
    """Return (groups, kernel) of the same depthwise convolution with fewer, wider groups, for small maps.

    On a CPU, Paddle computes one matrix product per image and group, which is inefficient for small maps.
    kernel: [C * k, 1, K, K] -> [C * k, width, K, K], zero between channels of a group; size: output width in pixels.
    """
    # measured (docs/performance.md): wider groups on larger maps cost more than they save
    width = math.gcd(groups, next((width for least, width in ((28, 1), (14, 2), (7, 4)) if size >= least), 8))
    if width == 1:
        return groups, kernel
    diagonal = paddle.eye(width, dtype=kernel.dtype).reshape([width, 1, width, 1, 1])
    blocks = kernel.reshape([groups // width, width, -1, 1, *kernel.shape[2:]]) * diagonal
    return groups // width, blocks.reshape([kernel.shape[0], width, *kernel.shape[2:]])


def _sum_neighbors(x, count):
    """Sum groups of `count` neighboring channels: [N, C * count, H, W] -> [N, C, H, W]."""
    batch, channels, *size = x.shape
    x = x.reshape([batch, channels // count, count, -1])
    if _is_on_cpu(x):  # there, a sum over a middle axis takes 6 to 12 times as long
        x = paddle.matmul(paddle.ones([1, count], dtype=x.dtype), x)
    else:
        # auto_cast would first copy all branches to float32, in which the sum accumulates anyway
        with paddle.amp.auto_cast(enable=False):
            x = x.sum(axis=2)
    return x.reshape([batch, -1, *size])


class MobileOne(nn.Layer):
    """MobileOne: images [N, in_channels, H, W] -> logits [N, num_classes].

    The five lists have one entry per stage. The first stage is the stem, a single dense 3x3 layer with one conv branch
    regardless of `num_branches[0]`. A stage has int(channels * expansions) channels; its first block has its stride.
    use_se: SE in the last half of stage 3's blocks and in all of stage 4's, as in S4.
    deploy: build the fused network.

    Raises: UserError for lists that do not describe a network.
    """

    def __init__(self, num_blocks, num_branches, channels, strides, expansions, num_classes=1000, use_se=False,
                 deploy=False, in_channels=3):
        super().__init__()
        widths = stage_widths(num_blocks, num_branches, channels, strides, expansions)
        if max(*widths, num_classes) >= 2 ** 31:
            raise UserError(f'a layer has {max(*widths, num_classes)} channels or classes, but PaddlePaddle needs '
                            'fewer than 2**31: lower MODEL.CHANNELS, MODEL.EXPANSIONS or MODEL.NUM_CLASSES')
        # channels and cumulative strides of the maps that `forward_features` returns
        self.feature_channels = widths
        self.feature_strides = [int(stride) for stride in np.cumprod(strides)]
        self.stages = nn.LayerList()
        for stage, (blocks, branches, width, stride) in enumerate(zip(num_blocks, num_branches, widths, strides)):
            first_se = {3: blocks // 2, 4: 0}.get(stage, blocks) if use_se else blocks
            layers = []
            for index in range(blocks):
                layers.append(MobileOneBlock(in_channels, width, num_branches=branches if stage else 1,
                                             stride=stride if index == 0 else 1, use_se=index >= first_se,
                                             deploy=deploy, use_pw=stage > 0))
                in_channels = width
            self.stages.append(nn.Sequential(*layers))
        self.avg_pool = nn.AdaptiveAvgPool2D(1)
        self.fc = nn.Linear(in_channels, num_classes)
        self.is_frozen = False

    def freeze_backbone(self):
        """Train only the classifier: all other layers get no gradients and stay in evaluation mode."""
        self.is_frozen = True
        for parameter in self.stages.parameters():
            parameter.stop_gradient = True
        self._keep_frozen()

    def train(self):
        super().train()
        self._keep_frozen()

    def _keep_frozen(self):
        if self.is_frozen:
            for layer in self.stages.sublayers(include_self=True):
                layer.training = False

    def forward_features(self, x):
        """Return five feature maps, from the stem and the four stages, for images [N, in_channels, H, W].

        Map s is [N, feature_channels[s], H / feature_strides[s], W / feature_strides[s]], with sizes rounded up.
        """
        maps = []
        # to_static converts the code it calls, and cannot convert generators
        with merged_branches(self.stages) if paddle.in_dynamic_mode() else contextlib.nullcontext():
            for stage in self.stages:
                x = stage(x)
                maps.append(x)
        return maps

    def forward(self, x):
        return self.fc(paddle.flatten(self.avg_pool(self.forward_features(x)[-1]), 1))


def build_mobileone(config):
    """Build the network that a config describes (MODEL.* and DATA.IMAGE_CHANNELS), with random weights.

    Raises: UserError for an unknown MODEL.TYPE, a MODEL.NUM_CLASSES of 0, or lists that do not describe a network.
    """
    model = config.MODEL
    if not model.NUM_CLASSES:
        raise UserError('MODEL.NUM_CLASSES is 0, which only training (from its data) and programs that load weights '
                        '(from the weights) can resolve; give the number with -opts MODEL.NUM_CLASSES N')
    if model.TYPE.lower() != 'mobileone':
        raise UserError(f'MODEL.TYPE is {model.TYPE!r}, but must be MobileOne')
    return MobileOne(num_blocks=model.NUM_BLOCKS, num_branches=model.NUM_BRANCHES, channels=model.CHANNELS,
                     strides=model.STRIDES, expansions=model.EXPANSIONS, num_classes=model.NUM_CLASSES,
                     use_se=model.USE_SE, deploy=model.DEPLOY, in_channels=config.DATA.IMAGE_CHANNELS)


def model_convert(model):
    """Return a fused copy of `model`, in evaluation mode; `model` is unchanged.

    `model` is any layer that contains MobileOne blocks; paddle.DataParallel is unwrapped. The outputs equal those of
    `model.eval()` up to rounding. A fused convolution is frozen (`stop_gradient`) if all of its branches were.
    Raises: UserError for a network prepared for quantization.
    """
    fused = copy.deepcopy(model._layers if isinstance(model, paddle.DataParallel) else model)
    for layer in fused.sublayers(include_self=True):
        if isinstance(layer, MobileOneBlock):
            layer.switch_to_deploy()
    fused.eval()  # returns None in Paddle 2.6
    return fused
