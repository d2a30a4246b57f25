"""mlx_fastforward serve: mlx-lm's server, with its flags and a few more."""

import argparse
import logging
import os
import re
import signal
import socket
import sys
import types
import warnings
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, NoReturn, Optional

import typer

from .. import demo, ranks
from ..errors import ConfigError
from .disk_cache import disk_cache
from .errors import fail, one_line_errors, one_process
from .first_use import tune_first
from .models import checked_name
from .outputs import prefill_line
from .speedup import explain, settled

EXAMPLES = """\
Examples:

  mlx_fastforward serve --model mlx-community/Qwen3-4B-4bit
  mlx_fastforward serve --sparsity 0.4 --port 8081

Clients: base URL http://127.0.0.1:8080/v1 (OpenAI), http://127.0.0.1:8080 (Anthropic).
"""


def serve(ctx: typer.Context) -> None:
    """Serve models over HTTP, for editors, agents and web pages."""
    with one_line_errors():
        flags = parser()
        run(flags.parse_args(ctx.args), flags.get_default)


LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Lines that agents put into their system prompts and change every turn.
DROPPED = (
    r"^x-anthropic-billing-header:",
    r"^\s*(<system_warning>)?Token usage: [\d,]+/[\d,]+",
    r"^\s*<(budget:)?token_budget>",
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong as the other commands do."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see mlx_fastforward serve --help.", 2)


class _Built(Exception):
    pass


def their_parser() -> argparse.ArgumentParser:
    """mlx_lm.server's own parser, which it makes inside its main(): a new flag appears by itself."""
    from mlx_lm import server

    from ..server.names import renamed

    class Stopped(Parser):
        def parse_args(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise _Built(self)

    stand_in = types.SimpleNamespace(ArgumentParser=Stopped)
    try:
        renamed(server.main, argparse=stand_in)()
    except _Built as built:
        return built.args[0]
    raise NameError("mlx_lm.server.main no longer parses arguments.")


def parser() -> argparse.ArgumentParser:
    """All flags: mlx-lm's and ours."""
    all_flags = Parser(
        prog="mlx_fastforward serve",
        description=serve.__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_without_help(their_parser())],
        conflict_handler="resolve",
    )
    all_flags.set_defaults(model=str(demo.MODEL))
    group = all_flags.add_argument_group("sparse prefill")
    add = group.add_argument
    add(
        "--sparsity",
        default="auto",
        help="Share of FFN neurons that sparse blocks drop, 0 to below 1; auto: the most that was "
        "verified for this model, 0.5 without such a table",
    )
    add(
        "--predictor",
        help="Trained predictors: folder or repository. Default: those beside the model, else your "
        "newest for it; none for none",
    )
    add(
        "--no-tune", action="store_true", help="Do not measure this device on first use"
    )
    add(
        "--sparse-prefix",
        action="store_true",
        help="Also read system prompt and tools sparsely, which every turn reuses",
    )
    add(
        "--prune-tokens",
        type=float,
        default=0.0,
        help="Share of the tokens between a prompt's ends that skip FFNs, 0 to below 1 (default: 0)",
    )
    add = all_flags.add_argument_group(
        "speculative prefill (approximate: part of the prompt is not read)"
    ).add_argument
    add(
        "--prefill-draft",
        help="Who says which tokens of a long prompt matter: a small model's folder or repository, "
        "'words' of the question, or 'self'. Only those are read; not of requests with tools. "
        "Default: off",
    )
    add(
        "--keep",
        type=float,
        default=0.5,
        help="Share of a long prompt that is read, above 0 to 1 (default: 0.5)",
    )
    add(
        "--prefill-threshold",
        type=int,
        default=8192,
        help="Prompts of fewer new tokens are read whole (default: 8192)",
    )
    add(
        "--heal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Read the rest of the last such prompt while nobody waits (default: on)",
    )
    add(
        "--speedup",
        type=float,
        help="The best combination of --sparsity, --prune-tokens and --keep that eval --save measured "
        "for this model and that makes the FLOPs of a long prompt so many times fewer",
    )
    add = all_flags.add_argument_group("server").add_argument
    add(
        "--api-key",
        default=os.environ.get("MLX_FASTFORWARD_API_KEY"),
        help="Clients must send it (Authorization: Bearer, or x-api-key). Default: the variable "
        "MLX_FASTFORWARD_API_KEY",
    )
    add(
        "--cache-dir",
        type=Path,
        help="Keep prompt caches in this folder, too: they survive a restart. Default: off",
    )
    add(
        "--cache-gb",
        type=float,
        default=10.0,
        help="Size of that folder; the least recently used are deleted (default: 10)",
    )
    add(
        "--drop-line",
        action="append",
        metavar="PATTERN",
        help="Lines of system prompts that match are left out: they change every turn and would "
        "spoil the reuse of what follows. May be repeated; '' for none. Default: billing headers "
        "and token counters of known agents",
    )
    return all_flags


