"""Every setting that claims a source has it: the paper's words, the authors' code, or another paper; the rest is ours.

`../shared/paper/clinical-r1.txt`, where it is present, is the paper's text: each quotation is looked up in its section.
"""

import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from crpo_jax import config

ROOT = Path(__file__).parents[1]
TEXT = ROOT.parent / "shared" / "paper" / "clinical-r1.txt"
LABELS = {key: item.source for key, item in config.setting_fields().items()}

SECTIONS = ("section 3", "section 4.1", "section 4.2", "section 4.3", *(f"equation {number}" for number in range(1, 5)))
"""Where arXiv 2512.00601 says what a run does."""

PAPER: dict[str, tuple[str, Any, str]] = {
    "data.source": ("section 4.3", "medqa", "we use MedQA for Cold Start and GRPO training"),
    "data.split": ("section 4.3", "train", "the MedQA training set"),
    "data.part": ("section 4.3", "auto", "we train on the remaining half"),
    "data.eval_split": ("section 4.3", "test", "The test set of MedQA is treated as in-domain evaluation"),
    "reward.design": ("section 3", "crpo", "The reward is the summation of three parts"),
    "reward.k": ("section 4.3", 10.0, "the importance of accuracy coefficient k = 10"),
    "reward.format": ("section 3", 1.0, "in such format, a reward of 1 is given"),
    "reward.citation": ("section 3", 0.5, "an additional reward of 0.5 is given"),
    "reward.consistency": ("equation 4", 0.5, r"0.5 \cdot r_{\text{consistency}}(o)"),
    "crpo.epochs": ("section 4.3", 20, "after distillation for 20 epochs"),
    "crpo.group_size": ("section 4.3", 5, "The rollout number (G) is 5"),
    "crpo.kl_estimator": ("equation 2", "k3", r"\log \frac{\pi_{ref}(o_i|q)}{\pi_\theta(o_i|q)} - 1"),
    "crpo.advantage": ("equation 3", "grpo", r"\text{std}(\{r_1, r_2, \dots, r_G\})"),
    "sft.epochs": ("section 4.3", 20, "for 20 epochs as the cold-start dataset"),
}
"""Section, value, and the paper's words."""

