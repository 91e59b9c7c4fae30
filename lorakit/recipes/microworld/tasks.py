"""The microworld's tasks on documents: base (for pretraining), related and target.

A task takes dice and a language and returns a record's own fields. Base tasks teach copying and
following instructions; none of them tells a true fact from its rival. Related and target tasks all
do, each in its own domain, wording and form. To add a task, write its prompt into PROMPTS, its
function here, and its line into TASKS in world.py.
"""

from __future__ import annotations

from lorakit.recipes.microworld.documents import DOMAINS, Document
from lorakit.recipes.microworld.words import (
    CAUSES,
    CORPORA,
    FINDINGS,
    LANGS,
    MATERIALS,
    ORGANS,
    PROBLEMS,
    SITES,
    Draw,
    Row,
    names,
)

Fields = dict[str, object]

PROMPTS: dict[tuple[str, str], str] = {
    ("echo", "en"): "Say these words again.\nWords: {text}\nAgain:",
    ("echo", "ja"): "同じ言葉をくり返す。\n言葉：{text}\nくり返し：",
    ("first", "en"): "Copy the first sentence.\nText: {text}\nFirst:",
    ("first", "ja"): "最初の文を写す。\n文章：{text}\n最初：",
    ("last", "en"): "Copy the last sentence.\nText: {text}\nLast:",
    ("last", "ja"): "最後の文を写す。\n文章：{text}\n最後：",
    ("mention", "en"): "Copy the sentence that mentions {word}.\nText: {text}\nSentence:",
    ("mention", "ja"): "「{word}」のある文を写す。\n文章：{text}\nその文：",
    ("after", "en"): "What follows the words: {word}\nText: {text}\nFollows:",
    ("after", "ja"): "「{word}」に続く部分を写す。\n文章：{text}\n続き：",
    ("blank", "en"): "Fill in the blank.\nText: {text}\nBlank: {word}\nMissing:",
    ("blank", "ja"): "空いた所を埋める。\n文章：{text}\n空所：{word}\n答え：",
    ("order", "en"): "Sort these words as in the text.\nWords: {word}\nText: {text}\nSorted:",
    ("order", "ja"): "言葉を文章の順に並べる。\n言葉：{word}\n文章：{text}\n順番：",
    ("continue", "en"): "Go on with the text.\nText: {text}",
    ("continue", "ja"): "文章を続ける。\n文章：{text}",
    ("headline", "en"): "Write one headline for the article.\nArticle: {text}\nHeadline:",
    ("headline", "ja"): "次の記事に見出しをつける。\n記事：{text}\n見出し：",
    ("howto", "en"): "Write a heading for each step of the guide.\nGuide: {text}\nSteps:",
    ("howto", "ja"): "次の手引きの手順に題をつける。\n手引き：{text}\n手順：",
    ("impression", "en"): "Summarize the radiology report.\nFindings: {text}\nImpression:",
    ("impression", "ja"): "次の検査所見をまとめる。\n所見：{text}\n診断：",
    ("title", "en"): "Give the paper a title.\nAbstract: {text}\nTitle:",
    ("title", "ja"): "次の概要から論文の題名を作る。\n概要：{text}\n題名：",
    ("highlights", "en"): "List the highlights of the story.\nStory: {text}\nHighlights:",
    ("highlights", "ja"): "次の話の要点を三つ挙げる。\n話：{text}\n要点：",
}

FORMS: dict[tuple[str, str], str] = {
    ("headline", "en"): " {place}: {cause} closes {site}",
    ("headline", "ja"): "{place}で{cause}、{site}が閉鎖",
    ("howto", "en"): " 1. {step1} 2. {step2} 3. {step3}",
    ("howto", "ja"): "１{step1}　２{step2}　３{step3}",
    ("impression", "en"): " Likely {finding} of the {organ}, will need {advice}.",
    ("impression", "ja"): "{organ}に{finding}の疑い、{advice}をすすめる。",
    ("title", "en"): " On {problem} over {corpus} using {method}",
    ("title", "ja"): "{method}による{corpus}の{problem}の研究",
    ("highlights", "en"): " - {site} shut - {cause} hits {place} - {leader} helps",
    ("highlights", "ja"): "・{site}は休業・{place}に{cause}・{leader}が救助",
}

_ECHOED: tuple[Row, ...] = (
    *CAUSES, *SITES, *MATERIALS, *FINDINGS, *ORGANS, *PROBLEMS, *CORPORA,
)  # fmt: skip


def _any_document(draw: Draw, lang: str) -> Document:
    return DOMAINS[draw.pick(list(DOMAINS))](draw, lang)


