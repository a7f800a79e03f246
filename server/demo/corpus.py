"""Seeded generator of documents that state made-up facts, and of questions about them.

A document is plain English: fact sentences ("Mira keeps coins in Lisbon.") between filler sentences.  The
right answer to a question is the fact sentence itself, so recall is measured by exact match.  Every
word of a fact is drawn at random, so an answer can only come from the context.

Inside a document a name states one fact only, and of any two words in a row in a fact one occurs in no
other fact: what a model must find again is at most two words back.  A corpus in which three or more
words stood between key and value was not learned by a model of this size (see the README).

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
    Viktor Wendy Adam Eva John Mary Kim Ben
    Abel Agnes Albert Alma Andre Angela Anton Arno Arthur Astrid Basil Beata Benny Bianca Bjorn Boris Bridget Cara
    Carl Cecil Celia Chloe Cora Cyril Daisy Daniel Daphne Delia Denis Diego Dora Edgar Edith Edwin Elena Elisa Emil
    Erik Esther Ethan Fabio Felix Flora Floyd Gavin George Gerda Gilda Gordon Gwen Hans Harry Hector Helen Helga Hilda
    Howard Igor Irene Isaac Ivy Jakob Jane Janet Jasper Joan Joel Julia Kai Karen Kevin Klara Lars Laura Leah Lewis
    Lily Linus Lorna Louis Lydia Mabel Marco Martha Milo Miriam Moira Moses Nadia Neil Nils Noel Norma Oliver Ophelia
    Otto Owen Pablo Paula Pedro Percy Petra Philip Quentin Rachel Ralph Rhea Robin Roger Ruth Samuel Sonja Stella Sven
    Sylvia Tamar Theo Thora Tobias Ulla Umar Ursula Vadim Vincent Viola Wanda Wilma Xenia Yann Yvonne Zelda""".split()
)
ADJECTIVES = tuple(
    """copper red blue green silver golden wooden black white yellow broken heavy tiny round rusty shiny
    painted striped brass iron glass leather paper plastic purple orange pink grey warm cold old new small
    large long short soft hard dry wet secret ancient spare cheap rare""".split()
)
OBJECTS = tuple(
    """keys lamps books boxes coins rings maps clocks knives cups bottles hats coats drums flutes letters baskets
    mirrors ropes candles hammers brushes ladders kettles bells vases chairs tables bags balls boats bowls buckets
    cameras cards chains combs crowns dolls fans flags forks gloves guitars helmets jars kites lenses masks
    needles pens pencils phones photos pillows plates radios rulers scarves shoes spoons stamps swords tents
    tickets toys umbrellas violins wallets watches wheels whistles compasses""".split()
)
CITIES = tuple(
    """Lisbon Oslo Paris Rome Vienna Berlin Madrid Dublin Athens Prague Warsaw London Cairo Tokyo Delhi Lima Quito
    Boston Denver Dallas Miami Seattle Chicago Toronto Havana Sydney Perth Hanoi Seoul Osaka Kyoto Manila Dakar
    Accra Nairobi Tunis Geneva Zurich Munich Hamburg Naples Milan Venice Turin Lyon Nice Porto Seville Bergen
    Malmo Riga Minsk Kiev Odessa Sofia Ankara""".split()
)
LANGUAGES = tuple(
    """Danish French German Greek Italian Polish Spanish Swedish Turkish Arabic Hindi Chinese Korean Dutch Finnish
    Russian Latin Welsh Irish Czech""".split()
)
SUBJECTS = tuple(
    """history physics chemistry music biology algebra geometry logic law medicine poetry grammar drawing dancing
    cooking singing farming sailing fishing painting""".split()
)
GAMES = tuple("chess tennis golf football poker hockey darts dominoes bridge cricket rugby squash".split())
FOODS = tuple(
    """apples bread cheese honey soup rice pasta salad cake plums pears grapes cherries onions carrots beans nuts
    olives butter eggs""".split()
)
ANIMALS = tuple(
    """falcons tigers rabbits otters wolves bears foxes owls horses goats swans whales eagles lizards turtles spiders
    salmon ravens badgers beavers camels donkeys frogs geese hamsters lions mice pandas pigeons seals""".split()
)

