"""What looks for tensors in a module's input or output finds those inside escnn's GeometricTensor.

fully_shard does, to gather the sharded weights before a backward pass that reads them, and DistributedDataParallel to
move inputs. Some releases of torch search pytrees, others dataclasses: it becomes both.
"""
from dataclasses import make_dataclass

from escnn.nn import GeometricTensor
from torch.utils import _pytree as pytree


def install():
    """Tells torch and `dataclasses` of the class's members. Called once, when equiconv is imported."""
    if GeometricTensor not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(GeometricTensor, _flatten, _unflatten)
        GeometricTensor.__dataclass_fields__ = make_dataclass("_", ("tensor", "type", "coords")).__dataclass_fields__


def _flatten(fields):
    return (fields.tensor, fields.coords), fields.type


def _unflatten(leaves, type):
    fields = object.__new__(GeometricTensor)  # without its checks: leaves may be what a map has put there
    (fields.tensor, fields.coords), fields.type = leaves, type
    return fields
