"""Server addresses, proxies and certificates from the environment, and how invalid ones are reported."""

import re
import socket
from pathlib import Path

import pytest

from zeta.address import checked_url, is_this_machine, without_password
from zeta.certificates import tls_context
from zeta.http_proxy import choose_proxy
from zeta_core.contract.errors import InvalidSettings

PROXY = {"HTTP_PROXY": "http://proxy.corp:3128"}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("HTTP://Train-Box:8400/", "http://train-box:8400"),
        ("  https://box.corp/zeta/ ", "https://box.corp/zeta"),
        ("http://[::1]:8400", "http://[::1]:8400"),
        ("http://[fe80::2%25eth0]:8400", "http://[fe80::2%eth0]:8400"),
        ("http://rechner-für-alle:8400", "http://xn--rechner-fr-alle-7vb:8400"),
        ("http://gpu_box.:8400", "http://gpu_box.:8400"),
        ("http://10.1.2.3", "http://10.1.2.3"),
    ],
)
def test_a_url_is_normalized(text: str, url: str) -> None:
    assert checked_url(text, "ZETA_URL") == url
    assert checked_url(url, "ZETA_URL") == url


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train-box:8400", "http://"),
        ("ftp://train-box", "http://"),
        ("http:/train-box", "http://"),
        ("", "http://"),
        ("http://", "no host"),
        ("http://:8400", "no host"),
        ("http://train-box:84O0", "'84O0'"),
        ("http://train-box:٨٤٠٠", "port"),
        ("http://train-box:8_400", "'8_400'"),
        ("http://train-box:65536", "65535"),
        ("http://train-box:0", "'0'"),
        ("http://train-box:-1", "'-1'"),
        ("http://train box:8400", "space"),
        ("http://train-box:8400\n/x", "control"),
        ("http://train..box", "'train..box'"),
        ("http://-box", "'-box'"),
        ("http://" + "a" * 64, "valid name"),
        ("http://ho\u00adst\u2028", "control"),
        ("http://\u0300x", "valid name"),
        ("http://xn--a.corp", "valid name"),  # a control character
        ("http://XN--LS8H.corp", "valid name"),  # an emoji, which IDNA 2008 does not allow
        ("http://1.2.3.400", "IPv4"),
        ("http://::1:8400", "brackets"),
        ("http://[::1", "brackets"),
        ("http://[box]:8400", "IPv6"),
        ("http://[fe80::1%e th0]:8400", "space"),
        ("http://train-box:8400?x=1", "path"),
        ("http://train-box\\zeta", "path"),
    ],
)
def test_an_invalid_url_is_rejected_with_setting_value_and_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        checked_url(text, "ZETA_URL")
    assert caught.value.param == "ZETA_URL"
    for part in ("ZETA_URL", repr(text), reason, "http://127.0.0.1:8400"):
        assert part in caught.value.message


def test_a_password_in_a_url_is_rejected_and_not_shown() -> None:
    for text in ("http://me:hunter2@train-box:8400", "http://me:hunter2/x@train-box", "me:hunter2@train-box"):
        with pytest.raises(InvalidSettings) as caught:
            checked_url(text, "ZETA_URL")
        assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.9.8.7", "127.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "LOCALHOST", "a.localhost"],
)
def test_this_machine_is_recognized(host: str) -> None:
    assert is_this_machine(host)
    assert is_this_machine(socket.gethostname())


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "2001:db8::1", "train-box", "localhost.corp", "notlocalhost", "224.0.0.1"]
)
def test_other_machines_are_recognized(host: str) -> None:
    assert not is_this_machine(host)


