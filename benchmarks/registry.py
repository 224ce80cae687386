"""What is measured: cases by name, and presets."""
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.cases import CASES

from . import field_layers, network_steps

OPS = {"conv": ("forward", "training", "inference"), "expand_filter": ("expand", "expand_training"),
       "construction": (), **{op: (mode,) for op, mode in field_layers.OPS.items()}, network_steps.OP: ("training",)}
CASES_OF_OPS = {**CASES, **field_layers.LAYERS, **network_steps.NETWORKS}
HEADLINE = ("c8_16_k5", "c4_32_k3", "d4_16_k3", "d8_16_k5", "so3_16_k5")


@dataclass(frozen=True)
class Preset:
    """
    cases      names or globs
    dtypes, ops
    budget_s   seconds of sampling for each kind of work on each case
    compiled   names or globs of the cases where escnn is also timed under torch.compile (a compilation takes long)
    limit_s    after this long no further case is started
    layout     memory layout of the input
    """
    cases: tuple
    dtypes: tuple = ("float32",)
    ops: tuple = ("conv", "expand_filter")
    budget_s: float = 2.0
    compiled: tuple = ()
    limit_s: float = float("inf")
    layout: str = "contiguous"


PRESETS = {
    "quick": Preset(("c8_16_k5", "d4_16_k3", "so2_16_k5", "so3_16_k3"), budget_s=1.0, limit_s=50),
    "default": Preset(tuple(n for n, c in CASES.items() if "real" in c.tags),
                      ops=("conv", "expand_filter", "construction"), budget_s=4.0,
                      compiled=("c8_16_k5", "so3_16_k3")),
    "gpu": Preset((*HEADLINE, "so3_16_k3", "c16_32_k5", "so2_16_k5", "c8_cnn_layer5", "e2sfcnn_c16_layer2",
                   "wrn28_10_d4", "wrn28_10_d8", "wrn10_4_d4", "c8_16_k5_stride2", "se3_cnn_block2_stride2",
                   "octahedral_8_k3"),
                  dtypes=("bfloat16", "tf32", "float32"), budget_s=0.4, compiled=HEADLINE, limit_s=140,
                  layout="channels_last"),
    "gpu-fields": Preset((), dtypes=("float32", "bfloat16"), ops=tuple(field_layers.OPS), budget_s=0.2, limit_s=25),
}


def select(patterns):
    """Cases whose names match any of some globs, in their order. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES_OF_OPS):
            raise ValueError(f"no case matches {pattern!r}; cases are named like {', '.join(list(CASES)[:4])}, ...")
    return [case for name, case in CASES_OF_OPS.items() if matches(name, patterns)]


def matches(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)
