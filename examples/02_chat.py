"""Ask questions offline, through the model's chat template. Run: python examples/02_chat.py [QUESTION]..."""

import sys

from tenfold import LLM, SamplingParams

QUESTIONS = ["What does os.path.join do?", "What does functools.lru_cache do?", "What does shutil.copytree do?"]


def main() -> None:
    """Ask each question in a conversation of its own, all at once."""
    questions = sys.argv[1:] or QUESTIONS
    llm = LLM(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64)  # fewer programs to compile
    conversations = [[{"role": "user", "content": question}] for question in questions]
    answers = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=128))
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}\n  {answer.outputs[0].text}")


if __name__ == "__main__":
    main()
