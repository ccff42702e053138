"""Stage 1 on tokens that are computed once."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_training import make_trainer

from modeling_simvq import VQRAEModel


def stage1(**overrides) -> VQRAEModel:
    torch.manual_seed(0)
    return VQRAEModel(tiny_config(codebook_init="kmeans", **overrides))


def trained(model, folder, output_dir, **overrides):
    """12 images are 3 steps an epoch."""
    trainer = make_trainer(model, folder, output_dir, seed=1, max_grad_norm=0.0, **{"max_steps": 9, **overrides})
    trainer.train(resume_from_checkpoint=overrides.get("save_strategy") == "no" or None)
    return trainer


def same(a: dict, b: dict) -> bool:
    return all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_decoder_learns_what_it_learns_beside_a_frozen_quantizer(tmp_path, image_folder):
    """Three epochs of three passes meet the crops of a run whose encoder and quantizer run in every step."""
    start = stage1()
    known = trained(copy.deepcopy(start), image_folder, tmp_path / "known", token_passes=3)
    usual = trained(copy.deepcopy(start), image_folder, tmp_path / "usual", quantizer_lr_multiplier=0.0, vq_weight=0.0)
    assert same(known.model.state_dict(), usual.model.state_dict())
    assert not same(known.model.decoder.state_dict(), start.decoder.state_dict())
    for log, other in zip(known.state.log_history, usual.state.log_history):
        for name in ("loss", "codebook_utilization", "codebook_perplexity", "codebook_tokens"):
            if name in log:
                assert log[name] == pytest.approx(other[name], rel=1e-4), name
    assert "loss_vq" not in known.state.log_history[0]


def test_codes_stay_where_they_began_and_the_model_is_whole(tmp_path, image_folder, pixels):
    trainer = trained(stage1(), image_folder, tmp_path / "out", token_passes=1, weight_decay=0.1)
    fitted = stage1()
    make_trainer(fitted, image_folder, tmp_path / "fitted", seed=1).initialize_codebook()
    assert same(trainer.model.quantizer.state_dict(), fitted.quantizer.state_dict())
    trainer.save_model(str(tmp_path / "saved"))
    model = VQRAEModel.from_pretrained(tmp_path / "saved")
    assert model.quantizer.embedding_proj.weight.requires_grad  # stage 2 trains it
    assert torch.equal(model.eval().get_image_tokens(pixels), trainer.model.eval().get_image_tokens(pixels))


def test_epochs_take_turns_with_the_passes(tmp_path, image_folder):
    trainer = trained(stage1(), image_folder, tmp_path / "out", token_passes=2, max_steps=1)
    items = []
    for epoch in (0, 1, 2, 3):
        trainer.train_transform.set_epoch(epoch)
        items.append(trainer.train_dataset[:12])
        pixels = torch.stack(items[-1]["pixel_values"])
        assert torch.equal(trainer.model.eval().get_image_tokens(pixels), torch.stack(items[-1]["image_tokens"]))
    for name in ("pixel_values", "image_tokens"):
        first, second, third, fourth = (torch.stack(item[name]) for item in items)
        assert torch.equal(first, third) and torch.equal(second, fourth) and not torch.equal(first, second)


def test_a_resumed_run_equals_the_whole_and_tokenizes_nothing_again(tmp_path, image_folder, monkeypatch):
    options = {"token_passes": 2, "save_steps": 5, "lr_scheduler_type": "constant"}
    whole = trained(stage1(), image_folder, tmp_path / "whole", **options)
    trained(stage1(), image_folder, tmp_path / "parts", **{**options, "max_steps": 5})
    other = VQRAEModel(tiny_config(codebook_init="kmeans"))  # all that counts is in the checkpoint
    monkeypatch.setattr(VQRAEModel, "get_image_tokens", None)
    resumed = trained(other, image_folder, tmp_path / "parts", **{**options, "save_strategy": "no"})
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("what", ["codes", "layers", "names", "contents", "crops"])
def test_tokens_of_something_else_are_computed_anew(tmp_path, image_folder, what):
    first = trained(stage1(), image_folder, tmp_path / "out", token_passes=1, max_steps=1)
    model, options = stage1(), {"token_passes": 1, "max_steps": 1}
    if what == "codes":
        model = VQRAEModel(tiny_config(codebook_init="kmeans"))
    elif what == "layers":
        model.config.encoder_layers = [0, 2]
        model.quantizer.load_state_dict(first.model.quantizer.state_dict())  # the same weights all over
        model.config.codebook_init_latents = 1
    elif what == "names":
        next(image_folder.iterdir()).rename(image_folder / "e-0.png")
    elif what == "contents":
        Image.new("RGB", (48, 40), "red").save(image_folder / "a-0.png")
    trainer = make_trainer(model, image_folder, tmp_path / "out", seed=1, **options)
    if what == "crops":
        trainer.train_transform.seed = 5
    trainer.train()
    item = trainer.train_dataset[:12]
    expected = trainer.model.eval().get_image_tokens(torch.stack(item["pixel_values"]))
    assert torch.equal(torch.stack(item["image_tokens"]), expected)


def test_a_second_call_and_an_evaluation_of_training_images_work(tmp_path, image_folder):
    trainer = trained(stage1(), image_folder, tmp_path / "out", token_passes=1, max_steps=1)
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_psnr"] > 0


@pytest.mark.parametrize("listed", [True, False])
def test_images_that_cannot_be_read_are_all_found_before_training(tmp_path, image_folder, capsys, listed):
    """With a list they are left out, as other runs replace them; without one they are an error."""
    for name in ("a-9.png", "b-9.png"):
        (image_folder / name).write_bytes(b"no image")
    trainer = make_trainer(stage1(), image_folder, tmp_path / "out", token_passes=1)
    if not listed:
        trainer.initialize_codebook = None  # nothing that takes long comes first
        with pytest.raises(ValueError, match="2 of the 14 training images cannot be read, such as .*a-9.png.*b-9.png"):
            trainer.train()
        return
    trainer.train_transform.skipped_list = tmp_path / "skipped_images.txt"
    trainer.train()
    names = [line.split("\t")[0] for line in (tmp_path / "skipped_images.txt").read_text().splitlines()]
    assert [Path(name).name for name in names] == ["a-9.png", "b-9.png"] and len(trainer.train_dataset) == 12
    said = capsys.readouterr()
    assert "2 of the 14 training images cannot be read" in said.out and "Checking training images" in said.err
    item = trainer.train_dataset[:12]
    expected = trainer.model.eval().get_image_tokens(torch.stack(item["pixel_values"]))
    assert torch.equal(torch.stack(item["image_tokens"]), expected)


def test_too_many_images_that_cannot_be_read_end_the_run(tmp_path, image_folder):
    for number in range(11):
        (image_folder / f"e-{number}.png").write_bytes(b"no image")
    trainer = make_trainer(stage1(), image_folder, tmp_path / "out", token_passes=1)
    trainer.train_transform.skipped_list = tmp_path / "skipped_images.txt"
    with pytest.raises(ValueError, match="11 of the 23 training images"):
        trainer.train()
    assert len((tmp_path / "skipped_images.txt").read_text().splitlines()) == 11


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"freeze_encoder": False}, "encoder is trained"),
        ({"codebook_dim": 8}, "projection"),
        ({"codebook_init": "gaussian"}, "not fitted"),
    ],
)
def test_refused_where_tokens_would_change(tmp_path, image_folder, fields, reason):
    with pytest.raises(ValueError, match=reason):
        make_trainer(
            VQRAEModel(tiny_config(**{"codebook_init": "kmeans", **fields})), image_folder, tmp_path, token_passes=1
        )
