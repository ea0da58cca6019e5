"""`sandbox bench`: what it keeps, what it leaves out with a reason, and what it refuses."""

import json
import warnings

import pytest
import torch
import yaml
from PIL import Image

import sandbox
from sandbox import NotRecorded, rendering
from sandbox.scaffold import write_plugin
from sandbox.testing import sandbox_project
from sandbox_plugins.autoregressive import Autoregressive
from sandbox_plugins.tasks.bench import ceilings, counting, task
from sandbox_plugins.var import pieces

pytestmark = pytest.mark.usefixtures("one_thread", "small_ceilings")

TOKENIZER = """\
tokenizer:
  name: var-vq
  autoencoder: {name: patch, patch: 4, ch: 8, code_dim: 4}
  codebook: {name: vq, vocab_size: 8}
  schedule: {name: sides, sides: [1, 2]}
"""
GENERATOR = """\
generator: {name: autoregressive, backbone: {name: var, depth: 1, width: 16, num_heads: 2}}
"""
TINY = f"device: cpu\nnum_classes: 2\n{TOKENIZER}{GENERATOR}tasks: [{{name: sample}}]\n"
SHAPES = "dataset: {name: shapes, image_size: 8, num_classes: 3}\n"
FAST = ("--repeats", "2", "--batch-sizes", "1,3")
PARTS = ("generation", "encoding", "decoding", "training")


@pytest.fixture(scope="module")
def small_ceilings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings._SIDE, "cpu", 64)
        patch.setitem(ceilings._COPIED_BYTES, "cpu", 2**16)
        yield


@pytest.fixture
def project(tmp_path):
    return sandbox_project(tmp_path, {"tiny.yaml": TINY})


@pytest.fixture(scope="module")
def measured(tmp_path_factory, one_thread, small_ceilings):
    """A folder in which the tiny recipe was measured with all there is."""
    folder = tmp_path_factory.mktemp("measured")
    project = sandbox_project(folder, {"tiny.yaml": TINY})
    words = ("--precision", "float32,bfloat16", "--profile", "--out", "out")
    done = project.sandbox("bench", "tiny.yaml", *FAST, *words)
    assert done.status == 0, done.err
    (folder / "out/stdout.txt").write_text(done.out)
    return folder / "out"


def bench(project, *words, recipe="tiny.yaml"):
    """What `bench.json` says after a measurement in the default folder."""
    done = project.sandbox("bench", recipe, *FAST, *words)
    assert done.status == 0, done.err
    return json.loads((project.folder / f"runs/bench-{recipe[:-5]}/bench.json").read_text())


def one_line(outcome):
    """The one line on stderr of what is the user's mistake."""
    assert outcome.status == 2, outcome
    (line,) = outcome.err.splitlines()
    return line.removeprefix("sandbox: ")


def test_every_number_is_kept_with_the_environment_and_how_it_was_counted(measured):
    found = json.loads((measured / "bench.json").read_text())
    assert {"torch", "command", "device", "git"} <= set(found["environment"])
    assert found["complete"] and found["date"] and found["how_counted"] and found["device"] == "CPU"
    assert found["settings"]["batch_sizes"] == [1, 3]
    for part in PARTS:
        where = [(row["precision"], row["batch_size"]) for row in found[part]]
        assert where == [(p, b) for p in ("float32", "bfloat16") for b in (1, 3)]
        for row in found[part]:
            assert row["status"] == "ok" and len(row["seconds"]) == 2
            assert row["q1_seconds"] <= row["median_seconds"] <= row["q3_seconds"]
            product = row["images_per_second"] * row["ms_per_image"]
            assert product == pytest.approx(1000)
            assert row["peak_bytes"] is None or row["peak_bytes"] > 0
    for row in found["generation"]:
        assert row["share_of_matmul"] > 0 and row["share_of_copy"] > 0
    assert all(row["flops_per_second"] > 0 for row in found["ceilings"]["matmul"])
    assert found["ceilings"]["copy"]["bytes_per_second"] > 0
    assert not set(found["left_out"]) - {"peak memory"}


