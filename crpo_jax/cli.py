"""The command line that all commands share: flags, settings, --help, exit codes. No jax."""

import argparse
import sys
import typing
from pathlib import Path
from typing import Any, Literal

from crpo_jax.config import Config, default_config, leaves, load, type_name
from crpo_jax.errors import InputError


def settings_help() -> str:
    """Every setting with its default, unit and source, for `--help`."""
    lines = ["settings, given as section.key=value (default; unit; source):"]
    for key, (kind, default, meta) in leaves().items():
        shown = list(default) if isinstance(default, tuple) else default
        choices = f"; {type_name(kind)}" if typing.get_origin(kind) is Literal else ""
        unit = f"; {meta['unit']}" if meta["unit"] else ""
        lines.append(f"  {key}\n      {meta['doc']} (default {shown!r}{choices}{unit}; {meta['source']})")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2, and that takes settings before, between and after the flags."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (overloads)
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(command: str, doc: str) -> Parser:
    """The arguments every command shares; the command adds its own."""
    p = Parser(
        prog=f"python -m crpo_jax.{command}",
        description=doc,
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", metavar="FILE", help="YAML settings; see configs/")
    p.add_argument("--mesh", metavar="DxM", help="data x model, in devices, such as 8x1 (sets parallel.mesh)")
    p.add_argument(
        "--workdir", metavar="DIR", help="where the run keeps everything; started again with the same one, it resumes"
    )
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return p


def from_arguments(args: argparse.Namespace, default: Path | None = None, model: bool = True) -> Config:
    """The config a command line asks for."""
    overrides = list(args.overrides) + ([f"parallel.mesh={args.mesh}"] if args.mesh else [])
    return load(args.config or default, overrides, model)


def for_platform(args: argparse.Namespace, platform: str) -> tuple[Config, str]:
    """The config a command line asks for, or the platform's default, and its name; says which default it took."""
    path = Path(args.config) if args.config else default_config(platform)
    settings = from_arguments(args, path)
    if not args.config:
        print(f"no --config given: {path.name}, the default on {platform}", file=sys.stderr)
    return settings, path.stem


def run_command(name: str, main: typing.Callable[[], None]) -> typing.NoReturn:
    """Runs a command's main: bad input is one line on standard error and exit code 2, an interrupt is exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"crpo_jax.{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"crpo_jax.{name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)
