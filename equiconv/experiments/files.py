"""What a run writes. Every file appears whole or not at all."""
import csv
import os
from pathlib import Path

import torch

from ..nn.expanded import Expanded


def write_atomically(path, write):
    """Calls write(temporary path), then moves the file into its place: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_csv(path, rows):
    """rows: list of dicts with the same keys (nothing is written if it is empty)"""
    def write(temporary):
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if rows:
        write_atomically(path, write)


def weights_of(model):
    """The state_dict of a model without the filters that its weights expand to, which can be many times larger.

    Its keys are those of escnn's models in training mode: these load it strictly, as equiconv's models do in any mode.
    """
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):  # the state has a shared module under each name
        if isinstance(module, Expanded):
            for key in (module.filter_name, "expanded_bias"):
                state.pop(f"{name}.{key}" if name else key, None)
    return state


def save_checkpoint(path, state):
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path):
    """The state that save_checkpoint wrote, on the CPU. Raises ValueError if there is none or it cannot be read."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"nothing to resume: there is no {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own
        raise ValueError(f"{path} is not a checkpoint that can be resumed ({error})") from error
