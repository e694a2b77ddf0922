"""Every setting once: what loads, what is refused and with which line, and the command line around it."""

import dataclasses
import functools
import itertools
import operator
import pickle
import re
import shutil
import typing
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from crpo_jax import cli, config
from crpo_jax.config import Config, Lora, load_config
from crpo_jax.errors import Fault, InputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FROM_SCRATCH = ("tokenizer.path=somewhere",)
"""What the defaults lack: a model from model.shape brings no tokenizer."""


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    """The line that refuses this input."""
    with pytest.raises(InputError) as error:
        load_config(path, overrides)
    line = str(error.value)
    assert "\n" not in line
    return line


# --- what loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs(path: Path):
    """Each file loads whole, and every key written in it arrives in the config."""
    loaded = load_config(path)

    def arrived(values: dict[str, typing.Any], prefix: str = "") -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                arrived(value, f"{prefix}{name}.")
            else:
                setting = attrgetter(prefix + name)(loaded)
                assert (list(setting) if isinstance(setting, tuple) else setting) == pytest.approx(value), prefix + name

    arrived(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_there_are_shipped_configs():
    assert {"tiny.yaml", "arithmetic.yaml", "clinical_r1_3b.yaml"} <= {path.name for path in CONFIGS}
    assert config.config_folder() == CONFIGS[0].parent
    assert config.default_config_path("cpu").name == "tiny.yaml"
    assert config.default_config_path("gpu").name == config.default_config_path("tpu").name == "clinical_r1_3b.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_dump_then_load_is_the_same_config(path: Path, tmp_path: Path):
    """A resumed run is compared with the config that its workdir keeps: floats and tuples come back exactly."""
    overrides = (
        "optimizer.learning_rate=1.2345678901234567e-7",
        "rollout.stop=['<a>', '§']",
        "data.system_prompt=a: 'b'\\n #c",
        "data.split=017",
    )
    changed = load_config(path, overrides)
    assert load_config(written(tmp_path, config.dump_config(changed))) == changed
    assert config.changed_settings(changed, load_config(written(tmp_path, config.dump_config(changed)))) == []


def test_dump_says_every_setting():
    settings = load_config(None, FROM_SCRATCH)
    written_settings = yaml.safe_load(config.dump_config(settings))
    assert set(written_settings) == {field.name for field in dataclasses.fields(Config)}
    for key in config.setting_fields():
        value = attrgetter(key)(settings)
        written_value = functools.reduce(operator.getitem, key.split("."), written_settings)
        assert written_value == (list(value) if isinstance(value, tuple) else value), key


def test_an_empty_file_and_empty_sections_are_the_defaults(tmp_path: Path):
    assert load_config(written(tmp_path, ""), FROM_SCRATCH) == load_config(None, FROM_SCRATCH)
    assert load_config(written(tmp_path, "crpo:\nmodel:\n"), FROM_SCRATCH) == load_config(None, FROM_SCRATCH)


def test_a_file_changes_only_what_it_names(tmp_path: Path):
    """Sections with defaults of their own keep them: sft.optimizer.learning_rate is not optimizer's."""
    loaded = load_config(written(tmp_path, "sft:\n  optimizer: {warmup_steps: 3}\n"), FROM_SCRATCH)
    assert loaded.sft.optimizer.warmup_steps == 3
    assert (
        loaded.sft.optimizer.learning_rate == Config().sft.optimizer.learning_rate != Config().optimizer.learning_rate
    )
    assert config.changed_settings(load_config(None, FROM_SCRATCH), loaded) == ["sft.optimizer.warmup_steps: 0 -> 3"]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=1e-6", 1e-6),  # YAML 1.1 reads it as a string
        ("optimizer.learning_rate=1.0e-6", 1e-6),
        ("optimizer.learning_rate=2", 2.0),
        ("optimizer.eps=.5", 0.5),
        ("reward.time_limit=1_0.5", 10.5),
        ("crpo.steps=80", 80),
        ("parallel.remat=false", False),
        ("parallel.remat=True", True),
        ("parallel.remat=off", False),
        ("rollout.stop=[<|im_end|>]", ("<|im_end|>",)),
        ('rollout.stop=["<a>", "b, c"]', ("<a>", "b, c")),
        ("rollout.stop=[]", ()),
        ("data.path=", ""),
        ("data.path=/a=b", "/a=b"),  # only the first = parts key and value
        ("data.path=012", "012"),  # a string stays as typed
        ("data.path=true", "true"),
        ("data.system_prompt='quoted'", "'quoted'"),
        ("data.system_prompt=a: b # c", "a: b # c"),
        ("parallel.mesh=8x1", "8x1"),
        ("parallel.layout=fsdp", "fsdp"),
        ("reward.cross_reference.min_cited_share=1", 1.0),
        ("model.shape.vocab_size=7", 7),
    ],
)
def test_overrides(override: str, value: object):
    key = override.partition("=")[0]
    setting = attrgetter(key)(load_config(None, (*FROM_SCRATCH, override)))
    assert (setting, type(setting)) == (value, type(value))


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path: Path):
    path = written(tmp_path, "crpo: {steps: 1, epochs: 7}\n")
    loaded = load_config(path, (*FROM_SCRATCH, "crpo.steps=2", "crpo.steps=3"))
    assert (loaded.crpo.steps, loaded.crpo.epochs) == (3, 7)


