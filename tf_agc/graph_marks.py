"""Which layer made a node of a graph, told by an attribute of the node.

For exports, which make constants of weights in a graph that is written already. What is folded is `saved_graph`'s.
"""

import uuid
import weakref
from typing import Any

import tensorflow as tf

ATTRIBUTE = "_tf_agc_layer"

# By layer. Not in the layer, whose copies would have it too; and no counter, as graphs outlive this process.
_marks: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()


def mark(tensor: tf.Tensor, layer: Any) -> None:
    """Notes at the node that makes a tensor of a graph that it is this layer's."""
    value = _marks.setdefault(layer, uuid.uuid4().bytes)
    # Private, and without a public counterpart.
    tensor.op._set_attr(ATTRIBUTE, tf.compat.v1.AttrValue(s=value))


def layers() -> dict[bytes, Any]:
    """The layers of this process that have marked a node, by the attribute's value."""
    return {value: layer for layer, value in _marks.items()}
