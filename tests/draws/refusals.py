"""What must be refused, and in which words: written from the meaning of the settings, it asks the compiler nothing."""

from __future__ import annotations

from collections.abc import Iterator

from tests.draws.recipe import BAD_RATES, BAD_RULES, GATED, LINEAR, VIEWS, Recipe


def refusals(r: Recipe) -> list[str]:
    """Why a declaration must be refused, in words that the refusal holds; empty where it must compile.

    What contradicts itself is said before what has no exact form.
    """
    said = [*_of_settings(r), *(_of_rule(r) if r.rule == "sgd" else ())]
    if r.loss == "vector":
        said.append("not a scalar")
    if said:
        return said
    return ["the loss does not depend on any state"] if r.idles else list(_without_form(r))


def _of_settings(r: Recipe) -> Iterator[str]:
    if r.mini_batch not in (1, 2, 3, 4, "all"):
        yield f"mini_batch is {r.mini_batch!r}"
    if r.read not in ("after", "before", "start", "end"):
        yield f"read is {r.read!r}"
    if r.anchor not in ("mini_batch", "token"):
        yield f"anchor is {r.anchor!r}"
    if r.steps < 1:
        yield f"steps is {r.steps}"
    if r.rule in BAD_RULES:
        yield {
            "adam": "Adam has no exact chunked form",
            "sign_sgd": "sign descent has no exact chunked form",
            "muon": "muon(5) is not linear in the gradients",
            "a number": "update is 0.1",
        }[r.rule]


def _of_rule(r: Recipe) -> Iterator[str]:
    inside, online, alone = r.read in ("after", "before"), r.anchor == "token", r.mini_batch == 1
    has_momentum, has_average = r.momentum != "none", r.average != "none"
    if r.nesterov and not has_momentum:
        yield "nesterov is set, but there is no momentum"
    elif r.ema and not has_momentum:
        yield "ema is set, but there is no momentum"
    if r.nesterov and r.ema:
        yield "nesterov and ema are both set"
    if r.decay_first and r.decay == "none":
        yield "there is no decay"
    elif r.decay_first and not (online or (alone and r.steps <= 1)):  # 0 steps are refused by themselves
        yield 'anchor is "mini_batch"'
    if r.read_scale != "none" and online and not alone:
        yield "read_scale scales what a mini-batch adds"
    if has_average and (r.read_scale != "none" or r.steps > 1 or r.at_end):
        yield "average is combined with"
    if has_average and r.read == "start":
        yield 'read="start" reads the weights before the mini-batch, average'
    if r.steps > 1 and (inside or online):
        yield f'steps is {r.steps}, with read="{r.read}"'
    if r.steps > 1 and (has_momentum or set(r.at_end) & set(VIEWS)):
        yield f"steps is {r.steps}, and the rule carries more than weights"
    if r.per not in ("token", "mini_batch"):
        yield f"per is {r.per!r}"
    elif r.per == "mini_batch":
        if inside or online:
            yield "takes the mean of the gates over the mini-batch"
        if r.ema or has_average:
            yield 'per="mini_batch" has no ema and no average'
    if r.clip is not None and r.clip <= 0:
        yield f"clip is {r.clip}"
    if r.lr in BAD_RATES and not (r.lr == "two shapes" and _is_one_along_d(r)):
        yield {
            "text": "lr is 'fast'",
            "lost param": "not declared on the class",
            "wrong states": f"lr is given for {', '.join(sorted([r.called('W0'), 'nothing']))}",
            "wrong channel": "one value per channel of Z",
            "wrong per": "is per 'chunk'",
            "two shapes": "is declared twice" if len(r.states()) > 1 else "one value per channel of D",
        }[r.lr]
    yield from _of_stages(r)


def _is_one_along_d(r: Recipe) -> bool:
    """Whether there is one state, which has a value for each channel of D."""
    dims = list(r.states().values())
    return len(dims) == 1 and "D" in dims[0]


def _of_stages(r: Recipe) -> Iterator[str]:
    if "no stage" in r.at_end:
        yield "at_end holds"
        return
    views = [name for name in r.at_end if name in VIEWS]
    if views and (r.read not in ("start", "end") or r.anchor == "token"):
        yield "use the weights of single tokens"
    if len(views) > 1:
        yield "is given two views"
    if "muon of all" in r.at_end and any(len(dims) != 2 for dims in r.states().values()):
        yield "muon orthogonalises matrices"
    of_another = any(r.states().values())  # the sum of a number is that number
    said = {
        **({"another shape": "the same shape"} if of_another else {}),
        "of no state": "is for nothing",
        "of nothing": "on is 'nothing'",
    }
    yield from (said[name] for name in dict.fromkeys(r.at_end) if name in said)


def _without_form(r: Recipe) -> Iterator[str]:
    """What has a meaning, but no exact form over a chunk of tokens."""
    alone, online = r.mini_batch == 1, r.anchor == "token" or r.mini_batch == 1
    clipped = r.clip is not None and r.gradients != "constant"
    token_by_token = online and (r.gradients == "nonlinear" or clipped)
    if token_by_token and r.read == "end" and not alone:
        yield 'read="end" reads the weights at the mini-batch\'s end'
        return
    matrix = r.use not in LINEAR and len(r.states()["W0"]) > 1 and r.own_output not in ("state", "token")
    staged = bool(r.at_end) or r.per == "mini_batch"
    # with frozen gradients the tokens of a mini-batch are one chunk; with others they can come one after the other
    inside = r.read in ("after", "before") and not online and r.gradients != "constant"
    at_end = r.read == "end" and r.read_scale in GATED and not staged and not alone and not token_by_token
    if matrix and (inside or at_end):
        yield "uses a matrix of fast weights nonlinearly"
