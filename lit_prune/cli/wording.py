"""What the parser refuses, in words for who typed it."""

from __future__ import annotations

import re

_KEY = re.compile(r'Parser key "(?:\w+\.)*(\w+)"')
_GIVEN = re.compile(r"(?:Got|Given) value: (.*)", re.DOTALL)
_CHOICES = re.compile(r"Literal\[(.*?)\]")
_TYPE = re.compile(r"Expected a <class '(\w+)'>")
_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "tuple": "a list, as in [first,second]",
}


def plainly(text: str, command: str | None) -> str:
    """Return a message of the parser without its types, and where to read on.

    Args:
        text: What jsonargparse or argparse says.
        command: Of ``lit-prune``, if there is one.

    Example:
        >>> plainly("the following arguments are required: prune.model", "prune")
        'the following arguments are required: --model. See lit-prune prune --help.'
    """
    key, given, choices = _KEY.search(text), _GIVEN.search(text), _CHOICES.search(text)
    kinds = [_WORDS[kind] for kind in dict.fromkeys(_TYPE.findall(text)) if kind in _WORDS]
    if key is not None and given is not None and (choices is not None or kinds):
        wanted = f"one of {choices[1]}" if choices is not None else " or ".join(kinds)
        text = f"--{key[1]}: {given[1].strip()!r} is not {wanted}"
    elif command is not None and "are required" in text:  # by how they nest in config files
        text = text.replace(f"{command}.", "--")
    return (
        f"{text}. See lit-prune {command} --help." if command else f"{text}. See lit-prune --help."
    )
