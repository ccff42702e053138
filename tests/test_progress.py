"""Progress bars count images, whatever the size of a batch."""

import torch

from eval import probe
from eval.flat_colours import flat_colours, measure_flat_colours
from eval.protocol import Protocol


class Rows:
    """Five rows of a dataset, of which slices are taken."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, rows: slice) -> dict:
        return {"image": list(range(5))[rows]}


def test_the_probe_counts_images(monkeypatch, capsys):
    monkeypatch.setattr(probe, "decode_image", lambda record: torch.full((3, 2, 2), float(record)))
    monkeypatch.setattr(probe, "image_vectors", lambda _, pixels: {"means": pixels.mean((1, 2, 3)).numpy()})

    def processor(images, return_tensors):
        return type("Batch", (), {"pixel_values": torch.stack(images)})

    vectors = probe.encode_images(None, Rows(), processor, batch_size=2)
    assert vectors["means"].tolist() == [0, 1, 2, 3, 4]
    said = capsys.readouterr().err
    assert "0/5" in said and "5/5" in said and "image/s" in said


def test_flat_colours_are_counted_one_by_one(capsys):
    metrics, _ = measure_flat_colours(lambda pixels: (pixels,), Protocol.load("default"), 8, 32, torch.device("cpu"))
    assert metrics["flat_colours_error"] == 0
    count = len(flat_colours())
    said = capsys.readouterr().err
    assert f"0/{count}" in said and f"{count}/{count}" in said and "image/s" in said


def test_a_probe_that_tells_nothing_is_written_too():
    nothing = {"accuracy": 0.0, "interval": (0.0, 0.0)}
    row = {"knn": nothing | {"of_the_encoders": None}, "logistic": nothing}
    result = {"rows": {"encoder features": row}, "baseline": 0.5, "num_images": 10, "classes": ["a", "b"]}
    assert "| encoder features | 0.0% (0.0% to 0.0%) | - | 0.0% (0.0% to 0.0%) |" in probe.markdown(result)
