"""The four data sets, on small files written here."""

import gzip
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sandbox
from sandbox import RunError, SandboxError
from sandbox_plugins.datasets import image_folder
from sandbox_plugins.datasets.cifar10 import Cifar10
from sandbox_plugins.datasets.idx import Idx
from sandbox_plugins.datasets.image_folder import ImageFolder
from sandbox_plugins.datasets.images import from_bytes, write_floats
from sandbox_plugins.datasets.shapes import Shapes

SPLITS = ("train", "validation")


def build(cls, **settings):
    return cls(cls.Params(**settings))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(dataset, split, indices, seed=0):
    return dataset.batch(split, torch.as_tensor(indices), rng(seed))


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def write_images(folder, names, size=(40, 30), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for name in names:
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write_cifar(folder, num_records=6, names=("data_batch_1.bin", "test_batch.bin")):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    written = {}
    for name in names:
        records = generator.integers(0, 256, (num_records, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(num_records) % 10
        records.tofile(folder / name)
        written[name] = records
    return written


def idx_bytes(values):
    header = bytes([0, 0, 8, values.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def write_idx(folder, num=5, side=28, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    images = {}
    for prefix in ("train", "t10k"):
        images[prefix] = generator.integers(0, 256, (num, side, side), dtype=np.uint8)
        labels = (np.arange(num) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", images[prefix]), ("labels-idx1", labels)):
            content, path = idx_bytes(values), folder / f"{prefix}-{kind}-ubyte"
            if packed:
                path, content = path.with_name(path.name + ".gz"), gzip.compress(content)
            path.write_bytes(content)
    return images


@pytest.fixture
def datasets(tmp_path):
    """One of each, every augmentation on."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(
                tmp_path / "photos" / split / name, [f"{i}.png" for i in range(4)], seed=len(split)
            )
    write_cifar(tmp_path / "cifar")
    write_idx(tmp_path / "idx")
    photos = build(ImageFolder, root=tmp_path / "photos", image_size=(8, 12), flip=True)
    cifar = build(Cifar10, root=tmp_path / "cifar", allow_partial=True, flip=True, pad_crop_px=4)
    return [build(Shapes), photos, cifar, build(Idx, root=tmp_path / "idx")]


def test_every_data_set_is_registered(registry):
    names = {entry.name for entry in registry if entry.plugin == "datasets"}
    assert names == {"shapes", "image-folder", "cifar10", "idx"}


def test_images_and_labels_have_the_promised_shape_range_and_type(datasets):
    for dataset in datasets:
        assert len(dataset.class_names) == dataset.num_classes
        for split in SPLITS:
            got = batch(dataset, split, [2, 0, 1])
            assert got.images.shape == (3, 3, *dataset.image_size)
            assert got.images.dtype == torch.float32 and got.labels.dtype == torch.long
            assert -1 <= got.images.min() < -0.4 and 0.4 < got.images.max() <= 1
            assert got.labels.min() >= 0 and got.labels.max() < dataset.num_classes


def test_the_same_generator_seed_gives_the_same_batch(datasets):
    for dataset in datasets:
        first, again = (batch(dataset, "train", [3, 1, 1, 0], seed=7) for _ in range(2))
        assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)


def test_validation_images_are_not_augmented_and_do_not_depend_on_their_batch(datasets):
    for dataset in datasets:
        whole = batch(dataset, "validation", range(4), seed=1)
        for i in range(4):
            alone = batch(dataset, "validation", [i], seed=2)
            assert torch.equal(alone.images[0], whole.images[i])
            assert alone.labels[0] == whole.labels[i]


def test_no_image_is_in_both_splits(datasets):
    for dataset in datasets:
        train, validation = (
            batch(dataset, s, range(min(dataset.size(s), 64))).images.flatten(1) for s in SPLITS
        )
        assert torch.cdist(train, validation).min() > 0.5


def test_an_index_outside_the_split_is_an_error(datasets):
    for dataset in datasets:
        for wrong in (-1, dataset.size("validation")):
            with pytest.raises(IndexError, match="were asked of a split of"):
                batch(dataset, "validation", [wrong])


@given(
    height=st.integers(8, 24),
    width=st.integers(8, 24),
    num_classes=st.integers(2, 16),
    clutter=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_shape_depends_on_seed_split_and_index_alone(height, width, num_classes, clutter, seed):
    settings = {"image_size": (height, width), "num_classes": num_classes, "clutter": clutter}
    dataset = build(Shapes, **settings, seed=seed)
    whole = batch(dataset, "train", range(20), seed=1)
    picked = torch.tensor([19, 3, 3, 0, 7])
    part = batch(build(Shapes, **settings, seed=seed), "train", picked, seed=2)
    assert torch.equal(part.images, whole.images[picked])
    assert torch.equal(part.labels, picked % num_classes)
    for other in (
        batch(dataset, "validation", range(20)),
        batch(build(Shapes, **settings, seed=(seed + 1) % 2**32), "train", range(20)),
    ):
        assert torch.cdist(other.images.flatten(1), whole.images.flatten(1)).min() > 0


def test_shapes_build_without_settings_and_one_number_means_a_square():
    assert build(Shapes).image_size == (16, 16) and build(Shapes).num_classes == 10
    assert build(Shapes, image_size=20).image_size == (20, 20)
    with pytest.raises(ValueError, match="give 4 to 8192 px"):
        build(Shapes, image_size=[16, 2])


def test_shapes_vary_in_place_and_colour_and_clutter_makes_them_harder():
    circles = torch.arange(0, 640, 10)
    plain, hard = (
        batch(build(Shapes, clutter=clutter), "train", circles).images for clutter in (0, 1)
    )
    assert plain.std(0).mean() > 0.3
    corner = plain[:, :, 0, :2]  # the shape hardly ever reaches it, and the background is flat
    assert ((corner[..., 0] - corner[..., 1]).abs().amax(1) < 0.02).float().mean() > 0.9
    assert (hard - plain).abs().mean() > 0.05


def test_a_hollow_shape_shows_its_background_in_the_middle():
    dataset = build(Shapes, image_size=32, clutter=0)
    for label, alike in ((0, False), (1, True)):
        images = batch(dataset, "train", torch.arange(label, 400, 10)).images
        background = torch.stack([images[:, :, 0, 0], images[:, :, -1, -1]]).mean(0)
        difference = (images[:, :, 15:17, 15:17].mean((2, 3)) - background).abs().amax(1)
        assert bool(difference.median() < 0.05) is alike


def test_class_folders_are_classes_in_sorted_order_whatever_the_suffix(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split / "b", ["1.JPEG", "2.webp"])
        write_images(
            tmp_path / split / "a", ["1.jpg", "2.jpeg", "3.PNG", "._4.png", "notes.txt.png"]
        )
        (tmp_path / split / "a" / "notes.txt").write_text("no image")
    dataset = build(ImageFolder, root=tmp_path, image_size=8)
    assert list(dataset.class_names) == ["a", "b"]
    assert [dataset.size(split) for split in SPLITS] == [6, 6]
    assert batch(dataset, "validation", range(6)).labels.tolist() == [0, 0, 0, 0, 1, 1]


def test_without_train_and_val_a_seeded_share_is_held_out(tmp_path):
    write_images(tmp_path / "a", [f"{i}.png" for i in range(10)], seed=1)
    write_images(tmp_path / "b", [f"{i}.png" for i in range(10)], seed=2)
    dataset, again, other = (
        build(ImageFolder, root=tmp_path, image_size=8, validation_share=0.25, seed=seed)
        for seed in (0, 0, 1)
    )
    assert [dataset.size(split) for split in SPLITS] == [15, 5]
    held_out, same, different = (
        batch(d, "validation", range(5)).images for d in (dataset, again, other)
    )
    assert torch.equal(held_out, same) and not torch.equal(held_out, different)
    train = batch(
        build(
            ImageFolder, root=tmp_path, image_size=8, validation_share=0.25, augment="center-crop"
        ),
        "train",
        range(15),
    ).images
    assert torch.cdist(held_out.flatten(1), train.flatten(1)).min() > 0.5


def test_images_without_class_folders_are_one_class(tmp_path):
    write_images(tmp_path, [f"{i}.png" for i in range(4)])
    dataset = build(ImageFolder, root=tmp_path, image_size=8)
    assert list(dataset.class_names) == ["image"] and dataset.num_classes == 1
    assert [dataset.size(split) for split in SPLITS] == [3, 1]


@given(
    stored=st.tuples(st.integers(5, 90), st.integers(5, 90)),
    wanted=st.tuples(st.integers(4, 40), st.integers(4, 40)),
)
def test_any_image_fills_any_size_without_distortion(tmp_path_factory, stored, wanted):
    folder = tmp_path_factory.mktemp("ramp")
    height, width = stored
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    pixels = np.broadcast_to(ramp[None, :, None], (height, width, 3))
    for name in ("1.png", "2.png"):
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name)
    dataset = build(ImageFolder, root=folder, image_size=wanted)
    for split in SPLITS:
        image = batch(dataset, split, [0]).images[0]
        assert image.shape == (3, *wanted)
        assert torch.allclose(image, image[:, :1].expand_as(image), atol=0.02)


def test_validation_crops_the_middle_of_the_published_resize(tmp_path):
    write_images(tmp_path, ["1.png", "2.png"], size=(50, 36))
    dataset = build(ImageFolder, root=tmp_path, image_size=16)
    got = batch(dataset, "validation", [0]).images[0]
    candidates = []
    for name in ("1.png", "2.png"):
        resized = Image.open(tmp_path / name).resize((25, 18), Image.Resampling.LANCZOS)
        pixels = np.array(resized.crop((4, 1, 20, 17)))
        candidates.append(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    assert any(torch.allclose(got, candidate, atol=1e-6) for candidate in candidates)


def test_training_crops_vary_flips_are_off_by_default_and_workers_change_nothing(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20] = 255  # bright on the left
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.fromarray(pixels).save(tmp_path / split / "1.png")
    many = [0] * 40

    def halves(**settings):
        images = batch(
            build(ImageFolder, root=tmp_path, image_size=32, **settings), "train", many
        ).images
        return images, images[:, 0, 0, 0] > images[:, 0, 0, -1]

    images, bright_left = halves()
    assert bright_left.all() and len(images.unique(dim=0)) > 1
    assert torch.equal(images, halves(num_workers=1)[0])
    assert len(halves(augment="center-crop")[0].unique(dim=0)) == 1
    assert 8 < int(halves(flip=True)[1].sum()) < 32


def test_one_image_becomes_floats_as_many_do():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    pixels = pixels[:, ::-1]  # as where it is mirrored
    out = np.full((3, 16, 16), np.nan, np.float32)
    write_floats(pixels, out)
    together = from_bytes(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert np.array_equal(out, together.numpy())


def test_threads_are_as_many_as_cores_or_a_share_of_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert image_folder._cores() == 8
    for num_workers, threads in ((3, 2), (16, 1)):
        monkeypatch.setattr(
            image_folder, "get_worker_info", lambda n=num_workers: SimpleNamespace(num_workers=n)
        )
        assert image_folder._cores() == threads
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(sandbox, "world_size", lambda: 2, raising=False)
    assert image_folder._cores() == 4
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert image_folder._cores() == 16


def corrupt_folder(tmp_path, num_good=2):
    write_images(tmp_path / "train" / "a", [f"{i}.png" for i in range(num_good)])
    write_images(tmp_path / "train" / "b", ["0.jpg"])
    write_images(tmp_path / "val" / "a", ["0.png"])
    cut = tmp_path / "train" / "b" / "0.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "train" / "a" / "text.png").write_text("not an image")
    return cut


def test_a_corrupt_image_stops_the_run_and_is_named(tmp_path):
    cut = corrupt_folder(tmp_path)
    dataset = build(ImageFolder, root=tmp_path, image_size=8)
    for index, name in ((2, "text.png"), (3, str(cut))):
        with pytest.raises(RunError) as error:
            batch(dataset, "train", [0, index])
        message = one_line(error)
        assert name in message and "on_corrupt: skip" in message


def test_a_corrupt_image_is_replaced_by_the_next_good_one_and_reported_once(tmp_path):
    cut = corrupt_folder(tmp_path)
    dataset = build(
        ImageFolder, root=tmp_path, image_size=8, on_corrupt="skip", augment="center-crop"
    )
    with pytest.warns(UserWarning, match=r"skipped .*(text\.png|0\.jpg)") as warned:
        got = batch(dataset, "train", [2, 0, 2])
    assert len(warned) == 2  # a/text.png, then b/0.jpg, then round to a/0.png
    assert torch.equal(got.images[0], got.images[1]) and got.labels.tolist() == [0, 0, 0]
    assert dataset.skipped == [str(cut.parent.parent / "a" / "text.png"), str(cut)]
    batch(dataset, "train", [2, 3])  # a second warning would fail this test


def test_a_folder_with_no_readable_image_is_an_error_even_when_skipping(tmp_path):
    corrupt_folder(tmp_path, num_good=0)
    dataset = build(ImageFolder, root=tmp_path, image_size=8, on_corrupt="skip")
    with pytest.raises(RunError, match="no train image below"):
        batch(dataset, "train", [0])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "no images in"),
        (["train/a/1.png"], "no val: add it, or set root to"),
        (["train/a/1.png", "val/b/1.png"], "such as 'b'"),
        (["a/1.png", "1.png"], "move one of them away"),
        (["a/1.png", "b/notes.txt"], "has no images"),
        (["1.png"], "one image"),
    ],
)
def test_a_folder_laid_out_wrongly_says_what_to_do(tmp_path, names, expected):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            write_images(path.parent, [path.name])
        else:
            path.write_text("no image")
    with pytest.raises(SandboxError) as error:
        build(ImageFolder, root=tmp_path)
    assert expected in one_line(error)


@pytest.mark.parametrize("cls", [ImageFolder, Cifar10, Idx])
def test_missing_data_says_in_one_line_how_to_get_it(cls, tmp_path):
    with pytest.raises(SandboxError) as error:
        build(cls, root=tmp_path / "nowhere")
    message = one_line(error)
    assert str(tmp_path / "nowhere") in message and "https://" in message


def test_cifar_images_are_the_bytes_of_the_file(tmp_path):
    written = write_cifar(tmp_path)
    dataset = build(Cifar10, root=tmp_path, allow_partial=True)
    for split, name in (("train", "data_batch_1.bin"), ("validation", "test_batch.bin")):
        got = batch(dataset, split, [4, 1])
        assert got.labels.tolist() == [4, 1]
        levels = ((got.images + 1) * 127.5).round().to(torch.uint8).numpy()
        assert np.array_equal(levels.reshape(2, -1), written[name][[4, 1], 1:])


def test_cifar_joins_its_five_batches(tmp_path):
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    written = write_cifar(tmp_path, num_records=3, names=names)
    dataset = build(Cifar10, root=tmp_path, allow_partial=True)
    assert [dataset.size(split) for split in SPLITS] == [15, 3]
    last = ((batch(dataset, "train", [14]).images + 1) * 127.5).round().flatten().numpy()
    assert np.array_equal(last, written["data_batch_5.bin"][2, 1:])


def test_cifar_shifts_bring_in_black_and_flips_mirror(tmp_path):
    write_cifar(tmp_path)
    plain, shifted, flipped = (
        batch(build(Cifar10, root=tmp_path, allow_partial=True, **settings), "train", [0] * 30)
        for settings in ({}, {"pad_crop_px": 4}, {"flip": True})
    )
    original = plain.images[0]
    padded = torch.nn.functional.pad(original, [4] * 4, value=-1.0)
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).flatten(1, 2)
    for image in shifted.images:
        assert (windows == image[:, None]).all(3).all(2).all(0).sum() == 1
    assert len(shifted.images.unique(dim=0)) > 10
    mirrored = [torch.equal(image, original.flip(-1)) for image in flipped.images]
    same = [torch.equal(image, original) for image in flipped.images]
    assert sum(mirrored) + sum(same) == 30 and 5 < sum(mirrored) < 25


@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_truncated_cifar_file_is_an_error(tmp_path, allow_partial):
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    write_cifar(tmp_path, names=names)
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SandboxError) as error:
        build(Cifar10, root=tmp_path, allow_partial=allow_partial)
    assert f"{path} has {6 * 3073 - 5} bytes" in one_line(error)


def test_missing_cifar_batches_are_an_error_unless_allowed(tmp_path):
    write_cifar(tmp_path, num_records=10_000)
    with pytest.raises(SandboxError, match=r"no file .*data_batch_2\.bin; download"):
        build(Cifar10, root=tmp_path)
    assert build(Cifar10, root=tmp_path, allow_partial=True).size("train") == 10_000
    (tmp_path / "data_batch_1.bin").rename(tmp_path / "data_batch_2.bin")
    with pytest.raises(SandboxError, match=r"no file .*data_batch_1\.bin"):
        build(Cifar10, root=tmp_path, allow_partial=True)


def test_a_foreign_file_of_cifar_size_is_an_error(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(bytes([200]) * 3073)
    with pytest.raises(SandboxError, match="a label 200"):
        build(Cifar10, root=tmp_path, allow_partial=True)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_images_are_framed_in_black_and_grey_in_all_channels(tmp_path, packed):
    written = write_idx(tmp_path, packed=packed)
    dataset = build(Idx, root=tmp_path)
    assert dataset.image_size == (32, 32) and dataset.num_classes == 5
    got = batch(dataset, "validation", [3, 1])
    assert got.labels.tolist() == [3, 1]
    levels = ((got.images + 1) * 127.5).round().to(torch.uint8)
    assert (levels == levels[:, :1]).all()
    inner = levels[:, 0, 2:-2, 2:-2].clone()
    assert np.array_equal(inner.numpy(), written["t10k"][[3, 1]])
    levels[:, :, 2:-2, 2:-2] = 0
    assert not levels.any()


@pytest.mark.parametrize("size", [(20, 14), (28, 28), (40, 56)])
def test_idx_images_are_resized_when_asked(tmp_path, size):
    write_idx(tmp_path)
    images = batch(build(Idx, root=tmp_path, image_size=size, fit="resize"), "train", [0]).images
    assert images.shape == (1, 3, *size) and images.min() >= -1 and images.max() <= 1


def test_an_idx_frame_smaller_than_the_images_is_an_error(tmp_path):
    write_idx(tmp_path)
    with pytest.raises(SandboxError, match="set fit: resize"):
        build(Idx, root=tmp_path, image_size=16)


def test_idx_class_names_can_be_given_and_must_suffice(tmp_path):
    write_idx(tmp_path)
    names = ("shirt", "shoe", "bag", "coat", "boot")
    assert build(Idx, root=tmp_path, class_names=names).class_names == names
    with pytest.raises(SandboxError, match="give 5"):
        build(Idx, root=tmp_path, class_names=names[:3])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train-images-idx3-ubyte", b"\x89PNG\r\n", "begins with 89504e47 in place of 00000803"),
        ("train-images-idx3-ubyte", b"", "begins with nothing"),
        (
            "t10k-labels-idx1-ubyte",
            bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]),
            "promises 9 values and holds 1",
        ),
        ("t10k-labels-idx1-ubyte", bytes([0, 0, 8, 1, 0, 0, 0, 1, 1]), "do not belong together"),
    ],
)
def test_a_foreign_or_cut_idx_file_is_an_error(tmp_path, name, content, expected):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SandboxError) as error:
        build(Idx, root=tmp_path)
    assert expected in one_line(error)


def test_a_cut_gzip_file_is_an_error(tmp_path):
    write_idx(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SandboxError, match="cannot be unpacked"):
        build(Idx, root=tmp_path)


def test_a_root_below_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_idx(tmp_path / "mnist")
    assert build(Idx, root=Path("~/mnist")).size("train") == 5


def movable(datasets):
    photos = build(ImageFolder, **{**datasets[1]._params.model_dump(), "in_memory": True})
    return [photos, *datasets[2:]]


def test_data_sets_in_memory_can_be_moved_and_stay_the_same(datasets):
    assert datasets[1].to(torch.device("cpu")) is datasets[1]  # it reads its files each time
    for dataset in movable(datasets):
        there = dataset.to(torch.device("cpu"))
        assert there is not dataset
        for split in SPLITS:
            assert there.size(split) == dataset.size(split)
            mine, its = (batch(each, split, [3, 1, 1], seed=5) for each in (dataset, there))
            assert torch.equal(mine.images, its.images) and torch.equal(mine.labels, its.labels)


def test_idx_images_that_must_be_resized_stay_where_they_are(tmp_path):
    write_idx(tmp_path)
    dataset = build(Idx, root=tmp_path, image_size=20, fit="resize")
    assert dataset.to(torch.device("meta")) is dataset


@pytest.mark.gpu
def test_batches_of_data_sets_on_a_gpu_are_the_same_bit_for_bit(datasets):
    for dataset in movable(datasets):
        there = dataset.to(torch.device("cuda"))
        indices = [i % dataset.size("train") for i in range(200)]
        for split in SPLITS:
            mine, its = (batch(each, split, indices, seed=5) for each in (dataset, there))
            assert its.images.is_cuda and its.labels.is_cuda
            assert torch.equal(mine.images, its.images.cpu())
            assert torch.equal(mine.labels, its.labels.cpu())
