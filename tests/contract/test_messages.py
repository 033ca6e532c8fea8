"""Messages are taken from those who know the secret, for the place they were written to, and from newer versions."""

from __future__ import annotations

import pytest

from zeta_core.contract.messages import CONTRACT_VERSION, FROM_WORKER, BadSignature, Claim, sign, verify

CLAIM = Claim(job_id="job_1", attempt=1, worker="w", incarnation="i")


def test_a_signed_message_comes_back_as_it_was() -> None:
    fields = sign(CLAIM, "secret", channel="zeta:server")
    assert FROM_WORKER.validate_python(verify(fields, "secret", channel="zeta:server")) == CLAIM


@pytest.mark.parametrize(("secret", "channel"), [("other", "zeta:server"), ("secret", "zeta:worker:w")])
def test_another_secret_or_another_place_is_refused(secret: str, channel: str) -> None:
    with pytest.raises(BadSignature):
        verify(sign(CLAIM, "secret", channel="zeta:server"), secret, channel=channel)


def test_a_changed_body_is_refused() -> None:
    fields = sign(CLAIM, "secret", channel="zeta:server")
    changed = {**fields, "body": fields["body"].replace("job_1", "job_2")}
    with pytest.raises(BadSignature):
        verify(changed, "secret", channel="zeta:server")


def test_a_message_without_a_signature_is_refused() -> None:
    with pytest.raises(BadSignature):
        verify({"body": "{}"}, "secret", channel="zeta:server")


def test_fields_of_a_newer_version_are_kept() -> None:
    body = {**CLAIM.model_dump(), "contract_version": CONTRACT_VERSION + 1, "new_field": 7}
    read = FROM_WORKER.validate_python(body)
    assert read.model_dump()["new_field"] == 7
