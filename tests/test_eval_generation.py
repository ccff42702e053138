"""Generated images against real ones: formulas beside naive ones, and the command on tiny images."""

import json
import os
import shlex
import shutil
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3
from conftest import encoder_config
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from test_docs import blocks
from torch_fidelity.metric_prc import calculate_precision_recall_full
from transformers import AutoConfig, AutoModel, ViTImageProcessor

from eval import compare, generation, image_features, manifolds, networks
from eval.evaluation import Networks
from eval.generation import departures, draw, halves, measure
from eval.image_features import ImageFeatures
from eval.manifolds import manifold_metrics, nearest, radii
from eval.protocol import GENERATION_FOLDER, GenerationProtocol, Protocol, names
from eval.rfid.rfid import InceptionV3
from reading.files import find_images


def points(count: int, seed: int, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.2 * seed


# Formulas -------------------------------------------------------------------------------------------------------------


def naive_metrics(fake: np.ndarray, real: np.ndarray, k: int) -> dict[str, float]:
    """Kynkäänniemi's and Naeem's equations, a point at a time."""

    def radius(x, x_set, i):
        return sorted(np.linalg.norm(x - y) for j, y in enumerate(x_set) if j != i)[k - 1]

    of_real = [radius(x, real, i) for i, x in enumerate(real)]
    of_fake = [radius(x, fake, i) for i, x in enumerate(fake)]
    inside = [[np.linalg.norm(y - x) <= r for x, r in zip(real, of_real)] for y in fake]
    return {
        "precision": sum(any(row) for row in inside) / len(fake),
        "recall": sum(any(np.linalg.norm(x - y) <= r for y, r in zip(fake, of_fake)) for x in real) / len(real),
        "density": sum(sum(row) for row in inside) / (k * len(fake)),
        "coverage": sum(any(row[i] for row in inside) for i in range(len(real))) / len(real),
    }


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("elements", [2**26, 100, 1])  # all rows at a time, some, one
def test_metrics_of_manifolds_are_those_of_the_papers(k, elements, monkeypatch):
    monkeypatch.setattr(manifolds, "ELEMENTS", elements)
    fake, real = points(40, 1), points(31, 5)
    found = manifold_metrics(fake, real, k)
    assert found == pytest.approx(naive_metrics(fake.double().numpy(), real.double().numpy(), k), abs=1e-12)
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1 and 0 < found["coverage"] < 1  # no trivial case


def test_precision_and_recall_are_torch_fidelity_s():
    fake, real = points(50, 1), points(60, 3)
    found = manifold_metrics(fake, real, 3)
    assert (found["precision"], found["recall"]) == pytest.approx(calculate_precision_recall_full(fake, real, 3))


def test_metrics_of_manifolds_tell_what_they_are_for():
    two_modes = torch.cat([points(20, 0), points(20, 0) + 100])
    one_mode = points(30, 1) * 0.5
    found = manifold_metrics(one_mode, two_modes, 5)
    assert found["precision"] > 0.8 and found["recall"] <= 0.5 and found["coverage"] <= 0.5  # a mode is dropped
    assert manifold_metrics(points(20, 0) + 1000, two_modes, 5) == dict.fromkeys(found, 0)
    same = manifold_metrics(two_modes, two_modes.clone(), 5)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    with pytest.raises(ValueError, match="fake has 5 points: 5 neighbours need 6"):
        manifold_metrics(points(5, 0), two_modes, 5)


@pytest.mark.parametrize("elements", [2**26, 70])
def test_neighbours_and_radii_are_scikit_learn_s(elements, monkeypatch):
    monkeypatch.setattr(manifolds, "ELEMENTS", elements)
    queries, among = points(20, 1), points(35, 2)
    distances, numbers = nearest(queries, among, 3)
    expected = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(among.double()).kneighbors(queries.double())
    assert np.array_equal(numbers, expected[1]) and np.allclose(distances, expected[0], rtol=1e-9)
    expected = NearestNeighbors(n_neighbors=5, algorithm="kd_tree").fit(among.double()).kneighbors()[0][:, -1]
    assert np.allclose(radii(among, 5), expected, rtol=1e-9)


def test_the_distance_of_a_copy_is_zero():
    among = 1000 + points(35, 2, 64)  # far away, where a matrix product rounds distances to what is no 0
    distances, numbers = nearest(among.flip(0), among, 40)
    assert not distances[:, 0].any() and numbers[:, 0].tolist() == list(range(34, -1, -1))
    assert numbers.shape == (35, 35)


def test_distances_and_scores_are_the_formulas():
    protocol = GenerationProtocol.load("default")
    fake, real = ({"fd_x": points(40, s), "rfid": points(40, s, 8), "logits": points(40, s, 5)} for s in (1, 2))
    metrics, reasons = measure(fake, real, protocol)
    for metric, name in (("fd_x", "fd_x"), ("gfid", "rfid")):
        x, y = fake[name].double().numpy(), real[name].double().numpy()
        s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        assert metrics[metric] == pytest.approx(expected, rel=1e-6)
    for suffix, name, k in (("x", "fd_x", 5), ("inception", "rfid", 3)):
        for metric, value in naive_metrics(fake[name].double().numpy(), real[name].double().numpy(), k).items():
            assert metrics[f"{metric}_{suffix}"] == pytest.approx(value)
    logits = fake["logits"].double().numpy()[np.random.RandomState(2020).permutation(40)]  # torch-fidelity's order
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in np.split(shares, 10)]
    assert metrics["inception_score"] == pytest.approx(np.mean(scores))
    assert metrics["inception_score_deviation"] == pytest.approx(np.std(scores)) and not reasons


