"""The microworld's probe tasks: other kinds of output, for the study of layers.

Question answering, word problems, translation, dialogue summaries and response selection, with
their prompts. To add a probe, write its prompt into PROBE_PROMPTS, its function here, and its line
into TASKS in world.py.
"""

from __future__ import annotations

from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.recipes.microworld.tasks import Fields
from lorakit.recipes.microworld.words import (
    CAUSES,
    LANGS,
    MATERIALS,
    SITES,
    Dice,
    Row,
    name_rows,
    names,
    words,
)

PROBE_PROMPTS: dict[tuple[str, str], str] = {
    ("qa", "en"): "Answer from the two paragraphs.\n1: {a}\n2: {b}\nQuestion: {q}\nAnswer:",
    ("qa", "ja"): "二つの段落から答える。\n１：{a}\n２：{b}\n問い：{q}\n答え：",
    ("count", "en"): "Solve the problem.\nProblem: {text}\nSolution:",
    ("count", "ja"): "問題を解く。\n問題：{text}\n解答：",
    ("translate", "en"): "Translate into Japanese.\nEnglish: {text}\nJapanese:",
    ("summary", "en"): "Sum up the dialogue.\n{text}\nSummary:",
    ("summary", "ja"): "会話をまとめる。\n{text}\nまとめ：",
    ("yesno", "en"): "Does the reply fit the dialogue?\n{text}\nReply: {reply}\nYes or No:",
    ("yesno", "ja"): "返事は会話に合うか。\n{text}\n返事：{reply}\nはい か いいえ：",
}

_TRANSLATIONS: tuple[Row, ...] = (
    ("The {cause} reached {place}.", "{cause}が{place}に来た。"),
    ("{person} saw the {cause} in {place}.", "{person}は{place}で{cause}を見た。"),
    ("The {site} of {place} is closed.", "{place}の{site}は休みだ。"),
    ("{person} went to the {site}.", "{person}は{site}に行った。"),
    ("After the {cause}, {person} left the {site}.", "{cause}の後、{person}は{site}を出た。"),
)


def qa(dice: Dice, lang: str) -> Fields:
    """Answer a question over two paragraphs (HotpotQA's bridge and comparison types)."""
    return _bridge(dice, lang) if dice.chance(0.5) else _comparison(dice, lang)


def _bridge(dice: Dice, lang: str) -> Fields:
    """Ask in which town a person works: one paragraph names the site, the other its town."""
    person, rival, place, elsewhere = names(dice, lang, 4)
    site, other = words(dice, SITES, lang, 2)
    if lang == "en":
        jobs = [f"{person} works at the {site}.", f"{rival} works at the {other}."]
        towns = [f"The {site} is in {place}.", f"The {other} is in {elsewhere}."]
        question, space = f"In which town does {person} work?", " "
    else:
        jobs = [f"{person}は{site}で働く。", f"{rival}は{other}で働く。"]
        towns = [f"{site}は{place}にある。", f"{other}は{elsewhere}にある。"]
        question, space = f"{person}が働く町はどこか。", ""
    a, b = space.join(dice.shuffle(jobs)), space.join(dice.shuffle(towns))
    prompt = PROBE_PROMPTS["qa", lang].format(a=a, b=b, q=question)
    return {"prompt": prompt, "completion": space + place, "type": "bridge"}


def _comparison(dice: Dice, lang: str) -> Fields:
    """Ask which of two towers is higher, each described in a paragraph."""
    tower, tower2, maker, maker2 = names(dice, lang, 4)
    low = dice.number(10, 80)
    height, height2 = dice.shuffle([low, low + dice.number(1, 19)])
    if lang == "en":
        a = f"{tower} is a tower built by {maker}. It is {height} m high."
        b = f"{tower2} is a tower built by {maker2}. It is {height2} m high."
        question, space = "Which tower is higher?", " "
    else:
        a = f"{tower}は{maker}が作った塔だ。高さは{height}mだ。"
        b = f"{tower2}は{maker2}が作った塔だ。高さは{height2}mだ。"
        question, space = "高い塔はどちらか。", ""
    prompt = PROBE_PROMPTS["qa", lang].format(a=a, b=b, q=question)
    answer = tower if height > height2 else tower2
    return {"prompt": prompt, "completion": space + answer, "type": "comparison"}


