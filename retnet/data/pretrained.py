"""Tokenizers that others trained: a local folder, the local cache of the Hub, or the Hub."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retnet.data.network import HubUnreachableError, hub_revision, while_reachable
from retnet.errors import UserError
from retnet.paths import expand, kind_of


def load_pretrained(name: str, lacking: dict[str, str]) -> PreTrainedTokenizerFast:
    """A pretrained tokenizer, with the tokens of ``lacking`` (bos, eos, pad) where it has none.

    Raises:
        UserError: There is no such tokenizer or it is not a fast one.
    """
    tokenizer = _load(name)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"data.tokenizer ({name}) has no tokenizer.json: convert it to a fast tokenizer"
        )
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True
    for kind in ("eos", "bos", "pad"):
        current = getattr(tokenizer, f"{kind}_token")
        if current is None or (kind == "pad" and current == tokenizer.eos_token):
            tokenizer.add_special_tokens({f"{kind}_token": lacking[kind]})
    return tokenizer


def _load(name: str) -> PreTrainedTokenizerBase:
    what = f"data.tokenizer ({name})"
    folder = expand(name, "data.tokenizer")
    kind = kind_of(folder, "data.tokenizer")
    if kind != "folder" and (
        kind is not None or name.startswith(("/", ".", "~")) or name.count("/") > 1
    ):
        raise UserError(f"{what} is not a folder: name the folder that holds tokenizer.json")
    try:
        return _from_pretrained(str(folder) if kind else name, local_files_only=True)
    except Exception as error:  # missing, damaged and unknown files each raise another kind
        if kind == "folder":
            raise UserError(
                f"{what} is a folder without a tokenizer that can be read "
                f"({' '.join(str(error).split())}): name one with tokenizer.json"
            ) from error
    revision = hub_revision(name, "model", what)  # it is not in the local cache
    try:
        return while_reachable(
            lambda: _from_pretrained(name, revision=revision), name, "model", what
        )
    except HubUnreachableError:
        raise
    except Exception as error:
        raise UserError(
            f"{what} cannot be loaded from the Hub "
            f"({' '.join(str(error).split())}): name a repository with tokenizer.json"
        ) from error


def _from_pretrained(name: str, **options: Any) -> PreTrainedTokenizerBase:
    # Without a word on remote code transformers would ask on the terminal whether to run it.
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