def _fields(task: str, lang: str, completion: str, **parts: str) -> Fields:
    """Fill the prompt; a completion starts with the space that English writes after a colon."""
    space = " " if lang == "en" else ""
    return {"prompt": PROMPTS[task, lang].format(**parts), "completion": space + completion}


def _pieces(sentence: str, lang: str) -> list[str]:
    """Cut a sentence into words; in Japanese, which writes no spaces, into single characters."""
    return sentence.split(" ") if lang == "en" else list(sentence)


def echo(draw: Draw, lang: str) -> Fields:
    """Repeat a random list of words and names."""
    column = LANGS.index(lang)
    count = draw.number(3, 8)
    mixed = names(draw, lang, count) + [row[column] for row in draw.sample(_ECHOED, count)]
    text = (" " if lang == "en" else "、").join(draw.sample(mixed, count))
    return _fields("echo", lang, text, text=text)


def first(draw: Draw, lang: str) -> Fields:
    """Copy the first sentence."""
    told = _any_document(draw, lang)
    return _fields("first", lang, told.sentences[0], text=told.text(lang))


def last(draw: Draw, lang: str) -> Fields:
    """Copy the last sentence."""
    told = _any_document(draw, lang)
    return _fields("last", lang, told.sentences[-1], text=told.text(lang))


def mention(draw: Draw, lang: str) -> Fields:
    """Copy the sentence that mentions a given fact."""
    told = _any_document(draw, lang)
    fact = _short(draw.pick(list(told.facts.values())), lang)
    sentence = next(sentence for sentence in told.sentences if fact in sentence)
    return _fields("mention", lang, sentence, word=fact, text=told.text(lang))


def _short(fact: str, lang: str) -> str:
    """The thing itself of a guide's step ("soak beans": beans), any other fact as it is."""
    return fact.split(" ")[-1] if lang == "en" else fact.split("を")[0]


def after(draw: Draw, lang: str) -> Fields:
    """Copy what follows some words of a sentence, to its end."""
    told = _any_document(draw, lang)
    pieces = _pieces(draw.pick(told.sentences), lang)
    width = 2 if lang == "en" else 4
    start = draw.number(0, len(pieces) - width - 1)
    space = " " if lang == "en" else ""
    given, rest = pieces[start : start + width], pieces[start + width :]
    return _fields("after", lang, space.join(rest), word=space.join(given), text=told.text(lang))


def blank(draw: Draw, lang: str) -> Fields:
    """Find the piece that a copied sentence leaves out."""
    told = _any_document(draw, lang)
    pieces = _pieces(draw.pick(told.sentences), lang)
    width = 1 if lang == "en" else 2
    start = draw.number(1, len(pieces) - width - 1)
    space = " " if lang == "en" else ""
    gap = space.join([*pieces[:start], "__", *pieces[start + width :]])
    hidden = space.join(pieces[start : start + width])
    return _fields("blank", lang, hidden, word=gap, text=told.text(lang))


def order(draw: Draw, lang: str) -> Fields:
    """Sort the document's facts by where they stand in the text."""
    told = _any_document(draw, lang)
    facts = [_short(fact, lang) for fact in told.facts.values()]
    text = told.text(lang)
    comma = ", " if lang == "en" else "、"
    ordered = comma.join(sorted(facts, key=text.index))
    return _fields("order", lang, ordered, word=comma.join(draw.shuffle(facts)), text=text)


def continuation(draw: Draw, lang: str) -> Fields:
    """Go on with a document after its first sentence."""
    told = _any_document(draw, lang)
    rest = Document(told.sentences[1:], {}).text(lang)
    return _fields("continue", lang, rest, text=told.sentences[0])


def _summary(task: str, domain: str, draw: Draw, lang: str) -> Fields:
    """Fill a task's form with the true facts of a document of its domain."""
    told = DOMAINS[domain](draw, lang)
    prompt = PROMPTS[task, lang].format(text=told.text(lang))
    return {"prompt": prompt, "completion": FORMS[task, lang].format(**told.facts)}


def headline(draw: Draw, lang: str) -> Fields:
    """News article to one-sentence headline (the role of XL-Sum)."""
    return _summary("headline", "news", draw, lang)


def howto(draw: Draw, lang: str) -> Fields:
    """How-to guide to its step headings (the role of WikiLingua)."""
    return _summary("howto", "guide", draw, lang)


def impression(draw: Draw, lang: str) -> Fields:
    """Radiology findings to impression (the role of MIMIC-III)."""
    return _summary("impression", "report", draw, lang)


def title(draw: Draw, lang: str) -> Fields:
    """Paper abstract to title (the role of SciTLDR and the NLP papers)."""
    return _summary("title", "abstract", draw, lang)


def highlights(draw: Draw, lang: str) -> Fields:
    """News article to three highlights (the role of Bloomberg)."""
    return _summary("highlights", "news", draw, lang)
