"""The documents of the microworld: news, guides, scan reports and abstracts of 3 to 5 sentences.

Every fact has its own sentence, beside a rival of the same kind that the wording rules out
("the storm rather than the fire"). All domains share the wordings of that contrast (CONTRASTS) and
of background remarks, and nothing else. So a model that has learned to pick facts out of news can
use that in a report, and one that has not must learn every wording anew. Sentences come in random
order. To add a domain, add its sentences to SENTENCES and a function to DOMAINS. This file knows
nothing of the tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lorakit.recipes.microworld.words import (
    ACTIONS,
    ADVICE,
    CAUSES,
    CORPORA,
    FINDINGS,
    MATERIALS,
    ORGANS,
    PROBLEMS,
    SITES,
    Dice,
    names,
    words,
)


class Fact(NamedTuple):
    """A fact: the true words, the phrase that states them, and another word for a remark."""

    true: str
    phrase: str
    other: str


class Document(NamedTuple):
    """A document: its sentences in order and its true facts by role."""

    sentences: list[str]
    facts: dict[str, str]

    def text(self, lang: str) -> str:
        """Return the sentences as one text."""
        return (" " if lang == "en" else "").join(self.sentences)


CONTRASTS: dict[str, tuple[str, ...]] = {
    "en": (
        "{yes} rather than {no}", "{yes}, not {no}", "{yes} instead of {no}",
        "{yes}, formerly {no}", "{yes}, never {no}", "{yes}, replacing {no}",
        "not {no} but {yes}", "{no}, now {yes}", "{no}, corrected to {yes}",
        "{no}, in truth {yes}", "{no}, replaced by {yes}", "{no}, which became {yes}",
    ),
    "ja": (
        "{yes}（以前は{no}）", "{yes}（誤って{no}）", "{yes}（もとは{no}）",
        "{yes}（旧{no}）", "{yes}（否定：{no}）",
        "{no}ではなく{yes}", "{no}（正しくは{yes}）", "{no}（実は{yes}）",
        "{no}（今は{yes}）", "{no}改め{yes}",
    ),
}  # fmt: skip

SENTENCES: dict[tuple[str, str], tuple[str, ...]] = {
    ("cause", "en"): (
        "The cause was {}.", "Police blame {}.", "It all began with {}.",
        "Behind the trouble is {}.", "People there speak of {}.",
    ),
    ("cause", "ja"): (
        "原因は{}だった。", "警察によると原因は{}だ。", "始まりは{}だった。", "人々は{}だと話す。",
    ),
    ("place", "en"): (
        "The town in question is {}.", "It happened in {}.", "The news comes from {}.",
        "Those affected live in {}.", "Help was sent to {}.",
    ),
    ("place", "ja"): (
        "町の名は{}だ。", "起きた町は{}だった。", "助けが向かった先は{}だ。", "現場は{}だという。",
    ),
    ("site", "en"): (
        "Workers shut {}.", "Nobody may enter {}.", "The doors are locked at {}.",
        "The mayor closed {}.", "Visitors must leave {}.",
    ),
    ("site", "ja"): (
        "閉まったのは{}だ。", "入れないのは{}だった。",
        "市長が閉じたのは{}だ。", "休みは{}だという。",
    ),
    ("leader", "en"): (
        "The rescue is led by {}.", "In charge is {}.", "Questions go to {}.",
        "The team follows {}.",
    ),
    ("leader", "ja"): ("指揮者は{}だ。", "救助の長は{}だった。", "話したのは{}だ。"),
    ("step1", "en"): ("First, {}.", "To begin, {}.", "Start like this: {}."),
    ("step1", "ja"): ("まず{}。", "最初に{}。", "はじめに{}。"),
    ("step2", "en"): ("Next, {}.", "After that, {}.", "In the middle, {}."),
    ("step2", "ja"): ("次に{}。", "それから{}。", "二番目に{}。"),
    ("step3", "en"): ("Finally, {}.", "At the end, {}.", "As the last step, {}."),
    ("step3", "ja"): ("最後に{}。", "終わりに{}。", "仕上げに{}。"),
    ("finding", "en"): (
        "The scan shows {}.", "There is {}.", "Images reveal {}.", "We note {}.",
    ),
    ("finding", "ja"): (
        "画像に見えるのは{}だ。", "所見は{}だった。", "写っているのは{}だ。", "認めたのは{}だ。",
    ),
    ("organ", "en"): (
        "The region is {}.", "It sits in {}.", "The pain is felt at {}.", "The view covers {}.",
    ),
    ("organ", "ja"): ("部位は{}だ。", "場所は{}だった。", "痛むのは{}だ。", "見たのは{}だ。"),
    ("advice", "en"): (
        "The patient needs {}.", "The doctor orders {}.", "The plan is {}.",
        "Best for recovery is {}.",
    ),
    ("advice", "ja"): (
        "必要なのは{}だ。", "医師の指示は{}だ。",
        "予定は{}だった。", "よいのは{}だ。",
    ),
    ("method", "en"): (
        "We call the model {}.", "Our system is {}.", "The proposal is named {}.",
        "The code runs {}.",
    ),
    ("method", "ja"): (
        "手法の名は{}だ。", "提案は{}である。",
        "使うのは{}だ。", "我々が作ったのは{}だ。",
    ),
    ("problem", "en"): (
        "We work on {}.", "The paper treats {}.", "The open question is {}.", "Our aim is {}.",
    ),
    ("problem", "ja"): (
        "課題は{}だ。", "本研究が扱うのは{}である。",
        "目的は{}だ。", "問いは{}だ。",
    ),
    ("corpus", "en"): (
        "Tests were run on {}.", "The data are {}.", "We train with {}.", "It learns from {}.",
    ),
    ("corpus", "ja"): (
        "データは{}だ。", "実験の対象は{}である。",
        "学習に使うのは{}だ。", "集めたのは{}だ。",
    ),
    ("remark", "en"): (
        "Last year people asked about {}.", "A separate case concerns {}.",
        "For comparison, others mention {}.",
    ),
    ("remark", "ja"): (
        "昨年は{}が話題だった。", "別の件では{}が問題だ。",
        "参考までに{}の例もある。",
    ),
}  # fmt: skip


def contrast(dice: Dice, lang: str, yes: str, no: str) -> str:
    """Return a phrase that says `yes` and rules out `no`.

    In English, words that are not names get an article.
    """
    if lang == "en":
        yes, no = (word if word[0].isupper() else f"the {word}" for word in (yes, no))
    return dice.pick(CONTRASTS[lang]).format(yes=yes, no=no)


def document(dice: Dice, lang: str, facts: dict[str, Fact]) -> Document:
    """Return a document that states the facts in random order, half the time with a remark."""
    roles = dice.shuffle(list(facts))
    sentences = [dice.pick(SENTENCES[role, lang]).format(facts[role].phrase) for role in roles]
    if dice.chance(0.5):
        other = facts[dice.pick(roles)].other
        remark = dice.pick(SENTENCES["remark", lang]).format(
            f"the {other}" if lang == "en" and other[0].islower() else other
        )
        sentences.insert(dice.number(1, len(sentences)), remark)
    return Document(sentences, {role: fact.true for role, fact in facts.items()})


def _fact(dice: Dice, lang: str, choices: list[str]) -> Fact:
    """Return a fact of three words of one kind: the true one, its rival, and one for a remark."""
    true, rival, other = choices
    return Fact(true, contrast(dice, lang, true, rival), other)


def news(dice: Dice, lang: str) -> Document:
    """Return news of an event: its cause, where, which site it closed, who leads the rescue."""
    proper = names(dice, lang, 6)
    facts = {
        "cause": _fact(dice, lang, words(dice, CAUSES, lang, 3)),
        "place": _fact(dice, lang, proper[:3]),
        "site": _fact(dice, lang, words(dice, SITES, lang, 3)),
        "leader": Fact(proper[3], proper[3], proper[4]),
    }
    return document(dice, lang, facts)


def guide(dice: Dice, lang: str) -> Document:
    """Return three steps of a craft out of order; words of time say which comes when."""
    actions = words(dice, ACTIONS, lang, 3)
    materials = words(dice, MATERIALS, lang, 9)
    facts = {}
    for step, action in enumerate(actions):
        yes, no, other = materials[3 * step : 3 * step + 3]
        phrase = contrast(dice, lang, yes, no)
        stated = f"{action} {phrase}" if lang == "en" else f"{phrase}を{action}"
        true = f"{action} {yes}" if lang == "en" else f"{yes}を{action}"
        facts[f"step{step + 1}"] = Fact(true, stated, other)
    return document(dice, lang, facts)


def report(dice: Dice, lang: str) -> Document:
    """Return a report on a scan: what it shows, in which organ, and what the patient needs."""
    tables = {"finding": FINDINGS, "organ": ORGANS, "advice": ADVICE}
    facts = {role: _fact(dice, lang, words(dice, table, lang, 3)) for role, table in tables.items()}
    return document(dice, lang, facts)


def abstract(dice: Dice, lang: str) -> Document:
    """Return a paper's abstract: the method's name, the problem it treats, the data."""
    facts = {
        "method": _fact(dice, lang, names(dice, lang, 3)),
        "problem": _fact(dice, lang, words(dice, PROBLEMS, lang, 3)),
        "corpus": _fact(dice, lang, words(dice, CORPORA, lang, 3)),
    }
    return document(dice, lang, facts)


DOMAINS: dict[str, Callable[[Dice, str], Document]] = {
    "news": news,
    "guide": guide,
    "report": report,
    "abstract": abstract,
}
