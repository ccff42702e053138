"""Checkpoints on disk: whole or not there at all, with the averaged weights as the model, and exact to resume."""

import os
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer import (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from eval.commands import memory_ran_out
from eval.files import write_whole
from training.adversary import Adversary
from training.ema import EMA, load_raw
from training.hub import checked_state
from training.sharding import load_whole, rename_sharded


RAW_WEIGHTS = "raw_weights.safetensors"  # beside model.safetensors, which holds the averages
TEACHER_WEIGHTS = "teacher_encoder.safetensors"
UNFINISHED = "unfinished"  # checkpoints are written in there, and moved when they are whole


@contextmanager
def _fitting(checkpoint: str | None):
    """Around what loads a state: that it is of another kind of run becomes an error in one line.

    Raises:
        ValueError: in place of what torch raises where names, shapes or groups do not fit.
    """
    try:
        yield
    except (KeyError, ValueError, RuntimeError) as error:
        if memory_ran_out(error):
            raise
        raise ValueError(
            f"{checkpoint} is of another kind of run, its state does not fit this model or optimizer "
            f"({' '.join(str(error).split())[:200]}): give the options of that run, or choose another --output_dir."
        ) from error


class SaveModelingCode(TrainerCallback):
    """Puts the modeling code beside the checkpoints, so that what is pushed in mid-training can be loaded: Trainer
    pushes config and weights alone."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        rename_sharded(model)
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            custom_object_save(model, args.output_dir, config=model.config)


class CheckpointingTrainer(Trainer):
    """Trainer's checkpoints, written beside and then moved, of the weights and of all that has a state besides.

    `ema`, `adversary` and `teacher` are the trainer's that derives from it; `None`: there is none.
    """

    ema: EMA | None = None
    adversary: Adversary | None = None
    teacher: torch.nn.Module | None = None
    _saving = False

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir) / UNFINISHED, ignore_errors=True)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The folder that `train(resume_from_checkpoint)` goes on with; `None`: it starts anew, or Trainer will say
        that there is none.

        Raises:
            ValueError: the checkpoint has no state of the optimizer, or one of another kind of run; or its steps are no
                numbers.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if not checkpoint:
            return None
        optimizer, other = OPTIMIZER_NAME, "with"
        if self.is_fsdp_enabled:
            optimizer, other = OPTIMIZER_NAME_BIN, "without"
        if not os.path.isfile(os.path.join(checkpoint, optimizer)):
            raise ValueError(
                f"{checkpoint} has no {optimizer} (was it saved with --save_only_model, or {other} FSDP?): this run "
                "cannot be resumed from it. Start a new one with --model_name_or_path and another --output_dir."
            )
        if os.path.isfile(state := os.path.join(checkpoint, TRAINER_STATE_NAME)):
            checked_state(Path(state), checkpoint)
        return checkpoint

    def _save_checkpoint(self, model, trial):
        """Trainer's, written beside and then moved: what is named `checkpoint-N` is whole."""
        output_dir, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        push = self.args.push_to_hub
        self.args.push_to_hub, self._saving = False, True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.push_to_hub, self._saving = push, False
        self.accelerator.wait_for_everyone()
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best.name == name or best.exists()):
            self.state.best_model_checkpoint = str(best)  # Trainer has noted where it wrote it
        if self.is_world_process_zero():
            self.state.save_to_json(str(output_dir / UNFINISHED / name / TRAINER_STATE_NAME))
            if (output_dir / name).exists():  # of a run that went further than this one, which was resumed before it
                os.replace(output_dir / name, output_dir / UNFINISHED / "replaced")
            os.replace(output_dir / UNFINISHED / name, output_dir / name)
            shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(output_dir / name))

    def _get_output_dir(self, trial):
        """Where `_save_checkpoint` of Trainer writes."""
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save(self, output_dir=None, state_dict=None):
        """The model with averaged weights; beside it the raw ones, and the discriminator."""
        output_dir, raw = output_dir or self.args.output_dir, state_dict  # FSDP: gathered by every process for this one
        with self.ema.applied() if self.ema else nullcontext():
            if self.is_fsdp_enabled and self.ema:
                state_dict = self.accelerator.get_state_dict(self.model)
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir, TRAINING_ARGS_NAME).unlink()  # a pickle that nothing reads; the card's recipe has them
            if self.ema and self.ema.averages is not None:
                self.ema.save_raw(os.path.join(output_dir, RAW_WEIGHTS), raw)
            if self.adversary:
                self.adversary.save_weights(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.is_fsdp_enabled:  # Trainer would save the weights once more
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        if self.adversary:
            self.adversary.save(output_dir)
        if self.teacher:
            save_file(self.teacher.encoder.state_dict(), os.path.join(output_dir, TEACHER_WEIGHTS))

    def save_state(self):
        """Trainer's, whole; the commands call it last, and it says that a run is finished (`resuming.finished`)."""
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / TRAINER_STATE_NAME
            write_whole(path, lambda file: self.state.save_to_json(str(file)))

    def _load_optimizer_and_scheduler(self, checkpoint):
        wanted = [set(group) for group in self.optimizer.param_groups]
        with _fitting(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        groups = zip(wanted, self.optimizer.param_groups)
        if missing := sorted({name for names, group in groups for name in names - group.keys()}):
            raise ValueError(
                f"{checkpoint} has the state of another optimizer, without {', '.join(missing)}: give the --optim of "
                "that run, or choose another --output_dir."
            )
        if self.adversary:
            self.adversary.load(checkpoint)
        if self.teacher:
            path = os.path.join(checkpoint, TEACHER_WEIGHTS)
            if not os.path.isfile(path):
                raise ValueError(f"{checkpoint} has no {TEACHER_WEIGHTS}: it is not of a run with distillation.")
            self.teacher.encoder.load_state_dict(load_file(path))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Trainer copies tensors by their names in the file. Some names are only mapped to the modules' by
        `from_pretrained` (DINOv2's attention, for one), and its encoder would silently not be resumed."""
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        with _fitting(resume_from_checkpoint):
            load_whole(model, type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype).state_dict())
        if self.ema:
            self.ema.start()
        raw = os.path.join(resume_from_checkpoint, RAW_WEIGHTS)
        if os.path.isfile(raw):
            load_raw(model, raw)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # a finished run is resumed: Trainer would do one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
