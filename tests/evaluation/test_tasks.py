from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from litune.errors import ConfigError, DataError
from litune.evaluation.class_vectors import class_names
from litune.evaluation.imagenet import imagenet_file
from litune.evaluation.published import IMAGES, note, published_shares
from litune.evaluation.registry import GROUPS, TASKS
from litune.evaluation.result import Result
from litune.evaluation.task import Task
from litune.evaluation.task_files import read_tasks
from litune.evaluation.tasks import find_tasks, group_means
from litune.evaluation.truth import chance, find_truth, task_templates
from litune.pairs.benchmarks import EvalSet, pairs_of

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"
SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "imagenet-samples"


def labelled(classes: list[str], layout: str = "class folders in x", keys: list[str] | None = None) -> EvalSet:
    """A set with one image of each class, in order."""
    keys = keys or [f"{name}/0.png" for name in classes]
    labels = np.arange(len(keys)) % len(classes)
    return EvalSet(Path("set"), pairs_of(layout, keys, keys), classes, labels)


def test_the_registry() -> None:
    assert len(GROUPS["vtab"]) == len({*GROUPS["vtab"]}) == 19
    for names in GROUPS.values():
        assert {*names} <= TASKS.keys()
    for task in TASKS.values():
        if isinstance(task.names, str):
            assert len(class_names(task.names)) > 1
        if task.kind == "classification" and task.name != "babel-imagenet":
            templates = task_templates(task, labelled(["a"]))
            assert templates
            assert all(one.count("{}") == 1 for one in templates)
    assert published_shares("imagenet1k")["LiT g/14, private 4B (v3)"] == {"accuracy": 0.852}
    assert published_shares("coco")["LiT L/16, public CC12M+YFCC"]["text_to_image recall@1"] == 0.312
    assert "LiT L/16, public CC12M+YFCC" in published_shares("objectnet")
    assert not published_shares("imagenet1k", "it"), "published in English alone"


def test_every_task_is_in_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for task in TASKS.values():
        assert f"| `{task.name}` |" in text, task.name
    for group in GROUPS:
        assert f"`{group}`" in text


def test_imagenet_by_id_number_and_name() -> None:
    ids = imagenet_file("imagenet_synsets.txt")
    names = class_names("imagenet1k")
    task = TASKS["imagenet1k"]
    for classes in (["n01443537", "n01440764"], ["1", "0"], ["Goldfish", "tench"], ["00001", "0"]):
        truth = find_truth(task, labelled(classes))
        assert [names[one[0]] for one in truth.accepted] == ["goldfish", "tench"], classes
        assert len(truth.names) == 1000
    assert find_truth(task, labelled([*ids])).note == "matched by WordNet id"
    with pytest.raises(DataError, match=r"'goldfisch' is none of the 1,000 .*'goldfish'"):
        find_truth(task, labelled(["tench", "goldfisch"]))
    with pytest.raises(DataError, match="1000 is none"):
        find_truth(task, labelled(["1000"]))


def test_synonyms_of_the_hub_go_by_position() -> None:
    names = [f"{name}, and so on" for name in class_names("imagenet1k")]
    truth = find_truth(TASKS["imagenet1k"], labelled(names, "1 Parquet files"))
    assert truth.note == "matched by position"
    with pytest.raises(DataError, match="is none of the"):
        find_truth(TASKS["imagenet1k"], labelled(names))


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a"])
def test_subsets(name: str) -> None:
    own = sorted(imagenet_file(f"{name.replace('-', '_')}_synsets.txt"))
    ids, names = imagenet_file("imagenet_synsets.txt"), class_names("imagenet1k")
    truth = find_truth(TASKS[name], labelled(own))
    assert len(truth.names) == 200
    assert [truth.names[one[0]] for one in truth.accepted] == [names[ids.index(wnid)] for wnid in own]
    with pytest.raises(DataError, match="n01440764 is not one of the 200"):
        find_truth(TASKS[name], labelled(["n01440764"]))


