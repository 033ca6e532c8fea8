"""Tiny configs of model families. Attention windows and chunks are shorter than the documents of the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zeta_core.models import VOCABULARY

WINDOW = 8
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_SLIDING = {**_GROUPED, "sliding_window": WINDOW}
_MIXED = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts_per_tok": 2}
_LOCAL_EXPERTS = {**_GROUPED, **_EXPERTS, "num_local_experts": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_GATED_DELTA = {
    **_GROUPED,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

ISOLATED: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "llama4_text": {
        **_GROUPED,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "mistral": _SLIDING,
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "gemma": _GROUPED,
    "gemma2": _SLIDING,
    "gemma3_text": _MIXED,
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **_COMMON, **_MIXED},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 300,
        "boi_token_index": 301,
        "eoi_token_index": 302,
    },
    "qwen2": _GROUPED,
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
    "qwen3": _GROUPED,
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_neox": {},
    "gpt_oss": {**_LOCAL_EXPERTS, **_MIXED},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"alibi": False},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "granite": _GROUPED,
    "granitemoe": _LOCAL_EXPERTS,
    "olmo2": _GROUPED,
    "olmo3": _MIXED,
    "cohere": _GROUPED,
    "cohere2": _MIXED,
    "smollm3": {**_GROUPED, "no_rope_layer_interval": 2},
    "starcoder2": _SLIDING,
    "stablelm": {"num_key_value_heads": 2},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
}

# State-space layers, linear attention and short convolutions carry information across any mask; bloom computes its
# position biases from a mask of two dimensions.
NOT_ISOLATED: dict[str, dict[str, Any]] = {
    "bamba": {**_GROUPED, **_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_LOCAL_EXPERTS,
        **_MAMBA,
        "mamba_expand": 2,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
    },
    "nemotron_h": {
        **_GROUPED,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"]},
    "jamba": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "use_mem_rope": True,
    },
    "falcon_h1": {**_GROUPED, **_MAMBA, "mamba_d_ssm": 64},
    "qwen3_next": {
        **_GATED_DELTA,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_5_text": _GATED_DELTA,
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1},
    "bloom": {"n_layer": 2, "n_head": 4},
}


def config_of(family: str) -> dict[str, Any]:
    own = {**ISOLATED, **NOT_ISOLATED}[family]
    return {"model_type": family, **({} if "text_config" in own else _COMMON), **own}


def build(family: str, device: str = "cpu", **changes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**config_of(family), **changes}
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
