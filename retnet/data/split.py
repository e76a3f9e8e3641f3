"""Which text is trained on and which is held back.

The decision about one document depends on that document alone (its hash or its length), so the
validation side can be rebuilt later in one pass, and equal documents always land on one side.
"""

import hashlib
import logging
import re
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from retnet.data.record import NULL, entry, unusable
from retnet.data.spec import DataSpec
from retnet.errors import UserError

logger = logging.getLogger(__name__)

MIN_DOCUMENTS = 20
MAX_SHARE = 0.05
HASH_RANGE = 1 << 64
Kind = Literal["documents", "tail", "given"]


def document_hash(encoded: bytes) -> int:
    """A uniform integer in [0, 2**64) that only depends on the document's UTF-8 bytes."""
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "little")


class DocumentsHash:
    """The sha256 of a sequence of documents, boundaries included."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, encoded: bytes) -> None:
        """Append one document's UTF-8 bytes."""
        self._hash.update(len(encoded).to_bytes(8, "little"))
        self._hash.update(encoded)

    def hexdigest(self) -> str:
        """The hash of the documents so far."""
        return self._hash.hexdigest()


@dataclass
class Survey:
    """What one pass over a source found: 16 bytes a document."""

    sizes: array  # UTF-8 bytes of each document
    hashes: array  # document_hash of each document
    sha256: str  # of all documents in order

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(self.sizes)


@dataclass(frozen=True)
class SplitRule:
    """How a document is divided between training and validation.

    ``documents``: whole documents, those with a hash below ``threshold`` are validation.
    ``tail``: the last ``fraction`` of each document's characters is validation.
    ``given``: validation comes from elsewhere, every document is training.

    A rule ``within`` another one divides what that leaves for training; what that one holds back is
    on neither side then.
    """

    kind: Kind
    fraction: float = 0.0
    threshold: int = 0
    within: "SplitRule | None" = None

    def divide(self, text: str) -> tuple[str, str]:
        """The training part and the validation part of a document; either may be empty."""
        if self.within is not None:
            text, _ = self.within.divide(text)
        if self.kind == "documents":
            return ("", text) if document_hash(text.encode()) < self.threshold else (text, "")
        if self.kind == "tail":
            # As int(n * 0.9) elsewhere; a cut between characters is a cut between UTF-8 sequences.
            cut = max(1, int(len(text) * (1.0 - self.fraction)))
            return text[:cut], text[cut:]
        return text, ""

    def to_record(self) -> dict[str, Any]:
        """A JSON-able form (the threshold in hex: not every reader of JSON has 64-bit integers)."""
        own = asdict(self) | {"threshold": f"{self.threshold:x}"}
        del own["within"]
        return own if self.within is None else own | {"within": self.within.to_record()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "SplitRule":
        """The inverse of ``to_record``; a ``ValueError`` that names what is wrong with an entry."""
        kind, fraction = entry(record, "kind", str), entry(record, "fraction", float, int)
        threshold = entry(record, "threshold", str)
        if kind not in get_args(Kind):
            raise unusable(record, "kind")
        if not 0 <= fraction < 1:  # which nan is not either
            raise unusable(record, "fraction")
        if not re.fullmatch("[0-9a-f]{1,17}", threshold) or int(threshold, 16) > HASH_RANGE:
            raise unusable(record, "threshold")
        within = entry(record, "within", dict, NULL, missing=None)
        within = None if within is None else cls.from_record(within)
        return cls(kind, float(fraction), int(threshold, 16), within)


def survey_documents(documents: Iterable[bytes]) -> Survey:
    """Measure and hash each document's UTF-8 bytes."""
    sizes, hashes, total = array("Q"), array("Q"), DocumentsHash()
    for encoded in documents:
        sizes.append(len(encoded))
        hashes.append(document_hash(encoded))
        total.add(encoded)
    return Survey(sizes, hashes, total.hexdigest())


def choose_tuning_split(
    rule: SplitRule, survey: Survey | None, fraction: float, source: str, *, whole: bool = False
) -> SplitRule:
    """The rule that divides the training side of ``rule`` in the same way, to choose settings by.

    A ``UserError`` as of ``choose_split``.
    """
    if rule.kind == "tail":
        return SplitRule("tail", fraction, within=rule)
    hashes = None if survey is None else np.frombuffer(survey.hashes, dtype=np.uint64)
    if hashes is not None and survey is not None and rule.kind == "documents":
        left = np.flatnonzero(hashes >= np.uint64(rule.threshold))
        survey = Survey(
            array("Q", np.frombuffer(survey.sizes, dtype=np.uint64)[left].tolist()),
            array("Q", hashes[left].tolist()),
            survey.sha256,
        )
    chosen = choose_split(survey, fraction, source, above=rule.threshold, whole=whole)
    return replace(chosen, within=rule)


def choose_split(
    survey: Survey | None, fraction: float, source: str, *, above: int = 0, whole: bool = False
) -> SplitRule:
    """The rule for a source without validation data of its own; neither side will be empty.

    Whole documents by hash when there are at least 20 and none holds more than 5 % of the bytes,
    else (or when all documents are equal) the tail of each; a ``UserError`` where it is too short.
    Without a survey (of a stream) by hash, and a side may turn out to be empty. Only documents with
    hashes from ``above`` on are there. With ``whole`` none is cut, however few there are: a part of
    a conversation is none.
    """
    threshold = above + int(fraction * (HASH_RANGE - above))
    if survey is None:
        return SplitRule("documents", fraction, threshold)
    sizes = np.frombuffer(survey.sizes, dtype=np.uint64)
    hashes = np.frombuffer(survey.hashes, dtype=np.uint64)
    total = int(sizes.sum())
    if whole or (len(sizes) >= MIN_DOCUMENTS and int(sizes.max()) <= MAX_SHARE * total):
        smallest, largest = int(hashes.min()), int(hashes.max())
        if smallest < largest:
            # A side that chance left empty gets the one document nearest to the threshold.
            threshold = min(max(threshold, smallest + 1), largest)
            return SplitRule("documents", fraction, threshold)
    if whole:
        raise UserError(
            f"data.source ({source}) has one conversation, or equal ones, and a part of one is not "
            "held back: use more, or name others in data.validation"
        )
    # Bytes bound characters from above: exact counting is only needed near the limit, where the
    # writer of the token files checks again.
    if int(sizes.max()) < 2:
        raise UserError(
            f"data.source ({source}) is too short to hold anything back for validation: "
            "use a larger text, or name one in data.validation"
        )
    return SplitRule("tail", fraction)


def check_held_back(spec: DataSpec, trained: Survey, given: Survey) -> None:
    """Raise a ``UserError`` where all of the validation text is trained on; warn of a part."""
    total = len(given.hashes)
    both = int(np.isin(given.hashes, trained.hashes).sum())
    if both == total:
        raise not_held_back(spec)
    if both:
        logger.warning(
            f"data.validation ({spec.validation}): {both:,} of its {total:,} documents are in "
            f"data.source ({spec.source}) too, and what is trained on makes the loss less"
        )


def not_held_back(spec: DataSpec) -> UserError:
    """The error for a validation text that is trained on."""
    return UserError(
        f"data.validation ({spec.validation}): all of its documents are in data.source "
        f"({spec.source}) too, and a loss on text that is trained on tells nothing: name another "
        "text, or leave data.validation out, which holds text back"
    )
