"""ZETA_REDIS_URL and ZETA_DATABASE_URL: URLs of hosting providers are accepted, unsupported options are rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeta_core.system.database_url import DatabaseAddress, sqlite_url
from zeta_core.system.redis_access import RedisAddress


@pytest.mark.parametrize(
    ("url", "for_redis_py", "for_celery"),
    [
        ("redis://cache", "redis://cache:6379/0", "redis://cache:6379/0"),
        ("redis://cache:7000/12", "redis://cache:7000/12", "redis://cache:7000/12"),
        ("redis://cache?db=3", "redis://cache:6379/3", "redis://cache:6379/3"),
        ("redis://default:a%2Fb%40c%25@cache/1", *["redis://default:a%2Fb%40c%25@cache:6379/1"] * 2),
        ("redis://:p%23@[::1]:1/", *["redis://:p%23@[::1]:1/0"] * 2),
        ("unix:///run/r%20s.sock?db=2", "unix:///run/r%20s.sock?db=2", "redis+socket:///run/r%20s.sock?virtual_host=2"),
        ("unix://u:p%3A@/r.sock", "unix://u:p%3A@/r.sock?db=0", "redis+socket://u:p%3A@/r.sock?virtual_host=0"),
        ("rediss://cache", *["rediss://cache:6379/0?ssl_cert_reqs=required"] * 2),
        ("rediss://cache?ssl_cert_reqs=CERT_NONE", *["rediss://cache:6379/0?ssl_cert_reqs=none"] * 2),
    ],
)
def test_both_redis_libraries_connect_to_the_same_address(url: str, for_redis_py: str, for_celery: str) -> None:
    address = RedisAddress.parse(url)
    assert (address.client_url, address.celery_url) == (for_redis_py, for_celery)
    assert "p%" not in address.location


def test_the_sentinels_and_the_master_are_named_in_one_url() -> None:
    url = "redis+sentinel://u:p%40@a:7000,b,c:1/5?master=m&sentinel_password=s%26"
    address = RedisAddress.parse(url)
    assert address.sentinel is not None
    assert (address.sentinel.hosts, address.sentinel.master) == ((("a", 7000), ("b", 26379), ("c", 1)), "m")
    assert address.sentinel.options["password"] == "s&"
    assert address.client_options == {"db": 5, "username": "u", "password": "p@"}
    assert address.celery_url.split(";")[1] == "sentinel://u:p%40@b:26379/5"
    assert address.celery_options["master_name"] == "m"
    assert "p%" not in address.location


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("sentinel://a/0", "must begin with"),
        ("redis+sentinel://a/0", "add ?master=NAME"),
        ("redis+sentinel://a:1,b:x/0?master=m", "HOST:PORT"),
        ("redis+sentinel://:se:cret@a,,b/0?master=m", "HOST:PORT"),
        ("redis+sentinel://a/0?master=m&ssl_cert_reqs=none", "begin the URL with rediss://"),
        ("redis://cache/0?master=m", "begin the URL with redis+sentinel://"),
        ("redis://cache/first", "database is 'first'"),
        ("redis://cache/0/1", "database is '0/1'"),
        ("redis://cache/1?db=2", "two databases"),
        ("redis://cache/-1", "database is '-1'"),
        ("redis://cache?family=6", "option 'family' is not supported"),
        ("redis://cache?sssl_cert_reqs=none", "did you mean 'ssl_cert_reqs'"),
        ("redis://cache?ssl_cert_reqs=none", "begin the URL with rediss://"),
        ("rediss://cache?ssl_cert_reqs=maybe", "use required, optional or none"),
        ("rediss://cache?ssl_ca_certs=/no/such/file.pem", "which is not a file"),
        ("redis://:se/cret@cache/0", "percent-encode"),
        ("redis://:se#cret@cache/0", "'#'"),
        ("redis://a:1,b:2/0", "not a number"),
        ("unix://relative.sock", "must be absolute"),
        ("unix:///", "names no socket"),
        ("unix:///" + "x" * 200, "longer than 107 bytes"),
    ],
)
def test_an_unusable_redis_url_is_rejected_without_showing_it(url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        RedisAddress.parse(url)
    assert sentence in str(caught.value)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "hosts", "options"),
    [
        ("postgres://u:p@db/z", (("db", None),), {}),
        ("postgresql+psycopg2://u@db:6543/z?pgbouncer=true", (("db", 6543),), {}),
        ("postgresql+asyncpg://u@db/z?ssl=require&statement_cache_size=0", (("db", None),), {"sslmode": "require"}),
        ("postgresql://u@ep-x/z?options=endpoint%3Dep-x&sslmode=require&channel_binding=require",
         (("ep-x", None),), {"options": "endpoint=ep-x", "sslmode": "require", "channel_binding": "require"}),
        ("postgresql://u@a:1,b:2/z?target_session_attrs=read-write",
         (("a", 1), ("b", 2)), {"target_session_attrs": "read-write"}),
        ("postgresql:///z?host=/var/run/postgresql", (), {"host": "/var/run/postgresql"}),
        ("postgresql://u@[::1]:5/z?supa=base-pooler.x&schema=public", (("::1", 5),), {}),
        ("postgresql://u@db/z?application_name=a+b", (("db", None),), {"application_name": "a+b"}),
    ],
)  # fmt: skip
def test_database_urls_of_hosting_providers_are_accepted(url: str, hosts: object, options: object) -> None:
    address = DatabaseAddress.parse(url)
    assert (address.backend, address.database, address.hosts, address.options) == ("postgresql", "z", hosts, options)


def test_a_password_may_contain_slashes() -> None:
    assert DatabaseAddress.parse("postgresql://u:a/b?c#%40@db/z").password == "a/b?c#@"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("mysql://u:cret@db/z", "begins with mysql://"),
        ("jdbc:postgresql://db/z", "not a valid database URL"),
        ("postgresql+oracle://u@db/z", "begins with postgresql+oracle://"),
        ("postgresql://u:cret@db/z?connection_limit=5", "option 'connection_limit' is not supported"),
        ("postgresql://u@db/z?schema=other", "option 'schema' is 'other'"),
        ("postgresql://u@db/z?slmode=require", "did you mean 'sslmode'"),
        ("postgresql://u@db/z?sslmode=no-verify", "option 'sslmode' is 'no-verify'"),
        ("postgresql://u@db/z?ssl=maybe", "option 'ssl' is 'maybe'"),
        ("postgresql://u@db/z?ssl=disable&sslmode=require", "contradict each other"),
        ("postgresql://u@db/z?sslmode=require&sslmode=disable", "given twice"),
        ("postgresql://u@db/z?connect_timeout=soon", "whole number"),
        ("postgresql://u:cret/z", "port is not a number"),
        ("postgresql://u:se@cret@db/z", "percent-encoded"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite://home/zeta.db", "it has a host"),
        ("sqlite:////a/zeta.db?mode=ro", "option 'mode' is not supported"),
    ],
)
def test_an_unusable_database_url_is_rejected_without_its_password(url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        DatabaseAddress.parse(url)
    assert sentence in str(caught.value)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["run?lr=1", "feature%2Fx", "100%", "a b", "Übung #3", "a\udcffb", "x" * 200])
def test_every_home_path_survives_the_conversion_to_a_url(name: str) -> None:
    file = Path("/srv") / name / "zeta.db"
    assert DatabaseAddress.parse(sqlite_url(file)).database == str(file)
