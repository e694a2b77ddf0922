"""The tokenizer's chat template: conversations as text, the token that ends a turn, the tokens that end a response.

The template is the tokenizer's own, by transformers. What it writes must not depend on the day: where it asks for
today's date, it gets DATE. No jax.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crpo_jax.errors import InputError, brief

if TYPE_CHECKING:
    from crpo_jax.data.tokenizer import Tokenizer

Turn = Mapping[str, str]
"""A turn of a conversation: its role and its content."""

DATE = datetime.date(2024, 7, 26)
"""Today, in every prompt: the date that the templates of Llama 3 write where they are told none."""

CALL_OF_DATE = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")

OWN_ARGUMENTS = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents"),
        *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
        *("sanitize_control_tokens", "strftime_now", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
    )
)
"""What a run passes itself, or what belongs to transformers and not to the template."""

SYSTEM, QUESTION, ANSWER = "Be brief.", "Which?", "Gout."
"""The conversation by which a template is examined."""


def write_chat(
    tokenizer: "Tokenizer",
    turns: Sequence[Turn],
    arguments: Mapping[str, Any] | None = None,
    *,
    open_answer: bool = True,
) -> str:
    """The turns as the template writes them, with the opening of the assistant's unless told otherwise.

    Raises InputError with what the template raises.
    """
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            chat_template=dated_template(tokenizer),
            tokenize=False,
            add_generation_prompt=open_answer,
            **(arguments or {}),
        )
    except Exception as error:  # noqa: BLE001 (a template may divide by zero, or add a number to a text)
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
        raise InputError(f"{expected(tokenizer)} that takes turns of {roles}, got: {reason_of(error)}") from None
    return text


def expected(tokenizer: "Tokenizer") -> str:
    return f"tokenizer.path: expected a chat template in {tokenizer.name_or_path}"


def reason_of(error: Exception) -> str:
    """The first line of an error's message, or else its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def dated_template(tokenizer: "Tokenizer") -> str:
    """The template with DATE in place of today's, so that a run resumed tomorrow has the same prompts."""
    template = CALL_OF_DATE.sub(lambda call: json.dumps(DATE.strftime(call[2])), tokenizer.get_chat_template())
    if "strftime_now(" in template:
        raise InputError(f"{expected(tokenizer)} with plain texts as formats of dates, got one computed")
    return template


def check_arguments(arguments: Mapping[str, Any], tokenizer: "Tokenizer") -> None:
    """Refuses an argument that the template would not see, such as a misspelled one."""
    template = tokenizer.get_chat_template()
    for name in arguments:
        if name in OWN_ARGUMENTS or not re.search(rf"\b{re.escape(name)}\b", template):
            raise InputError(
                f"data.chat_template_kwargs.{name}: expected an argument that the chat template in "
                f"{tokenizer.name_or_path} reads, got {'one of apply_chat_template' if name in OWN_ARGUMENTS else name}"
            )


# ---- tokens of the template ------------------------------------------------------------------------------------------


def control_tokens(tokenizer: "Tokenizer", instructions: str = "") -> list[str]:
    """The tokens that no text may spell: special ones, those written `<|...|>`, and those in the chat template.

    Others are text: among the tokens added to Gemma's vocabulary are runs of line breaks and HTML tags. So is a tag in
    the template that `instructions` ask for, such as Qwen3's <think>.
    """
    template = tokenizer.get_chat_template()
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or (token.content.startswith("<|") and token.content.endswith("|>"))
        or (token.content in template and token.content not in instructions and not token.content.isspace())
    ]


def end_of_turn(tokenizer: "Tokenizer") -> str:
    """The token that the template writes after an assistant's text; InputError where it writes none."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    text = write_chat(tokenizer, turns, open_answer=False)
    _, answer, tail = text.rpartition(ANSWER)
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    ends = [token for token in added if answer and not token.isspace() and tail.lstrip(" ").startswith(token)]
    if not ends:
        got = f"{brief(tail)} after it" if answer else f"{brief(text)} without it"
        raise InputError(f"{expected(tokenizer)} that ends the assistant's text with an added token, got {got}")
    return max(ends, key=len)


def has_system_turn(tokenizer: "Tokenizer", arguments: Mapping[str, Any]) -> bool:
    """Whether the template gives the system prompt a turn of its own; some write it into the user's, some refuse it."""
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    try:
        text = write_chat(tokenizer, turns, arguments)
    except InputError:
        return False
    between = text.partition(SYSTEM)[2].partition(QUESTION)[0]
    return any(token in between for token in control_tokens(tokenizer))


# ---- the end of a response -------------------------------------------------------------------------------------------


def stop_ids(tokenizer: "Tokenizer", stop: Sequence[str], folders: Iterable[Path]) -> tuple[int, ...]:
    """The ids that end a response: of the tokens in rollout.stop, or where that is empty of the template's end of turn,
    the tokenizer's eos_token, and the eos_token_id in generation_config.json of these folders."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    for token in stop:
        if token not in vocabulary:
            raise InputError(f"rollout.stop: expected tokens of {tokenizer.name_or_path}, got {token!r}")
    if stop:
        return tuple(vocabulary[token] for token in stop)
    tokens = [end_of_turn(tokenizer), *([tokenizer.eos_token] if tokenizer.eos_token in vocabulary else [])]
    ids, known = [vocabulary[token] for token in tokens], frozenset(vocabulary.values())
    for folder in folders:
        listed = read_eos_ids(folder / "generation_config.json")
        if unknown := [number for number in listed if number not in known]:
            raise InputError(
                f"{folder / 'generation_config.json'}: eos_token_id: expected ids of the tokenizer's tokens, "
                f"got {unknown[0]}; rollout.stop=[TOKEN] is used instead of them"
            )
        ids += listed
    return tuple(dict.fromkeys(ids))


def read_eos_ids(path: Path) -> list[int]:
    """The eos_token_id of a generation_config.json, one or several; none where there is no such file."""
    if not path.is_file():
        return []
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON, got: {reason_of(error)}") from None
    listed = settings.get("eos_token_id") if isinstance(settings, dict) else settings
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(number) is int for number in ids):
        raise InputError(f"{path}: eos_token_id: expected a whole number or a list of them, got {brief(listed)}")
    return ids
