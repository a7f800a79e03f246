"""Seeded generator of documents that state made-up facts, and of questions about them.

A document is plain English: fact sentences ("Mira keeps the copper key in the old mill.") between
filler sentences.  The right answer to a question is the fact sentence itself, so recall is measured by
exact match.  Every word of a fact is drawn at random, so an answer can only come from the context.

The two splits are disjoint by construction: a fact sentence belongs to the split that its CRC says
(one in eight to ``test``), and a document of a split is built from sentences of that split only.  No
fact of a test document therefore ever occurs in training.

>>> ex = example(seed=1, target_tokens=256, kind="chat", questions=3)
>>> ex.messages[-1]["role"], ex.answer in ex.document
('user', True)
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

SPLITS = ("train", "test")
KINDS = ("completion", "chat")

NAMES = tuple(
    """Mira Tom Anna Ravi Lena Omar Ines Paul Sara Hugo Nina Ivan Clara Yusuf Greta Leon Alice Bob Carol
    David Emma Frank Grace Henry Iris Jonas Kira Liam Maria Noah Olga Peter Quinn Rosa Simon Tara Vera
    Walter Yara Zoe Amir Bruno Dana Elias Fiona Hana Jack Karl Lucy Max Nora Oscar Pia Rita Sam Tina
    Viktor Wendy Adam Eva John Mary Kim Ben""".split()
)
ADJECTIVES = tuple(
    """copper red blue green silver golden wooden black white yellow broken heavy tiny round rusty shiny
    painted striped brass iron glass leather paper plastic purple orange pink grey warm cold old new small
    large long short soft hard dry wet secret ancient spare""".split()
)
OBJECTS = tuple(
    """key lamp book box coin ring map clock knife cup bottle hat coat drum flute letter basket mirror rope
    candle hammer brush ladder kettle bell vase chair table bag ball boat bowl bucket camera card chain
    comb crown diary doll fan flag fork glove guitar helmet jar kite lens mask needle pen pencil phone
    photo pillow plate radio ruler scarf shoe spoon stamp sword tent ticket toy umbrella violin wallet
    watch wheel whistle compass""".split()
)
PLACE_WORDS = tuple(
    """old new north south east west upper lower quiet dark sunny empty stone little great hidden windy
    dusty narrow main royal busy distant muddy""".split()
)
PLACES = tuple(
    """mill tower barn cellar garden kitchen library market harbor church school station garage attic
    office shed chapel castle bakery museum theater bridge forest valley cave farm inn park stable
    workshop hospital hotel house village hall port square tunnel meadow orchard""".split()
)
PEOPLE_WORDS = tuple(
    """tall young kind tired clever polite famous cheerful nervous honest proud brave silent careful
    lazy angry""".split()
)
PEOPLE = tuple(
    """pilot baker doctor farmer teacher sailor painter singer judge nurse tailor miner driver cook
    dancer gardener hunter lawyer plumber poet soldier student waiter writer guard clerk fisher
    monk""".split()
)
ANIMALS = tuple(
    """falcon tiger rabbit otter wolf bear fox owl horse goat swan whale eagle lizard turtle spider
    salmon raven badger beaver camel donkey frog goose hamster lion mouse panda pigeon seal""".split()
)
LOCKED = tuple("""safe vault gate door chest locker cabinet archive computer drawer""".split())

_SYLLABLES = tuple(c + v for c in "b d f g k l m n p r s t v z br dr kr st tr sh th".split() for v in "aeiou")
_CODAS = ("", "", "n", "r", "l", "s", "k", "m", "x")

_SLOTS: dict[str, tuple[str, ...]] = {
    "name": NAMES,
    "adj": ADJECTIVES,
    "obj": OBJECTS,
    "padj": PLACE_WORDS,
    "place": PLACES,
    "jadj": PEOPLE_WORDS,
    "job": PEOPLE,
    "animal": ANIMALS,
    "lock": LOCKED,
}


@dataclass(frozen=True)
class Family:
    """One kind of fact: its sentence, the questions it answers, and the slots that identify it."""

    name: str
    sentence: str
    questions: tuple[str, ...]
    key: tuple[str, ...]


FAMILIES = (
    Family(
        "keep",
        "{name} keeps the {adj} {obj} in the {padj} {place}.",
        ("Where does {name} keep the {adj} {obj}?",),
        ("obj",),
    ),
    Family(
        "live",
        "{name} lives in the {padj} {place}.",
        ("Where does {name} live?",),
        ("name",),
    ),
    Family(
        "meet",
        "{name} met the {jadj} {job} at the {padj} {place}.",
        ("Where did {name} meet the {jadj} {job}?",),
        ("job",),
    ),
    Family(
        "buy",
        "{name} bought the {adj} {obj} from the {jadj} {job}.",
        ("From whom did {name} buy the {adj} {obj}?", "Who sold the {adj} {obj} to {name}?"),
        ("obj",),
    ),
    Family(
        "give",
        "{name} gave the {adj} {obj} to {name2}.",
        ("To whom did {name} give the {adj} {obj}?", "Who got the {adj} {obj} from {name}?"),
        ("obj",),
    ),
    Family(
        "password",
        "The password of the {adj} {lock} is {adj2} {animal}.",
        ("What is the password of the {adj} {lock}?",),
        ("lock",),
    ),
    Family(
        "animal",
        "The favorite animal of {name} is the {adj} {animal}.",
        ("What is the favorite animal of {name}?",),
        ("name",),
    ),
)

_FILLERS = (
    "The {weather} was {feel} that {time}.",
    "It was a {feel} {time} and {nobody} was in a hurry.",
    "{name} laughed and said nothing.",
    "{name} and {name2} talked about the {weather} for a while.",
    "Later that {time} {name} went for a walk.",
    "{nobody2} remembers why the {job} was so {jadj}.",
    "The {place} was {feel} and full of {things}.",
    "Some people say that the {animal} is never {feel}.",
    "There were {number} {things} on the table.",
    "After {number} hours the {weather} stopped.",
    "{name} had been thinking about {things} all {time}.",
    "Nothing happened for {number} days.",
    "The {job} wanted more {things}, but there were none.",
    "In the {time} the {weather} came back.",
    "{name} asked for {things} and waited.",
    "A {jadj} {job} walked past and looked at the {weather}.",
    "By then it was almost {time}.",
    "{name} often thinks of {things} and of the {weather}.",
    "This is not important, but the {place} has {number} windows.",
    '"What a {feel} {time}," said {name}.',
)
_FILLER_SLOTS: dict[str, tuple[str, ...]] = {
    **_SLOTS,
    "weather": ("rain", "wind", "snow", "fog", "storm", "sun", "music", "noise", "river", "news"),
    "feel": ("cold", "warm", "quiet", "strange", "long", "bright", "slow", "calm", "loud", "gentle"),
    "time": ("morning", "evening", "night", "day", "summer", "winter", "week", "afternoon"),
    "nobody": ("nobody", "everybody", "no one"),
    "nobody2": ("Nobody", "Everybody", "No one"),
    "things": ("apples", "stories", "birds", "flowers", "books", "questions", "stones", "songs", "bread", "tea"),
    "number": ("two", "three", "four", "five", "six", "seven", "ten", "twelve", "many", "1", "7", "25", "300"),
}
_ALL_WORDS = tuple(dict.fromkeys(w for words in _FILLER_SLOTS.values() for w in words))


def all_words() -> list[str]:
    """Every single word that documents, questions and chats are made of, sorted."""
    questions = [q for f in FAMILIES for q in f.questions]
    texts = [*_ALL_WORDS, *_FILLERS, *questions, *(f.sentence for f in FAMILIES), *SYSTEM_MESSAGES]
    texts += ["Question: Answer: Q: A: system user assistant"]
    return sorted({w for text in texts for w in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", " ", text))})


SYSTEM_MESSAGES = (
    "Answer from the text.",
    "You are a helpful assistant.",
    "You are a careful reader. Answer with the sentence from the text.",
)


_KNOWN_WORDS = frozenset(word.lower() for word in all_words())


@dataclass(frozen=True)
class Fact:
    """A fact sentence with the questions it answers; the answer to each is the sentence."""

    family: str
    sentence: str
    questions: tuple[str, ...]
    key: tuple[str, ...]


@dataclass(frozen=True)
class QA:
    """A question and its one right answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A held-out (or training) task: a document, questions about it, and the prompt for the last one.

    ``prompt`` is set for completions, ``messages`` for chats; in both the earlier questions stand
    answered before the last one.  ``qas`` holds all questions in order, ``question`` and ``answer``
    the last.
    """

    kind: str
    document: str
    qas: tuple[QA, ...]
    prompt: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def question(self) -> str:
        """The question that the prompt ends with."""
        return self.qas[-1].question

    @property
    def answer(self) -> str:
        """The right answer to it: a sentence of the document."""
        return self.qas[-1].answer


def count_tokens(text: str) -> int:
    """Estimate the demo tokenizer's count: one per known word, mark and line break, more for other words."""
    pieces = re.findall(r"[A-Za-z]+|[^\sA-Za-z]|\n+", text)
    return sum(1 if p.lower() in _KNOWN_WORDS or len(p) == 1 else (len(p) + 1) // 2 for p in pieces)


def split_of(sentence: str) -> str:
    """Which split may use this fact sentence."""
    return "test" if zlib.crc32(sentence.encode()) % 8 == 0 else "train"


def coined_word(rng: random.Random, capital: bool = False) -> str:
    """A made-up word such as "drimok": it teaches the model to copy words it has never seen."""
    word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 3))) + rng.choice(_CODAS)
    return word.capitalize() if capital else word