def test_replaced():
    """By dotted keys of any depth, with the checks of an override; the settings themselves stay as they are."""
    settings = load_config(None, FROM_SCRATCH)
    other = config.replaced(settings, {"crpo.steps": 3, "run.limits.kl": 2, "rollout.stop": ("<a>",), "crpo.epochs": 7})
    assert (other.crpo.steps, other.crpo.epochs, other.run.limits.kl, other.rollout.stop) == (3, 7, 2.0, ("<a>",))
    assert other == load_config(
        None, (*FROM_SCRATCH, "crpo.steps=3", "run.limits.kl=2", "rollout.stop=[<a>]", "crpo.epochs=7")
    )
    assert settings == load_config(None, FROM_SCRATCH) != other
    for values, line in (
        ({"crpo.step": 3}, "override: crpo.step: unknown key; did you mean crpo.steps?"),
        ({"crpo.steps": -1}, "override: crpo.steps: expected a whole number >= 0, got -1"),
    ):
        with pytest.raises(InputError, match=re.escape(line)):
            config.replaced(settings, values)


def test_sections_are_plain_values():
    """They compare, hash, pickle and replace like the dataclasses they are, and check what they are built from."""
    lora = Lora(rank=3)
    assert lora == Lora(3) == dataclasses.replace(Lora(), rank=3) == pickle.loads(pickle.dumps(lora))  # noqa: S301
    assert hash(Config()) == hash(load_config(None, (), model=False))
    with pytest.raises(dataclasses.FrozenInstanceError):
        lora.rank = 4  # pyright: ignore[reportAttributeAccessIssue]
    for values in ({"rank": -1}, {"rank": 1.5}, {"alpha": float("nan")}, {"ranks": 3}):
        with pytest.raises(ValidationError):
            Lora(**values)


