"""Weight names of the outside world, as tables."""

# GGUF name -> ours, per decoder layer; projections listed together are fused in this order.
GGUF_LAYER: dict[str, tuple[str, ...]] = {
    "input_norm": ("attn_norm.weight",),
    "qkv_proj": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "o_proj": ("attn_output.weight",),
    "post_attention_norm": ("ffn_norm.weight",),
    "gate_up_proj": ("ffn_gate.weight", "ffn_up.weight"),
    "down_proj": ("ffn_down.weight",),
}
GGUF_EMBEDDING = "token_embd.weight"
GGUF_FINAL_NORM = "output_norm.weight"
GGUF_HEAD = "output.weight"  # where it is not the embedding
GGUF_ROPE_DIVISORS = "rope_freqs.weight"  # where positions are scaled
PACKED = ".packed"  # what the name of a matrix ends in where its packed form lies beside it
# Rows of these are stored pairwise interleaved in GGUF llama files and are put back into halves.
GGUF_ROTARY = ("attn_q.weight", "attn_k.weight")

# Hugging Face name -> ours; what is listed together is fused in this order. Within `model.layers.N.`:
HF_ATTENTION: dict[str, tuple[str, ...]] = {
    "input_norm": ("input_layernorm.weight",),
    "qkv_proj": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "o_proj": ("self_attn.o_proj.weight",),
}
HF_QKV_BIAS: dict[str, tuple[str, ...]] = {
    "qkv_proj.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
}
HF_O_BIAS: dict[str, tuple[str, ...]] = {"o_proj.bias": ("self_attn.o_proj.bias",)}
HF_QK_NORM: dict[str, tuple[str, ...]] = {
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
}
HF_FFN: dict[str, tuple[str, ...]] = {
    "post_attention_norm": ("post_attention_layernorm.weight",),
    "gate_up_proj": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down_proj": ("mlp.down_proj.weight",),
}
HF_FFN_BIAS: dict[str, tuple[str, ...]] = {
    "gate_up_proj.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "down_proj.bias": ("mlp.down_proj.bias",),
}
# A routed FFN's, behind the family's own prefix except for the norm; the experts' are in the table of families.
HF_ROUTED_NORM = ("norm", "post_attention_layernorm.weight")
HF_ROUTER = ("anchors", "gate.weight")
HF_SHARED: dict[str, str] = {
    "shared_gate_proj": "shared_expert.gate_proj.weight",
    "shared_up_proj": "shared_expert.up_proj.weight",
    "shared_down_proj": "shared_expert.down_proj.weight",
    "shared_gate": "shared_expert_gate.weight",
}
HF_EMBEDDING = "model.embed_tokens.weight"
HF_FINAL_NORM = "model.norm.weight"
HF_HEAD = "lm_head.weight"
HF_IGNORED = (".rotary_emb.inv_freq",)  # how names end that older files carry and nobody needs