@pytest.mark.parametrize(
    ("server", "no_proxy"),
    [
        ("http://train-box:8400", "*"),
        ("http://train-box:8400", "train-box"),
        ("http://train-box:8400", " other , TRAIN-BOX,"),
        ("http://train-box:8400", "other train-box"),
        ("http://train-box:8400", "train-box:8400"),
        ("http://train-box", "train-box:80"),
        ("http://train-box:8400", "http://train-box"),
        ("http://a.lab.corp:8400", ".lab.corp"),
        ("http://lab.corp:8400", ".lab.corp"),
        ("http://a.lab.corp:8400", "lab.corp"),
        ("http://a.lab.corp:8400", "*.lab.corp"),
        ("http://a.lab.corp.:8400", "lab.corp."),
        ("http://gpu-7.lab.corp:8400", "gpu-*.lab.corp"),
        ("http://192.0.2.7:8400", "192.0.2.7"),
        ("http://192.0.2.7:8400", "192.0.0.0/16"),
        ("http://192.0.2.7:8400", "192.0.2.0/255.255.255.0"),
        ("http://192.0.2.7:8400", "192.0.2.7:8400"),
        ("http://192.0.2.7:8400", "192.0.2.*"),
        ("http://[2001:db8::7]:8400", "2001:db8::7"),
        ("http://[2001:db8::7]:8400", "[2001:DB8:0::7]"),
        ("http://[2001:db8::7]:8400", "[2001:db8::7]:8400"),
        ("http://[2001:db8::7]:8400", "2001:db8::/32"),
        ("http://xn--bcher-kva.de", "bücher.de"),
        ("http://train-box:8400", "[::1],::1,%%,[,],/,:,:::,10.0.0.0/99,http://,train-box"),
    ],
)
def test_a_server_in_no_proxy_is_reached_directly(server: str, no_proxy: str) -> None:
    for proxy in ("http://proxy.corp:3128", "socks://127.0.0.1:1", "%%%"):
        assert choose_proxy(server, {"ALL_PROXY": proxy, "NO_PROXY": no_proxy}) is None


