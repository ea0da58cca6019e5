"""Recipes: every mistake is named at the line, or the word of the command line, that made it."""

import re
from pathlib import Path

import pytest
import yaml

from sandbox.errors import SandboxError
from sandbox.recipe import deciding, has_preview, load_recipe, to_yaml

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

GOOD = """\
seed: 1
dataset: {name: shapes, image_size: 16}
tokenizer:
  name: var-vq
  autoencoder: {name: patch, patch: 4, ch: 8, code_dim: 4}
  codebook: {name: vq, vocab_size: 16}
  schedule: {name: sides, sides: [1, 2, 4]}
generator:
  name: autoregressive
  backbone:
    name: var
    depth: 2
    width: 16
  sampler: greedy
tasks:
  - {name: train-generator, num_images: 64, learning_rate: 1e-4}
  - name: sample
    num_images: 10
"""


@pytest.fixture
def load(tmp_path, registry):
    """Write a recipe and load it; the path in a message is cut to its name."""

    def loaded(text, *overrides, preview=False):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        try:
            return load_recipe(path, overrides, registry, preview=preview)
        except SandboxError as error:
            raise SandboxError(str(error).replace(str(path), "recipe.yaml")) from None

    return loaded


@pytest.fixture
def complaint(load):
    """What a recipe that must not pass is told."""

    def told(text, *overrides, preview=False):
        with pytest.raises(SandboxError) as caught:
            load(text, *overrides, preview=preview)
        return str(caught.value)

    return told


def changed(before, after):
    assert before in GOOD
    return GOOD.replace(before, after)


def test_a_good_recipe_gives_checked_values(load):
    recipe = load(GOOD)
    assert recipe.seed == 1 and recipe.generator.params.backbone.params.depth == 2
    assert [part.name for part in recipe.tasks] == ["train-generator", "sample"]
    assert recipe.generator.params.sampler.name == "greedy"


