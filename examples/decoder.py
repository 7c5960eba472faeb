"""A Llama-like decoder on flashdecpp's ops: paged KV cache, compiled step, CUDA graph if there is a GPU."""

import torch

from flashdecpp import BlockPool, KVCache, ops

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, VOCAB, BLOCK, MAX_LEN = 2, 4, 2, 64, 1000, 16, 128
SHAPES = {"qkv": (512, 256), "o": (256, 256), "gate_up": (1024, 256), "down": (256, 512)}  # [N, K]


class Decoder:
    def __init__(self, dtype):
        self.weights = {name: torch.randn(LAYERS, n, k).to(dtype) / k**0.5 for name, (n, k) in SHAPES.items()}
        self.embed, self.lm_head = torch.randn(2, VOCAB, 256).to(dtype)
        self.norms = torch.rand(LAYERS, 2, 256).to(dtype)
        angles = torch.arange(MAX_LEN)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), 1)  # float32 [MAX_LEN, HEAD_DIM]

    def forward(self, tokens, cache, seq_lens, block_table, phi):  # 1 to 16 tokens each, counted in seq_lens
        stream, w = self.embed[tokens], self.weights
        for i, (attn_norm, ffn_norm) in enumerate(self.norms):
            qkv = ops.linear(stream, w["qkv"][i], norm_weight=attn_norm).view(*tokens.shape, -1, HEAD_DIM)
            q, k, v = qkv.split((Q_HEADS, KV_HEADS, KV_HEADS), 2)
            ops.rotary_append(q, k, v, *cache[i], seq_lens, block_table, cos_sin=self.cos_sin)
            out, _ = ops.decode_attention(q, *cache[i], seq_lens, block_table, carried_phi=phi[i])
            ops.linear(out.flatten(2), w["o"][i], residual=stream)
            h = ops.linear(stream, w["gate_up"][i], norm_weight=ffn_norm, gate="silu")
            ops.linear(h, w["down"][i], residual=stream)
        return ops.sample(ops.linear(stream[:, -1], self.lm_head))

    def step(self, tokens, cache, seq_lens, block_table, phi):
        seq_lens += 1
        tokens.copy_(self.forward(tokens, cache, seq_lens, block_table, phi)[:, None])


def generate(model, prompts, steps):
    batch, pool = len(prompts), BlockPool(64)  # the pool hands out block ids
    block_table = torch.tensor([pool.allocate(MAX_LEN // BLOCK) for _ in prompts], dtype=torch.int32)
    sizes = dict(layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, num_blocks=64, block_size=BLOCK)
    cache = KVCache(**sizes, dtype=model.embed.dtype, device=model.embed.device).layers
    phi = torch.full((LAYERS, batch, Q_HEADS), torch.nan)  # NaN: there is nothing to carry yet
    seq_lens, tokens = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, 1, dtype=torch.int64)
    for i, prompt in enumerate(prompts):  # prefill: the same forward pass, 16 tokens at a time
        for piece in torch.tensor([prompt]).split(16, dim=1):
            seq_lens[i] += piece.size(1)
            tokens[i] = model.forward(piece, cache, seq_lens[i, None], block_table[i, None], phi[:, i, None])
    answers, step = [tokens.clone()], torch.compile(model.step, fullgraph=True)
    for i in range(1, steps):
        if tokens.is_cuda and i == 2:  # compiled by now; this records a step without running it
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                step(tokens, cache, seq_lens, block_table, phi)
        graph.replay() if tokens.is_cuda and i > 1 else step(tokens, cache, seq_lens, block_table, phi)
        answers.append(tokens.clone())
    return torch.cat(answers, 1)


if __name__ == "__main__":
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        print(generate(Decoder(torch.bfloat16), [list(range(5)), list(range(100, 140))], steps=24).tolist())
