"""Weight decay and Muon depend on a parameter's role, not on its number of dimensions."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from tests.zeta_core.models import llama
from zeta_core.model.activation_checkpointing import repeated_blocks
from zeta_core.optim.muon import Muon
from zeta_core.optim.optimizer import ParameterGroups
from zeta_core.optim.orthogonal import orthogonalized
from zeta_core.optim.roles import Role, parameter_roles

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
MAMBA: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100}

FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Role]]] = {
    "gpt_oss": (
        {**SMALL, "num_local_experts": 4, "head_dim": 8},
        {
            "layers.0.mlp.experts.gate_up_proj": Role.EXPERTS,
            "layers.0.mlp.experts.gate_up_proj_bias": Role.OTHER,
            "layers.0.mlp.experts.down_proj_bias": Role.OTHER,
            "layers.0.mlp.router.weight": Role.ROUTER,
            "layers.0.self_attn.sinks": Role.OTHER,
            "layers.0.self_attn.q_proj.weight": Role.MATRIX,
            "layers.0.self_attn.q_proj.bias": Role.OTHER,
            "embed_tokens.weight": Role.EMBEDDING,
            "lm_head.weight": Role.HEAD,
        },
    ),
    "qwen3_next": (
        {
            **SMALL,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        {
            "layers.0.mlp.gate.weight": Role.ROUTER,
            "layers.0.mlp.shared_expert_gate.weight": Role.ROUTER,
            "layers.0.mlp.shared_expert.gate_proj.weight": Role.MATRIX,
            "layers.0.mlp.experts.down_proj": Role.EXPERTS,
            "layers.0.linear_attn.conv1d.weight": Role.OTHER,
            "layers.0.linear_attn.A_log": Role.OTHER,
            "layers.0.linear_attn.dt_bias": Role.OTHER,
            "layers.1.self_attn.q_norm.weight": Role.OTHER,
        },
    ),
    "mamba": (
        MAMBA,
        {
            "layers.0.mixer.A_log": Role.OTHER,  # a matrix of 64 x 16
            "layers.0.mixer.D": Role.OTHER,
            "layers.0.mixer.conv1d.weight": Role.OTHER,
            "layers.0.mixer.in_proj.weight": Role.MATRIX,
            "layers.0.mixer.dt_proj.weight": Role.MATRIX,
            "layers.0.mixer.dt_proj.bias": Role.OTHER,
            "embeddings.weight": Role.EMBEDDING,
        },
    ),
    "recurrent_gemma": (
        {**SMALL, "lru_width": 32},
        {
            "layers.0.temporal_block.rg_lru.input_gate_weight": Role.OTHER,
            "layers.0.temporal_block.rg_lru.recurrent_gate_bias": Role.OTHER,
            "layers.0.temporal_block.conv_1d.weight": Role.OTHER,
            "layers.0.mlp_block.gate_proj.weight": Role.MATRIX,
        },
    ),
    "gpt2": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100},
        {"h.0.attn.c_attn.weight": Role.MATRIX, "h.0.attn.c_attn.bias": Role.OTHER, "wpe.weight": Role.EMBEDDING},
    ),
    "rwkv": (
        {**MAMBA, "attention_hidden_size": 32},
        {"blocks.0.attention.time_mix_key": Role.OTHER, "blocks.0.attention.key.weight": Role.MATRIX},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_roles_in_a_family_of_transformers(family: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config, expected = FAMILIES[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**config))
    roles = parameter_roles(model, repeated_blocks(model))
    assert roles.keys() == dict(model.named_parameters()).keys()
    for name, role in expected.items():
        assert next(r for full, r in roles.items() if full.endswith(name)) is role, name
    for name, role in roles.items():
        if re.search(r"bias|norm|ln_|A_log|\.D$", name):
            assert role is Role.OTHER, name


class StackedNorm(nn.Module):
    """One scale per head, as for normalizing queries and keys."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qk_norm = StackedNorm(4, 8)
        self.attention = nn.MultiheadAttention(32, 4)
        self.gate = nn.Linear(32, 6, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        self.expert_bias = nn.Parameter(torch.zeros(6, 32))
        self.mlp = nn.ModuleDict({"gate": nn.Linear(32, 64), "down": nn.Linear(64, 32)})
        self.w_out = nn.Parameter(torch.randn(32, 32))
        self.layer_scale = nn.Parameter(torch.ones(1, 32))
        self.memory = nn.Parameter(torch.zeros(5, 32))


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(OwnBlock() for _ in range(2))
        self.head = nn.Linear(32, 50)


def test_the_roles_in_a_custom_module() -> None:
    model = OwnModel()
    roles = parameter_roles(model, repeated_blocks(model))
    block = {name.removeprefix("blocks.1."): role for name, role in roles.items() if name.startswith("blocks.1.")}
    assert {name for name, role in block.items() if role is Role.MATRIX} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        *(f"experts.{number}.weight" for number in range(6)),
        "mlp.gate.weight",
        "mlp.down.weight",
        "w_out",
    }
    assert block["gate.weight"] is Role.ROUTER
    assert {block[name] for name in ("qk_norm.weight", "expert_bias", "layer_scale", "memory")} == {Role.OTHER}
    assert (roles["embedding.weight"], roles["head.weight"], roles["head.bias"]) == (
        Role.EMBEDDING,
        Role.HEAD,
        Role.OTHER,
    )


def test_factors_of_an_adapter_decay_and_its_magnitudes_do_not() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], use_dora=False))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    roles = {name: role for name, role in parameter_roles(model, repeated_blocks(model)).items() if name in trained}
    assert {role for name, role in roles.items() if "q_proj" in name} == {Role.MATRIX}
    assert {role for name, role in roles.items() if "embed_tokens" in name} == {Role.EMBEDDING}


def test_the_groups_are_described_with_their_counts() -> None:
    model = OwnModel()
    found = ParameterGroups.of(model, repeated_blocks(model), "muon")
    assert found.describe("muon", 0.1) == (
        "Optimizer muon: 22 matrices by Muon with weight decay 0.1 "
        f"({sum(p.numel() for p in found.orthogonalized):,} parameters); "
        "2 matrices and embeddings with weight decay 0.1 (3,200 parameters); 31 norms, biases and other parameters "
        f"without weight decay ({sum(p.numel() for p in found.not_decayed):,} parameters)."
    )


def test_muon_orthogonalizes_each_expert_separately() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 24, 64)
    together, alone = nn.Parameter(stack.clone()), [nn.Parameter(part.clone()) for part in stack]
    gradient = torch.randn(3, 24, 64)
    together.grad = gradient.clone()
    for parameter, part in zip(alone, gradient, strict=True):
        parameter.grad = part.clone()
    Muon([together], None, lr=0.02, weight_decay=0.1).step()
    Muon(alone, None, lr=0.02, weight_decay=0.1).step()
    assert torch.equal(together, torch.stack([parameter.detach() for parameter in alone]))
    assert torch.equal(orthogonalized(stack)[1], orthogonalized(stack[1]))
