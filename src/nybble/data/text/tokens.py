"""Turns conversations into token ids with a loss mask; nothing else in nybble does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nybble.data.rows.formats import Conversation
from nybble.data.text.skeleton import Part
from nybble.data.text.template import Template, TextRun
from nybble.errors import DataError, is_panic


class EncodingError(DataError):
    """A text on which the tokenizer fails."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised conversation."""

    ids: list[int]
    trained: list[bool]
    """Which of `ids` the loss counts: answers and the tokens that end them."""


def encode(template: Template, conversations: Sequence[Conversation]) -> list[Tokens]:
    """Tokenise whole conversations, many at once.

    An answer is tokenised together with its prompt, and the prompt's ids are always those that it has on its own, so that
    training and inference see the same prompts.
    """
    return join(template.tokenizer, [template.runs(conversation) for conversation in conversations])


def encode_prompt(template: Template, conversation: Conversation) -> list[int]:
    """Token ids of a conversation that ends with a user message, up to where the assistant's answer begins."""
    (tokens,) = join(template.tokenizer, [template.prompt_runs(conversation)])
    return tokens.ids


def encode_continuation(template: Template, conversation: Conversation) -> list[int]:
    """Token ids of a conversation that ends in the middle of an answer: as in training, without the end of the answer."""
    (tokens,) = join(template.tokenizer, [template.continuation_runs(conversation)])
    return tokens.ids


def encode_text(template: Template, text: str) -> list[int]:
    """Token ids of the beginning of a document, which the model continues; they begin with BOS if the tokenizer adds one.

    Every program that reads the run's tokenizer or an artefact does the same.
    """
    begin = [template.tokenizer.bos_token_id] if template.puts_bos else []
    return begin + _ids(template.tokenizer, [text])[0]


def encode_rendered(template: Template, text: str, texts: Sequence[str]) -> list[int]:
    """Token ids of what a template rendered for messages that `Template` does not know, such as calls of functions.

    Args:
        template: that rendered it.
        text: what it rendered; its control tokens become single tokens.
        texts: of the messages.

    Raises:
        DataError: one of the messages contains a control token or word, which could not be told from the template's own.
    """
    for each in texts:
        template.check_words(each, "a message or a function")
    tokens = template.control_tokens
    written = next((token for token in tokens if any(token in each for each in texts)), None)
    if written is not None:
        raise DataError(f"a message or a function contains {written}, a control token of the template {template.name}")
    pieces = re.split(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})", text)
    encoded = iter(_ids(template.tokenizer, [piece for piece in pieces if piece and piece not in tokens]))
    return [
        token_id for piece in pieces if piece for token_id in ([tokens[piece]] if piece in tokens else next(encoded))
    ]


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """How many tokens a text has by itself."""
    return len(_ids(tokenizer, [text])[0])


def check_ids(ids: Sequence[int], rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse token ids without an embedding: torch would raise an IndexError, and CUDA would stop with an assertion.

    Args:
        ids: of a prompt or a row.
        rows: number of rows in the model's embedding.
        tokenizer: gives the token's text for the error.

    Raises:
        DataError: there is such an id; it names the first one.
    """
    invalid = next((token_id for token_id in ids if not 0 <= token_id < rows), None)
    if invalid is None:
        return
    token = f" ({tokenizer.convert_ids_to_tokens(invalid)})" if 0 <= invalid < len(tokenizer) else ""
    raise DataError(
        f"the model has no token {invalid}{token}: its embeddings are for ids 0 to {rows - 1:,}",
        fix="use the tokenizer that came with the weights; an adapter trained with added tokens needs the base that has "
        "them: --base PATH",
    )


def join(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[TextRun | Part]]) -> list[Tokens]:
    """Tokenise the results of `Template.runs`, many rows at once."""
    runs = [item for row in rows for item in row if isinstance(item, TextRun)]
    encoded = iter(_encode_runs(tokenizer, runs))
    joined = []
    for row in rows:
        ids: list[int] = []
        trained: list[bool] = []
        for item in row:
            if isinstance(item, TextRun):
                prompt, answer = next(encoded)
                ids += prompt + answer
                trained += [False] * len(prompt) + [True] * len(answer)
            else:
                ids.append(item.token_id)
                trained.append(item.trained)
        joined.append(Tokens(ids, trained))
    return joined


def _encode_runs(tokenizer: PreTrainedTokenizerBase, runs: list[TextRun]) -> list[tuple[list[int], list[int]]]:
    """Each run as the ids of its prompt and of its answer."""
    all_ids = _ids(tokenizer, [run.text for run in runs])
    mixed = [n for n, run in enumerate(runs) if 0 < run.boundary < len(run.text)]
    prompts = dict(zip(mixed, _ids(tokenizer, [runs[n].text[: runs[n].boundary] for n in mixed]), strict=True))
    pairs = []
    for n, (run, ids) in enumerate(zip(runs, all_ids, strict=True)):
        prompt = prompts.get(n, ids if run.boundary else [])
        if ids[: len(prompt)] == prompt:
            pairs.append((prompt, ids[len(prompt) :]))
        else:  # a token would span prompt and answer: the prompt keeps its own ids, and the answer continues after them
            pairs.append((prompt, _continuation(tokenizer, run.text[run.boundary :])))
    return pairs


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that continues other text: without the space that SentencePiece adds at the beginning of a text."""
    before, both = _ids(tokenizer, ["\n", "\n" + text])
    return both[len(before) :] if both[: len(before)] == before else _ids(tokenizer, [text])[0]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    try:
        ids: list[list[int]] = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
    except BaseException as error:
        if (fault := _fault(error, texts)) is None:
            raise
        raise fault from error
    return ids


def _fault(error: BaseException, texts: list[str]) -> EncodingError | None:
    """The fault that an error of the tokenizers library stands for; it raises bare Exceptions, and Rust panics that are not even
    that."""
    if isinstance(error, TypeError) and any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        return EncodingError(
            "the text contains half a surrogate pair, which is not a character", fix="write the text in UTF-8"
        )
    if not is_panic(error) and type(error) is not Exception:
        return None
    return EncodingError(
        f"the tokenizer fails on this text: {str(error).partition(chr(10))[0]:.200}",
        fix="use the tokenizer that came with the weights, or change the text",
    )