def test_an_exponent_without_a_point_is_a_number(load):
    """YAML 1.1 reads `1e-4` as text."""
    assert load(GOOD).tasks[0].params.learning_rate == 1e-4
    assert load(GOOD, "tasks.0.learning_rate=3e-5").tasks[0].params.learning_rate == 3e-5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (changed("greedy", "greddy"), "14: generator.sampler: no "
         "Sampler is named 'greddy' (did you mean 'greedy'?)"),
        (changed("name: shapes", "name: shape"), "2: dataset: no Dataset is named 'shape' (did "
         "you mean 'shapes'?)"),
        (changed("name: sample", "name: smaple"), "17: tasks.1: no Task is named 'smaple' (did "
         "you mean 'sample'?)"),
        (changed("tasks:", "task:"), "15: task: unknown key (did you mean 'tasks'?)"),
        (changed("depth: 2", "dept: 2"), "12: generator.backbone.dept: unknown key (did you mean "
         "'depth'?)"),
        (changed("vocab_size", "vocabsize"), "6: tokenizer.codebook.vocabsize: unknown key (did "
         "you mean 'vocab_size'?)"),
        (changed("depth: 2", "depth: deep"), "12: generator.backbone.depth: Input should be a "
         "valid integer"),
        (changed("depth: 2", "depth: 0"), "12: generator.backbone.depth: Input should be greater "
         "than 0"),
        (changed("seed: 1", "seed: -1"), "1: seed: Input should be greater than or equal to 0"),
        (changed("sampler: greedy", "sampler: [greedy]"), "14: generator.sampler: expected a "
         "name or a mapping with a 'name'"),
        (changed("sampler: greedy", "sampler: {top_k: 3}"), "14: generator.sampler: expected a "
         "name or a mapping with a 'name'"),
        (changed("num_images: 64, ", ""), "16: tasks.0.num_images: is missing; add it"),
        (changed("sides: [1, 2, 4]", "sides: [1, 4, 2]"), "7: tokenizer.schedule"),
        (changed("learning_rate: 1e-4", "learning_rate: .nan"), "16: tasks.0.learning_rate: "),
        (changed("sampler: greedy", "zzz: 1"), "14: generator.zzz: unknown key (known: backbone, "
         "sampler, objective, token_noise, self_correction, fast)"),
        ("1: x\n", "1: 1: "),
        ("seed: 0\n? [a, b]\n: 1\n", "2: "),
    ],
)  # fmt: skip
def test_a_mistake_is_named_at_its_line(complaint, text, says):
    told = complaint(text)
    assert told.startswith(f"recipe.yaml:{says}"), told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 0\ntasks: []\nseed: 1\n", "3: seed: stands twice, first at line 1"),
        (
            "dataset:\n  name: shapes\n  seed: 1\n  seed: 2\n",
            "4: dataset.seed: stands twice, first at line 3",
        ),
        (
            "tasks:\n  - name: sample\n    npz: true\n    npz: true\n",
            "4: tasks.0.npz: stands twice, first at line 3",
        ),
    ],
)
def test_a_key_may_stand_once(complaint, text, says):
    assert complaint(text).startswith(f"recipe.yaml:{says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "recipe.yaml: the file is empty"),
        ("# only a comment\n", "recipe.yaml: the file is empty"),
        ("- a\n- b\n", "recipe.yaml:1: expected keys and their values"),
        ("just text\n", "recipe.yaml:1: expected keys and their values"),
        ("seed: [1\ntasks: x\n", "recipe.yaml:2: not valid YAML"),
        ("seed: 0\n\tdepth: 1\n", "recipe.yaml:2: not valid YAML"),
        ("seed: 0\nx: !!python/object/apply:os.getcwd []\n", "recipe.yaml:2: not valid YAML"),
        ("seed: 0\nx: *nowhere\n", "recipe.yaml:2: not valid YAML"),
        ("seed: 0\n---\nseed: 1\n", "recipe.yaml:2: not valid YAML"),
        ("seed: \x07\n", "recipe.yaml:1: not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(complaint, text, says):
    told = complaint(text)
    assert told.startswith(says) and "\n" not in told


def test_a_missing_file_a_folder_and_another_encoding_are_refused(tmp_path, registry):
    with pytest.raises(SandboxError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml", [], registry)
    with pytest.raises(SandboxError, match="cannot be read"):
        load_recipe(tmp_path, [], registry)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff\xfe\n")
    with pytest.raises(SandboxError, match="cannot be read"):
        load_recipe(tmp_path / "latin.yaml", [], registry)


def test_all_mistakes_are_told_at_once(complaint):
    text = changed("depth: 2", "dept: 2").replace("greedy", "greddy").replace("seed: 1", "seed: x")
    told = complaint(text, "tasks.1.num_images=0").splitlines()
    assert [re.split(": ", line)[1] for line in told] == [
        "seed",
        "generator.backbone.dept",
        "generator.sampler",
        "tasks.1.num_images",
    ]


def test_set_takes_the_place_of_the_recipes_value(load):
    recipe = load(GOOD, "generator.backbone.depth=3", "seed=7", "generator.backbone.depth=5")
    assert (recipe.generator.params.backbone.params.depth, recipe.seed) == (5, 7)


def test_set_reaches_the_elements_of_lists(load):
    recipe = load(GOOD, "tasks.1.num_images=20", "tokenizer.schedule.sides.2=3")
    assert recipe.tasks[1].params.num_images == 20
    assert recipe.tokenizer.params.schedule.params.sides == (1, 2, 3)


def test_set_takes_lists_and_mappings(load):
    recipe = load(GOOD, "tasks.1.labels=[1, 2]", "generator.sampler={name: top-k-top-p, top_k: 3}")
    assert recipe.tasks[1].params.labels == (1, 2)
    assert recipe.generator.params.sampler.params.top_k == 3


def test_set_reaches_into_a_part_given_by_its_bare_name(load):
    text = changed("sampler: greedy", "sampler: top-k-top-p")
    sampler = load(text, "generator.sampler.top_k=5").generator.params.sampler
    assert (sampler.name, sampler.params.top_k) == ("top-k-top-p", 5)


def test_set_makes_the_mappings_that_a_recipe_leaves_out(load):
    recipe = load(GOOD, "weights.generator=var.pth", "weights.tokenizer=vae.pth")
    assert (recipe.weights.generator, recipe.weights.tokenizer) == ("var.pth", "vae.pth")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "--set seed: expected key=value"),
        ("=1", "--set =1: expected key=value"),
        ("seed=[1", "--set seed=[1: the value is not valid YAML"),
        ("seed=x", "--set seed=x: seed: Input should be a valid integer"),
        ("sed=1", "--set sed=1: sed: unknown key (did you mean 'seed'?)"),
        ("generater.depth=1", "--set generater.depth=1: generater: unknown key (did you mean "
         "'generator'?)"),
        ("generator.backbone.depth=-1", "--set generator.backbone.depth=-1: "
         "generator.backbone.depth: Input should be greater than 0"),
        ("generator.backbone={name: var, dept: 1}", "--set generator.backbone={name: var, dept: "
         "1}: generator.backbone.dept: unknown key (did you mean 'depth'?)"),
        ("tasks.7.num_images=1", "--set tasks.7.num_images=1: the recipe has no 'tasks.7'"),
        ("tasks.2=sample", "--set tasks.2=sample: the recipe has no 'tasks.2'"),
        ("tasks.x.num_images=1", "--set tasks.x.num_images=1: the recipe has no 'tasks.x'"),
        ("seed.deep=1", "--set seed.deep=1: the recipe has no 'seed'"),
        ("generator.sampler.top_k=5", "--set generator.sampler.top_k=5: generator.sampler.top_k: "
         "unknown key"),
    ],
)  # fmt: skip
def test_the_command_line_is_blamed_for_its_own_mistakes(complaint, override, says):
    told = complaint(GOOD, override)
    assert told.startswith(says), told
    assert "\n" not in told


