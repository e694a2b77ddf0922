"""The families' chat templates: prompts as transformers renders them, and responses that end at the right token.

CRPO_JAX_FUZZ=10000 tries that many random templates instead of a few.
"""

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from chat_templates import FAMILIES, GEMMA2, MISTRAL_V1, QUESTION, SYSTEM
from model_folder import write_tokenizer

from crpo_jax.config import Data
from crpo_jax.data.chat_template import control_tokens, end_of_turn, has_system_turn, stop_ids
from crpo_jax.data.prompts import encode_response, render_prompts
from crpo_jax.data.question import Question
from crpo_jax.data.tokenizer import load_tokenizer
from crpo_jax.errors import InputError
from crpo_jax.reward.effective import effective_table

OPEN = Question("q", QUESTION, {}, "allopurinol", kind="text")
BRIEF = Data(prompt="brief", system_prompt=SYSTEM)
ARGUMENTS = {"llama3.2": {"date_string": "26 Jul 2024"}}
"""What transformers must be told to write what is written here on every day."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_tokenizer(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def tokenizer(folders, name):
    return load_tokenizer(folders[name])


def with_template(folder: Path, out: Path, template: str):
    """The tokenizer of a folder with another chat template."""
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    out.mkdir(exist_ok=True)
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return load_tokenizer(out)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_what_the_family_publishes_and_what_transformers_renders(name, tokenizer):
    [tokens] = render_prompts([OPEN], BRIEF, tokenizer)
    assert tokenizer.decode(tokens) == FAMILIES[name].prompt
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    arguments = ARGUMENTS.get(name, {})
    theirs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **arguments)
    assert tokens == theirs
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **arguments)
    assert text == FAMILIES[name].prompt
    first = tokenizer.convert_ids_to_tokens(tokens[0])
    assert (first == FAMILIES[name].bos) == (FAMILIES[name].bos is not None)
    assert tokens.count(tokens[0]) == 1 or not FAMILIES[name].bos, "the beginning of a text once, by the template"


def test_an_empty_system_prompt_leaves_no_trace_of_the_templates_own(name, tokenizer):
    """Qwen2.5's template would insert a system prompt of its own; Gemma's and Mistral's two line breaks."""
    [tokens] = render_prompts([OPEN], dataclasses.replace(BRIEF, system_prompt=""), tokenizer)
    expected = FAMILIES[name].prompt_without_system
    assert tokens == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert has_system_turn(tokenizer, {}) == (name not in ("mistral", "gemma3"))


def test_a_conversation_keeps_its_turns_and_its_own_system_prompt(name, tokenizer):
    turns = (("user", "Is it gout?"), ("assistant", "Yes."))
    told = [{"role": role, "content": content} for role, content in (*turns, ("user", QUESTION))]
    arguments = ARGUMENTS.get(name, {})
    for system, own in ((SYSTEM, ()), ("Be kind.", (("system", "Be kind."),))):
        question = dataclasses.replace(OPEN, turns=(*own, *turns))
        [tokens] = render_prompts([question], BRIEF, tokenizer)
        assert tokens == tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, *told], add_generation_prompt=True, return_dict=False, **arguments
        )
    with pytest.raises(InputError, match="question q: expected text without the tokenizer's special tokens, got"):
        render_prompts(
            [dataclasses.replace(OPEN, turns=(("user", f"x{end_of_turn(tokenizer)}"), ("assistant", "y")))],
            BRIEF,
            tokenizer,
        )


@pytest.mark.parametrize(("name", "template"), [("gemma3", GEMMA2), ("mistral", MISTRAL_V1)])
def test_templates_without_a_system_turn(folders, tmp_path, name, template):
    tokenizer = with_template(folders[name], tmp_path / "old", template)
    with pytest.raises(
        InputError,
        match=r"data\.system_prompt: expected none, .* takes none, got 'Be brief\.'; .*got: (System role|Conversation)",
    ):
        render_prompts([OPEN], BRIEF, tokenizer)
    [tokens] = render_prompts([OPEN], dataclasses.replace(BRIEF, system_prompt=""), tokenizer)
    turns = [{"role": "user", "content": QUESTION}]
    assert tokens == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert end_of_turn(tokenizer) == FAMILIES[name].end_of_turn


