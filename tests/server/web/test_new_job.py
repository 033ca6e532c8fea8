"""New jobs from the form and as YAML: the spec that is submitted, its faults, and repeated submissions."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from server.web.spec_form import SIMPLE, groups, spec_of
from server.web.spec_yaml import read_yaml, write_yaml
from tests.harness.browser import Visitor
from tests.server.server_process import API_KEY, SPEC, ServerProcess
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.spec.job_spec import JobSpec

Visit = Callable[..., Visitor]
CONFIG = json.dumps(SPEC["model"]["config"])
HUB = {"model_kind": "hub", "model_hub": "org/name", "data_kind": "builtin"}
SCRATCH = {"model_kind": "config", "model_config": CONFIG, "data_kind": "builtin"}


def test_the_form_has_every_field_of_a_spec() -> None:
    shown = {field.name.partition(".")[0] for fields in groups().values() for field in fields}
    assert shown | set(SIMPLE) >= set(JobSpec.model_fields)
    assert all(field.help for fields in groups().values() for field in fields)


@pytest.mark.parametrize(
    ("form", "spec"),
    [
        ({"method": "lora"}, {"lora": {}}),
        ({"method": "qlora"}, {"lora": {"quantize": "nf4"}}),
        ({"method": "full"}, {}),
        ({"method": "dpo", "field.dpo.beta": "0.2"}, {"method": "dpo", "dpo": {"beta": 0.2}}),
        ({"method": "lora", "field.lora.r": "8", "epochs": "2"}, {"lora": {"r": 8}, "epochs": 2}),
        ({"method": "full", "field.learning_rate": "1e-4"}, {"learning_rate": 1e-4}),
        ({"method": "full", "field.learning_rate": "find"}, {"learning_rate": "find"}),
        ({"method": "full", "field.mixed_precision": "no"}, {"mixed_precision": "no"}),
        ({"method": "full", "field.use_fsdp": "true"}, {"use_fsdp": True}),
        (
            {"method": "full", "field.use_activation_checkpointing": "selective"},
            {"use_activation_checkpointing": "selective"},
        ),
        ({"method": "full", "field.metadata": '{"team": "a"}'}, {"metadata": {"team": "a"}}),
        ({"method": "full", "field.resources.gpus": "2"}, {"resources": {"gpus": 2}}),
        ({"method": "full", "entity_name": " n ", "field.seed": " "}, {"entity_name": "n"}),
    ],
)
def test_a_form_becomes_a_spec(form: dict[str, str], spec: dict[str, Any]) -> None:
    expected = {"model": "org/name", "dataset": {"builtin": "python-docs"}, **spec}
    assert spec_of({**HUB, **form}) == expected


def test_every_kind_of_model_and_data_can_be_chosen() -> None:
    data = {
        kind: spec_of({**HUB, "data_kind": kind, f"data_{kind}": "x"})["dataset"] for kind in ("file", "hub", "path")
    }
    assert data == {"file": {"file": "x"}, "hub": {"hub": "x"}, "path": {"path": "x"}}
    assert spec_of({**HUB, "model_kind": "job", "model_job": "job_1"})["model"] == {"job": "job_1"}
    assert spec_of({**HUB, "model_kind": "file", "model_file": "file_1"})["model"] == {"file": "file_1"}
    scratch = spec_of({**SCRATCH, "method": "lora"})
    assert (scratch["model"], "lora" in scratch) == ({"config": json.loads(CONFIG)}, False)
    with pytest.raises(InvalidRequest, match="not a JSON object"):
        spec_of({**SCRATCH, "model_config": "llama"})


def test_a_spec_survives_yaml() -> None:
    spec = {**SPEC, "mixed_precision": "no", "learning_rate": 1e-4, "freeze": ["a.*"], "entity_name": "1.0", "lora": {}}
    text = write_yaml(spec)
    assert read_yaml(text, 10_000) == spec
    assert text.index("model:") < text.index("learning_rate:")


@pytest.mark.parametrize(
    "text",
    [
        *("", "- a", "a: 1\na: 2", "a: &x 1\nb: *x", "a: [", "a: !!python/object:os.system x", "a: .nan"),
        *("a: 2026-01-01", "[" * 9000, "a: \x00", "a: " + "[" * 9000, "a: !!omap [{b: 1}, {b: 1}]", "a: !x 1"),
    ],
)
def test_invalid_yaml_is_one_error_within_a_moment(text: str) -> None:
    """Nested lists once took minutes, in which the server answered nobody."""
    started = time.process_time()
    with pytest.raises(ZetaError, match=r"^The YAML .*\.$"):
        read_yaml(text, 10_000)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("part", ["1,", "[],", "{a: 1},", "'',", '"b": 1,'])
def test_yaml_with_too_many_values_takes_little_processor_time(part: str) -> None:
    """64 KiB of short values once took 1.3 s of processor time, and each form may send 256 KiB."""
    started = time.process_time()
    with pytest.raises(InvalidRequest, match="more than 5000 values; submit such a spec with `zeta submit`"):
        read_yaml("a: [" + part * (2**18 // len(part)) + "]", 2**20)
    with pytest.raises(InvalidRequest, match="more than 5000 values"):
        write_yaml({"model": {"config": {str(i): [{}] for i in range(50_000)}}})
    assert time.process_time() - started < 1


def test_a_lone_surrogate_in_a_field_is_an_error_of_the_user(server: ServerProcess) -> None:
    with server.http(None) as browser:
        browser.post("/login", data={"key": API_KEY})
        token = re.findall(r'name="csrf_token" value="([^"]+)"', browser.get("/new").text)[0]
        form = {**SCRATCH, "csrf_token": token, "field.metadata": '{"a": "\\ud800"}'}
        response = browser.post("/new/check", data=form)
    assert (response.status_code, "surrogate" in response.text) == (200, True), response.text


def test_a_job_is_submitted_by_the_form(visit: Visit, http: httpx.Client) -> None:
    visitor = visit()
    page = visitor.page
    page.get_by_role("link", name="New job").first.click()
    page.get_by_text("From scratch", exact=True).click()
    page.fill("#model_config", CONFIG)
    page.get_by_text("Example text").click()
    page.fill("#entity_name", "by form")
    page.get_by_text("Length and batch").click()
    page.fill("[name='field.max_steps']", "7")
    expect(page.locator("#check")).to_contain_text("The spec is valid.", timeout=20_000)
    expect(page.locator("#check")).to_contain_text("max_steps: 7")
    page.get_by_role("button", name="Submit the job").click()
    page.wait_for_url(re.compile(r"/jobs/job_"))
    job = http.get(f"/v1/jobs/{page.url.rpartition('/')[2]}").json()
    expected = {"model": SPEC["model"], "dataset": {"builtin": "python-docs"}, "max_steps": 7, "entity_name": "by form"}
    assert job["spec"] == expected


def test_faults_are_shown_at_their_fields(visit: Visit) -> None:
    page = visit().page
    page.goto(page.url + "new")
    page.get_by_text("From scratch", exact=True).click()
    page.fill("#model_config", CONFIG)
    page.get_by_text("Example text").click()
    page.get_by_text("Length and batch").click()
    page.fill("[name='field.max_steps']", "many")
    expect(page.locator("#check")).to_contain_text("max_steps", timeout=20_000)
    expect(page.locator("[name='field.max_steps']")).to_have_attribute("aria-invalid", "true")
    page.fill("[name='field.max_steps']", "3")
    expect(page.locator("#check")).to_contain_text("The spec is valid.", timeout=20_000)
    assert page.locator("[aria-invalid]").count() == 0


def test_the_form_continues_as_yaml(visit: Visit, http: httpx.Client) -> None:
    page = visit().page
    page.goto(page.url + "new")
    page.get_by_text("From scratch", exact=True).click()
    page.fill("#model_config", CONFIG)
    page.get_by_text("Example text").click()
    page.get_by_role("button", name="Edit as YAML").click()
    expect(page.locator("#yaml")).to_have_value(re.compile("model_type: llama"))
    page.locator("#yaml").fill(page.input_value("#yaml") + "max_steps: 5\n")
    expect(page.locator("#check")).to_contain_text("The spec is valid.", timeout=20_000)
    page.get_by_role("button", name="Submit the job").click()
    page.wait_for_url(re.compile(r"/jobs/job_"))
    assert http.get(f"/v1/jobs/{page.url.rpartition('/')[2]}").json()["spec"]["max_steps"] == 5


def test_a_form_that_is_sent_twice_creates_one_job(server: ServerProcess) -> None:
    with server.http(None) as browser:
        browser.post("/login", data={"key": API_KEY})
        text = browser.get("/new").text
        token, request_id = (
            re.findall(rf'name="{name}" value="([^"]+)"', text)[-1] for name in ("csrf_token", "request_id")
        )
        form = {**SCRATCH, "csrf_token": token, "request_id": request_id}
        first, second = (browser.post("/new", data=form).headers["location"] for _ in range(2))
        changed = browser.post("/new", data={**form, "entity_name": "changed"}).headers["location"]
    assert first == second != changed


def test_an_invalid_form_without_scripts_keeps_what_was_entered(server: ServerProcess) -> None:
    with server.http(None) as browser:
        browser.post("/login", data={"key": API_KEY})
        token = re.findall(r'name="csrf_token" value="([^"]+)"', browser.get("/new").text)[0]
        form = {**SCRATCH, "csrf_token": token, "field.max_steps": "-1", "entity_name": "kept"}
        response = browser.post("/new", data=form)
    assert response.status_code == 422
    assert 'value="kept"' in response.text
    assert "max_steps is -1" in response.text.replace("&#39;", "'")
