"""A JAX model behind lm-eval's interface: log-likelihoods, and text until a stop string."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from train.chat.speaker import Manner, Speaker
from train.harness.batches import Pair, make_batches, parts_of, power_of_two
from train.harness.scoring import Scorer
from train.report.terminal import RequestProgress
from train.run_folder.errors import RunError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

GENERATION_KEYS = ("do_sample", "until", "temperature", "top_k", "top_p", "seed")
GENERATION_KEYS += ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class JaxLM(TemplateLM):
    """A causal language model, plain or adapted, with its tokenizer.

    Texts become tokens as in lm-eval's own `hf` model: with the tokenizer's special tokens, unless the text begins with
    the first of them. A text that is too long for the model loses its first tokens, and is counted.

    Args:
      model: from `melora_jax.from_pretrained(..., task="causal-lm")`.
      tokenizer: its tokenizer.
      batch_size: contexts computed together.
      max_length: tokens of context and answer together; None takes the model's own limit.
      seed: of drawn tokens.
      mesh: where the model lies; None for one device.

    Attributes:
      shortened: how many requests lost their first tokens.
      name: lm-eval's name for the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 0,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        self.max_length: int = min(model.max_length, max_length or model.max_length)
        self.shortened = 0
        self._model, self._batch_size, self._seed, self._mesh = model, batch_size, seed, mesh

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the tokenizer's first token, or the one that ends a text."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text."""
        first = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (first and string.startswith(first))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether it is the likeliest."""
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of whole texts, each token once; long texts in windows of the model's length."""
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [Pair(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, windows)]
            pairs += parts
            counts.append(len(parts))
        scores = iter(self._scores(pairs, "texts"))
        return [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([self._fitted(context, end) for _, context, end in requests], "log-likelihoods")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to a stop string, its end, or the limit of new tokens."""
        manners: dict[Manner, list[int]] = {}
        for place, request in enumerate(requests):
            arguments: Any = request.args
            manners.setdefault(manner_of(arguments[1], self._seed), []).append(place)
        texts = [""] * len(requests)
        with RequestProgress("answers", len(requests)) as progress, self._in_force():
            for manner, places in manners.items():
                self.require_room({"max_gen_toks": manner.max_new_tokens}, "a request")
                prompts = {place: self._prompt(requests[place].args[0], manner.max_new_tokens) for place in places}
                order = sorted(places, key=lambda place: -len(prompts[place]))
                speaker = Speaker(self._model, self.tokenizer, None, manner)
                for number, some in enumerate(parts_of(order, self._batch_size)):
                    answers = self._answers(speaker, [prompts[place] for place in some], number)
                    for place, text in zip(some, answers, strict=True):
                        texts[place] = text
                    progress.advance(len(some))
        return texts

    def require_room(self, settings: Mapping[str, Any], place: str) -> None:
        """Raises ValueError if settings of a generation are unknown, or new tokens leave no room for a prompt."""
        try:
            new = manner_of(settings, self._seed).max_new_tokens
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if new >= self.max_length:
            raise ValueError(
                f"{place}: {new:,} new tokens leave no room for a prompt in the model's {self.max_length:,}; leave out"
                " the task"
            )

    def _fitted(self, context: Sequence[int], end: Sequence[int]) -> Pair:
        """The two, without the first tokens that don't fit into the model; the last token is not an input."""
        if not end:
            raise RunError(
                "a continuation has no token of its own: the tokenizer takes its letters and the context's last ones"
                " for one token; let the task's target_delimiter begin it with a space"
            )
        if len(end) > self.max_length:
            raise RunError(
                f"a continuation has {len(end):,} tokens, the model takes at most {self.max_length:,}; leave it out"
            )
        room = self.max_length + 1 - len(end)
        self.shortened += len(context) > room
        return Pair(tuple(context[-room:]), tuple(end))

    def _prompt(self, text: str, new: int) -> np.ndarray:
        room = self.max_length - new
        ids = self.tok_encode(text) or [self.prefix_token_id]
        self.shortened += len(ids) > room
        return np.array(ids[-room:], np.int32)

    def _scores(self, pairs: Sequence[Pair], what: str) -> list[tuple[float, bool]]:
        vocabulary = self._model.sizes.vocab_size
        if any(max(*pair.context, *pair.continuation) >= vocabulary for pair in pairs):
            raise RunError(f"a token is outside the model's {vocabulary:,}; use the tokenizer of this checkpoint")
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        scorer = Scorer(self._model, self._mesh)
        with RequestProgress(what, len(pairs)) as progress, self._in_force():
            for batch in make_batches(pairs, self._batch_size):
                found, greedy = map(np.asarray, scorer(batch))
                rows = len(batch.requests)
                if not np.isfinite(found[:rows]).all():
                    raise RunError(
                        "a log-likelihood is not finite; the weights or the adapter hold NaN or overflow the dtype:"
                        " fetch or train them again, or evaluate in float32"
                    )
                for place, one, likeliest in zip(batch.requests, found, greedy, strict=False):
                    scores[place] = float(one), bool(likeliest)
                progress.advance(rows)
        return scores

    def _answers(self, speaker: Speaker, prompts: list[np.ndarray], number: int) -> list[str]:
        """Answers in batches of few sizes: the last prompt is repeated up to the next size."""
        full = prompts + [prompts[-1]] * (power_of_two(len(prompts)) - len(prompts))
        answers = speaker.answer(full, number, shrink=self._mesh is None)
        try:
            for _ in answers:
                pass
        except ValueError as error:
            raise RunError(str(error)) from error
        return answers.texts[: len(prompts)]

    def _in_force(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def manner_of(settings: Mapping[str, Any], seed: int) -> Manner:
    """lm-eval's settings of a generation as ours.

    Raises:
      ValueError: a setting is not supported.

    >>> manner_of({"until": ["Q:"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.5}, 3).temperature
    0.5
    """
    unknown = [key for key in settings if key not in GENERATION_KEYS]
    if unknown:
        raise ValueError(f"generation setting {unknown[0]!r} is not known here; there are {', '.join(GENERATION_KEYS)}")
    known: dict[str, Any] = {**normalize_gen_kwargs(dict(settings))}
    return Manner(
        max_new_tokens=known["max_gen_toks"],
        temperature=known["temperature"] if known["do_sample"] else 0.0,
        top_k=known.get("top_k") or None,
        top_p=known.get("top_p"),
        seed=known.get("seed", seed),
        stop=tuple(stop for stop in known["until"] if stop),
    )
