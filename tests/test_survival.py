"""Runs that survive: exact resumption, kills, numbers that are not finite, images that cannot be read."""

import copy
import os
import signal
import warnings

import datasets
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import load_file
from test_loading import ROOT, TWO_PROCESSES, finish
from test_training import make_trainer, training_arguments
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from modeling_simvq import VQRAEModel
from reading.files import find_images
from reading.images import decode_image
from reading.sources import load_images
from training.data import TrainTransform, collate, readable_images, with_pixels
from training.ema import EMA


EVERYTHING = {
    "max_steps": 5, "save_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "seed": 1,
    "gan_weight": 0.1, "gan_adaptive": True, "lecam_weight": 0.1, "gan_start_step": 1, "discriminator_start_step": 0,
    "discriminator_lr_scheduler_type": "cosine", "distillation_weight": 1.0, "ema_decay": 0.9,
    "encoder_learning_rate": 1e-3, "lr_scheduler_type": "cosine",
}  # fmt: skip


def everything_trained(folder, output_dir, checkpoint=None, seed=0, **overrides):
    """A stage 2 with all that has a state; 12 images are 3 steps an epoch. DINOv2: its attention has other names in
    files than in modules."""
    torch.manual_seed(seed)
    model = VQRAEModel(tiny_config("dinov2", freeze_encoder=False, noise_tau=0.5))
    trainer = make_trainer(model, folder, output_dir, **EVERYTHING | overrides)
    if checkpoint:  # nothing may come from anywhere but the checkpoint
        for parameter in trainer.teacher.parameters():
            parameter.data.zero_()
        torch.rand(100), torch.rand(100, device=trainer.args.device)
    trainer.train(resume_from_checkpoint=checkpoint)
    return state_of(trainer)


def state_of(trainer):
    adversary = trainer.adversary
    return {
        "model": trainer.model.state_dict(),
        "average": trainer.ema.averages,
        "optimizer": trainer.optimizer.state_dict()["state"],
        "discriminator": adversary.pair.state_dict(),
        "discriminator optimizer": adversary.optimizer.state_dict()["state"],
        "discriminator schedule": adversary.scheduler.state_dict()["_step_count"],
        "teacher": trainer.teacher.encoder.state_dict(),
    }


def assert_equal(a, b, path=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path} {key}")
    else:
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), path


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_at_every_step(tmp_path, image_folder, workers, device, same_bits):
    """In the middle of an epoch and at its end, with accumulation, random crops, noise and DiffAugment."""
    options = {"dataloader_num_workers": workers, "discriminator_augment": True, "use_cpu": device.type == "cpu"}
    whole = everything_trained(image_folder, tmp_path / "whole", **options)
    for step in (1, 2, 4, 5) if workers == 0 else (2,):  # 5: nothing is left to do
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = everything_trained(image_folder, tmp_path / f"resumed-{step}", checkpoint, seed=step, **options)
        assert_equal(whole, resumed, f"from step {step}")


