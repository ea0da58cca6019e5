"""The .npz of ADM's evaluation, there and back, its errors, and the reference checksum."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sandbox
from sandbox_plugins.tasks.npz import from_uint8, read_npz, to_uint8, write_npz
from sandbox_plugins.tasks.reference import checksum


def draw_images(seed, n, h=4, w=5):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, h, w), generator=rng, dtype=torch.uint8)


def test_every_grey_level_survives_and_values_outside_are_clamped():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(-1, 3, -1, -1)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-1.5, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([float("nan")]))


@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), batch_size=st.integers(1, 12))
def test_images_and_their_labels_come_back_together_whatever_the_batches(
    tmp_path_factory, seed, n, batch_size
):
    path = tmp_path_factory.mktemp("npz") / "samples.npz"
    images, labels = draw_images(seed, n), torch.arange(n)
    write_npz(path, iter(from_uint8(images).split(batch_size)), labels, seed)
    again, order = read_npz(path)
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(again, images[order])
    with np.load(path) as file:
        assert file["arr_0"].shape == (n, 4, 5, 3) and file["arr_0"].dtype == np.uint8
    assert [p.name for p in path.parent.iterdir()] == ["samples.npz"]


def test_classes_are_mixed_and_the_seed_decides_how(tmp_path):
    images, labels = from_uint8(draw_images(0, 100)), torch.arange(100) // 10
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_npz(tmp_path / name, [images], labels, seed)
        orders.append(read_npz(tmp_path / name)[1].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0][:20])) > 5
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_labels_there_is_one_array(tmp_path):
    write_npz(tmp_path / "x.npz", [from_uint8(draw_images(0, 3))], None, 0)
    images, labels = read_npz(tmp_path / "x.npz")
    assert images.shape == (3, 3, 4, 5) and labels is None


def test_what_cannot_be_written_is_refused_and_leaves_no_file(tmp_path):
    path, images = tmp_path / "x.npz", from_uint8(draw_images(0, 3))
    with pytest.raises(ValueError, match="no images"):
        write_npz(path, [], None, 0)
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        write_npz(path, [images], torch.zeros(2, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="one size"):
        write_npz(path, [images, images[..., :3]], None, 0)
    assert not list(tmp_path.iterdir())


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


GOOD = np.zeros((3, 4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GOOD}, "no 'arr_0'.*it holds images"),
        ({"arr_0": GOOD.astype(np.float32)}, "float32.*expected uint8"),
        ({"arr_0": GOOD[0]}, r"uint8 \(4, 5, 3\), expected"),
        ({"arr_0": GOOD.transpose(0, 3, 1, 2)}, r"\(3, 3, 4, 5\), expected"),
        ({"arr_0": GOOD[:0]}, r"\(0, 4, 5, 3\), expected"),
        ({"arr_0": GOOD, "arr_1": np.zeros(2, np.int64)}, r"'arr_1' .*\(2,\), expected 3"),
        ({"arr_0": GOOD, "arr_1": np.zeros(3)}, "'arr_1' is float64"),
        ({"arr_0": np.array([{}])}, "not an .npz"),  # would unpickle
    ],
)
def test_files_of_another_form_are_refused_by_name(tmp_path, arrays, message):
    with pytest.raises(sandbox.SandboxError, match=message) as error:
        read_npz(save(tmp_path / "odd.npz", **arrays))
    assert "odd.npz" in str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    path = save(tmp_path / "cut.npz", arr_0=GOOD, arr_1=np.zeros(3, np.int64))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if keep == 0.5 else keep])
    with pytest.raises(sandbox.SandboxError, match=r"cut\.npz"):
        read_npz(path)


def test_damaged_missing_and_foreign_files_are_refused(tmp_path):
    path = save(tmp_path / "bad.npz", arr_0=np.arange(3000, dtype=np.uint8).reshape(10, 10, 10, 3))
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(sandbox.SandboxError, match="truncated"):
        read_npz(path)
    with pytest.raises(sandbox.SandboxError, match="no such file"):
        read_npz(tmp_path / "none.npz")
    with pytest.raises(sandbox.SandboxError, match="directory"):
        read_npz(tmp_path)
    np.save(tmp_path / "one.npy", GOOD)
    with pytest.raises(sandbox.SandboxError, match="single array"):
        read_npz(tmp_path / "one.npy")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(sandbox.SandboxError, match="not an "):
        read_npz(tmp_path / "text.npz")


def draw_features(seed, n=50, d=8):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).relu()


@given(seed=st.integers(0, 2**31))
def test_a_checksum_survives_another_order_and_tells_sets_apart(seed):
    features = draw_features(seed)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    first = checksum(features)
    assert len(first) == 64 and int(first, 16) >= 0
    assert checksum(features[order]) == checksum(features.double()) == first
    others = [features[1:], features * 1.01, features + 0.01, draw_features(seed + 1)]
    assert len({first, *map(checksum, others)}) == 5


def test_a_checksum_needs_rows_and_finite_values_and_bears_constant_features():
    assert checksum(torch.zeros(3, 2)) != checksum(torch.ones(3, 2))
    with pytest.raises(ValueError, match="at least 2 rows"):
        checksum(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="finite"):
        checksum(torch.full((3, 2), float("inf")))
