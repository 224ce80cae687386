"""The processes that train together: one, or those that torchrun started."""
import signal
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """rank of this process among `size`, and its torch.device."""
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):  # the one that prints and writes
        return self.rank == 0


@contextmanager
def world(device_type):
    """The World of this process; under torchrun the process group is open meanwhile."""
    if not dist.is_torchelastic_launched():
        yield World(0, 1, torch.device(device_type))
        return
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def adopt_main_state(model, world):
    """Gives every process the weights and buffers of the main one, by name.

    Not by order, as DistributedDataParallel does: escnn registers buffers in an order that differs between processes.
    Through load_state_dict, because weights only mean something together with the basis that is stored beside them.
    """
    if world.size == 1:
        return
    state = [{k: v.cpu() for k, v in model.state_dict().items()} if world.is_main else None]
    dist.broadcast_object_list(state, src=0)
    if not world.is_main:
        model.load_state_dict(state[0])


def parallel(model, world):
    """The model, averaging its gradients over the processes."""
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    with warnings.catch_warnings():  # newer versions rename broadcast_buffers; torch 2.10 does not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, init_sync=False)


def mean(tensor, world):
    """Over the processes; all of them must call it together."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor / world.size


class StopRequest:
    """Ctrl-C and SIGTERM as a question asked between steps, so that no step is cut in two.

    A second signal acts at once.
    """

    def __init__(self, world):
        self.world = world
        self._asked = False

    def __enter__(self):
        self._old = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number, _frame):
        signal.signal(number, self._old[number])
        self._asked = True

    def asked(self):
        """Whether any process was asked to stop. All processes must call it together."""
        if self.world.size == 1:
            return self._asked
        asked = torch.tensor(float(self._asked), device=self.world.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())
