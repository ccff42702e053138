import ast
import inspect
import json
import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import encoder_config, tiny_config
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_loading import ROOT, TWO_PROCESSES, finish, run
from transformers import Trainer, TrainerCallback

from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.files import find_images
from reading.images import decode_image
from reading.models import load_pretrained
from reading.sources import load_images
from training.arguments import VQRAETrainingArguments
from training.data import EvalTransform, TrainTransform, collate, split_files, with_pixels
from training.losses import PerceptualLoss, ReconstructionLoss
from training.monitoring import EvaluationMetrics, MeanTerms
from training.trainer import PRIVATE_METHODS, VQRAETrainer


def training_arguments(output_dir, **overrides):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "use_cpu": True}
    defaults |= {"lpips_weight": 0.0, "learning_rate": 1e-2, "logging_steps": 1, "disable_tqdm": True}
    arguments = VQRAETrainingArguments(str(output_dir), **{**defaults, "report_to": "none", **overrides})
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs the process of a test uses one
    return arguments


def make_trainer(model, folder, output_dir, optimizers=(None, None), **overrides):
    data = load_images(str(folder))
    processor = VQRAEImageProcessor.for_image_size(32)
    transform = TrainTransform(32, 0.5)
    return VQRAETrainer(
        model,
        training_arguments(output_dir, **overrides),
        train_transform=transform,
        train_dataset=with_pixels(data, transform),
        eval_dataset=with_pixels(data, EvalTransform(processor)),
        data_collator=collate,
        processing_class=processor,
        optimizers=optimizers,
    )


def test_a_run_on_a_few_images_logs_by_default(tmp_path):
    """50 images in batches of 8 for 3 epochs are 21 steps; the default of transformers, 500, would show nothing."""
    assert VQRAETrainingArguments(str(tmp_path), use_cpu=True).logging_steps <= 10


def test_after_a_reload_training_moves_projection_and_decoder_but_neither_encoder_nor_codebook(tmp_path, image_folder):
    """Saved, loaded through AutoModel in a fresh process, two steps with Trainer."""
    VQRAEModel(tiny_config()).save_pretrained(tmp_path / "start")
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from transformers import AutoModel
from test_training import make_trainer
model = AutoModel.from_pretrained("start", trust_remote_code=True)
trainer = make_trainer(model, {str(image_folder)!r}, "out", weight_decay=0.1)
trainer.train()
trainer.save_model("end")
"""
    run(code, tmp_path, HF_HOME=str(tmp_path / "home"))
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "end"))
    assert start.keys() == end.keys()
    for name in start:
        frozen = name.startswith("encoder.") or name == "quantizer.embedding.weight"
        # one bias has no gradient: softmax does not see what is common to all keys
        if not name.endswith("k_proj.bias"):
            assert torch.equal(start[name], end[name]) == frozen, name


def test_private_methods_of_trainer_are_those_that_are_listed():
    """Overridden by a class of ours, or called, wherever in training/; the discriminator's steps hang on none."""
    overridden = {
        name
        for owner in VQRAETrainer.__mro__[: VQRAETrainer.__mro__.index(Trainer)]
        for name in vars(owner)
        if inspect.isfunction(getattr(Trainer, name, None))
    }
    called = {
        node.attr
        for file in (ROOT / "training").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and inspect.isfunction(getattr(Trainer, node.attr, None))
    }
    private = {name for name in overridden | called if name.startswith("_") and not name.startswith("__")}
    assert private == set(PRIVATE_METHODS)
    assert not private & {"_clip_grad_norm", "_get_grad_norm"}


@pytest.mark.parametrize("name", ["_run_epoch", "_save_checkpoint"])
def test_a_transformers_without_such_a_method_is_refused(tmp_path, image_folder, monkeypatch, name):
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(RuntimeError, match=rf"transformers {transformers.__version__} has no Trainer\.{name}"):
        make_trainer(VQRAEModel(tiny_config()), image_folder, tmp_path)


