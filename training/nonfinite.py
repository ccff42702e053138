"""Steps that are not finite: skipped on every process and for both networks, counted, and traced to a module."""

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

from reading.wording import counted
from training.monitoring import MeanTerms
from training.sharding import local_part


logger = logging.get_logger(__name__)


class NonfiniteSteps(TrainerCallback):
    """Decides, when Trainer has summed and clipped the gradients, whether both optimizers step or none: none does, on
    any process, if the loss of a micro-batch or a gradient of either network is not finite on one of them.

    Args:
        trainer: a [`VQRAETrainer`], which tells of each micro-batch (`see`).
    """

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.count = 0  # of skipped steps
        self._in_a_row = 0
        self._loss_is_finite, self._inputs = True, None  # the micro-batch to look at, should the run end here

    def see(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """The loss of a micro-batch and what it is of; the first that is not finite is kept until the decision."""
        finite = bool(loss.isfinite())
        if self._inputs is None or (self._loss_is_finite and not finite):
            self._inputs = inputs
        self._loss_is_finite &= finite

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainer, accelerator = self.trainer, self.trainer.accelerator
        learning = trainer.adversary if trainer.adversary and trainer.adversary.learns(state.global_step) else None
        norm = gradient_norm(model)
        discriminator_norm = learning.clip() if learning else torch.zeros_like(norm)
        faults = [
            not self._loss_is_finite,
            not norm.isfinite() or (args.max_grad_norm > 0 and norm == 0),  # an infinite norm has clipped it to nothing
            not discriminator_norm.isfinite(),
        ]
        faults = accelerator.reduce(torch.tensor(faults, dtype=torch.float32, device=args.device), reduction="sum")
        inputs, self._inputs, self._loss_is_finite = self._inputs, None, True
        if not faults.any():
            self._in_a_row = 0
            if learning:
                learning.step()
                trainer.terms.add({"grad_norm_discriminator": discriminator_norm})
            return
        if learning:
            learning.discard()
        self.count += 1
        self._in_a_row += 1
        step = state.global_step + 1
        if self._in_a_row >= args.max_nonfinite_steps:
            where = self._where(model, inputs)
            if not where and faults[2]:
                where = "the gradient of the discriminator is not finite"
            raise FloatingPointError(
                f"{counted(self._in_a_row, 'step was', 'steps in a row were')} not finite, the last one is {step}: "
                f"{where or 'a second pass over its images was finite'}. The weights are those from before; the last "
                "checkpoint is intact. Try a lower learning rate, a longer warm-up, or bf16 in place of fp16."
            )
        logger.warning(f"Step {step} is skipped: its loss or gradient is not finite.")
        if accelerator.scaler is None:  # which skips by itself
            model.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient

    def _where(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> str:
        """What every process finds, in words; nothing, if none does. All have decided to end here, and all look: with
        FSDP layers are gathered on the way."""
        try:
            found = self._look(model, inputs)
        except RuntimeError as error:  # no memory left, for one: the others must not wait for this process
            found = f"looking for it ended in {error}"
        if self.trainer.accelerator.num_processes == 1:
            return found
        processes = {}
        for process, text in enumerate(gather_object([found])):
            if text:
                processes.setdefault(text, []).append(str(process))
        return "; ".join(f"{text} (process {', '.join(names)})" for text, names in processes.items())

    def _look(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> str:
        """Runs the micro-batch once more, forward and back, past what makes processes wait for each other: Trainer's
        clipping has spread over all gradients what one of them had. Names the first module with an output that is not
        finite; else the terms of the loss; else, of the parameters with such a gradient, the one nearest to the
        reconstruction's pixels."""
        outputs = []

        def look(name):
            def hook(module, inputs, output):
                tensors = output if isinstance(output, (tuple, list)) else [output]
                if not outputs and any(
                    isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors
                ):
                    outputs.append(name)

            return hook

        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(model)
        model.zero_grad(set_to_none=True)
        trainer.terms = MeanTerms()  # of this pass alone
        hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
        try:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        if outputs:
            return f"the first output that is not finite is that of {outputs[0]}"
        if terms := [name for name, value in trainer.terms.means().items() if not value.isfinite()]:
            return f"outputs are finite, {', '.join(terms)} is not"
        for name, parameter in reversed(list(model.named_parameters())):
            if parameter.grad is not None and not local_part(parameter.grad).isfinite().all():
                return f"outputs are finite, the gradient of {name} is not"
        return ""


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """The length of all gradients together, a scalar and the same on every process, also where each holds a shard."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
