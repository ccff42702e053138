"""Pushes to the hub, while a run trains and at its end: every commit can be loaded, and none holds a pickle."""

import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from training.card import RECIPE, Provenance, write_card
from training.checkpoints import TEACHER_WEIGHTS, CheckpointingTrainer
from training.hub import export_checkpoint


logger = logging.get_logger(__name__)

PUSHED = ("*.json", "*.py", "*.safetensors", "*.html")  # of a checkpoint or of output_dir; no list of local files


class PushingTrainer(CheckpointingTrainer):
    """Trainer's pushes, of what others need to load the model, with a card that says what the run did."""

    provenance: Provenance

    def _push_from_checkpoint(self, checkpoint_folder):
        """Trainer's, in one commit that can be loaded: weights, code, processor, card, a picture and no pickles; also
        the state of training, if `hub_strategy` asks for it (`export_checkpoint`)."""
        strategy, checkpoint = self.args.hub_strategy, Path(checkpoint_folder)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
        self._finish_current_push()
        stage = self._staged(checkpoint)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = strategy == HubStrategy.CHECKPOINT
            export_checkpoint(checkpoint, stage / ("last-checkpoint" if last else checkpoint.name))
        message = f"Training in progress, step {self.state.global_step}"
        job = self._upload(stage, message, self.args.hub_token, self.args.hub_revision, run_as_future=True)
        self.push_in_progress = PushInProgress([job])

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Trainer's, of the files of `_push_from_checkpoint` and the results, not of all that is in `output_dir`."""
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        stage = self._staged(Path(self.args.output_dir))
        pushed = self._upload(stage, commit_message, token, revision, run_as_future=not blocking)
        if blocking:
            shutil.rmtree(stage)
        return pushed

    def _staged(self, folder: Path) -> Path:
        """What of a folder goes to the hub, with a new card, in a folder of its own."""
        output_dir = Path(self.args.output_dir)
        stage = output_dir / "_push"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        for pattern in PUSHED:
            for file in folder.glob(pattern):
                if file.name not in (TRAINER_STATE_NAME, TEACHER_WEIGHTS):
                    shutil.copy(file, stage)
        self.create_model_card()
        for file in ("README.md", *self.card_files()):
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(output_dir / file, stage / file)
        return stage

    def _upload(self, folder: Path, message: str, token: str | None, revision: str | None, run_as_future: bool):
        return hf_api().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=token,
            revision=revision,
            run_as_future=run_as_future,
        )

    def _finish_current_push(self):
        super()._finish_current_push()
        for job in self.push_in_progress.jobs if getattr(self, "push_in_progress", None) else []:
            if error := job.exception():
                logger.warning(f"A push to {self.hub_model_id} failed, training goes on: {error}")
        self.push_in_progress = None

    def create_model_card(self, *args, **kwargs):
        """README.md in `output_dir`; Trainer's would speak of fine-tuning and of a dataset called "unknown"."""
        if self.is_world_process_zero():
            output_dir = self.args.output_dir
            write_card(self.hub_model_id or Path(output_dir).name, self, self.provenance, output_dir)

    def card_files(self) -> list[Path]:
        """What the card shows or names, relative to `output_dir`: the latest picture, the recipe."""
        output_dir = Path(self.args.output_dir)
        files = [*sorted(output_dir.glob("reconstructions/step-*.png"))[-1:], output_dir / RECIPE]
        return [file.relative_to(output_dir) for file in files if file.exists()]