def test_log_and_evaluation(tmp_path, image_folder):
    """The metrics are those of the averaged weights; the picture has originals, both reconstructions."""
    trainer = make_trainer(VQRAEModel(tiny_config()), image_folder, tmp_path, l1_weight=0.5, vq_weight=2.0)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.5 * log["loss_l1"] + log["loss_l2"] + 2 * log["loss_vq"], rel=1e-3)
    assert log["codebook_tokens"] == 4 * 16
    assert 0 < log["codebook_utilization"] <= 1 <= log["codebook_perplexity"] <= 64

    metrics = trainer.evaluate()
    model = trainer.model.eval()
    processor = VQRAEImageProcessor.for_image_size(32)
    images = [Image.open(file) for file in find_images(image_folder)]
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad(), trainer.ema.applied():
        output = model(pixels)
    rounded = (output.decoded_pixel_values.clamp(0, 1) * 255).round() / 255
    psnr = (-10 * (rounded - (pixels * 255).round() / 255).pow(2).mean((1, 2, 3)).log10()).mean()
    assert metrics["eval_psnr"] == pytest.approx(psnr.item(), abs=1e-3)
    assert metrics["eval_codebook_tokens"] == 12 * 16
    assert metrics["eval_codebook_utilization"] == len(output.image_tokens.unique()) / 64
    frequencies = torch.bincount(output.image_tokens.flatten()).double() / (12 * 16)
    entropy = -sum(p * p.log() for p in frequencies if p > 0)
    assert metrics["eval_codebook_perplexity"] == pytest.approx(entropy.exp().item())
    with Image.open(tmp_path / "reconstructions" / "step-0000002.png") as picture:
        assert picture.size == (8 * 34 + 2, 6 * 34 + 2)


def test_what_is_kept_between_logs_and_in_an_evaluation_does_not_grow():
    def size(holder):
        return len(pickle.dumps(vars(holder)))

    torch.manual_seed(0)
    terms, values = MeanTerms(), torch.rand(1000, 2)
    metrics, images = EvaluationMetrics(64, num_pictures=0), torch.rand(40, 2, 3, 16, 16)
    for step, (l1, l2) in enumerate(values):
        terms.add({"l1": l1, "l2": l2})
        if step < 40:
            batch = SimpleNamespace(
                predictions=(images[step], torch.zeros(2, 2, 2).long()), label_ids=images[step].flip(0)
            )
            result = metrics(batch, compute_result=step == 39)
        if step == 10:
            early = size(terms), size(metrics)
        if step == 38:
            assert size(metrics) < 1.1 * early[1]
    assert size(terms) < 1.1 * early[0]
    torch.testing.assert_close(torch.stack(list(terms.means().values())), values.mean(0))
    rounded = (images * 255).round() / 255
    psnr = -10 * (rounded - rounded.flip(1)).square().mean((2, 3, 4)).log10().mean()
    assert result["psnr"] == pytest.approx(psnr.item(), abs=1e-4) and result["codebook_tokens"] == 80 * 4


def test_what_k_means_costs_is_told_before_it_starts(tmp_path, image_folder, capsys):
    model = VQRAEModel(tiny_config(codebook_init="kmeans"))
    told = []
    model.initialize_codebook = lambda *args, **kwargs: told.append(capsys.readouterr().out)
    make_trainer(model, image_folder, tmp_path).initialize_codebook()
    # 256 latents for each of 64 codes, 16 of an image; there are 12 images
    assert "64 codes" in told[0] and "16,384 latents of 1,024 crops" in told[0] and "85.3 of each image" in told[0]


def test_memory_is_pinned_for_gpus_alone(tmp_path, image_folder):
    trainer = make_trainer(VQRAEModel(tiny_config()), image_folder, tmp_path)
    assert not trainer.get_train_dataloader().pin_memory and not trainer.get_eval_dataloader().pin_memory


class Board(TrainerCallback):
    """In place of TensorBoardCallback, which needs tensorboard."""


def test_pictures_go_to_tensorboard(tmp_path, image_folder, monkeypatch):
    sent = []

    class Writer:
        def add_image(self, name, image, step, dataformats):
            sent.append((name, image.shape, step, dataformats))

    trainer = make_trainer(VQRAEModel(tiny_config()), image_folder, tmp_path)
    monkeypatch.setattr("training.monitoring.TensorBoardCallback", Board)
    trainer.add_callback(Board())
    trainer.callback_handler.callbacks[-1].tb_writer = Writer()
    trainer.evaluate()
    assert sent == [("reconstructions", (4 * 34 + 2, 8 * 34 + 2, 3), 0, "HWC")]


