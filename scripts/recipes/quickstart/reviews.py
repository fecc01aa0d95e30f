"""A seeded generator of short film reviews in natural English.

A review is a prompt that leaves the sentiment open and a response of two sentences. Each sentence judges one aspect of
the film with a grade of its own: -2 (awful), -1 (weak), +1 (good) or +2 (superb). The sentiment of the review is the
sum of both grades. Three properties make the data fit for a small run of the whole pipeline:

- The two grades are drawn independently, and +2 is drawn one time in five. So a model that imitates the reviews is
  fully positive in one response of 25, and a model that always is lies ln(25) = 3.2 nats away from it.
- The length of a sentence is drawn before its words, so length says nothing about sentiment.
- Who was there and which scene is meant does not depend on the grades, and every grade has many phrases, so a very
  positive review needs no narrow vocabulary. The phrases are in `phrases.py`.
"""

import random
import zlib
from dataclasses import dataclass

from scripts.recipes.quickstart.phrases import (
    ADJECTIVES,
    ADVERBS,
    AGREEING,
    ASPECTS,
    CONTRASTING,
    EFFECTS,
    GRADES,
    OPENERS,
    PROMPTS,
    REACTIONS,
    SLOTS,
    SPEAKER_FRAMES,
    STRONGER,
    SUBJECT_FRAMES,
    TAILS,
    TITLE_FIRST,
    TITLE_LAST,
    VERDICTS,
    Aspect,
)

GRADE_WEIGHTS = (2, 3, 3, 2)
SENTENCE_WORDS = (9, 10, 11, 12)
PROMPT_WORDS = range(8, 17)


@dataclass(frozen=True)
class Review:
    """A prompt that leaves the sentiment open, a response that settles it, and the grades of its two sentences."""

    prompt: str
    response: str
    grades: tuple[int, int]

    @property
    def sentiment(self) -> int:
        """Sum of the grades, from -4 to 4."""
        return sum(self.grades)

    @property
    def label(self) -> str:
        """`positive`, `negative`, or `mixed` where the grades cancel out."""
        return ("negative", "mixed", "positive")[(self.sentiment > 0) - (self.sentiment < 0) + 1]


@dataclass(frozen=True)
class _Core:
    """A judgement without what leads up to it or follows it.

    `phrases` are the words that carry the grade; `tails` the kinds of tail that may follow.
    """

    text: str
    phrases: frozenset[str]
    tails: tuple[str, ...]
    takes_opener: bool


def _fill(pattern: str, rng: random.Random, said: str = "") -> str:
    """Replaces the slots of `pattern` with words that differ from each other and do not occur in `said`."""
    taken = said.split()
    for slot, choices in SLOTS.items():
        if f"{{{slot}}}" in pattern:
            word = rng.choice(choices)
            while word in taken:
                word = rng.choice(choices)
            pattern = pattern.replace(f"{{{slot}}}", word)
            taken.append(word)
    return pattern


def _core(rng: random.Random, aspect: Aspect, grade: int) -> _Core:
    """A random judgement of `aspect`, starting in lower case."""
    index = rng.randrange(len(aspect.singular) + len(aspect.plural))
    plural = index >= len(aspect.singular)
    subject = (aspect.singular + aspect.plural)[index]
    grammar = {"s": subject, "was": "were" if plural else "was", "its": "their" if plural else "its"}
    kind = rng.random()
    if kind < 0.7:
        adjective, other = rng.sample(ADJECTIVES[grade] + aspect.adjectives[grade], 2)
        with_adverb = adjective in ADJECTIVES[grade] and rng.random() < 0.4
        phrase = f"{rng.choice(ADVERBS[grade])} {adjective}" if with_adverb else adjective
        by_subject = rng.random() < 0.6
        frame = _fill(rng.choice(SUBJECT_FRAMES if by_subject else SPEAKER_FRAMES), rng)
        text = frame.format(a=phrase, b=other, **grammar)
        return _Core(
            text, frozenset((adjective, other)), (aspect.details, "opinion" if by_subject else "company"), by_subject
        )
    if kind < 0.78:
        reaction = rng.choice(REACTIONS[grade])
        return _Core(f"I {reaction} {subject}", frozenset((reaction,)), (aspect.details, "company"), False)
    if kind < 0.9:
        effect = rng.choice(EFFECTS[grade])
        return _Core(f"{subject} {effect.format(**grammar)}", frozenset((effect,)), (aspect.details, "company"), False)
    verdict = rng.choice(VERDICTS[grade] + 5 * aspect.verdicts[grade])
    return _Core(f"{subject} {verdict.format(**grammar)}", frozenset((verdict,)), ("opinion", "company"), True)