def test_a_command_without_a_model_needs_no_tokenizer():
    assert load_config(None, (), model=False) == Config()
    assert load_config(None, ("model.shape.num_attention_heads=3",), model=False).model.shape.num_attention_heads == 3


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_FILES = [
    ("crpo: {stepz: 1}", "FILE: crpo.stepz: unknown key; did you mean crpo.steps? The legal keys here: steps, epochs,"),
    (
        "reward: {cross_reference: {min_term: 1}}",
        "FILE: reward.cross_reference.min_term: unknown key; did you mean reward.cross_reference.min_terms?",
    ),
    ("zzz: 1", "FILE: zzz: unknown key; the legal keys here: model, tokenizer, data,"),
    ("1: 2", "FILE: 1: unknown key"),
    ("[1, 2]", "FILE: the file: expected a mapping of settings, got [1, 2]"),
    ("just text", "FILE: the file: expected a mapping of settings, got 'just text'"),
    ("crpo: 3", "FILE: crpo: expected a mapping of settings, got 3"),
    ("crpo: [steps]", "FILE: crpo: expected a mapping of settings, got ['steps']"),
    ("crpo: {steps: 1.5}", "FILE: crpo.steps: expected a whole number >= 0, got 1.5"),
    ("crpo: {steps: true}", "FILE: crpo.steps: expected a whole number >= 0, got True"),
    ("crpo: {steps: '3'}", "FILE: crpo.steps: expected a whole number >= 0, got '3'"),
    ("crpo: {steps:}", "FILE: crpo.steps: expected a whole number >= 0, got None"),
    ("crpo: {kl_coef: true}", "FILE: crpo.kl_coef: expected a number >= 0, got True"),
    ("crpo: {kl_coef: small}", "FILE: crpo.kl_coef: expected a number >= 0, got 'small'"),
    ("crpo: {kl_coef: .nan}", "FILE: crpo.kl_coef: expected a number >= 0, got nan"),
    ("crpo: {kl_coef: .inf}", "FILE: crpo.kl_coef: expected a number >= 0, got inf"),
    ("parallel: {remat: 1}", "FILE: parallel.remat: expected true or false, got 1"),
    ("parallel: {attention: fast}", "FILE: parallel.attention: expected auto | xla | cudnn | splash, got 'fast'"),
    ("parallel: {attention: [xla]}", "FILE: parallel.attention: expected auto | xla | cudnn | splash, got ['xla']"),
    ("data: {path: 3}", "FILE: data.path: expected a string, got 3"),
    ("data: {eval_split: no}", "FILE: data.eval_split: expected a string, got False"),  # YAML 1.1's booleans
    ("rollout: {stop: <|im_end|>}", "FILE: rollout.stop: expected a list of strings, got '<|im_end|>'"),
    ("rollout: {stop: [1]}", "FILE: rollout.stop: expected a list of strings, got [1]"),
    ("rollout: {top_p: 1.5}", "FILE: rollout.top_p: expected a number > 0 and <= 1, got 1.5"),
    ("rollout: {temperature: -1}", "FILE: rollout.temperature: expected a number >= 0, got -1"),
    ("crpo: {group_size: 1}", "FILE: crpo.group_size: expected a whole number >= 2, got 1"),
    ("sft: {held_out: 0.95}", "FILE: sft.held_out: expected a number >= 0 and <= 0.9, got 0.95"),
    ("crpo:\n  steps: 1\n  epochs: 2\n  steps: 3\n", "FILE:4: steps: written twice, first in line 2"),
    ("crpo: {steps: 1}\nrun: {seed: 1}\ncrpo: {epochs: 1}\n", "FILE:3: crpo: written twice, first in line 1"),
    ("crpo:\n  steps: [1\n", "FILE:3: not valid YAML: "),
    ("crpo:\n\tsteps: 1\n", "FILE:2: not valid YAML: "),
    ("run: !!python/object/apply:os.getcwd []", "FILE:1: not valid YAML: "),
    ("run: {seed: 2001-99-99}", "FILE: not valid YAML: month must be in 1..12"),
    ("run: !!int x", "FILE: not valid YAML: invalid literal for int()"),
    ("run: {seed: \0}", "FILE: not valid YAML: unacceptable character #x0000"),
    ("? [crpo]\n: 1", "FILE:1: not valid YAML: found unhashable key"),
    ("? {crpo: 1}\n: 1", "FILE:1: not valid YAML: found unhashable key"),
    (
        "crpo: {kl_coef: 1" + "0" * 400 + "}",
        "FILE: crpo.kl_coef: expected a number >= 0, got a whole number of 1329 bits",
    ),
    (
        "run: {seed: 18446744073709551616}",
        "FILE: run.seed: expected a whole number >= 0 and <= 9223372036854775807, got 18446744073709551616",
    ),
    ("run: {seed: -1}", "FILE: run.seed: expected a whole number >= 0 and <= 9223372036854775807, got -1"),
    (
        "run: {seed: 0x" + "f" * 5000 + "}",
        "FILE: run.seed: expected a whole number >= 0 and <= 9223372036854775807, got a whole number of 20000 bits",
    ),
    ("crpo: {steps: 2147483648}", "FILE: crpo.steps: expected at most 2147483647, got 2147483648"),
    ("crpo:\n  steps: 010\n", "FILE:2: expected a plain decimal number, got '010'"),
    ("crpo: {steps: 1:30}", "FILE:1: expected a plain decimal number, got '1:30'"),
    ("reward: {time_limit: 1:30.5}", "FILE:1: expected a plain decimal number, got '1:30.5'"),
    ("crpo: &a {steps: 1}\nrun:\n  <<: *a\n", "FILE:3: <<: expected every setting written out, got a merge key"),
    (
        "crpo: &a\n  steps: *a\n",
        "FILE: crpo.steps: expected a whole number >= 0, got {'steps': {'steps': {'steps': {...}}}}",
    ),
    ("crpo: {steps: 1}\n---\ncrpo: {steps: 2}\n", "FILE:2: not valid YAML: but found another document"),
    (
        'data: {path: "a\\0b"}',
        "FILE: data.path: expected text that a file can hold, without NUL and lone surrogates, got 'a\\x00b'",
    ),
    (
        'rollout: {stop: ["\\ud800"]}',
        "FILE: rollout.stop: expected text that a file can hold, without NUL and lone surrogates, got ['\\ud800']",
    ),
    ("{a: " * 2000 + "}" * 2000, "FILE: expected settings by section, got lists or mappings nested too deeply"),
    ("crpo: {steps: " + "x" * 5000 + "}", "FILE: crpo.steps: expected a whole number >= 0, got 'xxxxxx"),
    ('"a\\e[2Jb": 1', "FILE: a\\x1b[2Jb: unknown key"),
    ("#" + "x" * 1_000_000, "--config FILE: expected at most 1,000,000 characters of settings, got more"),
    ("optimizer: {beta1: 1}", "FILE: optimizer.beta1: expected a number >= 0 and < 1, got 1"),
    ("sft: {optimizer: {beta2: 1}}", "FILE: sft.optimizer.beta2: expected a number >= 0 and < 1, got 1"),
    ("optimizer: {eps: 0}", "FILE: optimizer.eps: expected a number > 0, got 0"),
    (
        "crpo: {mini_batch_prompts: 7}",
        "crpo.mini_batch_prompts: expected a divisor of crpo.prompts_per_step=512, got 7",
    ),
    ("reward: {design: grpo, tags: [think]}", "reward.tags: expected two tags, got ['think']"),
    ("rollout: {top_p: 0}", "FILE: rollout.top_p: expected a number > 0 and <= 1, got 0"),
    ("evaluate: {top_p: 0}", "FILE: evaluate.top_p: expected a number > 0 and <= 1, got 0"),
    (
        "model: {shape: {num_attention_heads: 3}}",
        "model.shape.hidden_size: expected a multiple of num_attention_heads=3, got 128",
    ),
    (
        "model: {shape: {num_key_value_heads: 3}}",
        "model.shape.num_attention_heads: expected a multiple of num_key_value_heads=3, got 4",
    ),
    ("{}", "tokenizer.path: expected a folder, since model.path is empty and brings none"),
]