def test_an_optimizer_of_ones_own(tmp_path, image_folder):
    """Its groups have no names to log their learning rates by, unless it gives them some."""
    model = VQRAEModel(tiny_config())
    projection, rest = model.quantizer.embedding_proj.parameters(), model.decoder.parameters()
    optimizer = torch.optim.SGD([{"params": projection, "lr": 0.1, "name": "projection"}, {"params": rest}], lr=0.2)
    trainer = make_trainer(model, image_folder, tmp_path, optimizers=(optimizer, None))
    before = model.decoder.decoder_pred.weight.clone()
    trainer.train()
    assert not torch.equal(before, model.decoder.decoder_pred.weight)
    log = trainer.state.log_history[0]
    rates = {name: value for name, value in log.items() if name.startswith("learning_rate_")}
    assert rates == {"learning_rate_projection": pytest.approx(0.05)}  # after one of two steps


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_best_model_is_loaded_whole_at_the_end(tmp_path, image_folder, ema_decay):
    model = VQRAEModel(tiny_config("dinov2", freeze_encoder=False))
    trainer = make_trainer(
        model, image_folder, tmp_path, max_steps=3, save_steps=1, eval_steps=1, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="psnr", greater_is_better=False, learning_rate=1.0,
        ema_decay=ema_decay,
    )  # fmt: skip
    trainer.train()  # the "best" is the lowest PSNR here, which is not that of the last step
    best = VQRAEModel.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == trainer.state.best_model_checkpoint
    with trainer.ema.applied() if ema_decay else nullcontext():
        assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_losses_equal_their_formulas():
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    total, terms = ReconstructionLoss(0.5, 2.0, 0.0, "vgg")(x, y)
    assert set(terms) == {"l1", "l2"}
    torch.testing.assert_close(total, 0.5 * (x - y).abs().mean() + 2 * (x - y).pow(2).mean())


def test_loss_on_gradients_counts_steps_and_no_offsets():
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    total, _ = ReconstructionLoss(0.0, 0.0, 0.0, "vgg", gradient_weight=3.0)(x, y)
    down = np.abs(np.diff(x.numpy(), axis=2) - np.diff(y.numpy(), axis=2)).mean()
    across = np.abs(np.diff(x.numpy(), axis=3) - np.diff(y.numpy(), axis=3)).mean()
    assert total.item() == pytest.approx(3 * (down + across) / 2, rel=1e-5)
    assert ReconstructionLoss(0.0, 0.0, 0.0, "vgg", gradient_weight=1.0)(x + 0.25, x)[0] < 1e-6


@pytest.mark.skipif("VQRAE_ASSETS" not in os.environ, reason="VQRAE_ASSETS is not set: no LPIPS weights")
@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_equals_the_lpips_package_and_lets_gradients_through(network):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    x, y = (torch.rand(2, 3, 64, 64) * 1.2 - 0.1).requires_grad_(), torch.rand(2, 3, 64, 64)
    loss = PerceptualLoss(network)(x, y)
    expected = lpips.LPIPS(net=network, verbose=False)(x, y, normalize=True).mean()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    loss.backward()
    assert x.grad.abs().sum() > 0


def test_split_keeps_sources_apart():
    files = [Path(f"{source}-{number}.png") for source in "abcdefgh" for number in range(5)]
    train, held_out = split_files(files, 0.25, "-")
    assert len(train) == 30 and len(held_out) == 10
    assert not {file.name[0] for file in train} & {file.name[0] for file in held_out}
    assert split_files(files, 0.25, "-") == (train, held_out)
    alone = [Path("a.png"), Path("a-1.png"), Path("b.png"), Path("b-1.png")]  # a name without the separator
    assert split_files(alone, 0.5, "-") == (alone[2:], alone[:2])
    with pytest.raises(ValueError, match="--eval_data"):
        split_files(files[:5], 0.25, "-")


def test_streams_are_transformed(image_folder):
    stream = load_images(str(image_folder)).to_iterable_dataset()
    items = list(with_pixels(stream, TrainTransform(32, 0.5)))
    assert collate(items)["pixel_values"].shape == (12, 3, 32, 32)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode_image({"path": str(tmp_path / "turned.jpg"), "bytes": None}).size == (20, 30)


def test_what_pillow_would_start_another_program_for_is_not_opened(tmp_path, monkeypatch):
    # the program need not be here: without it, opening fails as well
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("started"))
    Image.new("RGB", (30, 20)).save(tmp_path / "script.eps")
    (tmp_path / "script.eps").rename(tmp_path / "image.png")
    with pytest.raises(ValueError, match="image.png"):
        decode_image({"path": str(tmp_path / "image.png"), "bytes": None})


def test_another_image_size_for_a_saved_model(tmp_path):
    """The encoder sees as many patches as there are tokens; what cannot be is told when the model is loaded."""
    VQRAEModel(tiny_config()).save_pretrained(tmp_path)
    model = load_pretrained(str(tmp_path), {"image_size": 48})
    assert (model.config.image_size, model.config.encoder_input_size, model.config.grid_size) == (48, 48, 6)
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="4 x 4.*6 x 6"):
        load_pretrained(str(tmp_path), {"image_size": 48, "encoder_input_size": 32})


