"""GeometricTensor as what torch and dataclasses can look into."""
import dataclasses

import torch
from escnn.nn import GeometricTensor
from torch.utils import _pytree as pytree

from tests.cases import CASES


def test_tensors_inside_are_found():
    fields = CASES["c4_mixed"].input()
    leaves, spec = pytree.tree_flatten({"fields": [fields]})
    assert leaves[0] is fields.tensor and [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] == leaves[:1]
    back = pytree.tree_unflatten(leaves, spec)["fields"][0]
    assert isinstance(back, GeometricTensor) and back.tensor is fields.tensor and back.type is fields.type
    assert back.coords is None
    halved = pytree.tree_map_only(torch.Tensor, lambda t: t / 2, fields)
    assert torch.equal(halved.tensor, fields.tensor / 2) and halved.type == fields.type
    names = pytree.tree_map(lambda leaf: type(leaf).__name__, fields)
    assert names.tensor == "Tensor"


def test_it_is_a_dataclass():
    fields = CASES["c4_mixed"].input()
    assert dataclasses.is_dataclass(fields)
    assert [field.name for field in dataclasses.fields(fields)] == ["tensor", "type", "coords"]
    doubled = dataclasses.replace(fields, tensor=2 * fields.tensor)
    assert torch.equal(doubled.tensor, 2 * fields.tensor) and doubled.type is fields.type
