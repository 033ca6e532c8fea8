"""The rules between the fields of `OptionFields`: values that are each valid, but contradict each other."""

from __future__ import annotations

import re
from collections.abc import Iterator

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.spec.options import ADAPTER_SETTINGS, Lora, OptionFields
from zeta_core.contract.spec.range_test import FIND, MIN_RUN_STEPS
from zeta_core.contract.spec.sources import COLUMNS, PREFERENCE_FORMATS, BuiltinSource, DatasetSource, named_sources
from zeta_core.contract.spec.validation import invalid_value, nearest
from zeta_core.contract.text import is_template

_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_NON_ASCII_ESCAPE = re.compile(r"\\[uUN]")
_TURN_FIELDS = frozenset({"role", "content", "from", "value"})


def faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """One detail for every field that another field contradicts."""
    yield from _length_faults(options)
    yield from _schedule_faults(options)
    yield from _evaluation_faults(options)
    yield from _adapter_faults(options)
    yield from _weight_faults(options)
    yield from _column_faults(options)
    yield from _dtype_faults(options)
    yield from _conversation_faults(options)
    yield from _strategy_faults(options)
    yield from _method_faults(options)
    if options.wandb is not None and "wandb" not in options.report_to:
        yield invalid_value("wandb", options.wandb, "it has no effect unless report_to contains 'wandb'; add that")


def _length_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    if options.max_steps is not None and options.epochs is not None:
        yield invalid_value("epochs", options.epochs, "it can't be combined with max_steps; omit one of them")
    if options.warmup_steps >= 1 and options.warmup_steps != int(options.warmup_steps):
        yield invalid_value("warmup_steps", options.warmup_steps, "use a whole number of steps, or a share below 1")
    has_range_test = options.learning_rate == FIND and options.resume_from_checkpoint is None
    if has_range_test and options.max_steps is not None and options.max_steps < MIN_RUN_STEPS:
        fix = f"the range test needs at least {MIN_RUN_STEPS} steps, but max_steps is {options.max_steps}; use a number"
        yield invalid_value("learning_rate", options.learning_rate, fix)


def _schedule_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    if options.lr_min is None:
        return
    if options.lr_scheduler == "constant":
        fix = "it has no effect with lr_scheduler 'constant', whose rate never decreases; omit one of them"
        yield invalid_value("lr_min", options.lr_min, fix)
    if options.learning_rate == FIND:
        fix = "it can't be compared with a rate that is found later; set learning_rate to a number, or omit it"
        yield invalid_value("lr_min", options.lr_min, fix)
    elif options.learning_rate is not None and options.lr_min > options.learning_rate:
        yield invalid_value("lr_min", options.lr_min, f"it exceeds learning_rate ({options.learning_rate:g})")


def _evaluation_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    if options.eval_dataset is not None and options.eval_split is not None:
        fix = "it can't be combined with eval_dataset; omit one of them"
        yield invalid_value("eval_split", options.eval_split, fix)
    if options.group_by is not None and not options.eval_split:
        fix = "it has no effect without eval_split, which divides the data; set eval_split, or omit group_by"
        yield invalid_value("group_by", options.group_by, fix)
    if options.eval_dataset is not None or options.eval_split:
        return
    for name in ("eval_steps", "early_stopping_patience"):
        if (value := getattr(options, name)) is not None:
            yield invalid_value(name, value, "there is no evaluation data; set eval_split or eval_dataset")


def _adapter_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    if options.lora is None:
        return
    if options.freeze:
        fix = "with lora, only the adapter is trained; omit one of them"
        yield invalid_value("freeze", options.freeze, fix)
    if options.lora.continue_adapter:
        for name in ADAPTER_SETTINGS:
            if name in options.lora.model_fields_set:
                fix = "the adapter that is continued has its own; omit it, or omit lora.continue_adapter"
                yield invalid_value(f"lora.{name}", getattr(options.lora, name), fix)
        return
    if options.lora.target_parameters:
        yield from _expert_faults(options, options.lora)
    targets = options.lora.target_modules
    problem = _problem_of_targets(targets)
    if problem is not None:
        fix = f"{problem}; name the layers to adapt, or use 'all-linear'"
        yield invalid_value("lora.target_modules", targets, fix)


