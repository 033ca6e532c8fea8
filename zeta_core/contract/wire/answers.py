"""Answers of served models: the messages between server and worker, and between a worker and its serving processes.

| channel                       | from -> to                | content                                              |
|-------------------------------|---------------------------|------------------------------------------------------|
| stream `worker_stream(name)`  | server -> worker          | `AnswerRequest`, `AnswerControl`                     |
| stream `answer_stream(id)`    | worker -> server          | `AnswerPart`; each server process has its own stream |
| socket `SOCKET_FILE`          | worker -> serving process | `Generate`, `Cancel`, `AddAdapter`, one JSON per line |
| socket `SOCKET_FILE`          | serving process -> worker | `Ready`, `Alive`, `Generated`, `LoadFailed`, ...     |

The server never connects to a worker. It repeats a request until the worker's first part arrives, and acknowledges
parts by their number. A worker sends at most `MAX_AHEAD` parts of a request more than the client has taken, collects
further tokens in the next part, and repeats parts that are not acknowledged. Both sides give up a request after
`SILENCE_SECONDS` without a message from the other.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from zeta_core.contract.access import HubAccess
from zeta_core.contract.spec.options import Quantization
from zeta_core.contract.spec.resolved_spec import UploadedFile

MAX_AHEAD = 16  # parts of one request that the client has not taken yet
REPEAT_SECONDS = 2.0  # the interval of repeating requests, parts, and signs of life
SILENCE_SECONDS = 15.0
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 4

SERVING_DIRECTORY = "serving"  # in a worker's folder: one run directory per served model
SERVE_FILE = "serve.json"  # in a run directory: a `ServeFile`
SOCKET_FILE = "socket"
MAX_LINE_BYTES = 16 * 2**20  # of the socket

FinishReason = Literal["stop", "length", "tool_calls"]
# Why there is no answer: the request is invalid; there is no free slot; a job took the slot; the model can't be loaded;
# the serving process ended; or the server gave up.
FailureCode = Literal["invalid_request", "no_capacity", "evicted", "model_failed", "process_ended", "cancelled"]


def answer_stream(server: str) -> str:
    """The stream of one server process, by its random id."""
    return f"zeta:answers:{server}"


def serving_directory(served_id: str) -> PurePosixPath:
    return PurePosixPath(SERVING_DIRECTORY, served_id)


class _Message(BaseModel):
    """Frozen. Unknown fields of another version are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")


class ServedWeights(_Message):
    """The weights that answer: a checkpoint of a job, or a base model.

    ``name`` is shown to users, such as ``job_.../final``. ``model`` is the source as in a job's spec. ``fingerprint``
    is the SHA-256 of the checkpoint's manifest, or of the source of a base model. ``files`` are the records of uploaded
    files that the model refers to. ``quantize`` is that of the job's adapter. ``hub`` is what the project may read from
    the Hub. ``base`` is equal for adapters that can share a base in memory: a hash of its content and of the tokenizer;
    ``None`` for weights that can't. ``base_of_adapters`` is the same hash for the base itself, in a field of its own,
    because older workers would load the base as an adapter.
    """

    name: str
    project: str
    model: JsonValue
    fingerprint: str
    has_manifest: bool = False  # the fingerprint is that of a manifest
    quantize: Quantization | None = None
    base: str | None = None
    base_of_adapters: str | None = None
    files: dict[str, UploadedFile] = {}
    hub: HubAccess = HubAccess.OPERATOR_TOKEN  # older servers don't send it, and know no other
    bases: list[str] = []  # the models that an adapter may name as its base, as in `Dispatch`

    @property
    def key(self) -> str:
        """Identifies the weights: a checkpoint that was replaced is a different model.

        A private model on the Hub, which was loaded for one project, does not answer another one.
        """
        return f"{self.name}@{self.fingerprint}@{self.hub}"

    @property
    def is_base(self) -> bool:
        """Whether these are the weights of a base, whose process can add adapters."""
        return self.base_of_adapters is not None

    @property
    def shared_base(self) -> str | None:
        """The hash of the base that these weights can share; ``None`` if they can't."""
        return self.base or self.base_of_adapters

    def shares_base(self, other: ServedWeights) -> bool:
        """Whether one process can serve both. Projects share nothing, because a process runs in a project's sandbox."""
        own, others = self.shared_base, other.shared_base
        return own is not None and (own, self.project, self.hub) == (others, other.project, other.hub)


