"""Prompts: the instruction around a question, and its tokens through the tokenizer's own chat template.

A prompt is the system turn, the question's earlier turns, the user turn and the opening of the assistant's turn; a
response is what follows, to the end-of-turn token inclusive. Cold start, RL and evaluation all use this module, so that
they cannot disagree.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from crpo_jax.config import Data
from crpo_jax.data.chat_template import (
    Turn,
    check_arguments,
    control_tokens,
    end_of_turn,
    expected,
    has_system_turn,
    write_chat,
)
from crpo_jax.data.prompt_file import read_text, render_turns
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError, brief

if TYPE_CHECKING:
    from crpo_jax.data.tokenizer import Tokenizer

ONE_LETTER, ONE_ANSWER = (
    "Use each tag exactly once and write nothing outside the two sections.\n"
    f"Write \\boxed{{}} only once, with {content} inside. Write in English only."
    for content in ("a single letter", "the answer alone")
)


def general_format(reasoning: str, answer: str) -> str:
    """The baseline's instruction: reasoning and answer, each in its tag, with no further demands on either."""
    return (
        "Answer the clinical multiple-choice question below. Reason first, then give the one best option. "
        "Your whole response must have this shape:\n\n"
        f"<{reasoning}>\nYour reasoning.\n</{reasoning}>\n"
        f"<{answer}>\nThe letter of the option, as in \\boxed{{LETTER}}.\n</{answer}>\n\n{ONE_LETTER}"
    )


def open_format(reasoning: str, answer: str) -> str:
    """The same for a question without options."""
    return (
        "Answer the question below. Reason first, then give the answer. "
        "Your whole response must have this shape:\n\n"
        f"<{reasoning}>\nYour reasoning.\n</{reasoning}>\n"
        f"<{answer}>\nThe final answer, as in \\boxed{{ANSWER}}.\n</{answer}>\n\n{ONE_ANSWER}"
    )


PROMPTS: dict[str, str] = {
    "crpo": (
        "Work through the clinical multiple-choice question below as an experienced physician would, "
        "and give the one best option. "
        "Your whole response must have this shape:\n\n"
        "<dx>\n"
        "(System 1: Intuitive) Your immediate impression: which pattern the presentation fits, "
        "and which answers come to mind first.\n"
        "(System 2: Analytical) Your deliberate check: the findings that matter, then each option in turn, "
        "with what in the question speaks for it and what rules it out.\n"
        "</dx>\n"
        "<conclusion>\n"
        "The answer your analysis leads to and the findings from above that decide it, "
        "ending with the letter of the option, as in \\boxed{LETTER}.\n"
        "</conclusion>\n\n" + ONE_LETTER
    ),
    "grpo": general_format("think", "answer"),
    "grpo_dx": general_format("dx", "conclusion"),
    "released": (
        "Below is a medical question with several options, one of which is right. "
        "Put your step-by-step reasoning between <think> and </think>. "
        "After it, between <answer> and </answer>, explain your choice in a few words and state its letter once, "
        "as in \\boxed{LETTER}. "
        "Write in English."
    ),
    "brief": "",
    "boxed": (
        "Answer the question below. Reason step by step and finish with the final answer alone, as in \\boxed{ANSWER}. "
        "Where options are listed, the answer is the letter of one of them."
    ),
}
"""The instruction of each built-in data.prompt; the question and its options follow it.

`brief` has none: a small model has learned the format in its cold start.
"""

OPEN_PROMPTS: dict[str, str] = {
    "grpo": open_format("think", "answer"),
    "grpo_dx": open_format("dx", "conclusion"),
    "brief": PROMPTS["brief"],
    "boxed": PROMPTS["boxed"],
}
"""The same of a question without options; those that are not here ask for the letter of one."""


def instruction(name: str) -> str:
    if name not in PROMPTS:
        raise InputError(f"data.prompt: expected one of {', '.join(PROMPTS)}, got {name!r}")
    return PROMPTS[name]


def user_turn(question: Question, name: str) -> str:
    """The instruction, the question, and its options as `A) text` lines."""
    asked = instruction(name) if question.options else OPEN_PROMPTS.get(name, instruction(name))
    options = "\n".join(f"{letter}) {text}" for letter, text in question.options.items())
    return "\n\n".join(part for part in (asked, question.question, options) if part)


def read_instruction(prompt: str) -> str:
    """A built-in instruction, or the text of a Jinja file."""
    return PROMPTS[prompt] if prompt in PROMPTS else read_text("data.prompt", Path(prompt))


def user_turns(questions: Sequence[Question], prompt: str) -> list[str]:
    """The user turn of every question, by a built-in instruction or a Jinja file."""
    if prompt in PROMPTS:
        for question in questions:
            if not question.options and prompt not in OPEN_PROMPTS:
                raise InputError(
                    f"data.prompt: expected {', '.join(OPEN_PROMPTS)} or a Jinja file for questions without options, "
                    f"got {prompt}, which asks for a letter, and question {question.id}"
                )
        return [user_turn(question, prompt) for question in questions]
    return render_turns(Path(prompt).expanduser(), questions)


