"""The observers watch made-up runs; what they write is read as a person or a program would."""

import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pluggy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sandbox
from sandbox_plugins.observers import Console, JsonLines, Report, TensorBoard, write_report
from sandbox_plugins.observers.charts import draw, group
from sandbox_plugins.observers.console import describe
from sandbox_plugins.observers.findings import key_scores
from sandbox_plugins.observers.page import facts
from sandbox_plugins.observers.record import read_run
from sandbox_plugins.observers.wording import duration, folded, number

NASTY = "<script>alert('x')</script>&\""
CODEBOOK = [
    {"scale": 1, "tokens": 1, "used": 40, "usage": 0.31, "perplexity": 20.1},
    {"scale": 2, "tokens": 4, "used": 90, "usage": 0.7, "perplexity": 61.5},
]
TOKENIZER, EVALUATE = "1-train-tokenizer", "2-evaluate"


def write_png(path, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[::-1], 3), 128, np.uint8)).save(path)


def events(error=None):
    yield 0.0, "", "run_started", {}
    yield 1.0, TOKENIZER, "task_started", {"plan": {"parameters": "1.92 M", "note": NASTY}}
    for step in range(1, 11):
        scalars = {"loss": 1 / step, "loss/scale1": 2 / step, "loss/scale2": 3 / step, "rate": 0.1}
        content = {"done": step * 64, "total": 640, "scalars": scalars}
        yield 1.0 + step, TOKENIZER, "step", content
        if step % 5 == 0:
            content = {"done": step * 64, "total": 640, "scalars": {"validation/loss": 1.1 / step}}
            yield 1.0 + step, TOKENIZER, "step", content
    yield 12.0, TOKENIZER, "message", {"text": f"skipped {NASTY}.png"}
    yield 12.0, TOKENIZER, "picture", {"path": f"{TOKENIZER}/reconstructions.png"}
    if error is None:
        result = {"codebook": CODEBOOK, "classes": ["disc", NASTY], "deep": {"er": {"est": 7}}}
        yield 31.0, TOKENIZER, "task_ended", {"result": result, "skipped": False}
        yield 31.0, EVALUATE, "task_started", {"plan": {"images": "2,000"}}
        for name in ("samples", "coarse-to-fine"):
            yield 32.0, EVALUATE, "picture", {"path": f"{EVALUATE}/{name}.png"}
        result = {
            "scores": {"fid[classifier:shapes]": 12.34, "kid_std[classifier:shapes]": 0.5},
            "provenance": {"reference": "5d41402a", "sampler": {"top_k": 900}},
            "seconds_per_image": 0.0625,
            "seconds": 70.0,
        }
        yield 41.0, EVALUATE, "task_ended", {"result": result, "skipped": False}
    yield 42.0, "", "run_ended", {"error": error}


def make_run(folder, error=None):
    """A run folder as the core leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for time, task, event, content in events(error):
        lines.append(json.dumps({"time": 1.7e9 + time, "task": task, "event": event, **content}))
        if event == "picture":
            write_png(folder / content["path"])
        if event == "task_ended":
            (folder / task).mkdir(exist_ok=True)
            (folder / task / "result.json").write_text(json.dumps(content["result"]))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(f"seed: 0\ndataset: {json.dumps(NASTY)}\ntasks: [a, b]\n")
    (folder / "environment.json").write_text(json.dumps({"recipe": "toy", "torch": "2.10.0"}))
    return folder


def replay(observer, folder, error=None):
    """Call the observer's hooks as the core would."""
    manager = pluggy.PluginManager("sandbox")
    manager.register(observer)
    run, hook = SimpleNamespace(folder=folder), manager.hook
    names = {"step": "step_ended", "picture": "picture_saved"}
    for _, task, event, content in events(error):
        content = dict(content)
        if event == "picture":
            content["path"] = folder / content["path"]
        if event == "run_ended":
            content["error"] = sandbox.RunError(error) if error else None
        elif event != "run_started":
            content["task"] = task
        caller = getattr(hook, names.get(event, event), None)  # None: no such hook implemented
        if caller is not None:
            caller(run=run, **content)


