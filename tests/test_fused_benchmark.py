"""The map of fused latents, and the probe of what tokens keep."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from transformers import AutoConfig, Dinov2Model

from benchmarks import fused_latents
from eval import probe
from modeling_simvq import VQRAEModel


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    Dinov2Model(AutoConfig.for_model("dinov2", **config)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def classes(tmp_path):
    """Red and blue images, in folders of their names."""
    draw = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(8):
            image = draw.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            image[..., channel] += 180
            Image.fromarray(image).save(tmp_path / "classes" / name / f"{number}.png")
    return tmp_path / "classes"


def test_the_map_has_a_row_for_each_choice_and_does_none_twice(
    encoder, classes, image_folder, tmp_path, monkeypatch, capsys
):
    common = {
        "image_size": 32, "decoder_patch_size": 8, "codebook_size": 12, "codebook_init": "kmeans",
        "decoder_linear_path": 3, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16,
    }  # fmt: skip
    fused = {"encoder_layers": [0, 2], "pixel_weight": 2.0, "codebook_dim": 16}
    rows = {"fused": {}, "last layer": {}, "attention": {"like": "fused", "decoder_mixing": "both"}}
    rows |= {"no path": {"like": "fused", "decoder_linear_path": None}}
    settings = {"common": common, "fused": fused, "rows": rows, "not_fused": ["last layer"]}
    (tmp_path / "rows.json").write_text(json.dumps(settings))
    flags = ["--encoder", encoder, "--train_data", image_folder, "--heldout", f"photos={image_folder}", "--config"]
    flags += [tmp_path / "rows.json", "--probe", classes, "--minutes", "0.01", "--output_dir", tmp_path / "map"]
    monkeypatch.setattr(sys, "argv", ["fused_latents.py", *map(str, flags)])
    fused_latents.main()
    results = json.loads((tmp_path / "map" / "results.json").read_text())
    assert list(results) == ["fused", "last layer", "attention", "no path"]
    assert results["attention"]["photos"]["psnr"] == results["fused"]["photos"]["psnr"]  # before a step: the same map
    assert results["no path"]["lost"] == results["fused"]["lost"]
    trained = VQRAEModel.from_pretrained(tmp_path / "map" / "no-path" / "trained")
    assert trained.config.decoder_linear_path is None
    for numbers in results.values():
        assert {"psnr", "blocking", "used", "trained_psnr"} <= numbers["photos"].keys() and numbers["steps"] >= 1
        assert 0 < numbers["lost"] < 1.5 and set(numbers["probe"]) >= {"encoder features", "quantized latents"}
    table = (tmp_path / "map" / "table.md").read_text()
    assert table.count("\n") == 6 and f"{results['fused']['photos']['psnr']:.2f}" in table
    assert Image.open(tmp_path / "map" / "map.png").width > 300
    assert Image.open(tmp_path / "map" / "fused" / "photos.png").height > 60
    assert "Row 1 of 4" in capsys.readouterr().out
    fused_latents.main()
    assert "Row" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["fused_latents.py", *map(str, flags), "--rows", "nothing"])
    with pytest.raises(SystemExit):
        fused_latents.main()
    assert "has no row 'nothing', only fused, last layer, attention, no path" in capsys.readouterr().err
    flags[-1] = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["fused_latents.py", *map(str, flags), "--rows", "attention"])
    with pytest.raises(SystemExit):
        fused_latents.main()
    assert "row.json is not there, and a row is like it: do that one before." in capsys.readouterr().err
    flags[-1] = tmp_path / "map"
    flags += ["--rows", "attention", "--train_images", "3"]
    monkeypatch.setattr(sys, "argv", ["fused_latents.py", *map(str, flags)])
    with pytest.raises(SystemExit):
        fused_latents.main()
    assert "was fitted with another train_images" in capsys.readouterr().err


def test_what_a_row_of_the_map_is():
    """The same for the map and for the benchmark of the fit, which once took neither `like` nor `not_fused`."""
    fused = {"pixel_weight": 2.0, "codebook_dim": 16}
    rows = {"four": {"pixel_weight": 4.0}, "other": {"like": "four", "decoder_mixing": "both"}, "last": {}}
    settings = {"common": {"image_size": 32}, "fused": fused, "rows": rows, "not_fused": ["last"]}
    of_four = {"image_size": 32, "pixel_weight": 4.0, "codebook_dim": 16}
    assert fused_latents.choice_of(settings, "four") == (of_four, None)
    assert fused_latents.choice_of(settings, "other") == (of_four | {"decoder_mixing": "both"}, "four")
    assert fused_latents.choice_of(settings, "last") == ({"image_size": 32}, None)


def test_what_is_lost_of_the_last_layer_is_what_codes_do_not_give_back():
    """Of codes that are not fused, by the mean feature of each: numpy's, of the same tokens."""
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config(codebook_size=6)).eval()
    pixels = torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        encoded = model.encode(pixels)  # which is counted: another measurement before this one must not matter
    features, tokens = encoded.last_hidden_state.flatten(0, 1).numpy(), encoded.image_tokens.flatten().numpy()
    means = np.stack([features[tokens == i].mean(0) if (tokens == i).any() else features[0] for i in range(6)])
    expected = np.square(features - means[tokens]).sum() / np.square(features - features.mean(0)).sum()
    assert fused_latents.lost(model, pixels, pixels) == pytest.approx(expected, rel=1e-4)


def test_probe_tells_classes_and_the_baseline(classes, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    VQRAEModel(tiny_config(codebook_size=32)).save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", tmp_path / "model", "--data", classes, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, flags)])
    probe.main()
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert result["baseline"] == 0.5 and result["classes"] == ["blue", "red"] and result["num_images"] == 16
    assert result["rows"]["encoder features"]["knn"]["accuracy"] > 0.9
    for row in result["rows"].values():
        for judge in ("knn", "logistic"):
            low, high = row[judge]["interval"]
            assert low <= row[judge]["accuracy"] <= high
    page = (tmp_path / "out" / "probe.html").read_text()
    assert "quantized latents" in page and "http" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "out" / "probe.md").read_text().strip() in capsys.readouterr().out


def test_random_labels_are_not_told_and_intervals_are_those_of_binomials():
    draw = np.random.default_rng(1)
    vectors, labels = draw.normal(size=(200, 8)).astype(np.float32), draw.integers(0, 2, 200)
    right = probe.accuracy_of_neighbours(vectors, labels)
    assert 0.35 < right.mean() < 0.65
    low, high = probe.interval(np.array([1.0] * 60 + [0.0] * 40))
    assert low == pytest.approx(0.6 - 1.96 * np.sqrt(0.24 / 100), abs=0.02)
    assert high == pytest.approx(0.6 + 1.96 * np.sqrt(0.24 / 100), abs=0.02)


@pytest.mark.parametrize(
    "flags, message",
    [(["--batch_size", "0"], "must be at least 1"), (["--device", "cuda:77"], "is not here"), ([], "'.[probe]'")],
)
def test_mistakes_at_the_probe_end_in_one_line(flags, message, classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)  # as if there were no scikit-learn
    flags = ["--model_name_or_path", tmp_path, "--data", classes, "--output_dir", tmp_path / "out", *flags]
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, flags)])
    with pytest.raises(SystemExit):
        probe.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: [(folder / "one").mkdir(parents=True), (folder / "one" / "a.png").touch()], "has no classes"),
        (lambda folder: [(folder / name).mkdir(parents=True) for name in "ab"], "No images in"),
    ],
)
def test_folders_without_classes_are_named(make, message, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        probe.labelled_images(tmp_path / "data")
