"""Makes the picture of the dashboard in the README from a real run: ``python -m tests.end_to_end.dashboard_picture``.

It starts a service, trains a small model for a minute, and writes docs/dashboard.png while the job is running.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.end_to_end.specs import TINY_LLAMA, tiny_job
from tests.harness.browser import running_browser, visiting
from tests.harness.service import running_service
from tests.harness.waiting import wait_until

PICTURE = Path(__file__).parents[2] / "docs" / "dashboard.png"
MAX_BYTES = 200_000
STEPS = 2500


def main() -> None:
    model = {"config": {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 128}}
    spec = tiny_job(
        entity_name="python-reference", model=model, max_steps=STEPS, checkpointing_steps=500, eval_split=0.05
    )
    spec |= {"eval_steps": 200, "seq_len": 128, "batch_size": 8, "learning_rate": 0.003}
    with tempfile.TemporaryDirectory() as folder, running_service(Path(folder) / "home") as service:
        with service.http() as http:
            job_id = http.post("/v1/jobs", json=spec).raise_for_status().json()["id"]

            def is_far_enough() -> bool:
                job = http.get(f"/v1/jobs/{job_id}").json()
                assert job["status"] in ("queued", "running"), job
                return ((job["progress"] or {}).get("step") or 0) >= 0.6 * STEPS

            wait_until(is_far_enough, 200, "most of the steps")
        with running_browser() as browser, visiting(browser, service.url) as visitor:
            visitor.log_in(service.api_key)
            visitor.open(f"/jobs/{job_id}")
            visitor.page.locator("#figure-loss canvas").wait_for()
            visitor.page.locator("#figure-loss .summary").wait_for()
            visitor.page.screenshot(path=PICTURE, clip={"x": 0, "y": 0, "width": 1280, "height": 900})
    assert PICTURE.stat().st_size < MAX_BYTES
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
