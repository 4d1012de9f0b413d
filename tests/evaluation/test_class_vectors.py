from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from litune.errors import ConfigError, MissingExtraError
from litune.evaluation import class_vectors as prompts
from litune.evaluation.class_vectors import ClassVectors, babel, class_names, dataset_templates, pick_templates


def letters(texts: list[str]) -> torch.Tensor:
    """Texts to their counts of letters, of length one: a text tower for tests."""
    counts = torch.tensor([[text.count(chr(97 + i)) + 0.01 for i in range(26)] for text in texts])
    return counts / counts.norm(dim=1, keepdim=True)


def test_the_package() -> None:
    assert len(class_names("imagenet1k")) == len(class_names("imagenet1k", "it")) == 1000
    assert len(dataset_templates("imagenet1k")) == 80
    assert dataset_templates("imagenet1k")[1] == "a photo of many {}."
    assert dataset_templates("no-such-set") == dataset_templates("imagenet1k")
    for lang in prompts.babel_languages():
        numbers, names, templates = babel(lang)
        assert len(numbers) == len(names)
        assert all(one.count("{}") == 1 for one in templates)
    with pytest.raises(ConfigError, match=r"no language 'xx'"):
        babel("xx")


def test_the_package_is_read_not_imported() -> None:
    code = (
        "import sys\nfrom litune.evaluation.class_vectors import class_names\nclass_names('pets')\n"
        "found = {m for m in sys.modules if m.startswith(('clip_benchmark.', 'webdataset', 'open_clip', 'sklearn'))}\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    prompts.package_json.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'litune\[eval\]'"):
        class_names("pets")


def test_template_sets() -> None:
    own = dataset_templates("imagenet1k")
    assert pick_templates("clip", own) == own
    assert pick_templates("lit", own) == (*own, "{}")
    assert len(pick_templates("short", own)) == 8
    assert pick_templates("bare", own) == ("{}",)


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_class_vectors_against_the_formula(block: int) -> None:
    names, templates = ["Great_White Shark", "tench!", "kite"], ["a {}.", "the {}, a photo"]
    found = ClassVectors(letters, block)(names, templates)
    for vector, name in zip(found, ["great white shark", "tench", "kite"], strict=True):
        each = [letters([template.replace("{}", name)])[0] for template in ["a {}", "the {} a photo"]]
        mean = sum(each) / len(each)
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-6)
    plain = ClassVectors(letters, block)(["AB"], ["{}"], canonical=False)[0]
    assert not torch.allclose(plain, letters(["ab"])[0])


def test_class_vectors_as_clip_benchmark() -> None:
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    class Model:
        def encode_text(self, texts: torch.Tensor) -> torch.Tensor:
            return texts * 3.0

    names, templates = class_names("pets"), dataset_templates("caltech101")
    expected = zero_shot_classifier(
        Model(),
        lambda texts: letters(texts),
        names,
        [t.replace("{}", "{c}") for t in templates],
        "cpu",
        amp=False,
    ).T
    assert torch.allclose(ClassVectors(letters)(names, templates, canonical=False), expected, atol=1e-6)


class Seen(list[str]):
    """Texts that were encoded."""

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.extend(texts)
        return letters(texts)


def test_prompts_are_canonical_or_as_given() -> None:
    seen = Seen()
    ClassVectors(seen)(["T-Shirt, red"], ["A photo of a {}, too."])
    ClassVectors(seen)(["T-Shirt, red"], ["A photo of a {}, too."], canonical=False)
    assert seen == ["a photo of a tshirt, red too", "A photo of a T-Shirt, red, too."]


def test_each_text_is_embedded_once() -> None:
    seen = Seen()
    vectors = ClassVectors(seen)
    vectors(["kite", "Kite", "crane"], ["a {}", "{}"])
    vectors(["crane", "tench"], ["a {}", "{}"])
    assert sorted(seen) == sorted(["a kite", "kite", "a crane", "crane", "a tench", "tench"])
    assert vectors.texts == 6