def test_flops_and_cache_bytes_grow_with_the_batch_and_weights_do_not(measured):
    one, three = json.loads((measured / "bench.json").read_text())["generation"][:2]
    assert three["flops"] == 3 * one["flops"] > 0
    assert one["bytes"] < three["bytes"] < 3 * one["bytes"]


def test_the_parts_add_up_to_the_whole(measured):
    found = json.loads((measured / "bench.json").read_text())
    for row in found["generation"]:
        assert len(row["splits"]) == 2
        for split in row["splits"]:
            whole = split.pop("whole")
            assert set(split) == {
                *("transformer", "sampling", "decoder", "painting", "context", "rest")
            }
            assert min(split.values()) >= 0 and split["transformer"] > 0
            assert sum(split.values()) == pytest.approx(whole)
    for row in found["training"]:
        for split, seconds in zip(row["splits"], row["seconds"], strict=True):
            assert set(split) == {"forward", "backward", "optimizer"}
            assert 0 < sum(split.values()) <= seconds


def test_the_console_shows_the_tables_and_the_folder_the_curves(measured):
    out = (measured / "stdout.txt").read_text()
    for word in ("matmul float32", "copy", *PARTS, "split_%", "sampling", "bfloat16", "bench.png"):
        assert word in out
    with Image.open(measured / "bench.png") as picture:
        assert picture.width > 300


