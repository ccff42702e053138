"""FSDP, on two gloo ranks that accelerate starts with the file of configs/.

accelerate takes processes on CPUs for DDP, whatever its configuration says; `shard_on_cpus` tells it otherwise. All the
rest is what runs on GPUs."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import ENCODERS, tiny_config
from PIL import Image
from safetensors.torch import load_file
from test_loading import ROOT, finish
from test_survival import EVERYTHING, nan_at
from test_training import make_trainer, training_arguments
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from modeling_simvq import VQRAEModel
from training.sharding import prepare_for_fsdp


def shard_on_cpus():
    """What AcceleratorState does about FSDP for processes on GPUs, for those on CPUs too."""
    start = AcceleratorState.__init__

    def started(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = started


def stage_1(output_dir, **overrides):
    """4 images a step, of 12; gradients are clipped; evaluations between the steps, which leave whole parameters
    behind."""
    torch.manual_seed(0)
    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 1, "eval_strategy": "steps", "ema_decay": 0.5}
    options |= {"max_grad_norm": 0.01, "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1))}
    return make_trainer(VQRAEModel(tiny_config()), "images", output_dir, **options | overrides)


def stage_2(output_dir):
    """bf16, k-means, GAN with adaptive weight and LeCam, distillation, accumulation; one process has NaN in step 2."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config("siglip_vision_model", freeze_encoder=False, codebook_init="kmeans"))
    options = {"save_steps": 5, "bf16": True, "max_grad_norm": 1e9}  # norms are rounded differently, and bf16 shows it
    trainer = make_trainer(model, "images", output_dir, **EVERYTHING | options)
    if trainer.args.process_index == 1:
        nan_at(trainer, {2})
    trainer.train()
    logged = [entry.get("nonfinite_steps") for entry in trainer.state.log_history[:5]]
    assert logged == [None, 1, 1, 1, 1], logged
    return trainer