_SYLLABLES = tuple(c + v for c in "b d f g k l m n p r s t v z br dr kr st tr sh th".split() for v in "aeiou")
_CODAS = ("", "", "n", "r", "l", "s", "k", "m", "x")

_SLOTS: dict[str, tuple[str, ...]] = {
    "name": NAMES,
    "adj": ADJECTIVES,
    "objs": OBJECTS,
    "city": CITIES,
    "language": LANGUAGES,
    "subject": SUBJECTS,
    "game": GAMES,
    "food": FOODS,
    "animals": ANIMALS,
}


@dataclass(frozen=True)
class Family:
    """One kind of fact: its sentence, the questions it answers, and the slots that identify it."""

    name: str
    sentence: str
    questions: tuple[str, ...]
    key: tuple[str, ...]


FAMILIES = (
    Family("keep", "{name} keeps {objs} in {city}.", ("Where does {name} keep {objs}?",), ("name", "objs")),
    Family("sell", "{name} sells {objs} in {city}.", ("Where does {name} sell {objs}?",), ("name", "objs")),
    Family(
        "lose", "{name} lost {adj} {objs} in {city}.", ("Where did {name} lose {adj} {objs}?",), ("name", "adj", "objs")
    ),
    Family("collect", "{name} collects {objs}.", ("What does {name} collect?",), ("name",)),
    Family("like", "{name} likes {animals}.", ("Which animals does {name} like?", "What does {name} like?"), ("name",)),
    Family("fear", "{name} fears {animals}.", ("Which animals does {name} fear?", "What does {name} fear?"), ("name",)),
    Family("visit", "{name} visited {city}.", ("Which city did {name} visit?", "What did {name} visit?"), ("name",)),
    Family("speak", "{name} speaks {language}.", ("Which language does {name} speak?",), ("name",)),
    Family(
        "teach", "{name} teaches {subject} in {city}.", ("Where does {name} teach {subject}?",), ("name", "subject")
    ),
    Family("study", "{name} studies {subject}.", ("What does {name} study?",), ("name",)),
    Family("play", "{name} plays {game}.", ("Which game does {name} play?", "What does {name} play?"), ("name",)),
    Family("eat", "{name} eats {food}.", ("What does {name} eat?",), ("name",)),
    Family("meet", "{name} met {name2} in {city}.", ("Where did {name} meet {name2}?",), ("name", "name2")),
    Family("marry", "{name} married {name2}.", ("Whom did {name} marry?",), ("name", "name2")),
)

_FILLERS = (
    "The {weather} was {feel} that {time}.",
    "It was a {feel} {time} and {nobody} was in a hurry.",
    "Somebody laughed and said nothing.",
    "{nobody2} talked about the {weather} for a while.",
    "Later that {time} {nobody} went for a walk.",
    "{nobody2} remembers why the {weather} was so {feel}.",
    "The {time} was {feel} and full of {things}.",
    "Some people say that the {weather} is never {feel}.",
    "There were {number} {things} on the floor.",
    "After {number} hours the {weather} stopped.",
    "{nobody2} had been thinking about {things} all {time}.",
    "Nothing happened for {number} days.",
    "{nobody2} wanted more {things}, but there were none.",
    "In the {time} the {weather} came back.",
    "{nobody2} asked for {things} and waited.",
    "By then it was almost {time}.",
    "People often think of {things} and of the {weather}.",
    "This is not important, but there are {number} windows.",
    '"What a {feel} {time}," said somebody.',
)
_FILLER_SLOTS: dict[str, tuple[str, ...]] = {
    **_SLOTS,
    "weather": ("rain", "wind", "snow", "fog", "storm", "sun", "music", "noise", "river", "news"),
    "feel": ("cold", "warm", "quiet", "strange", "long", "bright", "slow", "calm", "loud", "gentle"),
    "time": ("morning", "evening", "night", "day", "summer", "winter", "week", "afternoon"),
    "nobody": ("nobody", "everybody", "no one"),
    "nobody2": ("Nobody", "Everybody", "No one"),
    "things": ("stories", "birds", "flowers", "questions", "stones", "songs", "clouds", "leaves", "tea", "dreams"),
    "number": ("two", "three", "four", "five", "six", "seven", "ten", "twelve", "many", "1", "7", "25", "300"),
}
_ALL_WORDS = tuple(dict.fromkeys(w for words in _FILLER_SLOTS.values() for w in words))