def test_a_prompt_is_the_same_every_day(folders):
    """Llama 3.2's template writes today's date: resumed tomorrow, a run would go on with other prompts."""
    tokenizer = load_tokenizer(folders["llama3.2"])
    [tokens] = render_prompts([OPEN], BRIEF, tokenizer)
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(tokens)
    dated = dataclasses.replace(BRIEF, chat_template_kwargs={"date_string": "01 Jan 2026"})
    [tokens] = render_prompts([OPEN], dated, tokenizer)
    assert "Today Date: 01 Jan 2026\n" in tokenizer.decode(tokens)
    computed = FAMILIES["llama3.2"].template.replace('strftime_now("%d %b %Y")', "strftime_now('%d ' + '%b')")
    with pytest.raises(InputError, match="with plain texts as formats of dates, got one computed"):
        with_template(folders["llama3.2"], folders["llama3.2"].parent / "computed", computed)


def test_arguments_reach_the_template_and_unknown_ones_are_refused(folders):
    tokenizer = load_tokenizer(folders["qwen3"])
    thoughtless = dataclasses.replace(BRIEF, chat_template_kwargs={"enable_thinking": False})
    [tokens] = render_prompts([OPEN], thoughtless, tokenizer)
    assert tokenizer.decode(tokens) == FAMILIES["qwen3"].prompt + "<think>\n\n</think>\n\n"
    for key in ("enable_thinkin", "tokenize", "messages"):
        with pytest.raises(InputError, match=rf"data\.chat_template_kwargs\.{key}: expected an argument that the chat"):
            render_prompts([OPEN], dataclasses.replace(BRIEF, chat_template_kwargs={key: False}), tokenizer)


# ---- responses -------------------------------------------------------------------------------------------------------


def test_a_response_ends_at_the_familys_token(name, tokenizer):
    family = FAMILIES[name]
    assert end_of_turn(tokenizer) == family.end_of_turn
    text = "Reason.\n\nAllopurinol. \\boxed{A} °C ≥ 9.1 \N{PILL}"
    tokens = encode_response(text, tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens[-1]) == family.end_of_turn
    assert tokenizer.decode(tokens[:-1], clean_up_tokenization_spaces=False) == text
    [prompt] = render_prompts([OPEN], dataclasses.replace(BRIEF, system_prompt=""), tokenizer)
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Allopurinol."}]
    if has_system_turn(tokenizer, {}):
        turns.insert(0, {"role": "system", "content": ""})
    whole = tokenizer.apply_chat_template(turns, return_dict=False, **ARGUMENTS.get(name, {}))
    # Qwen3's template shows the last answer with its reasoning, here none.
    ours = prompt + encode_response("<think>\n\n</think>\n\n" * (name == "qwen3") + "Allopurinol.", tokenizer)
    assert whole[: len(ours)] == ours
    assert tokenizer.decode(whole[len(ours) :]).strip() == ""


