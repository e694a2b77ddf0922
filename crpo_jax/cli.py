"""The command line that all commands share: flags, settings, --help, exit codes. No jax."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from crpo_jax.config import Config, default_config_path, load_config, setting_fields
from crpo_jax.disk import local_path
from crpo_jax.errors import Fault, InputError


def settings_help() -> str:
    """Every setting with its default, legal values, unit and source, for `--help`."""
    lines = ["settings, given as section.key=value (default; legal values; unit; source):"]
    for key, item in setting_fields().items():
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        facts = [f"default {default!r}", item.legal, item.unit, item.source]
        lines.append(f"  {key}\n      {item.doc} ({'; '.join(filter(None, facts))})")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """Takes settings before, between and after the flags; a usage error is one line and exit code 2."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (overloads)
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser(command: str, doc: str) -> Parser:
    """A parser with the arguments that every command has; the command adds its own."""
    p = Parser(
        prog=f"python -m crpo_jax.{command}",
        description=doc,
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", metavar="FILE", help="YAML settings; see configs/")
    p.add_argument("--mesh", metavar="DxM", help="data x model, in devices, such as 8x1 (sets parallel.mesh)")
    p.add_argument(
        "--workdir",
        metavar="DIR",
        type=path_of("--workdir"),
        help="folder of the run; started again in it, a run resumes",
    )
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return p


def path_of(flag: str) -> Callable[[str], str]:
    """The type of a flag that names what is to be written: a local path, with ~ expanded also after `--flag=`."""
    return lambda text: str(local_path(flag, text))


def load_settings(args: argparse.Namespace, default: Path | None = None, model: bool = True) -> Config:
    """The config of --config, or of `default`, with the command line's settings."""
    overrides = [*args.overrides, *([f"parallel.mesh={args.mesh}"] if args.mesh else [])]
    return load_config(args.config or default, overrides, model)


def load_platform_settings(args: argparse.Namespace, platform: str) -> tuple[Config, str]:
    """The config of --config, or of the platform's default with a notice, and the config's name."""
    path = Path(args.config) if args.config else default_config_path(platform)
    settings = load_settings(args, path)
    if not args.config:
        print(f"no --config given: {path.name}, the default on {platform}", file=sys.stderr)
    return settings, path.stem


def run_command(name: str, main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and exits with what `main` returns, 0 for None.

    Bad input (exit code 2), a Fault (1) and an interrupt (130) are one line on standard error.
    """

    def fail(problem: object, code: int) -> NoReturn:
        print(f"crpo_jax.{name}: {problem}", file=sys.stderr)
        raise SystemExit(code) from None

    try:
        raise SystemExit(main() or 0)
    except InputError as error:
        fail(error, 2)
    except Fault as fault:
        fail(f"stopped: {fault}", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