@pytest.mark.parametrize(("text", "line"), BAD_FILES)
def test_bad_files(text: str, line: str, tmp_path: Path):
    path = written(tmp_path, text)
    assert refusal(path).startswith(line.replace("FILE", str(path)))


BAD_OVERRIDES = [
    ("crpo.steps", "crpo.steps: expected section.key=value"),
    ("crpo.stepz=1", "override: crpo.stepz: unknown key; did you mean crpo.steps? The legal keys here: steps, epochs,"),
    ("cpro.steps=1", "override: cpro: unknown key; did you mean crpo? The legal keys here: model, tokenizer,"),
    ("qqqqqq=1", "override: qqqqqq: unknown key; the legal keys here: model, tokenizer, data,"),
    ("crpo=1", "override: crpo: expected a mapping of settings, got '1'"),
    ("crpo.steps.x=1", "override: crpo.steps: expected a whole number >= 0, got {'x': '1'}"),
    ("=1", "override: : unknown key"),
    ("crpo.steps=", "override: crpo.steps: expected a whole number >= 0, got None"),
    ("crpo.steps=[1", "override: crpo.steps: expected a whole number >= 0, got '[1'"),
    ("crpo.steps=1e3", "override: crpo.steps: expected a whole number >= 0, got '1e3'"),
    ("crpo.steps=-1", "override: crpo.steps: expected a whole number >= 0, got -1"),
    ("optimizer.learning_rate=nan", "override: optimizer.learning_rate: expected a number >= 0, got 'nan'"),
    ("optimizer.learning_rate=fast", "override: optimizer.learning_rate: expected a number >= 0, got 'fast'"),
    ("rollout.stop=<|im_end|>", "override: rollout.stop: expected a list of strings, got '<|im_end|>'"),
    ("crpo.steps=2001-99-99", "override: crpo.steps: expected a whole number >= 0, got '2001-99-99'"),
    ("parallel.attention=XLA", "override: parallel.attention: expected auto | xla | cudnn | splash, got 'XLA'"),
    ("parallel.remat=maybe", "override: parallel.remat: expected true or false, got 'maybe'"),
    ("crpo.mini_batch_prompts=7", "crpo.mini_batch_prompts: expected a divisor of crpo.prompts_per_step=512, got 7"),
]


