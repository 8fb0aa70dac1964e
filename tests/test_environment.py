"""The three lists of what the project needs agree: pyproject.toml, requirements.lock and environment.yml."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCKED = {canonicalize_name(line.partition("==")[0]): re.split("==| ;", line)[1] for line in LOCK}
REQUIRED = sorted({*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())})


def test_lock_is_a_sorted_list_of_exact_public_versions():
    for line in LOCK:
        assert re.fullmatch(r'[\w.-]+==[\w.]+( ; platform_system == "Linux")?', line), line
    assert list(LOCKED) == sorted(LOCKED)
    assert len(LOCKED) == len(LOCK)


@pytest.mark.parametrize("text", REQUIRED)
def test_lock_has_a_version_that_the_project_admits(text):
    requirement = Requirement(text)
    if requirement.name == PROJECT["name"]:
        assert requirement.extras <= set(PROJECT["optional-dependencies"])
    else:
        assert requirement.specifier.contains(LOCKED[canonicalize_name(requirement.name)])


def test_triton_is_never_needed_to_import_the_package():
    assert not any(Requirement(text).name == "triton" for text in PROJECT["dependencies"])
    (line,) = (line for line in LOCK if line.startswith("triton=="))
    assert line.endswith('platform_system == "Linux"')


def test_conda_users_get_the_lock_and_a_python_that_the_project_admits():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    assert [re.split("[=<>]", entry)[0] for entry in conda] == ["python", "pip"]
    assert SpecifierSet(PROJECT["requires-python"]).contains(conda[0].removeprefix("python="))