_NOISE_WORDS = tuple(w for s in ("weather", "feel", "time", "things", "number") for w in _FILLER_SLOTS[s])


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


MAX_FACTS = 100
"""Facts in one document: more would use up the names, and then the search for a free one."""
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
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}")
        self._rng, self._split, self._coined, self._noise = rng, split, coined, noise
        self._keys: set[str] = set()
        self._stated = 0

    def _word(self, slot: str) -> str:
        slot = slot.rstrip("2")
        if self._coined and self._rng.random() < self._coined:
            return coined_word(self._rng, capital=slot == "name")
        return self._rng.choice(_SLOTS[slot])

    def fact(self) -> Fact | None:
        """A new fact of this split whose key (the thing asked about) is not in the document yet.

        None when the document has MAX_FACTS of them, or the words run out.
        """
        if self._stated == MAX_FACTS:
            return None
        for _ in range(500):
            family = self._rng.choice(FAMILIES)
            words = {slot: self._word(slot) for slot in _SLOTS_OF[family.name]}
            key = tuple(words[slot] for slot in family.key)
            sentence = family.sentence.format(**words)
            if self._keys.intersection(key) or split_of(sentence) != self._split:
                continue
            self._keys.update(key)
            self._stated += 1
            return Fact(family.name, sentence, tuple(q.format(**words) for q in family.questions), key)
        return None

    def filler(self) -> str:
        """A sentence that states no fact: ordinary, or a string of random words."""
        if self._rng.random() < self._noise:
            words = [self._rng.choice(_NOISE_WORDS) for _ in range(self._rng.randint(3, 14))]
            if self._rng.random() < 0.5:
                words = [coined_word(self._rng) if self._rng.random() < 0.5 else w for w in words]
            return " ".join(words).capitalize() + "."
        template = self._rng.choice(_FILLERS)
        slots = re.findall(r"{(\w+)}", template)
        return template.format(**{s: self._rng.choice(_FILLER_SLOTS[_filler_slot(s)]) for s in slots})


def _filler_slot(slot: str) -> str:
    return slot if slot in _FILLER_SLOTS else slot.rstrip("2")


_SLOTS_OF = {f.name: re.findall(r"{(\w+)}", f.sentence) for f in FAMILIES}


def write_passage(
    rng: random.Random, writer: DocumentWriter, target_tokens: int, fact_share: float
) -> tuple[str, list[Fact]]:
    """Sentences of about ``target_tokens`` tokens in all, with a fact if the writer has one left; text and facts."""
    facts: list[Fact] = []
    parts: list[str] = []
    used = 0
    paragraph = rng.choice((0.0, 0.1, 0.3, 1.0))
    while True:
        fact = writer.fact() if rng.random() < fact_share or not facts else None
        sentence = fact.sentence if fact else writer.filler()
        used += count_tokens(sentence)
        if used > target_tokens and (facts or not fact):
            return "".join(parts).rstrip(), facts
        if fact:
            facts.append(fact)
        parts.append(sentence + ("\n" if rng.random() < paragraph else " "))


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
