"""Every option declares what it affects, and the tables of options follow from that."""

from server.estimates.earlier_jobs import DOCUMENT_OPTIONS, SPEED_OPTIONS
from server.estimates.sequence_counts import COMPARED_OPTIONS
from server.submitting.resuming import FIXED_ON_RESUME
from zeta_core.contract.spec.affects import field_effects
from zeta_core.contract.spec.job_spec import JobSpec, TrainerOptions
from zeta_core.plan import FIXED_PLAN_FIELDS


def test_every_field_declares_its_effects() -> None:
    for model in (TrainerOptions, JobSpec):
        for name in model.model_fields:
            field_effects(model, name)  # raises LookupError if it has none
    assert field_effects(JobSpec, "dataset") == field_effects(TrainerOptions, "dataset")


def test_a_resumed_job_may_change_only_its_length_split_and_organisation() -> None:
    changeable = {"batch_size", "gradient_accumulate_every", "max_steps", "epochs", "checkpointing_steps"}
    changeable |= {
        "save_total_limit",
        "report_to",
        "wandb",
        "entity_name",
        "fsdp_shards",
        "output_dir",
        "resume_from_checkpoint",
    }
    changeable |= {"resources", "elastic", "priority", "max_retries", "time_limit_seconds", "metadata", "notify"}
    assert JobSpec.model_fields.keys() - set(FIXED_ON_RESUME) == changeable


def test_a_resumed_plan_keeps_what_determines_the_results() -> None:
    kept = "seed seq_len pack global_batch learning_rate weight_decay optimizer lr_scheduler warmup max_grad_norm "
    kept += "mixed_precision strategy use_activation_checkpointing compile group_by data eval_data eval_split "
    kept += "eval_steps early_stopping_patience lora freeze beta base attn_implementation lr_min dpo_loss"
    kept += " method desirable_weight undesirable_weight deterministic fsdp_keep_gradients fsdp_cpu_offload"
    kept += " optimizer_states bf16_weights"
    assert tuple(kept.split()) == FIXED_PLAN_FIELDS, "in this order, group_by before the data that it also changes"


def test_the_options_that_determine_speed_and_documents() -> None:
    speed = "model method seq_len pack batch_size mixed_precision compile optimizer lora freeze use_fsdp use_deepspeed"
    speed += " use_activation_checkpointing attn_implementation fsdp_shards fsdp_keep_gradients deterministic"
    speed += " fsdp_cpu_offload optimizer_states bf16_weights"
    assert set(SPEED_OPTIONS) == set(speed.split())
    documents = {"dataset", "overlong", "train_on", "tokenizer", "chat_template", "use_pretokenized"}
    assert set(DOCUMENT_OPTIONS) - set(SPEED_OPTIONS) == documents


def test_the_options_that_determine_the_number_of_sequences() -> None:
    compared = {"method", "pack", "overlong", "train_on", "chat_template", "use_pretokenized", "eval_split", "group_by"}
    assert set(COMPARED_OPTIONS) == compared
