"""A model that learns: its optimizer, its schedule, its precision."""
import math

import torch

from .. import models
from .augmentation import AUGMENTATIONS
from .config import DTYPES
from .files import weights_of
from .processes import adopt_main_state, parallel

EVALUATION_BATCH = 100
WARM_UP = 0.05  # of all steps, in the cosine schedule
DROPS, DROP = (0.3, 0.6, 0.8), 0.2  # of the schedule in steps: where, and to what


def layers(accelerate):
    """The namespace of layers: equiconv.nn, or escnn.nn."""
    if accelerate:
        from .. import nn
    else:
        from escnn import nn
    return nn


def batches(config, epoch, world):
    """Indices of the samples of each step of an epoch, for this process. Depends on the seed and the epoch only.

    The last, incomplete batch is left out.
    """
    if config.batch_size % world.size:
        raise ValueError(f"batch_size {config.batch_size} cannot be shared by {world.size} processes")
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + epoch)
    order = torch.randperm(config.train_size, generator=generator)
    full = [batch for batch in order.split(config.batch_size) if len(batch) == config.batch_size]
    return [batch[world.rank::world.size] for batch in full]


def steps_per_epoch(config):
    return config.train_size // config.batch_size


class Learner:
    """Builds the model that a Config names, with weights drawn from its seed, on the device of a World.

    model  the network
    step   how many steps it has learned
    """

    def __init__(self, config, experiment, world):
        torch.manual_seed(config.seed)
        self.config, self.experiment, self.world = config, experiment, world
        self.step = 0
        self.model = models.create(config.model, nn=layers(config.accelerate), **config.model_options)
        self.model.train()  # not idle: a new escnn model saves its expanded filters, and none after train()
        adopt_main_state(self.model, world)
        dtype = DTYPES[config.dtype]
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32  # of weights and inputs
        self.model.to(world.device, self.dtype)
        self.autocast = torch.autocast(world.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(weights, config)
        self._network = parallel(self.model, world)
        if config.compile:
            self._network = torch.compile(self._network)

    def learn(self, inputs, targets):
        """One step on this process's part of a batch. Returns its loss, a detached scalar tensor on the device."""
        # Drawn anew for every step, so that a resumed run repeats an uninterrupted one.
        torch.manual_seed((1_000_003 * self.config.seed + self.step) * self.world.size + self.world.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        inputs = inputs.to(self.world.device, self.dtype, non_blocking=True)
        targets = targets.to(self.world.device, non_blocking=True)
        inputs, targets = AUGMENTATIONS[self.config.augmentation](inputs, targets)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            loss = self.experiment.loss(self._network(inputs), targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return loss.detach()

    def learning_rate(self):
        """At the current step."""
        if self.config.schedule == "constant":
            return self.config.lr
        total = self.config.epochs * steps_per_epoch(self.config)
        if self.config.schedule == "steps":
            return self.config.lr * DROP ** sum(self.step >= drop * total for drop in DROPS)
        warm_up = max(1, int(WARM_UP * total))
        if self.step < warm_up:
            return self.config.lr * (self.step + 1) / warm_up
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (self.step - warm_up) / max(1, total - warm_up)))

    def outputs(self, inputs):
        """The network's outputs in evaluation mode, [n, ...] on the CPU in float32 or float64."""
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast:
                parts = [self.model(part.to(self.world.device, self.dtype)) for part in inputs.split(EVALUATION_BATCH)]
        finally:
            self.model.train()
        return torch.cat(parts).to("cpu", self.dtype)

    def evaluate(self, split):
        """(loss, score) on a Split, by this process alone."""
        outputs = self.outputs(split.inputs)
        return self.experiment.loss(outputs, split.targets).item(), self.experiment.score(outputs, split.targets)

    def weights(self):
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def state(self):
        """Everything to resume from, as tensors and plain values. The model's weights are those of weights_of()."""
        return {"model": weights_of(self.model), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "step": self.step}

    def load_state(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


def _optimizer(weights, config):
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay)
    return torch.optim.Adam(weights, lr=config.lr, weight_decay=config.weight_decay,
                            amsgrad=config.optimizer == "amsgrad")