def render_prompts(questions: Sequence[Question], data: Data, tokenizer: "Tokenizer") -> list[list[int]]:
    """The prompt tokens of every question, up to where the response begins.

    A system turn is written even if it is empty, since with none Qwen's template inserts its own; not so where the
    template has no such turn. A question or system prompt that spells one of the template's tokens is refused: it could
    end its own turn and open another.
    """
    if not questions:
        return []
    arguments, system = data.chat_template_kwargs, read_system_prompt(data)
    check_arguments(arguments, tokenizer)
    control = control_tokens(tokenizer, system + read_instruction(data.prompt))
    refuse_tokens(system, control, "data.system_prompt")
    system_turns = open_conversation(system, tokenizer, arguments)
    texts = []
    for question, user in zip(questions, user_turns(questions, data.prompt), strict=True):
        turns = [{"role": role, "content": content} for role, content in (*question.turns, ("user", user))]
        for turn in turns:
            refuse_tokens(turn["content"], control, f"question {question.id}")
        if turns[0]["role"] != "system":  # a conversation's own takes the place of data.system_prompt
            turns = [*system_turns, *turns]
        texts.append(write_whole(turns, tokenizer, arguments))
    # The template has written all special tokens: the tokenizer must add none of its own.
    return cast(Any, tokenizer)(texts, add_special_tokens=False)["input_ids"]


def read_system_prompt(data: Data) -> str:
    """data.system_prompt, or the text of the file that it names as `file:PATH`."""
    path = data.system_prompt.removeprefix("file:")
    return data.system_prompt if path == data.system_prompt else read_text("data.system_prompt", Path(path)).strip()


def open_conversation(system: str, tokenizer: "Tokenizer", arguments: Mapping[str, Any]) -> list[Turn]:
    """The system turn, or nothing for an empty prompt where the template has no such turn; InputError where it takes
    no system prompt."""
    if not system and not has_system_turn(tokenizer, arguments):
        return []
    turn, user = {"role": "system", "content": system}, {"role": "user", "content": "Which?"}
    try:
        write_chat(tokenizer, [turn, user], arguments)
    except InputError as error:
        write_chat(tokenizer, [user], arguments)  # where this is refused too, it is not for the system prompt
        raise InputError(
            "data.system_prompt: expected none, as in data.system_prompt= alone, since the chat template takes none, "
            f"got {brief(system)}; {error}"
        ) from None
    return [turn]


def write_whole(turns: Sequence[Turn], tokenizer: "Tokenizer", arguments: Mapping[str, Any]) -> str:
    """The conversation as the chat template writes it; InputError where it leaves out or changes a turn."""
    text = write_chat(tokenizer, turns, arguments)
    for turn in turns:
        if turn["content"].strip() not in text:
            raise InputError(f"{expected(tokenizer)} that writes all turns unchanged, got {brief(text)}")
    return text


def refuse_tokens(text: str, tokens: Collection[str], where: str) -> None:
    if spelled := [token for token in tokens if token in text]:
        raise InputError(f"{where}: expected text without the tokenizer's special tokens, got {', '.join(spelled)}")


def encode_response(text: str, tokenizer: "Tokenizer") -> list[int]:
    """A response's tokens and the end-of-turn token: what the sampler would have drawn after the prompt.

    The text is encoded on its own, never together with the prompt: across the boundary the two could merge into a token
    that no sampled response starts with. A text that spells a special token is refused.
    """
    end = end_of_turn(tokenizer)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {end}
    refuse_tokens(text, special, f"response {brief(text, 40)}")
    last: Any = tokenizer.convert_tokens_to_ids(end)
    return [*tokenizer.encode(text, add_special_tokens=False), last]


@dataclass(frozen=True)
class Fitting:
    """The questions whose prompts fit data.max_prompt_tokens, those prompts, and the lengths of the others."""

    questions: list[Question]
    prompts: list[list[int]]  # of each question
    dropped: dict[str, int]  # tokens by question id


def fit_prompts(
    questions: Sequence[Question],
    data: Data,
    tokenizer: "Tokenizer",
    render: Callable[..., list[list[int]]] = render_prompts,
) -> Fitting:
    """The questions whose prompt fits; a longer one is dropped and counted, or an error, by data.overlong_prompts.

    A prompt is never cut: half a case, or half the options, would be another question.
    """
    fitting = Fitting([], [], {})
    for question, prompt in zip(questions, render(questions, data, tokenizer), strict=True):
        if len(prompt) <= data.max_prompt_tokens:
            fitting.questions.append(question)
            fitting.prompts.append(prompt)
        elif data.overlong_prompts == "error":
            raise InputError(
                f"question {question.id}: expected a prompt of at most "
                f"data.max_prompt_tokens={data.max_prompt_tokens}, got {len(prompt)}"
            )
        else:
            fitting.dropped[question.id] = len(prompt)
    if questions and not fitting.questions:
        lengths = fitting.dropped.values()
        raise InputError(
            f"data.max_prompt_tokens: expected room for at least one question, got {data.max_prompt_tokens}; "
            f"the shortest prompt has {min(lengths)} tokens; data.max_prompt_tokens={max(lengths)} keeps all"
        )
    return fitting


def check_dropped(
    lengths: Collection[int], total: int, what: str, data: Data, key: str = "data.max_prompt_tokens", limit: int = 0
) -> None:
    """Refuses a run that would drop more than data.max_dropped_share of its questions, or of its traces; `lengths` are
    the dropped ones' in tokens, `limit` is what `key` is set to, for traces."""
    if len(lengths) > data.max_dropped_share * total:
        limit, wanted = limit or data.max_prompt_tokens, f"at least {1 - data.max_dropped_share:.0%} of the {what}"
        raise InputError(
            f"{key}: expected room for {wanted}, got {limit}: {len(lengths):,} of {total:,} are longer, up to "
            f"{max(lengths)} tokens; {key}={max(lengths)} keeps all; raise data.max_dropped_share to drop more"
        )
