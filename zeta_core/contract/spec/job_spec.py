"""The job spec: the Trainer's parameters by their documented names, and what a service adds to them.

`TrainerOptions` is shared word for word by ``zeta.Trainer`` and by ``POST /v1/jobs``; `JobSpec` adds the fields that
only a service needs. Both refuse unknown fields. Faults are told by `validation.parse`, which names every bad field,
its value and the cure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, JsonValue

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.identifiers import is_hub_id, is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.model_json.config import clean_config
from zeta_core.contract.model_json.faults import InvalidModelFiles, JsonLocation
from zeta_core.contract.spec import availability
from zeta_core.contract.spec.affects import Affects
from zeta_core.contract.spec.deepspeed import cure_for_a_job
from zeta_core.contract.spec.rate_search import FIND, SHORTEST_RUN, Find
from zeta_core.contract.spec.sources import (
    COLUMNS,
    BuiltinSource,
    ConfigModel,
    Dataset,
    ModelSource,
    Sent,
    TokenizerSource,
    context_limit,
    dataset_sources,
)
from zeta_core.contract.spec.validation import Checked, nearest, shown
from zeta_core.contract.text import in_one_line

Optimizer = Literal["adamw", "sgd", "lion", "adafactor", "muon"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Precision = Literal["no", "bf16", "fp16"]
MAX_STEPS = 10**9
MAX_TEMPLATE_CHARACTERS = 200_000  # several times the longest published one
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_NON_ASCII_ESCAPE = re.compile(r"\\[uUN]")


# --- Methods ----------------------------------------------------------------------------------------------------------


class Lora(Sent):
    r: int = Field(default=16, ge=1, description="rank of the adapter's matrices")
    lora_alpha: float = Field(default=32, gt=0, description="the adapter's output is scaled by lora_alpha / r")
    lora_dropout: float = Field(default=0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: (
        Annotated[str, Field(max_length=1000)]
        | Annotated[list[Annotated[str, Field(max_length=300)]], Field(max_length=1000)]
    ) = Field(
        default="all-linear",
        description="names of the layers to adapt, or a regular expression; 'all-linear' adapts every linear layer "
        "except the output layer",
    )
    modules_to_save: list[Annotated[str, Field(min_length=1, max_length=300)]] = Field(
        default=[],
        max_length=100,
        description="modules that are trained as a whole and saved with the adapter, such as embed_tokens and lm_head "
        "for added tokens",
    )
    save_merged: bool = Field(
        default=False, description="also save the base model with the adapter merged into it, in best and final"
    )
    quantize: Literal["nf4"] | None = Field(
        default=None, description="hold the base model's linear layers in 4 bits (QLoRA); unset: not quantized"
    )


class Dpo(Sent):
    beta: float = Field(default=0.1, gt=0, description="strength of the penalty for deviating from the reference model")


class Resources(Sent):
    gpus: int | None = Field(
        default=None, ge=0, le=1024, description="number of GPUs; unset: 1 on a worker with GPUs, else 0"
    )
    nodes: int = Field(default=1, ge=1, le=1024, description="number of machines")
    processes: int | None = Field(
        default=None, ge=1, le=1024, description="number of training processes; unset: one per GPU, or 1"
    )
    exact: bool = Field(
        default=False,
        description="wait for a worker with the same device kind, so that later attempts have bit-identical results; "
        "otherwise the job prefers one, and continues on another with the warning device_changed",
    )

    @property
    def num_processes(self) -> int:
        """The processes of a training: its world size."""
        return self.processes or max(1, self.gpus or 1) * self.nodes


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


# --- The spec ---------------------------------------------------------------------------------------------------------


class TrainerOptions(Sent, Checked):
    """Every parameter of ``Trainer`` but the model itself. ``None`` means the documented default, recorded when known.

    A step is an optimizer step; a global batch is ``batch_size`` x ``gradient_accumulate_every`` x processes sequences
    of ``seq_len`` tokens.
    """

    gradient_accumulate_every: Annotated[int | None, Affects("batch")] = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="micro-batches per optimizer step; unset: 1 if batch_size is set, else chosen with batch_size",
    )
    batch_size: Annotated[int | None, Affects("batch", "speed")] = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="sequences per process and micro-batch; unset: the default global batch (32 from scratch, at "
        "most 32 for fine-tuning), split to fit the device",
    )
    seq_len: Annotated[int | None, Affects("results", "sequences", "speed")] = Field(
        default=None, ge=2, le=10_000_000, description="tokens per sequence; unset: the model's limit, at most 1024"
    )
    entity_name: Annotated[
        Annotated[str, Field(min_length=1, max_length=200), AfterValidator(in_one_line)] | None, Affects()
    ] = Field(default=None, description="name of the run; unset: none")
    use_fsdp: Annotated[bool, Affects("results", "speed")] = Field(
        default=False, description="shard the model over the processes with FSDP2"
    )
    use_activation_checkpointing: Annotated[bool, Affects("results", "speed")] = Field(
        default=False, description="recompute activations in the backward pass to save memory"
    )
    learning_rate: Annotated[
        Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | Find | None, Affects("results")
    ] = Field(
        default=None,
        description="peak learning rate; 'find' chooses it with a range test of up to 100 updates before the first "
        "step; unset: 3e-4 from scratch, 2e-5 for full fine-tuning, 2e-4 for LoRA, 1e-6 for DPO",
    )
    seed: Annotated[int | None, Affects("results", "sequences")] = Field(
        default=None, ge=0, lt=2**32, description="seed of all random numbers and of the order of the data; unset: 42"
    )
    use_pretokenized: Annotated[bool, Affects("results", "documents", "sequences")] = Field(
        default=False, description="the data consists of token ids"
    )
    resume_from_checkpoint: Annotated[str | None, Affects()] = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="continue exactly from a checkpoint: 'job_...' or 'job_.../step-N' in a job; a checkpoint, an "
        "output_dir or its checkpoint.pt in a Trainer; unset: start anew",
    )
    checkpointing_steps: Annotated[Annotated[int, Field(ge=1)] | Literal["epoch"] | None, Affects()] = Field(
        default=None,
        description="steps between checkpoints, or 'epoch'; unset: about every 10 minutes, at most 5 % of the time",
    )
    output_dir: Annotated[
        Annotated[str, Field(min_length=1, max_length=200), AfterValidator(in_one_line)] | None, Affects()
    ] = Field(
        default=None, description="folder of the checkpoints, in a job relative to its artifacts; unset: the job's own"
    )
    weight_decay: Annotated[float | None, Affects("results")] = Field(
        default=None,
        ge=0,
        le=1000,
        allow_inf_nan=False,
        description="weight decay of matrices and embeddings; unset: 0.1",
    )
    use_deepspeed: Annotated[
        bool | Annotated[int, Field(ge=1, le=3)] | dict[str, JsonValue] | str | None, Affects("results", "speed")
    ] = Field(default=None, description="train with DeepSpeed ZeRO: true, a stage from 1 to 3, or a config; unset: no")

    dataset: Annotated[Dataset | None, Affects("results", "documents", "sequences")] = Field(
        default=None,
        description="the training data: a source, or a list of sources; unset: required in a job, the Python "
        "reference in a Trainer",
    )
    tokenizer: Annotated[TokenizerSource | None, Affects("results", "documents", "sequences")] = Field(
        default=None,
        description="a Hub id, {'file': ...} or {'builtin': 'bytes'}; unset: the model's own, or bytes if it has none",
    )
    chat_template: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_TEMPLATE_CHARACTERS)] | None,
        Affects("results", "documents", "sequences"),
    ] = Field(
        default=None,
        description="a Jinja template for conversations, or the name of one of the tokenizer's, saved with the "
        "tokenizer; unset: the tokenizer's own, or ChatML if it has none",
    )
    max_steps: Annotated[int | None, Affects("length")] = Field(
        default=None, ge=1, le=MAX_STEPS, description="optimizer steps; excludes epochs; unset: determined by epochs"
    )
    epochs: Annotated[float | None, Affects("length")] = Field(
        default=None,
        gt=0,
        le=1_000_000,
        allow_inf_nan=False,
        description="passes over the data; excludes max_steps; unset: 3 for fine-tuning, 1 from scratch and for DPO",
    )
    optimizer: Annotated[Optimizer, Affects("results", "speed")] = Field(default="adamw", description="the optimizer")
    lr_scheduler: Annotated[Schedule, Affects("results")] = Field(
        default="cosine", description="the schedule of the learning rate after warm-up"
    )
    warmup_steps: Annotated[float, Affects("results")] = Field(
        0.03, ge=0, le=MAX_STEPS, allow_inf_nan=False, description="steps of warm-up; below 1, a share of the run"
    )
    max_grad_norm: Annotated[float, Affects("results")] = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="norm to which the gradient is clipped"
    )
    mixed_precision: Annotated[Precision | None, Affects("results", "speed")] = Field(
        default=None, description="precision of the computation; unset: bf16 on GPUs that support it, else no"
    )
    compile: Annotated[bool, Affects("results", "speed")] = Field(
        default=False, description="compile the model's blocks with torch.compile"
    )
    pack: Annotated[bool | None, Affects("results", "sequences", "speed")] = Field(
        default=None,
        description="put several documents into one sequence; unset: yes, except for fine-tuning on little data and "
        "for models that cannot isolate documents",
    )
    overlong: Annotated[Literal["error", "truncate", "drop"] | None, Affects("results", "documents", "sequences")] = (
        Field(
            default=None,
            description="handling of documents longer than seq_len; unset: conversations are truncated, text continues "
            "in the next sequence",
        )
    )
    eval_dataset: Annotated[Dataset | None, Affects("results")] = Field(
        default=None, description="held-out data; excludes eval_split; unset: no evaluation on separate data"
    )
    eval_split: Annotated[float | None, Affects("results", "sequences")] = Field(
        default=None, ge=0, le=0.5, description="share of the rows to hold out for evaluation; unset: none"
    )
    group_by: Annotated[
        Annotated[str, Field(min_length=1, max_length=1000)] | None, Affects("results", "sequences")
    ] = Field(
        default=None,
        description="a column: eval_split holds out all rows with the same value, or none of them; unset: rows are "
        "held out independently",
    )
    eval_steps: Annotated[int | None, Affects("results")] = Field(
        default=None, ge=1, le=MAX_STEPS, description="steps between evaluations; unset: ten evaluations per run"
    )
    early_stopping_patience: Annotated[int | None, Affects("results")] = Field(
        default=None, ge=1, description="stop after this many evaluations without improvement; unset: never"
    )
    lora: Annotated[Lora | None, Affects("results", "speed")] = Field(
        default=None, description="train a LoRA adapter; unset: train all weights"
    )
    freeze: Annotated[list[Annotated[str, Field(min_length=1, max_length=300)]], Affects("results", "speed")] = Field(
        default=[], max_length=100, description="shell patterns of the names of parameters that are not trained"
    )
    method: Annotated[Literal["sft", "dpo"], Affects("results", "documents", "sequences", "speed")] = Field(
        default="sft", description="next-token training (sft), or preference optimization on pairs of answers (dpo)"
    )
    dpo: Annotated[Dpo | None, Affects("results")] = Field(
        default=None, description="settings of method 'dpo'; unset: their defaults"
    )
    train_on: Annotated[
        Literal["assistant", "completion", "all"] | None, Affects("results", "documents", "sequences")
    ] = Field(
        default=None,
        description="which tokens are trained on; unset: the assistant's turns, the completion, or the whole text, "
        "depending on the format",
    )
    save_total_limit: Annotated[int, Affects()] = Field(
        default=3, ge=2, le=1000, description="number of newest checkpoints to keep, besides best and final"
    )
    report_to: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], Affects()] = Field(
        default=[], max_length=16, description="experiment trackers that receive the metrics"
    )

    def faults(self) -> list[ErrorDetail]:
        """The rules between fields, and the words that are not available yet."""
        found: list[ErrorDetail] = []
        if self.max_steps is not None and self.epochs is not None:
            found.append(_fault("epochs", self.epochs, "max_steps is given too; leave one of them out"))
        if self.use_fsdp and self.use_deepspeed:
            found.append(
                _fault("use_deepspeed", self.use_deepspeed, "use_fsdp shards the model too; leave one of them out")
            )
        if self.eval_dataset is not None and self.eval_split is not None:
            found.append(_fault("eval_split", self.eval_split, "eval_dataset is given too; leave one of them out"))
        found += self._evaluation_faults()
        if self.lora is not None and self.freeze:
            found.append(_fault("freeze", self.freeze, "lora trains its adapter alone; leave one of them out"))
        wrong = None if self.lora is None else _wrong_targets(self.lora.target_modules)
        if self.lora is not None and wrong is not None:
            cure = f"{wrong}name the layers to adapt, or use 'all-linear'"
            found.append(_fault("lora.target_modules", self.lora.target_modules, cure))
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            found.append(_fault("warmup_steps", self.warmup_steps, "use a whole number of steps, or a share below 1"))
        finds = self.learning_rate == FIND and self.resume_from_checkpoint is None
        if finds and self.max_steps is not None and self.max_steps < SHORTEST_RUN:
            cure = f"its test needs {SHORTEST_RUN} steps or more, and max_steps is {self.max_steps}; use a number"
            found.append(_fault("learning_rate", self.learning_rate, cure))
        found += self._weight_faults()
        found += self._column_faults()
        found += self._dtype_faults()
        found += self._chat_faults()
        return [*found, *self._strategy_faults(), *self._method_faults(), *availability.faults(self)]

    def _weight_faults(self) -> Iterator[ErrorDetail]:
        """Weights are shares, so all sources have one or none has; what is evaluated is seen once."""
        sources = dataset_sources(self.dataset)
        if any(source.weight is not None for source in sources):
            for index, source in enumerate(sources):
                if source.weight is None:
                    param = f"dataset.{index}.weight"
                    message = f"{param} is required, as other sources have one; give every source a weight, or none."
                    yield ErrorDetail(param=param, message=message, code="missing_field")
        for index, source in enumerate(dataset_sources(self.eval_dataset)):
            if source.weight is not None:
                at = f"eval_dataset.{index}" if isinstance(self.eval_dataset, list) else "eval_dataset"
                yield _fault(f"{at}.weight", source.weight, "every held-out document is evaluated once; leave it out")

    def _column_faults(self) -> Iterator[ErrorDetail]:
        """Names that no format reads, which would be passed over in silence."""
        for place, dataset in (("dataset", self.dataset), ("eval_dataset", self.eval_dataset)):
            for index, source in enumerate(dataset_sources(dataset)):
                at = f"{place}.{index}" if isinstance(dataset, list) else place
                for name in source.columns.keys() - set(COLUMNS):
                    param = f"{at}.columns.{name[:80]}"
                    message = f"{param!r} is not a known field; the columns are {', '.join(COLUMNS)}."
                    meant = nearest(name, COLUMNS)
                    yield ErrorDetail(param=param, message=message, code="unknown_field", suggestion=meant)

    def _dtype_faults(self) -> Iterator[ErrorDetail]:
        """A type of ids that no file of the source can have."""
        for place, dataset in (("dataset", self.dataset), ("eval_dataset", self.eval_dataset)):
            for index, source in enumerate(dataset_sources(dataset)):
                reads_ids = self.use_pretokenized or source.format == "tokens"
                if source.dtype is not None and (not reads_ids or isinstance(source, BuiltinSource)):
                    at = f"{place}.{index}" if isinstance(dataset, list) else place
                    cure = "it is the type of the ids in a .bin file; set format to 'tokens', or leave it out"
                    yield _fault(f"{at}.dtype", source.dtype, cure)

    def _chat_faults(self) -> Iterator[ErrorDetail]:
        """Settings of conversations that have no effect, or cannot have the intended one."""
        template = self.chat_template
        if template is not None and not is_template(template) and not _TEMPLATE_NAME.fullmatch(template):
            cure = "it is neither a Jinja template nor the name of one; give the text of the template"
            yield _fault("chat_template", template, cure)
        if template is not None and self.use_pretokenized:
            yield _fault("chat_template", template, "use_pretokenized data is not rendered; leave one of them out")
        for place, dataset in (("dataset", self.dataset), ("eval_dataset", self.eval_dataset)):
            for index, source in enumerate(dataset_sources(dataset)):
                at = f"{place}.{index}" if isinstance(dataset, list) else place
                needed = sorted({"role", "content", "from", "value"}.intersection(source.drop_fields))
                if needed:
                    yield _fault(f"{at}.drop_fields", source.drop_fields, f"every turn needs its {needed[0]!r}")

    def _method_faults(self) -> Iterator[ErrorDetail]:
        """What a method does not read, and formats that are of another one."""
        if self.dpo is not None and self.method != "dpo":
            yield _fault("dpo", self.dpo, "it is read by method 'dpo' alone; set method, or leave it out")
        if self.method == "dpo" and self.train_on not in (None, "completion"):
            yield _fault("train_on", self.train_on, "method 'dpo' learns from the answers alone; leave it out")
        for place, dataset in (("dataset", self.dataset), ("eval_dataset", self.eval_dataset)):
            for index, source in enumerate(dataset_sources(dataset)):
                at = f"{place}.{index}" if isinstance(dataset, list) else place
                row_format = source.format
                if isinstance(source, BuiltinSource):
                    if row_format not in ("auto", "text"):
                        yield _fault(f"{at}.format", row_format, f"{source.builtin!r} is text; leave it out")
                    elif self.method == "dpo":
                        cure = "it is text, and method 'dpo' reads 'preference' pairs; name data of those"
                        yield _fault(f"{at}.builtin", source.builtin, cure)
                    row_format = "text"
                elif row_format not in ("auto", "preference") and self.method == "dpo":
                    yield _fault(f"{at}.format", row_format, "method 'dpo' reads 'preference' pairs; use that")
                elif row_format == "preference" and self.method != "dpo":
                    yield _fault(f"{at}.format", row_format, "it is for method 'dpo'; set method to that")
                if row_format == "text" and self.train_on not in (None, "all"):
                    yield _fault("train_on", self.train_on, f"{row_format} has no turns; use 'all', or leave it out")

    def _evaluation_faults(self) -> Iterator[ErrorDetail]:
        if self.group_by is not None and not self.eval_split:
            yield _fault("group_by", self.group_by, "it keeps groups together when eval_split divides the data; set it")
        if self.eval_dataset is not None or self.eval_split:
            return
        cure = "there is nothing to evaluate on; give eval_split or eval_dataset, too"
        for name in ("eval_steps", "early_stopping_patience"):
            if getattr(self, name) is not None:
                yield _fault(name, getattr(self, name), cure)

    def _strategy_faults(self) -> Iterator[ErrorDetail]:
        """What would not be what it is called once the model is split over processes."""
        if self.use_deepspeed in ({}, ""):
            cure = "it asks for nothing; use true, a stage from 1 to 3, or a config, or leave it out"
            yield _fault("use_deepspeed", self.use_deepspeed, cure)
        if self.use_deepspeed and self.optimizer in ("adafactor", "muon"):
            cure = "it needs whole matrices, and DeepSpeed trains flat pieces of them; use 'adamw', or no use_deepspeed"
            yield _fault("optimizer", self.optimizer, cure)
        if self.use_fsdp and self.optimizer == "adafactor":
            cure = "its factors need whole matrices, which use_fsdp cuts; use 'adamw', 'lion' or 'muon'"
            yield _fault("optimizer", self.optimizer, cure)
        if self.mixed_precision == "fp16" and (self.use_fsdp or self.use_deepspeed):
            cure = "its loss is scaled for whole gradients, and these are split; use 'bf16' or 'no'"
            yield _fault("mixed_precision", self.mixed_precision, cure)
        if self.lora is not None and self.lora.quantize is not None:
            if self.use_fsdp or self.use_deepspeed:
                cure = "every process holds a base in 4 bits whole; leave it out, or use_fsdp and use_deepspeed"
                yield _fault("lora.quantize", self.lora.quantize, cure)
            if self.compile:
                yield _fault("compile", True, "a base in 4 bits is not compiled; leave this out, or lora.quantize")
        if self.compile and self.use_deepspeed:
            yield _fault("compile", self.compile, "use_deepspeed rebuilds the blocks' calls; leave one of them out")


class JobSpec(TrainerOptions):
    """What ``POST /v1/jobs`` takes."""

    model: Annotated[ModelSource, Affects("results", "documents", "sequences", "speed")] = Field(
        description="a Hub id, or {'config': ...} (from scratch), {'job': ..., 'checkpoint': ...}, {'file': ...} or "
        "{'builder': ...}"
    )
    dataset: Annotated[Dataset, Affects("results", "documents", "sequences")] = Field(  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
        description="the training data: a source, or a list of sources"
    )
    resources: Annotated[Resources, Affects()] = Field(
        default=Resources(), description="what the job needs of a worker"
    )
    priority: Annotated[int, Affects()] = Field(
        default=0, ge=-100, le=100, description="jobs with a higher priority start first"
    )
    max_retries: Annotated[int, Affects()] = Field(
        default=3, ge=0, le=100, description="consecutive failures without a new checkpoint that are retried"
    )
    time_limit_seconds: Annotated[float | None, Affects()] = Field(
        default=None, gt=0, allow_inf_nan=False, description="running time over all attempts; unset: unlimited"
    )
    metadata: Annotated[Metadata, Affects()] = Field(
        default={}, description="up to 16 strings of your own, to find the job by"
    )

    placeholders: ClassVar[dict[str, Any]] = {"model": "org/name", "dataset": {"path": "data"}}

    def faults(self) -> list[ErrorDetail]:
        found = super().faults()
        if self.resume_from_checkpoint is not None:
            job, _, name = self.resume_from_checkpoint.partition("/")
            if not is_id(job, "job") or (name and not NAME_PATTERN.match(name)):
                cure = "it names no job of this service; use 'job_...' or 'job_.../step-N'"
                found.append(_fault("resume_from_checkpoint", self.resume_from_checkpoint, cure))
        cure = cure_for_a_job(self.use_deepspeed)
        if cure is not None:
            found.append(_fault("use_deepspeed", self.use_deepspeed, cure))
        if self.output_dir is not None and not _relative_inside(self.output_dir):
            cure = "it leaves the job's own artifacts; use a relative name such as 'models'"
            found.append(_fault("output_dir", self.output_dir, cure))
        found += self._model_faults()
        if isinstance(self.model, ConfigModel) and not self.model.config.get("model_type"):
            message = "model.config.model_type is required; add it, such as 'llama'."
            found.append(ErrorDetail(param="model.config.model_type", message=message, code="missing_field"))
        limit = context_limit(self.model)
        if self.seq_len is not None and limit is not None and self.seq_len > limit:
            cure = f"the given model config has {limit} positions; use at most {limit}, or raise the config's limit"
            found.append(_fault("seq_len", self.seq_len, cure))
        return found

    def _model_faults(self) -> Iterator[ErrorDetail]:
        """Names and configs that a library would take for a path or an address of the worker's machine, or for code."""
        for param, value in (("model", self.model), ("tokenizer", self.tokenizer)):
            if isinstance(value, str) and not is_hub_id(value):
                cure = "it is not a Hub id; use 'org/name' or 'org/name@revision', or upload it with POST /v1/files"
                yield _fault(param, value, cure)
        if isinstance(self.model, ConfigModel):
            try:
                clean_config(self.model.config, JsonLocation("model.config", origin="spec"))
            except InvalidModelFiles as error:
                yield ErrorDetail(param=error.param, message=error.message, code="invalid_value")


def _fault(param: str, value: object, cure: str) -> ErrorDetail:
    return ErrorDetail(param=param, message=f"{param} is {shown(value)}; {cure}.", code="invalid_value")


def _wrong_targets(targets: str | list[str]) -> str | None:
    """What is wrong with names of layers, or a pattern of them, as a beginning of the cure; None where nothing is."""
    if not targets or not all(targets):
        return ""
    if isinstance(targets, list):
        return None
    if not targets.isascii() or _NON_ASCII_ESCAPE.search(targets):
        return "a pattern of layers' names is plain ASCII; "  # compiling ranges of Unicode takes seconds
    try:
        re.compile(targets)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no regular expression ({error}); "
    return None


def is_template(chat_template: str) -> bool:
    """Whether a ``chat_template`` is the text of a template, rather than a name of one."""
    return "{" in chat_template


def _relative_inside(path: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return not path.startswith(("/", "~", "\\")) and ".." not in parts and ":" not in path and "\0" not in path
