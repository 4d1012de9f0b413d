"""argv → config → one function. Nothing here imports torch before it is needed."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from litune import arguments
from litune.config import (
    ClassifyConfig,
    Command,
    CompareConfig,
    DedupConfig,
    EmbedConfig,
    EvalConfig,
    ExportConfig,
    FetchConfig,
    FilterConfig,
    ImportConfig,
    InspectConfig,
    OverviewConfig,
    ProbeConfig,
    PushConfig,
    QuickstartConfig,
    SearchConfig,
    ServeConfig,
    TuneConfig,
)
from litune.ending import PATIENCE, explain, fail, leave, own_rank, several_ranks
from litune.errors import ConfigError, LituneError
from litune.show import SHOW

DESCRIPTION = """Give any image model a language.

litune locks an image tower that already sees well, teaches a text tower to read it, and from then on classifies
and searches images by free-form text (locked-image tuning, LiT). The whole way on real data, then on your own:"""

# Each command's config and where its function is; a name of two words is a command of a group.
COMMANDS: dict[str, tuple[type[Any], str]] = {
    "quickstart": (QuickstartConfig, "litune.studies.quickstart:quickstart"),
    "embed": (EmbedConfig, "litune.store.embed:embed"),
    "tune": (TuneConfig, "litune.tuning.tune:tune"),
    "eval": (EvalConfig, "litune.evaluation.evaluate:evaluate"),
    "compare": (CompareConfig, "litune.studies.compare:compare"),
    "classify": (ClassifyConfig, "litune.evaluation.classify:classify"),
    "search": (SearchConfig, "litune.index.search:search"),
    "serve": (ServeConfig, "litune.serve.serve:serve"),
    "inspect": (InspectConfig, "litune.studies.inspect:inspect"),
    "probe": (ProbeConfig, "litune.studies.probe:probe"),
    "import": (ImportConfig, "litune.interop.import_:import_"),
    "export": (ExportConfig, "litune.interop.export:export"),
    "push": (PushConfig, "litune.interop.push:push"),
    "data inspect": (OverviewConfig, "litune.curation.inspect:inspect_data"),
    "data fetch": (FetchConfig, "litune.curation.fetch:fetch_data"),
    "data filter": (FilterConfig, "litune.curation.filter:filter_data"),
    "data dedup": (DedupConfig, "litune.curation.dedup:dedup_data"),
}
FIRST_STEPS = tuple(arguments.EXAMPLES[name] for name in ("quickstart", "embed", "tune", "search"))
GROUPS = {"data": "Look at pairs, fetch them, filter them, and remove near-duplicates."}

# Those that several processes do together, under torchrun.
ON_RANKS = (EmbedConfig, TuneConfig, EvalConfig)


def parse(argv: Sequence[str]) -> Any:
    """The config that the command line asks for; prints help and exits where that is asked for.

    Raises `ConfigError` with what can't be read.
    """
    commands = {name: config for name, (config, _) in COMMANDS.items()}
    group = argv[0] if argv and argv[0] in GROUPS else ""
    if list(argv[bool(group) :]) in ([], ["-h"], ["--help"]):
        names = arguments.names_under(group, commands, GROUPS)
        print(arguments.listing(group, GROUPS.get(group, DESCRIPTION), names, () if group else FIRST_STEPS))
        sys.exit(0)
    name, rest = arguments.find(argv, commands, GROUPS)
    return arguments.read(name, commands[name], rest)


def find_command(config: Any) -> Command[..., Any, Any]:
    """The command whose config this is."""
    place = next(where for kind, where in COMMANDS.values() if kind is type(config))
    module, _, name = place.partition(":")
    found: Command[..., Any, Any] = getattr(importlib.import_module(module), name)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and one line on bad input, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a letter shows a question mark
    if list(argv) in (["--version"], ["-V"]):
        from litune import __version__

        print(f"litune {__version__}")
        return
    try:
        config = parse_on_ranks(argv)
        quiet_libraries()
        result = find_command(config).run(config)
        if several_ranks():
            importlib.import_module("litune.distributed").stop()
        show = SHOW.get(type(config))
        if show is not None and own_rank() == 0:
            show(config, result)
    except LituneError as why:
        fail(str(why))
    except KeyboardInterrupt:
        line = "litune: interrupted; the same command goes on where it was" if own_rank() == 0 else ""
        leave(line, "interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as why:
        if why.errno is None:
            raise
        fail(explain(why))
    except RuntimeError as why:
        if type(why).__name__ != "OutOfMemoryError":  # torch's: it is not imported here
            raise
        fail("the GPU's memory is too small for this model: end what else is on the GPU, or give --device cpu")


def parse_on_ranks(argv: Sequence[str]) -> Any:
    """The config, as `parse`; of several processes, one complains of what can't be read."""
    if own_rank() == 0:
        config = parse(argv)
    else:
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                config = parse(argv)
        except SystemExit:
            time.sleep(PATIENCE)
            raise
    if several_ranks() and not isinstance(config, ON_RANKS):
        raise ConfigError("embed, tune and eval alone run on several processes: start this one without torchrun")
    return config


def quiet_libraries() -> None:
    """Keep the hub's library from drawing bars of its own, and the tokenizers' from asking about forks."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