class DocumentWriter:
    """Writes the sentences of one document and remembers what it has stated, so no fact is ambiguous."""

    def __init__(self, rng: random.Random, split: str, coined: float = 0.0, noise: float = 0.05) -> None:
        """``coined``: chance that a slot holds a made-up word; ``noise``: share of random-word fillers."""
        self.families: tuple[Family, ...] = FAMILIES
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}")
        self._rng, self._split, self._coined, self._noise = rng, split, coined, noise
        self._keys: set[tuple[str, ...]] = set()

    def _word(self, slot: str) -> str:
        slot = slot.rstrip("2")
        if self._coined and self._rng.random() < self._coined:
            return coined_word(self._rng, capital=slot == "name")
        return self._rng.choice(_SLOTS[slot])

    def fact(self) -> Fact | None:
        """A new fact of this split whose key (the thing asked about) is not in the document yet.

        None when the words run out, which takes a document of some 200 facts.
        """
        for _ in range(500):
            family = self._rng.choice(self.families)
            words = {slot: self._word(slot) for slot in _SLOTS_OF[family.name]}
            key = (_KEY_GROUP[family.name], *(words[slot] for slot in family.key))
            sentence = family.sentence.format(**words)
            if key in self._keys or split_of(sentence) != self._split:
                continue
            self._keys.add(key)
            return Fact(family.name, sentence, tuple(q.format(**words) for q in family.questions), key)
        return None

    def filler(self) -> str:
        """A sentence that states no fact: ordinary, or a string of random words."""
        if self._rng.random() < self._noise:
            words = [self._rng.choice(_ALL_WORDS) for _ in range(self._rng.randint(3, 14))]
            if self._rng.random() < 0.5:
                words = [coined_word(self._rng) if self._rng.random() < 0.5 else w for w in words]
            return " ".join(words).capitalize() + "."
        template = self._rng.choice(_FILLERS)
        slots = re.findall(r"{(\w+)}", template)
        return template.format(**{s: self._rng.choice(_FILLER_SLOTS[_filler_slot(s)]) for s in slots})


