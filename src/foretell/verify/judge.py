"""Judge decoding: a trained head may pardon a token that the lossless rule refuses. Lossy."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import BuildContext, Draw, Draws, Needs, Promise, TargetRows
from foretell.core.tree import Kind, TokenTree
from foretell.verify.walk import Settled, residual_walk


class Judge:
    """The walk of `rejection` (at temperature 0: the greedy one) with a second opinion: a drafted
    token that it refuses stands nevertheless if sigmoid(w . h + b) > threshold, h being the
    target's last hidden state (after the final norm) once it has read that token.

    head: a safetensors file with `weight` [H] or [1, H] and, optionally, `bias` (one number).
    threshold 1 pardons nothing: the output is that of `rejection`, draw for draw. Never pardoned:
    the tokens that end a text, and tokens that a processor or a constraint excludes or to which the
    target gives less than `floor`. Raises InputError when the file does not hold such a head.

    Paper: Bachmann et al., "Judge Decoding: Faster Speculative Sampling Requires Going Beyond Model
    Alignment" (2025). Promise: lossy.
    """

    name = "judge"
    promise = Promise.LOSSY
    paper = "Judge Decoding: Faster Speculative Sampling Requires Going Beyond Model Alignment"
    summary = "a trained head pardons refused tokens that are right all the same (lossy)"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.SAMPLE
    needs = Needs(taps=("last",))

    def __init__(
        self,
        weight: Tensor,
        bias: float = 0.0,
        threshold: float = 0.5,
        floor: float = 0.0,
        strict: frozenset[int] = frozenset(),
    ) -> None:
        if not 0 <= threshold <= 1 or not 0 <= floor <= 1:
            raise InputError("judge needs threshold and floor between 0 and 1.")
        self.weight, self.bias, self.strict = weight, bias, strict
        self.threshold, self.floor = threshold, floor

    @classmethod
    def build(
        cls,
        context: BuildContext,
        head: str | None = None,
        threshold: float = 0.5,
        floor: float = 0.0,
    ) -> Judge:
        """`head`: the file of the trained head."""
        if head is None:
            raise InputError("judge needs a trained head: --verify judge:head=FILE.safetensors.")
        weight, bias = load_head(Path(head), context.target.spec.hidden)
        strict = context.tokenizer.eos_ids if context.tokenizer else frozenset()
        weight = weight.to(context.target.device)
        return cls(weight, bias, threshold, floor, frozenset(strict))

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        def test(node: int, left: float, q: float, here: int, index: int) -> bool:
            return rng.flip(left, q, here, index) or self.pardons(tree, p, node)

        return residual_walk(tree, Settled(p), rng, position, test)

    def pardons(self, tree: TokenTree, p: TargetRows, node: int) -> bool:
        """Whether the head lets the refused `node` stand."""
        x = int(tree.tokens[node])
        if self.threshold >= 1 or tree.kind[node] != Kind.CANDIDATE or x in self.strict:
            return False
        state = p.hidden("last", [node])[0].float()
        if float(torch.sigmoid(self.weight @ state + self.bias)) <= self.threshold:
            return False
        likely = float(p.probs([int(tree.parent[node])])[0, x])
        return likely > 0 and likely >= self.floor


def load_head(path: Path, hidden: int) -> tuple[Tensor, float]:
    """(weight [H] float32, bias) from a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"judge: there is no file {path}.")
    try:
        tensors = load_file(path)
    except SafetensorError as e:
        raise InputError(f"judge: {path} is not a safetensors file ({e}).") from None
    weight, bias = tensors.get("weight"), tensors.get("bias", torch.zeros(1))
    if weight is None or weight.numel() != hidden or weight.shape[-1] != hidden:
        found = {name: list(t.shape) for name, t in tensors.items()}
        raise InputError(
            f"judge: {path} should hold 'weight' of shape [{hidden}], the target's hidden size, "
            f"and a 'bias' of one number; it holds {found}."
        )
    if bias.numel() != 1 or not bool(torch.isfinite(weight).all() & torch.isfinite(bias).all()):
        raise InputError(f"judge: {path} needs finite weights and one finite 'bias'.")
    return weight.flatten().float(), float(bias)
