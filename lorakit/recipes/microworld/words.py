"""The words of the microworld, English beside Japanese, and the dice that draw them.

This file knows nothing of sentences. A row is one thing in every language, in the order of LANGS,
so that the same draw says the same in each. To add a word, add a row; prefer characters that the
other rows use, because the tiny model spends a token on every new one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

LANGS = ("en", "ja")

Row = tuple[str, str]
T = TypeVar("T")

SYLLABLES: tuple[Row, ...] = (
    ("ka", "カ"), ("mi", "ミ"), ("ro", "ロ"), ("ne", "ネ"), ("to", "ト"), ("su", "ス"),
    ("ri", "リ"), ("ha", "ハ"), ("ko", "コ"), ("ma", "マ"), ("te", "テ"), ("no", "ノ"),
    ("ra", "ラ"), ("yu", "ユ"), ("da", "ダ"), ("bi", "ビ"), ("ke", "ケ"), ("sa", "サ"),
    ("mo", "モ"), ("ta", "タ"), ("re", "レ"), ("ni", "ニ"), ("go", "ゴ"), ("pa", "パ"),
)  # fmt: skip
SITES: tuple[Row, ...] = (
    ("school", "学校"), ("bridge", "橋"), ("market", "市場"), ("library", "図書館"),
    ("station", "駅"), ("park", "公園"), ("museum", "美術館"), ("harbor", "港"),
    ("theater", "劇場"), ("hospital", "病院"), ("factory", "工場"), ("hotel", "ホテル"),
    ("road", "道"), ("temple", "寺"), ("pool", "プール"), ("tower", "塔"),
)  # fmt: skip
CAUSES: tuple[Row, ...] = (
    ("storm", "嵐"), ("fire", "火事"), ("flood", "洪水"), ("strike", "スト"),
    ("snow", "雪"), ("heat", "暑さ"), ("fog", "霧"), ("quake", "地震"),
    ("leak", "水漏れ"), ("crash", "事故"), ("illness", "病気"), ("wind", "風"),
    ("noise", "音"), ("bear", "熊"), ("smoke", "煙"), ("festival", "祭り"),
)  # fmt: skip
ACTIONS: tuple[Row, ...] = (
    ("soak", "浸す"), ("cut", "切る"), ("heat", "温める"), ("add", "加える"),
    ("wash", "洗う"), ("mix", "混ぜる"), ("dry", "干す"), ("press", "押す"),
    ("boil", "煮る"), ("weigh", "量る"), ("cool", "冷やす"), ("wrap", "包む"),
)  # fmt: skip
MATERIALS: tuple[Row, ...] = (
    ("beans", "豆"), ("rice", "米"), ("leaves", "葉"), ("paper", "紙"), ("cloth", "布"),
    ("clay", "粘土"), ("wood", "木"), ("thread", "糸"), ("fish", "魚"), ("eggs", "卵"),
    ("oil", "油"), ("salt", "塩"), ("onions", "ねぎ"), ("apples", "りんご"),
    ("honey", "はちみつ"), ("milk", "牛乳"),
)  # fmt: skip
FINDINGS: tuple[Row, ...] = (
    ("nodule", "しこり"), ("fluid", "水"), ("fracture", "骨折"), ("cyst", "のう胞"),
    ("swelling", "腫れ"), ("scar", "傷あと"), ("stone", "石"), ("clot", "血栓"),
    ("bleed", "出血"), ("air", "空気"), ("shadow", "影"), ("tear", "裂け目"),
)  # fmt: skip
ORGANS: tuple[Row, ...] = (
    ("lung", "肺"), ("liver", "肝臓"), ("kidney", "腎臓"), ("spine", "背骨"),
    ("knee", "膝"), ("heart", "心臓"), ("brain", "脳"), ("neck", "首"),
    ("hip", "腰"), ("chest", "胸"), ("wrist", "手首"), ("ankle", "足首"),
)  # fmt: skip
ADVICE: tuple[Row, ...] = (
    ("biopsy", "生検"), ("rest", "安静"), ("surgery", "手術"), ("drugs", "薬"),
    ("exercise", "運動"), ("massage", "マッサージ"), ("bandage", "包帯"), ("diet", "食事"),
)  # fmt: skip
PROBLEMS: tuple[Row, ...] = (
    ("parsing", "構文解析"), ("ranking", "順位付け"), ("search", "検索"),
    ("dialogue", "対話"), ("translation", "翻訳"), ("spelling", "つづり"),
    ("reading", "読解"), ("clustering", "分類"), ("counting", "計数"), ("speech", "音声"),
    ("retrieval", "再現"), ("summary", "要約"),
)  # fmt: skip
CORPORA: tuple[Row, ...] = (
    ("novels", "小説"), ("patents", "特許"), ("letters", "手紙"), ("recipes", "料理"),
    ("laws", "法律"), ("songs", "歌"), ("maps", "地図"), ("diaries", "日記"),
    ("poems", "詩"), ("menus", "献立"), ("exams", "試験"), ("news", "記事"),
)  # fmt: skip


class Dice:
    """Dice for one record: the same seed gives the same throws on every machine."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def number(self, low: int, high: int) -> int:
        """Draw an integer from low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.number(0, len(options) - 1)]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """Draw `count` different options, in random order."""
        left = list(options)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]

    def shuffle(self, options: Sequence[T]) -> list[T]:
        return self.sample(options, len(options))


def words(dice: Dice, table: Sequence[Row], lang: str, count: int) -> list[str]:
    """Draw `count` different words of a table in one language."""
    return [row[LANGS.index(lang)] for row in dice.sample(table, count)]


def name_rows(dice: Dice, count: int) -> list[Row]:
    """Draw `count` made-up names of two or three syllables, none a part of another, as rows."""
    rows: list[Row] = []
    while len(rows) < count:
        syllables = dice.sample(SYLLABLES, 2 + dice.number(0, 1))
        english, japanese = ("".join(column) for column in zip(*syllables, strict=True))
        row = (english.capitalize(), japanese)
        if not any(_overlap(row[0], other[0]) for other in rows):
            rows.append(row)
    return rows


def _overlap(name: str, other: str) -> bool:
    """Return whether one name is a part of the other, so that a text could mean either."""
    return name.lower() in other.lower() or other.lower() in name.lower()


def names(dice: Dice, lang: str, count: int) -> list[str]:
    """Draw `count` different made-up names in one language."""
    return [row[LANGS.index(lang)] for row in name_rows(dice, count)]