def test_subsets_are_those_of_clip_benchmark() -> None:
    from importlib.resources import files

    source = files("clip_benchmark").joinpath("datasets", "builder.py").read_text()
    for name in ("imagenet-a", "imagenet-r"):
        line = next(line for line in source.splitlines() if f"{name.replace('-', '_')}_wnids = " in line)
        assert set(eval(line.partition("=")[2])) == set(imagenet_file(f"{name.replace('-', '_')}_synsets.txt"))


def test_real() -> None:
    keys = ["n01/ILSVRC2012_val_00000001.JPEG", "n02/ILSVRC2012_val_00000002.JPEG", "n02/ILSVRC2012_val_00000003.JPEG"]
    truth = find_truth(TASKS["imagenet-real"], labelled(["n01", "n02"], keys=keys))
    # The first image of the validation set has no label in ReaL, the second has two.
    assert truth.rows.tolist() == [1, 2]
    assert [one.tolist() for one in truth.accepted] == [[795, 970], [230, 231]]
    assert chance(truth) == pytest.approx(2 / 1000)
    with pytest.raises(DataError, match="not called ILSVRC2012_val_"):
        find_truth(TASKS["imagenet-real"], labelled(["n01"], keys=["n01/x.JPEG"]))


def test_objectnet(tmp_path: Path) -> None:
    """Its own files' form, with another order of ImageNet's classes than that of the models."""
    folder = tmp_path / "mappings"
    folder.mkdir()
    (folder / "folder_to_objectnet_label.json").write_text(json.dumps({"big_fish": "Fish", "cup": "Cup", "x": "Not"}))
    (folder / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Fish": "gold fish; tench, Tinca", "Cup": "mug"}))
    (folder / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({"0": 2, "1": 0, "504": 1}))
    (folder / "imagenet_to_label_2012_v2").write_text("gold fish\nmug\ntench, Tinca\n")
    found = replace(labelled(["big_fish", "cup", "x"]), path=tmp_path)
    truth = find_truth(TASKS["objectnet"], found)
    assert truth.names == [class_names("imagenet1k")[i] for i in (0, 1, 504)]
    assert truth.rows.tolist() == [0, 1]
    assert [one.tolist() for one in truth.accepted] == [[0, 1], [2]]
    (folder / "imagenet_to_label_2012_v2").unlink()
    with pytest.raises(DataError, match="mappings of ObjectNet"):
        find_truth(TASKS["objectnet"], found)


def test_babel() -> None:
    (task,) = find_tasks_named("babel-imagenet:de")
    truth = find_truth(task, labelled(imagenet_file("imagenet_synsets.txt")))
    assert len(truth.names) == len(truth.rows) < 1000
    assert truth.names[truth.accepted[1][0]] == truth.names[1]
    assert truth.names[0] == "Schleie"
    assert "{}" in task_templates(task, labelled(["a"]))[0]


def find_tasks_named(*names: str) -> list[Task]:
    """As `find_tasks`, with the images lying in a folder."""
    from litune.evaluation.tasks import _named

    return [task for name in names for task in _named(name)]


def test_sorted_folders() -> None:
    folders = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop"]
    folders += ["Residential", "River", "SeaLake"]
    truth = find_truth(TASKS["eurosat"], labelled(folders))
    assert truth.names[truth.accepted[9][0]] == "lake or sea"
    assert find_truth(TASKS["pets"], labelled(["american_bulldog"])).accepted[0] == 1
    caltech = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes", *class_names("caltech101")[5:]]
    for folders in (caltech, caltech[1:]):  # torchvision leaves the background out
        truth = find_truth(TASKS["caltech101"], labelled(folders))
        assert (truth.names[truth.accepted[-1][0]], truth.note) == ("yin and yang symbol", "matched by position")


def test_another_order_is_not_taken_by_position() -> None:
    """TensorFlow's files number Caltech 101's classes by name, from accordion on."""
    tensorflow = sorted(one.replace("ketch", "ketches") for one in class_names("caltech101"))
    with pytest.raises(DataError, match="the class 'ketches' is none of the 102"):
        find_truth(TASKS["caltech101"], labelled(tensorflow, "2 Parquet files"))


def test_names_of_other_sets() -> None:
    assert find_truth(TASKS["dtd"], labelled(["polka-dotted", "dotted"])).names == ["polka-dotted", "dotted"]


def test_finding(tmp_path: Path) -> None:
    for name in ("imagenet1k", "wds_vtab-dtd", "oxford-iiit-pet", "other"):
        (tmp_path / name).mkdir()
    found = find_tasks(["available"], tmp_path)
    assert [one.name for one in found] == ["imagenet1k", "imagenet-real", "dtd", "pets"]
    assert TASKS["dtd"].find(tmp_path) == tmp_path / "wds_vtab-dtd"
    assert [t.name for t in find_tasks(["imagenet1k", "imagenet1k:it"], tmp_path)] == ["imagenet1k", "imagenet1k:it"]
    with pytest.raises(DataError, match=r"images of coco are not in .*; get COCO's 2014 images"):
        find_tasks(["coco"], tmp_path)
    with pytest.raises(DataError, match="--data"):
        find_tasks(["coco"], None)
    with pytest.raises(ConfigError, match=r"no task 'imagenet1' .*'imagenet1k'|no task 'imagenet1'.*perhaps"):
        find_tasks(["imagenet1"], tmp_path)
    with pytest.raises(ConfigError, match="no names in 'xx'"):
        find_tasks(["imagenet1k:xx"], tmp_path)
    with pytest.raises(DataError, match="no folder with the name of a task"):
        find_tasks(["available"], tmp_path / "other")


def test_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "- name: colors\n  folder: pics\n  classes: {red: scarlet, blue: navy}\n  templates: a {} thing\n"
        "- name: pairs\n  table: t.csv\n  images: pics\n  split: val\n  lang: en\n"
        "- task: imagenet-r\n  folder: elsewhere\n"
    )
    colors, pairs, r = read_tasks(tmp_path / "a.yaml")
    assert (colors.kind, colors.path, colors.templates) == ("classification", tmp_path / "pics", ("a {} thing",))
    truth = find_truth(colors, labelled(["blue", "red"]))
    assert [truth.names[one[0]] for one in truth.accepted] == ["navy", "scarlet"]
    assert (pairs.kind, pairs.splits, pairs.lang, pairs.images) == ("retrieval", ("val",), "en", tmp_path / "pics")
    assert (r.subset, r.path) == ("imagenet-r", tmp_path / "elsewhere")
    (tmp_path / "b.yaml").write_text("name: coco\nfolder: pics\n")
    with pytest.raises(ConfigError, match="coco is a set that litune knows: write task: coco, or name it otherwise"):
        read_tasks(tmp_path / "b.yaml")
    with pytest.raises(DataError, match="pics, which does not exist"):
        find_tasks([str(tmp_path / "a.yaml")], None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nfolders: y", "no 'folders': perhaps you meant 'folder'"),
        ("name: x", "one of both"),
        ("folder: x\ntemplates: [no]", "exactly one {}"),
        ("folder: x\nmetric: speed", "metric is 'speed'"),
        ("folder: x\nclasses: 3", "classes must be a list"),
        ("folder: [", "is not YAML"),
        ("folder:", "folder: is empty"),
        ("folder: [x, y]", "folder is ['x', 'y'], it must be one word or path"),
        ("task: [pets]\nfolder: x", "task is ['pets'], it must be"),
        ("name: ../y\nfolder: x", "the name '../y' can't be that of a folder"),
        ("folder: x\nclasses: []", "classes must be a list"),
        ("folder: x\nclasses: [yes, no]", "classes has True, which YAML takes for no text"),
        ("folder: x\nclasses: {no: a, b: c}", "classes has False"),
        ("folder: x\nclasses: [T-shirt, t shirt, hat, t shirt]", "classes has 't shirt' twice"),
        ("folder: x\ntemplates: 3", "templates is 3, it must be a list"),
        ("folder: x\ntemplates: []", "templates is [], it must be a list"),
        ("folder: x\ntemplates: [{a: b}]", "needs exactly one {}"),
        ("folder: x\nmetric: text_to_image recall@1", "of classification it must be accuracy or mean_per_class"),
        ("table: x.csv\nmetric: accuracy", "of retrieval it must be text_to_image recall@1"),
        ("folder: x\nlang: de", "has no names in 'de'"),
        ("task: pets\nfolder: x\nlang: it", "pets has no names in 'it'"),
        ("- {name: a, folder: x}\n- {name: a, folder: y}", "several tasks called a"),
        ("3", "must hold a task"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("task: imagenet-x\nfolder: y", "no task 'imagenet-x'"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(ConfigError) as why:
        read_tasks(tmp_path / "a.yml")
    assert said in str(why.value)
    assert "\n" not in str(why.value)


def test_group_means() -> None:
    results = [result_of(name, 0.1 * i, IMAGES[name]) for i, name in enumerate(GROUPS["vtab-natural"])]
    found = group_means(results)
    assert found["vtab-natural"]["mean"] == pytest.approx(0.3)
    assert found["vtab-natural"]["published"]["LiT L/16, public CC12M+YFCC"] == 0.631
    assert found["vtab-natural"]["note"] == ""
    assert found.keys() == {"vtab-natural"}
    assert group_means(results[1:]) == {}
    results[2] = result_of("dtd", 0.2, 12)
    assert group_means(results)["vtab-natural"]["note"].endswith("other images or prompts of dtd")


def result_of(task: str, accuracy: float, images: int, **protocol: Any) -> Result:
    """A classification's result with so many images, its captions and examples left out."""
    return Result(
        task=task, kind="classification", metric="accuracy", values={"accuracy": accuracy}, chance={}, definition="",
        images=images, protocol=protocol, outcomes={}, groups={}, keys=[], pictures=[], hashes=[], class_names=[],
        labels=None, predicted=None, confidence=None, captions=[], owner=None, best_images=None,
    )  # fmt: skip


def test_what_can_be_compared_with_what_was_published() -> None:
    """All of a set under its own templates; a part of it, other templates or captions are named."""
    assert note(result_of("imagenet1k", 0.7, 50_000, template_set="lit", canonical_names=True)) == ""
    assert note(result_of("imagenet1k", 0.7, 50_000, template_set="clip")) == ""
    assert note(result_of("imagenet-v2", 0.7, 9_999)) == (
        "not comparable with what was published: 9,999 images here, 10,000 there"
    )
    said = note(result_of("imagenet1k", 0.7, 50_000, template_set="own", canonical_names=False))
    assert said.endswith("templates here: own, there: the set's; class names not canonicalised here")
    assert note(result_of("dtd", 0.5, 3)) == "", "nothing is published on it alone"
    coco = replace(result_of("coco", 0.5, 5_000), captions=[""] * 25_000)
    assert note(coco).endswith("25,000 captions here, 25,010 there")
    assert note(replace(coco, captions=[""] * 25_010)) == ""
    assert note(replace(coco, lang="de")) == "", "nothing is published in German"


def test_every_published_set_has_its_number_of_images() -> None:
    named = {task for task in [*TASKS, *GROUPS] if published_shares(task)}
    assert {one for task in named for one in GROUPS.get(task, (task,))} == IMAGES.keys()


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared/data is not here")
def test_the_samples_are_imagenets_classes_in_order() -> None:
    from litune.pairs.benchmarks import read_set

    truth = find_truth(TASKS["imagenet1k"], read_set(SAMPLES, "classification"))
    assert [int(one[0]) for one in truth.accepted] == list(range(1000))


def test_names_and_templates_in_files(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("Bär\r\nwombat\r\n".encode("utf-16"))
    (tmp_path / "templates.txt").write_bytes("\ufeffein Bild: {}\n{}\n".encode())
    text = "folder: x\nclasses: names.txt\ntemplates: templates.txt\nname: größe\n"
    (tmp_path / "a.yaml").write_bytes(text.encode("cp1252"))
    (task,) = read_tasks(tmp_path / "a.yaml")
    assert (task.name, task.names, task.templates) == ("größe", ("Bär", "wombat"), ("ein Bild: {}", "{}"))
