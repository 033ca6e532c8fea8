"""Browser sessions: logging in with a key or a link, the cookie, CSRF protection, logging out, and the end of a key."""

import re
from collections.abc import Iterator
from datetime import timedelta

import httpx
import pytest

from server.sessions import CSRF_HEADER, LINK_MINUTES
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, SPEC, ServerProcess, error_of, submit
from zeta_core.contract.job.events import utc_now


@pytest.fixture
def browser(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client with cookies and without a key."""
    with server.http(None) as client:
        yield client


def log_in(browser: httpx.Client, key: str = API_KEY, **fields: str) -> httpx.Response:
    return browser.post("/login", data={"key": key, **fields})


def csrf_token(browser: httpx.Client) -> str:
    """The token that the pages contain."""
    found = re.search(r'<meta name="csrf-token" content="([0-9a-f]{64})">', browser.get("/").text)
    assert found is not None
    return found.group(1)


def test_a_key_is_exchanged_for_a_protected_cookie(browser: httpx.Client) -> None:
    response = log_in(browser)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"]
    assert cookie.startswith("zeta_session_")
    for attribute in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age="):
        assert attribute in cookie, cookie
    assert API_KEY not in cookie
    assert browser.get("/").status_code == 200


def test_a_proxy_that_uses_https_gets_a_secure_cookie(server: ServerProcess) -> None:
    response = httpx.post(f"{server.url}/login", data={"key": API_KEY}, headers={"X-Forwarded-Proto": "https"})
    assert "Secure" not in response.headers["set-cookie"], "the header of a proxy that isn't trusted has no effect"


@pytest.mark.parametrize("key", ["", "wrong", f"{API_KEY} x", "\0"])
def test_a_wrong_key_shows_the_login_page_again(browser: httpx.Client, key: str) -> None:
    response = log_in(browser, key)
    assert response.status_code == 401
    assert "set-cookie" not in response.headers
    assert 'role="alert"' in response.text


def test_pages_without_a_session_lead_to_the_login_page(browser: httpx.Client) -> None:
    assert browser.get("/").headers["location"] == "/login"
    response = browser.get("/jobs/job_1?x=2")
    assert (response.status_code, response.headers["location"]) == (303, "/login?next=%2Fjobs%2Fjob_1%3Fx%3D2")
    assert browser.get("/", headers={"HX-Request": "true"}).headers["hx-redirect"] == "/login"


@pytest.mark.parametrize(
    ("after", "location"),
    [
        ("/jobs/job_1", "/jobs/job_1"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("https://evil.example", "/"),
        ("/x\r\nSet-Cookie: a=b", "/"),
    ],
)
def test_logging_in_never_leads_to_another_site(browser: httpx.Client, after: str, location: str) -> None:
    assert log_in(browser, next=after).headers["location"] == location


def test_a_login_form_of_another_site_is_rejected(browser: httpx.Client) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        response = browser.post("/login", data={"key": API_KEY}, headers=headers)
        assert (response.status_code, "set-cookie" in response.headers) == (403, False)


def test_the_cookie_reads_and_needs_the_csrf_token_to_write(browser: httpx.Client) -> None:
    log_in(browser)
    assert browser.get("/v1/jobs").status_code == 200
    for headers in ({}, {CSRF_HEADER: "0" * 64}, {CSRF_HEADER: ""}):
        response = browser.post("/v1/jobs", json=SPEC, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (403, "invalid_csrf_token")
    assert browser.post("/v1/jobs", json=SPEC, headers={CSRF_HEADER: csrf_token(browser)}).status_code == 201


def test_a_form_of_a_page_needs_the_csrf_token(browser: httpx.Client, http: httpx.Client) -> None:
    log_in(browser)
    job = submit(http)
    path = f"/jobs/{job['id']}/commands/pause"
    assert browser.post(path).status_code == 403
    assert http.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued"
    assert browser.post(path, data={"csrf_token": csrf_token(browser)}).status_code == 303
    assert http.get(f"/v1/jobs/{job['id']}").json()["status"] == "paused"


def test_a_csrf_token_belongs_to_one_session(server: ServerProcess, browser: httpx.Client) -> None:
    log_in(browser)
    with server.http(None) as other:
        log_in(other)
        foreign = csrf_token(other)
    assert browser.post("/v1/jobs", json=SPEC, headers={CSRF_HEADER: foreign}).status_code == 403


def test_a_key_in_the_request_takes_precedence_over_the_cookie(server: ServerProcess, browser: httpx.Client) -> None:
    log_in(browser)
    assert browser.get("/v1/jobs", headers={"Authorization": "Bearer wrong"}).status_code == 401
    bearer = {"Authorization": f"Bearer {API_KEY}"}
    assert browser.post("/v1/jobs", json=SPEC, headers=bearer).status_code == 201


def test_logging_out_ends_the_session_on_the_server(server: ServerProcess, browser: httpx.Client) -> None:
    log_in(browser)
    stolen = dict(browser.cookies)
    assert browser.post("/logout").status_code == 403
    assert browser.post("/logout", data={"csrf_token": csrf_token(browser)}).headers["location"] == "/login"
    assert not browser.cookies
    with server.http(None) as thief:
        thief.cookies.update(stolen)
        assert error_of(thief.get("/v1/jobs"))["code"] == "session_ended"
        assert thief.get("/").headers["location"] == "/login?ended=true"


def test_a_session_ends_with_its_key(server: ServerProcess, rows: Rows, browser: httpx.Client) -> None:
    rows.key("a-key-for-a-second", expires_at=utc_now() + timedelta(seconds=3))
    assert log_in(browser, "a-key-for-a-second").status_code == 303
    wait_until(lambda: browser.get("/v1/jobs").status_code == 401, 10, "the session to end")
    assert browser.get("/").status_code == 303


@pytest.mark.extended
def test_a_session_survives_a_restart_of_the_server(server: ServerProcess, browser: httpx.Client) -> None:
    log_in(browser)
    server.end()
    server.start()
    assert browser.get("/").status_code == 200


def test_an_expired_session_is_rejected(server: ServerProcess, rows: Rows, browser: httpx.Client) -> None:
    log_in(browser)
    rows.expire_sessions()
    wait_until(lambda: browser.get("/v1/jobs").status_code == 401, 10, "the session to end")


def test_a_login_link_works_once(http: httpx.Client, browser: httpx.Client) -> None:
    link = http.post("/v1/login-links").raise_for_status().json()
    assert set(link) == {"object", "url", "expires_at"}
    path = httpx.URL(link["url"])
    assert browser.head(path).status_code == 200, "a program that only looks at the link doesn't use it"
    response = browser.get(path)
    assert (response.status_code, response.headers["refresh"]) == (200, "0; url=/")
    assert browser.get("/").status_code == 200
    browser.cookies.clear()
    again = browser.get(path)
    assert again.status_code == 401
    assert "already used" in again.text
    assert browser.get("/").status_code == 303


def test_a_login_link_expires(http: httpx.Client, rows: Rows, browser: httpx.Client) -> None:
    link = http.post("/v1/login-links").json()
    rows.expire_login_links()
    assert browser.get(httpx.URL(link["url"])).status_code == 401
    assert LINK_MINUTES <= 10


def test_a_login_link_of_a_replaced_key_ends_with_its_grace_period(
    server: ServerProcess, http: httpx.Client, browser: httpx.Client
) -> None:
    key = http.post("/v1/keys", json={"name": "leaked", "scopes": ["submit"]}).raise_for_status().json()
    http.post(f"/v1/keys/{key['id']}/rotate", json={"grace_seconds": 3}).raise_for_status()
    with server.http(key["key"]) as holder_of_the_old_text:
        link = holder_of_the_old_text.post("/v1/login-links").raise_for_status().json()
    assert browser.get(httpx.URL(link["url"])).status_code == 200
    assert browser.get("/v1/jobs").status_code == 200
    wait_until(lambda: browser.get("/v1/jobs").status_code == 401, 10, "the session to end")


def test_a_login_link_needs_a_key(browser: httpx.Client) -> None:
    assert browser.post("/v1/login-links").status_code == 401


def test_neither_tokens_nor_keys_are_stored_or_logged(server: ServerProcess, http: httpx.Client) -> None:
    link = http.post("/v1/login-links").json()["url"]
    token = link.partition("link=")[2]
    with server.http(None) as browser:
        browser.get(link)
        session = next(iter(browser.cookies.values()))
    assert len(token) == len(session) == 43
    stored = b"".join(file.read_bytes() for file in server.home.glob("zeta.db*"))
    for secret in (token, session, API_KEY):
        assert secret.encode() not in stored
        assert secret not in server.log()
