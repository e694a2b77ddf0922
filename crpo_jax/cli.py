"""The command line that all commands share: flags, settings, --help, exit codes. No jax."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from crpo_jax.config import Config, closest_settings, default_config_path, find_setting, load_config, setting_fields
from crpo_jax.disk import local_path
from crpo_jax.errors import Fault, InputError

MODEL = ("model", "tokenizer", "parallel")
SECTIONS = {
    "train": (*MODEL, "data", "rollout", "reward", "crpo", "optimizer", "lora", "sft", "run"),
    "sft": (*MODEL, "data", "rollout", "sft", "run"),
    "evaluate": (*MODEL, "data", "rollout", "reward", "evaluate", "judge", "run"),
    "plan": (*MODEL, "data", "rollout", "crpo", "optimizer", "lora"),
    "distill": ("data", "reward", "distill", "run"),
    "score": ("rollout", "reward"),
    "export": (*MODEL, "lora", "sft", "run"),
}
"""The sections of settings that each command reads, and lists with --help."""


def settings_help(command: str, settings: Config, source: str, word: str = "") -> str:
    """The command's settings, or those with `word` in their name or description: their values in `settings`, which come
    from `source`, legal values, units and sources."""
    lines = [f"settings, given as section.key=value (default{source}; legal values; unit; source):"]
    for key, item in setting_fields().items():
        if key.split(".")[0] in SECTIONS[command] and word.lower() in f"{key} {item.doc}".lower():
            value = attrgetter(key)(settings)
            default = f"default {list(value) if isinstance(value, tuple) else value!r}"
            facts = "; ".join(filter(None, [default, item.legal, item.unit, item.source]))
            lines.append(f"  {key}\n      {item.doc} ({facts})")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """Takes settings before, between and after the flags, in any common spelling; a usage error is one line and exit
    code 2."""

    def __init__(self, command: str, doc: str, default: Callable[[str], Path | None]) -> None:
        super().__init__(
            prog=f"python -m crpo_jax.{command}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        self._command, self._default = command, default

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (overloads)
        return self.parse_intermixed_args(args, namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (overloads)
        words = self._spell_settings(sys.argv[1:] if args is None else args)
        if "--help" in words:
            print(self._help(words))
            self.exit(0)
        return super().parse_intermixed_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def _spell_settings(self, words: Sequence[str]) -> list[str]:
        """The words with settings as key=value, for which --key=value, --key value and key value are taken too."""
        settings, flags, rest, spelled = setting_fields(), self._option_string_actions, list(words), list[str]()
        while rest:
            word = rest.pop(0)
            flag, equals, value = word.partition("=")
            key = flag.lstrip("-").replace("-", "_") if flag.startswith("-") else flag
            if name := find_setting(key):
                if not equals and (not rest or not re.match(r"[^-]|-\.?\d|$", rest[0]) or self._is_setting(rest[0])):
                    value = "VALUE" if settings[name].default == {} else settings[name].default
                    raise InputError(f"{word}: expected section.key=value, such as {key}={value}")
                spelled.append(f"{key}={value if equals else rest.pop(0)}")
                continue
            if flag == "-h" or (len(flag) > 3 and "--help".startswith(flag)):
                spelled += ["--help", *([value] if value else [])]
                if not equals and rest and rest[0] in settings:  # a word to look for, not a setting without a value
                    spelled.append(rest.pop(0))
                continue
            if re.match(r"--?[A-Za-z]", flag) and not any(known.startswith(flag) for known in flags):
                close = difflib.get_close_matches(flag, flags, n=1, cutoff=0.8)
                close = close or [f"{name}=VALUE" for name in closest_settings(key, SECTIONS[self._command])]
                if close:
                    raise InputError(f"{flag}: no such flag or setting; did you mean {' or '.join(close)}?")
            spelled.append(word)
        return spelled

    def _is_setting(self, word: str) -> bool:
        return find_setting(word.partition("=")[0]) is not None

    def _help(self, words: list[str]) -> str:
        """Flags and settings, or after --help WORD the settings that WORD finds, with the defaults of the config that
        the other words choose."""
        after = "".join(words[words.index("--help") + 1 :][:1])
        word = after if re.match(r"[^-=][^=]*$", after) else ""
        chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chosen.add_argument("--config", action="append")
        chosen.add_argument("--model")
        args, others = chosen.parse_known_args(words)
        overrides = [other for other in others if self._is_setting(other) and "=" in other]
        default = self._default(args.model or given_model(overrides))
        files = args.config or ([default] if default else [])
        source = f" in {' and '.join(Path(file).name for file in files)}" if files else ""
        text = settings_help(self._command, load_config(files, overrides, model=False), source, word)
        if not word:
            return f"{self.format_help()}\n{text}"
        return text if "\n" in text else f"no setting of {self._command} has {word!r} in its name or description"


def build_parser(command: str, doc: str, default: Callable[[str], Path | None] = lambda model: None) -> Parser:
    """A parser with the arguments that every command has; the command adds its own.

    `default` gives the config of a command without --config, by the model it is given.
    """
    p = Parser(command, doc, default)
    p.add_argument("-h", "--help", nargs="?", metavar="WORD", help="this text, or the settings that are about WORD")
    p.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML settings, or the name of a shipped config, such as tiny; given again: a further file, which "
        "replaces what it names",
    )
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


def given_model(overrides: Sequence[str]) -> str:
    """The last model.path among settings; empty where none is given."""
    return next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("model.path=")), "")


def load_settings(args: argparse.Namespace, default: Path | None = None, model: bool = True) -> Config:
    """The config of the --config files, or of `default`, with the command line's settings."""
    overrides = [*args.overrides, *([f"parallel.mesh={args.mesh}"] if args.mesh else [])]
    return load_config(args.config or default, overrides, model)


def load_platform_settings(args: argparse.Namespace, platform: str) -> tuple[Config, str]:
    """The config of the --config files, or of the default for model and platform with a notice, and its name."""
    model = given_model(args.overrides)
    default = default_config_path(platform, model)
    settings = load_settings(args, default)
    if not args.config:
        reason = f"for model.path={model}" if model else f"the default on {platform}"
        print(f"no --config given: {default.name}, {reason}", file=sys.stderr)
    return settings, "-".join(Path(name).stem for name in args.config or [default])


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
