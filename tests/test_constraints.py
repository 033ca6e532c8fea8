"""constraints.txt pins every dependency of pyproject.toml, so that an installation is reproducible."""

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.harness.audit import unreachable
from tests.harness.ports import free_loopback_port

ROOT = Path(__file__).parents[1]
# Dependencies of CUDA builds of torch, which pin them; the CPU build has none of them.
FOLLOWS_FROM_TORCH = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton).*")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    """The normalized name and the version of each pinned distribution, without markers."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^,*]+", str(requirement.specifier)) for requirement in requirements)
    return {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in requirements}


def declared() -> list[Requirement]:
    """All requirements in pyproject.toml, except the extra that combines the others."""
    table = project()
    extras = table["project"]["optional-dependencies"]
    lists = [table["project"]["dependencies"], *table["dependency-groups"].values()]
    lists += [extra for name, extra in extras.items() if name != "all"]
    return [Requirement(text) for texts in lists for text in texts]


def closure(requirement: Requirement, seen: set[str]) -> Iterator[str]:
    """The normalized names of the installed distributions that a requirement needs on this machine."""
    if str(requirement) in seen:
        return
    seen.add(str(requirement))
    name = canonicalize_name(requirement.name)
    try:
        needed = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return  # an extra that is not available on this machine
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
    assert len(needed) > 80, "too few distributions are installed for this test"
    assert {name for name in needed - pins().keys() if not FOLLOWS_FROM_TORCH.fullmatch(name)} == set()


def test_every_pin_satisfies_its_range() -> None:
    for requirement in declared():
        pinned = Version(pins()[canonicalize_name(requirement.name)])
        assert requirement.specifier.contains(pinned, prereleases=True), requirement


def test_torch_is_pinned_for_every_machine() -> None:
    assert pins()["torch"] == "2.13.0"
    assert [name for name in pins() if FOLLOWS_FROM_TORCH.fullmatch(name)] == []
    assert all(Version(version).local is None for version in pins().values())


def test_all_combines_the_extras_that_need_no_compiler() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert set(extras) == {"train", "quantize", "server", "worker", "postgres", "s3", "otel", "deepspeed", "all"}
    (everything,) = (Requirement(text) for text in extras["all"])
    assert everything.name == project()["project"]["name"]
    assert everything.extras == set(extras) - {"all", "deepspeed"}


def test_dependency_ranges_have_no_upper_bounds() -> None:
    assert [str(requirement) for requirement in declared() if re.search(r"==|~=|<", str(requirement.specifier))] == []


def test_an_audit_without_access_to_the_api_says_so() -> None:
    reason = unreachable(f"http://127.0.0.1:{free_loopback_port()}/pypi/Jinja2/3.1.6/json")
    assert reason is not None
    assert "is unreachable" in reason