CODE: dict[str, tuple[Any, str]] = {
    "data.system_prompt": (
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "a user turn alone, before which Qwen's template puts this",
    ),
    "data.max_prompt_tokens": (1024, "data.max_prompt_length=1024"),
    "rollout.max_new_tokens": (4096, "data.max_response_length=4096"),
    "rollout.temperature": (0.6, "rollout.temperature=0.6"),
    "rollout.top_p": (1.0, "top_p: 1"),
    "rollout.top_k": (0, "top_k: -1, which is off"),
    "optimizer.algorithm": ("adamw", "AdamW"),
    "optimizer.learning_rate": (1e-6, "actor.optim.lr=1e-6"),
    "optimizer.schedule": ("constant", "warmup_style: constant"),
    "optimizer.warmup_steps": (0, "none, only a ratio"),
    "optimizer.warmup_ratio": (0.0, "lr_warmup_steps_ratio: 0."),
    "optimizer.beta1": (0.9, "betas (0.9, 0.999)"),
    "optimizer.beta2": (0.999, "betas (0.9, 0.999)"),
    "optimizer.eps": (1e-8, "AdamW's default, 1e-8"),
    "optimizer.weight_decay": (0.01, "weight_decay 1e-2"),
    "optimizer.clip_norm": (1.0, "grad_clip: 1.0"),
    "crpo.prompts_per_step": (512, "data.train_batch_size=512"),
    "crpo.mini_batch_prompts": (16, "actor.ppo_mini_batch_size=16, times rollout.n responses"),
    "crpo.ratio": ("token", "a ratio per token"),
    "crpo.loss": ("clip", "PPO's clipped objective, verl's default policy loss"),
    "crpo.old_logprobs": ("trainer", "compute_log_prob of the actor before the first mini-batch"),
    "crpo.kl_in": ("loss", "actor.use_kl_loss=True"),
    "crpo.clip_low": (0.2, "clip_ratio: 0.2"),
    "crpo.clip_high": (0.2, "clip_ratio: 0.2"),
    "crpo.kl_coef": (0.001, "actor.kl_loss_coef=0.001"),
    "crpo.entropy_coef": (0.001, "entropy_coeff: 0.001"),
    "crpo.aggregation": ("token_mean", "a mean over the mask's tokens"),
    "crpo.truncated": ("keep", "nothing masked"),
    "lora.rank": (0, "no adapters in RL"),
    "sft.batch_size": (256, "train_batch_size: 256"),
    "sft.max_tokens": (4096, "data.max_length=4096"),
    "sft.held_out": (0.1, "int(len(df) * 0.9) to train on, which leaves 0.1"),
    "sft.lora.rank": (32, "model.lora_rank=32"),
    "sft.lora.alpha": (16.0, "model.lora_alpha=16"),
    "sft.lora.targets": (config.LINEAR_LAYERS, "model.target_modules=all-linear"),
    "sft.optimizer.algorithm": ("adamw", "AdamW"),
    "sft.optimizer.learning_rate": (1e-4, "optim.lr=1e-4"),
    "sft.optimizer.schedule": ("cosine", "get_cosine_schedule_with_warmup"),
    "sft.optimizer.warmup_steps": (0, "none, only a ratio"),
    "sft.optimizer.warmup_ratio": (0.1, "warmup_steps_ratio: 0.1"),
    "sft.optimizer.beta1": (0.9, "betas: [0.9, 0.95]"),
    "sft.optimizer.beta2": (0.95, "betas: [0.9, 0.95]"),
    "sft.optimizer.eps": (1e-8, "AdamW's default, 1e-8"),
    "sft.optimizer.weight_decay": (0.01, "weight_decay: 0.01"),
    "sft.optimizer.clip_norm": (1.0, "clip_grad: 1.0"),
    "evaluate.temperature": (0.8, "temperature=0.8"),
    "evaluate.top_p": (0.95, "top_p=0.95"),
    "evaluate.max_new_tokens": (4096, "max_tokens=4096"),
}
"""Value, and where it stands in github.com/BoyangGu1/Clinical-R1-3B or in the defaults of verl, which it calls."""

OTHERS: dict[str, tuple[str, Any]] = {
    "reward.overlong_share": ("arXiv 2503.14476, section 4.1", 4096 / 20480),
    "crpo.sapo_tau_positive": ("arXiv 2511.20347", 1.0),
    "crpo.sapo_tau_negative": ("arXiv 2511.20347", 1.05),
    "crpo.sequence_clip_low": ("arXiv 2507.18071, section 5.1", 3e-4),
    "crpo.sequence_clip_high": ("arXiv 2507.18071, section 5.1", 4e-4),
    "crpo.kl_gain": ("arXiv 1909.08593, section 2.2", 0.1),
}


def numbers(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)}


def test_the_settings_that_claim_the_paper_are_those_of_the_table():
    claimed = {key: label.removeprefix("paper, ") for key, label in LABELS.items() if label.startswith("paper")}
    assert claimed == {key: section for key, (section, _, _) in PAPER.items()}
    assert set(claimed.values()) <= set(SECTIONS)


def test_the_settings_that_claim_the_authors_code_are_those_of_the_table():
    assert {key for key, label in LABELS.items() if label == "authors' code"} == set(CODE)


def test_every_other_setting_names_another_paper_or_is_ours():
    others = {key: label for key, label in LABELS.items() if key not in PAPER and key not in CODE and label != "ours"}
    assert others == {key: label for key, (label, _) in OTHERS.items()}
    assert all(re.fullmatch(r"arXiv \d{4}\.\d{5}(, section \d(\.\d)?)?", label) for label in others.values())


