"""The API against the same things computed in Python."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from tests.conftest import draw
from tests.serve.conftest import Made, Start

from litune.model.hubs import Bank
from litune.model.lit import LiT
from litune.serve.app import make_app
from litune.serve.gate import POLICY, path_name
from litune.serve.openapi import document
from litune.store.store import FeatureStore
from litune.vectors import normalize


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def stored(model: LiT, made: Made) -> torch.Tensor:
    return model.encode_features(FeatureStore(made.store).features(slice(None)))


def error(answer: Any, status: int) -> str:
    """The message of a refusal, whose form is always the same."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()["error"]
    assert list(found) == ["message", "what", "do"]
    assert all(isinstance(value, str) and value for value in found.values())
    return str(found["message"])


def test_model(client: TestClient, model: LiT, made: Made) -> None:
    facts = client.get("/v1/model").json()
    assert facts["run"] == "run"
    assert facts["dim"] == model.dim
    assert facts["temperature"] == pytest.approx(float(model.scale.detach()))
    assert facts["text_tower"].startswith("hf:")
    assert facts["image_tower"] == "python:servedtower:make"
    assert facts["can_encode_images"] is True
    assert facts["images"] == 12
    assert facts["columns"] == FeatureStore(made.store).metadata.column_names
    assert facts["templates"]["bare"] == ["{}"]
    assert all(len(templates) for templates in facts["templates"].values())
    assert client.get("/health").json() == {"status": "ok"}


def test_encode_text(client: TestClient, model: LiT) -> None:
    texts = ["a red box", "ein Bär 🐻", "a red box", "null\x00inside", " "]
    found = client.post("/v1/encode/text", json={"texts": texts}).json()["features"]
    assert np.allclose(found, model.encode_text(texts), atol=1e-6)
    again = client.post("/v1/encode/text", json={"texts": texts[::-1]}).json()["features"]
    assert again[::-1] == found
    counted = client.get("/metrics").text
    assert 'litune_texts_total{from="model"} 4.0' in counted  # of ten texts four are distinct
    assert 'litune_texts_total{from="cache"} 6.0' in counted
    assert 'litune_requests_total{method="POST",path="/v1/encode/text",status="200"} 2.0' in counted
    assert 'litune_batch_size_count{kind="texts"} 1.0' in counted


def test_encode_image(client: TestClient, model: LiT) -> None:
    pictures = [draw("red", "box"), draw("blue", "ring", 64)]
    files = [("images", (f"{i}.png", png(picture), "image/png")) for i, picture in enumerate(pictures)]
    found = client.post("/v1/encode/image", files=files).json()
    assert found["names"] == ["0.png", "1.png"]
    assert np.allclose(found["features"], model.encode_image(pictures), atol=1e-6)


