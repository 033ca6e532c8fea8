"""Pages of a list: a cursor stays valid when its row is deleted."""

from typing import Any

import httpx
import pytest

from tests.server.rows import Rows
from tests.server.server_process import SPEC, error_of
from zeta_core.contract.identifiers import creation_time, new_id_at
from zeta_core.contract.job.checkpoint import FileRole
from zeta_core.contract.job.status import JobStatus

WEIGHTS: dict[str, tuple[FileRole, bytes]] = {"model.safetensors": ("weights", b"w")}


def delete_page_by_page(http: httpx.Client, path: str, params: dict[str, Any]) -> list[str]:
    """Delete all rows of a list, page by page; returns their ids in the order of the list."""
    deleted: list[str] = []
    after: dict[str, str] = {}
    while True:
        response = http.get(path, params={**params, "limit": 2, **after})
        assert response.status_code == 200, response.text
        page = response.json()
        for row in page["data"]:
            assert http.delete(f"{path}/{row['id']}").status_code == 200
            deleted.append(row["id"])
        if not page["has_more"]:
            return deleted
        after = {"after": page["last_id"]}


def test_files_deleted_page_by_page_are_all_listed(http: httpx.Client) -> None:
    made = [
        http.post("/v1/files", files={"file": (f"{number}.txt", b"the same text")}, data={"purpose": "dataset"}).json()
        for number in range(7)
    ]
    deleted = delete_page_by_page(http, "/v1/files", {"sha256": made[0]["sha256"]})
    assert deleted == [file["id"] for file in reversed(made)]


def test_jobs_deleted_page_by_page_are_all_listed(http: httpx.Client) -> None:
    made = [http.post("/v1/jobs", json={**SPEC, "entity_name": "deleted"}).json()["id"] for _ in range(5)]
    for job_id in made:
        http.post(f"/v1/jobs/{job_id}/cancel")
    assert delete_page_by_page(http, "/v1/jobs", {"entity_name": "deleted"}) == made[::-1]


def test_a_cursor_of_a_removed_checkpoint_stays_valid(rows: Rows, http: httpx.Client) -> None:
    job_id = rows.job()
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    for name, step in (("step-100", 100), ("best", 250), ("step-300", 300), ("step-400", 400), ("final", 400)):
        rows.checkpoint(job_id, name, step, WEIGHTS)
    path = f"/v1/jobs/{job_id}/checkpoints"

    def names(after: str) -> list[str]:
        return [entry["name"] for entry in http.get(path, params={"after": after}).json()["data"]]

    assert names("step-350") == ["step-300", "best", "step-100"]
    assert names("step-200") == ["step-100"]
    assert names("step-1") == []
    for after in ("latest", "step-", "step-1\n", "step-" + "9" * 5000, "step-٣"):
        response = http.get(path, params={"after": after})
        assert (response.status_code, error_of(response)["param"]) == (422, "after")
    response = http.get(f"/v1/jobs/{rows.job()}/checkpoints", params={"after": "best"})
    assert (response.status_code, error_of(response)["code"]) == (404, "checkpoint_not_found")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/files"])
@pytest.mark.parametrize("after", ["step-1", "job_" + "0" * 24, "job_" + "u" * 24, "file_" + "z" * 24, "key_0"])
def test_an_invalid_cursor_is_rejected(http: httpx.Client, path: str, after: str) -> None:
    response = http.get(path, params={"after": after})
    assert (response.status_code, error_of(response)["param"]) == (422, "after")


def test_ids_sort_by_creation_and_contain_their_time() -> None:
    made = [new_id_at("job") for _ in range(2000)]
    assert made == sorted(made)
    assert [at for _, at in made] == sorted({at for _, at in made})
    assert all(creation_time(id_) == at for id_, at in made)
