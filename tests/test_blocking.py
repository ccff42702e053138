"""Blocking, and what becomes of flat colours."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from eval.blocking.blocking import blocking_of, count_steps
from eval.evaluation import Evaluation, Networks
from eval.flat_colours import flat_colours, measure_flat_colours
from eval.protocol import Protocol
from modeling_simvq import VQRAEModel
from reading.files import find_images


def written_out(images: np.ndarray, patch: int) -> float:
    """(B, H, W, C): steps at borders over steps within patches, a step at a time, mean of both directions."""
    images = images.astype(float)
    ratios = []
    for lines in (images.transpose(1, 0, 2, 3), images.transpose(2, 0, 1, 3)):
        border, within = [], []
        for i in range(len(lines) - 1):
            (border if (i + 1) % patch == 0 else within).append(np.abs(lines[i + 1] - lines[i]))
        ratios.append(np.mean(border) / np.mean(within))
    return np.mean(ratios)


def blocking(fake: torch.Tensor, real: torch.Tensor, patch: int) -> float:
    return blocking_of(count_steps(fake, patch), count_steps(real, patch))


def ramp(steps_down: list[int], steps_along: list[int]) -> torch.Tensor:
    """An image (1, 3, H, W) whose steps are these."""
    down, along = (torch.tensor([0, *steps]).cumsum(0) for steps in (steps_down, steps_along))
    return (down[:, None] + along).to(torch.uint8).expand(1, 3, -1, -1)


@pytest.mark.parametrize("patch", [4, 7, 8, 16])
def test_blocking_is_the_formula(pair, patch):
    real, fake = (x[..., :97].contiguous() for x in pair)  # 128 x 97: rows are not columns
    arrays = [x.permute(0, 2, 3, 1).numpy() for x in (fake, real)]
    expected = written_out(arrays[0], patch) / written_out(arrays[1], patch)
    assert blocking(fake, real, patch) == pytest.approx(expected, rel=1e-12)
    totals = [sum(count_steps(x[i : i + 1], patch) for i in range(3)) for x in (fake, real)]
    assert blocking_of(*totals) == blocking(fake, real, patch)  # whatever the batches


def test_a_known_grid_has_a_known_number_and_the_original_has_one(pair):
    assert blocking(pair[0], pair[0], 8) == 1
    even, grid = [2] * 23, [10 if (i + 1) % 8 == 0 else 2 for i in range(23)]
    original = ramp(even, even)
    assert blocking(ramp(grid, grid), original, 8) == pytest.approx(5)
    assert blocking(ramp(grid, even), original, 8) == pytest.approx(3)  # borders of rows alone
    assert blocking(ramp(even, grid), original, 8) == pytest.approx(3)
    assert blocking(ramp(grid[1:] + [2], even), original, 8) < 1  # steps at other places are no grid of patches
    assert blocking(ramp(grid, grid), ramp(grid, grid), 8) == 1  # what the original has is not the tokenizer's


def test_images_of_one_colour_among_others_change_nothing_and_alone_have_no_number():
    flat = torch.full((2, 3, 24, 24), 7, dtype=torch.uint8)
    even, grid = [2] * 23, [10 if (i + 1) % 8 == 0 else 2 for i in range(23)]
    fake, real = torch.cat([ramp(grid, grid), flat]), torch.cat([ramp(even, even), flat])
    assert blocking(fake, real, 8) == pytest.approx(5)
    assert np.isnan(blocking(flat, flat, 8))
    assert np.isnan(blocking(real[:, :, :8, :8], real[:, :, :8, :8], 8))  # one patch has no borders


def measured(real: torch.Tensor, fake: torch.Tensor, protocol: str = "default", patch: int | None = 8):
    evaluation = Evaluation(Protocol.load(protocol), Networks(), patch_size=patch)
    for number, part in enumerate((slice(0, 1), slice(1, None))):
        evaluation.update(number, list(range(len(real)))[part], real[part], fake[part] / 255)
    evaluation.join()
    return evaluation.compute()


def test_evaluation_measures_blocking_where_there_are_patches(pair):
    real, fake = pair
    arrays = [x.permute(0, 2, 3, 1).numpy() for x in (fake, real)]
    expected = written_out(arrays[0], 8) / written_out(arrays[1], 8)
    assert measured(real, fake)[0]["blocking"] == pytest.approx(expected, rel=1e-12)
    assert "blocking" not in measured(real, fake, patch=None)[0]
    assert "blocking" not in measured(real, fake, "rae-256")[0]  # its repository has none
    flat = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)
    metrics, reasons, _ = measured(flat, flat)
    assert metrics["blocking"] is None and reasons["blocking"].startswith("not finite: the originals")


def test_flat_colours_are_125_evenly_spaced():
    levels = [round(255 * i / 4) for i in range(5)]
    expected = {(r, g, b) for r in levels for g in levels for b in levels}
    assert {tuple(colour) for colour in flat_colours().tolist()} == expected and len(flat_colours()) == 125


def test_error_and_deviation_of_flat_colours_are_those_of_the_pixels():
    """A tokenizer that is 10 of 255 too dark where it can be, with a column of each eight 4 brighter or darker."""
    pattern = torch.zeros(16)
    pattern[::8], pattern[4::8] = 4, -4
    seen = []

    def reconstruct(pixels):
        seen.append(tuple(pixels.shape))
        return (pixels * 255 - 10 + pattern) / 255, None, {}

    metrics, reasons = measure_flat_colours(reconstruct, Protocol.load("default"), 16, 50, torch.device("cpu"))
    assert seen == [(50, 3, 16, 16), (50, 3, 16, 16), (25, 3, 16, 16)] and not reasons
    errors, deviations = [], []
    for level in (0, 64, 128, 191, 255):  # of a channel; each is in as many colours
        column = np.clip(level - 10 + pattern.numpy(), 0, 255)
        errors.append(np.abs(column - level).mean())
        deviations.append(column.std())
    assert metrics["flat_colours_error"] == pytest.approx(np.mean(errors), abs=1e-4)
    assert metrics["flat_colours_deviation"] == pytest.approx(np.mean(deviations), abs=1e-4)
    assert np.mean(deviations) > 1

    def blind_to_white(pixels):
        white = (pixels == 1).flatten(1).all(1).view(-1, 1, 1, 1)
        return pixels.masked_fill(white, float("nan")), None, {}

    metrics, reasons = measure_flat_colours(blind_to_white, Protocol.load("default"), 16, 50, torch.device("cpu"))
    assert set(metrics.values()) == {None}
    assert set(reasons.values()) == {"not finite: the reconstructions of 1 of 125 colours"}


def test_command_measures_both_for_a_model_under_the_protocol_default_alone(
    command, tmp_path, image_folder, saved_model
):
    options = ["--model_name_or_path", "model", "--data", image_folder, "--network_metrics"]
    command(*options, "--output_dir", "out", "--batch_size", 5)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    crops = [Protocol.load("default").crop(Image.open(file), 32) for file in find_images(image_folder)]
    with torch.no_grad():
        fakes = saved_model(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255).decoded_pixel_values
        flat = np.repeat(np.repeat(flat_colours().numpy()[:, :, None, None], 32, 2), 32, 3)
        flat_fakes = saved_model(torch.from_numpy(flat) / 255).decoded_pixel_values
    fakes, flat_fakes = ((x.clamp(0, 1) * 255).round().double().numpy() for x in (fakes, flat_fakes))
    expected = written_out(fakes.transpose(0, 2, 3, 1), 8) / written_out(np.stack(crops), 8)
    metrics = result["metrics"]
    assert metrics["blocking"] == pytest.approx(expected, rel=1e-3)
    assert metrics["flat_colours_error"] == pytest.approx(np.abs(flat_fakes - flat).mean(), rel=1e-3)
    assert metrics["flat_colours_deviation"] == pytest.approx(flat_fakes.std((2, 3)).mean(), rel=1e-2, abs=1e-2)
    assert "| Blocking (1: no grid) |" in (tmp_path / "out" / "results.md").read_text()
    command("--callable", "torch:clone", "--data", image_folder, "--image_size", 32, "--network_metrics",
            "--output_dir", "callable")  # fmt: skip
    VQRAEModel(tiny_config(image_size=256, decoder_patch_size=64)).save_pretrained(tmp_path / "larger")
    command("--model_name_or_path", "larger", *options[2:], "--protocol", "rae-256", "--output_dir", "rae")
    for folder in ("callable", "rae"):
        metrics = json.loads((tmp_path / folder / "results.json").read_text())["metrics"]
        assert not metrics.keys() & {"blocking", "flat_colours_error", "flat_colours_deviation"}