def _filler_slot(slot: str) -> str:
    return slot if slot in _FILLER_SLOTS else slot.rstrip("2")


_SLOTS_OF = {f.name: re.findall(r"{(\w+)}", f.sentence) for f in FAMILIES}
# An object is named by one fact only, whatever the family; a name lives in one place only.
_KEY_GROUP = {f.name: "object" if f.key == ("obj",) else f.name for f in FAMILIES}


def write_passage(
    rng: random.Random, writer: DocumentWriter, target_tokens: int, fact_share: float
) -> tuple[str, list[Fact]]:
    """Sentences of about ``target_tokens`` tokens in all, with at least one fact; text and its facts."""
    facts: list[Fact] = []
    parts: list[str] = []
    used = 0
    paragraph = rng.choice((0.0, 0.1, 0.3, 1.0))
    while True:
        fact = writer.fact() if rng.random() < fact_share or not facts else None
        sentence = fact.sentence if fact else writer.filler()
        ending = "\n" if rng.random() < paragraph else " "
        used += count_tokens(sentence + ending)
        if facts and used > target_tokens:
            return "".join(parts).rstrip(), facts
        if fact:
            facts.append(fact)
        parts.append(sentence + ending)


def ask(rng: random.Random, fact: Fact) -> QA:
    """One of the questions that the fact answers."""
    return QA(rng.choice(fact.questions), fact.sentence)