class Reader(HTMLParser):
    """What a browser would load, and which elements the page has."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.tags, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(folder, *beside):
    return write_report(folder, beside).read_text()


def test_the_registry_offers_the_four_observers(registry):
    names = {entry.name for entry in registry if entry.interface is sandbox.Observer}
    assert {"console", "jsonl", "tensorboard", "report"} <= names


def test_report_shows_every_piece(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    for piece in [
        ">toy <", "finished", "12.34", "classifier:shapes", "lower is better", "5d41402a", "top_k",
        "900", "perplexity", "61.5", "31 %", "1.92 M", "62.5", "1 min 40 s", "torch", "2.10.0",
        "seed: 0", "samples (2-evaluate)", "coarse-to-fine (2-evaluate)", "deep", "est", "disc",
        "reconstructions (1-train-tokenizer)", ">validation</text>", ">scale 2</text>", ">rate<",
    ]:  # fmt: skip
        assert piece in page, piece
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Samples", "Coarse to fine", "Reconstructions", "Scores", "Codebook by scale", "Curves",
        "Time", "Results", "Messages", "Plan", "Environment", "Recipe",
    ]  # fmt: skip


def test_report_is_one_well_formed_page_that_loads_nothing(tmp_path):
    reader = Reader(page_of(make_run(tmp_path / "run"), make_run(tmp_path / "other")))
    assert reader.open == []
    assert "script" not in reader.tags and "link" not in reader.tags
    assert reader.tags.count("img") == 5 and reader.tags.count("svg") == 2
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in reader.loads)


def test_report_escapes_what_comes_from_users(tmp_path):
    folder = make_run(tmp_path / "run", error=f"RunError: {NASTY}")
    page = page_of(folder, Path(NASTY))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def test_report_says_that_and_why_a_run_failed(tmp_path):
    page = page_of(make_run(tmp_path / "run", error="RunError: loss is NaN"))
    assert ">failed</span>" in page and "RunError: loss is NaN" in page
    assert "1-train-tokenizer (100 %)" in page


def test_report_is_the_same_for_the_same_folder(tmp_path):
    folder = make_run(tmp_path / "run")
    assert page_of(folder) == page_of(folder)
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("tail", ['{"time": 1, "ta', "7\n", "\xff\n"])
def test_report_survives_a_half_written_log(tmp_path, tail):
    folder = make_run(tmp_path / "run")
    with (folder / "log.jsonl").open("a", encoding="latin-1") as log:
        log.write(tail)
    page = page_of(folder)
    assert "1 line(s) of log.jsonl could not be read" in page and "12.34" in page


def test_report_needs_no_log_and_no_whole_pictures(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "log.jsonl").unlink()
    samples = folder / EVALUATE / "samples.png"
    samples.write_bytes(samples.read_bytes()[:40])
    page = page_of(folder)
    assert "there is no log.jsonl" in page and "12.34" in page
    assert "samples.png cannot be shown" in page


def test_report_of_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_report_sets_other_runs_beside_this_one(tmp_path):
    folder, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    result = json.loads((other / EVALUATE / "result.json").read_text())
    result["scores"]["fid[classifier:shapes]"] = 45.67
    result["provenance"]["reference"] = "ffff"
    (other / EVALUATE / "result.json").write_text(json.dumps(result))
    page = page_of(folder, other, tmp_path / "nowhere")
    assert re.search(r'class="number best">12.34</td><td class="number">45.67<', page)
    assert "different conditions: reference." in page
    assert "nowhere: not compared" in page


def test_a_resumed_run_counts_all_its_time_and_keeps_one_value_a_step(tmp_path):
    def line(time, event, **content):
        return json.dumps({"time": time, "task": "1-train", "event": event, **content})

    def step(time, done, loss):
        return line(time, "step", done=done, total=9, scalars={"loss": loss})

    lines = [
        line(0, "run_started"), line(0, "task_started", plan={}), step(5, 1, 3.0), step(9, 2, 2.0),
        line(100, "run_started"), line(100, "task_started", plan={}), step(104, 2, 1.0),
        step(105, 3, float("nan")),
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert run.seconds == 9 + 5 and run.going
    assert run.task("1-train").curves == {"loss": {1: 3.0, 2: 1.0}}
    assert "not finished" in page_of(tmp_path)


def test_key_scores_name_those_of_the_last_task_first(tmp_path):
    assert next(iter(key_scores(read_run(make_run(tmp_path))))) == "fid[classifier:shapes]"


def test_curves_with_one_first_word_share_a_chart():
    points = {1: 1.0, 2: 2.0}
    names = ["loss", "loss/scale1", "validation/loss", "val_loss", "train/accuracy", "lr"]
    charts = group({name: points for name in names} | {"lonely": {1: 1.0}})
    assert {title: len(lines) for title, lines in charts.items()} == {
        "loss": 4,
        "accuracy": 1,
        "lr": 1,
    }
    assert [line.validation for line in charts["loss"]] == [False, False, True, True]


def test_a_chart_is_dashed_for_validation_only_beside_training():
    points = {1: 1.0, 2: 2.0}
    names = ["validation/perplexity/scale1", "validation/perplexity/scale2", "loss", "val/loss"]
    charts = group(dict.fromkeys(names, points))
    assert "stroke-dasharray" not in draw("perplexity", charts["perplexity"])
    assert "stroke-dasharray" in draw("loss", charts["loss"])


def test_scores_by_scale_are_one_line_each():
    scores = {"l2": 0.1, "used/scale1": 3, "used/scale2": 5, "kept/scale1": 1, "odd/scale2": 2}
    assert folded(scores) == {
        "l2": 0.1, "used by scale": [3, 5], "kept/scale1": 1, "odd/scale2": 2,
    }  # fmt: skip
    assert "    used by scale  3  5" in describe({"validation": scores})
    assert describe({"notes": []}) == ["  notes  []"]
    page = facts({"validation": scores})
    assert "<th>used by scale</th><td>3, 5</td>" in page


def test_a_wide_table_has_its_headings_on_several_lines():
    rows = [{"scale": 1, "psnr_upto": 17.25, "kmeans_shared_perplexity": 50.5}]
    assert [line.split() for line in describe({"codebook": rows})] == [
        ["codebook"],
        ["kmeans"],
        ["psnr", "shared"],
        ["scale", "upto", "perplexity"],
        ["1", "17.25", "50.5"],
    ]


def test_the_codebook_table_explains_its_columns_and_draws_shares(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [row | {"residual": 0.25, "of_kmeans": 0.5, "psnr_upto": 20.5} for row in CODEBOOK]
    (folder / TOKENIZER / "result.json").write_text(json.dumps({"codebook": rows}))
    page = page_of(folder)
    assert page.count('style="width:25.0%"') == 2 and page.count('style="width:50.0%"') == 2
    assert "residual: share of the features" in page and "psnr_<wbr>upto" in page
    assert "ids_changed: " not in page and Reader(page).open == []


@settings(max_examples=12)  # a chart takes a tenth of a second
@given(st.lists(st.text(min_size=1), min_size=1, max_size=2, unique=True), st.integers(2, 700))
def test_any_scalar_name_can_be_drawn(names, num_points):
    points = {64 * i: 1.0 / (1 + i) for i in range(num_points)}
    for title, lines in group(dict.fromkeys(names, points)).items():
        svg = draw(title, lines)
        assert svg.startswith("<svg") and svg.endswith("</svg>")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


_KEYS = ["scores", "provenance", "codebook", "seconds", "seconds_per_image", "psnr", "other"]


@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=4))
def test_any_result_can_be_shown(result):
    with TemporaryDirectory() as name:
        (Path(name) / "1-task").mkdir()
        (Path(name) / "1-task" / "result.json").write_text(json.dumps(result))
        page = page_of(Path(name))
    assert Reader(page).open == []
    assert all(html.escape(word) in page for word in _words(result))


def _words(value):
    if isinstance(value, dict):
        return [word for inner in value.values() for word in _words(inner)]
    if isinstance(value, list):
        return [word for inner in value for word in _words(inner)]
    return [value.replace("\r\n", "\n").replace("\r", "\n")] if isinstance(value, str) else []


def test_numbers_and_times_are_short():
    assert [number(v) for v in (3, 310280000, 0.1234567, 123456.7, True, None)] == [
        "3", "310,280,000", "0.1235", "123,457", "yes", "-",
    ]  # fmt: skip
    assert [duration(s) for s in (0.44, 42, 59.8, 200, 7500)] == [
        "0.4 s", "42 s", "1 min 00 s", "3 min 20 s", "2 h 05 min",
    ]  # fmt: skip


def test_report_observer_writes_after_a_task_and_at_the_end(tmp_path):
    folder = make_run(tmp_path / "run")
    observer = Report(Report.Params(beside=(tmp_path / "nowhere",)))
    observer.task_ended(SimpleNamespace(folder=folder), TOKENIZER, {}, skipped=False)
    assert (folder / "report.html").exists()
    (folder / "report.html").unlink()
    replay(observer, folder, error="loss is NaN")
    assert "nowhere: not compared" in (folder / "report.html").read_text()
    assert observer.write(folder) == folder / "report.html"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves one second a look."""
    seconds = iter(range(100_000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))


