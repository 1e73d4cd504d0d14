"""Which rule verifies which request, and what the outputs may promise."""

from __future__ import annotations

from foretell.core import registry
from foretell.core.errors import InputError
from foretell.core.params import NO_WISH, SamplingParams, Speculation
from foretell.core.protocols import Drafter, Draw, Promise, Verifier

_PROMISES = tuple(Promise)  # the strongest first
_DRAWN = {
    Draw.IID: "siblings that were drawn independently",
    Draw.TOP_ONE: "the most probable siblings and one draw",
    Draw.PATHS: "independently drawn chains of one length",
}


class Rules:
    """The rules that verify what a drafter drafts: the configured one, the greedy walk, and an
    exact one for requests that want more than the configured one promises.

    Raises InputError for a pair that would be biased, and for a lossy method without allow_lossy.
    """

    def __init__(
        self,
        drafter: Drafter,
        configured: Verifier,
        greedy: Verifier,
        exact: Verifier,
        allow_lossy: bool = False,
    ) -> None:
        self.drafter, self.configured, self.allow_lossy = drafter, configured, allow_lossy
        self.greedy, self.exact = greedy, exact
        for method in (configured, drafter):
            if method.promise is Promise.LOSSY and not allow_lossy:
                raise InputError(
                    f"'{method.name}' changes what the model says (lossy): "
                    "pass allow_lossy / --allow-lossy if that is what you want."
                )
        why = self._mismatch(configured)
        if why is not None:
            raise InputError(why)

    def _mismatch(self, rule: Verifier) -> str | None:
        """Why a rule cannot verify what the drafter drafts, or None."""
        name, drafter = f"'{rule.name}'", f"'{self.drafter.name}'"
        missing = self.drafter.shapes - rule.accepts
        if "tree" in missing or "chain" in missing or "onehot" in missing:
            return (
                f"{name} cannot verify what {drafter} drafts "
                f"({', '.join(sorted(missing))}): choose another pair."
            )
        if self.drafter.shapes >= {"tree", "q"} and not self._draws(rule):
            return (
                f"{name} is a rule for {_DRAWN[rule.draw]}, which "
                f"{drafter} cannot draw: on its trees it would be biased, or no better "
                "than verify=rejection; use that, or draft a chain."
            )
        why = getattr(self.drafter, "unsound", {}).get(self.draw_for(rule))
        return None if why is None else f"{name} would be biased on what {drafter} drafts: {why}"

    def _draws(self, rule: Verifier) -> bool:
        """Whether the drafter can draw the way the rule wants it."""
        usual = (Draw.TOP, Draw.NOISE, Draw.SAMPLE)
        return rule.draw in (*usual, *getattr(self.drafter, "draws", ()))

    def draw_for(self, rule: Verifier) -> Draw:
        """How the drafter draws for a rule."""
        return rule.draw if self._draws(rule) else Draw.SAMPLE

    def verifier_for(self, params: SamplingParams, control: Speculation = NO_WISH) -> Verifier:
        """The configured rule; at temperature 0, where every lossless rule is the greedy walk, that
        walk; and an exact rule where a request wants more than the configured one promises."""
        rule = self.configured
        needed = _PROMISES[-1] if control.promise is None else Promise(control.promise)
        strong = weaker(rule.promise, needed) is needed
        if params.greedy and (rule.promise is not Promise.LOSSY or not strong):
            return self.greedy
        if not strong:
            why = None if control.off else self._mismatch(self.exact)
            if why is not None:
                raise InputError(f"promise={needed} cannot be kept here: {why}")
            return self.exact
        if rule.name == "greedy":
            raise InputError(
                "Greedy verification needs temperature 0: use verify=replay (exact) or "
                "verify=rejection (lossless) to sample."
            )
        return rule

    def promise(self, params: SamplingParams, control: Speculation = NO_WISH) -> Promise:
        """The weaker of what the drafter and the verification rule promise."""
        rule = self.verifier_for(params, control).promise
        return rule if control.off else weaker(self.drafter.promise, rule)

    @property
    def offers(self) -> list[str]:
        """Names of the drafters a request may choose from, the default first."""
        return list(getattr(self.drafter, "offers", (self.drafter.name,)))

    def drafter_for(self, control: Speculation) -> str:
        """The name of the drafter that drafts for a request; "off" where nothing may."""
        if control.off:
            return "off"
        return control.drafter or self.offers[0]

    def check(self, params: SamplingParams, control: Speculation) -> None:
        """InputError when a request's wishes cannot be met here."""
        if control.drafter not in (None, "off", *self.offers):
            hint = registry.suggest(str(control.drafter), [*self.offers, "off"])
            raise InputError(f"There is no drafter '{control.drafter}' here: {hint}")
        if control.promise == Promise.LOSSY and not self.allow_lossy:
            raise InputError(
                "promise=lossy is not allowed here (--allow-lossy): choose exact or lossless."
            )
        if control.promise is not None:
            wanted, got = Promise(control.promise), self.promise(params, control)
            if weaker(got, wanted) is not wanted:
                raise InputError(
                    f"promise={control.promise} cannot be kept: '{self.drafter_for(control)}' is "
                    f"{got}; choose another drafter, or 'off'."
                )


def weaker(one: Promise, other: Promise) -> Promise:
    return max(one, other, key=_PROMISES.index)
