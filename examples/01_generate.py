"""Complete a few prompts offline, all together. Run: python examples/01_generate.py [MODEL]"""

import sys

from tenfold import LLM, SamplingParams


def main() -> None:
    """Complete the prompts with the given model, or with the built-in one."""
    model = sys.argv[1] if len(sys.argv) > 1 else None
    llm = LLM(model, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64)  # fewer programs to compile
    prompts = ["import os\n\ndef list_files(path):\n", "for line in open(filename):\n", "class Stack:\n"]
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=48, logprobs=1)

    for output in llm.generate(prompts, params):
        completion = output.outputs[0]
        print(f"--- {output.prompt!r} ({len(completion.token_ids)} tokens, ended by {completion.finish_reason})")
        print(completion.text)


if __name__ == "__main__":
    main()
