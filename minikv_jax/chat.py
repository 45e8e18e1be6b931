"""A user's message as a model's chat template writes it."""

from typing import Any

from minikv_jax.errors import PromptError

_HERE = "\ue000"  # of Unicode's private use: no text has it


def around(tokenizer: Any, text: str) -> tuple[str, str]:
    """What a user's message is, up to the end of `text`, and what comes after a question that follows it there.

    Raises:
        PromptError: as `as_message`; the template does not keep messages as they are.
    """
    before, found, after = as_message(tokenizer, text + _HERE).partition(_HERE)
    if not found or _HERE in after:
        raise PromptError(
            "The model's chat template changes a user's message: use --raw, for the text and the question."
        )
    return before, after


def as_message(tokenizer: Any, text: str) -> str:
    """The text as a user's message, up to where the answer begins.

    Raises:
        PromptError: the template, a program that comes with the model, fails or refuses the message.
    """
    messages = [{"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever its program does wrong
        raise PromptError(
            f"The model's chat template fails on a user's message ({type(error).__name__}: {error}): mend or remove "
            "it, or have `minikv generate --raw` continue plain text."
        ) from error
