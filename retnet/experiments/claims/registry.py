"""All claims, in the order of docs/claims.md."""

from collections.abc import Sequence

from retnet.errors import UserError
from retnet.experiments.claims import approximation, costs, forms, quality, relatives
from retnet.experiments.claims.claim import Claim

CLAIMS = {
    claim.name: claim
    for room in (forms, costs, relatives, approximation, quality)
    for claim in room.CLAIMS
}


def chosen(names: Sequence[str], *, train: bool) -> list[Claim]:
    """The claims of these names, each once; all that can be measured where there are none.

    Raises:
        UserError: There is no such claim, or it needs training and ``train`` is False.
    """
    for name in names:
        if name not in CLAIMS:
            raise UserError(f"claim ({name}) is none of {', '.join(CLAIMS)}")
        if CLAIMS[name].trains and not train:
            raise UserError(f"claim ({name}) needs trained models: add --train")
    wanted = dict.fromkeys(names or CLAIMS)
    return [CLAIMS[name] for name in wanted if train or not CLAIMS[name].trains]