def watch(folder, stream, every_sec=10.0, error=None):
    console = Console(Console.Params(every_sec=every_sec))
    console.stream = stream
    replay(console, folder, error)
    return stream.getvalue()


def test_console_prints_plan_progress_results_and_end_without_a_terminal(tmp_path, clock):
    folder = make_run(tmp_path / "run")
    text = watch(folder, io.StringIO(), every_sec=3)
    assert "1-train-tokenizer  (task 1 of 2)\n  parameters  1.92 M\n  note        <script>" in text
    assert re.search(r"1-train-tokenizer   \d\d %  \d+ of 640  about [\d.]+ s left  .*loss ", text)
    assert f"picture: {folder / EVALUATE / 'samples.png'}" in text
    assert "scale  tokens  used  usage  perplexity\n" in text
    assert re.search(r"fid\[classifier:shapes\] +12\.34\n", text)
    assert "deep\n    er\n      est  7\n" in text and '["disc", ' in text
    assert text.splitlines()[-1].startswith("ok: finished in ")
    assert "\r" not in text


def test_console_writes_few_lines_where_little_time_passes(tmp_path):
    text = watch(make_run(tmp_path / "run"), io.StringIO())
    assert " left" not in text and "1-train-tokenizer: done in 0.0 s" in text


def test_console_draws_a_bar_on_a_terminal(tmp_path):
    text = watch(make_run(tmp_path / "run"), Terminal())
    assert "train-tokenizer:" in text and "640/640" in text and "images/s" in text
    assert "loss 0.1" in text