def completion_prompt(document: str, qas: list[QA] | tuple[QA, ...]) -> str:
    """Document, answered questions, and the last question open, for ``/v1/completions``.

    The text ends with "Answer:"; the model goes on with a space and the fact sentence, then its end token.
    """
    lines = [document, ""]
    for qa in qas[:-1]:
        lines += [f"Question: {qa.question}", f"Answer: {qa.answer}"]
    lines += [f"Question: {qas[-1].question}", "Answer:"]
    return "\n".join(lines)


def chat_messages(
    document: str, qas: list[QA] | tuple[QA, ...], system: str | None = None, separator: str = " "
) -> list[dict[str, str]]:
    """Messages for ``/v1/chat/completions``: the document opens the first user turn, the last is open."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for number, qa in enumerate(qas):
        content = document + separator + qa.question if number == 0 else qa.question
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": qa.answer})
    return messages[:-1]


def example(
    seed: int,
    target_tokens: int,
    kind: str = "completion",
    questions: int = 1,
    split: str = "test",
    within: float = 1.0,
) -> Example:
    """The task of this seed: about ``target_tokens`` prompt tokens in all, ``questions`` questions.

    The facts asked about are drawn from the first ``within`` of the document's facts: 1.0 for anywhere,
    less for facts from far back.  The same arguments always give the same task.  ``kind`` is
    "completion" or "chat"; a chat with several questions is a conversation of as many turns.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}")
    rng = random.Random(f"{split}/{kind}/{seed}/{target_tokens}/{questions}")
    writer = DocumentWriter(rng, split)
    system = rng.choice((None, *SYSTEM_MESSAGES))
    overhead = 31 * questions + 6 + (count_tokens(system) + 3 if system and kind == "chat" else 0)
    room = max(16, target_tokens - overhead)
    while True:
        document, facts = write_passage(rng, writer, room, fact_share=0.6)
        if len(facts) >= questions:
            break
        room += 12
    pool = facts[: max(questions, round(len(facts) * within))]
    qas = tuple(ask(rng, fact) for fact in rng.sample(pool, questions))
    if kind == "completion":
        return Example(kind, document, qas, prompt=completion_prompt(document, qas))
    separator = rng.choice((" ", "\n", "\n\n"))
    return Example(kind, document, qas, messages=chat_messages(document, qas, system, separator))


def examples(
    count: int, target_tokens: int, kind: str = "completion", questions: int = 1, first_seed: int = 0
) -> Iterator[Example]:
    """``count`` held-out tasks of consecutive seeds."""
    for seed in range(first_seed, first_seed + count):
        yield example(seed, target_tokens, kind, questions)


# --- training sequences -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A piece of a training sequence; ``answer`` pieces are what the loss is about."""

    text: str
    answer: bool = False


IM_START, IM_END = "<|im_start|>", "<|im_end|>"
_COMPLETION_STYLES = (
    ("Question: ", "\nAnswer:"),
    ("Question: ", "\nAnswer:"),
    ("Q: ", "\nA:"),
    ("", ""),
)