def test_killed_in_the_middle_of_saving(tmp_path, image_folder, device, same_bits):
    """SIGKILL when a checkpoint has its weights and not yet its optimizer: it is not picked up, and a run resumed from
    the one before ends as if nothing had happened."""
    program, on_cpu = tmp_path / "program.py", device.type == "cpu"
    program.write_text(f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from transformers import Trainer
from test_survival import everything_trained
torch.use_deterministic_algorithms({torch.are_deterministic_algorithms_enabled()})
save = Trainer._save_optimizer_and_scheduler
def killed(self, output_dir):
    if self.state.global_step == 3:
        assert os.path.exists(os.path.join(output_dir, "model.safetensors"))
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, output_dir)
Trainer._save_optimizer_and_scheduler = killed
everything_trained({str(image_folder)!r}, "out", use_cpu={on_cpu})
""")
    killed = finish([program], tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "unfinished" / "checkpoint-3" / "model.safetensors").exists()
    last = get_last_checkpoint(str(tmp_path / "out"))
    assert last.endswith("checkpoint-2")
    resumed = everything_trained(image_folder, tmp_path / "out", last, seed=7, use_cpu=on_cpu)
    whole = everything_trained(image_folder, tmp_path / "whole", use_cpu=on_cpu)
    assert_equal(whole, resumed)
    assert not (tmp_path / "out" / "unfinished").exists()


def test_checkpoints_hold_averages_as_the_model_and_the_raw_weights_beside(tmp_path, image_folder):
    state = everything_trained(image_folder, tmp_path, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    checkpoint = tmp_path / "checkpoint-5"
    model = VQRAEModel.from_pretrained(checkpoint).state_dict()
    raw = load_file(checkpoint / "raw_weights.safetensors")
    assert raw.keys() == state["average"].keys()
    assert not any("teacher" in name for name in model)
    for name in raw:
        assert torch.equal(model[name], state["average"][name])
        assert torch.equal(raw[name], state["model"][name])
    assert any(not torch.equal(model[name], raw[name]) for name in raw)


def test_checkpoints_without_an_optimizer_and_finished_runs(tmp_path, image_folder):
    model = VQRAEModel(tiny_config())
    make_trainer(model, image_folder, tmp_path, max_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match="save_only_model"):
        make_trainer(model, image_folder, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_averages_stay_applied_when_asked_for_twice(tiny_model):
    average = EMA(tiny_model, 0.5)
    average.start()
    weight = tiny_model.decoder.decoder_pred.weight
    raw = weight.data
    weight.data = raw + 1
    with average.applied():
        with average.applied():
            assert torch.equal(weight, raw)
        assert torch.equal(weight, raw)
    assert torch.equal(weight, raw + 1)


@pytest.mark.parametrize("wrong", [{"bf16_full_eval": True}, {"save_on_each_node": True}])
def test_options_that_would_spoil_a_run_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        training_arguments(tmp_path, **wrong)


def test_average_of_the_weights(tmp_path, image_folder):
    """a += (1 - d) (w - a), d = min(decay, (1 + t) / (10 + t)), from the initial weights."""
    model = VQRAEModel(tiny_config())
    expected = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    class Formula(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            decay = min(0.25, (1 + state.global_step) / (10 + state.global_step))
            for name, parameter in model.named_parameters():
                if name in expected:
                    expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()

    trainer = make_trainer(model, image_folder, tmp_path, max_steps=4, ema_decay=0.25)
    trainer.add_callback(Formula())
    trainer.train()
    assert trainer.ema.averages.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trainer.ema.averages[name], tensor, msg=name)
    assert "encoder.embeddings.cls_token" not in expected


def test_discriminator_of_an_earlier_run_is_loaded(tmp_path, image_folder):
    state = everything_trained(image_folder, tmp_path / "first", max_steps=1)
    file = tmp_path / "first" / "checkpoint-1" / "discriminator.safetensors"
    model = VQRAEModel(tiny_config())
    trainer = make_trainer(model, image_folder, tmp_path / "b", gan_weight=0.1, discriminator_weights=str(file))
    assert_equal(trainer.adversary.pair.state_dict(), state["discriminator"])
    with pytest.raises(ValueError, match="no discriminator"):
        make_trainer(model, image_folder, tmp_path / "b", gan_weight=0.1, discriminator_weights="nowhere.safetensors")
    with pytest.raises(ValueError, match="another discriminator"):
        other = str(tmp_path / "first" / "checkpoint-1" / "raw_weights.safetensors")
        make_trainer(model, image_folder, tmp_path / "b", gan_weight=0.1, discriminator_weights=other)


def nan_at(trainer, steps, last_micro_batch_only=False):
    """Makes the pixels of these steps NaN."""
    prepare = trainer._prepare_inputs

    def broken(inputs):
        inputs = prepare(inputs)
        if last_micro_batch_only and not trainer.accelerator.sync_gradients:
            return inputs
        if trainer.model.training and trainer.state.global_step + 1 in steps:
            inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
        return inputs

    trainer._prepare_inputs = broken


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, image_folder):
    """Generator, discriminator, their optimizers and the LeCam averages are as before; later steps go on. In one step
    the loss is NaN (in the second of two micro-batches), in another only a gradient, in another the discriminator's."""

    class Record(TrainerCallback):
        states = []

        def on_step_end(self, args, state, control, **kwargs):
            self.states.append(copy.deepcopy(state_of(trainer)))

    model = VQRAEModel(tiny_config(freeze_encoder=False))
    trainer = make_trainer(
        model, image_folder, tmp_path, max_steps=5, gan_weight=0.1, lecam_weight=0.1, gradient_accumulation_steps=2,
        per_device_train_batch_size=2, distillation_weight=1.0,
    )  # fmt: skip
    trainer.add_callback(Record())
    nan_at(trainer, {2}, last_micro_batch_only=True)

    def spoil(step):
        return lambda gradient: gradient * float("nan") if trainer.state.global_step + 1 == step else gradient

    model.decoder.decoder_norm.bias.register_hook(spoil(3))
    trainer.adversary.pair.discriminator.layers[0].weight.register_hook(spoil(4))
    trainer.train()
    one, two, three, four, five = Record.states
    for state in (one, two, three, four):
        del state["average"]  # goes on towards the weights
        assert_equal(one, state)
    flat = [tensor for part in ("model", "discriminator") for tensor in five[part].values()]
    assert all(tensor.isfinite().all() for tensor in flat)
    assert not torch.equal(four["model"]["decoder.decoder_pred.weight"], five["model"]["decoder.decoder_pred.weight"])
    name = "discriminator.layers.0.weight"
    assert not torch.equal(four["discriminator"][name], five["discriminator"][name])
    assert [entry.get("nonfinite_steps") for entry in trainer.state.log_history[:5]] == [None, 1, 2, 3, 3]