def test_the_profile_is_a_chrome_trace(measured):
    events = json.loads((measured / "trace.json").read_text())["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)


def test_the_profile_tells_what_ran_in_every_row(measured):
    found = json.loads((measured / "bench.json").read_text())
    for row in (row for part in PARTS for row in found[part]):
        seconds = [kernel["seconds"] for kernel in row["kernels"]]
        assert seconds == sorted(seconds, reverse=True) and min(seconds) > 0
        assert sum(seconds) <= row["kernels_seconds"] * 1.001
        assert row["kernels_launched"] >= sum(kernel["calls"] for kernel in row["kernels"])
        assert row["kernels_gaps_seconds"] > 0
        assert any(
            "addmm" in kernel["name"] or "conv" in kernel["name"] for kernel in row["kernels"]
        )


def test_only_the_parts_asked_for_are_measured(project):
    found = bench(project, "--parts", "decoding,training")
    assert found["decoding"] and found["training"]
    assert not found["generation"] and not found["encoding"]
    assert found["left_out"] == dict.fromkeys(("generation", "encoding"), "not asked for")


def test_the_default_on_a_cpu_is_float32_without_a_trace(project):
    found = bench(project)
    assert {row["precision"] for row in found["generation"]} == {"float32"}
    assert not (project.folder / "runs/bench-tiny/trace.json").exists()


def test_plain_and_fast_generation_stand_side_by_side_with_their_ratio(project, monkeypatch):
    plain = pieces.Pieces(pieces.prepare, pieces.enter, pieces.between, pieces.leave)
    monkeypatch.setattr(pieces, "compiled", lambda *, dynamic: plain)
    monkeypatch.setattr(rendering, "fused_images", lambda: rendering._images)
    done = project.sandbox("bench", "tiny.yaml", *FAST, "--fast", "off,on", "--profile")
    assert done.status == 0, done.err
    assert "generation float32 x 3 (fast: on):" in done.out
    found = json.loads((project.folder / "runs/bench-tiny/bench.json").read_text())
    plain, fast = found["generation"][:2]
    assert [row["fast"] for row in found["generation"]] == ["off", "on"] * 2
    assert fast["times_as_fast"] == plain["median_seconds"] / fast["median_seconds"]
    assert min(plain["first_seconds"], fast["first_seconds"]) > 0
    assert len(plain["splits"]) == len(fast["splits"]) == 2 and "times_as_fast" not in plain
    assert all("fast" not in row for row in found["decoding"] + found["training"])


def test_what_cannot_be_recorded_is_a_refused_row_and_no_slow_one(project, monkeypatch):
    whole = Autoregressive.generate

    def generate(self, labels, rng, watch=None):
        if self.fast == "on":
            warnings.warn("not recorded: it waits", NotRecorded, stacklevel=2)
        return whole(self, labels, rng, watch)

    monkeypatch.setattr(Autoregressive, "generate", generate)
    found = bench(project, "--fast", "off,on", "--batch-sizes", "1")
    assert [row["status"] for row in found["generation"]] == ["ok", "refused"]
    assert found["generation"][1]["reason"] == "NotRecorded: not recorded: it waits"


def test_measuring_again_takes_the_place_of_what_was_there(project):
    first, again = bench(project), bench(project, "--batch-sizes", "2")
    assert [row["batch_size"] for row in first["decoding"]] == [1, 3]
    assert [row["batch_size"] for row in again["decoding"]] == [2]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_batch_that_does_not_fit_is_a_row_that_says_so(project, monkeypatch, error):
    whole = Autoregressive.generate

    def generate(self, labels, rng, watch=None):
        if len(labels) > 2:
            raise error
        return whole(self, labels, rng, watch)

    monkeypatch.setattr(Autoregressive, "generate", generate)
    done = project.sandbox("bench", "tiny.yaml", *FAST)
    assert done.status == 0 and "generation float32 x 3: out of memory" in done.out
    found = json.loads((project.folder / "runs/bench-tiny/bench.json").read_text())
    fits, fails = found["generation"]
    assert fits["status"] == "ok" and len(found["training"]) == 2
    where = {"precision": "float32", "batch_size": 3, "fast": "off"}
    assert fails.items() >= {**where, "status": "out of memory"}.items()


def test_a_precision_that_a_part_refuses_is_a_row_with_the_reason(project, monkeypatch):
    whole = Autoregressive.generate

    def generate(self, labels, rng, watch=None):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel for Half")
        return whole(self, labels, rng, watch)

    monkeypatch.setattr(Autoregressive, "generate", generate)
    found = bench(project, "--precision", "float32,float16")
    assert [row["status"] for row in found["generation"]] == ["ok"] * 2 + ["refused"] * 2
    assert found["generation"][2]["reason"] == "RuntimeError: no kernel for Half"
    assert [row["precision"] for row in found["training"]] == ["float32"] * 2
    assert "scaled losses" in found["left_out"]["training: float16"]


def test_what_cannot_be_counted_or_profiled_is_measured_all_the_same(project, monkeypatch):
    def refuse(*words, **named):
        raise RuntimeError("not here")

    monkeypatch.setattr(counting, "FlopCounterMode", refuse)
    monkeypatch.setattr(torch.profiler, "profile", refuse)
    found = bench(project, "--profile")
    for part in PARTS:
        assert [row["status"] for row in found[part]] == ["ok", "ok"]
        assert "share_of_matmul" not in found[part][0]
    for name in ("profile", "generation: FLOPs in float32"):
        assert found["left_out"][name] == "RuntimeError: not here"


def test_the_first_call_finds_nothing_warm_and_what_was_chosen_is_kept(project, monkeypatch):
    order, generate, count = [], Autoregressive.generate, task.work_of

    def draw(self, *words, **named):
        order.append("draw")
        sandbox.chose("kernel", "these shapes", "one of them", "fastest")
        return generate(self, *words, **named)

    monkeypatch.setattr(Autoregressive, "generate", draw)
    monkeypatch.setattr(task, "work_of", lambda *words: order.append("count") or count(*words))
    found = bench(project)
    assert order[0] == "draw" and order.count("count") == 1 and found["generation"][0]["flops"] > 0
    assert found["environment"]["choices"] == {"kernel": {"these shapes": "one of them"}}


def test_nothing_is_profiled_before_every_row_has_its_seconds(project, monkeypatch):
    kept = []

    def look(*words, **named):
        kept.append(json.loads((project.folder / "runs/bench-tiny/bench.json").read_text()))
        raise RuntimeError("not here")

    monkeypatch.setattr(torch.profiler, "profile", look)
    found = bench(project, "--profile")
    assert len(kept) == sum(len(found[part]) for part in PARTS) + 1  # the trace is the last
    assert all(len(kept[0][part]) == len(found[part]) == 2 for part in PARTS)
    assert {row["kernels"] for part in PARTS for row in found[part]} == {"RuntimeError: not here"}


def test_an_error_in_float32_stops_the_measurement(project, monkeypatch):
    def generate(self, labels, rng, watch=None):
        raise RuntimeError("a mistake in a part")

    monkeypatch.setattr(Autoregressive, "generate", generate)
    done = project.sandbox("bench", "tiny.yaml", *FAST)
    assert done.status == 1 and "a mistake in a part" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-sizes", "0"), "--batch-sizes 0: expected sizes from 1 up, as in 1,8,64"),
        (("--batch-sizes", "1,-2"), "--batch-sizes 1,-2: expected sizes from 1 up"),
        (("--batch-sizes", "1,many"), "--batch-sizes 1,many: Input should be a valid integer"),
        (("--batch-sizes", ""), "--batch-sizes : Input should be a valid integer"),
        (("--precision", "float8"), "--precision float8: Input should be 'auto', 'float32'"),
        (("--fast", "faster"), "--fast faster: Input should be 'auto', 'on' or 'off'"),
        (("--repeats", "0"), "--repeats 0: Input should be greater than or equal to 1"),
        (("--set", "tokenizer=null", "--set", "generator=null"), "neither a generator nor a"),
        (("--set", "tokenizer=null"), "needs a dataset"),
        (("--set", "generator=nonsense"), "no Generator is named 'nonsense'"),
        (("--preview",), "declares no preview"),
    ],
)
def test_a_mistake_is_one_line(project, words, said):
    assert said in one_line(project.sandbox("bench", "tiny.yaml", *words))