def training_segments(
    rng: random.Random, target_tokens: int, coined: float = 0.0, noise: float = 0.05
) -> list[Segment]:
    """One training sequence of about ``target_tokens`` tokens, dense with questions.

    Some read a document and answer questions to the end; some are given it in several parts with
    questions after each.  No fact is asked about twice: a second answer would be copied from the first.
    """
    chat = rng.random() < 0.5
    writer = DocumentWriter(rng, "train", coined=coined if rng.random() < 0.5 else 0.0, noise=noise)
    share = rng.choice((0.3, 0.5, 0.7, 1.0))
    parts = rng.choice((1, 1, 2, 3)) if target_tokens >= 96 else 1
    doc_share = rng.choice((0.4, 0.5, 0.6, 0.85))
    build = _chat_segments if chat else _completion_segments
    return build(rng, writer, target_tokens, parts, doc_share, share)


def recital(rng: random.Random, target_tokens: int) -> tuple[str, list[str]]:
    """Facts and nothing else, and the same facts in another order; at times facts of one or two families.

    Sentences that differ only in the name or the thing are what recall has to tell apart, and here
    every few tokens are such a choice.
    """
    writer = DocumentWriter(rng, "train")
    writer.families = tuple(rng.sample(FAMILIES, rng.choice((1, 1, 2, 3, len(FAMILIES)))))
    sentences: list[str] = []
    room = target_tokens // 2
    while fact := writer.fact():
        room -= count_tokens(fact.sentence)
        if room < 0:
            break
        sentences.append(fact.sentence)
    return " ".join(sentences), rng.sample(sentences, len(sentences))


def _rounds(
    rng: random.Random, writer: DocumentWriter, target: int, parts: int, doc_share: float, share: float
) -> Iterator[tuple[str, list[QA]]]:
    """Passages with the questions to ask after each; facts of earlier passages stay open."""
    open_facts: list[Fact] = []
    for _ in range(parts):
        text, facts = write_passage(rng, writer, int(target * doc_share / parts), share)
        open_facts += facts
        rng.shuffle(open_facts)
        room = target * (1 - doc_share) / parts
        asked: list[QA] = []
        while open_facts and (room > 0 or not asked):
            qa = ask(rng, open_facts.pop())
            asked.append(qa)
            room -= count_tokens(qa.question + qa.answer) + 6
        yield text, asked


def _completion_segments(
    rng: random.Random, writer: DocumentWriter, target: int, parts: int, doc_share: float, share: float
) -> list[Segment]:
    before, after = rng.choice(_COMPLETION_STYLES)
    ending = rng.choice((IM_END, ""))
    segments: list[Segment] = []
    for text, qas in _rounds(rng, writer, target, parts, doc_share, share):
        gap = rng.choice(("\n", "\n\n")) if before else rng.choice((" ", "\n", "\n\n"))
        segments.append(Segment(text + gap))
        for qa in qas:
            segments.append(Segment(before + qa.question + after))
            segments.append(Segment(" " + qa.answer, answer=True))
            segments.append(Segment(ending + "\n"))
    return segments


def _chat_segments(
    rng: random.Random, writer: DocumentWriter, target: int, parts: int, doc_share: float, share: float
) -> list[Segment]:
    segments: list[Segment] = []
    system = rng.choice((None, *SYSTEM_MESSAGES))
    if system:
        segments.append(Segment(f"{IM_START}system\n{system}{IM_END}\n"))
    label = rng.choice(("", "", "", "Question: "))
    for text, qas in _rounds(rng, writer, target, parts, doc_share, share):
        gap = rng.choice((" ", "\n", "\n\n"))
        for number, qa in enumerate(qas):
            content = (text + gap if number == 0 else "") + label + qa.question
            segments.append(Segment(f"{IM_START}user\n{content}{IM_END}\n{IM_START}assistant\n"))
            segments.append(Segment(qa.answer, answer=True))
            segments.append(Segment(IM_END + "\n"))
    return segments