def test_a_later_set_does_not_take_the_blame_of_an_earlier_line(complaint):
    told = complaint(changed("depth: 2", "depth: 0"), "generator.backbone.width=32")
    assert told.startswith("recipe.yaml:12: generator.backbone.depth")


PREVIEW = f"""\
{GOOD}preview:
  generator.backbone.depth: 1
  tasks.1.num_images: 4
  dataset: {{name: shapes, image_size: 16, num_images: 8}}
"""


@pytest.mark.parametrize(
    ("override", "decides"),
    [
        ("dataset.num_workers=16", False),
        ("tasks.0.num_workers=2", False),
        ("generator.backbone.recompute=true", False),
        ("generator.backbone.depth=3", True),
        ("tasks.0.batch_size=8", True),
        ("tasks.0.checkpoint_every=8", True),  # of several processes, where streams begin anew
    ],
)
def test_what_no_result_depends_on_is_told_apart(load, override, decides):
    given = "dataset={name: image-folder, root: data}"
    before, after = load(GOOD, given), load(GOOD, given, override)
    assert to_yaml(before) != to_yaml(after)
    assert (deciding(before) != deciding(after)) == decides
    for slot in ("dataset", "generator"):
        assert getattr(after, slot).to_dict(deciding=True) == deciding(after)[slot]


def test_the_preview_applies_only_where_it_is_asked_for(load):
    full, small = load(PREVIEW), load(PREVIEW, preview=True)
    assert (
        full.generator.params.backbone.params.depth == 2 and full.tasks[1].params.num_images == 10
    )
    assert small.generator.params.backbone.params.depth == 1
    assert small.tasks[1].params.num_images == 4
    assert small.dataset.params.num_images == 8 and full.dataset.params.num_images > 8
    assert small.generator.params.backbone.params.width == 16


def test_set_wins_over_the_preview(load):
    recipe = load(PREVIEW, "generator.backbone.depth=4", preview=True)
    assert recipe.generator.params.backbone.params.depth == 4


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("generator.backbone.depth: 1", "generator.backbone.depth: 0",
         "20: (preview): generator.backbone.depth: Input should be greater than 0"),
        ("generator.backbone.depth: 1", "generator.backbone.dept: 1",
         "20: (preview): generator.backbone.dept: unknown key (did you mean 'depth'?)"),
        ("image_size: 16, num_images: 8", "image_size: x", "22: (preview): dataset.image_size"),
        ("image_size: 16, num_images: 8", "imagesize: 8", "22: (preview): dataset.imagesize"),
        ("tasks.1.num_images: 4", "tasks.9.num_images: 4",
         "21: (preview): tasks.9.num_images: the recipe has no 'tasks.9'"),
    ],
)  # fmt: skip
def test_the_previews_mistakes_are_blamed_on_its_lines(complaint, load, before, after, says):
    assert before in PREVIEW
    told = complaint(PREVIEW.replace(before, after), preview=True)
    assert told.startswith(f"recipe.yaml:{says}"), told
    load(PREVIEW.replace(before, after))  # which a full run does not suffer from


def test_a_mistake_below_a_preview_key_is_blamed_on_the_very_line(complaint):
    text = GOOD + "preview:\n  dataset:\n    name: shapes\n    image_size: x\n"
    assert complaint(text, preview=True).startswith("recipe.yaml:22: (preview): dataset.image_size")


def test_a_preview_that_is_no_mapping_is_refused_even_in_full(complaint):
    assert complaint(GOOD + "preview: small\n").startswith("recipe.yaml:19: preview: expected")


def test_a_recipe_tells_whether_it_has_a_preview(tmp_path):
    for text, declared in ((GOOD, False), (PREVIEW, True)):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        assert has_preview(path) is declared


def again(recipe, path, registry):
    path.write_text(to_yaml(recipe))
    return load_recipe(path, [], registry)


@pytest.mark.parametrize("preview", [False, True])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_checks_and_reads_back_as_itself(path, preview, tmp_path, registry):
    if preview and not has_preview(path):
        preview = False
    recipe = load_recipe(path, [], registry, preview=preview)
    written = to_yaml(recipe)
    assert to_yaml(again(recipe, tmp_path / "again.yaml", registry)) == written
    assert "preview" not in yaml.safe_load(written)
    assert recipe.tasks


def test_the_full_form_keeps_every_default_and_every_number(load, tmp_path, registry):
    recipe = load(GOOD, "tasks.0.learning_rate=1e-7", "tasks.0.betas=[0.1, 0.30000000000000004]")
    back = again(recipe, tmp_path / "again.yaml", registry)
    for part, other in zip(recipe.tasks, back.tasks, strict=True):
        assert part.params == other.params
    assert recipe.dataset.params == back.dataset.params
    assert back.tasks[0].params.betas[1] == 0.30000000000000004
    assert yaml.safe_load(to_yaml(recipe))["tasks"][0]["weight_decay"] == 0.05