def test_empty_folder_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="No images"):
        load_images(str(tmp_path))
    listing = tmp_path / "list.txt"
    listing.write_text("nowhere.png\n")
    with pytest.raises(ValueError, match="nowhere.png"):
        load_images(str(listing))


def test_script_trains_saves_and_resumes(tmp_path, image_folder):
    config = {
        "model_config": {"encoder_config": encoder_config(), "decoder_patch_size": 8, "codebook_size": 64},
        "image_size": 32,
        "train_data": str(image_folder),
        "group_separator": "-",
        "holdout": 0.25,
        "output_dir": "out",
        "max_steps": 2,
        "save_steps": 2,
        "max_train_samples": 8,
        "max_eval_samples": 2,
        "per_device_train_batch_size": 4,
        "lpips_weight": 0,
        "use_cpu": True,
        "report_to": ["none"],
    }
    (tmp_path / "recipe.json").write_text(json.dumps(config))
    run([str(ROOT / "train_hf.py"), "recipe.json"], tmp_path)
    assert {
        "model.safetensors",
        "modeling_simvq.py",
        "quantization_simvq.py",
        "tokenizer_simvq.py",
        "configuration_simvq.py",
        "image_processing_simvq.py",
        "preprocessor_config.json",
        "eval_results.json",
        "raw_weights.safetensors",
        "training_report.html",
    } <= set(os.listdir(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.tmp")) and not (tmp_path / "out" / "unfinished").exists()
    report = (tmp_path / "out" / "training_report.html").read_text()
    assert "PSNR of held-out images" in report and "data:image/png;base64," in report
    card = (tmp_path / "out" / "README.md").read_text()
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert "`model.safetensors` holds the moving average" in card and "`raw_weights.safetensors`" in card
    assert f"| psnr | {metrics['eval_psnr']:.6g} |" in card and ModelCard(card).data.library_name == "transformers"
    listed = (tmp_path / "out" / "heldout_images.txt").read_text().split()
    assert {Path(file).name[0] for file in listed} == {"a"}
    assert len(listed) == 3  # all that is held out, also what is not evaluated
    output = run([str(ROOT / "train_hf.py"), "recipe.json", "--max_steps", "3"], tmp_path)
    assert "Resuming from out/checkpoint-2" in output
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_two_processes_train_the_same_weights(tmp_path, image_folder):
    """torchrun with 2 gloo ranks: one codebook, fitted to the images of both, equal weights."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import os
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from conftest import tiny_config
from modeling_simvq import VQRAEModel
from test_training import make_trainer
torch.manual_seed(0)
trainer = make_trainer(VQRAEModel(tiny_config(codebook_init="kmeans")), {str(image_folder)!r}, "out")
trainer.train()
assert trainer.model.config.codebook_init_latents == 64 * 256
metrics = trainer.evaluate()
rank = trainer.args.process_index
result = {{"state": trainer.model.state_dict(), "metrics": metrics, "log": trainer.state.log_history}}
torch.save(result, f"{{rank}}.pt")
os._exit(0)
""")
    done = finish([*TWO_PROCESSES, program], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert first["metrics"]["eval_codebook_tokens"] == 12 * 16
    assert first["metrics"]["eval_psnr"] == second["metrics"]["eval_psnr"]
    assert first["log"][0]["codebook_tokens"] == 2 * 4 * 16


@pytest.mark.skipif("VQRAE_ASSETS" not in os.environ, reason="VQRAE_ASSETS is not set: no pretrained encoder")
def test_pretrained_dinov2_gives_the_features_of_transformers():
    from transformers import Dinov2Model

    assets = Path(os.environ["VQRAE_ASSETS"])
    model = VQRAEModel.from_encoder_pretrained(
        str(assets / "dinov2-small"), image_size=112, codebook_size=64, decoder_num_hidden_layers=1
    ).eval()
    image = Image.open(sorted((assets / "photos").glob("*.jpg"))[0])
    pixels = VQRAEImageProcessor.for_image_size(112)(image, return_tensors="pt").pixel_values
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    stock = Dinov2Model.from_pretrained(assets / "dinov2-small").eval()
    with torch.no_grad():
        hidden = stock.encoder(stock.embeddings((pixels - mean) / std)).last_hidden_state[:, 1:]
        features = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(features, F.layer_norm(hidden, (384,), eps=1e-6), atol=1e-4, rtol=1e-4)
