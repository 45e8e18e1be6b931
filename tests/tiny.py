"""What the evaluation tests run on: the tiny random model and a tokenizer of characters."""

from models import CONFIG, MODEL

from minikv_jax.evals.task import Lab, Settings

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.:<>-?'\"(),_"


class Characters:
    """One token a character; those it does not know are one token more."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [_LETTERS.find(c.lower()) + 1 for c in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(_LETTERS[i - 1] if 0 < i <= len(_LETTERS) else "*" for i in ids)


assert len(_LETTERS) < CONFIG.vocab_size


def lab(**settings):
    return Lab(MODEL, Characters(), Settings(**{"lengths": (64,), "limit": 2, "new_tokens": 9, **settings}))


def loaded():
    return MODEL, Characters()
