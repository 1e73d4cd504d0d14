"""Sixty prompts written for these tests: none of them is in any benchmark or training text.

Six kinds of ten: stories, code, sums, copying and correcting, lists, questions about a passage.
"""

from __future__ import annotations

NAMES = ["Ilse", "Tomaz", "Wren", "Adaeze", "Bram", "Yuki", "Oksana", "Farid", "Maren", "Sipho"]
THINGS = [
    "lantern",
    "kettle",
    "ferry",
    "loom",
    "compass",
    "beehive",
    "tram",
    "anvil",
    "kite",
    "well",
]
PLACES = ["Veldt Bay", "the salt works", "Upper Norrow", "a roof in Tarn", "the glass market"]
CODE = [
    "def median_of_three(a, b, c):\n    ",
    "class RingBuffer:\n    def __init__(self, size):\n        ",
    "import os\n\n\ndef newest_file(folder):\n    ",
    "def count_words(text):\n    counts = {}\n    for word in text.split():\n        ",
    "for row in range(rows):\n    for column in range(columns):\n        ",
    "try:\n    value = int(line)\nexcept ValueError:\n    ",
    "def rotate(points, angle):\n    result = []\n    for x, y in points:\n        ",
    "with open(path) as f:\n    header = f.readline()\n    ",
    "def is_leap(year):\n    if year % 400 == 0:\n        return True\n    ",
    "SELECT name, SUM(weight) FROM parcels WHERE ",
]


def sixty() -> list[str]:
    """The prompts, in a fixed order."""
    found = []
    for i in range(10):
        name, thing, place = NAMES[i], THINGS[i], PLACES[i % 5]
        other = NAMES[(i + 3) % 10]
        found += [
            f"{name} carried the {thing} all the way to {place}, and when {other} saw it",
            CODE[i],
            f"Question: {name} has {3 * i + 4} {thing}s and gives {i + 1} to {other}. "
            f"How many {thing}s does {name} keep?\nAnswer:",
            f"Repeat the text without its errors.\nText: The {thing} were made in {place} by "
            f"{name}, who sold it too {other} for {i + 7} coins.\nCorrected: The {thing}",
            f"1. {thing}\n2. {THINGS[(i + 1) % 10]}\n3. {THINGS[(i + 2) % 10]}\n4.",
            f"The {thing} of {place} is {20 + i} years old. {name} mends it in spring and {other} "
            f"paints it in autumn. Who mends the {thing} of {place}?\n",
        ]
    return found
