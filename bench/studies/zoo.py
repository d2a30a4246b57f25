"""Every model file of the installed mlx-lm, tiny and random: what can be attached, and is it right?"""

import contextlib
import importlib
import pkgutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map_with_path

LAYERS, HIDDEN, FFN, EXPERT, VOCAB = 4, 32, 128, 32, 96
SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)

# By the names that model files give their settings. What a file does not know it does not get.
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    vocab_size_per_layer_input=VOCAB,
    hidden_size=HIDDEN,
    hidden_dim=HIDDEN,
    d_model=HIDDEN,
    n_embd=HIDDEN,
    intermediate_size=FFN,
    ffn_hidden_size=FFN,
    intermediate_size_mlp=FFN,
    n_inner=FFN,
    num_hidden_layers=LAYERS,
    num_layers=LAYERS,
    n_layers=LAYERS,
    n_layer=LAYERS,
    num_attention_heads=4,
    num_heads=4,
    n_heads=4,
    n_head=4,
    num_key_value_heads=2,
    num_kv_heads=2,
    n_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    norm_eps=1e-5,
    layer_norm_eps=1e-5,
    layernorm_epsilon=1e-5,
    layer_norm_epsilon=1e-5,
    post_norm_eps=1e-5,
    max_position_embeddings=512,
    model_max_length=512,
    n_positions=512,
    n_ctx=512,
    block_size=512,
    rope_theta=1e4,
    partial_rotary_factor=0.5,
    sliding_window=24,
    sliding_window_size=24,
    sliding_window_pattern=2,
    attention_window_size=24,
    query_pre_attn_scalar=8,
    attention_bias=False,
    mlp_bias=False,
    use_bias=False,
    tie_word_embeddings=True,
    use_qk_norm=False,
    # routed experts
    moe_intermediate_size=EXPERT,
    expert_ffn_hidden_size=EXPERT,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    moe_topk=2,
    moe_k=2,
    moe_top_k=2,
    n_shared_experts=1,
    num_shared_experts=1,
    num_shared_expert=1,
    shared_expert_intermediate_size=EXPERT,
    shared_intermediate_size=FFN,
    moe_shared_expert_intermediate_size=EXPERT,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    mlp_only_layers=[],
    decoder_sparse_step=1,
    # latent attention
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_head_dim=16,
    index_n_heads=2,
    index_topk=64,
    # linear attention and states
    layer_group_size=2,
    group_norm_size=1,
    full_attention_interval=2,
    conv_kernel=4,
    conv_L_cache=3,
    conv_bias=False,
    use_conv_bias=False,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
    mamba_n_heads=4,
    mamba_num_heads=4,
    mamba_d_head=8,
    mamba_head_dim=8,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_n_groups=1,
    mamba_d_ssm=32,
    mamba_expand=2,
    mamba_proj_bias=False,
    mamba_conv_bias=False,
    ssm_state_size=8,
    state_size=8,
    n_groups=1,
    # scales
    logits_scaling=1.0,
    attention_multiplier=0.35,
    embedding_multiplier=1.0,
    residual_multiplier=1.0,
    dim_model_base=HIDDEN,
    scale_depth=1.4,
    scale_emb=1.0,
    mla_scale_q_lora=False,
    mla_scale_kv_lora=False,
)