def test_a_folder_that_holds_anything_else_is_left_alone(project):
    for name in ("notes.txt", "bench.json"):
        folder = project.folder / f"of {name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        done = project.sandbox("bench", "tiny.yaml", "--out", str(folder))
        assert "something other than a measurement" in one_line(done)
        assert (folder / name).read_text() == "mine"
    assert project.sandbox("run", "tiny.yaml", "--set", "tasks.0.untrained=true").status == 0
    done = project.sandbox("bench", "tiny.yaml", "--out", "runs/tiny")
    assert "something other than a measurement" in one_line(done)
    assert (project.folder / "runs/tiny/samples.npy").exists()


def test_no_data_set_is_needed(project):
    classes = "num_classes: 2\n"
    missing = "dataset: {name: image-folder, root: nowhere, image_size: 8}\n"
    for dataset, known in ((missing, 1000), (missing + classes, 2), (SHAPES, 3), ("", 1000)):
        (project.folder / "tiny.yaml").write_text(TINY.replace(classes, dataset))
        found = bench(project, "--batch-sizes", "1")
        assert found["num_classes"] == known
        kept = yaml.safe_load((project.folder / "runs/bench-tiny/recipe.yaml").read_text())
        assert kept["dataset"] is None


def test_a_tokenizer_alone_is_measured(project):
    words = ("--set", "generator=null", "--set", "num_classes=null", "--profile")
    found = bench(project, *words)
    assert not found["generation"] and not found["training"]
    assert len(found["encoding"]) == len(found["decoding"]) == 2
    reason = "the recipe names no generator"
    assert found["left_out"] == {**found["left_out"], "training": reason, "profile": reason}


def test_a_strangers_generator_of_pixels_is_measured(tmp_path):
    write_plugin(tmp_path / "mine", "benched_pixels", "generator")
    recipe = f"device: cpu\n{SHAPES}generator: benched-pixels\n"
    project = sandbox_project(tmp_path, {"pixels.yaml": recipe})
    found = bench(project, "--plugins", "mine", recipe="pixels.yaml")
    assert [row["status"] for row in found["generation"] + found["training"]] == ["ok"] * 4
    assert set(found["generation"][0]["splits"][0]) == {"whole", "network", "rest"}
    assert (
        found["left_out"].items()
        >= {
            "encoding": "the recipe names no tokenizer",
            "generation: sampling": "the generator has no sampler",
        }.items()
    )
    assert "bytes" not in found["generation"][0]