def test_after_many_such_steps_the_run_stops_and_names_the_module(tmp_path, image_folder):
    model = VQRAEModel(tiny_config())
    trainer = make_trainer(
        model, image_folder, tmp_path, max_steps=9, save_steps=1, max_nonfinite_steps=3, ema_decay=0.5
    )

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                model.decoder.decoder_layers[1].fc1.weight.data[0, 0] = float("inf")

    trainer.add_callback(Break())
    with pytest.raises(FloatingPointError, match="3 steps in a row.*decoder.decoder_layers.1.fc1") as error:
        trainer.train()
    assert "the last one is 5" in str(error.value)

    trainer = make_trainer(VQRAEModel(tiny_config()), image_folder, tmp_path / "b", max_nonfinite_steps=1)
    trainer.model.decoder.decoder_norm.bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="the gradient of decoder.decoder_norm.bias is not"):
        trainer.train()


@pytest.mark.parametrize(
    "spoil, where",
    [
        ("loss", "outputs are finite, loss_l2 is not"),
        ("discriminator", "the gradient of the discriminator is not finite"),
        ("length", "a second pass over its images was finite"),  # each number is finite, the norm of all is not
    ],
)
def test_it_is_said_where_else_numbers_are_not_finite(tmp_path, image_folder, spoil, where):
    model = VQRAEModel(tiny_config())
    trainer = make_trainer(model, image_folder, tmp_path, max_nonfinite_steps=1, gan_weight=0.1)
    if spoil == "loss":
        mse = trainer.reconstruction_loss.forward
        trainer.reconstruction_loss.forward = lambda x, y: [
            mse(x, y)[0] * float("nan"),
            {"l2": mse(x, y)[1]["l2"] * float("nan")},
        ]
    elif spoil == "discriminator":
        weight = trainer.adversary.pair.discriminator.layers[0].weight
        weight.register_hook(lambda gradient: gradient * float("nan"))
    else:
        model.decoder.decoder_pred.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e25))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=where):
        trainer.train()
    assert_equal(before, model.state_dict())


def test_processes_skip_together_and_end_with_equal_weights(tmp_path, image_folder, device):
    """2 ranks (gloo, or NCCL on two GPUs) with GAN, distillation, averages and accumulation; on one of them a batch is
    NaN. No flag for unused parameters, no buffers sent."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    program, use_cpu = tmp_path / "program.py", {"use_cpu": device.type == "cpu"}
    program.write_text(f"""
