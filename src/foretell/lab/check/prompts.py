"""Prompts of many kinds for `foretell check`: code, arithmetic, prose, lists, other scripts."""

PROMPTS = (
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Question: A baker sells 12 loaves a day at 3 dollars each. How much does he earn in a week?\n"
    "Answer:",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was",
    "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n",
    "one two three one two three one two three one two",
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is",
    '{"name": "Ada", "born": 1815}\n{"name": "Alan", "born": 1912}\n{"name":',
    "Dear Sir,\n\nI have received your letter of the third of May, and I beg to answer",
    "for i in range(10):\n    for j in range(10):\n        if i * j % 7 == 0:\n            print(",
    "Les sanglots longs des violons de l'automne blessent mon c\u0153ur",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Q: What is 17 + 25?\nA: 17 + 25 = 42\nQ: What is 36 + 48?\nA: 36 + 48 =",
)