@pytest.mark.parametrize(
    ("server", "no_proxy"),
    [
        ("http://train-box:8400", "box"),
        ("http://train-box:8400", "train-box:8401"),
        ("http://train-box:8400", "192.0.2.0/24"),
        ("http://mylab.corp:8400", "lab.corp"),
        ("http://192.0.2.7:8400", "192.0.2.70,2.7,192.0.3.0/24,.7"),
        ("http://[2001:db8::7]:8400", "[2001:db8::7]:8401,::7"),
        ("http://train-box:8400", "[::1],%%,[,],/,:,:::,10.0.0.0/99,http://,.,*."),
    ],
)
def test_other_servers_are_reached_through_the_proxy(server: str, no_proxy: str) -> None:
    assert choose_proxy(server, {**PROXY, "NO_PROXY": no_proxy}) is not None


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({"http_proxy": "a:1", "HTTP_PROXY": "b:1"}, ("http_proxy", "http://a:1")),
        ({"http_proxy": "", "HTTP_PROXY": "b:1"}, None),
        ({"HTTP_PROXY": " b:1/ ", "ALL_PROXY": "socks://x"}, ("HTTP_PROXY", "http://b:1")),
        ({"all_proxy": "HTTPS://b"}, ("all_proxy", "https://b")),
        ({"HTTPS_PROXY": "socks://broken"}, None),
        ({"HTTP_PROXY": "http://me:p%40s/s#@b:1"}, ("HTTP_PROXY", "http://me:p%40s%2Fs%23@b:1")),
        ({"HTTP_PROXY": "http://[2001:db8::1]:1"}, ("HTTP_PROXY", "http://[2001:db8::1]:1")),
    ],
)
def test_the_proxy_of_the_servers_scheme_is_chosen(variables: dict[str, str], chosen: tuple[str, str] | None) -> None:
    proxy = choose_proxy("http://train-box:8400", variables)
    assert (proxy and (proxy.variable, proxy.url)) == chosen


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("socks://127.0.0.1:7890/", "socksio"),
        ("socks5://127.0.0.1:1080", "socksio"),
        ("socks5h://127.0.0.1:1080", "socksio"),
        ("socks4://127.0.0.1:1080", "socks4://"),
        ("ftp://proxy.corp", "ftp://"),
        ("proxy.corp:http", "'http'"),
        ("http://proxy.corp:99999", "65535"),
        ("http://", "no host"),
        ("://", "://"),
        ("%%%", "%%%"),
        ("http://xn--a.corp:3128", "valid name"),
        ("http:/proxy.corp:3128", "://"),
        ('"http://proxy.corp:3128"', '"http'),
        ("http://me:hunter2@proxy corp:80", "valid name"),
    ],
)
def test_an_unusable_proxy_is_rejected_with_its_variable_and_the_fix(value: str, reason: str) -> None:
    with pytest.raises(InvalidSettings, match=reason) as caught:
        choose_proxy("http://train-box:8400", {"ALL_PROXY": value})
    assert caught.value.param == "ALL_PROXY"
    assert "ALL_PROXY" in caught.value.message
    assert "train-box to NO_PROXY" in caught.value.message
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://ann:hunter2@box.corp:8400/zeta", "http://***@box.corp:8400/zeta"),
        ("SOCKS5H://ann:hunter2@[2001:db8::1]:1080", "SOCKS5H://***@[2001:db8::1]:1080"),
        (" https://hunter2@box.corp", " https://***@box.corp"),
        ("http:/ann:hunter2@box.corp", "http:/***@box.corp"),
        ("ann:hunter2@box.corp:3128", "***@box.corp:3128"),
        ("http:ann:hunter2@box.corp", "***@box.corp"),
        ("http://ann:hunter2@hunter2@box.corp", "http://***@box.corp"),
        ("ann:hunter2@//hunter2@box.corp", "***@box.corp"),
        ("http://ann:hunter2/hunter2?#@box.corp", "http://***@box.corp"),
        ("ann:hunter2://hunter2@box.corp", "***@box.corp"),
        ("http://ann:hunter2\nhunter2@box.corp", "http://***@box.corp"),
        ("https://box.corp:8400", "https://box.corp:8400"),
        ("box.corp:3128", "box.corp:3128"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_its_user_and_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize(
    ("before", "shown"),
    [
        ("http://ann:hunter2", "http://***"),
        ("ftp://ann:hunter2@hunter2", "ftp://***"),
        ("ann:hunter2", "***"),
        ("ann:hunter2://hunter2", "***"),
        ("http:/ann:hunter2", "http:/***"),
        ("https://ann:hunter2/hunter2#?", "https://***"),
    ],
)
def test_no_error_about_a_url_shows_its_password(before: str, shown: str) -> None:
    with pytest.raises(InvalidSettings, match=re.escape(f"ZETA_URL is '{shown}@box:port'")) as server:
        checked_url(f"{before}@box:port", "ZETA_URL")
    with pytest.raises(InvalidSettings, match=re.escape(f"ALL_PROXY is '{shown}@box:port'")) as proxy:
        choose_proxy("http://train-box:8400", {"ALL_PROXY": f"{before}@box:port"})
    assert "hunter2" not in server.value.message + proxy.value.message


def test_this_machine_is_reached_without_a_proxy() -> None:
    for host in ("127.0.0.2:8400", "localhost", "[::1]:1", "zeta.localhost", socket.gethostname()):
        assert choose_proxy(f"http://{host.lower()}", {"ALL_PROXY": "socks://broken"}) is None


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_unreadable_certificates_are_rejected_with_their_variable(variable: str, tmp_path: Path) -> None:
    garbage = tmp_path / "authorities.pem"
    garbage.write_bytes(b"\xff no certificate")
    for file in (garbage, tmp_path / "missing.pem", Path("/dev/null/x")):
        with pytest.raises(InvalidSettings, match=variable) as caught:
            tls_context({variable: str(file)})
        assert str(file) in caught.value.message


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_certificate_variable_counts_as_unset(blank: str) -> None:
    with pytest.raises(InvalidSettings, match="CURL_CA_BUNDLE"):
        tls_context({"SSL_CERT_FILE": blank, "SSL_CERT_DIR": blank, "CURL_CA_BUNDLE": "/missing.pem"})