def _sentence(rng: random.Random, aspect: Aspect, grade: int, lead: str, said: str, used: set[str]) -> str:
    """A sentence about `aspect`, of a length drawn before its words.

    Args:
        rng: source of all choices.
        aspect: what the sentence judges.
        grade: how it judges it.
        lead: connector that it starts with, or "".
        said: the sentence before it, or "".
        used: phrases and kinds of tail that must not come again; those of this sentence are added.
    """
    length = rng.choice(SENTENCE_WORDS)
    while True:
        core = _core(rng, aspect, grade)
        with_opener = not lead and core.takes_opener and rng.random() < 0.15
        start = " ".join(part for part in (rng.choice(OPENERS) if with_opener else lead, core.text) if part)
        missing = length - len(start.split())
        barred = used | {"opinion"} if with_opener else used
        tails = [tail for kind in core.tails if kind not in barred for tail in TAILS_BY_LENGTH[kind].get(missing, ())]
        if core.phrases & used or missing < 0 or (missing > 0 and not tails):
            continue
        used |= core.phrases
        if with_opener:
            used.add("opinion")
        if missing > 0:
            tail = rng.choice(tails)
            used |= {kind for kind in ("company", "opinion") if tail in TAILS[kind]}
            start += _fill(tail if tail.startswith(",") else f" {tail}", rng, f"{said} {start}")
        return start[0].upper() + start[1:] + "."


def _word_count(tail: str) -> int:
    return len(tail.strip(", ").split())


TAILS_BY_LENGTH = {
    kind: {
        length: tuple(tail for tail in tails if _word_count(tail) == length) for length in set(map(_word_count, tails))
    }
    for kind, tails in TAILS.items()
}


def _connector(rng: random.Random, first: int, second: int) -> str:
    """Words that lead from a sentence of grade `first` to one of grade `second`, or none."""
    sign = 1 if second > 0 else -1
    if (first > 0) != (second > 0):
        return rng.choice(CONTRASTING[sign]) if rng.random() < 0.5 else ""
    stronger = STRONGER[sign] if abs(second) > abs(first) else ()
    return rng.choice(AGREEING + stronger) if rng.random() < 0.25 else ""


def sample_prompt(rng: random.Random) -> str:
    """An opening of 8 to 16 words that names a film and leaves the sentiment open."""
    while True:
        pattern = rng.choice(PROMPTS)
        title = f"The {rng.choice(TITLE_FIRST)} {rng.choice(TITLE_LAST)}"
        prompt = _fill(pattern.replace("{When}", "{when}").replace("{title}", title), rng)
        if len(prompt.split()) in PROMPT_WORDS:
            return prompt[0].upper() + prompt[1:]


def sample_grades(rng: random.Random) -> tuple[int, int]:
    """Two independent grades."""
    first, second = rng.choices(GRADES, GRADE_WEIGHTS, k=2)
    return first, second


def sample_response(rng: random.Random, grades: tuple[int, int] | None = None) -> str:
    """Two sentences of 18 to 24 words in total that judge two different aspects.

    Args:
        rng: source of all choices.
        grades: the grades of the two sentences, each one of `GRADES`; drawn if None.

    Returns: the response, starting with the space that separates it from its prompt.
    """
    first, second = sample_grades(rng) if grades is None else grades
    aspects = rng.sample(tuple(ASPECTS.values()), 2)
    used: set[str] = set()
    opening = _sentence(rng, aspects[0], first, "", "", used)
    return f" {opening} {_sentence(rng, aspects[1], second, _connector(rng, first, second), opening, used)}"


# Which tenths of all prompts each set takes its prompts from.
DEMONSTRATION_PARTS = range(0, 5)
PREFERENCE_PARTS = range(5, 7)
PROMPT_PARTS = range(7, 10)


def _part(prompt: str) -> int:
    return zlib.crc32(prompt.encode()) % 10


def _prompt_of(parts: range, rng: random.Random) -> str:
    while True:
        prompt = sample_prompt(rng)
        if _part(prompt) in parts:
            return prompt


def demonstrations(n: int, seed: int) -> list[Review]:
    """`n` reviews of every sentiment, for supervised fine-tuning."""
    rng = random.Random(f"demonstrations {seed}")
    reviews = []
    for _ in range(n):
        grades = sample_grades(rng)
        reviews.append(Review(_prompt_of(DEMONSTRATION_PARTS, rng), sample_response(rng, grades), grades))
    return reviews


def preference_pairs(n: int, seed: int) -> list[tuple[Review, Review]]:
    """`n` pairs (chosen, rejected) of the same prompt; the sentiment of the chosen one is higher by 2 or more.

    One pair in three is drawn to prefer a positive review to a negative one, as many of the others do by chance. The
    others may be any two reviews, so that a reward model also learns to tell superb from good and weak from awful.
    """
    rng = random.Random(f"preference pairs {seed}")
    pairs: list[tuple[Review, Review]] = []
    while len(pairs) < n:
        opposite = len(pairs) % 3 == 0
        better, worse = sample_grades(rng), sample_grades(rng)
        while sum(better) < sum(worse) + 2 or (opposite and not sum(worse) < 0 < sum(better)):
            better, worse = sample_grades(rng), sample_grades(rng)
        prompt = _prompt_of(PREFERENCE_PARTS, rng)
        pairs.append(
            (Review(prompt, sample_response(rng, better), better), Review(prompt, sample_response(rng, worse), worse))
        )
    return pairs


def prompts(n: int, seed: int) -> list[str]:
    """`n` distinct prompts that no demonstration and no preference pair of any seed has."""
    rng = random.Random(f"prompts {seed}")
    found: dict[str, None] = {}
    while len(found) < n:
        found.setdefault(_prompt_of(PROMPT_PARTS, rng))
    return list(found)