def program():
    """What both ranks run."""
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    assert not stage_2("stage_2_ddp").is_fsdp_enabled
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    shard_on_cpus()
    assert stage_2("stage_2").is_fsdp_enabled

    trainer = stage_1("whole")
    trainer.train()
    parameters = list(trainer.model.parameters())
    assert all(isinstance(tensor, DTensor) for tensor in [*parameters, *trainer.ema.averages.values()])
    assert sum(p.to_local().numel() for p in parameters) < 0.6 * sum(p.numel() for p in parameters)
    units = [type(module).__name__ for module in trainer.model.modules()]
    assert units.count("FSDPVQRAEDecoderLayer") == units.count("FSDPDinov2Layer") == 2
    stage_1("resumed").train(resume_from_checkpoint="whole/checkpoint-2")

    with pytest.raises(ValueError, match="without FSDP"):
        stage_1("refused").train(resume_from_checkpoint="stage_2_ddp/checkpoint-5")
    with pytest.raises(RuntimeError, match="different weights"):
        trainer = stage_1("refused")
        trainer.model.decoder.cls_token.data += trainer.args.process_index
        trainer.train()
    trainer = stage_1("not_finite", max_nonfinite_steps=1)
    if trainer.args.process_index == 1:
        nan_at(trainer, {2})
    where = ("the gradient of decoder.decoder_pred", "the first output that is not finite")[trainer.args.process_index]
    with pytest.raises(FloatingPointError, match=where):
        trainer.train()
    os._exit(0)  # gloo's threads may abort a process that ends as others do


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which two ranks have run `program`, and one process stage 1."""
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "images").mkdir()
    for number in range(12):
        Image.effect_noise((48, 40), 80).convert("RGB").save(folder / "images" / f"{number}.png")
    (folder / "program.py").write_text(
        f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nfrom test_fsdp import program\nprogram()\n"
    )
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--config_file", ROOT / "configs" / "accelerate_fsdp.yaml", "program.py"]
    done = finish(launch, folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-6000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage_1("alone").train()
    return folder


def assert_close(folder, other, tolerance, *names):
    for name in names:
        first, second = (load_file(x / f"{name}.safetensors") for x in (folder, other))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            torch.testing.assert_close(tensor, second[key], atol=tolerance, rtol=0, msg=f"{name} {key}")


def test_stage_1_trains_averages_and_saves_as_one_process(runs):
    """The same global batches; and what is saved as the model are the averages, whole."""
    sharded, alone = runs / "whole" / "checkpoint-4", runs / "alone" / "checkpoint-4"
    assert_close(sharded, alone, 1e-5, "model", "raw_weights")
    model, raw = load_file(sharded / "model.safetensors"), load_file(sharded / "raw_weights.safetensors")
    assert max((model[name] - raw[name]).abs().max() for name in raw) > 1e-3
    logs = [TrainerState.load_from_json(str(x / "trainer_state.json")).log_history for x in (sharded, alone)]
    for name in ("loss", "grad_norm", "codebook_tokens", "eval_psnr", "eval_codebook_perplexity"):
        values = [[entry[name] for entry in log if name in entry] for log in logs]
        assert len(values[0]) == 4 and values[0] == pytest.approx(values[1], rel=1e-5), name


def test_checkpoints_load_with_from_pretrained_and_bring_their_code(runs):
    sharded, alone = runs / "whole" / "checkpoint-4", runs / "alone" / "checkpoint-4"
    saved = load_file(sharded / "model.safetensors")
    loaded = VQRAEModel.from_pretrained(sharded).state_dict()
    assert sum(tensor.numel() for tensor in loaded.values()) == sum(tensor.numel() for tensor in saved.values())
    assert all(torch.equal(loaded[name], saved[name]) for name in loaded.keys() & saved.keys())
    assert (sharded / "config.json").read_text() == (alone / "config.json").read_text()  # auto_map, for one
    state = {"optimizer.bin", "optimizer.pt", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert set(os.listdir(sharded)) - state == set(os.listdir(alone)) - state


def test_a_resumed_run_ends_like_the_uninterrupted_one(runs):
    assert_close(runs / "resumed" / "checkpoint-4", runs / "whole" / "checkpoint-4", 0, "model", "raw_weights")


def test_stage_2_with_everything_ends_like_ddp(runs):
    assert_close(
        runs / "stage_2" / "checkpoint-5", runs / "stage_2_ddp" / "checkpoint-5", 1e-5,
        "model", "raw_weights", "discriminator",
    )  # fmt: skip


def prepare(model, args, precision="no", **options):
    options = {
        "fsdp_version": 2,
        "state_dict_type": "FULL_STATE_DICT",
        "auto_wrap_policy": "transformer_based_wrap",
    } | options
    plugin = FullyShardedDataParallelPlugin(**options)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision, autocast=lambda: torch.autocast("cpu")
    )
    prepare_for_fsdp(model, accelerator, args)
    return plugin


@pytest.mark.parametrize("encoder", ENCODERS)
def test_layers_of_every_encoder_are_sharded_one_by_one(tmp_path, encoder):
    model = VQRAEModel(tiny_config(encoder))
    plugin = prepare(model, training_arguments(tmp_path))
    plugin.set_auto_wrap_policy(model)  # accelerate's, which raises where there is no such class
    names = [type(module).__name__ for module in model.modules()]
    assert [names.count(name) for name in plugin.transformer_cls_names_to_wrap] == [2, 2]


@pytest.mark.parametrize(
    ("named", "of_plugin", "of_training"),
    [
        ("fsdp_version: 1", {"fsdp_version": 1, "sync_module_states": False}, {}),
        ("SIZE_BASED_WRAP", {"auto_wrap_policy": "size_based_wrap"}, {}),
        ("SHARDED_STATE_DICT", {"state_dict_type": "SHARDED_STATE_DICT"}, {}),
        ("fsdp_cpu_ram_efficient_loading", {"cpu_ram_efficient_loading": True}, {}),
        ("fsdp_offload_params", {"cpu_offload": True}, {}),
        ("fsdp_activation_checkpointing", {"activation_checkpointing": True}, {}),
        ("--fp16", {"precision": "fp16"}, {}),
        ("--torch_compile", {}, {"torch_compile": True}),
        ("--auto_find_batch_size", {}, {"auto_find_batch_size": True}),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, monkeypatch, tiny_model, named, of_plugin, of_training):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the plugin would leave set
    with pytest.raises(ValueError, match=f"{named} is not supported with FSDP: use"):
        prepare(tiny_model, training_arguments(tmp_path, **of_training), **of_plugin)
