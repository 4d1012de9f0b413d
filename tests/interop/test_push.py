"""`litune push` against a local endpoint that speaks the hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from litune.errors import ConfigError, ExportError, RunError
from litune.interop.push import push


class Hub(ThreadingHTTPServer):
    """Keeps what is pushed: repositories with their settings, and files by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.card = ""
        self.tokens: set[str | None] = set()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        hub, path, body = self.server, self.path.partition("?")[0], self.body()
        hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo == "others/run":
                return self.answer({"error": "You don't have the rights to create a model under others"}, 403)
            hub.repos[repo] = asked
            return self.answer({"url": f"{hub.address}/{repo}", "name": repo, "id": "1"})
        if path == "/api/validate-yaml":
            hub.card = json.loads(body)["content"]
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > 2000 else "regular", "shouldIgnore": False}
                for f in asked
            ]
            return self.answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            found = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": found})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            url = f"{hub.address}/me/x/commit/{'0' * 40}"
            return self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        return self.answer({"error": f"not known: {path}"}, 404)

    def do_PUT(self) -> None:
        body = self.body()
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def do_GET(self) -> None:
        repo = "/".join(self.path.split("/")[3:5])
        if repo in self.server.repos:
            self.answer({"id": repo, "sha": "0" * 40, "siblings": []})
        else:
            self.answer({"error": "Repository not found"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "best").mkdir(parents=True)
    manifest = {"complete": True, "text_tower": "minilm", "model": {}, "held_out": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps({"store": "s", "text_tower": "minilm", "batch_size": 2}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    (folder / "best" / "model.safetensors").write_bytes(b"no")
    (folder / ".x.tmp").write_bytes(b"no")
    return folder


# The hub's library hands its HTTP library an argument that is going away.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_every_file_arrives(hub: Hub, run: Path) -> None:
    assert push(run, "me/run", endpoint=hub.address, private=True) == f"{hub.address}/me/run"
    asked = hub.repos["me/run"]
    assert asked.get("private") is True or asked.get("visibility") == "private", asked
    assert set(hub.files) == {"README.md", "config.json", "manifest.json", "model.safetensors"}
    for name, found in hub.files.items():
        assert found == (run / name).read_bytes(), name
    assert hub.files["README.md"].startswith(b"---\nlibrary_name: litune\n")
    assert hub.card == hub.files["README.md"].decode(), "the hub was asked whether the card is valid"
    assert hub.tokens == {"Bearer hf_test"}


def test_an_export_names_its_new_place(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "litune.json").write_text('{"complete": true}')
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "context_length": 16}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    push(folder, "me/x", endpoint=hub.address)
    found = json.loads(hub.files["open_clip_config.json"])["model_cfg"]["text_cfg"]
    assert found == {"hf_model_name": "me/x", "hf_tokenizer_name": "me/x", "context_length": 16}
    (folder / "litune.json").write_text('{"complete": false}')
    with pytest.raises(ExportError, match="was interrupted"):
        push(folder, "me/x", endpoint=hub.address)


def test_refusals_are_one_line(hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="others/run can't be pushed to .*403"):
        push(run, "others/run", endpoint=hub.address)
    with pytest.raises(ConfigError, match="can't be pushed"):
        push(run, "no such//name", endpoint=hub.address)
    with pytest.raises(ConfigError, match="can't be pushed to http://127.0.0.1:9"):
        push(run, "me/run", endpoint="http://127.0.0.1:9")
    with pytest.raises(RunError, match="no finished run or export"):
        push(tmp_path / "nothing", "me/run", endpoint=hub.address)
    hub.files.clear()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="hf auth login"):
        push(run, "me/run", endpoint=hub.address)
    assert not hub.files
