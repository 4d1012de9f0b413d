from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from litune import config as configs
from litune.cli import COMMANDS, find_command, parse
from litune.config import ClassifyConfig, EmbedConfig, TuneConfig, command, from_json, to_json
from litune.errors import ConfigError
from litune.studies.recipes import quickstart_embed, quickstart_eval, quickstart_tune


@pytest.mark.parametrize("config", [c for c, _ in COMMANDS.values()])
def test_frozen_and_every_setting_explained(config: type) -> None:
    assert config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    tree = ast.parse(inspect.getsource(config)).body[0]
    assert isinstance(tree, ast.ClassDef)
    body = [n for n in tree.body if isinstance(n, ast.AnnAssign | ast.Expr)][1:]
    for field, doc in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert isinstance(doc, ast.Expr)
        assert ast.literal_eval(doc.value).rstrip().endswith((".", "…")), ast.unparse(field)


def test_to_json() -> None:
    config = EmbedConfig(pairs=Path("p"), image_tower="x", out=Path("o"), split=("a", "b"))
    found = to_json(config)
    assert found["pairs"] == "p"
    assert found["split"] == ["a", "b"]
    assert set(found) == {f.name for f in dataclasses.fields(config)}


def test_command_line_and_python_mean_the_same() -> None:
    line = parse(["classify", "run", "a.jpg", "b.jpg", "--labels", "x", "y", "--templates", "a {}"])
    seen: list[ClassifyConfig] = []

    @command(ClassifyConfig)
    def classify(config: ClassifyConfig) -> None:
        seen.append(config)

    classify("run", ["a.jpg", "b.jpg"], labels=["x", "y"], templates="a {}")  # type: ignore[arg-type]
    assert seen == [line]
    classify.run(line)
    assert seen == [line, line]
    assert list(inspect.signature(classify).parameters) == [f.name for f in dataclasses.fields(ClassifyConfig)]
    with pytest.raises(TypeError, match="label"):
        classify("run", ["a.jpg"], label=["x"])  # type: ignore[call-arg]


def test_keyword_arguments_and_json_are_read_as_the_command_line_is() -> None:
    line = parse(["tune", "s", "more", "--text-tower", "x", "--out", "r", "--lang", "en", "--learning-rate", "1"])

    @command(TuneConfig)
    def tune(config: TuneConfig) -> TuneConfig:
        return config

    assert tune("s", "x", "r", more_stores="more", lang="en", learning_rate=1) == line  # type: ignore[arg-type]
    assert from_json(TuneConfig, {**to_json(line), "of an earlier version": 1}) == line
    with pytest.raises(ConfigError, match="--batch-size is '8', it must be a whole number"):
        tune("s", "x", "r", batch_size="8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--texts is '', it must be a path"):
        tune("s", "x", "r", texts="")  # type: ignore[arg-type]


def test_every_command_is_found() -> None:
    for name, (config, _) in COMMANDS.items():
        found = find_command(object.__new__(config))
        assert found.config is config, name


def test_recipes(tmp_path: Path) -> None:
    embed, tune, evaluate = quickstart_embed(tmp_path), quickstart_tune(tmp_path, 3), quickstart_eval(tmp_path)
    assert embed.out == tune.store == evaluate.store
    assert (tune.out, tune.seed) == (evaluate.run, 3)


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="--max-damaged is 3, it must be between 0 and 1"):
        EmbedConfig(pairs=Path("p"), image_tower="x", out=Path("o"), max_damaged=3)
    with pytest.raises(ConfigError, match="--precision is 'bf16', it must be one of auto, float32, bfloat16"):
        TuneConfig(store=Path("s"), text_tower="minilm", out=Path("o"), precision="bf16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no label"):
        ClassifyConfig(run=Path("r"), images=(Path("x"),), labels=())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"locking": "LX"}, "--locking is 'LX': write two letters"),
        ({"locking": "UUU"}, "--locking is 'UUU'"),
        ({"unlock": "after:50%"}, "--unlock is for an unlocked image tower"),
        ({"image_rate": 0.1}, "--image-rate is for an unlocked image tower"),
        ({"locking": "UU", "image_negatives": 9}, "--image-negatives needs a locked image tower"),
        ({"loss": "sigmoid", "image_negatives": 9}, "--image-negatives is for the softmax loss"),
        ({"image_head": "mlp", "image_negatives": 9}, "--image-negatives is for the softmax loss without"),
        ({"rates": ("text",)}, "--rates: 'text' can't be read"),
        ({"rates": ("text.*=-1",)}, "can't be read"),
        ({"warmup": "0.1"}, "--warmup: '0.1' has no unit"),
        ({"duration": "5%"}, "--duration: '5%' would be a share of the run's own length"),
        ({"image_to_text": 1.5}, "--image-to-text is 1.5, it must be between 0 and 1"),
        ({"beta2": 1.0}, "--beta2 is 1.0"),
        ({"micro_batch": 0}, "--micro-batch is 0"),
    ],
)
def test_wrong_tuning_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        TuneConfig(store=Path("s"), text_tower="minilm", out=Path("o"), **settings)


def test_imports_no_torch() -> None:
    names = {
        n.name
        for node in ast.walk(ast.parse(inspect.getsource(configs)))
        if isinstance(node, ast.Import)
        for n in node.names
    }
    assert "torch" not in names
