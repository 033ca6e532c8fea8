"""constraints.txt pins exactly what pyproject.toml's ranges lead to, so that a set-up can be repeated."""

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# What a CUDA build of torch brings and pins itself; the CPU build brings none of it.
FOLLOWS_FROM_TORCH = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton).*")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    """Each pinned distribution's normalized name and version, markers left out."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^,*]+", str(requirement.specifier)) for requirement in requirements)
    return {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in requirements}


def declared() -> list[Requirement]:
    """Everything that pyproject.toml asks for, but the extra that repeats the others."""
    table = project()
    extras = table["project"]["optional-dependencies"]
    lists = [table["project"]["dependencies"], *table["dependency-groups"].values()]
    lists += [extra for name, extra in extras.items() if name != "all"]
    return [Requirement(text) for texts in lists for text in texts]


def closure(requirement: Requirement, seen: set[str]) -> Iterator[str]:
    """The installed distributions that a requirement leads to here, by normalized name."""
    if str(requirement) in seen:
        return
    seen.add(str(requirement))
    name = canonicalize_name(requirement.name)
    try:
        needed = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return  # an extra that this machine cannot have
    yield name
    for text in needed:
        below = Requirement(text)
        marker = below.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
            below.marker = None
            yield from closure(below, seen)


def test_every_dependency_is_pinned() -> None:
    seen: set[str] = set()
    needed = {name for requirement in declared() for name in closure(requirement, seen)}
    assert len(needed) > 80, "hardly anything is installed; this test has nothing to look at"
    assert {name for name in needed - pins().keys() if not FOLLOWS_FROM_TORCH.fullmatch(name)} == set()


def test_every_pin_satisfies_its_range() -> None:
    for requirement in declared():
        pinned = Version(pins()[canonicalize_name(requirement.name)])
        assert requirement.specifier.contains(pinned, prereleases=True), requirement


def test_torch_is_pinned_for_every_machine() -> None:
    assert pins()["torch"] == "2.13.0"
    assert [name for name in pins() if FOLLOWS_FROM_TORCH.fullmatch(name)] == []
    assert all(Version(version).local is None for version in pins().values())


def test_the_extras_are_complete_and_all_combines_them() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert set(extras) == {"train", "quantize", "server", "worker", "postgres", "s3", "deepspeed", "all"}
    (everything,) = (Requirement(text) for text in extras["all"])
    assert everything.name == project()["project"]["name"]
    assert everything.extras == set(extras) - {"all"}


def test_dependency_ranges_have_no_upper_bounds() -> None:
    assert [str(requirement) for requirement in declared() if re.search(r"==|~=|<", str(requirement.specifier))] == []