@pytest.mark.parametrize(("override", "line"), BAD_OVERRIDES)
def test_bad_overrides(override: str, line: str):
    assert refusal(None, *FROM_SCRATCH, override).startswith(line)


def test_a_value_with_a_billion_parts_is_shown_short(tmp_path: Path):
    """Nine aliases of nine aliases, nine deep: a message that wrote it out would take all memory."""
    names = "abcdefghij"
    lists = [f"  - &{name} [{', '.join(['*' + before] * 9)}]" for before, name in itertools.pairwise(names)]
    line = refusal(written(tmp_path, "crpo:\n  - &a [x, x]\n" + "\n".join(lists)))
    assert "crpo: expected a mapping of settings, got [['x', 'x'], [" in line
    assert len(line) < 3000


def test_unreadable_files(tmp_path: Path):
    missing = tmp_path / "missing.yaml"
    assert refusal(missing) == f"--config {missing}: No such file or directory"
    assert refusal(tmp_path) == f"--config {tmp_path}: Is a directory"
    path = tmp_path / "run.yaml"
    path.write_bytes(b"data: {path: \xff}")
    assert refusal(path) == f"--config {path}: expected UTF-8 text, got byte 0xff at offset 13"


# --- the command line -------------------------------------------------------------------------------------------------


def run(arguments: list[str], default: Path | None = None) -> Config:
    """What a command does with its arguments."""
    configs: list[Config] = []
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(
            "train",
            lambda: configs.append(cli.load_settings(cli.build_parser("train", "").parse_args(arguments), default)),
        )
    assert stopped.value.code == 0
    return configs[0]


def test_load_settings_without_config_takes_the_commands_default(tmp_path: Path):
    default = written(tmp_path, "crpo: {steps: 5}\ntokenizer: {path: x}\n")
    assert run([], default).crpo.steps == 5
    assert run(["crpo.steps=6"], default).crpo.steps == 6
    assert run(["--config", str(CONFIGS[0])], default) == load_config(CONFIGS[0])


def test_settings_stand_before_between_and_after_the_flags():
    loaded = run(["crpo.steps=5", "--mesh", "4x2", *FROM_SCRATCH, "--workdir", "x", "run.seed=7"])
    assert (loaded.crpo.steps, loaded.parallel.mesh, loaded.run.seed) == (5, "4x2", 7)


def test_mesh_is_a_setting(tmp_path: Path):
    assert run(["--mesh", "4x2", *FROM_SCRATCH]).parallel.mesh == "4x2"
    assert run([*FROM_SCRATCH, "parallel.mesh=1x1", "--mesh", "4x2"]).parallel.mesh == "4x2"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["crpo.steps=x"], "crpo_jax.train: override: crpo.steps: expected a whole number >= 0, got 'x'\n"),
        (["--config", "no/such.yaml"], "crpo_jax.train: --config no/such.yaml: No such file or directory\n"),
        (["--conf"], "python -m crpo_jax.train: argument --config: expected one argument\n"),
        (["--banana"], "python -m crpo_jax.train: unrecognized arguments: --banana\n"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        cli.run_command("train", lambda: cli.load_settings(cli.build_parser("train", "").parse_args(arguments)))
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "crpo_jax.train: interrupted\n"),
        (Fault("the disk is full"), 1, "crpo_jax.train: stopped: the disk is full\n"),
    ],
)
def test_an_interrupt_and_a_fault_are_one_line_and_an_exit_code(
    end: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
):
    def main() -> None:
        raise end

    with pytest.raises(SystemExit) as stopped:
        cli.run_command("train", main)
    assert stopped.value.code == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_exits_with_what_it_returns(returned: int | None, code: int):
    with pytest.raises(SystemExit) as stopped:
        cli.run_command("plan", lambda: returned)
    assert stopped.value.code == code


