"""A user's message as a model's chat template writes it."""

from typing import Any

from minikv_jax.errors import PromptError


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
