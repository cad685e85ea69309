"""What goes wrong between a name on a hub and its files, each in three lines."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from efficient_vlm.errors import UserError, first_line, short

_FORMS = 'a folder, or "org/name" of a model on the hub'
_AGAIN = "run it again: what has arrived is kept"


@contextlib.contextmanager
def explained(name: str, revision: str | None, nearby: Callable[[], str | None]) -> Iterator[None]:
    """Turns the exceptions of `huggingface_hub` into UserErrors.

    Args:
      name, revision: what is asked for.
      nearby: a path here that may have been meant instead, or None.
    """
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.HFValidationError:
        raise _nowhere(f"{short(name)}: no such folder, and no name on a hub", nearby()) from None
    except errors.GatedRepoError as error:
        raise _gated(name, hub, error.response.status_code) from None
    except errors.RepositoryNotFoundError:
        raise _missing(name, hub, nearby()) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{name}: no revision {short(revision)} on {hub}",
            allowed="a branch, a tag, refs/pr/NUMBER or a whole commit hash of this model",
            fix=f"leave it out, or choose one from {hub}/{name}/tree/main",
        ) from None
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__  # The cache was asked because of it.
        if isinstance(cause, errors.HfHubHTTPError):
            raise _status(name, hub, cause, nearby()) from None
        raise _unreachable(name, revision, cause, nearby()) from None
    except errors.HfHubHTTPError as error:
        raise _status(name, hub, error, nearby()) from None
    except OSError as error:
        raise UserError(
            f"{name}: {first_line(error)}",
            fix=f"{_AGAIN}; HF_HOME names another disk for the cache, now {constants.HF_HUB_CACHE}",
        ) from None
    # HTTPError is that of the HTTP library in use; RuntimeError is what hf_xet raises.
    except (errors.HTTPError, RuntimeError) as error:
        problem = f"{name}: the download broke off ({first_line(error)})"
        raise UserError(problem, fix=_AGAIN) from None


def _nowhere(problem: str, near: str | None, fix: str = "check the spelling") -> UserError:
    return UserError(problem, allowed=_FORMS, fix=f"did you mean {near}?" if near else fix)


def _missing(name: str, hub: str, near: str | None) -> UserError:
    problem = f"{name}: neither a folder here nor a model on {hub} that you may read"
    return _nowhere(
        problem, near, "check the spelling; if it is private: hf auth login, or HF_TOKEN"
    )


def _gated(name: str, hub: str, status: int) -> UserError:
    """401 is for strangers, 403 for users that are not on the list."""
    if status == 401:
        fix = f"accept its terms at {hub}/{name}, then log in: hf auth login, or set HF_TOKEN"
    else:
        fix = f"ask for access at {hub}/{name}, as the user whose token is in use"
    return UserError(f"{name}: gated, its files are for users who accepted its terms", fix=fix)


def _status(name: str, hub: str, error: Any, near: str | None) -> UserError:
    """The error for an answer that is an error of its own: no access, too often, broken."""
    status, said = error.response.status_code, error.server_message or ""
    badly = "credentials" in said.lower()
    # For an endpoint without TLS, or another hub, the library does not know what these mean.
    if status == 404 or (status == 401 and not badly):
        return _missing(name, hub, near)
    said = f" ({short(said.splitlines()[0])})" if said else ""
    fix = "log in as somebody who may read it: hf auth login, or set HF_TOKEN"
    if status == 429 or status >= 500:
        fix = "wait a little and run it again"
    return UserError(f"{name}: {hub} answers with status {status}{said}", fix=fix)


def _unreachable(
    name: str, revision: str | None, cause: BaseException | None, near: str | None
) -> UserError:
    """The error where only the cache could be asked, and does not have it."""
    from huggingface_hub import constants

    hint = f"; or did you mean {near}?" if near else ""
    what = name if revision is None else f"{name} at revision {short(revision)}"
    if constants.HF_HUB_OFFLINE:
        return UserError(
            f"{what}: no folder here, and not (all of it) in the cache {constants.HF_HUB_CACHE}",
            fix=f"load it once without HF_HUB_OFFLINE and with a network{hint}",
        )
    why = f" ({short(first_line(cause))})" if cause is not None else ""
    return UserError(
        f"{what}: no folder here, not in the cache, and no answer from {constants.ENDPOINT}{why}",
        fix=f"check the network, HF_ENDPOINT and proxies, or copy the model's folder here{hint}",
    )
