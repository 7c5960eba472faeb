"""Exports a loaded model to transformers with the same weights, to compare results and speed."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashdecpp.errors import ModelError

from .decoder import Decoder
from .weights import Matrix


def to_transformers(decoder: Decoder, dtype: torch.dtype) -> LlamaForCausalLM:
    """transformers' Llama with the weights of `decoder` in `dtype`. Weights already in it are shared."""
    config, weights = decoder.config, decoder.weights
    rope = config.ropes[0]
    plain = rope is not None and rope.kind == "default" and "factors" not in rope.scaling
    if rope is None or config.architecture.name != "LlamaForCausalLM" or not plain or config.qkv_bias:
        raise ModelError(f"only plain Llama models can be exported, not this {config.architecture.name}")
    with torch.device("meta"):  # no memory for weights that are replaced below
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab,
                hidden_size=config.hidden,
                intermediate_size=config.ffn,
                num_hidden_layers=config.layers,
                num_attention_heads=config.q_heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=rope.max_positions,
                rms_norm_eps=config.norm_eps,
                rope_theta=rope.theta,
                tie_word_embeddings=weights.lm_head is weights.embed,
                eos_token_id=list(config.eos_ids),
            )
        )

    def dense(weight: Matrix) -> torch.Tensor:
        return weight if isinstance(weight, torch.Tensor) else weight.dense(dtype)

    state = {"model.embed_tokens.weight": dense(weights.embed), "lm_head.weight": dense(weights.lm_head)}
    if weights.norm is not None:
        state["model.norm.weight"] = weights.norm
    for index, layer in enumerate(weights.layers):
        q, k, v = dense(layer.qkv).split(config.qkv_rows)
        gate, up = dense(layer.gate_up).chunk(2)
        tensors = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": dense(layer.o),
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": dense(layer.down),
            "input_layernorm": layer.attn_norm,
            "post_attention_layernorm": layer.ffn_norm,
        }
        state |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in tensors.items()}
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    if weights.lm_head is weights.embed:
        model.tie_weights()
    # The rope's frequencies are not weights and are still on the meta device: compute them again in float32.
    with torch.device(decoder.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()
