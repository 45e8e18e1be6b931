"""transformers' tokenizer, with errors for people. Importing this module imports transformers, which takes seconds."""

import functools
from typing import Any

from transformers import PreTrainedTokenizerFast

from minikv_jax.models.refusing import refusing


def _guarded(name: str, message: str, *others: type[Exception]) -> Any:
    method = getattr(PreTrainedTokenizerFast, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with refusing(message, *others):
            return method(self, *args, **kwargs)

    return call


_ENCODING = "The tokenizer is damaged: it cannot encode this text"
_DECODING = "The tokenizer is damaged: it cannot decode these tokens"


# The name is what `save_pretrained` writes down, for AutoTokenizer to look up.
class TokenizersBackend(PreTrainedTokenizerFast):
    """Raises CheckpointError where a damaged tokenizer fails at a text or at tokens that it meets."""

    __call__ = _guarded("__call__", _ENCODING)
    encode = _guarded("encode", _ENCODING)
    tokenize = _guarded("tokenize", _ENCODING)
    decode = _guarded("decode", _DECODING)
    batch_decode = _guarded("batch_decode", _DECODING)
    convert_tokens_to_string = _guarded("convert_tokens_to_string", _DECODING)
    apply_chat_template = _guarded(
        "apply_chat_template", "The tokenizer's chat template cannot be applied to these messages", Exception
    )
