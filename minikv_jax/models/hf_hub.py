"""Models of the Hugging Face Hub by name, through `huggingface_hub`: its cache, its login and its offline mode."""

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from minikv_jax.errors import CheckpointError, UnsupportedModelError
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.json_text import read_json
from minikv_jax.models.wording import one_line

# What loading reads. Neither pickles, nor other formats' copies of the weights, nor code.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?P<file>(/{_PART})+\.gguf)?(@(?P<revision>{_PART}(/{_PART})*))?")


@dataclass(frozen=True)
class Remote:
    """A repository on the hub, one GGUF file of it or None for its safetensors, and a revision."""

    repo: str
    file: str | None
    revision: str | None


def parsed(name: str) -> Remote | None:
    """What `OWNER/NAME`, `OWNER/NAME@REVISION` or `OWNER/NAME/FILE.gguf` means; None for what is no such name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return Remote(match["repo"], match["file"] and match["file"][1:], match["revision"])


def fetch(remote: Remote) -> Path:
    """Returns the folder or file in the hub's cache, after downloading what is not there yet.

    A model that cannot run is refused by its config.json, before its weights are downloaded.

    Raises:
        CheckpointError: if there is no such model, no access, or neither a network nor a copy in the cache.
        UnsupportedModelError: if the model is of a kind this library cannot run.
    """
    from huggingface_hub import snapshot_download

    local = _is_local()
    if remote.file is not None:
        return _file(remote, remote.file, local)
    _, commit = description(remote)
    options = {"revision": commit, "local_files_only": local}
    patterns = ["config.json", "generation_config.json", *_TOKENIZER, *_WEIGHTS]
    return Path(_fetching(remote, lambda: snapshot_download(remote.repo, allow_patterns=patterns, **options)))


def description(remote: Remote) -> tuple[ModelConfig, str]:
    """What the config.json says, and the commit it is of, so that all files come from one.

    Raises:
        CheckpointError, UnsupportedModelError: as `fetch` does.
    """
    path = _file(remote, "config.json", _is_local())
    try:
        return ModelConfig.from_hf(read_json(path)), path.parent.name
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{remote.repo}: {error}") from error


def _file(remote: Remote, name: str, local: bool) -> Path:
    from huggingface_hub import hf_hub_download

    options = {"revision": remote.revision, "local_files_only": local}
    return Path(_fetching(remote, lambda: hf_hub_download(remote.repo, name, **options)))


def _is_local() -> bool:
    """Whether only the cache is asked. Where no network is, `huggingface_hub` would try for half a minute."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)


def _reachable(endpoint: str) -> bool:
    """Whether the hub answers a connection; behind a proxy, which is asked instead, it is taken to."""
    url = urlsplit(endpoint)
    if url.scheme in getproxies() and not proxy_bypass(url.hostname or ""):
        return True
    try:
        with socket.create_connection((url.hostname, url.port or {"http": 80}.get(url.scheme, 443)), timeout=10):
            return True
    except OSError:
        return False


def _fetching(remote: Remote, download: Callable[[], str]) -> str:
    """Calls `download`, and says in one line what went wrong."""
    from huggingface_hub import constants, errors

    what = f"{remote.repo} (revision {remote.revision})" if remote.revision else remote.repo
    where = constants.ENDPOINT
    try:
        return download()
    except errors.GatedRepoError:
        reason = "access must be granted: accept its terms on its page, and log in (`hf auth login`)"
    except errors.RepositoryNotFoundError:
        reason = f"{where} knows no such model, or you may not see it (`hf auth login`)"
    except errors.RevisionNotFoundError:
        reason = "the model has no such revision"
    except errors.LocalEntryNotFoundError:
        reason = (
            f"it is not in the cache {constants.HF_HUB_CACHE}, and {where} cannot be reached or offline mode is set. "
            f"Where there is a network run `hf download {remote.repo}`, and copy the folder"
        )
    except errors.EntryNotFoundError:
        reason = f"it has no {remote.file or 'config.json'}"
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.HFValidationError, OSError) as error:
        reason = one_line(error)
    raise CheckpointError(f"{what} is no path here, and the Hugging Face Hub does not give it: {reason}.") from None
