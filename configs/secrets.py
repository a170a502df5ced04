"""Secrets in URLs: user info and queries (signatures, tokens) are refused as input, and never printed or stored."""

import re

# scheme, user info, the rest, query; a password may have slashes, a port before a path is none
URL = re.compile(
    r"(?P<scheme>[A-Za-z][\w+.-]*://)"
    r"(?P<user>[^\s/@:'\"]*:(?!\d+/)[^\s@'\"]*@|[^\s/@:'\"?#]*@)?"
    r"(?P<rest>[^\s?'\"<>]*)(?P<query>\?[^\s'\"<>]*)?"
)
HIDDEN = "***"
WAY_OUT = (
    "they would end up in logs and run folders: drop them if the URL works without (?download=1), store credentials "
    "where the protocol's package reads them (~/.aws/credentials, AWS_ACCESS_KEY_ID, ~/.netrc), or download the file "
    "of a signed URL first"
)


def _hide(url: re.Match) -> str:
    scheme, user, rest, query = url["scheme"], url["user"] or "", url["rest"], url["query"] or ""
    account = scheme == "az://" and ":" not in user  # container@account is no secret
    return f"{scheme}{user if account or not user else f'{HIDDEN}@'}{rest}{f'?{HIDDEN}' if query else ''}"


def without_secrets(text: str) -> str:
    """Text whose URLs have `***` in place of user info and query."""
    return URL.sub(_hide, text) if "://" in text else text


def has_secret(text: str) -> bool:
    """Whether a URL in a text has user info or a query."""
    return "://" in text and without_secrets(text) != text