def test_a_bug_is_not_taken_for_bad_input():
    """Only InputError becomes one line; anything else keeps its traceback."""

    def broken() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run_command("train", broken)


def help_of(command: str, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    parser = cli.build_parser(command, "What it does.", lambda model: config.default_config_path("cpu", model))
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([*arguments])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", cli.SECTIONS)
def test_help_lists_the_commands_settings_once(command: str, capsys: pytest.CaptureFixture[str]):
    """With the defaults of the config that would be used, here that of the embedded world."""
    lines = help_of(command, "--help", capsys=capsys).splitlines()
    tiny = load_config(config.default_config_path("cpu"))
    heading = any(line.endswith("(default in tiny.yaml; legal values; unit; source):") for line in lines)
    assert heading == bool(cli.SECTIONS[command])
    for key, item in config.setting_fields().items():
        own = key.split(".")[0] in cli.SECTIONS[command]
        assert lines.count(f"  {key}") == own, key
        if own:
            text, value = lines[lines.index(f"  {key}") + 1], attrgetter(key)(tiny)
            default = list(value) if isinstance(value, tuple) else value
            for part in (item.doc, f"default {default!r}", item.legal, item.unit, f"; {item.source})"):
                assert part in text, key


def test_every_setting_is_some_commands():
    assert {key.split(".")[0] for key in config.setting_fields()} == set().union(*cli.SECTIONS.values())


def test_help_shows_what_would_be_used(capsys: pytest.CaptureFixture[str]):
    shown = help_of("train", "crpo.epochs=7", "--config", "clinical_r1_3b", "-h", "epochs", capsys=capsys)
    assert shown.startswith("settings, given as section.key=value (default in clinical_r1_3b;")
    assert {"  crpo.epochs", "  sft.epochs"} <= set(shown.splitlines())
    assert "(default 7; a whole number >= 1; " in shown


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--hel"], ["--help", "kl"], ["--help=kl"], ["-h", "kl"]])
def test_help_in_every_spelling_only_helps(words: list[str], capsys: pytest.CaptureFixture[str]):
    shown = help_of("train", *words, "--mesh", "1x1", capsys=capsys)
    assert "  crpo.kl_coef\n" in shown
    assert ("  crpo.steps\n" in shown) == ("kl" not in words[-1])


def test_help_takes_a_word(capsys: pytest.CaptureFixture[str]):
    shown = help_of("train", "--help", "kl", capsys=capsys)
    keys = [line.strip() for line in shown.splitlines() if re.fullmatch(r"  [a-z.0-9_]+", line)]
    assert {"crpo.kl_coef", "crpo.kl_target", "run.limits.kl"} <= set(keys)
    assert all("kl" in shown.split(f"  {key}\n")[1].split("\n")[0].lower() + key for key in keys)
    assert (
        help_of("score", "--help", "kl", capsys=capsys) == "no setting of score has 'kl' in its name or description\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["crpo.steps=10"],
        ["--crpo.steps=10"],
        ["--crpo.steps", "10"],
        ["crpo.steps", "10"],
        ["-crpo.steps", "10"],
        ["--mesh", "1x1", "--crpo.steps", "10", "--workdir", "x"],
    ],
)
def test_every_common_spelling_of_a_setting(words: list[str]):
    assert run([*FROM_SCRATCH, *words]).crpo.steps == 10


