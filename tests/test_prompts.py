"""Prompts: the published tokenizer, every turn once, no special tokens from a text, and nothing cut."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crpo_jax.config import PROMPT_NAMES, Data
from crpo_jax.data.prompts import PROMPTS, encode_response, fit_prompts, render_prompts, user_turn
from crpo_jax.data.question import Question
from crpo_jax.data.readers import read_questions
from crpo_jax.data.tokenizer import load_tokenizer
from crpo_jax.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"
TINY = Path(__file__).parents[1] / "configs" / "tiny_tokenizer"
SYSTEM = "Be brief."
QUESTION = Question("q0", "A man of 40 has gout. Which drug?", {"A": "Allopurinol", "B": "Aspirin {x}"}, "A")


@pytest.fixture(scope="module")
def qwen():
    folder = SHARED / "qwen2.5"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("the published Qwen2.5 tokenizer is not here: shared/data/qwen2.5")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module", params=["tiny", "qwen"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def render(question, name, system_prompt, tokenizer):
    (tokens,) = render_prompts([question], Data(prompt=name, system_prompt=system_prompt), tokenizer)
    return tokens


def test_published_encodings(qwen):
    path = SHARED / "golden" / "qwen2_tokenizer_expected_ids.json"
    if not path.exists():
        pytest.skip("the published encodings are not here: shared/data/golden")
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 3
    for case in cases:
        assert encode_response(case["text"], qwen) == [*case["ids"], 151645]


def test_prompt_is_the_chat_templates_conversation(qwen):
    tokens = render(QUESTION, "brief", SYSTEM, qwen)
    assert qwen.decode(tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nA man of 40 has gout. Which drug?\n\nA) Allopurinol\nB) Aspirin {x}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokens.count(151644) == 3
    assert tokens.count(151645) == 2
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user_turn(QUESTION, "brief")}]
    assert tokens == qwen.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_empty_system_prompt_is_an_empty_turn_not_the_templates_default(qwen):
    """The template inserts its own system prompt where a conversation has none; cold start and RL then disagree."""
    decoded = qwen.decode(render(QUESTION, "crpo", "", qwen))
    assert decoded.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")
    assert "Alibaba" not in decoded


@pytest.mark.parametrize("name", PROMPTS)
def test_every_prompt_shows_question_and_options_once(tokenizer, name):
    decoded = tokenizer.decode(render(QUESTION, name, SYSTEM, tokenizer))
    for part in (SYSTEM, QUESTION.question, "\nA) Allopurinol\n", "\nB) Aspirin {x}"):
        assert decoded.count(part) == 1, part
    assert decoded.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("crpo", ["dx", "conclusion"]),
        ("grpo", ["think", "answer"]),
        ("grpo_dx", ["dx", "conclusion"]),
        ("released", ["think", "answer"]),
        ("brief", []),
    ],
)
def test_the_instruction_asks_for_the_rewards_format(name, tags):
    text = PROMPTS[name]
    assert re.findall(r"</?(\w+)>", text) == [tag for tag in tags for _ in range(2)]
    assert ("\\boxed{LETTER}" in text) == bool(tags)
    assert (text.find("(System 1") < text.find("(System 2")) == (name == "crpo")
    assert text == text.strip()


def test_without_options_the_general_format_asks_for_an_answer(tokenizer):
    """It asked for the letter of an option where there was none."""
    question = Question("q7", "How many?", {}, "5", kind="number")
    for name, tags in {"grpo": ["think", "answer"], "grpo_dx": ["dx", "conclusion"]}.items():
        text = user_turn(question, name)
        assert re.findall(r"</?(\w+)>", text) == [tag for tag in tags for _ in range(2)]
        assert "\\boxed{ANSWER}" in text
        assert not re.search("LETTER|letter|option|clinical", text)
        assert "letter" in user_turn(QUESTION, name)
    for name in ("crpo", "released"):
        with pytest.raises(
            InputError,
            match=f"expected grpo, grpo_dx, brief, boxed or a Jinja file for questions without options, got {name}, wh",
        ):
            render(question, name, SYSTEM, tokenizer)


def test_every_setting_has_its_prompt():
    assert tuple(PROMPTS) == PROMPT_NAMES
    with pytest.raises(
        InputError, match=r"data\.prompt: expected one of crpo, grpo, grpo_dx, released, brief, boxed, got 'cot'"
    ):
        user_turn(QUESTION, "cot")


def test_response_ends_with_the_end_of_turn(tokenizer):
    text = "<dx>\nGout.\n</dx>\n<conclusion>\nUrate. \\boxed{A}\n</conclusion>"
    tokens = encode_response(text, tokenizer)
    assert tokenizer.decode(tokens) == text + "<|im_end|>"
    assert tokens.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_response_tokens_do_not_depend_on_the_prompt_before_them(qwen):
    """In one piece, a response's first line break would merge with the template's own: no sampler draws that."""
    prompt = render(QUESTION, "brief", SYSTEM, qwen)
    response = encode_response("\nYes.", qwen)
    whole = qwen.encode(qwen.decode(prompt + response), add_special_tokens=False)
    assert whole != prompt + response
    assert qwen.decode(whole) == qwen.decode(prompt + response)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_special_tokens_in_a_text_are_refused(tokenizer, token):
    """Spelt in a question, an end of turn would be one: what follows could then speak as the assistant."""
    for question in (
        dataclasses.replace(QUESTION, question=f"Which?{token}"),
        dataclasses.replace(QUESTION, options={"A": "1", "B": f"x{token}"}),
    ):
        with pytest.raises(
            InputError,
            match=re.escape(f"question q0: expected text without the tokenizer's special tokens, got {token}"),
        ):
            render(question, "crpo", SYSTEM, tokenizer)
    with pytest.raises(InputError, match=r"data\.system_prompt: expected text without"):
        render(QUESTION, "crpo", f"x {token}", tokenizer)
    with pytest.raises(InputError, match="expected text without the tokenizer's special tokens"):
        encode_response(f"<dx>{token}</dx>", tokenizer)


def test_added_tokens_that_are_not_special_are_refused_in_a_question_only(qwen):
    with pytest.raises(InputError, match="got <tool_call>"):
        render(dataclasses.replace(QUESTION, question="Which <tool_call>?"), "crpo", SYSTEM, qwen)
    assert encode_response("<tool_call>", qwen) == [151657, 151645]


ordinary = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
    .map(str.strip)
    .filter(lambda text: text and "<" not in text)
)


@given(ordinary, ordinary)
def test_no_text_opens_or_closes_a_turn(tiny, question, option):
    tokens = render(Question("q", question, {"A": option, "B": "other"}, "B"), "brief", "", tiny)
    special = {identity for identity, token in tiny.added_tokens_decoder.items() if token.special}
    assert len([token for token in tokens if token in special]) == 5


def test_batch_equals_one_by_one(tokenizer):
    questions = [dataclasses.replace(QUESTION, id=f"q{number}", question="x " * number + "?") for number in range(5)]
    data = Data(system_prompt=SYSTEM)
    assert render_prompts(questions, data, tokenizer) == [
        render(question, "crpo", SYSTEM, tokenizer) for question in questions
    ]
    assert render_prompts([], data, tokenizer) == []


# ---- the limit -------------------------------------------------------------------------------------------------------


def long_and_short():
    return [
        dataclasses.replace(QUESTION, id="short"),
        dataclasses.replace(QUESTION, id="long", question="pain " * 400),
        dataclasses.replace(QUESTION, id="last"),
    ]


def test_prompts_over_the_limit_are_dropped_and_counted_never_cut(tokenizer):
    data = Data(prompt="brief", system_prompt="", max_prompt_tokens=300)
    fitted = fit_prompts(long_and_short(), data, tokenizer)
    assert [question.id for question in fitted.questions] == ["short", "last"]
    assert fitted.prompts == [render(question, "brief", "", tokenizer) for question in fitted.questions]
    length = len(render(long_and_short()[1], "brief", "", tokenizer))
    assert fitted.dropped == {"long": length}
    assert (
        fit_prompts(long_and_short(), dataclasses.replace(data, max_prompt_tokens=length), tokenizer).dropped == {}
    ), "the limit itself fits"


def test_prompts_over_the_limit_are_an_error_by_setting(tokenizer):
    data = Data(prompt="brief", system_prompt="", max_prompt_tokens=300, overlong_prompts="error")
    with pytest.raises(
        InputError, match=r"question long: expected a prompt of at most data\.max_prompt_tokens=300, got \d+"
    ):
        fit_prompts(long_and_short(), data, tokenizer)


def test_a_limit_that_nothing_fits_is_an_error(tokenizer):
    with pytest.raises(
        InputError,
        match=r"data\.max_prompt_tokens: expected room for at least one question, got 5; "
        r"the shortest prompt has \d+ tokens",
    ):
        fit_prompts(long_and_short(), Data(max_prompt_tokens=5), tokenizer)


@pytest.mark.parametrize(("source", "split"), [("medqa", "test"), ("medmcqa", "dev"), ("medxpertqa", "test")])
def test_published_questions_fit_the_papers_limit(qwen, source, split):
    folder = SHARED / source
    if not folder.exists():
        pytest.skip(f"the published data is not here: shared/data/{source}")
    sample = read_questions(source, str(folder), split)[::4]
    fitted = fit_prompts(sample, Data(), qwen)
    assert len(fitted.questions) + len(fitted.dropped) == len(sample)
    assert len(fitted.dropped) <= 0.005 * len(sample)
    assert min(map(len, fitted.prompts)) > 200


# ---- tokenizers that cannot be used ----------------------------------------------------------------------------------


def copied(folder, **changed):
    """The tiny tokenizer with settings replaced; None removes one."""
    settings = json.loads((TINY / "tokenizer_config.json").read_text()) | changed
    (folder / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if value is not None})
    )
    (folder / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    return folder


def test_templates_that_leave_a_turn_out_or_refuse_it(tmp_path):
    silent = load_tokenizer(copied(tmp_path, chat_template="{{ messages[1]['content'] }}<|im_end|>"))
    with pytest.raises(InputError, match=r"expected a chat template in .* that writes all turns unchanged"):
        render(QUESTION, "crpo", SYSTEM, silent)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    strict = load_tokenizer(
        copied(tmp_path, chat_template=refusal + "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    )
    with pytest.raises(
        InputError,
        match=r"data\.system_prompt: expected none, .* since .* takes none, got 'Be brief\.'; "
        r"tokenizer\.path: expected a chat template in .* that takes turns of system, user, got: no system turn here",
    ):
        render(QUESTION, "crpo", SYSTEM, strict)
    with pytest.raises(InputError, match=r"that takes turns of user, assistant, got: nothing here"):
        load_tokenizer(copied(tmp_path, chat_template="{{ raise_exception('nothing here') }}"))
