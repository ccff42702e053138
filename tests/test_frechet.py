"""Fréchet distances and FID's network, beside those of pytorch-fid, torch-fidelity and clean-fid."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3
import torch_fidelity.metric_fid
from conftest import encoder_config, tiny_config
from transformers import AutoConfig, AutoModel, ViTImageProcessor

from eval.networks import VisionFeatures, weights_hash
from eval.rfid.rfid import InceptionV3, Moments, frechet_distance, load_statistics
from modeling_simvq import VQRAEModel


def features(count: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(100).normal(size=(width, width)) / width**0.5
    return rng.normal(size=(count, width)) @ mixing + 0.1 * seed + rng.exponential(size=(count, width)) * 0.2


def test_frechet_distance_agrees_with_pytorch_fid_s_and_torch_fidelity_s_formula():
    a, b = features(500, 48, 1), features(300, 48, 2)
    moments = []
    for x in (a, b):
        moments.append(Moments(48))
        for part in np.array_split(x, 7):
            moments[-1].update(torch.from_numpy(part))
    ours = frechet_distance(*moments[0].compute(), *moments[1].compute())
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(s1 @ s2)  # pytorch-fid, and the SimVQ reference
    expected = (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real)
    assert ours == pytest.approx(expected, rel=1e-6)
    fidelity = torch_fidelity.metric_fid.fid_statistics_to_metric(
        *(torch_fidelity.metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), False
    )
    assert ours == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-6)


def test_frechet_distance_agrees_with_pytorch_fid():
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (features(500, 48, 1), features(300, 48, 2)))
    ours = frechet_distance(*map(torch.from_numpy, (m1, s1, m2, s2)))
    assert ours == pytest.approx(pytorch_fid.calculate_frechet_distance(m1, s1, m2, s2), rel=1e-6)


def test_frechet_distance_agrees_with_clean_fid():
    cleanfid = pytest.importorskip("cleanfid.fid")
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (features(500, 48, 1), features(300, 48, 2)))
    ours = frechet_distance(*map(torch.from_numpy, (m1, s1, m2, s2)))
    assert ours == pytest.approx(cleanfid.frechet_distance(m1, s1, m2, s2), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_fewer_images_than_features_give_a_real_distance(count):
    a, b = features(count, 64, 1), features(count, 64, 2)
    values = []
    for x, y in ((a, b), (a, a)):
        moments = Moments(64), Moments(64)
        for part, sums in zip((x, y), moments):
            sums.update(torch.from_numpy(part))
        values.append(frechet_distance(*moments[0].compute(), *moments[1].compute()))
    # of rank below `count`: the trace of the root by the small Gram matrix, exactly
    centred = [(x - x.mean(0)) / max(count - 1, 1) ** 0.5 for x in (a, b)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * root
    assert values[0] == pytest.approx(expected, rel=1e-6)
    assert values[1] == pytest.approx(0, abs=1e-6)


def test_statistics_files_of_others_are_read_and_pickles_are_not(tmp_path):
    mean, covariance = np.zeros(3, np.float32), np.eye(3)
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((1, 2, 2, 3)), mu=mean, sigma=covariance, mu_s=mean)
    assert load_statistics(tmp_path / "adm.npz")[1].dtype == torch.float64
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 2, 2, 3)))
    with pytest.raises(ValueError, match="no 'mu' and 'sigma'"):
        load_statistics(tmp_path / "images.npz")
    np.savez(tmp_path / "pickle.npz", mu=np.array([print], dtype=object), sigma=covariance)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_statistics(tmp_path / "pickle.npz")
    np.savez(tmp_path / "shape.npz", mu=mean, sigma=np.eye(4))
    with pytest.raises(ValueError, match="do not fit"):
        load_statistics(tmp_path / "shape.npz")


def test_inception_gives_torch_fidelity_s_features(inception_weights, pair):
    reference = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(inception_weights)
    )
    weights = torch.load(inception_weights, weights_only=True)
    with torch.no_grad():
        expected = reference(pair[0])[0]
        ours = InceptionV3(weights)(pair[0])
        double = InceptionV3(weights, dtype=torch.float64)(pair[0])
    assert expected.std() > 1e-3  # not a constant
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(double.float(), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="not the weights of FID's Inception"):
        InceptionV3({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)})


def test_inception_gives_pytorch_fid_s_features(inception_weights, pair, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    weights = torch.load(inception_weights, weights_only=True)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: weights)
    with torch.no_grad():
        expected = module.InceptionV3([3]).eval()(pair[0] / 255)[0].flatten(1)
        ours = InceptionV3(weights, "pytorch-fid")(pair[0] / 255)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_hash_of_features_is_of_weights_and_of_what_they_see(tmp_path):
    """Which results.json and the key of an evaluation's progress hold."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(**encoder_config("vit"))).save_pretrained(tmp_path)
    hashes, other, smaller = [], [0.1, 0.2, 0.3], {"height": 16, "width": 16}
    for change in ({}, {}, {"image_mean": other}, {"image_std": other}, {"size": smaller}):
        ViTImageProcessor(**{"size": {"height": 32, "width": 32}, **change}).save_pretrained(tmp_path)
        hashes.append(weights_hash(VisionFeatures(str(tmp_path))))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_features_without_an_image_processor_are_seen_as_their_family_was_trained(tmp_path):
    for model_type in ("dinov2", "vit"):
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(**encoder_config(model_type))).save_pretrained(tmp_path / model_type)
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert torch.equal(VisionFeatures(str(tmp_path / "dinov2")).seen_as, torch.tensor([mean, deviation, [224] * 3]))
    assert VisionFeatures(str(tmp_path / "vit")).seen_as[:2].unique().tolist() == [0.5]
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    assert VisionFeatures(str(tmp_path / "vit")).seen_as[2].tolist() == [16] * 3
    AutoModel.from_config(AutoConfig.for_model("convnext", hidden_sizes=[4] * 4, depths=[1] * 4)).save_pretrained(
        tmp_path / "convnext"
    )
    with pytest.raises(ValueError, match="statistics of 'convnext' are not known here: save its image processor"):
        VisionFeatures(str(tmp_path / "convnext"))


def test_a_tokenizer_is_no_feature_encoder(tmp_path):
    """It ended in a TypeError."""
    VQRAEModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an image tokenizer.*name the encoder"):
        VisionFeatures(str(tmp_path))
