"""Text from a model: a batch of prompts, then a streamed chat.

python examples/generate.py [MODEL]    # a Hugging Face folder or repository, or a GGUF file; default: "demo"
"""

import sys

from flashdecpp import LLM, SamplingParams


def main(model="demo"):
    llm = LLM(model)

    prompts = ["The capital of France is", "Water boils at", "A haiku about rain:"]
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    for answer in answers:
        print(f"{answer.prompt!r} -> {answer.text!r} ({answer.finish_reason})")

    question = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
    for piece in llm.chat(question, SamplingParams(temperature=0.7, seed=1, max_tokens=48), stream=True):
        print(piece.text, end="", flush=True)
    print()

    stats = llm.stats
    print(
        f"{stats.generated_tokens} tokens, {stats.tokens_per_second:.0f} tokens/s, {stats.softmax}: "
        f"{stats.softmax_fallbacks} of {stats.softmax_rows} softmax rows were outside phi's window"
    )
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