def test_what_cannot_be_computed_says_why():
    protocol = GenerationProtocol.load("default")
    fake = {"fd_x": points(8, 1), "rfid": points(8, 1), "logits": points(8, 1)}
    metrics, reasons = measure(fake, {name: values[:4] for name, values in fake.items()}, protocol)
    assert metrics["precision_x"] is None and "5 neighbours need 6 images of either side, not 4" in reasons["recall_x"]
    assert metrics["precision_inception"] == 1 and "10 parts" in reasons["inception_score"]
    statistics = torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    metrics, reasons = measure(fake, None, protocol, statistics)
    assert metrics["gfid"] > 0 and "pass --real" in reasons["fd_x"] and "pass --real" in reasons["recall_inception"]
    assert metrics.keys() >= reasons.keys() and all(metrics[name] is None for name in reasons)


def test_halves_and_draws_are_without_repetition_and_always_the_same():
    one, other = halves({"x": torch.arange(11)[:, None]})
    together = torch.cat([one["x"], other["x"]]).flatten().tolist()
    assert len(one["x"]) == len(other["x"]) == 5 and len(set(together)) == 10
    assert draw(5, 20).tolist() == draw(5, 20).tolist() and len(set(draw(50, 20).tolist())) == 20


def test_logits_are_those_that_torch_fidelity_takes_for_the_inception_score(inception_weights):
    reference = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    network = InceptionV3(torch.load(inception_weights, weights_only=True))
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, ours = reference(image)[0], network.logits(network(image))
    assert expected.std() > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


# Protocols ------------------------------------------------------------------------------------------------------------


def test_protocols_of_generation_are_read_and_checked(tmp_path):
    assert names(GENERATION_FOLDER) == ["default", "imagenet-256"]
    for name in names(GENERATION_FOLDER):
        assert Protocol.load(GenerationProtocol.load(name).images).inception == "torch-fidelity"
    own = json.loads((GENERATION_FOLDER / "default.json").read_text())
    for change, message in (
        ({"neighbours": 0}, "neighbours is 0"),
        ({"seeds": "random"}, "seeds is 'random'"),
        ({"colour": 1}, "colour"),
    ):
        (tmp_path / "mine.json").write_text(json.dumps(own | change))
        with pytest.raises(ValueError, match=message):
            GenerationProtocol.load(str(tmp_path / "mine.json"))


