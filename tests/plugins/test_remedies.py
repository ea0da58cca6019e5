"""What is said about a tokenizer whose symptoms are made up, and which remedy it names."""

import pytest

from sandbox_plugins.tasks.remedies import Symptoms, complaints

HEALTHY = {
    "name": "var-vq",
    "beta": 0.25,
    "phi": "partial",
    "estimator": "straight-through",
    "prefix_dropout": 0.0,
    "codebook": {
        "name": "vq",
        "init": "data",
        "restart": True,
        "restart_until": 0.9,
        "lookup": "euclidean",
    },
}


def symptoms(**more):
    row = {"tokens": 1, "used": 200, "perplexity": 100.0}
    rows = [{"scale": 1, **row}, {"scale": 2, **row, "tokens": 4}]
    fine = {
        "rows": rows, "vocab_size": 256, "num_images": 1024, "dead_codes": 0, "feature_std": 0.3,
        "history": {}, "progress": 1.0, "previous_progress": None,
    }  # fmt: skip
    return Symptoms(**(fine | more))


def said_of(settings=HEALTHY, **more):
    return dict(complaints(symptoms(**more), settings))


def with_codebook(**more):
    return {**HEALTHY, "codebook": {**HEALTHY["codebook"], **more}}


def scales(**columns):
    """Two rows; a column is one number or one for each."""
    values = {"tokens": 1, "used": 200, "perplexity": 100.0, **columns}
    pairs = {k: v if isinstance(v, list) else [v, v] for k, v in values.items()}
    return [{"scale": n + 1} | {k: v[n] for k, v in pairs.items()} for n in range(2)]


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (with_codebook(init="normal"), "start codes on data (codebook.init: data)"),
        (with_codebook(restart=False), "move dead codes onto data (codebook.restart: true)"),
        (HEALTHY, "(prefix_dropout: 0.1), or use fewer codes (codebook.vocab_size)"),
        ({**HEALTHY, "prefix_dropout": 0.2}, "; use fewer codes (codebook.vocab_size)"),
        ({}, "; use fewer codes (codebook.vocab_size)"),
    ],
)
def test_the_remedy_of_a_collapse_is_one_that_is_not_in_use(settings, remedy):
    rows = scales(perplexity=[2.1, 100.0], used=[4, 200])
    said = said_of(settings, rows=rows)
    assert set(said) == {"collapse"} and said["collapse"].endswith(remedy)


def test_few_codes_are_no_collapse_where_there_are_few_images_or_few_codes():
    low = scales(perplexity=[7.0, 7.0], used=[7, 7])
    assert said_of(rows=low, num_images=12) == {}
    assert said_of(rows=low, vocab_size=16) == {}
    assert "collapse" in said_of(rows=low)


def test_a_later_scale_with_hardly_any_codes_and_mostly_dead_codebooks_are_named():
    said = said_of(rows=scales(perplexity=[90.0, 3.0], used=[120, 15]))
    assert said["collapse"].startswith("scale 2 has collapsed: 15 of 256")
    said = said_of(dead_codes=129)
    assert said["collapse"].startswith("129 of 256 codes are used at no scale; ")
    assert said_of(dead_codes=128) == {}
    assert said_of(dead_codes=200, num_images=20) == {}  # 100 draws cannot tell


def test_a_scale_that_makes_things_worse_is_named():
    said = said_of(rows=scales(residual=[0.12, 0.15]))
    assert "scale 2 makes things worse" in said["residual"] and "0.120 to 0.150" in said["residual"]
    assert "phi: shared" in said["residual"]
    shared = said_of({**HEALTHY, "phi": "shared"}, rows=scales(residual=[0.12, 0.15]))
    assert "phi" not in shared["residual"] and "train longer" in shared["residual"]
    assert said_of(rows=scales(residual=[0.15, 0.12])) == {}


def test_errors_that_rise_three_times_in_a_row_are_named():
    rising, wavering, creeping = (
        [1.0, 1.1, 1.2, 1.3],
        [1.0, 1.1, 1.05, 1.3],
        [1, 1.001, 1.002, 1.003],
    )
    said = said_of(history={"l2": rising, "residual": rising})
    assert "from 1 to 1.3; lower learning_rate" in said["l2"]
    assert "codebook.lookup: cosine" in said["quantization"]
    turned = said_of(with_codebook(lookup="cosine"), history={"residual": rising})
    assert "cosine" not in turned["quantization"]
    for quiet in (wavering, creeping, rising[1:]):
        assert said_of(history={"l2": quiet, "residual": quiet}) == {}


def test_ids_that_change_late_in_the_training_are_named():
    rows = scales(ids_changed=[0.6, 0.8])
    said = said_of(rows=rows, previous_progress=0.9)["restless"]
    assert said.startswith("70 % of the ids") and "codebook.restart_until: 0.7, now 0.9" in said
    said = said_of(with_codebook(restart=False), rows=rows, previous_progress=0.9)["restless"]
    assert "learning_rate" in said
    assert said_of(rows=rows, previous_progress=0.5) == {}  # so long a time says nothing
    assert said_of(rows=rows, previous_progress=0.5, progress=0.6) == {}
    assert said_of(rows=scales(ids_changed=0.4), previous_progress=0.9) == {}


def test_vanishing_features_are_named():
    assert "lower beta (now 0.25)" in said_of(feature_std=0.001)["shrinking"]
    turned = said_of({**HEALTHY, "estimator": "rotation"}, feature_std=0.001)["shrinking"]
    assert "estimator: straight-through" in turned and "0.001" in turned
