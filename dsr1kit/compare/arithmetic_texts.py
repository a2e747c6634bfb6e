"""The wording of the generated problems, English and Chinese; `compare.arithmetic` fills in the numbers."""

from __future__ import annotations

from typing import Literal

Language = Literal["en", "zh"]

#: R1's own advice for mathematics; tiny-r1 saw it after a third of its questions.
INSTRUCTION = {
    "en": "Please reason step by step, and put your final answer within \\boxed{}.",
    "zh": "请逐步推理，并把最终答案放在 \\boxed{} 中。",
}

BARE: dict[Language, tuple[str, ...]] = {
    "en": ("What is {}?", "Compute {}.", "Calculate {}.", "{} = ?"),
    "zh": ("{} 等于多少？", "计算 {}。", "{} = ？"),
}
COMPARE: dict[tuple[Language, bool], tuple[str, ...]] = {
    ("en", True): ("Which is the largest: {}?", "Find the largest number: {}."),
    ("en", False): ("Which is the smallest: {}?", "Find the smallest number: {}."),
    ("zh", True): ("哪个数最大：{}？", "找出最大的数：{}。"),
    ("zh", False): ("哪个数最小：{}？", "找出最小的数：{}。"),
}
REMAINDER: dict[Language, tuple[str, ...]] = {
    "en": ("What is the remainder when {} is divided by 7?", "Find the remainder of {} divided by 7."),
    "zh": ("{} 除以 7 的余数是多少？", "求 {} 除以 7 的余数。"),
}
PEOPLE: dict[Language, tuple[str, ...]] = {
    "en": ("Anna", "Ben", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas"),
    "zh": ("小明", "小红", "小华", "小丽", "小刚", "小芳", "小军", "小梅"),
}
THINGS: dict[Language, tuple[str, ...]] = {
    "en": ("apples", "books", "stamps", "pencils", "marbles", "stickers", "cards", "shells"),
    "zh": ("苹果", "橘子", "糖果", "鸡蛋", "气球", "贝壳"),
}
STORIES: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "sum": (
            "{who} has {a} {thing} and buys {b} more. How many {thing} does {who} have now?",
            "{who} has {a} {thing} and {other} has {b}. How many {thing} do they have together?",
            "A school has {a} girls and {b} boys. How many pupils does it have?",
        ),
        "difference": (
            "{who} has {a} {thing} and gives {b} to {other}. How many {thing} are left?",
            "A train has {a} seats and {b} are taken. How many seats are free?",
            "{who} has {a} {thing} and {other} has {b}. How many more {thing} does {who} have?",
        ),
        "product": (
            "There are {a} boxes with {b} {thing} each. How many {thing} are there?",
            "{who} reads {b} pages a day for {a} days. How many pages is that?",
        ),
        "sum_difference": (
            "{who} has {a} {thing}, finds {b} more and gives {c} to {other}. How many {thing} are left?",
            "A bus carries {a} people. {b} get on and {c} get off. How many are on the bus now?",
        ),
        "difference_sum": ("A shop has {a} {thing}, sells {b} and orders {c}. How many {thing} does it have now?",),
        "product_sum": (
            "There are {a} boxes with {b} {thing} each and {c} loose {thing}. How many {thing} are there?",
            "{who} saves {b} coins a week for {a} weeks and already had {c}. How many coins are there?",
        ),
        "product_difference": (
            "There are {a} boxes with {b} {thing} each. {c} {thing} are sold. How many {thing} are left?",
        ),
    },
    "zh": {
        "sum": (
            "{who}有{a}个{thing}，又买了{b}个。现在一共有多少个{thing}？",
            "{who}有{a}个{thing}，{other}有{b}个。他们一共有多少个{thing}？",
        ),
        "difference": (
            "{who}有{a}个{thing}，送给{other}{b}个。还剩多少个{thing}？",
            "一本书有{a}页，{who}看了{b}页。还剩多少页？",
        ),
        "product": (
            "有{a}个盒子，每盒{b}个{thing}。一共有多少个{thing}？",
            "{who}每天看{b}页书，看了{a}天。一共看了多少页？",
        ),
        "sum_difference": ("{who}有{a}个{thing}，又买了{b}个，送给{other}{c}个。还剩多少个{thing}？",),
        "difference_sum": ("商店有{a}个{thing}，卖出{b}个，又进货{c}个。现在有多少个{thing}？",),
        "product_sum": ("有{a}个盒子，每盒{b}个{thing}，外面还有{c}个。一共有多少个{thing}？",),
        "product_difference": ("有{a}个盒子，每盒{b}个{thing}，卖出{c}个。还剩多少个{thing}？",),
    },
}