def test_match(client: TestClient, model: LiT, made: Made) -> None:
    images, texts = stored(model, made), ["a red box", "a blue ring", "a bar"]
    refs = [{"row": 5}, {"features": (3 * images[2]).tolist()}, {"row": 0}]
    found = client.post("/v1/match", json={"images": refs, "texts": texts}).json()
    cosines = images[[5, 2, 0]].double() @ model.encode_text(texts).double().T
    assert np.allclose(found["cosines"], cosines, atol=1e-6)
    scaled = (cosines * float(model.scale.detach())).exp()
    assert np.allclose(found["probabilities"], scaled / scaled.sum(1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize(("templates", "texts"), [("auto", ["{}", "a photo of a {}."]), (["The {}!"], ["the {}"])])
def test_classify(client: TestClient, model: LiT, made: Made, templates: Any, texts: list[str]) -> None:
    classes = ["red", "Green!", "blue", "yellow"]
    expected = model.zero_shot(classes, texts).probabilities(stored(model, made))
    body = {"classes": classes, "templates": templates}
    for images, rows in (
        ("all", list(range(12))),
        ({"offset": 10, "limit": 5}, [10, 11]),
        ([{"row": 4}, {"row": 4}, {"row": 1}], [4, 4, 1]),
    ):
        found = client.post("/v1/classify", json=body | {"images": images}).json()
        assert found["classes"] == classes
        assert [one["row"] for one in found["predictions"]] == rows
        given = [one["probabilities"] for one in found["predictions"]]
        assert np.allclose(given, expected[rows], atol=1e-5)
        assert [one["label"] for one in found["predictions"]] == [classes[i] for i in np.argmax(given, 1)]
        names = FeatureStore(made.store).metadata["label"].to_pylist()
        assert [one["own_label"] for one in found["predictions"]] == [names[i] for i in rows]
    refs = [{"features": stored(model, made)[3].tolist()}, {"row": 2}]
    first, second = client.post("/v1/classify", json=body | {"images": refs}).json()["predictions"]
    assert (first["index"], second["row"]) == (0, 2)
    assert "key" not in first
    assert np.allclose(first["probabilities"], expected[3], atol=1e-5)


def test_search_ranks_with_the_hub_correction(start: Start, model: LiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Index.search` does, page by page; scores are cosines, and --no-hub-correction turns it off."""
    features = normalize(torch.randn(60, model.dim, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(model, "bank", Bank.of(features[:30], features[30:]))
    for on in (True, False):
        engine = start(hub_correction=on)
        client = TestClient(make_app(engine))
        asks: list[dict[str, Any]] = [
            {"text": "a red box"},
            {"image": {"row": 7}},
            {"text": "a red box", "image": {"row": 3}},
        ]
        for asked in asks:
            sent = {**asked, "top": 5, "offset": 1}
            matches = client.post("/v1/search", json=sent).json()["found"]
            image = asked["image"]["row"] if "image" in asked else None
            expected = engine.need_images().search(model, asked.get("text"), image, top=5, offset=1, hub_correction=on)
            assert [match["row"] for match in matches] == [match.row for match in expected]
            assert [match["score"] for match in matches] == pytest.approx([m.score for m in expected], abs=1e-5)


def test_search(client: TestClient, model: LiT, made: Made) -> None:
    images = stored(model, made)
    text = model.encode_text("a red box")[0]

    def search(**body: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = client.post("/v1/search", json=body).json()["found"]
        return found

    query = torch.nn.functional.normalize(2 * text - 0.5 * images[3], dim=0)
    best = (images @ query).sort(descending=True)
    found = search(text="a red box", image={"row": 3}, text_weight=2, image_weight=-0.5, top=4, offset=1)
    assert [one["row"] for one in found] == best.indices[1:5].tolist()
    assert [one["score"] for one in found] == pytest.approx(best.values[1:5].tolist(), abs=1e-5)
    assert search(image={"row": 7}, top=1)[0]["row"] == 7
    assert len(search(text="x")) == 12
    keys = FeatureStore(made.store).metadata["key"].to_pylist()
    red = search(text="x", where=["label=red", "width>=48"])
    assert sorted(one["key"] for one in red) == sorted(key for key in keys if key.startswith("red"))
    assert search(text="x", where=["width>48"]) == []


def test_images(client: TestClient, made: Made) -> None:
    page = client.get("/v1/images", params={"offset": 3, "limit": 2}).json()
    assert page["total"] == 12
    assert [(one["row"], one["label"]) for one in page["images"]] == [(3, "green"), (4, "green")]
    assert client.get("/v1/images?offset=12").json()["images"] == []
    answer = client.get("/v1/images/4/picture?size=32")
    assert answer.headers["content-type"] == "image/jpeg"
    shown = Image.open(io.BytesIO(answer.content))
    assert (shown.format, shown.size) == ("JPEG", (32, 32))
    path = Path(FeatureStore(made.store).metadata["image_path"][4].as_py())
    expected = np.asarray(Image.open(path).convert("RGB").resize((32, 32))).astype(float)
    assert np.abs(np.asarray(shown).astype(float) - expected).mean() < 8


def test_a_picture_that_is_gone(client: TestClient, made: Made) -> None:
    path = Path(FeatureStore(made.store).metadata["image_path"][9].as_py())
    kept = path.read_bytes()
    try:
        path.unlink()
        assert "row 9 can't be shown: its file is gone" in error(client.get("/v1/images/9/picture"), 404)
        path.mkdir()
        assert "it is no plain file" in error(client.get("/v1/images/9/picture"), 404)
        path.rmdir()
        path.write_text("no picture")
        assert "not an image" in error(client.get("/v1/images/9/picture"), 404)
    finally:
        path.write_bytes(kept)
    assert client.get("/v1/images/9/picture").status_code == 200
    path.unlink()
    try:
        assert client.get("/v1/images/9/picture").status_code == 200  # kept
    finally:
        path.write_bytes(kept)


BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/encode/text", {"texts": []}, 422, "texts: needs at least 1"),
    ("/v1/encode/text", {"texts": "a"}, 422, "texts: input should be a valid array"),
    ("/v1/encode/text", {"texts": [3]}, 422, "texts.0: input should be a valid string"),
    ("/v1/encode/text", {"texts": ["x" * 10_001]}, 422, "has more than 10,000 characters"),
    ("/v1/encode/text", {"texts": ["a"], "more": 1}, 422, "there is no field"),
    ("/v1/encode/text", b"{", 400, "not valid JSON"),
    ("/v1/encode/text", b"\xff\xfe", 400, "not valid JSON"),
    ("/v1/encode/text", b'{"texts":["\\ud800"]}', 400, "not valid JSON"),
    ("/v1/encode/text", b"[" * 100_000, 400, "not valid JSON"),
    ("/v1/match", {"images": [{"row": 12}], "texts": ["a"]}, 422, "there is no row 12: they go from 0 to 11"),
    ("/v1/match", {"images": [{"row": -1}], "texts": ["a"]}, 422, "greater than or equal to 0"),
    ("/v1/match", {"images": [{"row": True}], "texts": ["a"]}, 422, "valid integer"),
    ("/v1/match", b'{"images":[{"row":1e999}],"texts":["a"]}', 422, "row"),
    ("/v1/match", {"images": [{"features": [0.0] * 11}], "texts": ["a"]}, 422, "not all zero"),
    ("/v1/match", {"images": [{"features": [1.0, 2.0]}], "texts": ["a"]}, 422, "11 numbers"),
    ("/v1/match", b'{"images":[{"features":[NaN]}],"texts":["a"]}', 422, "finite"),
    ("/v1/match", {"images": [{"features": [1e300] * 11}], "texts": ["a"]}, 422, "features of an image"),
    ("/v1/classify", {"images": "all", "classes": []}, 422, "classes: needs at least 1"),
    ("/v1/classify", {"images": "none", "classes": ["a"]}, 422, "images"),
    ("/v1/classify", {"images": "all", "classes": ["a"], "templates": ["a"]}, 422, "needs exactly one {}"),
    ("/v1/classify", {"images": "all", "classes": ["a"], "templates": ["/etc/passwd"]}, 422, "needs exactly one {}"),
    (
        "/v1/classify",
        {"images": "all", "classes": [f"{n}" for n in range(1000)], "templates": ["{}"] * 9},
        422,
        "more than 8,192 texts",
    ),
    ("/v1/classify", {"images": "all", "classes": ["a", "b", "a"]}, 422, "classes has 'a' twice"),
    ("/v1/classify", {"images": "all", "classes": ["a_b", "A b!"]}, 422, "classes has 'A b!' beside 'a_b'"),
    ("/v1/classify", {"images": "all", "classes": ["a", " "]}, 422, "classes has the blank name ' '"),
    ("/v1/search", {}, 422, "needs a text, an image or both"),
    ("/v1/search", {"text": " \n"}, 422, "the text of the query is empty"),
    ("/v1/search", {"text": "a", "text_weight": 0}, 422, "cancel each other out"),
    ("/v1/search", {"text": "a", "top": 1001}, 422, "less than or equal to 1000"),
    ("/v1/search", {"text": "a", "where": ["width=x"]}, 422, "width holds numbers"),
    ("/v1/search", {"text": "a", "where": ["'; drop table=1"]}, 422, "names no column"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD)
def test_bad_bodies(client: TestClient, path: str, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert message in error(answer, status)


def test_other_bad_requests(client: TestClient) -> None:
    error(client.get("/nothing"), 404)
    error(client.post("/health"), 405)
    error(client.post("/v1/search", content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    error(client.post("/v1/encode/image", json={}), 415)
    for path in ("/v1/images?limit=0", "/v1/images?offset=-1", "/v1/images?limit=x", "/v1/images/1/picture?size=9999"):
        error(client.get(path), 422)
    for row in ("12", "-1", "x", "1" * 400, "%00", "..%2f..%2fetc%2fpasswd"):
        error(client.get(f"/v1/images/{row}/picture"), 404)


def test_unknown_parameters(client: TestClient) -> None:
    """Each path names what its query takes, as the document does; the page's own takes whatever stands there."""
    for path, known in (
        ("/v1/images", "it takes offset, limit, where"),
        ("/v1/images/1/picture", "it takes size"),
        ("/v1/model", "it takes none"),
    ):
        assert f"no parameter 'limt' in this path's query: {known}" in error(client.get(path, params={"limt": 1}), 422)
    assert "it takes none" in error(client.post("/v1/search", params={"top": 1}, json={"text": "a"}), 422)
    assert client.get("/?utm=1").status_code == 200


def test_columns_and_conditions(client: TestClient, made: Made) -> None:
    table = FeatureStore(made.store).metadata
    columns = {one["name"]: (one["kind"], one["values"]) for one in client.get("/v1/columns").json()["columns"]}
    assert columns["label"] == ("text", sorted(set(table["label"].to_pylist())))
    assert columns["width"] == ("number", None)
    assert not {"image_path", "sha256", "caption"} & set(columns)
    expected = [i for i, one in enumerate(table.to_pylist()) if one["label"] == "red" and "box" in one["key"]]
    asked = {"where": ["label=red", "key~box"], "limit": 5}
    found = client.get("/v1/images", params=asked).json()
    assert ([one["row"] for one in found["images"]], found["total"]) == (expected, len(expected))
    assert expected
    rest = client.get("/v1/images", params={"where": "label!=red", "offset": 2}).json()
    assert [one["row"] for one in rest["images"]] == [
        i for i, v in enumerate(table["label"].to_pylist()) if v != "red"
    ][2:]
    assert "perhaps you meant 'label'" in error(client.get("/v1/images", params={"where": "labl=red"}), 422)
    for wrong in ([""], ["a=b"] * 17, ["a=" + "b" * 299]):
        assert "where takes 16 conditions" in error(client.get("/v1/images", params={"where": wrong}), 422)


def bomb(width: int, height: int) -> bytes:
    """The head of a PNG that claims to be so large."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no picture that can be read"),
        (b"hello", "no picture that can be read"),
        (bomb(9000, 9000), "9000×9000 pixels, more than 50,000,000"),
        (bomb(60000, 60000), "pixels"),
        (bomb(1 << 31 - 1, 1), "pixels"),
        (bomb(1, 20000), "1×20000 pixels: one side is more than 100 times the other"),
        (png(draw("red", "box"))[:80], "can't be used"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "no picture that can be read"),
    ],
)
def test_bad_pictures(client: TestClient, data: bytes, message: str) -> None:
    good = png(draw("red", "box"))
    files = [("images", ("good.png", good, "image/png")), ("images", ("bad\x00.png", data, "image/png"))]
    assert message in error(client.post("/v1/encode/image", files=files), 422)


def test_bad_forms(client: TestClient) -> None:
    good = png(draw("red", "box"))
    error(client.post("/v1/encode/image", files={"pictures": good}), 422)
    error(client.post("/v1/encode/image", files={"images": good}, data={"more": "x"}), 400)
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    whole = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n' + good + b"\r\n--b--\r\n"
    assert client.post("/v1/encode/image", content=whole, headers=kind).status_code == 200
    for cut in (1, 10, 40, len(whole) - 200):
        assert client.post("/v1/encode/image", content=whole[:cut], headers=kind).status_code in (400, 422)
    error(client.post("/v1/encode/image", content=whole, headers={"Content-Type": "multipart/form-data"}), 400)


def test_without_images(start: Start) -> None:
    client = TestClient(make_app(start(images=False)))
    assert client.get("/v1/model").json()["images"] == 0
    error(client.get("/v1/images"), 409)
    error(client.get("/v1/images/0/picture"), 409)
    error(client.post("/v1/search", json={"text": "a"}), 409)
    error(client.post("/v1/classify", json={"images": "all", "classes": ["a"]}), 409)
    error(client.post("/v1/match", json={"images": [{"row": 0}], "texts": ["a"]}), 409)
    assert client.post("/v1/encode/text", json={"texts": ["a"]}).status_code == 200


def test_without_an_image_tower(start: Start) -> None:
    engine = start()
    engine.can_encode_images = False
    answer = TestClient(make_app(engine)).post("/v1/encode/image", files={"images": b"x"})
    assert "can't encode pictures" in error(answer, 409)


def test_token(start: Start) -> None:
    client = TestClient(make_app(start(token="sesame-open")))
    for wrong in (
        {},
        {"Authorization": "Bearer sesame"},
        {"Authorization": "Basic sesame-open"},
        {"Authorization": "ü"},
    ):
        answer = client.get("/v1/model", headers={k: v.encode("latin-1") for k, v in wrong.items()})
        error(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    error(client.get("/metrics"), 401)
    error(client.get("/v1/images/0/picture"), 401)
    assert client.get("/v1/model", headers={"Authorization": "bearer sesame-open"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_hosts(start: Start) -> None:
    client = TestClient(make_app(start(), {"localhost", "[::1]"}))
    for host, status in (("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:80", 200), ("evil.example", 421)):
        assert client.get("/v1/model", headers={"Host": host}).status_code == status


def test_sizes(start: Start) -> None:
    client = TestClient(make_app(start(upload_mb=0.01)))
    answer = client.post("/v1/encode/image", files={"images": bytes(20_000)})
    assert "larger than" in error(answer, 413)
    text = b'{"texts":["' + b"x" * (9 << 20) + b'"]}'
    error(client.post("/v1/encode/text", content=text, headers={"Content-Type": "application/json"}), 413)

    def chunks() -> Any:  # of no declared length
        for _ in range(10):
            yield b"x" * (1 << 20)

    error(client.post("/v1/encode/text", content=chunks(), headers={"Content-Type": "application/json"}), 413)


def test_page_and_headers(start: Start, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><title>hello</title>")
    (tmp_path / "page.js").write_text("1")
    engine = start(token="sesame-open")
    client = TestClient(make_app(engine, page=tmp_path))
    answer = client.get("/")
    assert "hello" in answer.text
    assert answer.headers["content-security-policy"] == POLICY
    assert "http" not in POLICY
    for name, value in (("x-content-type-options", "nosniff"), ("cache-control", "no-cache")):
        assert client.get("/page/page.js").headers[name] == value
    error(client.get("/page/../app.py"), 401)
    error(client.get("/page/%2e%2e/app.py"), 404)
    error(TestClient(make_app(engine, page=tmp_path / "none")).get("/"), 404)


def test_metrics_have_few_names() -> None:
    assert path_name("/v1/images/77/picture") == "/v1/images/{row}/picture"
    assert path_name("/v1/search") == "/v1/search"
    assert {path_name(path) for path in ("/x", "/v1/x", "/v1/search/", "/page")} == {"other"}


def test_the_document_names_every_route(start: Start) -> None:
    app = make_app(start(), page=Path("nowhere"))
    routes = {(r.path, method.lower()) for r in app.routes for method in r.methods - {"HEAD"}}  # type: ignore[attr-defined]
    described = {(path, method) for path, methods in document()["paths"].items() for method in methods}
    assert routes - described == {("/openapi.json", "get"), ("/", "get")}
    assert described <= routes