def _expert_faults(options: OptionFields, lora: Lora) -> Iterator[ErrorDetail]:
    """Options that don't support adapters of stacked experts, whose weights are computed before each use."""
    without = "omit it, or omit lora.target_parameters"
    if lora.lora_dropout:
        fix = f"adapters of lora.target_parameters have no input that could be dropped; {without}"
        yield invalid_value("lora.lora_dropout", lora.lora_dropout, fix)
    if lora.use_dora:
        yield invalid_value("lora.use_dora", True, f"peft has no DoRA for lora.target_parameters; {without}")
    if options.use_fsdp:
        yield invalid_value("use_fsdp", True, f"it can't shard the weights of lora.target_parameters; {without}")
    if options.use_deepspeed:
        fix = f"it can't shard the weights of lora.target_parameters; {without}"
        yield invalid_value("use_deepspeed", options.use_deepspeed, fix)
    if options.compile:
        yield invalid_value(
            "compile", True, f"peft changes the modules of lora.target_parameters in each call; {without}"
        )
    if options.optimizer == "muon":
        fix = f"it would orthogonalize the adapters of several experts as one matrix; use 'adamw', or {without}"
        yield invalid_value("optimizer", options.optimizer, fix)


def _problem_of_targets(targets: str | list[str]) -> str | None:
    """The problem of layer names, or of a pattern of them; None if there is none."""
    if not targets or not all(targets):
        return "it contains an empty name" if targets else "it is empty"
    if isinstance(targets, list):
        return None
    if not targets.isascii() or _NON_ASCII_ESCAPE.search(targets):
        return "a pattern must be plain ASCII"  # compiling ranges of Unicode takes seconds
    try:
        re.compile(targets)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is not a valid regular expression ({error})"
    return None


# --- Data -------------------------------------------------------------------------------------------------------------


def _sources(options: OptionFields) -> Iterator[tuple[str, DatasetSource]]:
    yield from named_sources("dataset", options.dataset)
    yield from named_sources("eval_dataset", options.eval_dataset)


def _weight_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """Weights are relative to each other, so either all sources have one or none; evaluation does not use them."""
    sources = list(named_sources("dataset", options.dataset))
    if any(source.weight is not None for _, source in sources):
        for path, source in sources:
            if source.weight is None:
                param = f"{path}.weight"
                message = f"{param} is required, because another source has one; set it for every source or for none."
                yield ErrorDetail(param=param, message=message, code="missing_field")
    for path, source in named_sources("eval_dataset", options.eval_dataset):
        if source.weight is not None:
            fix = "every held-out document is evaluated once; omit it"
            yield invalid_value(f"{path}.weight", source.weight, fix)


def _column_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """Standard column names that no format reads, and that would have no effect."""
    for path, source in _sources(options):
        for name in source.columns.keys() - set(COLUMNS):
            param = f"{path}.columns.{name[:80]}"
            message = f"{param!r} is not a known field; the columns are {', '.join(COLUMNS)}."
            suggestion = nearest(name, COLUMNS)
            yield ErrorDetail(param=param, message=message, code="unknown_field", suggestion=suggestion)


def _dtype_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """A type of token ids for a source that has no binary files of them."""
    for path, source in _sources(options):
        reads_ids = options.use_pretokenized or source.format == "tokens"
        if source.dtype is not None and (not reads_ids or isinstance(source, BuiltinSource)):
            fix = "it is the type of the ids in a .bin file; set format to 'tokens', or omit it"
            yield invalid_value(f"{path}.dtype", source.dtype, fix)


def _conversation_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """Settings of conversations that have no effect, or can't have the intended one."""
    template = options.chat_template
    if template is not None and not is_template(template) and not _TEMPLATE_NAME.fullmatch(template):
        fix = "it is neither a Jinja template nor the name of one; set it to the text of a template"
        yield invalid_value("chat_template", template, fix)
    if template is not None and options.use_pretokenized:
        fix = "it has no effect on token ids (use_pretokenized); omit one of them"
        yield invalid_value("chat_template", template, fix)
    for path, source in _sources(options):
        required = sorted(_TURN_FIELDS.intersection(source.drop_fields))
        if required:
            fix = f"every turn needs its {required[0]!r}; remove it from the list"
            yield invalid_value(f"{path}.drop_fields", source.drop_fields, fix)


# --- Training ---------------------------------------------------------------------------------------------------------


