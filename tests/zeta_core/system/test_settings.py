"""Settings come from ``ZETA_*`` once, secrets also from files, and an invalid one is reported by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeta_core.contract.errors import InvalidSettings
from zeta_core.system.settings import ApiKey, FleetSettings, RedisUrl, Settings


class ExampleSettings(Settings):
    port: int = 8400
    api_key: ApiKey | None = None
    redis_url: RedisUrl | None = None


def test_options_override_the_environment_which_overrides_defaults() -> None:
    assert ExampleSettings.from_environment({}).port == 8400
    assert ExampleSettings.from_environment({"ZETA_PORT": "9000"}).port == 9000
    assert ExampleSettings.from_environment({"ZETA_PORT": "9000"}, port=9001).port == 9001


def test_a_secret_can_be_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("abc\n")
    assert ExampleSettings.from_environment({"ZETA_API_KEY_FILE": str(tmp_path / "key")}).api_key == "abc"


def test_a_duplicate_secret_or_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="both set"):
        ExampleSettings.from_environment({"ZETA_API_KEY": "a", "ZETA_API_KEY_FILE": "b"})
    with pytest.raises(InvalidSettings, match="cannot be read"):
        ExampleSettings.from_environment({"ZETA_API_KEY_FILE": str(tmp_path / "missing")})


def test_an_invalid_value_is_reported_and_a_secret_is_hidden() -> None:
    with pytest.raises(InvalidSettings, match="ZETA_PORT is 'x'"):
        ExampleSettings.from_environment({"ZETA_PORT": "x"})
    with pytest.raises(InvalidSettings, match=r"ZETA_API_KEY is \(hidden\): it must be printable ASCII"):
        ExampleSettings.from_environment({"ZETA_API_KEY": "schlüssel"})
    for wrong in ("localhost:6379", "http://localhost", "redis://localhost:x", "redis://localhost:0"):
        with pytest.raises(InvalidSettings, match=r"ZETA_REDIS_URL is \(hidden\): "):
            ExampleSettings.from_environment({"ZETA_REDIS_URL": wrong})
    assert ExampleSettings.from_environment({"ZETA_API_KEY": "abc"}).masked()["ZETA_API_KEY"] == "***"


def test_settings_are_shown_as_a_variable_would_contain_them() -> None:
    shown = FleetSettings.from_environment({"ZETA_WORKER_SECRET": "s", "ZETA_LEASE_SECONDS": "1209601.5"}).masked()
    assert (shown["ZETA_LEASE_SECONDS"], shown["ZETA_DATA_ROOT"]) == ("1209601.5", "")
    assert FleetSettings.from_environment({"ZETA_WORKER_SECRET": "s"}).masked()["ZETA_LEASE_SECONDS"] == "120"


def test_a_run_that_is_cut_off_saves_before_its_lease_ends() -> None:
    def limits(**variables: str) -> tuple[float, float, float]:
        read = FleetSettings.from_environment({"ZETA_WORKER_SECRET": "s", **variables})
        return read.self_stop_seconds, read.end_seconds, read.lease_seconds

    assert limits() == (90, 117, 120)
    assert limits(ZETA_LEASE_SECONDS="60") == (45, 58.5, 60)
    assert limits(ZETA_SELF_STOP_SECONDS="20") == (20, 110, 120)
    for wrong in ("120", "inf", "nan", "0"):
        with pytest.raises(InvalidSettings, match="ZETA_SELF_STOP_SECONDS is"):
            limits(ZETA_SELF_STOP_SECONDS=wrong)
    with pytest.raises(InvalidSettings, match=r"less than ZETA_LEASE_SECONDS \(20\)"):
        limits(ZETA_LEASE_SECONDS="20", ZETA_SELF_STOP_SECONDS="30")