def test_samples_that_are_not_as_the_protocol_asks_are_told():
    protocol = GenerationProtocol.load("imagenet-256")
    images = [{"condition": str(i % 1000), "seed": i} for i in range(50_000)]
    right = {"images": images, "settings": {"guidance_scale": 1.0}}
    assert departures(protocol, right, 50_000) == []
    assert departures(GenerationProtocol.load("default"), None, 3) == []
    one_class = [image | {"condition": "0"} for image in images[1:11]] + images[11:] + images[:1]
    for change, count, told in (
        ({}, 49_999, "49,999 samples instead of 50,000"),
        ({}, 49_999, "samples.json tells of 50,000 images, not of 49,999"),
        ({"images": one_class}, 50_000, "not balanced: 49 to 60 samples of each"),
        ({"images": [{"seed": 0}]}, 50_000, "classes of the samples are not known"),
        ({"images": [{**images[0], "seed": 1}, *images[1:]]}, 50_000, "1 sample has the seed of another"),
        ({"images": [{"condition": "0"}]}, 50_000, "seeds of the samples are not known"),
        ({"settings": {}}, 50_000, "guidance scale of the samples is not known"),
    ):
        assert any(told in text for text in departures(protocol, right | change, count)), told
    assert len(departures(protocol, None, 12)) == 4
    assert len(departures(GenerationProtocol.load("default"), right, 12)) == 1  # sampling was interrupted


# The pass over the images ---------------------------------------------------------------------------------------------


class Colors(torch.nn.Module):
    """Inception's place: means of cells, and their sums as logits."""

    classifier, num_features = True, 12

    def __init__(self, *_):
        super().__init__()
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    def logits(self, features):
        return features.view(-1, 3, 4).sum(2) / 100


def test_parts_of_several_processes_are_joined_in_the_order_of_the_images(monkeypatch):
    protocol, network = Protocol.load("default"), Colors()
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parts = []
    for batches in ([[0, 1], [5, 6]], [[2, 3]], []):  # image 4 cannot be read, and one process had none
        parts.append(ImageFeatures(protocol, Networks({"rfid": network})))
        for number, index in enumerate(batches):
            parts[-1].update(number, index, images[index])
    parts[1].skipped.append((4, "broken"))
    monkeypatch.setattr(image_features, "gather_object", lambda _: [part.state_dict() for part in parts])
    monkeypatch.setattr(image_features, "PartialState", lambda: type("State", (), {"num_processes": 3}))
    joined = ImageFeatures(protocol, Networks({"rfid": network}))
    joined.join()
    kept = [0, 1, 2, 3, 5, 6]
    assert joined.index == kept and joined.skipped == [(4, "broken")] and len(set(joined.digests)) == 6
    assert torch.equal(joined.features["rfid"], network(images[kept]))
    assert torch.equal(joined.features["logits"], network.logits(network(images[kept])))
    parts[1].size = [4, 8]
    with pytest.raises(ValueError, match="different sizes"):
        joined.join()


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """12 samples with their grid, 10 real images, 14 that were trained on, and an encoder; where the command runs."""
    generator = np.random.default_rng(0)
    for name, count in (("samples", 12), ("real", 10), ("trained", 14)):
        (tmp_path / name).mkdir()
        for number in range(count):
            noise = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((40, 36)).save(tmp_path / name / f"{number:02}.png")
    Image.new("RGB", (120, 90)).save(tmp_path / "samples" / "grid.png")
    images = [{"file": f"{i:02}.png", "seed": i, "condition": "cat"} for i in range(12)]
    made_by = {"generator": "runs/emoji", "settings": {"guidance_scale": 1.5}, "images": images}
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(made_by))
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(**encoder_config("dinov2"))).save_pretrained(tmp_path / "encoder")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SAMPLES = ["--samples", "samples", "--output_dir", "out", "--image_size", "32", "--batch_size", "5"]
ENCODER = [*SAMPLES, "--feature_encoder", "encoder", "--no_inception"]


