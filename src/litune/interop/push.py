"""A run folder, or an export of one → a repository on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from litune.config import PushConfig, command
from litune.errors import ConfigError, ExportError, RunError
from litune.files import read_json
from litune.interop.export import ABOUT
from litune.model.card import write_card
from litune.model.run_folder import CONFIG, MANIFEST, STATE
from litune.progress import say

OPEN_CLIP = "open_clip_config.json"


@command(PushConfig)
def push(config: PushConfig) -> str:
    """Upload a run folder or an export to a repository, created if need be; returns the repository's address.

    Raises `RunError` where the folder is neither of them or unfinished,
    `ConfigError` without a token or where the hub refuses.
    """
    check_finished(config.run)
    if (config.run / MANIFEST).is_file():
        write_card(config.run)
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise ConfigError("no token for the hub: run  hf auth login  once, or set HF_TOKEN")
    api = HfApi(endpoint=config.endpoint)
    files = [p for p in sorted(config.run.rglob("*")) if p.is_file() and wanted(p.relative_to(config.run))]
    operations = [CommitOperationAdd(p.relative_to(config.run).as_posix(), content(p, config.repo)) for p in files]
    size = sum(p.stat().st_size for p in files)
    say(f"uploading {len(files)} files, {size / 1e6:,.1f} MB, to {config.repo}")
    try:
        made = api.create_repo(config.repo, private=config.private, exist_ok=True)
        api.create_commit(made.repo_id, operations, commit_message=f"{config.run.resolve().name}, by litune")
    except Exception as why:  # the hub's errors, and those of its HTTP library, which differs from version to version
        lines = [line.strip() for line in str(why).splitlines() if line.strip()]
        reason = "; ".join(lines)[:300] or type(why).__name__
        raise ConfigError(f"{config.repo} can't be pushed to {api.endpoint}: {reason}") from None
    say(f"pushed to {made}")
    return str(made)


def check_finished(folder: Path) -> None:
    """Raise `RunError` or `ExportError` where a folder is not a finished run or export."""
    if (folder / MANIFEST).is_file():
        return
    if (folder / ABOUT).is_file():
        if not read_json(folder / ABOUT, ExportError).get("complete"):
            raise ExportError(f"{folder} is an export that was interrupted: export it again")
        return
    unfinished = "tuning has not finished: run the same litune tune again" if (folder / CONFIG).exists() else ""
    raise RunError(f"{folder} is no finished run or export: {unfinished or 'make one with litune tune'}")


def wanted(path: Path) -> bool:
    """Whether a file of the folder is uploaded: not temporary files, checkpoints or a second model."""
    return path.name != STATE and not path.name.endswith(".tmp") and path.parts[0] not in ("best", "tensorboard")


def content(file: Path, repo: str) -> Any:
    """What to upload for a file: itself, except open_clip's config, which names where it is loaded from."""
    if file.name != OPEN_CLIP:
        return str(file)
    settings = json.loads(file.read_text(encoding="utf-8"))
    text = settings["model_cfg"]["text_cfg"]
    for name in ("hf_model_name", "hf_tokenizer_name"):
        if name in text:
            text[name] = repo
    return json.dumps(settings, indent=2).encode()
