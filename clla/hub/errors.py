"""What the Hub and the way to it can refuse, said so that a user knows what to do."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clla.errors import CllaError, UsageError

TRANSPORT = ("httpx", "httpcore", "hf_xet")  # modules whose errors speak of the connection; httpx2 is among them
TOKENS = "https://huggingface.co/settings/tokens"
LOGIN = f"make one at {TOKENS}, then run: hf auth login (or set HF_TOKEN)"


def explain(error: BaseException, doing: str, *, again: str = "try again") -> CllaError:
    """An error of huggingface_hub, its transport or its storage client as one of ours.

    Args:
        error: what was raised; of a chain, the cause that came from the Hub is explained.
        doing: what failed, e.g. `me/model cannot be written to`.
        again: what to do once the reason is gone.
    """
    if isinstance(error, CllaError):
        return error
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain) or _is_offline(chain):
        return CllaError(
            f"{doing}: HF_HUB_OFFLINE=1 forbids the network",
            expected="the network, or files that were downloaded before",
            remedy=f"unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE), then {again}",
        )
    for found in chain:
        if isinstance(found, HFValidationError):
            return bad_name(doing, str(found))
        if isinstance(found, LocalTokenNotFoundError):
            return no_token(doing)
        if isinstance(found, HfHubHTTPError):
            return _refused(found, doing, again)
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return CllaError(f"{doing}: {_line(error)}", expected="a model's repository", remedy="check the name")
    if any(isinstance(e, OSError) or type(e).__module__.startswith(TRANSPORT) for e in chain):
        return CllaError(
            f"{doing}: {constants.ENDPOINT} cannot be reached, or the connection broke ({_line(chain[-1])})",
            expected="a connection to the Hub",
            remedy=f"check the network, then {again}",
        )
    return CllaError(
        f"{doing}: {type(error).__name__}: {_line(error)}", expected="an answer that is understood", remedy=again
    )


def bad_name(doing: str, why: str) -> UsageError:
    """The name of a repository breaks the Hub's rules."""
    return UsageError(
        f"{doing}: {why.rstrip('.')}",
        expected="NAMESPACE/NAME of letters, digits, '-', '_' and '.'",
        remedy="correct the name",
    )


def no_token(doing: str) -> CllaError:
    return CllaError(f"{doing}: there is no Hub token", expected="a token with write access", remedy=LOGIN)


def wrong_token(doing: str) -> CllaError:
    return CllaError(
        f"{doing}: the Hub does not know the token (401)",
        expected="a valid token",
        remedy=f"{LOGIN}; HF_TOKEN, if it is set, goes before the stored one",
    )


def no_write_access(doing: str, why: str) -> CllaError:
    return CllaError(
        f"{doing}: {why}",
        expected="a token of the kind 'write', or a fine-grained one that may write to this repository",
        remedy=LOGIN,
    )


def _refused(error: HfHubHTTPError, doing: str, again: str) -> CllaError:
    """An answer that is not a success."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return CllaError(
            f"{doing}: its owner gives access one by one",
            expected="a token of an account that has access",
            remedy=f"ask for access on the model's page, then {again}",
        )
    if isinstance(error, RevisionNotFoundError):
        return CllaError(
            f"{doing}: there is no such revision", expected="a branch, a tag or a commit", remedy="check it"
        )
    if isinstance(error, EntryNotFoundError):
        return CllaError(f"{doing}: {_line(error)}", expected="a model's repository", remedy="check the name")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return CllaError(
            f"{doing}: there is no such repository, or it is private and your token cannot see it ({status})",
            expected="a repository that exists",
            remedy="check the name; for a private one run: hf auth login",
        )
    if status == 401:
        return wrong_token(doing)
    if status == 403:
        return no_write_access(doing, f"the token is not allowed to (403{_reason(error)})")
    if status == 429:
        return CllaError(
            f"{doing}: too many requests (429)", expected="fewer of them", remedy=f"wait some minutes, then {again}"
        )
    if status >= 500:
        return CllaError(
            f"{doing}: the Hub is in trouble ({status}{_reason(error)})",
            expected="a Hub that answers; see https://status.huggingface.co",
            remedy=f"wait, then {again}",
        )
    return CllaError(
        f"{doing}: the Hub refuses it ({status}{_reason(error)})",
        expected="a request that it accepts",
        remedy=f"correct what it names, then {again}",
    )


def _reason(error: HfHubHTTPError) -> str:
    return f": {error.server_message}" if error.server_message else ""


def _is_offline(chain: list[BaseException]) -> bool:
    return constants.HF_HUB_OFFLINE and any(isinstance(error, LocalEntryNotFoundError) for error in chain)


def _line(error: BaseException) -> str:
    """What an error says, in one line; its class where it says nothing."""
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__
