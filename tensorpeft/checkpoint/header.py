"""The header of a file, all that it says beside its tensors: a value, and its canonical text.

The text is JSON with sorted keys and without spaces, so that equal headers have equal bytes. It holds its own SHA-256,
so that no part of it, the spec's text least of all, can be changed by accident and still be believed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from tensorpeft.language.errors import CheckpointError, listing

FORMAT = 1
# torch's name -> safetensors'
DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64"}
_LARGEST = 16 * 2**20  # characters: a mixture of 100,000 experts needs a quarter of it

SiteRow = tuple[str | int, ...]  # matrix, layer, d_out, d_in, and the expert if there are several


@dataclass(frozen=True)
class SavedFactor:
    """One tensor of a factor, or one trained parameter of the base, as it was when it was saved."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    sha256: str  # of dtype, shape and numbers: see files.digest
    stored: bool  # False: the file does not hold it, the spec's seed gives it
    mask: str | None  # SHA-256 of what the spec's masks keep of it; None: it has no mask


@dataclass(frozen=True)
class Header:
    """Everything that a file says beside the numbers of its tensors."""

    spec: str  # canonical YAML text
    model: str  # name of the base that it was saved from; said in errors, never looked up
    sites: tuple[SiteRow, ...]  # of that base, in the order of the factors' site axes
    factors: dict[str, SavedFactor]  # and parameters of the base, under ``base.<path>``
    library: str  # version that wrote the file

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the sites in order, in hexadecimal."""
        return sha256(_canonical(self.sites).encode()).hexdigest()


def header_text(header: Header) -> str:
    """The canonical text of a header."""
    base = {"model": header.model, "fingerprint": header.fingerprint, "sites": header.sites}
    factors = {name: vars(factor) for name, factor in header.factors.items()}
    plain = {"format": FORMAT, "library": header.library, "spec": header.spec, "base": base, "factors": factors}
    return _signed(plain)


def parse_header(text: str) -> Header:
    """The header that a text says.

    Raises:
        CheckpointError: it is of another format version, damaged, or no header at all.
    """
    plain = _object(text)
    found = json.dumps(plain["format"])[:40] if "format" in plain else "none"
    if found != str(FORMAT):
        raise CheckpointError(f"format version {found} was found, expected {FORMAT}")
    if text != _signed({key: value for key, value in plain.items() if key != "sha256"}):
        raise CheckpointError("its metadata is damaged: it does not have the SHA-256 that it says")
    _validate(plain)
    header = Header(
        spec=plain["spec"],
        model=plain["base"]["model"],
        sites=tuple(map(tuple, plain["base"]["sites"])),
        factors={
            name: SavedFactor(**{**each, "shape": tuple(each["shape"])}) for name, each in plain["factors"].items()
        },
        library=plain["library"],
    )
    if header.fingerprint != plain["base"]["fingerprint"]:
        raise CheckpointError("its metadata contradicts itself: the fingerprint is not that of its sites")
    return header


def _signed(plain: dict[str, Any]) -> str:
    return _canonical({**plain, "sha256": sha256(_canonical(plain).encode()).hexdigest()})


def _canonical(plain: object) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _object(text: str) -> dict[str, Any]:
    if len(text) > _LARGEST:
        raise CheckpointError(f"its metadata has {len(text):,} characters, expected at most {_LARGEST:,}")
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        raise CheckpointError("its metadata is damaged: found no JSON object")
    return plain


def _validate(plain: dict[str, Any]) -> None:
    from jsonschema import Draft202012Validator  # late: a tenth of a second to import

    for error in Draft202012Validator(_SCHEMA).iter_errors(plain):
        place = ".".join(map(str, error.absolute_path))[:80]
        inside = f" in `{place}`" if place else ""
        found = _canonical(error.instance)[:60]
        if isinstance(error.instance, dict):
            found = f"an object with {listing(sorted(error.instance)) or 'nothing'}"
        expected = error.schema["description"]
        raise CheckpointError(f"its metadata is malformed{inside}: found {found}, expected {expected}")


def _closed(description: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that has these keys and no others."""
    known = {"properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "object", "description": f"{description}: {', '.join(properties)}", **known}


_TEXT = {"type": "string", "maxLength": 256, "description": "a text of at most 256 characters"}
_DIGEST = {"type": "string", "pattern": r"^[0-9a-f]{64}\Z", "description": "a SHA-256 in hexadecimal"}
_SIZE = {"type": "integer", "minimum": 1, "maximum": 2**48, "description": "a size, a whole number from 1"}
_LAYER = {"type": "integer", "minimum": 0, "maximum": 2**31, "description": "the number of a layer"}
_EXPERT = {**_LAYER, "description": "the number of an expert"}
_SITE = {
    "type": "array",
    "prefixItems": [_TEXT, _LAYER, _SIZE, _SIZE, _EXPERT],
    "items": False,
    "minItems": 4,
    "description": "a site: matrix, layer, d_out, d_in, and the expert if there are several",
}
_FACTOR = _closed(
    "a factor",
    dtype={"enum": list(DTYPES), "description": f"one of {', '.join(DTYPES)}"},
    shape={"type": "array", "items": _SIZE, "maxItems": 64, "description": "a list of sizes"},
    sha256=_DIGEST,
    stored={"type": "boolean", "description": "true or false"},
    mask={**_DIGEST, "type": ["string", "null"], "description": "a SHA-256 in hexadecimal, or null"},
)
_SCHEMA = _closed(
    "the header of an adapter",
    format={"const": FORMAT, "description": str(FORMAT)},
    library=_TEXT,
    spec={"type": "string", "maxLength": 2**20, "description": "the text of a spec"},
    base=_closed(
        "the base",
        model=_TEXT,
        fingerprint=_DIGEST,
        sites={"type": "array", "items": _SITE, "minItems": 1, "description": "a list of sites"},
    ),
    factors={
        "type": "object",
        "additionalProperties": _FACTOR,
        "minProperties": 1,
        "propertyNames": {
            "pattern": r"^([A-Za-z_][A-Za-z0-9_]*|base\..+)\Z",
            "description": "names of factors, or `base.` and the path of a parameter",
        },
        "description": "a mapping from factors to what is known of them",
    },
    sha256=_DIGEST,
)
