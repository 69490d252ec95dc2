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
# Rows of these are stored pairwise interleaved in GGUF llama files and are put back into halves.
GGUF_ROTARY = ("attn_q.weight", "attn_k.weight")
