"""Bad input to the whole training command: one line of error, and nothing left behind. Then the same for random input.

CRPO_JAX_FUZZ=5000 tries that many config files and as many question files instead of a few hundred.
"""

import atexit
import csv
import io
import json
import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from crpo_jax import config
from crpo_jax.data.readers import READERS, read_questions
from crpo_jax.errors import InputError
from crpo_jax.model import huggingface
from crpo_jax.model.config_json import shape_of

train = import_module("crpo_jax.train")

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"
QUESTION = {"id": "1", "question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "A"}
SIZES = {
    "vocab_size": 1280,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


def jsonl(path: Path, *records: Any) -> None:
    path.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records),
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files, and copies of them with one fault each."""
    folder = tmp_path_factory.mktemp("input")
    good = folder / "good"
    good.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "configs" / "tiny_tokenizer" / name, good / name)
    shape = shape_of(SIZES)
    (good / "config.json").write_text(json.dumps(huggingface.config_of(shape, "float32", {})))
    draw = np.random.default_rng(0)
    save_file(
        {tensor.key: draw.normal(size=tensor.sizes).astype(np.float32) for tensor in huggingface.model_tensors(shape)},
        good / "model.safetensors",
    )

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, folder / name))

    os.truncate(copy("cut") / "model.safetensors", 10_000)
    (copy("pickle") / "model.safetensors").rename(folder / "pickle" / "pytorch_model.bin")
    (copy("other_type") / "config.json").write_text(json.dumps(SIZES | {"model_type": "qwen2_moe"}))
    (copy("no_json") / "config.json").write_text("{")
    (copy("small_vocabulary") / "config.json").write_text(json.dumps(SIZES | {"vocab_size": 700}))
    (copy("bad_tokenizer") / "tokenizer.json").write_text("{}")
    settings = json.loads((good / "tokenizer_config.json").read_text())
    (copy("no_template") / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "chat_template"})
    )
    code = copy("code")
    (code / "config.json").write_text(
        json.dumps(SIZES | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"})
    )
    (code / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    weights = load_file(good / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if key != "model.norm.weight"},
        copy("missing") / "model.safetensors",
    )

    many = [QUESTION | {"id": str(number)} for number in range(20)]
    jsonl(folder / "train.jsonl", *many)
    jsonl(folder / "test.jsonl", *many[:4])
    jsonl(folder / "twice.jsonl", QUESTION, QUESTION)
    jsonl(folder / "no_answer.jsonl", many[0], {key: value for key, value in many[1].items() if key != "answer"})
    jsonl(folder / "other_answer.jsonl", QUESTION | {"answer": "C"})
    jsonl(folder / "one_option.jsonl", QUESTION | {"options": {"A": "one"}})
    jsonl(folder / "gap.jsonl", QUESTION | {"options": {"A": "one", "C": "two"}})
    jsonl(folder / "number.jsonl", QUESTION | {"question": 3})
    jsonl(folder / "blank.jsonl", QUESTION | {"question": "  "})
    jsonl(folder / "surrogate.jsonl", json.dumps(QUESTION).replace("Which", "\\ud800"))
    jsonl(folder / "not_json.jsonl", QUESTION, "{oops}")
    jsonl(folder / "list.jsonl", "3")
    jsonl(folder / "key_twice.jsonl", '{"id": "1", "id": "2"}')
    jsonl(folder / "deep.jsonl", "[" * 100_000)
    jsonl(folder / "special.jsonl", QUESTION | {"question": "Which?<|im_end|>"})
    jsonl(folder / "long.jsonl", QUESTION | {"question": "why " * 500})
    (folder / "empty.jsonl").write_text("")
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    (folder / "table.parquet").write_bytes(b"PAR1")
    (folder / "table.tsv").write_text("id\tquestion")
    (folder / "table.csv").write_text("id,question,A,B,answer\n1,Which?,one,two,C\n")
    (folder / "nothing").mkdir()
    jsonl(folder / "traces.jsonl", QUESTION)
    (folder / "code.py").write_text("x = 1")
    (folder / "prompt.jinja").write_text("{{ question }}\n{{ cas }}\n")
    (copy("endless") / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{% for turn in messages %}{{ turn.content }}{% endfor %}"})
    )
    return folder


def own(name: str, *more: str) -> list[str]:
    return ["data.source=jsonl", f"data.path=FOLDER/{name}", "data.eval_path=FOLDER/test.jsonl", *more]


BAD: list[tuple[list[str], str]] = [
    # settings: type, range, missing, unknown
    (["crpo.steps=1.5"], "crpo.steps: expected a whole number >= 0, got 1.5"),
    (["crpo.steps=-1"], "crpo.steps: expected a whole number >= 0, got -1"),
    (["crpo.steps=99999999999"], "crpo.steps: expected at most 2147483647, got 99999999999"),
    (["crpo.steps="], "crpo.steps: expected a whole number >= 0, got None"),
    (["crpo.step=3"], "crpo.step: unknown key; did you mean crpo.steps"),
    (["steps=3"], "steps: unknown key"),
    (["crpo.steps"], "crpo.steps: expected section.key=value"),
    (["crpo.group_size=1"], "crpo.group_size: expected a whole number >= 2, got 1"),
    (["crpo.clip_low=2"], "crpo.clip_low: expected a number >= 0 and <= 1, got 2"),
    (["crpo.kl_coef=-0.1"], "crpo.kl_coef: expected a number >= 0, got -0.1"),
    (["crpo.kl_coef=.nan"], "crpo.kl_coef: expected a number >= 0, got nan"),
    (
        ["crpo.loss=cipso"],
        "crpo.loss: expected clip, cispo, sapo or a function of your own as module:function, got 'cipso'; "
        "did you mean cispo?",
    ),
    (["crpo.loss=no_such_module:loss"], "no_such_module:loss cannot be imported: ModuleNotFoundError"),
    (["crpo.importance_cap=0.5"], "crpo.importance_cap: expected a number >= 1, got 0.5"),
    (["crpo.importance_bound=0.5"], "crpo.importance_bound: expected 0 or at least 1, got 0.5"),
    (["crpo.kl_in=reward", "crpo.kl_coef=0"], "crpo.kl_coef: expected more than 0, since crpo.kl_in=reward"),
    (["crpo.truncated=drop"], "crpo.truncated: expected keep | mask, got 'drop'"),
    (["run.seed=-1"], "run.seed: expected a whole number >= 0 and <= 9223372036854775807, got -1"),
    (
        ["run.seed=18446744073709551616"],
        "run.seed: expected a whole number >= 0 and <= 9223372036854775807, got 18446744073709551616",
    ),
    (["run.seed=0o7"], "run.seed: expected a whole number >= 0 and <= 9223372036854775807, got '0o7'"),
    (["run.seed=010"], "override: run.seed:1: expected a plain decimal number, got '010'"),
    (["run.save_every=often"], "run.save_every: expected a whole number >= 0, got 'often'"),
    (["run.keep=0"], "run.keep: expected a whole number >= 1, got 0"),
    (["run.limits.action=panic"], "run.limits.action: expected warn | stop, got 'panic'"),
    (["run.limits.truncated=2"], "run.limits.truncated: expected a number >= 0 and <= 1, got 2"),
    (["rollout.temperature=hot"], "rollout.temperature: expected a number >= 0, got 'hot'"),
    (["rollout.top_p=0"], "rollout.top_p: expected a number > 0 and <= 1, got 0"),
    (["rollout.stop=[1]"], "rollout.stop: expected a list of strings, got [1]"),
    (["rollout.stop=[<|nowhere|>]"], "rollout.stop: expected tokens of "),
    (["reward.k=true"], "reward.k: expected a number >= 0, got True"),
    (["reward.time_limit=0"], "reward.time_limit: expected a number >= 0.001, got 0"),
    (["reward.design=best"], "reward.design: expected crpo, grpo, released or module:function, got 'best'"),
    (["reward.design=crpo*much"], "reward.design: expected a number after crpo*, got 'much'"),
    (["reward.design=crpo+crpo"], "reward.design: crpo stands twice in 'crpo+crpo'"),
    (["optimizer.beta1=1"], "optimizer.beta1: expected a number >= 0 and < 1, got 1"),
    (["optimizer.eps=0"], "optimizer.eps: expected a number > 0, got 0"),
    (["sft.held_out=1"], "sft.held_out: expected a number >= 0 and <= 0.9, got 1"),
    (
        ["parallel.layout=zero9"],
        "parallel.layout: expected zero1, fsdp, replicated, auto or a layout of your own as module:NAME, got 'zero9'",
    ),
    (
        ["data.source=pubmed"],
        "data.source: expected vignettes | arithmetic | medqa | medmcqa | medxpertqa | pubmedqa | mmlu | healthbench | "
        "gsm8k | math500 | file | hub | jsonl, got 'pubmed'",
    ),
    (
        ["data.prompt=terse"],
        "data.prompt: expected crpo | grpo | grpo_dx | released | brief | boxed or a Jinja file, got 'terse'",
    ),
    (
        ["data.prompt=FOLDER/prompt.jinja"],
        "data.prompt: FOLDER/prompt.jinja:2: question train-000000: 'cas' is undefined",
    ),
    (["data.system_prompt=file:FOLDER/gone"], "data.system_prompt: FOLDER/gone: No such file or directory"),
    (
        ["data.chat_template_kwargs.thinking=1"],
        "data.chat_template_kwargs.thinking: expected an argument that the chat",
    ),
    # settings that contradict each other, or the machine
    (["crpo.mini_batch_prompts=3"], "crpo.mini_batch_prompts: expected a divisor of crpo.prompts_per_step=16, got 3"),
    (
        ["model.shape.num_attention_heads=3"],
        "model.shape.hidden_size: expected a multiple of num_attention_heads=3, got 128",
    ),
    (
        ["model.shape.num_key_value_heads=3"],
        "model.shape.num_attention_heads: expected a multiple of num_key_value_heads=3, got 4",
    ),
    (["tokenizer.path="], "tokenizer.path: expected a folder, since model.path is empty and brings none"),
    (["data.eval_split=train"], "data.eval_split: expected another split than data.split, got 'train' for both"),
    (["rollout.temperature=0"], "rollout.temperature: expected more than 0 to train, got 0"),
    (["--mesh", "3x1"], "--mesh 3x1: expected data x model = the 8 cpu devices here, got 3 x 1 = 3"),
    (["--mesh", "8"], "--mesh: expected DxM in devices, such as 8x1, got '8'"),
    (["--config", "FOLDER/nowhere.yaml"], "--config FOLDER/nowhere.yaml: No such file or directory"),
    (["--config", "FOLDER"], "--config FOLDER: Is a directory"),
    (["--workdir", "FOLDER/nothing/../code.py"], "--workdir FOLDER/nothing/../code.py: expected a folder, got a file"),
    # tokenizers and models
    (["tokenizer.path=FOLDER/nothing"], "tokenizer.path: expected a folder with tokenizer.json, got 'FOLDER/nothing'"),
    (
        ["tokenizer.path=FOLDER/bad_tokenizer"],
        "tokenizer.path: expected a readable tokenizer in FOLDER/bad_tokenizer, got: ",
    ),
    (
        ["tokenizer.path=FOLDER/endless"],
        "tokenizer.path: expected a chat template in FOLDER/endless that ends the assistant's text with an added "
        "token, got '' after it",
    ),
    (
        ["tokenizer.path=FOLDER/no_template"],
        "tokenizer.path: expected a chat_template in FOLDER/no_template/tokenizer_config.json, got none",
    ),
    (["model.shape.vocab_size=700"], "tokenizer.path: expected at most the model's 700 tokens, got 1280 in "),
    (
        ["model.path=FOLDER/small_vocabulary"],
        "FOLDER/small_vocabulary/model.safetensors: model.embed_tokens.weight: expected shape [700, 64], got ",
    ),
    (
        ["model.path=FOLDER/nowhere"],
        "model.path: expected a folder, or a hub id such as Qwen/Qwen2.5-3B, got 'FOLDER/nowhere', which is neither",
    ),
    (["model.path=FOLDER/nothing"], "model.path: FOLDER/nothing/config.json: No such file or directory"),
    (["model.path=FOLDER/no_json"], "FOLDER/no_json/config.json: expected JSON, got: "),
    (["model.path=FOLDER/other_type"], "FOLDER/other_type/config.json: model_type: expected one of 'qwen2', 'qwen3'"),
    (["model.path=FOLDER/code"], "FOLDER/code/config.json: model_type: expected one of 'qwen2', 'qwen3'"),
    (["model.path=FOLDER/cut"], "FOLDER/cut/model.safetensors: expected a whole safetensors file, got 10000 bytes: "),
    (
        ["model.path=FOLDER/pickle"],
        "FOLDER/pickle: expected model.safetensors or model.safetensors.index.json, "
        "got only pytorch_model.bin; reading a pickle",
    ),
    (
        ["model.path=FOLDER/missing"],
        "FOLDER/missing/model.safetensors: model.norm.weight: missing; expected shape [64]",
    ),
    # questions
    (own("nowhere.jsonl"), "FOLDER/nowhere.jsonl: expected a file or folder with jsonl questions, got no such path"),
    (["data.source=jsonl"], "data.path: expected a file or folder, since jsonl has no hub id, got ''"),
    (
        ["data.source=jsonl", "data.path=FOLDER/train.jsonl"],
        "data.eval_path: expected a file or folder of its own for split test",
    ),
    (
        own("train.jsonl", "data.eval_path=FOLDER/train.jsonl"),
        "data.eval_path: expected a file or folder of its own for split test",
    ),
    (own("empty.jsonl"), "FOLDER/empty.jsonl: expected at least one record, got an empty file"),
    (own("table.tsv"), "FOLDER/table.tsv: expected a file ending in .json, .jsonl, .csv, .parquet, got .tsv"),
    (own("table.csv"), "FOLDER/table.csv:2: answer: expected a letter among A, B, got 'C'"),
    (own("table.parquet"), "FOLDER/table.parquet: expected a parquet file, got "),
    (own("nothing"), "FOLDER/nothing: expected a file of split train, got no .json, .jsonl, .csv, .parquet file"),
    (own("latin.jsonl"), "FOLDER/latin.jsonl:1: expected UTF-8 text, got byte 0xe9 at offset 14"),
    (own("not_json.jsonl"), "FOLDER/not_json.jsonl:2: expected one JSON object a line, got "),
    (own("deep.jsonl"), "FOLDER/deep.jsonl:1: expected a JSON object in the array, got "),
    (own("list.jsonl"), "FOLDER/list.jsonl:1: expected a JSON object, got 3"),
    (own("key_twice.jsonl"), "FOLDER/key_twice.jsonl:1: expected one JSON object a line, got the key 'id' twice"),
    (
        own("twice.jsonl"),
        "FOLDER/twice.jsonl:2: id: expected an id of its own (the same stands at FOLDER/twice.jsonl:1), got '1'",
    ),
    (
        own("no_answer.jsonl"),
        "FOLDER/no_answer.jsonl:2: answer: expected a field of this name, got id, question, options",
    ),
    (own("other_answer.jsonl"), "FOLDER/other_answer.jsonl:1: answer: expected a letter among A, B, got 'C'"),
    (
        own("one_option.jsonl"),
        "FOLDER/one_option.jsonl:1: options: expected letters A, B, ... without a gap, at least two, got 'A'",
    ),
    (
        own("gap.jsonl"),
        "FOLDER/gap.jsonl:1: options: expected letters A, B, ... without a gap, at least two, got 'A, C'",
    ),
    (own("number.jsonl"), "FOLDER/number.jsonl:1: question: expected a text, got 3"),
    (own("blank.jsonl"), "FOLDER/blank.jsonl:1: question: expected a text that is not empty, got '  '"),
    (own("surrogate.jsonl"), "FOLDER/surrogate.jsonl:1: question: expected text that UTF-8 can write, got "),
    (
        own("special.jsonl", "data.part=all"),
        "question 1: expected text without the tokenizer's special tokens, got <|im_end|>",
    ),
    (
        own("long.jsonl", "data.part=all"),
        "data.max_prompt_tokens: expected room for at least one question, got 160; the shortest prompt has ",
    ),
    (
        own("train.jsonl", "sft.path=FOLDER/traces.jsonl"),
        "FOLDER/traces.jsonl: 1: response: expected the teacher's text, got None",
    ),
    (
        own("train.jsonl"),
        "sft.path: expected a file of teacher traces, since data.source=jsonl has no built-in teacher",
    ),
]


def snapshot(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "line"), BAD, ids=[f"{number}-{line.split(':')[0]}" for number, (_, line) in enumerate(BAD)]
)
def test_bad_input_earns_its_line_and_leaves_nothing(arguments: list[str], line: str, folder: Path, tmp_path: Path):
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    before = snapshot(folder)
    with pytest.raises(InputError) as error:
        train.main(["--workdir", str(tmp_path / "run"), *arguments])
    assert line.replace("FOLDER", str(folder)) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists(), sorted((tmp_path / "run").iterdir())
    assert snapshot(folder) == before
    assert not (folder / "ran").exists(), "code from a model folder was run"


def test_there_are_at_least_sixty():
    assert len({line for _, line in BAD}) >= 60


# ---- random input ----------------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("CRPO_JAX_FUZZ", "200"))
often = profile(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None)
PLACE = Path(tempfile.mkdtemp())  # not a fixture of pytest's, which all examples of hypothesis would share
atexit.register(shutil.rmtree, PLACE, ignore_errors=True)

WRITTEN = ["1e-6", "010", "1:30", "<<", "~", "yes", "2001-99-99"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(WRITTEN)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
keys = st.sampled_from(sorted(config.setting_fields()))
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": scalars})


@st.composite
def settings_files(draw: st.DrawFn) -> bytes:
    """YAML with odd values under real keys or odd ones; sometimes cut, or with bytes changed or inserted."""
    content: dict[str, Any] = {}
    for _ in range(draw(st.integers(0, 3))):
        section, (*sections, setting) = content, draw(keys).split(".")
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                break
        else:
            section[setting] = draw(values)
    if draw(st.booleans()):
        content[draw(st.text(max_size=10))] = draw(values)
    try:
        text = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        text = b""
    text = draw(st.sampled_from([text, text, TINY.read_bytes(), b""]))
    return damaged(draw, text)


INSERTED = [b"&a ", b"*a", b"<<: ", b"!!python/name:os.system ", b"{", b"- ", b"\t", b"\x00"]


def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    how = draw(st.sampled_from(["", "", "cut", "flip", "insert", "noise"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if how == "cut":
        return data[:at]
    if how == "flip" and data:
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if how == "insert":
        return data[:at] + draw(st.binary(max_size=20) | st.sampled_from(INSERTED)) + data[at:]
    return draw(st.binary(max_size=200)) if how == "noise" else data


@st.composite
def question_files(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """A source, and a file of records that are nearly its own, or nothing of the kind."""
    options = st.dictionaries(
        st.sampled_from("ABCDEFGHIJ") | st.text(max_size=3), st.text(max_size=5) | values, max_size=5
    )
    fields = {
        **{
            name: st.text(max_size=10) | values
            for name in (
                "question",
                "answer",
                "id",
                "realidx",
                "opa",
                "opb",
                "opc",
                "opd",
                "source",
                "split",
                "problem",
            )
        },
        **{
            "options": options,
            "cop": st.integers(-2, 5) | values,
            "answer_idx": st.sampled_from("ABCD"),
            "answer_kind": st.sampled_from(["number", "text", "none", "choice"]) | values,
            "messages": st.lists(message | values, max_size=3) | values,
            "prompt": st.lists(message | values, max_size=3) | values,
            "rubrics": st.lists(
                st.fixed_dictionaries({"criterion": st.text(max_size=5), "points": scalars}), max_size=2
            ),
            "context": st.fixed_dictionaries({"contexts": st.lists(scalars, max_size=3)}) | values,
            "final_decision": st.sampled_from(["yes", "no"]) | values,
            "choices": st.lists(scalars, max_size=5) | values,
            "label": st.sampled_from("ABCD") | values,
        },
    }
    whole = st.fixed_dictionaries({}, optional=fields)
    records = draw(st.lists(whole | values, max_size=4))
    ending = draw(st.sampled_from([".json", ".jsonl", ".csv"]))
    if ending == ".csv":
        names = draw(st.permutations(["question", "answer", "id", "A", "B", "options", "answer_idx", "cop"]))
        cells = st.one_of(st.sampled_from(["A", "B", "0", '{"A": "x", "B": "y"}']), st.text(max_size=5))
        table = io.StringIO()
        csv.writer(table).writerows([names, *draw(st.lists(st.lists(cells, min_size=8, max_size=8), max_size=4))])
        text = table.getvalue()
    else:
        text = json.dumps(records) if ending == ".json" else "".join(json.dumps(record) + "\n" for record in records)
    return draw(st.sampled_from(sorted([*READERS, "file"]))), ending, damaged(draw, text.encode())


def one_line(error: InputError) -> None:
    line = str(error)
    assert line.isprintable(), line
    assert 0 < len(line) < 3000, line


@often
@given(settings_files())
def test_any_config_file_loads_or_is_refused_in_one_line(data: bytes):
    """What loads is also written and read back the same: config.yaml of the workdir must hold it."""
    path = PLACE / "run.yaml"
    path.write_bytes(data)
    try:
        loaded = config.load_config(path)
    except InputError as error:
        one_line(error)
    else:
        path.write_text(config.dump_config(loaded), encoding="utf-8")
        assert config.load_config(path) == loaded
    assert [left.name for left in PLACE.iterdir()] == ["run.yaml"]
    path.unlink()


@often
@given(question_files())
def test_any_question_file_loads_or_is_refused_in_one_line(file: tuple[str, str, bytes]):
    """And what loads is whole: unique ids, an answer among the options, text that can be written."""
    source, ending, data = file
    path = PLACE / f"train{ending}"
    path.write_bytes(data)
    try:
        questions = read_questions(source, str(path))
    except InputError as error:
        one_line(error)
    else:
        assert len({question.id for question in questions}) == len(questions) > 0
        for question in questions:
            assert question.kind != "choice" or question.answer in question.options
            "".join([question.id, question.question, *question.options.values()]).encode()
    assert path.read_bytes() == data
    path.unlink()
    assert not list(PLACE.iterdir())
