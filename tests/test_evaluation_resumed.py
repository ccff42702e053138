"""Evaluations that are interrupted, and those shared among processes."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import MeanColors, tiny_config
from PIL import Image
from test_loading import ROOT, TWO_PROCESSES, finish

from eval import reconstruction, results
from eval.crops import CroppedImages
from eval.evaluation import Evaluation, Networks
from eval.protocol import Protocol
from eval.reconstruction import ModelReconstruction, evaluate
from modeling_simvq import VQRAEModel
from reading.files import dataset_of_files, find_images


def test_an_interrupted_pass_goes_on_and_ends_with_the_same_numbers(tmp_path, image_folder, device):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config()).eval().to(device)
    protocol, files = Protocol.load("default"), find_images(image_folder)
    images = CroppedImages(dataset_of_files(files), protocol, 32)
    seen = []

    def results(stop_after=None, key="same"):
        reconstruct, calls = ModelReconstruction(model, True), []

        def counted(pixels):
            if stop_after is not None and len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(len(pixels))
            return reconstruct(pixels)

        evaluation = Evaluation(protocol, Networks({"fd_colors": MeanColors()}), 64)
        try:
            evaluate(evaluation, images, counted, 5, 0, device, tmp_path / "p.pt", key, save_seconds=-1)
        finally:
            seen.append(calls)
        (tmp_path / "p.pt").unlink()
        return evaluation.compute()[0], evaluation.fingerprint()

    whole = results()
    with pytest.raises(KeyboardInterrupt):
        results(stop_after=2)
    assert results() == whole
    with pytest.raises(KeyboardInterrupt):
        results(stop_after=1)
    assert results(key="other weights") == whole
    assert seen == [[5, 5, 2], [5, 5], [2], [5], [5, 5, 2]]
    assert os.listdir(tmp_path) == ["images"]


def test_an_interrupted_command_goes_on_unless_something_else_is_asked(command, tmp_path, image_folder, monkeypatch):
    """The model, the images and the options are those of the progress, or it is not used."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "calls = []\n\n\ndef half(pixels):\n    calls.append(len(pixels))\n    return pixels * {}\n"
    (tmp_path / "halving.py").write_text(code.format(0.5))
    import halving

    options = ["--callable", "halving:half", "--data", image_folder, "--image_size", 32, "--network_metrics"]
    options += ["--batch_size", 5, "--output_dir", "out"]
    expected = command(*options)
    whole = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]

    def interrupted() -> list[int]:
        halving.calls.clear()
        with monkeypatch.context() as patch:  # after the pass, before anything is written
            patch.setattr(reconstruction, "write_results", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                command(*options)
        return list(halving.calls)

    assert interrupted() == [5, 5, 2]
    halving.calls.clear()
    assert "Going on after 12 images" in command(*options) and halving.calls == [4, 4, 4]  # for the pictures
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"] == whole
    assert "PSNR" in expected and not list((tmp_path / "out").glob("progress*"))
    for change in ("source", "image", "option"):
        assert interrupted() == [5, 5, 2]
        halving.calls.clear()
        extra = []
        if change == "source":
            (tmp_path / "halving.py").write_text(code.format(0.4))
        elif change == "image":
            Image.new("RGB", (48, 41)).save(image_folder / "a-0.png")
        else:
            extra = ["--max_samples", 10]
        assert "starting anew" in command(*options, *extra)
        assert halving.calls[:2] == [5, 5]


def interrupt(command, monkeypatch, *options) -> None:
    """Gives the command up to where it has all numbers and has written none."""
    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "write_results", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command(*options)


@pytest.mark.parametrize("change", ["nothing", "dtype", "device", "versions", "code", "configuration"])
def test_progress_made_otherwise_is_not_used(change, command, tmp_path, image_folder, saved_model, monkeypatch):
    options = ["--model_name_or_path", "model", "--data", image_folder, "--network_metrics", "--output_dir", "out"]
    interrupt(command, monkeypatch, *options)
    if change == "dtype":
        options += ["--dtype", "bfloat16"]
    elif change == "device":
        options += ["--device", "cpu:0"]  # another by its name
    elif change == "versions":
        versions = reconstruction.library_versions() | {"torch": "0.1"}
        monkeypatch.setattr(reconstruction, "library_versions", lambda: versions)
    elif change == "code":
        monkeypatch.setattr(reconstruction, "code_hash", lambda: "of other code")
    elif change == "configuration":  # the same weights, seen otherwise
        config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    said = "Going on after 12 images" if change == "nothing" else "starting anew"
    assert said in command(*options)


def test_code_s_hash_is_of_all_that_computes_numbers(monkeypatch):
    hashed = []
    monkeypatch.setattr(results, "sha256_of_files", lambda *files: hashed.extend(files) or "hash")
    assert results.code_hash() == "hash"
    names = {str(file.relative_to(ROOT)) for file in hashed}
    assert {"eval/evaluation.py", "eval/ssim/ssim.py", "reading/images.py", "modeling_simvq.py"} <= names
    assert {"tokenizer_simvq.py", "quantization_simvq.py", "image_processing_simvq.py"} <= names


OUTPUTS = {"results.json", "results.md", "report.html", "pictures.png", "code_counts.npy"}


def test_results_of_another_evaluation_are_gone_when_one_begins(
    command, tmp_path, image_folder, saved_model, monkeypatch
):
    """Or whoever looks after a kill takes them for those of the command that was given last."""
    options = ["--data", image_folder, "--network_metrics", "--output_dir", "out"]
    command("--model_name_or_path", "model", *options)
    assert set(os.listdir(tmp_path / "out")) == OUTPUTS
    (tmp_path / "out" / "notes.txt").write_text("of somebody else")
    clone = ["--callable", "torch:clone", "--image_size", 32, *options]
    interrupt(command, monkeypatch, *clone)
    assert set(os.listdir(tmp_path / "out")) == {"progress-0-of-1.pt", "notes.txt"}
    command(*clone)
    assert set(os.listdir(tmp_path / "out")) == OUTPUTS - {"code_counts.npy"} | {"notes.txt"}  # it has no tokens
    error = command(*clone[:-1], "out", "--protocol", "adm", fails=True)
    assert "No protocol" in error and (tmp_path / "out" / "results.json").exists()  # nothing began


@pytest.mark.parametrize("killed_at", sorted(OUTPUTS))
def test_a_kill_among_the_results_leaves_no_results_json(
    killed_at, command, tmp_path, image_folder, saved_model, monkeypatch
):
    options = ["--model_name_or_path", "model", "--data", image_folder, "--network_metrics", "--output_dir", "out"]
    command(*options, "--max_samples", 5)

    def replace(source, target):
        if Path(target).name == killed_at:
            raise KeyboardInterrupt
        os_replace(source, target)

    os_replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            command(*options)
    assert not (tmp_path / "out" / "results.json").exists()
    assert "Going on after 12 images" in command(*options)
    assert set(os.listdir(tmp_path / "out")) == OUTPUTS
    assert json.loads((tmp_path / "out" / "results.json").read_text())["num_images"] == 12


def test_progress_that_cannot_be_read_is_not_used_and_that_of_other_processes_goes(command, tmp_path, image_folder):
    options = ["--callable", "torch:clone", "--data", image_folder, "--image_size", 32, "--network_metrics"]
    (tmp_path / "out").mkdir()
    for content in (b"", b"half a file", b"PK\x03\x04"):
        (tmp_path / "out" / "progress-0-of-1.pt").write_bytes(content)
        (tmp_path / "out" / "progress-1-of-2.pt").write_bytes(content)
        assert "cannot be read: starting anew" in command(*options, "--output_dir", "out")
        assert set(os.listdir(tmp_path / "out")) == OUTPUTS - {"code_counts.npy"}
        assert json.loads((tmp_path / "out" / "results.json").read_text())["num_images"] == 12


def test_two_processes_measure_what_one_does(command, tmp_path, image_folder, inception_weights, saved_model):
    (image_folder / "broken.png").write_bytes(b"no image")
    arguments = [
        "--model_name_or_path", "model", "--data", image_folder, "--batch_size", 2, "--device", "cpu",
        "--network_metrics", "rfid", "--inception_weights", inception_weights,
    ]  # fmt: skip
    command(*arguments, "--output_dir", "one")
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from eval import reconstruction, results
reconstruction.main()
os._exit(0)  # gloo's threads may abort a process that ends before they do
""")
    done = finish([*TWO_PROCESSES, program, *arguments, "--output_dir", "two"], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["num_processes"] == 2 and two["num_images"] == one["num_images"] == 12
    assert two["data"]["pixels_sha256"] == one["data"]["pixels_sha256"]
    assert len(two["skipped_images"]) == 1
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
    assert not list((tmp_path / "two").glob("progress*"))


def test_memory_does_not_hold_the_images(image_folder):
    evaluation = Evaluation(Protocol.load("default"), Networks({"fd_colors": MeanColors()}), 64)
    x = torch.zeros(4, 3, 176, 176, dtype=torch.uint8)
    for number in range(3):
        evaluation.update(number, list(range(4 * number, 4 * number + 4)), x, x / 255 + 0.1, torch.zeros(4, 9).long())
    tensors = [evaluation.counts, *(t for m in evaluation.moments.values() for t in (m.count, m.sum, m.products))]
    width = MeanColors()(x).shape[1]
    assert sum(t.numel() for t in tensors) == 64 + 2 * (1 + width + width**2)
    assert all(len(values) == 12 for values in evaluation.scores.values())