def _without_help(theirs: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser that can be another's parent."""
    action = next(a for a in theirs._actions if a.dest == "help")
    theirs._remove_action(action)
    for name in action.option_strings:
        del theirs._option_string_actions[name]
    return theirs


def run(args: argparse.Namespace, usual: Callable[[str], Any]) -> None:
    """Load and tune, then serve until Ctrl-C; ``usual`` tells a flag's default."""
    args.model = checked_name(args.model)
    chosen = settled(vars(args), lambda name: getattr(args, name) != usual(name))
    vars(args).update(vars(chosen))
    args.drop_line = patterns(args.drop_line)
    check_shared(args)
    from mlx_lm import server

    from ..config import PrefillConfig
    from ..predictors.verified import resolved
    from ..server.generator import Generator
    from ..server.handler import Handler
    from ..server.prompts import PromptCache
    from ..server.provider import Provider
    from .part_read import keep_config, refuse_beside, speculative

    value, _ = resolved(args.sparsity, None)
    PrefillConfig(sparsity=value, prune_tokens=args.prune_tokens)
    keeping = keep_config(args.prefill_draft, args.keep, args.prefill_threshold)
    if keeping is not None:
        refuse_beside(**{"--draft-model": args.draft_model})
    logging.basicConfig(
        level=args.log_level, format="%(asctime)s - %(levelname)s - %(message)s"
    )
    if args.host not in LOOPBACK and not args.api_key:
        logging.warning(
            f"anybody who reaches {args.host}:{args.port} can use this server: set --api-key."
        )
    first = not ranks.rank()
    if first:
        check_free(args.host, args.port)
    # docs/server.md says it; as a warning it looks like a fault
    warnings.filterwarnings("ignore", "mlx_lm.server is not recommended")
    server.maybe_set_recommended_wired_limit()
    tune = tune_for_long_prompts if not args.no_tune else lambda model: None
    reader = lambda net, tok: speculative(net, tok, args.prefill_draft, keeping)
    provider = Provider(args, tune, reader)
    disk = disk_cache(args.cache_dir, args.cache_gb)
    prompts = PromptCache(args.prompt_cache_size, disk, provider.identity)
    generator = Generator(provider, prompts, args.sparse_prefix)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        provider.loaded.wait()
        if provider.failure is not None:
            raise provider.failure
        explain(provider.model, chosen)
        started = lambda port: print(banner(args, provider, port), flush=True)
        if first:
            server._run_http_server(
                args.host, args.port, generator, listening(started), Handler
            )
        else:
            generator.join()
    except KeyboardInterrupt:
        print("mlx_fastforward: stopped.", file=sys.stderr)
    finally:
        generator.stop_and_join()
        if disk is not None:
            disk.jobs.join()
    if generator.failure is not None:
        raise generator.failure


def check_shared(args: argparse.Namespace) -> None:
    """Refuse what several processes cannot do alike."""
    for name in ("adapter_path", "cache_dir", "draft_model", "prefill_draft"):
        if getattr(args, name, None):
            one_process(f"--{name.replace('_', '-')}")


def tune_for_long_prompts(model: Any) -> None:
    """Now, and not in the first request."""
    from ..tokens.plan import CHUNK

    tune_first(model, CHUNK)


def patterns(given: Optional[list[str]]) -> list[str]:
    """The value of --drop-line; raises ConfigError."""
    for pattern in given or []:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"--drop-line {pattern!r} is no pattern: {e}.") from None
    return list(DROPPED) if given is None else [p for p in given if p]


def check_free(host: str, port: int) -> None:
    """Say now, not after loading, that the port is taken."""
    try:
        passive = {"type": socket.SOCK_STREAM, "flags": socket.AI_PASSIVE}
        family, kind, *_ = socket.getaddrinfo(host, port, **passive)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as e:
        fail(f"cannot listen at {host}:{port}: {e.strerror}; try another --port.")


def listening(started: Callable[[int], None]) -> type[ThreadingHTTPServer]:
    """A server class that tells which port it got."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def server_activate(self) -> None:
            super().server_activate()
            started(self.server_address[1])

        def handle_error(self, request: Any, client_address: Any) -> None:
            logging.debug("a connection broke", exc_info=True)

    return Server


def banner(args: argparse.Namespace, provider: Any, port: int) -> str:
    """What runs, and where."""
    from ..attachment import engine_of

    engine = engine_of(provider.model)
    assert engine is not None
    host = f"[{args.host}]" if ":" in args.host else args.host
    lines = [
        "mlx_fastforward serve",
        f"model     {args.model}",
        f"prefill   {prefill_line(engine)}"
        + (f" ({engine.chosen})" if engine.chosen else ""),
        f"url       http://{host}:{port}",
    ]
    if engine.predictor is not None:
        lines.insert(3, f"predictor {engine.predictor}")
    if provider.reader is not None:
        lines.insert(3, f"         {provider.reader.describe()}")
    return "\n".join(lines)