class AnswerOptions(_Message):
    """How to choose tokens, with the names and defaults of OpenAI's API. ``max_tokens=None``: up to the context."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: list[str] = []
    seed: int | None = None
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Prompt(_Message):
    """A conversation, which the model's chat template renders with the tools; or a text or token ids, or several.

    Each of several texts gets `AnswerOptions.n` choices, which are numbered in the order of the texts.
    """

    messages: list[dict[str, JsonValue]] | None = None
    tools: list[dict[str, JsonValue]] | None = None
    text: str | list[int] | list[str] | list[list[int]] | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """The texts or token ids to continue; for a conversation, one empty text."""
        text = self.text
        if isinstance(text, list) and any(isinstance(each, str | list) for each in text):
            return cast("list[str | list[int]]", text)
        return [cast("str | list[int]", text or "")]


class AnswerRequest(_Message):
    kind: Literal["answer_request"] = "answer_request"
    request_id: str
    server: str  # the id in `answer_stream`
    weights: ServedWeights
    prompt: Prompt
    options: AnswerOptions


class AnswerControl(_Message):
    """All parts up to ``received`` have arrived, and those up to ``consumed`` were passed on to the client.

    Also repeated as a sign of life. ``cancel`` ends the request.
    """

    kind: Literal["answer_control"] = "answer_control"
    request_id: str
    received: int
    consumed: int
    cancel: bool = False


class TopLogprob(_Message):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    top: list[TopLogprob] = []


class ToolCall(_Message):
    name: str
    arguments: str  # JSON


class Piece(_Message):
    """The next part of one choice. ``num_tokens`` counts the choice's tokens so far, including an end token."""

    choice: int
    text: str = ""
    num_tokens: int
    logprobs: list[TokenLogprob] = []
    tool_calls: list[ToolCall] = []
    finish_reason: FinishReason | None = None


class Failure(_Message):
    code: FailureCode
    message: str
    param: str | None = None


class AnswerPart(_Message):
    """Part ``number`` of an answer, from 1; 0 is a sign of life without content. The last one has ``is_last``."""

    kind: Literal["answer_part"] = "answer_part"
    request_id: str
    number: int
    pieces: list[Piece] = []
    prompt_tokens: int | None = None
    is_last: bool = False
    failure: Failure | None = None


ANSWER_PART: TypeAdapter[AnswerPart] = TypeAdapter(AnswerPart)


# --- Worker and serving process ---------------------------------------------------------------------------------------


class ServeFile(_Message):
    """``serve.json``: the input of a serving process. Paths are absolute."""

    weights: ServedWeights
    artifacts_root: str
    cache_dir: str
    data_root: str | None = None
    hub: bool = True


class AddAdapter(_Message):
    """Load another adapter of the loaded base, or answer with the base itself (`ServedWeights.is_base`).

    ``file`` names an artifact store that contains the checkpoint of the adapter.
    """

    type: Literal["add_adapter"] = "add_adapter"
    key: str
    file: ServeFile


class Generate(_Message):
    """``adapter`` is the key of an `AddAdapter`, or ``None`` for the weights that were loaded first."""

    type: Literal["generate"] = "generate"
    adapter: str | None = None
    request_id: str
    prompt: Prompt
    options: AnswerOptions


class Cancel(_Message):
    type: Literal["cancel"] = "cancel"
    request_id: str


class ModelReady(_Message):
    """The model is loaded. ``context_tokens`` is the longest sequence that it supports."""

    type: Literal["ready"] = "ready"
    context_tokens: int


class Alive(_Message):
    """A sign of life, once a second unless the process hangs."""

    type: Literal["alive"] = "alive"


class LoadFailed(_Message):
    """The model can't be loaded; the process exits. ``can_retry``: the next request may find other weights."""

    type: Literal["load_failed"] = "load_failed"
    message: str
    can_retry: bool = False


class AdapterFailed(_Message):
    """The adapter can't be added to the loaded base. It may still answer from a process of its own."""

    type: Literal["adapter_failed"] = "adapter_failed"
    key: str
    message: str


class Generated(_Message):
    type: Literal["generated"] = "generated"
    request_id: str
    pieces: list[Piece] = []
    prompt_tokens: int | None = None
    is_last: bool = False
    failure: Failure | None = None


ToServing = Generate | Cancel | AddAdapter
FromServing = ModelReady | Alive | LoadFailed | AdapterFailed | Generated
TO_SERVING: TypeAdapter[ToServing] = TypeAdapter(Annotated[ToServing, Field(discriminator="type")])
FROM_SERVING: TypeAdapter[FromServing] = TypeAdapter(Annotated[FromServing, Field(discriminator="type")])
