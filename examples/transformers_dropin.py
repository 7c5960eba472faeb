"""transformers' own generate, with attention, linear layers and norms from flashdecpp.

python examples/transformers_dropin.py [MODEL]    # default: a small random Llama, so nothing is downloaded
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flashdecpp
from flashdecpp.integrations.transformers import attention_calls, layer_fallbacks, restore

SIZES = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=512)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)


def random_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, initializer_range=0.2)).eval()


def main(*name):
    model = AutoModelForCausalLM.from_pretrained(*name) if name else random_llama()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    prompt = torch.arange(3, 40, device=device)[None]
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, pad_token_id=0)

    before = model.generate(prompt, **options)
    flashdecpp.accelerate(model)
    after = model.generate(prompt, **options)
    print("tokens", after[0, prompt.size(1) :].tolist())
    print("the same as transformers alone:", torch.equal(before, after))
    print("attention calls:", dict(attention_calls(model)))
    print("layers that ran as before:", dict(layer_fallbacks(model)))
    return before, after, restore(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
