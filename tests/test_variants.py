"""configs/variants: each published recipe has what its paper has, over any other config; test_train.py runs them."""

from operator import attrgetter
from pathlib import Path

import pytest

from crpo_jax import api, cli, config

CONFIGS = Path(__file__).parents[1] / "configs"
TINY, PAPER = CONFIGS / "tiny.yaml", CONFIGS / "clinical_r1_3b.yaml"

NEITHER = {"crpo.kl_coef": 0.0, "crpo.kl_target": 0.0, "crpo.entropy_coef": 0.0, "crpo.truncated": "keep"}
RECIPES = {
    "dr_grpo": NEITHER
    | {"crpo.advantage": "dr_grpo", "crpo.aggregation": "constant", "crpo.ratio": "token"}
    | {"crpo.clip_low": 0.2, "crpo.clip_high": 0.2, "crpo.dynamic_sampling": 0, "reward.overlong": 0.0},
    "dapo": NEITHER
    | {"crpo.advantage": "grpo", "crpo.aggregation": "token_mean", "crpo.ratio": "token"}
    | {"crpo.clip_low": 0.2, "crpo.clip_high": 0.28, "crpo.dynamic_sampling": 10}
    | {"reward.overlong": 1.0, "reward.overlong_share": 4096 / 20480},
    "sapo": NEITHER
    | {"crpo.loss": "sapo", "crpo.sapo_tau_positive": 1.0, "crpo.sapo_tau_negative": 1.05}
    | {"crpo.advantage": "grpo", "crpo.aggregation": "sequence_mean", "crpo.ratio": "token"}
    | {"crpo.dynamic_sampling": 0, "reward.overlong": 0.0},
    "gspo": NEITHER
    | {"crpo.advantage": "grpo", "crpo.aggregation": "sequence_mean", "crpo.ratio": "sequence"}
    | {"crpo.sequence_clip_low": 3e-4, "crpo.sequence_clip_high": 4e-4}
    | {"crpo.dynamic_sampling": 0, "reward.overlong": 0.0},
}
"""Everything that each file sets."""


def recipe(name: str) -> Path:
    return CONFIGS / "variants" / f"{name}.yaml"


def test_every_recipe_is_tested_here():
    assert sorted(RECIPES) == sorted(path.stem for path in (CONFIGS / "variants").iterdir())


@pytest.mark.parametrize("base", [TINY, PAPER], ids=lambda path: path.stem)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_changes_what_its_paper_changes_and_nothing_else(name: str, base: Path):
    loaded, before = config.load_config([base, recipe(name)]), config.load_config(base)
    assert {key: attrgetter(key)(loaded) for key in RECIPES[name]} == RECIPES[name]
    assert config.replaced(before, RECIPES[name]) == loaded


def test_later_files_replace_what_they_name(tmp_path: Path):
    """On the command line and from Python alike; bad keys are looked up in their own file."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("crpo: {clip_high: 0.5}\n", encoding="utf-8")
    args = cli.build_parser("train", "").parse_args(
        ["--config", str(TINY), "crpo.steps=3", "--config", str(recipe("dapo")), "--config", str(mine)]
    )
    loaded, name = cli.load_platform_settings(args, "cpu")
    assert (loaded.crpo.clip_high, loaded.crpo.kl_coef, loaded.crpo.steps, loaded.model.path) == (0.5, 0.0, 3, "")
    assert loaded == config.load_config([TINY, recipe("dapo"), mine], ["crpo.steps=3"])
    assert name == "tiny-dapo-mine"
    assert api.choose_settings([TINY, recipe("dapo"), mine], {"crpo.steps": 3}, {}, "cpu") == loaded
    mine.write_text("crpo: {clip_hihg: 0.5}\n", encoding="utf-8")
    with pytest.raises(config.InputError, match=rf"{mine}: crpo\.clip_hihg: unknown key; did you mean"):
        cli.load_platform_settings(args, "cpu")