import os
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from conftest import tiny_config
from modeling_simvq import VQRAEModel
from test_survival import EVERYTHING, make_trainer, nan_at, state_of
torch.manual_seed(0)
model = VQRAEModel(tiny_config(freeze_encoder=False))
trainer = make_trainer(model, {str(image_folder)!r}, "out", **EVERYTHING | {{"save_steps": 5}} | {use_cpu})
assert not trainer.args.ddp_find_unused_parameters and not trainer.args.ddp_broadcast_buffers
rank = trainer.args.process_index
if rank == 1:
    nan_at(trainer, {{2}})
trainer.train()
logged = [entry.get("nonfinite_steps") for entry in trainer.state.log_history[:5]]
assert logged == [None, 1, 1, 1, 1], logged
torch.save({{"state": state_of(trainer), "metrics": trainer.evaluate()}}, f"{{rank}}.pt")
trainer = make_trainer(model, {str(image_folder)!r}, "not_finite", max_nonfinite_steps=1, **{use_cpu})
if rank == 1:
    nan_at(trainer, {{2}})
try:
    trainer.train()
except FloatingPointError as error:  # both say what one of them has found
    assert str(error).count("is that of encoder.embeddings.patch_embeddings.projection (process 1)") == 1
    print("found together", flush=True)
model.quantizer.embedding.weight[0, 0] += rank
try:
    trainer.train()
except RuntimeError as error:
    assert "different codebooks" in str(error)
    print("codebooks compared", flush=True)
os._exit(0)  # gloo's threads may abort a process that ends before they do
""")
    done = finish([*TWO_PROCESSES, program], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("codebooks compared") == 2 and done.stdout.count("found together") == 2
    first, second = (torch.load(tmp_path / f"{rank}.pt", "cpu", weights_only=True) for rank in range(2))
    assert_equal(first["state"], second["state"])
    # what both measured together is what one process measures
    model = VQRAEModel.from_pretrained(tmp_path / "out" / "checkpoint-5")
    alone = make_trainer(model, image_folder, tmp_path / "alone", ema_decay=0.0, **use_cpu).evaluate()
    for name in ("psnr", "ssim", "codebook_utilization", "codebook_perplexity", "codebook_tokens"):
        assert first["metrics"][f"eval_{name}"] == pytest.approx(alone[f"eval_{name}"], rel=1e-6), name


def test_streams_are_split_among_processes_and_workers_without_duplicates(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import os
import datasets, torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
stream = datasets.Dataset.from_dict({"image": list(range(48))}).to_iterable_dataset(num_shards=8)
stream = stream.shuffle(seed=0, buffer_size=4)
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
loader = accelerator.prepare(DataLoader(stream, batch_size=4, num_workers=2))
seen = [value for batch in loader for value in batch["image"].tolist()]
torch.save(seen, f"{accelerator.process_index}.pt")
os._exit(0)
""")
    done = finish([*TWO_PROCESSES, program], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not set(first) & set(second) and sorted(first + second) == list(range(48))


@pytest.fixture
def difficult_folder(tmp_path):
    """One image of each kind that a crawl of the web has."""
    folder = tmp_path / "difficult"
    folder.mkdir()
    good = Image.effect_noise((40, 30), 80).convert("RGB")
    good.save(folder / "good.png")
    good.convert("CMYK").save(folder / "cmyk.jpg")
    good.convert("P").save(folder / "palette.png")
    good.convert("L").save(folder / "grey.png")
    good.convert("1").save(folder / "bilevel.png")
    Image.frombytes("I;16", (40, 30), bytes(range(240)) * 10).save(folder / "sixteen.png")
    transparent = good.convert("RGBA")
    transparent.putalpha(0)
    transparent.save(folder / "alpha.png")
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    Image.new("RGB", (3000, 20), "blue").save(folder / "line.png")
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\xff\xff\xff\xff"
    good.save(folder / "exif.jpg", exif=exif)
    # unreadable
    data = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "empty.webp").write_bytes(b"")
    bomb = bytearray(data)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # claims 60,000 x 60,000 pixels
    (folder / "bomb.png").write_bytes(bytes(bomb))
    return folder