def _strategy_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """Options that a model sharded over several processes doesn't support."""
    if options.use_fsdp and options.use_deepspeed:
        fix = "it can't be combined with use_fsdp, which shards the model, too; omit one of them"
        yield invalid_value("use_deepspeed", options.use_deepspeed, fix)
    if options.fsdp_shards is not None and not options.use_fsdp:
        fix = "it has no effect without use_fsdp, which shards the model; set use_fsdp, or omit it"
        yield invalid_value("fsdp_shards", options.fsdp_shards, fix)
    if options.fsdp_keep_gradients and not options.use_fsdp:
        fix = "it has no effect without use_fsdp, which shards gradients; set use_fsdp, or omit it"
        yield invalid_value("fsdp_keep_gradients", True, fix)
    elif options.fsdp_keep_gradients and _accumulates_once(options):
        fix = "it has no effect on steps of one micro-batch; increase gradient_accumulate_every, or omit it"
        yield invalid_value("fsdp_keep_gradients", True, fix)
    if options.fsdp_cpu_offload:
        yield from _offload_faults(options)
    if options.use_deepspeed in ({}, ""):
        fix = "it is empty; use true, a stage from 1 to 3 or a config, or omit it"
        yield invalid_value("use_deepspeed", options.use_deepspeed, fix)
    if options.optimizer_states != "float32":
        yield from _state_faults(options)
    if options.bf16_weights is not None:
        yield from _bf16_weight_faults(options, options.bf16_weights)
    if options.use_deepspeed and options.optimizer in ("adafactor", "muon"):
        fix = "it requires whole matrices, but DeepSpeed flattens and splits them; use 'adamw', or omit use_deepspeed"
        yield invalid_value("optimizer", options.optimizer, fix)
    if options.use_fsdp and options.optimizer == "adafactor":
        fix = "it requires whole matrices, but use_fsdp splits them; use 'adamw', 'lion' or 'muon'"
        yield invalid_value("optimizer", options.optimizer, fix)
    if options.mixed_precision == "fp16" and (options.use_fsdp or options.use_deepspeed):
        fix = "its loss scaling requires whole gradients, but they are sharded; use 'bf16' or 'no'"
        yield invalid_value("mixed_precision", options.mixed_precision, fix)
    if options.lora is not None and options.lora.use_dora and (options.use_fsdp or options.use_deepspeed):
        fix = "it requires whole weights, but they are sharded; omit it, or omit use_fsdp and use_deepspeed"
        yield invalid_value("lora.use_dora", True, fix)
    if options.lora is not None and options.lora.quantize is not None:
        if options.use_deepspeed:
            fix = "DeepSpeed can't shard a 4-bit base model; use use_fsdp instead of use_deepspeed, or omit it"
            yield invalid_value("lora.quantize", options.lora.quantize, fix)
        if options.lora.quantize == "nf4-experts" and not options.use_activation_checkpointing:
            fix = (
                "the dequantized experts of all layers would be kept until the backward pass; add "
                "use_activation_checkpointing=true, or use 'nf4'"
            )
            yield invalid_value("lora.quantize", options.lora.quantize, fix)
        if options.use_fsdp and options.lora.save_merged:
            fix = "the exact base is not sharded, so it can't be merged; omit it, or omit lora.quantize or use_fsdp"
            yield invalid_value("lora.save_merged", True, fix)
        if options.compile:
            yield invalid_value("compile", True, "a 4-bit base model can't be compiled; omit it, or omit lora.quantize")
    if options.compile and options.use_activation_checkpointing == "selective":
        fix = "the operations of compiled blocks can't be selected; use true, or omit compile"
        yield invalid_value("use_activation_checkpointing", options.use_activation_checkpointing, fix)
    if options.compile and options.attn_implementation == "varlen":
        fix = "documents of any length can't be compiled; omit it, or omit compile"
        yield invalid_value("attn_implementation", options.attn_implementation, fix)
    if options.attn_implementation in ("flash_attention_2", "flash_attention_3") and options.pack is not False:
        fix = "in transformers, it separates packed documents only in batches of one; add pack=false, or omit it"
        yield invalid_value("attn_implementation", options.attn_implementation, fix)
    if options.compile and options.use_deepspeed:
        fix = "it can't be combined with use_deepspeed, which replaces the blocks' forward calls; omit one of them"
        yield invalid_value("compile", options.compile, fix)