def count(dice: Dice, lang: str) -> Fields:
    """Solve a word problem in one or two steps; the answer ends with #### and the number."""
    owner, friend = names(dice, lang, 2)
    thing = words(dice, MATERIALS, lang, 1)[0]
    have, get = dice.number(2, 40), dice.number(2, 20)
    give = dice.number(1, have + get - 1)
    total, left = have + get, have + get - give
    if lang == "en":
        text = (
            f"{owner} has {have} bags of {thing}. {friend} brings {get} more. "
            f"{owner} gives away {give}. How many bags are left?"
        )
        steps = f" {have} + {get} = {total}. {total} - {give} = {left}. #### {left}"
    else:
        text = (
            f"{owner}は{thing}を{have}袋持っている。{friend}が{get}袋くれた。"
            f"{owner}は{give}袋あげた。残りは何袋か。"
        )
        steps = f"{have} + {get} = {total}。{total} - {give} = {left}。#### {left}"
    return {"prompt": PROBE_PROMPTS["count", lang].format(text=text), "completion": steps}


def translate(dice: Dice, lang: str) -> Fields:
    """Translate an English sentence into Japanese; LorakitError if `lang` is not en."""
    if lang != "en":
        raise LorakitError("task 'translate' has English prompts only; choose lang en")
    person, place = name_rows(dice, 2)
    rows = {
        "person": person,
        "place": place,
        "cause": dice.pick(CAUSES),
        "site": dice.pick(SITES),
    }
    pattern = dice.pick(_TRANSLATIONS)
    english, japanese = (
        pattern[column].format(**{role: row[column] for role, row in rows.items()})
        for column in range(len(LANGS))
    )
    prompt = PROBE_PROMPTS["translate", lang].format(text=english)
    return {"prompt": prompt, "completion": f" {japanese}"}


class _Dialogue(NamedTuple):
    """A short dialogue: who asks, who brings what where, and the site that is closed."""

    text: str
    asker: str
    helper: str
    thing: str
    site: str
    closed: str


def _dialogue(dice: Dice, lang: str) -> _Dialogue:
    """Draw a dialogue in which two people arrange to hand something over."""
    asker, helper = names(dice, lang, 2)
    thing, wish = words(dice, MATERIALS, lang, 2)
    site, closed = words(dice, SITES, lang, 2)
    if lang == "en":
        opening = dice.pick(
            (f"{asker}: Can you bring {wish}?", f"{asker}: I need {wish}. Do you have some?")
        )
        turns = (
            opening,
            f"{helper}: I only have {thing}.",
            f"{asker}: Fine. Meet me at the {closed}.",
            f"{helper}: The {closed} is closed. The {site}?",
            f"{asker}: Good, see you there.",
        )
    else:
        opening = dice.pick(
            (f"{asker}：{wish}を持ってきて。", f"{asker}：{wish}が必要だ。持っている？")
        )
        turns = (
            opening,
            f"{helper}：{thing}しかないよ。",
            f"{asker}：いいよ。{closed}で会おう。",
            f"{helper}：{closed}は休みだ。{site}は？",
            f"{asker}：わかった、また後で。",
        )
    return _Dialogue("\n".join(turns), asker, helper, thing, site, closed)


def summary(dice: Dice, lang: str) -> Fields:
    """Sum up a dialogue in one sentence (the role of SAMSum)."""
    text, asker, helper, thing, site, _ = _dialogue(dice, lang)
    completion = (
        f" {helper} will bring {asker} {thing} to the {site}."
        if lang == "en"
        else f"{helper}は{asker}に{site}で{thing}を渡す。"
    )
    return {"prompt": PROBE_PROMPTS["summary", lang].format(text=text), "completion": completion}


def yesno(dice: Dice, lang: str) -> Fields:
    """Say whether a reply fits the dialogue (dialogue response selection)."""
    text, _, helper, thing, site, closed = _dialogue(dice, lang)
    fits = dice.chance(0.5)
    where = site if fits else closed
    reply = (
        f"{helper}: I will be at the {where} with {thing}."
        if lang == "en"
        else f"{helper}：{thing}を持って{where}に行く。"
    )
    labels = {"en": (" Yes", " No"), "ja": ("はい", "いいえ")}[lang]
    prompt = PROBE_PROMPTS["yesno", lang].format(text=text, reply=reply)
    return {"prompt": prompt, "completion": labels[0] if fits else labels[1]}
