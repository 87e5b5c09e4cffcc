"""Tiny random models of many families, made from transformers' own classes in fractions of a second.

One line for each family in :data:`FAMILIES`. Windows and chunks are a few tokens wide, so that sequences of a dozen
tokens reach over their edges; weights are drawn wide, so that an error in a mask, a position or a cache shows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from tests.tiny import EOS, WORDS, make_tokenizer
from textrl_env.lm.causal_lm import CausalLM

#: Tokens that a windowed layer sees.
WINDOW = 5
_SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "initializer_range": 0.35,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [3.0, 5.0],
    "original_max_position_embeddings": 32,
}
_LLAMA_4 = _EXPERTS | {
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "attention_chunk_size": WINDOW,
    "intermediate_size_mlp": 24,
}


class Family(NamedTuple):
    """How to make one: names of classes of transformers, and what the configuration differs in."""

    config: str
    model: str
    settings: Mapping[str, Any] = MappingProxyType({})


FAMILIES = {
    # -- every layer sees everything ---------------------------------------------------------------------------
    "Llama": Family("LlamaConfig", "LlamaForCausalLM"),
    "Llama, long RoPE": Family("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": _LONG_ROPE}),
    "Qwen2": Family("Qwen2Config", "Qwen2ForCausalLM"),
    "Qwen3": Family("Qwen3Config", "Qwen3ForCausalLM"),
    "SmolLM3": Family("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "Granite": Family("GraniteConfig", "GraniteForCausalLM", {"residual_multiplier": 0.9}),
    "Gemma": Family("GemmaConfig", "GemmaForCausalLM"),
    "Phi": Family("PhiConfig", "PhiForCausalLM"),
    "Phi-3": Family("Phi3Config", "Phi3ForCausalLM", {"sliding_window": None}),
    "OLMo": Family("OlmoConfig", "OlmoForCausalLM"),
    "OLMo 2": Family("Olmo2Config", "Olmo2ForCausalLM"),
    "Cohere": Family("CohereConfig", "CohereForCausalLM"),
    "StableLM": Family("StableLmConfig", "StableLmForCausalLM"),
    "Nemotron": Family("NemotronConfig", "NemotronForCausalLM"),
    "GLM": Family("GlmConfig", "GlmForCausalLM"),
    "ERNIE 4.5": Family("Ernie4_5Config", "Ernie4_5ForCausalLM"),
    "GPT-2": Family("GPT2Config", "GPT2LMHeadModel"),
    "GPT-BigCode": Family("GPTBigCodeConfig", "GPTBigCodeForCausalLM"),
    "GPT-J": Family("GPTJConfig", "GPTJForCausalLM", {"rotary_dim": 4}),
    "CodeGen": Family("CodeGenConfig", "CodeGenForCausalLM", {"rotary_dim": 4}),
    "GPT-NeoX": Family("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "OPT": Family("OPTConfig", "OPTForCausalLM", {"word_embed_proj_dim": 16, "ffn_dim": 24}),
    "XGLM": Family(
        "XGLMConfig", "XGLMForCausalLM", {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4}
    ),
    "BioGPT": Family("BioGptConfig", "BioGptForCausalLM"),
    "DiffLlama": Family("DiffLlamaConfig", "DiffLlamaForCausalLM"),
    # -- experts -----------------------------------------------------------------------------------------------
    "Mixtral": Family("MixtralConfig", "MixtralForCausalLM", _EXPERTS),
    "Qwen3-MoE": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _EXPERTS),
    "OLMoE": Family("OlmoeConfig", "OlmoeForCausalLM", _EXPERTS),
    "DeepSeek-V3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _MLA
        | {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
    ),
    # -- windows -----------------------------------------------------------------------------------------------
    "Mistral": Family("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW}),
    "Starcoder2": Family("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": WINDOW}),
    "Ministral": Family("MinistralConfig", "MinistralForCausalLM", _MIXED),
    "Qwen2, windows": Family("Qwen2Config", "Qwen2ForCausalLM", _MIXED | {"use_sliding_window": True}),
    "Gemma 2": Family("Gemma2Config", "Gemma2ForCausalLM", _MIXED),
    "Gemma 3": Family("Gemma3TextConfig", "Gemma3ForCausalLM", _MIXED),
    "Gemma 3n": Family(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        _MIXED
        | {
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": len(WORDS),
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [24, 24],
        },
    ),
    "Gemma 4": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _MIXED
        | {"vocab_size_per_layer_input": len(WORDS), "hidden_size_per_layer_input": 4, "global_head_dim": 8},
    ),
    "GPT-OSS": Family("GptOssConfig", "GptOssForCausalLM", _MIXED | _EXPERTS),
    "OLMo 3": Family("Olmo3Config", "Olmo3ForCausalLM", _MIXED),
    "Cohere 2": Family("Cohere2Config", "Cohere2ForCausalLM", _MIXED),
    "EXAONE 4": Family("Exaone4Config", "Exaone4ForCausalLM", _MIXED),
    "Llama 4": Family("Llama4TextConfig", "Llama4ForCausalLM", _LLAMA_4),
    "Llama 4, early temperature": Family(
        "Llama4TextConfig", "Llama4ForCausalLM", _LLAMA_4 | {"floor_scale": 4}
    ),
    "GPT-Neo": Family(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
    ),
    # -- positions as a bias on the scores ---------------------------------------------------------------------
    "BLOOM": Family("BloomConfig", "BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "Falcon": Family(
        "FalconConfig",
        "FalconForCausalLM",
        {"head_dim": ..., "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "Falcon, ALiBi": Family(
        "FalconConfig",
        "FalconForCausalLM",
        {"head_dim": ..., "alibi": True, "new_decoder_architecture": False},
    ),
    "MPT": Family(
        "MptConfig",
        "MptForCausalLM",
        {"d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    # -- recurrent states --------------------------------------------------------------------------------------
    "RWKV": Family("RwkvConfig", "RwkvForCausalLM", {"context_length": 64, "attention_hidden_size": 16}),
    "Mamba": Family("MambaConfig", "MambaForCausalLM", {"state_size": 4, "time_step_rank": 2}),
    "Mamba-2": Family(
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4, "expand": 2},
    ),
    "Falcon-Mamba": Family(
        "FalconMambaConfig", "FalconMambaForCausalLM", {"state_size": 4, "time_step_rank": 2}
    ),
    "RecurrentGemma": Family(
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {
            "attention_window_size": WINDOW,
            "lru_width": 16,
            "block_types": ["recurrent", "attention"],
            "w_init_variance_scale": 1.0,
        },
    ),
    "xLSTM": Family(
        "xLSTMConfig",
        "xLSTMForCausalLM",
        {
            "num_heads": 4,
            "num_blocks": 2,
            "embedding_dim": 16,
            "chunk_size": 4,
            "chunkwise_kernel": "chunkwise--native_autograd",
            "sequence_kernel": "native_sequence__native",
            "step_kernel": "native",
        },
    ),
    # -- states and attention ----------------------------------------------------------------------------------
    "Jamba": Family(
        "JambaConfig",
        "JambaForCausalLM",
        {
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
    ),
    "Bamba": Family(
        "BambaConfig",
        "BambaForCausalLM",
        {
            "attn_layer_indices": [1],
            "mamba_d_state": 4,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        },
    ),
    "Falcon-H1": Family(
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {
            "mamba_d_state": 4,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_ssm": 32,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        },
    ),
    "Zamba2": Family(
        "Zamba2Config",
        "Zamba2ForCausalLM",
        {
            "mamba_d_state": 4,
            "n_mamba_heads": 4,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "use_mem_eff_path": False,
            "attention_head_dim": 8,
            "kv_channels": 4,
            "attention_hidden_size": 32,
            "adapter_rank": 4,
        },
    ),
    "LFM2": Family(
        "Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    ),
    "Qwen3-Next": Family(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        _EXPERTS
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "MiniMax": Family(
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        _EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    ),
    "Granite 4 hybrid": Family(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["mamba", "attention"],
            "mamba_d_state": 4,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
            "num_local_experts": 0,
            "shared_intermediate_size": 24,
        },
    ),
    "Nemotron-H": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "attention"],
            "ssm_state_size": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
    ),
}


@functools.cache
def random_model(name: str) -> PreTrainedModel:
    """The model of a family, the same at every call."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {
            name: value for name, value in (_SIZES | dict(family.settings)).items() if value is not ...
        }
        config = getattr(transformers, family.config)(**settings)
        model = getattr(transformers, family.model)(config).eval()
        for parameter in model.parameters():
            # Norms and biases start at one and zero, where errors would not show.
            parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    model.generation_config.eos_token_id = EOS
    return model


def family_lm(name: str) -> CausalLM:
    """A :class:`CausalLM` around :func:`random_model`."""
    return CausalLM(random_model(name), make_tokenizer())
