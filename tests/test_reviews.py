"""Claims about the generated film reviews."""

import itertools
import random
import statistics
from collections import Counter

import pytest

from scripts.recipes.quickstart import reviews
from scripts.recipes.quickstart.reviews import ASPECTS, GRADES, demonstrations, preference_pairs, prompts


@pytest.fixture(scope="module")
def sample() -> list[reviews.Review]:
    return demonstrations(20_000, seed=1)


def subjects(response: str) -> list[str]:
    """The names of the aspects that the words of a response mention."""
    found = []
    for sentence in response.lower().split(". "):
        matches = [
            (sentence.index(subject), -len(subject), name)
            for name, aspect in ASPECTS.items()
            for subject in aspect.singular + aspect.plural
            if subject in sentence
        ]
        found.append(min(matches)[2])
    return found


def distinct_2(texts: list[str]) -> float:
    bigrams = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(bigrams)) / len(bigrams)


def test_the_same_seed_gives_the_same_reviews() -> None:
    assert demonstrations(50, seed=3) == demonstrations(50, seed=3)
    assert preference_pairs(50, seed=3) == preference_pairs(50, seed=3)
    assert prompts(50, seed=3) == prompts(50, seed=3)
    assert demonstrations(50, seed=3) != demonstrations(50, seed=4)


def test_there_are_several_hundred_thousand_distinct_responses() -> None:
    rng = random.Random(0)
    assert len({reviews.sample_response(rng) for _ in range(300_000)}) > 290_000


def test_lengths_stay_within_their_bounds(sample: list[reviews.Review]) -> None:
    for review in sample:
        assert 8 <= len(review.prompt.split()) <= 16
        assert 16 <= len(review.response.split()) <= 30
        assert review.response.count(".") == 2


def test_prompt_and_response_concatenate_to_clean_text(sample: list[reviews.Review]) -> None:
    for review in sample:
        text = review.prompt + review.response
        assert not set("{};|") & set(text), text
        assert "  " not in text and " ," not in text and " ." not in text, text
        assert review.prompt[-1] in ".:" and review.response[:1] == " " and review.response[1].isupper(), text


def test_verbs_and_articles_agree(sample: list[reviews.Review]) -> None:
    singular = {subject for aspect in ASPECTS.values() for subject in aspect.singular}
    plural = {subject for aspect in ASPECTS.values() for subject in aspect.plural}
    for review in sample:
        text = (review.prompt + review.response).lower()
        for article_fault in (" a a", " a e", " a i", " a o", " an b", " an c", " an s", " an t", "the the "):
            assert article_fault not in text, text
        assert not any(f" {subject} were " in text for subject in singular), text
        assert not any(f" {subject} was " in text for subject in plural), text


def test_the_two_sentences_judge_different_aspects_in_different_words(sample: list[reviews.Review]) -> None:
    for review in sample[:5000]:
        first, second = subjects(review.response)
        assert first != second, review.response


def test_grades_are_independent_and_plus_two_is_rare(sample: list[reviews.Review]) -> None:
    counts = Counter(review.grades for review in sample)
    share = dict(zip(GRADES, (0.2, 0.3, 0.3, 0.2), strict=True))
    for first, second in itertools.product(GRADES, repeat=2):
        assert counts[first, second] / len(sample) == pytest.approx(share[first] * share[second], abs=0.01)


def test_length_says_nothing_about_sentiment(sample: list[reviews.Review]) -> None:
    words = [len(review.response.split()) for review in sample]
    letters = [len(review.response) for review in sample]
    sentiments = [review.sentiment for review in sample]
    assert abs(statistics.correlation(words, sentiments)) < 0.03
    assert abs(statistics.correlation(letters, sentiments)) < 0.1


@pytest.mark.parametrize("size", [64, 256])
def test_very_positive_reviews_need_no_narrow_vocabulary(size: int) -> None:
    rng = random.Random(size)
    draws = range(20)
    unrestricted = statistics.mean(distinct_2([reviews.sample_response(rng) for _ in range(size)]) for _ in draws)
    positive = statistics.mean(distinct_2([reviews.sample_response(rng, (2, 2)) for _ in range(size)]) for _ in draws)
    assert positive >= 0.9 * unrestricted


def test_label_is_the_sign_of_the_sum() -> None:
    expected = {(2, 2): (4, "positive"), (-1, 2): (1, "positive"), (-2, 2): (0, "mixed"), (1, -2): (-1, "negative")}
    for grades, (sentiment, label) in expected.items():
        review = reviews.Review("", "", grades)
        assert (review.sentiment, review.label) == (sentiment, label)


def test_every_grade_has_many_phrases_of_its_own() -> None:
    for pool in (reviews.ADJECTIVES, reviews.REACTIONS, reviews.EFFECTS, reviews.VERDICTS):
        assert all(len(pool[grade]) >= 23 for grade in GRADES)
        for one, other in itertools.combinations(GRADES, 2):
            assert not set(pool[one]) & set(pool[other])
    for name, aspect in ASPECTS.items():
        for grade in GRADES:
            assert not set(reviews.ADJECTIVES[grade]) & set(aspect.adjectives[grade]), name
            assert len(aspect.verdicts[grade]) == 5, name


def test_chosen_is_more_positive_and_mostly_positive_over_negative() -> None:
    pairs = preference_pairs(5000, seed=1)
    assert all(chosen.prompt == rejected.prompt for chosen, rejected in pairs)
    assert all(chosen.sentiment >= rejected.sentiment + 2 for chosen, rejected in pairs)
    opposite = sum(chosen.label == "positive" and rejected.label == "negative" for chosen, rejected in pairs)
    assert opposite / len(pairs) > 0.55


def test_no_prompt_is_in_two_sets_whatever_their_seeds(sample: list[reviews.Review]) -> None:
    demonstrated = {review.prompt for review in sample}
    compared = {chosen.prompt for chosen, _ in preference_pairs(5000, seed=2)}
    asked = prompts(5000, seed=3)
    assert len(set(asked)) == len(asked) == 5000
    assert not demonstrated & compared
    assert not demonstrated & set(asked)
    assert not compared & set(asked)