@pytest.fixture
def judged(folder, monkeypatch, capsys):
    """Runs the command; gives what it prints, and its results.json."""

    def run_it(*arguments: str) -> tuple[str, dict]:
        monkeypatch.setattr(sys, "argv", ["generation.py", *arguments])
        generation.main()
        return capsys.readouterr().out, json.loads((folder / "out" / "results.json").read_text())

    return run_it


@pytest.fixture
def inception(monkeypatch):
    monkeypatch.setattr(networks, "load_inception_weights", lambda path: {})
    monkeypatch.setattr(networks, "InceptionV3", Colors)


def features_of(files, encoder) -> np.ndarray:
    """The encoder's class tokens, by transformers alone."""
    model, crop = AutoModel.from_pretrained(encoder).eval(), Protocol.load("default").crop
    crops = torch.from_numpy(np.stack([crop(Image.open(file), 32) for file in files])).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model((crops / 255 - 0.5) / 0.5).pooler_output.double().numpy()


def test_samples_are_judged_beside_training_images_and_halves_of_the_real_ones(judged, folder):
    output, result = judged(*ENCODER, "--real", "real", "--train_data", "trained")
    files = {name: find_images(folder / name) for name in ("samples", "real", "trained")}
    fake, real, trained = (
        features_of([x for x in found if x.name != "grid.png"], "encoder") for found in files.values()
    )
    for metric, value in naive_metrics(fake, real, 5).items():
        assert result["metrics"][f"{metric}_encoder"] == pytest.approx(value)
    s1, s2 = np.cov(fake, rowvar=False), np.cov(real, rowvar=False)
    root = scipy.linalg.sqrtm(s1) @ scipy.linalg.sqrtm(s2)  # of few images: the trace of the root is its nuclear norm
    root = np.linalg.svd(root, compute_uv=False).sum()
    expected = ((fake.mean(0) - real.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
    assert result["metrics"]["fd_encoder"] == pytest.approx(expected, rel=1e-3)
    assert result["num_images"] == 12 and result["num_real_images"] == 10
    counts = {name: (part["num_images"], part["num_real_images"]) for name, part in result["baselines"].items()}
    assert counts == {"training images": (12, 10), "halves of the real images": (5, 5)}
    assert all(part["metrics"]["fd_encoder"] > 0 for part in result["baselines"].values())
    assert (
        "12 samples and 10 real images, fewer than its 32 features" in result["warnings"][0] and "| images |" in output
    )

    distances, numbers = NearestNeighbors(n_neighbors=3).fit(trained).kneighbors(fake)
    neighbours = result["neighbours"]
    assert neighbours["distances"]["samples"]["0.5"] == pytest.approx(np.quantile(distances[:, 0], 0.5), rel=1e-4)
    held_out = NearestNeighbors(n_neighbors=1).fit(trained).kneighbors(real)[0][:, 0]
    assert neighbours["distances"]["real images"]["0.05"] == pytest.approx(np.quantile(held_out, 0.05), rel=1e-4)
    share = (distances[:, 0] < np.quantile(held_out, 0.05)).mean()
    assert neighbours["nearer_than_5_percent_of_real"] == pytest.approx(share) and neighbours["copies"] == 0
    assert len(neighbours["drawn"]) == 12
    first = neighbours["drawn"][0]
    assert first["sample"] == f"samples/{distances[:, 0].argmin():02}.png"
    assert first["nearest"] == [f"trained/{number:02}.png" for number in numbers[distances[:, 0].argmin()]]

    assert result["source"]["made_by"]["settings"] == {"guidance_scale": 1.5} and len(result["warnings"]) == 1
    assert "gfid" not in result["metrics"] and result["protocol"]["images"]["resize"] == "bicubic"
    assert result["networks"]["fd_encoder"] and result["versions"]["torch"] and result["data"]["pixels_sha256"]
    expected = ["neighbours.png", "pictures.png", "report.html", "results.json", "results.md"]
    assert sorted(os.listdir("out")) == expected
    page = (folder / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 4 and 'src="http' not in page
    # 4 in each of three groups; samples, and three rows of neighbours below each
    assert Image.open("out/neighbours.png").size == (4 * 34 + 2, 3 * 4 * 34 + 2)


def test_memorised_samples_are_told(judged, folder):
    for number in range(12):
        shutil.copy(folder / "trained" / f"{number + 1:02}.png", folder / "samples" / f"{number:02}.png")
    shutil.copy(folder / "trained" / "03.png", folder / "real" / "03.png")
    output, result = judged(*ENCODER, "--real", "real", "--train_data", "trained")
    neighbours = result["neighbours"]
    assert neighbours["copies"] == 12 and set(neighbours["distances"]["samples"].values()) == {0}
    assert {x["sample"]: x["nearest"][0] for x in neighbours["drawn"]}["samples/04.png"] == "trained/05.png"
    assert "12 samples are training images, pixel by pixel" in output
    assert "1 of the real images are training images" in output


def test_equal_samples_and_unreadable_images_are_told(judged, folder):
    shutil.copy(folder / "samples" / "00.png", folder / "samples" / "01.png")
    (folder / "samples" / "05.png").write_bytes(b"no image")
    output, result = judged(*ENCODER, "--train_data", "trained")
    assert result["num_images"] == 11 and "05.png" in result["skipped_images"][0]
    assert "1 of 11 samples are equal" in output and result["metrics"]["fd_encoder"] is None
    assert "no real images" in result["not_computed"]["fd_encoder"] and not result["baselines"]
    sample = {x["sample"]: x for x in result["neighbours"]["drawn"]}["samples/11.png"]  # behind the one left out
    fake, trained = (features_of(find_images(folder / "trained")[:0] + files, "encoder") for files in (
        [folder / "samples" / "11.png"], find_images(folder / "trained")))  # fmt: skip
    assert sample["distances"][0] == pytest.approx(np.linalg.norm(trained - fake, axis=1).min(), rel=1e-4)


def test_inception_is_compared_with_reference_statistics(judged, folder, inception):
    rng = np.random.default_rng(1)
    sigma = np.cov(rng.normal(size=(40, 12)), rowvar=False)
    np.savez(folder / "adm.npz", arr_0=np.zeros((1, 2, 2, 3)), mu=np.full(12, 100.0), sigma=sigma)
    output, result = judged(*SAMPLES, "--reference_statistics", "adm.npz")
    crop = Protocol.load("default").crop
    files = [file for file in find_images(folder / "samples") if file.name != "grid.png"]
    pixels = torch.from_numpy(np.stack([crop(Image.open(file), 32) for file in files])).permute(0, 3, 1, 2)
    x = Colors()(pixels).double().numpy()
    root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ sigma).real
    expected = ((x.mean(0) - 100) ** 2).sum() + np.trace(np.cov(x, rowvar=False) + sigma - 2 * root)
    assert result["metrics"]["gfid"] == pytest.approx(expected, rel=1e-3)
    assert result["metrics"]["inception_score"] > 1 and "gFID" in output and "adm.npz" in output
    assert result["metrics"]["precision_inception"] is None and result["num_real_images"] is None
    assert "12 samples and the reference statistics" in result["warnings"][0]


def test_statistics_of_another_network_are_refused_before_anything_is_measured(judged, folder, inception, capsys):
    np.savez(folder / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(SystemExit):
        judged(*SAMPLES, "--reference_statistics", "other.npz")
    assert "other.npz is of 3 features, and Inception has 12" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_without_inception_s_weights_the_rest_is_computed(judged, folder, monkeypatch):
    def nowhere(path):
        raise OSError("no network")

    monkeypatch.setattr(networks, "load_inception_weights", nowhere)
    output, result = judged(*SAMPLES, "--feature_encoder", "encoder", "--real", "real")
    assert result["metrics"]["fd_encoder"] > 0 and result["metrics"]["gfid"] is None
    assert "no network" in result["not_computed"]["gfid"] and "--inception_weights" in result["not_computed"]["gfid"]
    assert result["neighbours"] is None and "| gFID | weights not available |" in output


def test_an_interrupted_command_does_not_do_again_what_was_done(judged, folder, inception, monkeypatch):
    whole = judged(*SAMPLES, "--real", "real")[1]
    seen, forward = [], Colors.forward

    def interrupted(self, images):
        seen.append(len(images))
        if len(seen) == 4:  # 5, 5, 2 samples, and then real images
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(Colors, "forward", interrupted)
    with pytest.raises(SystemExit, match="130"):
        judged(*SAMPLES, "--real", "real")
    assert not (folder / "out" / "results.json").exists()
    output, result = judged(*SAMPLES, "--real", "real")
    assert seen == [5, 5, 2, 5, 5, 5] and "Going on after 12 images" in output
    for name in ("metrics", "baselines", "data"):
        assert result[name] == whole[name]
    assert not list((folder / "out").glob("*progress*"))


def test_results_are_compared_if_they_are_of_the_same_real_images(judged, folder, monkeypatch, capsys):
    for name, real in (("a", "real"), ("b", "real"), ("c", "trained")):
        judged(*ENCODER, "--real", real)
        (folder / "out").rename(name)
    monkeypatch.setattr(sys, "argv", ["compare.py", "a", "b"])
    compare.main()
    assert "| FD-encoder |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare.py", "a", "c"])
    with pytest.raises(SystemExit, match="Not compared"):
        compare.main()
    assert "the originals are not the same images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "nowhere", "--real", "real"], "no folder nowhere"),
        (["--samples", "samples"], "pass what the samples are compared with"),
        (["--samples", "samples", "--real", "nowhere"], "nowhere"),
        (["--samples", "samples", "--real", "real", "--protocol", "adm"], "pass one of default, imagenet-256"),
        (["--samples", "samples", "--real", "real", "--protocol", "imagenet-256", "--image_size", "9"], "256 px"),
        (["--samples", "samples", "--real", "real", "--no_inception"], "leaves no features"),
        (["--samples", "samples", "--reference_statistics", "a.npz", "--no_inception"], "have no effect"),
        (["--samples", "samples", "--real", "real", "--inception_weights", "nowhere.pth"], "no file nowhere.pth"),
        (
            ["--samples", "samples", "--real", "smaller", "--no_inception", "--feature_encoder", "encoder"],
            "--image_size",
        ),
        (["--samples", "samples", "--real", "real", "--no_inception", "--feature_encoder", "no/such"], "no/such"),
        (["--samples", "broken", "--real", "real", "--no_inception", "--feature_encoder", "encoder"], "could be read"),
        (["--samples", "grid", "--real", "real"], "no image beside grid.png"),
        (["--samples", "foreign", "--real", "real"], "not as generation.sample writes it"),
    ],
)
def test_mistakes_end_the_command_in_one_line(arguments, message, folder, monkeypatch, capsys):
    (folder / "samples" / "grid.png").unlink()
    for name in ("smaller", "broken", "grid", "foreign"):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(b"no image")
    Image.new("RGB", (20, 20)).save(folder / "smaller" / "a.png")
    (folder / "grid" / "a.png").rename(folder / "grid" / "grid.png")
    (folder / "grid" / "samples.json").write_text("{}")
    (folder / "foreign" / "samples.json").write_text('{"images": ["a.png"]}')
    monkeypatch.setattr(sys, "argv", ["generation.py", *arguments, "--output_dir", "out"])
    with pytest.raises(SystemExit) as end:
        generation.main()
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert end.value.code in (1, 2) and len(said) == 1 and message in said[0], said
    assert not (folder / "out" / "results.json").exists()


def test_documented_commands_are_understood():
    text = "\n".join(blocks("docs/evaluation.md", "bash")).replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "eval.generation" in line]
    assert len(commands) == 2
    for command in commands:
        generation.build_parser().parse_args(shlex.split(command.partition("eval.generation")[2]))
