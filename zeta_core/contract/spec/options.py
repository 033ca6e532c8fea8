"""The fields of a job spec that ``zeta.Trainer`` takes as keywords, too.

A description states what an unset field means after ``unset:``; `docs/spec.md` is generated from the descriptions.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from zeta_core.contract.spec.affects import Affects
from zeta_core.contract.spec.range_test import Find
from zeta_core.contract.spec.sources import Dataset, TokenizerSource
from zeta_core.contract.spec.validation import StrictModel
from zeta_core.contract.text import Line

Optimizer = Literal["adamw", "sgd", "lion", "adafactor", "muon"]
OptimizerStates = Literal["float32", "bf16", "8bit"]
Bf16Weights = Literal["stochastic", "kahan"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Precision = Literal["no", "bf16", "fp16"]
Method = Literal["sft", "dpo", "kto", "orpo"]
Attention = Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3", "flex", "varlen", "eager"]
Checkpointing = bool | Literal["selective", "offload"]
ReferencePenalty = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False, description="strength of the penalty for deviating from the reference model"),
]
MAX_STEPS = 10**9
MAX_TEMPLATE_CHARACTERS = 60_000  # several times the longest published template; fits into a request body

Quantization = Literal["nf4", "nf4-experts"]  # of the base of an adapter


class Lora(StrictModel):
    r: int = Field(default=16, ge=1, description="rank of the adapter's matrices")
    lora_alpha: float = Field(
        default=32, gt=0, allow_inf_nan=False, description="the adapter's output is scaled by lora_alpha / r"
    )
    lora_dropout: float = Field(default=0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: (
        Annotated[str, Field(max_length=1000)]
        | Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=300)]  # fits into a request body
    ) = Field(
        default="all-linear",
        description="names of the layers to adapt, or a regular expression; 'all-linear' adapts every linear layer "
        "except the output layer",
    )
    target_parameters: (
        Literal["all-experts"]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=300)]], Field(max_length=100)]
    ) = Field(
        default=[],
        description="parameters outside of linear layers to adapt, too, by the ends of their names, such as "
        "`mlp.experts.gate_up_proj`; 'all-experts' adapts all weights that a mixture-of-experts model stores for "
        "several experts at once",
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
    use_rslora: bool = Field(
        default=False,
        description="scale the adapter's output by lora_alpha / sqrt(r), so that it does not shrink with the rank",
    )
    use_dora: bool = Field(
        default=False, description="also train the norm of each adapted weight (DoRA); slower, often better at low r"
    )
    quantize: Quantization | None = Field(
        default=None,
        description="'nf4' holds the base model's linear layers in 4 bits (QLoRA); 'nf4-experts' also holds "
        "all weights that a mixture-of-experts model stores for several experts at once, and requires "
        "use_activation_checkpointing; unset: not quantized",
    )
    continue_adapter: bool = Field(
        default=False,
        description="train the adapter that `model` names further, with its own rank and layers; otherwise it is "
        "merged into its base, and a new adapter is trained",
    )


# The fields that describe an adapter. One that is continued has its own.
ADAPTER_SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "use_rslora",
    "use_dora",
)


class Dpo(StrictModel):
    loss: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid",
        description="'sigmoid' is the loss of DPO; 'ipo' drives the difference between the answers, per token, towards "
        "1 / (2 beta), and overfits less to pairs without contradictions",
    )
    beta: ReferencePenalty = 0.1


class Kto(StrictModel):
    beta: ReferencePenalty = 0.1
    desirable_weight: float = Field(
        default=1, gt=0, allow_inf_nan=False, description="weight of the losses of desirable answers"
    )
    undesirable_weight: float = Field(
        default=1,
        gt=0,
        allow_inf_nan=False,
        description="weight of the losses of undesirable answers; if one kind of answer is rarer, increase its weight "
        "until weight times number is similar for both kinds",
    )


class Orpo(StrictModel):
    beta: float = Field(
        default=0.1,
        gt=0,
        allow_inf_nan=False,
        description="weight of the odds-ratio loss, which is added to the loss of the chosen answer",
    )


class Wandb(StrictModel):
    project: Line | None = Field(default=None, description="unset: WANDB_PROJECT of the worker, or 'zeta'")
    entity: Line | None = Field(default=None, description="team or user; unset: the default of the worker's W&B key")
    name: Line | None = Field(default=None, description="display name of the run; unset: entity_name, or the run's id")
    tags: list[Line] = Field(default=[], max_length=100, description="tags of the run")


class OptionFields(StrictModel):
    """The fields of `zeta_core.contract.spec.job_spec.TrainerOptions`, which adds the rules between them."""

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
        "most 32 for fine-tuning), in micro-batches of as many tokens as fit the device",
    )
    seq_len: Annotated[int | None, Affects("results", "sequences", "speed")] = Field(
        default=None, ge=2, le=10_000_000, description="tokens per sequence; unset: the model's limit, at most 1024"
    )
    entity_name: Annotated[Line | None, Affects()] = Field(default=None, description="name of the run; unset: none")
    use_fsdp: Annotated[bool, Affects("results", "speed")] = Field(
        default=False, description="shard the model over the processes with FSDP2"
    )
    fsdp_shards: Annotated[int | None, Affects("speed")] = Field(
        default=None,
        ge=2,
        le=100_000,
        description="processes that share a copy of the model with use_fsdp (HSDP), which must divide their number; "
        "the number of GPUs of a host keeps the exchange of weights within it; unset: all processes share one copy",
    )
    fsdp_keep_gradients: Annotated[bool, Affects("results", "speed")] = Field(
        default=False,
        description="with use_fsdp, exchange gradients once per step instead of after each micro-batch; less traffic, "
        "but each process holds the gradients of the whole model (4 bytes per trained weight)",
    )
    fsdp_cpu_offload: Annotated[bool, Affects("results", "speed")] = Field(
        default=False,
        description="with use_fsdp on GPUs, hold the shards of weights, gradients and optimizer state in the memory of "
        "the host, and update them on its CPU; each block is copied to the GPU when it is needed, which is slower",
    )
    use_activation_checkpointing: Annotated[Checkpointing, Affects("results", "speed")] = Field(
        default=False,
        description="recompute activations in the backward pass to save memory; 'selective' keeps the results of "
        "matrix products and of fused attention, which is faster and saves less; 'offload' also moves the inputs of "
        "the blocks to the memory of the host, which saves more on a GPU with long sequences; the results are equal",
    )
    learning_rate: Annotated[
        Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | Find | None, Affects("results")
    ] = Field(
        default=None,
        description="peak learning rate; 'find' chooses it with a range test of up to 100 updates before the first "
        "step; unset: 3e-4 from scratch, 2e-5 for full fine-tuning, 2e-4 for LoRA, 1e-6 for "
        "DPO and KTO, 8e-6 for ORPO",
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
        "output_dir or its checkpoint.pt in a Trainer; unset: a new run",
    )
    checkpointing_steps: Annotated[Annotated[int, Field(ge=1)] | Literal["epoch"] | None, Affects()] = Field(
        default=None,
        description="steps between checkpoints, or 'epoch'; unset: about every 10 minutes, at most 5 % of the time",
    )
    output_dir: Annotated[Line | None, Affects()] = Field(
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
        description="passes over the data; excludes max_steps; unset: 3 for fine-tuning, 1 from scratch and for "
        "preferences",
    )
    optimizer: Annotated[Optimizer, Affects("results", "speed")] = Field(default="adamw", description="the optimizer")
    optimizer_states: Annotated[OptimizerStates, Affects("results", "speed")] = Field(
        default="float32",
        description="precision in which optimizer 'adamw' keeps its two moments: 8 bytes per trained weight in "
        "'float32', 4 in 'bf16', and about 2 in '8bit', which rounds the values of blocks of 256 to 8 bits each and "
        "takes longer, especially on a CPU",
    )
    bf16_weights: Annotated[Bf16Weights | None, Affects("results", "speed")] = Field(
        default=None,
        description="hold the trained weights and their gradients in bfloat16, 2 bytes each instead of 4, with "
        "optimizer 'adamw'; 'stochastic' rounds each updated weight at random, so that small updates are kept on "
        "average, and 'kahan' keeps what rounding removed in 2 more bytes per weight, which is almost as exact as "
        "float32; frozen weights are rounded to bfloat16, too; unset: the trained weights are in float32",
    )
    lr_scheduler: Annotated[Schedule, Affects("results")] = Field(
        default="cosine", description="the schedule of the learning rate after warm-up"
    )
    lr_min: Annotated[float | None, Affects("results")] = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="learning rate at the end of the schedule; unset: 0",
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
    deterministic: Annotated[bool, Affects("results", "speed")] = Field(
        default=False,
        description="use only kernels that always give the same bits, so that runs on GPUs can be repeated and resumed "
        "exactly; such kernels may be slower, and an operation without one ends the run; on CPUs, runs are exact "
        "without it",
    )
    attn_implementation: Annotated[Attention, Affects("results", "speed")] = Field(
        default="auto",
        description="how attention is computed: `varlen` computes each document of a packed sequence by itself, "
        "without a mask; `sdpa`, `eager`, `flex`, `flash_attention_2` and `flash_attention_3` are those of "
        "transformers, the last three on GPUs only; `auto` chooses varlen if the model supports it, compile is false, "
        "and the run uses half precision or a CPU, else the model's own",
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
    method: Annotated[Method, Affects("results", "documents", "sequences", "speed")] = Field(
        default="sft",
        description="next-token training (sft), or learning preferences: from pairs of answers (dpo, orpo), or from "
        "single answers that are labeled as desirable or not (kto); orpo needs no reference model",
    )
    dpo: Annotated[Dpo | None, Affects("results")] = Field(
        default=None, description="settings of method 'dpo'; unset: their defaults"
    )
    kto: Annotated[Kto | None, Affects("results")] = Field(
        default=None, description="settings of method 'kto'; unset: their defaults"
    )
    orpo: Annotated[Orpo | None, Affects("results")] = Field(
        default=None, description="settings of method 'orpo'; unset: their defaults"
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
    wandb: Annotated[Wandb | None, Affects()] = Field(
        default=None, description="settings of the tracker 'wandb'; unset: their defaults"
    )
