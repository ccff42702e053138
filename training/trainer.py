"""A Trainer for VQRAE: losses by name, adversary, teacher and averaged weights, exact resumption, pictures."""

import copy
import hashlib
import math
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import save_fsdp_optimizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations import TensorBoardCallback
from transformers.trainer import (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from eval.codebook_usage.codebook_usage import codebook_statistics, count_codes
from eval.metrics import CodebookWindow, to_uint8
from eval.pictures import save_rows
from eval.psnr.psnr import psnr_per_image
from eval.ssim.ssim import ssim_per_image
from training.adversary import Adversary
from training.arguments import VQRAETrainingArguments
from training.card import RECIPE, Provenance, write_card
from training.data import TrainTransform
from training.ema import EMA, load_raw
from training.hub import export_checkpoint
from training.losses import ReconstructionLoss, WithGradient, adaptive_weight
from training.sharding import load_whole, local_part, prepare_for_fsdp, rename_sharded, reshard
from training.token_passes import tokenize_crops


logger = logging.get_logger(__name__)

RAW_WEIGHTS = "raw_weights.safetensors"  # beside model.safetensors, which holds the averages
TEACHER_WEIGHTS = "teacher_encoder.safetensors"
PUSHED = ("*.json", "*.py", "*.safetensors", "*.html")  # of a checkpoint or of output_dir; no list of local files
UNFINISHED = "unfinished"  # checkpoints are written in there, and moved when they are whole


class EvaluationMetrics:
    """`compute_metrics` for `batch_eval_metrics`: PSNR, SSIM, codebook utilization and perplexity in bounded memory.
    Keeps the first images of the pass for a picture."""

    def __init__(self, codebook_size: int, num_pictures: int) -> None:
        self.codebook_size = codebook_size
        self.num_pictures = num_pictures
        self._reset()
        self.pictures = None  # originals and reconstructions of the last complete pass

    def _reset(self) -> None:
        # Trainer hands every process the gathered batches: nothing to sum across processes
        self._scores, self._counts, self._pairs = {"psnr": [], "ssim": []}, 0, []

    def __call__(self, prediction, compute_result: bool = False) -> dict[str, float]:
        reconstructions, tokens = (torch.as_tensor(x).cpu() for x in prediction.predictions)
        originals = torch.as_tensor(prediction.label_ids).cpu()
        missing = self.num_pictures - sum(len(pair[0]) for pair in self._pairs)
        if missing > 0:
            self._pairs.append((originals[:missing], reconstructions[:missing]))
        fake, real = to_uint8(reconstructions) / 255, to_uint8(originals) / 255
        self._scores["psnr"].append(psnr_per_image(fake, real))
        self._scores["ssim"].append(ssim_per_image(fake, real))
        self._counts = self._counts + count_codes(tokens, self.codebook_size)
        if not compute_result:
            return {}
        metrics = {name: torch.cat(values).mean().item() for name, values in self._scores.items()}
        metrics |= codebook_statistics(self._counts)
        self.pictures = tuple(torch.cat(images) for images in zip(*self._pairs))
        self._reset()
        return metrics


class SaveModelingCode(TrainerCallback):
    """Puts the modeling code beside the checkpoints, so that what is pushed in mid-training can be loaded: Trainer
    pushes config and weights alone."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        rename_sharded(model)
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            custom_object_save(model, args.output_dir, config=model.config)


class EpochOfCrops(TrainerCallback):
    """Tells the transform of the training images which epoch it is; for a stream, whose epochs Trainer does not know,
    which pass."""

    def __init__(self, transform: TrainTransform) -> None:
        self.transform = transform
        self._epoch = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int((state.epoch or 0) + 1e-6)
        self._epoch = epoch if self._epoch is None else max(epoch, self._epoch + 1)
        self.transform.set_epoch(self._epoch)


class VQRAETrainer(Trainer):
    """Trains an [`ImageTokenizer`], such as a [`VQRAEModel`], on `pixel_values`.

    The loss is `l1 + l2 + lpips + convnext + vq + distillation + gan`, weighted as the arguments say. One pass of the
    model serves generator and discriminator, and one backward pass of each loss network gives both its gradient and
    the adaptive weight. Logs every term, and the utilization and perplexity of the codebook over the latest tokens
    (`CodebookWindow`), from counts summed over all processes. Where the model's `codebook_init` is "kmeans" and its
    codes have not been fitted, `train` does that first.

    What is evaluated and saved as the model are the averaged weights ([`EMA`]), unless `ema_decay` is 0; the weights
    that are trained are beside them in `raw_weights.safetensors`.
    """

    loss_is_scaled_for_ga = False  # each micro-batch gives its own mean

    def __init__(
        self,
        model,
        args: VQRAETrainingArguments,
        train_transform: TrainTransform | None = None,
        provenance: Provenance | None = None,
        **kwargs,
    ) -> None:
        if args.n_gpu > 1:  # transformers would use DataParallel, whose replicas have no parameters
            raise ValueError(
                f"{args.n_gpu} GPUs and one process: start with `accelerate launch train_hf.py ...` to use all, or "
                "set CUDA_VISIBLE_DEVICES=0 to use one."
            )
        kwargs.setdefault("compute_metrics", EvaluationMetrics(model.config.codebook_size, args.num_pictures))
        super().__init__(model=model, args=args, **kwargs)
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported: `accelerate launch --multi_gpu` (DDP) and FSDP are.")
        self.add_callback(SaveModelingCode())
        self.train_transform = train_transform
        if args.token_passes:
            self._check_token_passes()
            model.quantizer.requires_grad_(False)  # other codes would need other tokens
        self.provenance = provenance or Provenance()
        if train_transform:
            self.add_callback(EpochOfCrops(train_transform))
        self.reconstruction_loss = self._build_reconstruction_loss().to(args.device)
        self.adversary = Adversary(args) if args.gan_weight else None
        self.ema = EMA(model, args.ema_decay) if args.ema_decay else None
        if self.ema:
            self.add_callback(self.ema)
        self.teacher = None
        if args.distillation_weight and not model.config.freeze_encoder:
            self.teacher = copy.deepcopy(model)
            self.teacher.config.freeze_encoder = True
            self.teacher.quantizer = self.teacher.decoder = None
            self.teacher.requires_grad_(False).eval().to(args.device)
        layers = getattr(model.config, "encoder_layers", None)
        if layers and not self.teacher and max(layers) < model.config.encoder_config.num_hidden_layers:
            args.ddp_find_unused_parameters = True  # the layers behind have no gradient
        if self.is_fsdp_enabled:
            prepare_for_fsdp(model, self.accelerator, args)
        self._saving = False
        self._terms = {}
        self._pairs_of_step = None  # pixels and reconstructions of a micro-batch
        self._pixels_to_blame = None  # pixels of the first micro-batch that was not finite
        self._window = CodebookWindow(model.config.codebook_size)
        self._collapse_reported = False
        self._step_is_finite, self._nonfinite_steps, self._nonfinite_in_a_row = True, 0, 0
        self._last_log = None  # time and step

    def _check_token_passes(self) -> None:
        """Tokens that are computed once are those of every step only where nothing in front of them is trained. W and
        b of SimVQ need not be: k-means is a fixed point of the quantizer's loss, see `SimVQ.fit`."""
        model, reason = self.model, None
        if not model.config.freeze_encoder:
            reason = "the encoder is trained (stage 2)"
        elif next(model.project_in.parameters(), None) is not None:
            reason = "a learnable projection is in front of the quantizer (codebook_dim)"
        elif model.config.codebook_init != "kmeans" and model.config.codebook_init_latents is None:
            reason = "the codes are not fitted to latents (codebook_init is not kmeans), they would stay as they are"
        elif not isinstance(self.train_dataset, datasets.Dataset) or self.train_transform is None:
            reason = "the training images are a stream, or come without a TrainTransform"
        elif self.accelerator.num_processes > 1:
            reason = f"there are {self.accelerator.num_processes} processes, and tokens are computed by one"
        if reason:
            raise ValueError(f"token_passes cannot be used: {reason}. Leave it out, and encoder and quantizer run.")

    def _build_reconstruction_loss(self) -> ReconstructionLoss:
        """On every process the same terms: where one cannot have the weights, none uses them."""
        args = self.args
        weights = args.l1_weight, args.l2_weight, args.lpips_weight, args.lpips_network, args.convnext_weight
        error, loss = None, None
        with self.accelerator.local_main_process_first():  # which downloads
            try:
                loss = ReconstructionLoss(*weights, args.perceptual_weights)
            except RuntimeError as caught:
                error = caught
        errors = [str(error) if error else None]
        if self.accelerator.num_processes > 1:
            errors = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(errors, str(error) if error else None)
        if not any(errors):
            return loss
        message = next(text for text in errors if text)
        if not args.perceptual_optional or not (args.l1_weight or args.l2_weight):
            raise RuntimeError(message) from error
        logger.warning(f"{message} --perceptual_optional is set: training without LPIPS and ConvNeXt-S.")
        return ReconstructionLoss(args.l1_weight, args.l2_weight, 0.0, args.lpips_network)

    # Optimizers ------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        """Trainer's, in groups named decoder, quantizer and encoder with learning rates of their own; and the
        adversary's."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            part = {}
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
                part[id(parameter)] = name.split(".")[0] if name.startswith(("encoder.", "quantizer.")) else "decoder"
            base = self.args.learning_rate
            rates = {"decoder": base, "quantizer": base * self.args.quantizer_lr_multiplier}
            encoder = self.args.encoder_learning_rate
            rates["encoder"] = base if encoder is None else encoder
            groups = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for name, rate in rates.items():
                for group in groups:
                    parameters = [p for p in group["params"] if part[id(p)] == name]
                    if parameters:
                        optimizer.add_param_group({**group, "params": parameters, "lr": rate, "name": name})
        if self.adversary:
            self.adversary.prepare(self.accelerator)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.adversary:
            self.adversary.prepare_schedule(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # Starting and resuming -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir) / UNFINISHED, ignore_errors=True)
        config = self.accelerator.unwrap_model(self.model).config
        if resume_from_checkpoint:
            checkpoint = resume_from_checkpoint
            if checkpoint is True:
                checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint:  # else Trainer says that there is none
                optimizer, other = OPTIMIZER_NAME, "with"
                if self.is_fsdp_enabled:
                    optimizer, other = OPTIMIZER_NAME_BIN, "without"
                if not os.path.isfile(os.path.join(checkpoint, optimizer)):
                    raise ValueError(
                        f"{checkpoint} has no {optimizer} (was it saved with --save_only_model, or {other} FSDP?): "
                        "this run cannot be resumed from it. Start a new one with --model_name_or_path and another "
                        "--output_dir."
                    )
                saved = type(config).from_pretrained(checkpoint)
                config.codebook_init, config.codebook_init_latents = saved.codebook_init, saved.codebook_init_latents
        elif config.codebook_init == "kmeans" and config.codebook_init_latents is None:
            self.initialize_codebook()
        self._check_codebook()
        if self.args.token_passes:
            if resume_from_checkpoint and checkpoint:
                self._load_from_checkpoint(checkpoint)  # the codes that the run started with
            self.train_dataset = tokenize_crops(
                self.model.to(self.args.device),
                self.train_dataset,
                self.train_transform,
                self.args.token_passes,
                Path(self.args.output_dir) / "tokens",
                self.args.eval_batch_size,
                self.args.dataloader_num_workers,
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_codebook(self) -> None:
        """Every process must have the same codebook: it is frozen, so nothing would ever make them agree. With FSDP
        the same weights: each process keeps its part of its own.

        Raises:
            RuntimeError: they have not.
        """
        if self.accelerator.num_processes == 1:
            return
        model = self.accelerator.unwrap_model(self.model)
        tensors = model.state_dict().values() if self.is_fsdp_enabled else [model.quantizer.embedding.weight]
        digest = hashlib.sha256()
        for tensor in tensors:
            if not isinstance(tensor, DTensor):  # sharded by an earlier call
                digest.update(tensor.detach().cpu().float().numpy().tobytes())
        digests = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(digests, digest.hexdigest())
        if len(set(digests)) > 1:
            what = "weights" if self.is_fsdp_enabled else "codebooks"
            raise RuntimeError(
                f"The processes have different {what} ({', '.join(x[:8] for x in digests)}): build the model from "
                "the same checkpoint, or after set_seed, on each of them."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Trainer copies tensors by their names in the file. Some names are only mapped to the modules' by
        `from_pretrained` (DINOv2's attention, for one), and its encoder would silently not be resumed."""
        model = self.accelerator.unwrap_model(self.model if model is None else model)
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

    def initialize_codebook(self) -> None:
        """Fits the codes to crops of the training images, see [`VQRAEModel.initialize_codebook`]: 32 latents a code,
        and for few codes up to 256 (`benchmarks/collapse.py`)."""
        model = self.accelerator.unwrap_model(self.model).to(self.args.device)  # FSDP's is not there yet
        codes = model.config.codebook_size
        latents_per_code = max(32, min(256, 2**18 // codes))
        needed = math.ceil(latents_per_code * codes / self.accelerator.num_processes)
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(self.args.seed + self.accelerator.process_index)
        progress = tqdm(
            total=needed, desc="Latents for the codebook", unit="latent", disable=not self.is_local_process_zero()
        )

        def batches():
            seen = passes = 0
            while seen < needed:
                passes += 1
                if self.train_transform:
                    self.train_transform.set_epoch(-passes)  # other crops in every pass, and not those of training
                for batch in self.get_train_dataloader():
                    patches = batch["pixel_values"][0, 0].numel() // model.config.decoder_patch_size**2
                    latents = len(batch["pixel_values"]) * patches
                    progress.update(min(latents, needed - seen))
                    seen += latents
                    yield batch
                    if seen >= needed:
                        return

        with progress:
            model.initialize_codebook(batches(), latents_per_code, seed=self.args.seed)
        torch.random.set_rng_state(state)

    # Checkpoints -----------------------------------------------------------------------------------------------------

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

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.adversary:
            self.adversary.load(checkpoint)
        if self.teacher:
            path = os.path.join(checkpoint, TEACHER_WEIGHTS)
            if not os.path.isfile(path):
                raise ValueError(f"{checkpoint} has no {TEACHER_WEIGHTS}: it is not of a run with distillation.")
            self.teacher.encoder.load_state_dict(load_file(path))

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

    # Steps -----------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        finite = loss.isfinite().float()
        if self._pixels_to_blame is None or not finite:
            self._pixels_to_blame = self._pairs_of_step[0]
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce(finite, reduction="mean")
        self._step_is_finite &= finite.item() == 1
        if self._discriminator_learns() and self._step_is_finite:
            self._add_terms(self.adversary.backward(*self._pairs_of_step, self.current_gradient_accumulation_steps))
        self._pairs_of_step = None
        return loss

    def _discriminator_learns(self) -> bool:
        return bool(self.adversary) and self.state.global_step >= self.args.discriminator_start_step

    def _add_terms(self, terms: dict[str, torch.Tensor]) -> None:
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(term.detach())

    def _clip_grad_norm(self, model):
        """Trainer's, but a norm that is not finite leaves the gradients as they are, to find where it comes from."""
        self.accelerator.unscale_gradients()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        value = norm.full_tensor() if isinstance(norm, DTensor) else norm  # the same on every process
        if value.isfinite() and self.args.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return value

    def _get_grad_norm(self, model, grad_norm=None):
        """Called before each step of the optimizer, when gradients have been summed over processes and clipped. A step
        that is not finite, on any process and of either network, is skipped on all of them and for both networks."""
        norm = self._clip_grad_norm(model) if grad_norm is None else grad_norm
        finite = self._step_is_finite and math.isfinite(norm)
        if self._discriminator_learns():
            if finite:
                discriminator_norm = self.adversary.clip()
                finite = math.isfinite(discriminator_norm)
            if finite:
                self.adversary.step()
                self._add_terms({"grad_norm_discriminator": discriminator_norm})
            else:
                self.adversary.discard()
        self._step_is_finite = True
        if finite:
            self._nonfinite_in_a_row, self._pixels_to_blame = 0, None
            return norm
        self._nonfinite_steps += 1
        self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self._nonfinite_in_a_row} steps in a row were not finite, the last one is "
                f"{self.state.global_step + 1}: {self._name_nonfinite()}. The weights are those from before; the last "
                "checkpoint is intact. Try a lower learning rate, a longer warm-up, or bf16 in place of fp16."
            )
        self._pixels_to_blame = None
        logger.warning(f"Step {self.state.global_step + 1} is skipped: its loss or gradient is not finite.")
        if self.accelerator.scaler is None:  # which skips by itself
            model.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient
        return norm

    def _name_nonfinite(self) -> str:
        """The first module whose output is not finite on the images of this step; or, of the parameters whose gradient
        is not, the one nearest to the pixels of the reconstruction."""
        model = self.accelerator.unwrap_model(self.model)
        found = []

        def look(name):
            def hook(module, inputs, output):
                tensors = output if isinstance(output, (tuple, list)) else [output]
                if not found and any(
                    isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors
                ):
                    found.append(f"the first output that is not finite is that of {name}")

            return hook

        hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
        try:
            with torch.no_grad():
                model(self._pixels_to_blame, return_loss=False)
        finally:
            for hook in hooks:
                hook.remove()
        reshard(model)
        for name, parameter in reversed(list(model.named_parameters())):
            if not found and parameter.grad is not None and not local_part(parameter.grad).isfinite().all():
                found.append(f"outputs are finite, the gradient of {name} is not")
        return found[0] if found else "outputs and gradients of this process are finite, its losses are not"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels = inputs["pixel_values"]
        outputs = model(pixels, image_tokens=inputs.get("image_tokens"), return_loss=False)
        reconstruction = outputs.decoded_pixel_values
        if not torch.is_grad_enabled():
            loss, _ = self.reconstruction_loss(reconstruction, pixels)
            if outputs.embedding_loss is not None:
                loss = loss + self.args.vq_weight * outputs.embedding_loss
            return (loss, outputs) if return_outputs else loss

        # The graph is cut at the pixels: a loss network gives its gradient there and then lets go of its activations,
        # before the model's own backward pass; and the adaptive weight needs no second pass through it.
        leaf = reconstruction.detach().requires_grad_()
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0  # fp16: small gradients

        def gradient(value):
            return torch.autograd.grad(value * scale, leaf)[0] / scale

        loss, terms = self.reconstruction_loss(leaf, pixels)
        direction = gradient(loss)
        loss = loss.detach()
        if self.adversary and self.state.global_step >= self.args.gan_start_step:
            adversarial = self.adversary.generator_loss(leaf)
            adversarial_direction = gradient(adversarial)
            weight = self.args.gan_weight
            if self.args.gan_adaptive:
                last_layer = self.accelerator.unwrap_model(model).last_layer
                ratio = adaptive_weight(reconstruction, last_layer, direction, adversarial_direction)
                self._add_terms({"adaptive_weight": ratio})
                weight = weight * ratio
            direction = direction + weight * adversarial_direction
            loss = loss + weight * adversarial.detach()
            terms["gan"] = adversarial
        loss = WithGradient.apply(reconstruction, loss, direction)
        if outputs.embedding_loss is None:  # the tokens were known
            self.accelerator.unwrap_model(model).quantizer.count_codes(outputs.image_tokens)
        else:
            loss = loss + self.args.vq_weight * outputs.embedding_loss
            terms["vq"] = outputs.embedding_loss
        if self.teacher:
            with torch.no_grad(), self.accelerator.autocast():
                target = self.teacher.get_image_features(pixels).last_hidden_state
            terms["distillation"] = F.mse_loss(outputs.last_hidden_state.float(), target.float())
            loss = loss + self.args.distillation_weight * terms["distillation"]
        self._add_terms({f"loss_{name}": term for name, term in terms.items()})
        self._pairs_of_step = pixels, reconstruction.detach()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), (outputs.decoded_pixel_values, outputs.image_tokens), inputs["pixel_values"]

    # Log and evaluation ----------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if "loss" in logs and self._terms:
            for name, values in self._terms.items():
                logs[name] = self.accelerator.reduce(torch.stack(values).mean(), reduction="mean").item()
            self._terms = {}
            for group in self.optimizer.param_groups:
                logs[f"learning_rate_{group['name']}"] = group["lr"]
            if self.adversary:
                logs["learning_rate_discriminator"] = self.adversary.optimizer.param_groups[0]["lr"]
            now, step = time.time(), self.state.global_step
            if self._last_log and step > self._last_log[1]:
                images = (step - self._last_log[1]) * self.args.train_batch_size * self.accelerator.num_processes
                images *= self.args.gradient_accumulation_steps
                logs["images_per_second"] = images / (now - self._last_log[0])
            self._last_log = now, step
            quantizer = self.accelerator.unwrap_model(self.model).quantizer
            counts = self._window.add(self.accelerator.reduce(quantizer.get_codebook_counts(), reduction="sum"))
            logs |= codebook_statistics(counts)
            self._report_collapse(logs)
            if nonfinite := quantizer.get_num_nonfinite():
                logs["nonfinite_latents"] = nonfinite
            if self._nonfinite_steps:
                logs["nonfinite_steps"] = self._nonfinite_steps
            if self.train_transform and (skipped := self.train_transform.count_skipped()):
                logs["skipped_images"] = skipped
            quantizer.reset_codebook_usage()
        super().log(logs, start_time)

    def _report_collapse(self, logs) -> None:
        """A warning, once, when under a tenth of the codes are in use though there were tokens enough and warm-up is
        over."""
        enough = logs["codebook_tokens"] >= 8 * self.accelerator.unwrap_model(self.model).config.codebook_size
        warm = self.state.global_step >= self.args.get_warmup_steps(self.state.max_steps)
        if enough and warm and logs["codebook_utilization"] < 0.1 and not self._collapse_reported:
            self._collapse_reported = True
            if not self.is_world_process_zero():
                return
            logger.warning(
                f"The codebook has collapsed: {logs['codebook_utilization']:.1%} of the codes were used by the last "
                f"{logs['codebook_tokens']:,} tokens. Likely causes: codes that did not start on the latents (train "
                "with --codebook_init kmeans); a learning rate of the quantizer at which the codes shrink to a few "
                "hubs (lower --quantizer_lr_multiplier, longer --warmup_steps); use_simvq false; or images with less "
                "variety than there are codes."
            )

    def evaluate(self, *args, **kwargs):
        model = self.accelerator.unwrap_model(self.model)
        # held-out tokens are counted by the metrics, not by the training log
        training_counts = model.quantizer.get_codebook_counts()
        with self.ema.applied() if self.ema else nullcontext():
            metrics = super().evaluate(*args, **kwargs)
        pictures = getattr(self.compute_metrics, "pictures", None)
        if pictures:
            if self.ema and self.ema.averages is not None:  # originals, raw, averaged; on all processes, for FSDP
                training, model.quantizer._cache = model.training, None  # codes of the averaged weights
                model.eval()
                with torch.no_grad():
                    raw = model(pictures[0].to(self.args.device), return_loss=False).decoded_pixel_values
                model.train(training)
                pictures = pictures[0], raw.cpu(), pictures[1]
            if self.is_world_process_zero():
                path = Path(self.args.output_dir) / "reconstructions" / f"step-{self.state.global_step:07d}.png"
                save_rows(pictures, path)
                self._show(path)
        model.quantizer._counts.copy_(training_counts)
        self._last_log = None  # evaluation is no training time
        return metrics

    def _show(self, path: Path) -> None:
        """Sends a picture to the trackers of --report_to that take pictures."""
        step = self.state.global_step
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                with Image.open(path) as picture:
                    callback.tb_writer.add_image("reconstructions", np.asarray(picture), step, dataformats="HWC")
        if "trackio" in self.args.report_to:
            import trackio

            trackio.log({"reconstructions": trackio.Image(str(path))}, step=step)