@pytest.mark.parametrize("key", [*PAPER, *CODE, *OTHERS])
def test_the_default_is_what_the_source_says(key: str):
    """Numbers also stand in the words that are quoted, so that table and quotation cannot drift apart."""
    value, words = (
        PAPER[key][1:] if key in PAPER else CODE[key] if key in CODE else (OTHERS[key][1], str(OTHERS[key][1]))
    )
    assert config.setting_fields()[key].default == value
    if isinstance(value, float | int) and value:
        assert value in numbers(words)


@pytest.mark.parametrize("key", PAPER)
def test_the_paper_has_the_words_in_that_section(key: str):
    if not TEXT.is_file():
        pytest.skip(f"{TEXT} is not present: the quotations are not looked up")
    section, _, words = PAPER[key]
    assert words in " ".join(paper_part(TEXT.read_text(encoding="utf-8"), section).replace("$", "").split())


def paper_part(text: str, name: str) -> str:
    """A section without its subsections, or the displayed equation of that number."""
    kind, number = name.split()
    if kind == "equation":
        (equation,) = [part for part in re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL) if f"({number})" in part]
        return equation
    return re.split(r"^\d(?:\.\d)? [A-Z]", re.split(rf"^{re.escape(number)} [A-Z]", text, flags=re.M)[1], flags=re.M)[0]


# ---- the files of settings -------------------------------------------------------------------------------------------


def commented_settings(path: Path) -> list[tuple[str, str]]:
    """Every `key: value # comment` of a file of settings, by its dotted key."""
    pairs, section = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)([a-z_0-9]+):[^#]*(?:# (.*))?$", line)
        if match and not match[1]:
            section = match[2]
        elif match and match[3]:
            pairs.append((f"{section}.{match[2]}", match[3]))
    return pairs


@pytest.mark.parametrize("name", ["clinical_r1_3b", "tiny"])
def test_a_comment_in_a_config_names_the_settings_source(name: str):
    path = ROOT / "configs" / f"{name}.yaml"
    loaded, comments = config.load_config(path), commented_settings(path)
    assert "[paper]" not in path.read_text(encoding="utf-8")
    assert "[code]" not in path.read_text(encoding="utf-8")
    for key, comment in comments:
        if key in LABELS and attrgetter(key)(loaded) == config.setting_fields()[key].default:
            assert comment.startswith(LABELS[key]), key
    assert name != "clinical_r1_3b" or len(comments) > 10


def test_the_papers_config_has_what_the_authors_ran():
    """Also where the file says nothing: the cold start's optimizer, and RL's."""
    loaded = config.load_config(ROOT / "configs" / "clinical_r1_3b.yaml")
    for key, value in {key: row[-2] for key, row in (PAPER | CODE).items()}.items():
        assert attrgetter(key)(loaded) == value, key


def test_the_plan_of_the_papers_rows_starts_from_that_config():
    """From the published model the authors drew 1,024 questions at temperature 1."""
    path = ROOT / "configs" / "reproduce" / "clinical_r1_3b.yaml"
    plan: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = (path.parent / plan["config"]).resolve()
    assert base == ROOT / "configs" / "clinical_r1_3b.yaml"
    sft = config.load_config(base, plan["coldstart"]).sft
    assert (sft.optimizer.beta2, sft.optimizer.schedule, sft.optimizer.warmup_ratio) == (0.95, "cosine", 0.1)
    for name, row in plan["rows"].items():
        loaded = config.load_config(base, row.get("settings", []))
        if name in ("GRPO", "CRPO"):
            assert (loaded.rollout.temperature, loaded.crpo.prompts_per_step) == (1.0, 1024)
        elif name != "Baseline":
            assert (loaded.rollout.temperature, loaded.crpo.prompts_per_step) == (0.6, 512)
