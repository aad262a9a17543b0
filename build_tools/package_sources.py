"""Where packages come from: pip's own settings, handed on to uv.

A machine is prepared for pip once (an index, a mirror, a folder of wheels, a certificate). uv reads none of
pip's settings, so they are translated here into uv's environment variables. What a person has already set
for uv stays. This file must not name any index: the addresses are the machine's business.
"""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

# pip's setting -> uv's environment variable and the separator between several values.
_TRANSLATION = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "cert": ("SSL_CERT_FILE", " "),
}
# uv's older names of the same variables: where a person set one of these, the newer one is left unset.
_SYNONYMS = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}


def read_pip_settings(python: Path) -> dict[str, str]:
    """pip's settings by bare name (`find-links`), as the given interpreter's pip sees them.

    The environment wins over the `install` section, which wins over `global`, as in pip itself. An
    interpreter without pip has no settings.
    """
    listing = subprocess.run(
        [str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    by_section: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        key, _, quoted = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in by_section and quoted:
            by_section[section][name] = str(ast.literal_eval(quoted))
    return {**by_section["global"], **by_section["install"], **by_section[":env:"]}


def uv_environment(settings: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for uv: `environment`, completed by pip's `settings` where nothing was set for uv."""
    result = dict(environment)
    for name, (variable, separator) in _TRANSLATION.items():
        value = separator.join(settings.get(name, "").split())
        if value and variable not in result and _SYNONYMS.get(variable, variable) not in result:
            result[variable] = value
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        result.setdefault("UV_NO_INDEX", "1")
    # pip looks in all of its sources for the best version; uv by default stops at the first that knows the
    # name. The locks pin every file by its hash, so that a second source cannot slip in another one.
    result.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return result