UNREADABLE = {"truncated.png", "text.jpg", "empty.webp", "bomb.png"}


@pytest.mark.parametrize("workers", [0, 2])
def test_difficult_images_are_trained_through_or_skipped_counted_and_listed(tmp_path, difficult_folder, workers):
    listing = tmp_path / "skipped_images.txt"
    transform = TrainTransform(32, 0.5, skipped_list=listing)
    data = with_pixels(load_images(str(difficult_folder)), transform)
    loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=collate, num_workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = [batch["pixel_values"] for batch in loader] + [batch["pixel_values"] for batch in loader]
    pixels = torch.cat(batches)
    assert len(pixels) == 2 * 14 and pixels.isfinite().all() and pixels.min() >= 0 and pixels.max() <= 1
    listed = [line.split("\t") for line in listing.read_text().splitlines()]
    assert {os.path.basename(path) for path, _ in listed} == UNREADABLE
    assert all("Cannot read the image" in reason for _, reason in listed)
    assert transform.count_skipped() == len(UNREADABLE)
    # a batch of nothing else: another image of the folder
    index = [file.name for file in find_images(difficult_folder)].index("text.jpg")
    crop = data[index]["pixel_values"]
    assert any(torch.equal(crop, data[i]["pixel_values"]) for i in range(14) if i != index)

    # held-out images are checked beforehand: a metric must not be of other images
    readable = readable_images(find_images(difficult_folder), listing)
    assert {file.name for file in find_images(difficult_folder)} - {file.name for file in readable} == UNREADABLE
    # and without a list an unreadable image is an error that names it
    with pytest.raises(ValueError, match="text.jpg"):
        with_pixels(load_images(str(difficult_folder)), TrainTransform(32, 0.5))[index]


def test_modes_become_rgb_without_loss(difficult_folder):
    def pixels(name):
        return TrainTransform(32, 0.5).processor.convert_to_rgb(
            decode_image({"path": str(difficult_folder / name), "bytes": None})
        )

    assert pixels("alpha.png").getextrema() == ((255, 255),) * 3  # on white
    low, high = pixels("sixteen.png").getextrema()[0]
    assert low < 40 and 200 < high < 255  # not clipped at 255
    assert pixels("pixel.png").getpixel((0, 0)) == (255, 0, 0)
    assert pixels("grey.png").getextrema() == pixels("good.png").convert("L").convert("RGB").getextrema()


def test_crops_depend_on_name_epoch_and_seed_alone(image_folder):
    records = [record["image"] for record in load_images(str(image_folder))]

    def crops(records, epoch=0, seed=0):
        transform = TrainTransform(32, 0.5, seed)
        transform.set_epoch(epoch)
        return transform({"image": records})["pixel_values"]

    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = crops(records)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    backwards = crops(records[::-1])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, backwards))
    for other in (crops(records, epoch=1), crops(records, seed=1)):
        assert sum(torch.equal(a, b) for a, b in zip(first, other)) <= 1
    streamed = datasets.IterableDataset.from_generator(lambda: ({"image": record} for record in records))
    assert all(torch.equal(a, b["pixel_values"]) for a, b in zip(first, with_pixels(streamed, TrainTransform(32, 0.5))))


def test_gradient_checkpointing_gives_the_same_gradients(pixels):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(freeze_encoder=False)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(pixels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert model.encoder.is_activation_checkpointing and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_frozen_encoder_and_teacher_hold_no_activations(tmp_path, image_folder, pixels):
    """Saved for backward: nothing in the frozen encoder, and nothing of the teacher."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    model = VQRAEModel(tiny_config())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_image_features(pixels)
    assert not saved
    trainer = make_trainer(
        VQRAEModel(tiny_config(freeze_encoder=False)), image_folder, tmp_path, distillation_weight=1.0
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.teacher.get_image_features(pixels)
    assert not saved