YARN = dict(
    type="yarn",
    factor=40,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=4096,
)
LLAMA_4 = dict(
    rope_theta=1e4,
    type="yarn",
    factor=4.0,
    llama_4_scaling_beta=0.1,
    original_max_position_embeddings=64,
)
MORE: dict[str, dict[str, Any]] = {
    "recurrent_gemma": dict(
        conv1d_width=4, logits_soft_cap=30.0, block_types=["recurrent", "attention"]
    ),
    "qwen3_5": dict(num_experts=0),
    "qwen": dict(kv_channels=8),
    "plamo": dict(n_shared_head=2),
    "phixtral": dict(num_vocab=VOCAB, model_dim=HIDDEN, rotary_dim=8),
    "nemotron-nas": dict(
        block_configs=[
            dict(attention=dict(n_heads_in_group=2), ffn=dict(ffn_mult=4.0)),
            dict(attention=dict(no_op=True), ffn=dict(ffn_mult=2.0)),
            dict(attention=dict(n_heads_in_group=2), ffn=dict(no_op=True)),
            dict(attention=dict(n_heads_in_group=2), ffn=dict(ffn_mult=4.0)),
        ]
    ),
    "muse_spark": dict(
        rope_parameters={"rope_theta": 1e4},
        layer_rope_theta=[1e4] * LAYERS,
        layer_types=SLIDING,
        final_logit_softcapping=30.0,
        output_multiplier=1.0,
        moe_hidden_size=HIDDEN,
        num_shared_experts=0,
    ),
    "mistral4": dict(rope_parameters=LLAMA_4),
    "ministral3": dict(rope_parameters=LLAMA_4),
    "minimax_m3_vl": dict(
        moe_layer_freq=[0, 1, 1, 1],
        dense_intermediate_size=FFN,
        shared_intermediate_size=EXPERT,
        intermediate_size=EXPERT,
    ),
    "minicpm3": dict(rope_scaling=dict(YARN, short_factor=1.0, long_factor=1.0)),
    "spark2_5": dict(rope_parameters=dict.fromkeys(SLIDING, {"rope_theta": 1e4})),
    "mellum": dict(
        layer_types=SLIDING, rope_parameters=dict.fromkeys(SLIDING, {"rope_theta": 1e4})
    ),
    "llama4": dict(
        num_experts_per_tok=1,
        attention_chunk_size=24,
        interleave_moe_layer_step=2,
        rope_scaling=None,
    ),
    "lille-130m": dict(n_embd=128),
    "kimi_k3": dict(
        linear_attn_config=dict(
            num_heads=4, head_dim=8, kda_layers=[1, 3], short_conv_kernel_size=4
        )
    ),
    "hunyuan": dict(
        rope_scaling=dict(type="dynamic", factor=1.0, alpha=1000.0),
        use_mixed_mlp_moe=True,
        use_cla=True,
        cla_share_factor=2,
    ),
    "gptj": dict(rotary_dim=8),
    "glm_moe_dsa": dict(
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        rope_parameters={"rope_theta": 1e4},
    ),
    "glm4_moe": dict(rope_scaling=None),
    "gemma4_text": dict(
        num_kv_shared_layers=1,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        layer_types=SLIDING,
        num_experts=None,
    ),
    "gemma3n": dict(
        num_kv_shared_layers=1,
        rope_local_base_freq=1e4,
        final_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        altup_active_idx=0,
        laurel_rank=8,
    ),
    "exaone4": dict(rope_scaling=None, sliding_window_pattern="LG"),
    "deepseek_v2": dict(rope_scaling=YARN),
    "baichuan_m1": dict(
        sliding_window_layers=[0, 2], conv_window=2, tie_word_embeddings=False
    ),
    "step3p5": dict(num_attention_groups=2, share_expert_dim=EXPERT),
    "afm7": dict(num_kv_reuse_layers=1),
    "afmoe": dict(layer_types=SLIDING, num_dense_layers=1),
    "apertus": dict(post_norm=False, qk_norm=True),
    "dbrx": dict(
        ffn_config=dict(ffn_hidden_size=EXPERT, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
    ),
    "ernie4_5_moe": dict(moe_num_shared_experts=1, moe_layer_start_index=1),
    "exaone_moe": dict(layer_types=SLIDING, is_moe_layer=[False, True, True, True]),
    "gear": dict(layer_types=SLIDING),
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.5),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "jamba": dict(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
    ),
    "kimi_linear": dict(
        linear_attn_config=dict(num_heads=4, head_dim=8, kda_layers=[1, 3])
    ),
    "lfm2": dict(
        block_dim=HIDDEN,
        block_multiple_of=32,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        full_attn_idxs=[1, 3],
    ),
    "lfm2_moe": dict(use_expert_bias=True, num_dense_layers=2, full_attn_idxs=[1, 3]),
    "llama4_text": dict(no_rope_layers=[1, 1, 1, 0]),
    "longcat_flash": dict(
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        attention_method="MLA",
        zero_expert_type="identity",
        zero_expert_num=1,
    ),
    "longcat_flash_ngram": dict(
        mla_scale_q_lora=True, mla_scale_kv_lora=True, zero_expert_num=1
    ),
    "mamba": dict(time_step_rank=2),
    "mamba2": dict(time_step_limit=(0.01, 10), time_step_rank="auto"),
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[0, 1, 0, 1],
        moe_layer_freq=[0, 1, 1, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        swa_rope_theta=1e4,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        swa_v_head_dim=8,
    ),
    "minimax": dict(rotary_dim=8),
    "nemotron": dict(hidden_act="relu2"),
    "nemotron_h": dict(hybrid_override_pattern="M-*-", num_hidden_layers=4),
    "olmo_hybrid": dict(linear_allow_neg_eigval=True),
    "openelm": dict(
        num_transformer_layers=LAYERS,
        model_dim=HIDDEN,
        ffn_dim_divisor=32,
        num_query_heads=[4] * LAYERS,
        num_kv_heads=[2] * LAYERS,
        ffn_multipliers=[4.0] * LAYERS,
    ),
    "phi3small": dict(
        dense_attention_every_n_layers=2, ff_intermediate_size=FFN, gegelu_limit=20.0
    ),
    "rwkv7": dict(
        a_low_rank_dim=8, v_low_rank_dim=8, gate_low_rank_dim=8, decay_low_rank_dim=8
    ),
    "stablelm": dict(use_qkv_bias=False),
}
# Wrappers of a text model, whose settings are in text_config: the file of that.
TEXT: dict[str, str] = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}