def test_what_ends_a_response_comes_from_template_tokenizer_and_generation_config(name, tokenizer, folders):
    ids = stop_ids(tokenizer, (), [folders[name]])
    assert set(tokenizer.convert_ids_to_tokens(ids)) == {*FAMILIES[name].stops, FAMILIES[name].end_of_turn}
    assert len(ids) == len(set(ids))
    assert tokenizer.convert_ids_to_tokens(ids[0]) == FAMILIES[name].end_of_turn
    alone = stop_ids(tokenizer, (), [])
    assert set(tokenizer.convert_ids_to_tokens(alone)) == {FAMILIES[name].end_of_turn, FAMILIES[name].eos}
    assert stop_ids(tokenizer, [FAMILIES[name].eos], [folders[name]]) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("{", r"generation_config\.json: expected JSON, got: "),
        ('{"eos_token_id": "1"}', r"eos_token_id: expected a whole number or a list of them, got '1'"),
        ('{"eos_token_id": [1, true]}', r"eos_token_id: expected a whole number or a list of them, got \[1, True\]"),
        ('{"eos_token_id": [1, 99999]}', r"eos_token_id: expected ids of the tokenizer's tokens, got 99999; rollout"),
        ("[1.5]", r"eos_token_id: expected a whole number or a list of them, got \[1\.5\]"),
    ],
)
def test_generation_configs_that_cannot_be_used(folders, tmp_path, written, line):
    (tmp_path / "generation_config.json").write_text(written)
    with pytest.raises(InputError, match=line):
        stop_ids(load_tokenizer(folders["gemma3"]), (), [tmp_path])


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", r"ends the assistant's text with an added token, got"),
        ("{{ messages[0].content }}<|im_end|>", r"with an added token, got 'Which\?<\|im_end\|>' without it"),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", r"an added token, got '</s>' after it"),
        ("{{ raise_exception('no') }}", r"that takes turns of user, assistant, got: no"),
        ("{{ 1 / 0 }}", r"takes turns of user, assistant, got: division by zero"),
        ("{{ messages + 1 }}", r"takes turns of user, assistant, got: can only concatenate list"),
        ("{% for m in messages %}", r"got: .*Unexpected end of template|got: Unexpected end"),
        ("{% for i in range(10**9) %}{% endfor %}", r"got: Range too big"),
        ("{{ ''.__class__.__mro__ }}", r"got: .*unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"got: maximum recursion depth exceeded"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_by_their_folder(folders, tmp_path, template, line):
    with pytest.raises(InputError, match=rf"^tokenizer\.path: expected a chat template in {tmp_path}.*{line}"):
        with_template(folders["qwen2.5"], tmp_path / "bad", template)


PARTS = [
    *("{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['content'] }}", "<|im_end|>", "<|im_start|>"),
    *("{{ messages[0].content }}", "{{ messages[-1]['content'] }}", "{{ m.role }}", "{% if m.role == 'user' %}"),
    *(
        "{% if add_generation_prompt %}",
        "{% else %}",
        "{% endif %}",
        "{{ bos_token }}",
        "{{ eos_token }}",
        "\n",
        "text",
    ),
    *("{{", "}}", "{%", "%}", "{{ m }}", "{{ m.content|trim|upper }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"),
    *(
        "{% set x = messages %}",
        "{{ strftime_now('%Y') }}",
        "{{ strftime_now(x) }}",
        "{% break %}",
        "{{ messages.pop() }}",
    ),
]


def test_random_templates_write_every_turn_or_are_refused_in_one_line(folders):
    rng, tokenizer = random.Random(0), load_tokenizer(folders["qwen2.5"])
    whole = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    written, refused = 0, list[str]()
    for _ in range(int(os.environ.get("CRPO_JAX_FUZZ") or 60)):
        around = ("".join(rng.choices(PARTS, k=rng.randint(0, 2))) for _ in range(2))
        tokenizer.chat_template = (whole if rng.random() < 0.8 else "".join(rng.choices(PARTS, k=6))).join(around)
        try:
            end = end_of_turn(tokenizer)
            [tokens] = render_prompts([OPEN], BRIEF, tokenizer)
            assert encode_response("Yes.", tokenizer)[-1] == tokenizer.convert_tokens_to_ids(end)
            assert SYSTEM in tokenizer.decode(tokens)
            assert QUESTION in tokenizer.decode(tokens)
            written += 1
        except InputError as error:
            refused.append(str(error))
    assert written > 5
    assert len(refused) > 5
    known = ("tokenizer.path: expected a chat template", "data.system_prompt: expected")
    assert [line for line in refused if not line.startswith(known)] == []


def test_text_among_the_added_tokens_is_text(folders):
    """Gemma's vocabulary has line breaks and HTML among its added tokens, which questions may hold."""
    tokenizer = load_tokenizer(folders["gemma3"])
    assert not {"\n\n", "<b>"} & set(control_tokens(tokenizer))
    question = dataclasses.replace(OPEN, question="Two\n\nparagraphs, <b>bold")
    [tokens] = render_prompts([question], BRIEF, tokenizer)
    assert "Two\n\nparagraphs, <b>bold" in tokenizer.decode(tokens)


def test_a_prompt_may_ask_for_a_tag_that_is_a_token_of_the_template(folders, tmp_path):
    """Qwen3's <think> is one: neither the prompt grpo nor a system prompt could ask for it."""
    tokenizer, own = load_tokenizer(folders["qwen3"]), tmp_path / "own.jinja"
    own.write_text("Reason in <think></think>. {{ question }}")
    settings = [Data(prompt="grpo"), Data(prompt=str(own)), dataclasses.replace(BRIEF, system_prompt="Use <think>.")]
    for data in settings:
        [tokens] = render_prompts([OPEN], data, tokenizer)
        assert "<think>" in tokenizer.decode(tokens)
    with pytest.raises(InputError, match="question q: expected text without the tokenizer's special tokens, got <thin"):
        render_prompts([dataclasses.replace(OPEN, question="<think>?")], BRIEF, tokenizer)


def test_effective_tokens_of_every_family(name, tokenizer, folders):
    table = effective_table(folders[name] / "tokenizer.json", len(tokenizer))
    for token in FAMILIES[name].tokens:
        assert not table[tokenizer.convert_tokens_to_ids(token)], token
    for text in ("Tophi, uric acid 9.1 mg/dL.\n\n\\boxed{C}", " °C ≥ α"):
        assert table[tokenizer.encode(text, add_special_tokens=False)].all(), text
    for text in ("痛み", "вероятно", "👍"):
        assert not table[tokenizer.encode(text, add_special_tokens=False)].all(), text
    assert np.flatnonzero(table).size > 400