def test_console_says_that_and_why_a_run_failed(tmp_path):
    text = watch(make_run(tmp_path / "run"), io.StringIO(), error="loss is NaN\nat 640")
    assert re.fullmatch(r"failed after [\d.]+ s: loss is NaN", text.splitlines()[-1])


def test_console_says_that_a_task_was_skipped(tmp_path):
    console = Console(Console.Params())
    console.stream = io.StringIO()
    console.task_ended(SimpleNamespace(folder=tmp_path), TOKENIZER, {"a": 1}, skipped=True)
    assert console.stream.getvalue() == "1-train-tokenizer: kept from an earlier run\n"


def test_jsonl_writes_one_strict_line_an_event(tmp_path):
    path = tmp_path / "events.jsonl"
    observer = JsonLines(JsonLines.Params(path=str(path)))
    replay(observer, tmp_path)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == [event for _, _, event, _ in events()]
    assert lines[2] | {"time": 0} == {
        "time": 0, "event": "step", "task": TOKENIZER, "done": 64, "total": 640,
        "scalars": {"loss": 1.0, "loss/scale1": 2.0, "loss/scale2": 3.0, "rate": 0.1},
    }  # fmt: skip


def test_jsonl_goes_to_the_standard_output_and_turns_nan_into_null(tmp_path, capsys):
    observer = JsonLines(JsonLines.Params())
    run = SimpleNamespace(folder=tmp_path)
    observer.run_started(run)
    observer.step_ended(run, TOKENIZER, 1, 2, {"loss": float("nan")})
    observer.run_ended(run, sandbox.RunError("loss is NaN"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[1]["scalars"] == {"loss": None} and lines[2]["error"] == "loss is NaN"


def test_jsonl_says_when_its_file_cannot_be_written(tmp_path):
    observer = JsonLines(JsonLines.Params(path=str(tmp_path / "missing" / "events.jsonl")))
    with pytest.raises(sandbox.SandboxError, match=r"cannot write .*events.jsonl"):
        observer.run_started(SimpleNamespace(folder=tmp_path))


def test_tensorboard_files_can_be_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = make_run(tmp_path / "run")
    replay(TensorBoard(TensorBoard.Params()), folder)
    task = EventAccumulator(str(folder / "tensorboard" / TOKENIZER)).Reload()
    assert [event.step for event in task.Scalars("loss")] == [64 * i for i in range(1, 11)]
    assert task.Scalars("loss")[-1].value == pytest.approx(0.1)
    assert task.Images("reconstructions")[0].width == 12
    recipe = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert b"seed: 0" in recipe.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_draws_a_resumed_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = SimpleNamespace(folder=tmp_path)
    for steps in (range(1, 6), range(4, 8)):  # stopped after 5, resumed from 3
        observer = TensorBoard(TensorBoard.Params())
        observer.run_started(run)
        for done in steps:
            observer.step_ended(run, TOKENIZER, done, 9, {"loss": 1.0})
        observer.run_ended(run, None)
    task = EventAccumulator(str(tmp_path / "tensorboard" / TOKENIZER)).Reload()
    assert [event.step for event in task.Scalars("loss")] == list(range(1, 8))
