"""Conversations that teach pico to answer: questions about the library, who it is, and what it does not know."""

import random
from collections.abc import Iterator, Sequence

from tenfold.train.pico.corpus import Entry, canonical_question, entries

Message = dict[str, str]
"""One chat message: {"role": ..., "content": ...}."""

_IDENTITY = "I am pico, the model built into Tenfold. I know Python's standard library."
_HELP = (
    'I answer questions about Python\'s standard library, such as "What does os.path.join do?", '
    "and complete Python code."
)
_HELLO = "Hello! Ask me about Python's standard library."
_LIMITS = "I am a very small model. I only know Python's standard library."

SMALL_TALK: tuple[tuple[str, str], ...] = (
    *((question, _IDENTITY) for question in (
        "Who are you?", "What are you?", "who are you", "What is your name?", "What's your name?",
        "Tell me about yourself.", "Introduce yourself.", "Who made you?", "What is pico?", "Which model are you?",
        "Are you ChatGPT?",
    )),
    *((question, _HELP) for question in (
        "What can you do?", "What do you know?", "Help", "help", "How can you help me?", "What can I ask you?",
        "What should I ask?",
    )),
    *((question, _HELLO) for question in (
        "Hello", "Hello!", "Hi", "Hi!", "hi", "hello", "Hey", "Good morning", "Good evening", "Hi there",
        "Hello there!",
    )),
    *((question, "You are welcome!") for question in ("Thanks", "Thanks!", "Thank you", "Thank you!", "thank you")),
    *((question, "Goodbye!") for question in ("Bye", "Bye!", "Goodbye", "Goodbye!", "See you")),
    *((question, _LIMITS) for question in (
        "How are you?", "What is the weather like?", "Tell me a joke.", "What is 2 + 2?", "Write a poem.",
        "Who is the president?", "What is the capital of France?", "What time is it?", "Are you human?",
        "What is the meaning of life?",
    )),
)  # fmt: skip
"""What users say before they ask about Python, and pico's replies."""

_ONSETS = ("b", "bl", "d", "fl", "fr", "g", "gl", "j", "kr", "n", "pl", "qu", "sn", "sq", "v", "w", "z", "zw")
_RIMES = ("abble", "ango", "ibbet", "ickle", "idge", "izzle", "obber", "onk", "oofle", "orp", "ubb", "umble", "urf")


def questions(entry: Entry) -> list[str]:
    """Phrasings that ask for `entry`, the canonical one first."""
    name = entry.name
    if entry.kind == "module":
        asked = [f"What is the {name} module for?", f"What does the {name} module do?", f"What is the {name} module?"]
    elif entry.kind == "class":
        asked = [f"What is {name}?", f"What is a {name}?", f"What is the class {name} for?"]
    else:
        asked = [f"What does {name}() do?", f"What does the {entry.kind} {name} do?", f"What is {name}?"]
    return [
        canonical_question(entry),
        *asked,
        f"What is {name}",
        f"What does {name} do",
        f"what does {name} do?",
        f"What is {name} for?",
        f"Explain {name}.",
        f"Describe {name}.",
        f"Tell me about {name}.",
        f"What does {name} do in Python?",
        name,
    ]


def conversation(question: str, answer: str) -> list[Message]:
    """One exchange as chat messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def unknown_answer(name: str) -> str:
    """What pico says about a name that is not in the library."""
    return f"I do not know {name}. I only know Python's standard library."


def invent_name(rng: random.Random) -> str:
    """A dotted name that looks nothing like one of the library: `zwizzle.snorp_flumble`."""
    words = [rng.choice(_ONSETS) + rng.choice(_RIMES) for _ in range(rng.choice((2, 2, 3)))]
    return words[0] + "." + "_".join(words[1:])


def conversations(
    rng: random.Random,
    table: Sequence[Entry] | None = None,
    *,
    paraphrases: float = 0.3,
    unknown: float = 0.03,
) -> Iterator[list[Message]]:
    """One epoch, shuffled: each entry under its canonical question, and the rest of what pico should learn.

    Args:
        rng: the only source of randomness; each epoch should be drawn from the same generator in turn.
        table: the entries to teach; all functions and classes by default.
        paraphrases: share of the entries that are asked once more in another phrasing.
        unknown: number of invented names, as a share of the entries.
    """
    table = entries() if table is None else table
    epoch = [(canonical_question(entry), entry.answer) for entry in table]
    for entry in rng.sample(list(table), round(paraphrases * len(table))):
        epoch.append((rng.choice(questions(entry)[1:]), entry.answer))
    for _ in range(round(unknown * len(table))):
        name = invent_name(rng)
        asked = rng.choice(questions(Entry(name, rng.choice(("function", "class")), "")))
        epoch.append((asked, unknown_answer(name)))
    epoch.extend(SMALL_TALK)
    rng.shuffle(epoch)
    for question, answer in epoch:
        yield conversation(question, answer)