def _offload_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """Options that can't be combined with `fsdp_cpu_offload`."""
    name = "fsdp_cpu_offload"
    if options.use_deepspeed:
        fix = "DeepSpeed offloads by offload_optimizer and offload_param in its config; set these, or use use_fsdp"
        yield invalid_value(name, True, fix)
    elif not options.use_fsdp:
        fix = "it has no effect without use_fsdp, which shards the model; set use_fsdp, or omit it"
        yield invalid_value(name, True, fix)
    if options.optimizer == "muon":
        fix = "optimizer 'muon' multiplies whole matrices, which takes a CPU too long; use 'adamw', or omit it"
        yield invalid_value(name, True, fix)


def _state_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """Options that can't be combined with `optimizer_states`."""
    name, states = "optimizer_states", options.optimizer_states
    if options.optimizer != "adamw":
        fix = f"optimizer {options.optimizer!r} keeps float32 states only; use optimizer 'adamw', or omit it"
        yield invalid_value(name, states, fix)
    if options.use_deepspeed:
        yield invalid_value(name, states, "DeepSpeed keeps float32 states only; omit it, or omit use_deepspeed")


def _bf16_weight_faults(options: OptionFields, rounding: str) -> Iterator[ErrorDetail]:
    """Options that can't be combined with `bf16_weights`."""
    name = "bf16_weights"
    if options.optimizer != "adamw":
        fix = f"optimizer {options.optimizer!r} needs float32 weights; use optimizer 'adamw', or omit it"
        yield invalid_value(name, rounding, fix)
    if options.use_deepspeed:
        yield invalid_value(name, rounding, "DeepSpeed keeps float32 weights; omit it, or omit use_deepspeed")
    if options.lora is not None:
        yield invalid_value(name, rounding, "adapters are small and are trained in float32; omit it, or omit lora")
    if options.mixed_precision in ("no", "fp16"):
        fix = "bf16_weights requires a computation in bf16; use 'bf16', or omit bf16_weights"
        yield invalid_value("mixed_precision", options.mixed_precision, fix)


def _accumulates_once(options: OptionFields) -> bool:
    """Whether each step has a single micro-batch, as it has by default if only ``batch_size`` is set."""
    accumulate = options.gradient_accumulate_every
    return accumulate == 1 or (accumulate is None and options.batch_size is not None)


def _method_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """Options and data formats that belong to another method."""
    method, wanted = options.method, PREFERENCE_FORMATS.get(options.method)
    for name in PREFERENCE_FORMATS:
        if (settings := getattr(options, name)) is not None and name != method:
            yield invalid_value(name, settings, f"only method {name!r} uses it; set method to {name!r}, or omit it")
    if wanted is not None:
        yield from _preference_faults(options)
    for path, source in _sources(options):
        row_format = source.format
        if isinstance(source, BuiltinSource):
            if row_format not in ("auto", "text"):
                yield invalid_value(f"{path}.format", row_format, f"{source.builtin!r} is text; omit it")
            elif wanted is not None:
                fix = f"it is text, but method {method!r} reads {wanted!r} rows; use a dataset of such rows"
                yield invalid_value(f"{path}.builtin", source.builtin, fix)
            row_format = "text"
        elif row_format not in ("auto", wanted) and wanted is not None:
            yield invalid_value(
                f"{path}.format", row_format, f"method {method!r} reads {wanted!r} rows; use {wanted!r}"
            )
        elif row_format in PREFERENCE_FORMATS.values() and wanted is None:
            names = " or ".join(repr(name) for name, read in PREFERENCE_FORMATS.items() if read == row_format)
            yield invalid_value(f"{path}.format", row_format, f"only method {names} reads it; set method to {names}")
        if row_format == "text" and options.train_on not in (None, "all"):
            yield invalid_value("train_on", options.train_on, "text has no turns; use 'all', or omit it")


def _preference_faults(options: OptionFields) -> Iterator[ErrorDetail]:
    """Options that have no effect when preferences are learned."""
    method = options.method
    if options.train_on not in (None, "completion"):
        yield invalid_value("train_on", options.train_on, f"method {method!r} always trains on the answers; omit it")
    if options.pack:
        yield invalid_value("pack", True, f"with method {method!r}, each answer is a sequence of its own; omit it")
