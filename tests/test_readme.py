"""What the README tells a newcomer to type, and where it points."""

import re
import shlex
from pathlib import Path

import pytest

from crpo_jax import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python -m crpo_jax\.(\w+)([^`\n]*)", README)
SECTIONS = "|".join(sorted({key.split(".")[0] for key in config.setting_fields()}))
SETTINGS = re.findall(rf"\b((?:{SECTIONS})\.[a-z_.]+)=", README)


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_every_command_exists_and_its_settings_are_known(name, arguments):
    assert (ROOT / "crpo_jax" / f"{name}.py").exists()
    overrides = [word for word in shlex.split(arguments, comments=True) if re.match(r"[a-z]+\.[a-z_.]+=", word)]
    config.load_config(ROOT / "configs" / "clinical_r1_3b.yaml", overrides)


@pytest.mark.parametrize("key", sorted(set(SETTINGS)))
def test_every_setting_named_exists(key):
    assert key in config.setting_fields()


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_every_link_leads_somewhere(target):
    headings = {
        "#" + re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    assert target in headings or (ROOT / target).is_file()
