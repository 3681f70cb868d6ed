"""Build the ONNX graph of a fused MobileOne: one node per operator, identical on every PaddlePaddle version."""
import numpy as np
from onnx import TensorProto, helper, numpy_helper

# the oldest opset in which every operator used here has its current form
OPSET, IR_VERSION = 13, 8


class _Graph:
    """The nodes and weights of a graph. Each node is named after its output."""

    def __init__(self):
        self.nodes, self.weights = [], []

    def add(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name, value):
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def conv(self, x, conv, name, output):
        weights = [self.weight(f'{name}.{part}', getattr(conv, part).numpy()) for part in ('weight', 'bias')]
        return self.add('Conv', [x, *weights], output, kernel_shape=list(conv.weight.shape[2:]),
                        strides=_pair(conv._stride), pads=2 * _pair(conv._padding), group=conv._groups)

    def squeeze_excite(self, x, block, name):
        """Add the nodes of mobileone.SEBlock."""
        y = self.add('GlobalAveragePool', [x], f'{name}.pool')
        y = self.add('Relu', [self.conv(y, block.reduce, f'{name}.reduce', f'{name}.reduce')], f'{name}.relu')
        y = self.add('Sigmoid', [self.conv(y, block.expand, f'{name}.expand', f'{name}.expand')], f'{name}.sigmoid')
        return self.add('Mul', [x, y], name)

    def normalize(self, x, spec):
        """Add the normalization of `spec.pixels`.

        Folding it into the stem would change the borders, because the stem pads the normalized image with zeros.
        """
        if spec.pixels == 'uint8':
            x = self.add('Cast', [x], 'pixels', to=TensorProto.FLOAT)
        shift, scale = (self.weight(name, value) for name, value in zip(('shift', 'scale'), spec.shift_and_scale()))
        return self.add('Mul', [self.add('Sub', [x, shift], 'shifted'), scale], 'normalized')


def _pair(value):
    return list(value) if isinstance(value, (list, tuple)) else [value, value]


def build_onnx(model, spec):
    """Build the ModelProto of a fused network: 'image' [N, 3, H, W] -> 'logits' [N, C] or, with spec.softmax,
    'probabilities'.

    spec: deploy.predictor.Spec, stored in the file's metadata. If spec.batch is set, N is fixed to it and H and W to
    spec.image_size; otherwise all three are dynamic. The graph normalizes its input unless spec.pixels is 'normalized'.
    The output of stage s is named f'stage{s}'; the stem is 'stage0'.
    """
    graph = _Graph()
    x = 'image' if spec.pixels == 'normalized' else graph.normalize('image', spec)
    for number, stage in enumerate(model.stages):
        for index, block in enumerate(stage):
            for part in block.convs:
                name = f'stages.{number}.{index}.{part}'
                x = graph.conv(x, getattr(block, part).conv, name, f'{name}.conv')
                se = f'{part[:2]}_se'
                if hasattr(block, se):
                    x = graph.squeeze_excite(x, getattr(block, se), f'stages.{number}.{index}.{se}')
                is_last = block is stage[-1] and part == list(block.convs)[-1]
                x = graph.add('Relu', [x], f'stage{number}' if is_last else f'{name}.relu')
    x = graph.add('Flatten', [graph.add('GlobalAveragePool', [x], 'pool')], 'features')
    weights = [graph.weight('fc.weight', model.fc.weight.numpy()), graph.weight('fc.bias', model.fc.bias.numpy())]
    output = graph.add('Gemm', [x, *weights], 'logits')
    if spec.softmax:
        output = graph.add('Softmax', [output], 'probabilities', axis=1)
    size = 2 * [spec.image_size] if spec.batch else ['height', 'width']
    batch = spec.batch or 'batch'
    source = helper.make_tensor_value_info(
        'image', TensorProto.UINT8 if spec.pixels == 'uint8' else TensorProto.FLOAT, [batch, 3, *size])
    target = helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, model.fc.weight.shape[1]])
    proto = helper.make_model(helper.make_graph(graph.nodes, spec.name, [source], [target], graph.weights),
                              opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION,
                              producer_name='mobileone')
    helper.set_model_props(proto, spec.to_metadata())
    return proto
