"""The native form of a graph, made fit for ONNX Runtime.

ONNX Runtime wants one mask row a query where TensorRT broadcasts one over all of them.
"""

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from aapt_deploy.backends.trt.lower_attention import MASK


def for_onnxruntime(model: ModelProto, tokens: int) -> ModelProto:
    """A copy of `model` whose attention reads `tokens` rows of mask."""
    copy = ModelProto()
    copy.CopyFrom(model)
    nodes = [*copy.graph.node]
    made = next((index for index, node in enumerate(nodes) if MASK in node.output), None)
    if made is None:
        return copy
    for node in nodes:
        for index, name in enumerate(node.input):
            if name == MASK:
                node.input[index] = "mask.rows"
    copy.graph.initializer.append(
        numpy_helper.from_array(np.array([1, 1, tokens, 1], np.int64), "mask.shape")
    )
    nodes.insert(made + 1, helper.make_node("Expand", [MASK, "mask.shape"], ["mask.rows"]))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy
