"""The quickstart's task: be upbeat. Real conversations in, prompts, replies and a gold score out.

Source: the 7,168 human conversations of the package ``chitchat-dataset`` (MIT, BYU), whose partners rated each other,
and the lexicon of ``vaderSentiment`` (MIT) as the *gold* reward. Both come with the extra ``[demo]``.

Every conversation plays exactly one role (`ROLES`), decided by the hash of its id, so that what the base model was
trained on never shows up as SFT data, a preference, an RL prompt or an evaluation prompt.

Departs from the data set: bursts of messages are joined into one turn; messages that carry a link, an e-mail address
or a telephone number are dropped; conversations are cut at the first turn that this leaves empty.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

ROLES = {
    "base": 0.74,
    "validation": 0.02,
    "sft": 0.10,
    "preferences": 0.05,
    "rl": 0.05,
    "eval": 0.04,
}
"""Share of the conversations that each role holds; the first two belong to ``make base-model``."""

UPBEAT_RATING = 8
"""SFT learns from conversations that a partner rated at least this upbeat (1 to 10)."""

REPLY_CHARACTERS = (8, 90)
PROMPT_CHARACTERS = (3, 120)
CONTEXT_TURNS = 3

_PRIVATE = re.compile(r"https?://|www\.|\S@\S+\.\S|\+?\d[\d\-\s().]{7,}\d")


def role_of(conversation_id: str) -> str:
    """Role of a conversation: a pure function of its id, in the shares of `ROLES`."""
    position = int(hashlib.sha256(conversation_id.encode()).hexdigest()[:12], 16) / 16**12
    for role, share in ROLES.items():
        position -= share
        if position < 0:
            return role
    return "base"


def conversations(role: str) -> Iterator[tuple[list[str], int | None]]:
    """Yield ``(turns, upbeat rating or None)`` of each conversation of `role`; turns alternate speakers."""
    for conversation_id, record in _dataset().items():
        if role_of(conversation_id) == role:
            turns = _clean(record["messages"])
            if turns:
                yield turns, record.get("ratings", {}).get("upbeat")


def sft_replies() -> list[dict]:
    """Prompt/completion rows: replies out of conversations that were rated upbeat."""
    return [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": reply}]}
        for turns, upbeat in conversations("sft")
        if upbeat is not None and upbeat >= UPBEAT_RATING
        for prompt, reply in _exchanges(turns)
        if REPLY_CHARACTERS[0] <= len(reply) <= REPLY_CHARACTERS[1]
    ]


def preference_prompts() -> list[dict]:
    """Prompts on which the SFT models' replies are compared."""
    return _prompts("preferences")


def rl_prompts() -> list[dict]:
    """Prompts on which the policy is trained."""
    return _prompts("rl")


def eval_prompts() -> list[dict]:
    """Prompts that nothing has been trained on."""
    return _prompts("eval")


def gold(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each response, in [-1, 1]: what "upbeat" means here."""
    analyzer = _analyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


def _prompts(role: str) -> list[dict]:
    return [
        {"prompt": prompt} for turns, _ in conversations(role) for prompt, _ in _exchanges(turns)
    ]


def _exchanges(turns: list[str]) -> Iterator[tuple[list[dict], str]]:
    """Every (last few turns, the reply to them); the speaker who replies is the assistant."""
    for reply in range(1, len(turns)):
        count = min(CONTEXT_TURNS, reply)
        count -= (
            count + 1
        ) % 2  # an odd number of turns: the context starts and ends with the user
        context = turns[reply - count : reply]
        if (
            PROMPT_CHARACTERS[0] <= len(context[-1])
            and sum(map(len, context)) <= PROMPT_CHARACTERS[1]
        ):
            yield (
                [
                    {"role": "assistant" if i % 2 else "user", "content": text}
                    for i, text in enumerate(context)
                ],
                turns[reply],
            )


def _clean(messages: list[list[dict]]) -> list[str]:
    turns = []
    for burst in messages:
        texts = (unicodedata.normalize("NFKC", message["text"]) for message in burst)
        kept = (" ".join(text.split()) for text in texts if not _PRIVATE.search(text))
        turn = " ".join(text for text in kept if text)
        turn = turn.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
        if not turn:
            break
        turns.append(turn)
    return turns


@lru_cache(maxsize=1)
def _dataset() -> dict:
    try:
        import chitchat_dataset
    except ImportError as error:
        raise _missing("chitchat-dataset") from error
    return dict(chitchat_dataset.Dataset())


@lru_cache(maxsize=1)
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise _missing("vaderSentiment") from error
    return SentimentIntensityAnalyzer()


def _missing(package: str) -> Exception:
    from salsa.errors import DataError

    return DataError(
        f"the quickstart needs the package {package}. Install it: pip install 'salsa-rlhf[demo]'"
    )