def test_values_in_other_spellings():
    loaded = run([*FROM_SCRATCH, "--crpo.kl-coef", "0.5", "--rollout.stop", "[a, b]", "--data.system-prompt", "x = y"])
    assert (loaded.crpo.kl_coef, loaded.rollout.stop, loaded.data.system_prompt) == (0.5, ("a", "b"), "x = y")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--crpo.steps"], "--crpo.steps: expected section.key=value, such as crpo.steps=0"),
        (["--crpo.steps", "run.seed=1"], "--crpo.steps: expected section.key=value, such as crpo.steps=0"),
        (["--crpo.steps", "--mesh", "1x1"], "--crpo.steps: expected section.key=value, such as crpo.steps=0"),
        (["--crpo.stepz", "10"], "--crpo.stepz: no such flag or setting; did you mean crpo.steps=VALUE?"),
        (["--kl_coef=1"], "--kl_coef: no such flag or setting; did you mean crpo.kl_coef=VALUE?"),
        (["--steps", "10"], "--steps: no such flag or setting; did you mean crpo.steps=VALUE or sft.steps=VALUE?"),
        (["--model", "x"], "--model: no such flag or setting; did you mean model.path=VALUE?"),
        (["--workdri", "x"], "--workdri: no such flag or setting; did you mean --workdir?"),
        (["crpo.stepz", "10"], "crpo.stepz: expected section.key=value; did you mean crpo.steps=VALUE?"),
        (
            ["steps=10"],
            "override: steps: unknown key; did you mean crpo.steps or sft.steps? The legal keys",
        ),
        (
            ["--config", "tinny"],
            "--config tinny: No such file or directory; expected a file, or one of arithmetic, clinical",
        ),
    ],
)
def test_other_spellings_are_answered_with_the_right_one(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        cli.run_command("train", lambda: cli.load_settings(cli.build_parser("train", "").parse_args(words)))
    assert stopped.value.code == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.partition("crpo_jax.train: ")[2].startswith(line)


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "configs/tiny.yaml"])
def test_shipped_configs_are_known_by_name_outside_a_checkout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == load_config(config.config_folder() / "tiny.yaml")
    own = written(tmp_path, "run: {seed: 5}\ntokenizer: {path: x}\n")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    own.rename(tmp_path / name)
    assert load_config(name).run.seed == 5, "a file of one's own comes first"


def test_the_default_config_fits_the_model(tmp_path: Path):
    """A model of one's own on a CPU got the embedded world's tokenizer and prompts of 160 tokens."""
    assert config.default_config_path("cpu", str(tmp_path)).name == "clinical_r1_3b.yaml"
    assert config.default_config_path("cpu", "Qwen/Qwen2.5-0.5B").name == "clinical_r1_3b.yaml"
    shutil.copy(config.config_folder() / "tiny_tokenizer" / "tokenizer.json", tmp_path)
    assert config.default_config_path("gpu", str(tmp_path)).name == "tiny.yaml"
    shutil.copy(config.config_folder() / "arithmetic_tokenizer" / "tokenizer.json", tmp_path)
    assert config.default_config_path("cpu", str(tmp_path)).name == "arithmetic.yaml"
    arguments = cli.build_parser("train", "").parse_args(["--model.path", "a/b", "model.path=c/d"])
    settings, name = cli.load_platform_settings(arguments, "cpu")
    assert (settings.model.path, settings.tokenizer.path, settings.data.max_prompt_tokens) == ("c/d", "", 1024)
    assert name == "clinical_r1_3b"


def test_every_default_is_legal_and_every_source_is_named():
    """Defaults go through no check of their own when nothing overrides them."""
    for key, item in config.setting_fields().items():
        assert attrgetter(key)(config.replaced(Config(), {key: item.default})) == item.default
        assert item.source, key  # tests/test_sources.py says which
        assert item.doc, key


@pytest.mark.parametrize(
    ("key", "legal"),
    [
        ("crpo.steps", "a whole number >= 0"),
        ("crpo.group_size", "a whole number >= 2"),
        ("run.seed", "a whole number >= 0 and <= 9223372036854775807"),
        ("rollout.top_p", "a number > 0 and <= 1"),
        ("parallel.remat", "true or false"),
        ("parallel.layout", "a string"),
        ("rollout.stop", "a list of strings"),
        ("crpo.truncated", "keep | mask"),
    ],
)
def test_legal_values_in_words(key: str, legal: str):
    assert config.setting_fields()[key].legal == legal


def test_a_section_may_have_defaults_of_its_own():
    settings = config.setting_fields()
    assert settings["sft.lora.rank"].default == 32 != settings["lora.rank"].default
