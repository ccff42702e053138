"""An exponential moving average of the weights that are trained."""

from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from training.sharding import load_whole, reshard


class EMA(TrainerCallback):
    """Averages `a += (1 - d) (w - a)` after each step, with `d = min(decay, (1 + step) / (10 + step))`, so that early
    averages forget the initial weights. Weights that are not trained have none.

    Args:
        model: the unwrapped model.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = model
        self.parameters = self.averages = None  # {name: tensor}
        self._applied = False

    def start(self) -> None:
        """The averages become the present weights. FSDP must have sharded them by then."""
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        if self.averages is None:  # else they came from a checkpoint
            self.start()

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    @contextmanager
    def applied(self):
        """The model has the averages as its weights; they change places."""
        if self.averages is None or self._applied:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        self._applied = not self._applied
        for name, parameter in self.parameters.items():
            average, self.averages[name] = self.averages[name], parameter.detach().clone()
            parameter.detach().copy_(average)  # FSDP's parameters are views of memory of its own
        reshard(self.model)

    def save_raw(self, path: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the weights that are being trained, not the averages; those of `state_dict`, which FSDP gathered."""
        tensors = state_dict or self.parameters
        save_file({name: tensors[name].detach().contiguous() for name in self.parameters}, path)


def load_raw(model: nn.Module, path: str) -> None:
    """Puts what `EMA.save_raw` wrote into a model.

    Raises:
        ValueError: the file is of another model.
    """
    unexpected = load_whole(model, load_file(path), strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{path} is of another model: it has {unexpected[:3]}.")