# Files that serve models of more than one kind: settings of the others.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text, experts": (
        "gemma4_text",
        dict(
            num_kv_shared_layers=0,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            use_double_wide_mlp=False,
        ),
    ),
    "granitemoehybrid, dense": (
        "granitemoehybrid",
        dict(num_local_experts=0, num_experts_per_tok=0),
    ),
    "jamba, dense": ("jamba", dict(num_experts=1)),
}
# What cannot be built from random numbers, or not everywhere.
UNBUILT = {
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "is for packed weights of one kind",
}
# What can be built, but not run everywhere: two need Metal, one takes only whole blocks of 64.
NOT_RUN = ["bitnet", "muse_spark", "phi3small"]


def tiny(name: str, seed: int = 0, **more: Any) -> nn.Module:
    """A small random model of one file (or of one of KINDS), float32; ``more`` overrides sizes.

    The weights are large enough for FFNs to matter.
    """
    name, kind = KINDS.get(name, (name, {}))
    module = _module(name)
    text = TEXT.get(name, name)
    inner = {**SIZES, "model_type": text, **MORE.get(text, {}), **kind, **more}
    args = {**inner, "model_type": name, "text_config": inner}
    model: nn.Module = module.Model(module.ModelArgs.from_dict(args))
    key = mx.random.key(seed)

    def fill(path: str, w: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        if "A_log" in path or w.ndim < 2 or not mx.issubdtype(w.dtype, mx.floating):
            return w
        return mx.random.normal(w.shape, key=now) / w.shape[-1] ** 0.5

    model.update(tree_map_with_path(fill, model.parameters()))
    model.set_dtype(mx.float32)
    model.eval()
    mx.eval(model.parameters())
    return model


def names() -> list[str]:
    """Model files, as modules of mlx_lm.models."""
    found = sorted(m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [n for n in found if hasattr(_module(n), "Model")]


def _module(name: str) -> Any:
    try:  # olmo ends the process without its package, and prints why
        with contextlib.redirect_stdout(None):
            return importlib.import_module(f"mlx_lm.models.{name}")
    except (Exception, SystemExit):
        return None
