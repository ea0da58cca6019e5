"""The feature extractors: offline, frozen while they measure, trainable where they should be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch_fidelity import FeatureExtractorInceptionV3

import sandbox
from sandbox_plugins.features import Classifier, Inception, RandomFeatures


def draw_images(seed, n, h, w):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, h, w, generator=rng) * 2 - 1


@pytest.fixture(scope="module")
def inception():
    return Inception(Inception.Params(), (16, 16), 10)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def test_inception_is_built_offline_and_equals_torch_fidelity_with_the_same_weights(
    tmp_path, no_network
):
    extractor = Inception(Inception.Params(), (16, 16), 10)
    weights = tmp_path / "inception.pth"
    torch.save(extractor.network.state_dict(), weights)
    other = Inception(Inception.Params(), (16, 16), 10)
    other.network.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(weights))
    pixels = torch.randint(256, (1, 3, 20, 16), dtype=torch.uint8)
    expected = theirs(pixels)
    for found in (extractor, other):
        features, logits = found.features(pixels / 127.5 - 1)
        assert features.shape == (1, 2048) and logits.shape == (1, 1008)
        assert torch.equal(features, expected[0]) and torch.equal(logits, expected[1])


def test_inception_refuses_weights_of_another_network(inception):
    with pytest.raises(RuntimeError, match="Missing key"):
        inception.network.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch"):
        inception.network.load_state_dict(
            inception.network.state_dict() | {"fc.bias": torch.zeros(3)}
        )


def test_inception_stays_a_measuring_instrument_even_when_told_to_train(inception):
    inception.network.train()
    assert not any(module.training for module in inception.network.modules())
    assert not any(parameter.requires_grad for parameter in inception.network.parameters())


@given(
    h=st.integers(8, 80), w=st.integers(8, 80), num_classes=st.integers(2, 12), n=st.integers(1, 3)
)
def test_a_classifier_bears_any_image_size(h, w, num_classes, n):
    extractor = Classifier(Classifier.Params(width=4), (h, w), num_classes)
    features, logits = extractor.features(draw_images(0, n, h, w))
    assert features.shape == (n, 32) and logits.shape == (n, num_classes)


@pytest.mark.parametrize(("size", "side"), [(16, 16), (32, 32), (64, 32), (128, 32), (256, 64)])
def test_a_classifiers_stem_shrinks_large_images_only(size, side):
    extractor = Classifier(Classifier.Params(width=4), (size, size), 10)
    seen = []
    extractor.network.layer1.register_forward_hook(lambda m, x, y: seen.append(y.shape[-1]))
    extractor.features(draw_images(0, 1, size, size))
    assert seen == [side]


def test_a_classifier_of_width_64_and_2_blocks_has_the_size_of_a_resnet_18():
    extractor = Classifier(Classifier.Params(width=64, blocks=2), (32, 32), 10)
    assert sum(p.numel() for p in extractor.network.parameters()) == pytest.approx(
        11.17e6, rel=0.01
    )


def test_a_classifier_is_frozen_unless_it_is_in_training():
    extractor = Classifier(Classifier.Params(width=4), (16, 16), 3)
    images = draw_images(0, 4, 16, 16)
    statistics = {k: v.clone() for k, v in extractor.network.named_buffers()}
    _, logits = extractor.features(images)
    assert not logits.requires_grad
    assert all(torch.equal(v, statistics[k]) for k, v in extractor.network.named_buffers())
    extractor.network.train()
    F.cross_entropy(extractor.features(images)[1], torch.tensor([0, 1, 2, 0])).backward()
    gradients = [p.grad for p in extractor.network.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    with torch.no_grad():
        assert not extractor.features(images)[1].requires_grad


def test_the_logits_are_those_of_the_whole_network_and_a_batch_is_its_images():
    extractor = Classifier(Classifier.Params(width=4), (16, 16), 3)
    images = draw_images(0, 4, 16, 16)
    features, logits = extractor.features(images)
    torch.testing.assert_close(logits, extractor.network(images))
    torch.testing.assert_close(features[:1], extractor.features(images[:1])[0])


def test_a_classifier_learns_two_colors_in_a_few_steps():
    torch.manual_seed(0)
    extractor = Classifier(Classifier.Params(width=4), (8, 8), 2)
    labels = torch.arange(32) % 2
    images = draw_images(1, 32, 8, 8) / 2 + (labels - 0.5).reshape(-1, 1, 1, 1)
    extractor.network.train()
    optimizer = torch.optim.AdamW(extractor.network.parameters(), lr=1e-2)
    for _ in range(15):
        loss = F.cross_entropy(extractor.features(images)[1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    extractor.network.eval()
    assert (extractor.features(images)[1].argmax(1) == labels).float().mean() > 0.9


@given(seed=st.integers(0, 2**31), h=st.integers(1, 20), w=st.integers(1, 20))
def test_random_features_are_repeated_by_their_seed_alone(seed, h, w):
    def build(seed):
        return RandomFeatures(RandomFeatures.Params(seed=seed, width=8), (h, w), 5)

    state = torch.get_rng_state()
    extractor, again, other = build(seed), build(seed), build(seed + 1)
    assert torch.equal(torch.get_rng_state(), state)
    images = draw_images(seed, 2, h, w)
    features, logits = extractor.features(images)
    assert features.shape == (2, 8) and logits.shape == (2, 5)
    assert features.std(dim=0).max() > 0, "two images must not look the same"
    assert torch.equal(again.features(images)[0], features)
    assert not torch.equal(other.features(images)[0], features)


def test_extractors_are_registered_with_their_labels(registry, inception):
    labels = {"inception": "inception", "classifier": "classifier", "random": "random-conv"}
    for name, label in labels.items():
        cls = registry.find(sandbox.FeatureExtractor, name)
        extractor = cls(cls.Params(), (16, 16), 10) if name != "inception" else inception
        assert extractor.label == label and isinstance(extractor, sandbox.FeatureExtractor)
        assert extractor.needs_weights == (name != "random")
